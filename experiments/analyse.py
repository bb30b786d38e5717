"""Five questions that the table of evaluate.py leaves open, asked of a finished run.

    python experiments/analyse.py --config toy      # 2 minutes on 2 CPU cores
    python experiments/analyse.py --config small    # Amazon Beauty, 4 minutes

1. How many steps does the answer need? The trace is decoded as always, then the answer in a given
   number of steps.
2. Which failure where? Duplicates by place in the answer, dropped labels by place in the list.
3. Does the trace matter? Two candidates exchange their evidence in the finished trace; does the
   ranking change?
4. How tight is the likelihood bound? Nats a token at several block sizes, before and after the
   conversion.
5. What about shorter lists? The first candidates alone, down to the shortest list of training.
Writes analysis.json and analysis.md beside the report; --seed picks the conversion.
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from plumbing.script import script  # noqa: E402  first: it sets how threads wait

import dataclasses  # noqa: E402
from dataclasses import dataclass  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402

from config import MANY, PAPER, folder  # noqa: E402
from data import LABEL, NONE, PAD, parse_answers, tensors  # noqa: E402
from diffusion import fill_last_block  # noqa: E402
from evaluate import ranking_metrics, score, score_order  # noqa: E402
from fast.decode import fast_block_decode  # noqa: E402
from plumbing.checkpoint import device_of, finished_stages  # noqa: E402
from plumbing.decoding import decode_split  # noqa: E402
from plumbing.settings import UserError, Whole  # noqa: E402
from report.rows import write_json, write_text  # noqa: E402
from rules import Steps  # noqa: E402
from trainer import load_world, rng_for, rule_of  # noqa: E402
from train_cft import cft_loss  # noqa: E402


@dataclass(frozen=True)
class Options:
    eval_curve_users: Whole(1, MANY) = 400  # test users; question 2, failures being rare, takes all

    PRESETS = {"small": dict(eval_curve_users=300), "full": dict(eval_curve_users=1000)}


def decode(cfg, world, model, split, prefix=None, rule=None):
    """Tokens (N, R), on the CPU, that a model writes at the operating point, or by another rule;
    after a given beginning prefix (N, L), whole blocks, if there is one."""
    rule = rule or rule_of(cfg)

    def decoder(prompt, rows):
        given = None if prefix is None else prefix[rows.start:rows.stop].to(prompt.device)
        decoded = fast_block_decode(model, prompt, world.max_response, cfg.block_size, rule,
                                    prefix=given)
        return decoded.tokens, decoded.forwards
    return torch.from_numpy(decode_split(cfg, split, decoder, "decode")[0])


def whole_traces(tokens, split):
    """Rows (n,) of responses whose trace is as long as the rule writes it, and that length with
    <answer>. The layout of such traces is known. All lists of the split are equally long."""
    length = int((split.trace[0] != PAD).sum())
    written = parse_answers(tokens.numpy(), split.incoming).trace_tokens
    return np.flatnonzero(written == length), length + 1


def whole_blocks(length, block_size):
    return length // block_size * block_size


# --- 1. Steps for the answer ------------------------------------------------------------------

def answer_steps(cfg, world, model, tokens):
    """[{steps, valid, ndcg@10}]: the answer in about `steps` steps a block, after the trace of
    tokens (N, R). Where the answer starts inside a block, a few trace tokens are decoded too."""
    rows, length = whole_traces(tokens, world.test)
    given = tokens[rows][:, :whole_blocks(length, cfg.block_size)]
    out, split = [], world.test.take(rows)
    for steps in (1, 2, 3, 4, 6, 8, 16):
        if steps > cfg.block_size:
            break
        got = decode(cfg, world, model, split, given, Steps(steps))
        answers = parse_answers(got.numpy(), split.incoming)
        rank = (answers.order == split.target[:, None]).argmax(1)
        ndcg = ranking_metrics(rank)["ndcg@10"] * answers.valid
        out.append({"steps": steps, "valid": answers.valid.mean(), "ndcg@10": ndcg.mean()})
    return out


# --- 2. Failures by place ---------------------------------------------------------------------

def failures(tokens, split):
    """Shares of answers, by place: a label that stood further left in the answer (by slot), a
    label that never comes (by list position), what is no label of the list (by slot)."""
    rows, length = whole_traces(tokens, split)
    k = int(split.list_length[0])
    label = tokens[rows][:, length:length + k].numpy() - LABEL    # (n, k)
    same = label[:, :, None] == label[:, None]                    # (n, k, k)
    twice = (same & np.tri(k, k=-1, dtype=bool)).any(2)
    there = (label[:, :, None] == np.arange(k)).any(1)
    foreign = (label < 0) | (label >= k)
    return {"duplicate_by_slot": twice.mean(0).tolist(),
            "dropped_by_position": (~there).mean(0).tolist(),
            "no_label_by_slot": foreign.mean(0).tolist(), "answers": len(rows)}


# --- 3. Falsified traces ----------------------------------------------------------------------

def mean(values):
    """None of no values: JSON knows no nan."""
    return float(values.mean()) if len(values) else None


def exchange(tokens, start, stride):
    """Tokens (n, R) in which the two statements that start at start (n, 2), stride tokens long,
    exchange all but their labels."""
    start = torch.from_numpy(start)
    place = start[..., None] + torch.arange(1, stride)            # (n, 2, stride - 1)
    row = torch.arange(len(tokens))[:, None, None]
    forged = tokens.clone()
    forged[row, place] = tokens[row, place.flip(1)]
    return forged


def falsified(cfg, world, model, tokens):
    """The evidence of the best and of the last candidate of each answer changes places in the
    trace; then the answer is decoded again. Shares of answers that change, and where the two
    candidates go. Only statements in whole blocks are exchanged (all of them, on Beauty)."""
    rows, length = whole_traces(tokens, world.test)
    split, written = world.test.take(rows), tokens[rows]
    given = whole_blocks(length, cfg.block_size)
    k = int(split.list_length[0])
    before = parse_answers(written.numpy(), split.incoming).order[:, :k]
    at = np.array([int((split.trace[0] == LABEL + i).argmax()) for i in range(k)])
    stride = at[1] - at[0]                                        # tokens a statement

    inside = before < (at + stride <= given).sum()                # (n, k) stands in whole blocks
    best, last = inside.argmax(1), k - 1 - inside[:, ::-1].argmax(1)
    every = np.arange(len(rows))
    pair = np.stack((before[every, best], before[every, last]), axis=1)  # (n, 2) labels
    forged = exchange(written, at[pair], stride)
    said, now_said = world.plain(written.numpy()), world.plain(forged.numpy())
    changed = (now_said != said).any(1)  # equal evidence changes nothing: left out
    pair, before = pair[changed], before[changed]

    orders = {}
    for name, text in (("same", written), ("forged", forged)):
        got = decode(cfg, world, model, split, text[:, :given]).numpy()
        orders[name] = parse_answers(got, split.incoming).order[changed][:, :k]
    same, new = orders["same"], orders["forged"]
    out = {"answers": int(changed.sum()),
           "changed_without_forgery": mean((same != before).any(1)),
           "ranking_changed": mean((new != same).any(1)),
           "first_changed": mean(new[:, 0] != same[:, 0])}
    for name, order in orders.items():
        for which, label in (("best", pair[:, :1]), ("last", pair[:, 1:])):
            out[f"rank_of_{which}_{name}"] = mean((order == label).argmax(1) + 1)
    return out


# --- 4. The likelihood bound ------------------------------------------------------------------

def paper_loss(cfg, block_size):
    """Settings with which train_cft.cft_loss estimates the bound: ours off, tokens weigh alike."""
    return dataclasses.replace(
        cfg, **PAPER, block_size=block_size, answer_weight=1.0, bfloat16=False)


@torch.no_grad()
def bound(cfg, model, prompt, response, block_size, draws=16):
    """Upper bound on the negative log-likelihood of responses, in nats a real token; at block
    size 1 it is exact. prompt (N, P), response (N, R).

    The loss is a mean over all slots of the blocks. Those after [EOS] are part of what the
    sampler writes, and are counted, but they are no tokens of the response."""
    _, in_block = fill_last_block(response, block_size)
    slots_a_token = (in_block.sum() / (response != PAD).sum()).item()
    losses = []
    for draw in range(1 if block_size == 1 else draws):
        rng = rng_for(cfg, "bound", draw)
        losses.append(cft_loss(paper_loss(cfg, block_size), model, prompt, response, rng).item())
    return slots_a_token * sum(losses) / len(losses)


# --- 5. Shorter lists -------------------------------------------------------------------------

def shorter(split, k):
    """The users whose target is among the first k candidates, with these alone: -> Split.

    The lists must have K candidates, and labels be places in them."""
    cut = split.take(np.flatnonzero((split.target >= 0) & (split.target < k)))  # a copy
    K = cut.incoming.shape[1]
    first, second = ((split.trace[0] == LABEL + i).argmax() for i in (0, 1))
    removed = int(second - first) * (K - k)                       # tokens; candidates end both
    for tokens in (cut.prompt, cut.trace):
        tokens[:, tokens.shape[1] - removed:] = NONE
    cut.incoming[:, k:] = -1
    kept = cut.order[cut.order < k].reshape(-1, k)
    cut.order = np.pad(kept, ((0, 0), (0, K - k)), constant_values=-1)
    return cut


def lengths(cfg, world, model):
    """[{k, users, valid, faithful, gain, reference_gain}] for lists of k candidates: gains in
    strict N@10 over the incoming order."""
    out = []
    for k in range(cfg.min_list, cfg.n_candidates + 1):
        split = shorter(world.test, k)
        if not len(split):
            continue
        got = score(world, split, decode(cfg, world, model, split).numpy())
        before = score_order(split, split.incoming)["strict ndcg@10"]
        reference = score_order(split, split.order)["strict ndcg@10"]
        out.append({"k": k, "users": len(split), "valid": got["valid"].mean(),
                    "faithful": got["faithful"].mean(),
                    "gain": (got["strict ndcg@10"] - before).mean(),
                    "reference_gain": (reference - before).mean()})
    return out


# --- The run ----------------------------------------------------------------------------------

def check(cfg):
    if cfg.trace != "free" or cfg.world == "toy_random_labels":
        raise UserError("analyse.py takes traces apart by their layout: it needs --trace free and "
                        "labels that are places in the list, not --world toy_random_labels")
    if not cfg.fast:
        raise UserError("analyse.py continues given texts, which the decoder of fast/ alone can: "
                        "leave out --fast false")


def analysis(cfg, world, few, model, tokens):
    """All five answers for one model. few: the world with the first test users alone; tokens
    (N, R): what the model writes for all of them."""
    n = len(few.test)
    prompt, response = tensors(few.test, range(min(64, n)), device_of(cfg))
    steps = None
    if cfg.block_size > 1:
        steps = answer_steps(cfg, few, model, tokens[:n])
    return {"failures": failures(tokens, world.test),
            "falsified": falsified(cfg, few, model, tokens[:n]),
            "answer_steps": steps,
            "bound": {b: bound(cfg, model, prompt, response, b) for b in (1, 4, 8, 16)},
            "lengths": lengths(cfg, few, model)}


def main(cfg, options):
    check(cfg)
    world, out = load_world(cfg), {}
    models = {stage: model for stage, (model, _) in finished_stages(cfg, world).items()}
    if len(models) == 1:
        raise UserError("there is no conversion to analyse: first run `python train_cft.py "
                        f"--config {cfg.config}`")
    few = dataclasses.replace(world, test=world.test.take(slice(0, options.eval_curve_users)))
    last = list(models)[-1]
    for stage in dict.fromkeys(("ar", "cft", last)):
        if stage not in models:
            continue
        # AR is the sampler with blocks of one token.
        here = dataclasses.replace(cfg, block_size=1) if stage == "ar" else cfg
        tokens = decode(here, world, models[stage], world.test)
        if not len(whole_traces(tokens[:len(few.test)], few.test)[0]):
            raise UserError(f"{stage}: no trace has its proper length, there is nothing to "
                            "analyse: train for longer")
        out[stage] = analysis(here, world, few, models[stage], tokens)
        if stage == "ar":
            traces = tokens[:len(few.test)]
    # The naive conversion decodes the answer after the AR teacher's own trace.
    out["naive"] = {"answer_steps": answer_steps(cfg, few, models["ar"], traces)}
    text = markdown(out)
    write_json(folder(cfg, "analysis.json"), out)
    write_text(folder(cfg, "analysis.md"), text)
    print(text)


# --- Tables -----------------------------------------------------------------------------------

def table(head, rows):
    lines = [head, *rows]
    lines = ["| " + " | ".join(map(str, cells)) + " |" for cells in lines]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


def percent(value):
    return "–" if value is None else f"{100 * value:.1f} %"


def interval(value):
    """A difference as evaluate.paired_interval gives it, or None."""
    low, mean, high = value or (None, None, None)
    if mean is None:
        return "–"
    return f"{mean:+.4f}" + ("" if low is None else f" [{low:+.4f}, {high:+.4f}]")


def two(falsified, which):
    """The rank of a candidate before and after."""
    ranks = falsified[f"rank_of_{which}_same"], falsified[f"rank_of_{which}_forged"]
    return ", ".join("–" if rank is None else f"{rank:.2f}" for rank in ranks)


def steps_table(out):
    students = [s for s in ("naive", "cft", "opd", "rl") if s in out and out[s]["answer_steps"]]
    rows = []
    for i, first in enumerate(out[students[0]]["answer_steps"]):
        of = [out[stage]["answer_steps"][i] for stage in students]
        rows.append([first["steps"], *(f"{percent(r['valid'])} ({r['ndcg@10']:.3f})" for r in of)])
    return table(["steps", *students], rows)


def failures_table(out, stages, name):
    values = {stage: out[stage]["failures"][name] for stage in stages}
    places = range(1, 1 + len(values[stages[0]]))
    rows = [[stage, *map(percent, of)] for stage, of in values.items()]
    return table([name.replace("_", " "), *places], rows)


def falsified_table(out, stages):
    rows = []
    for stage in stages:
        f = out[stage]["falsified"]
        rows.append([stage, f["answers"], percent(f["ranking_changed"]),
                     percent(f["first_changed"]),
                     two(f, "best"), two(f, "last")])
    return table(["stage", "answers", "ranking changed", "first changed",
                  "rank of the best: before, after", "rank of the last: before, after"], rows)


def bound_table(out, stages):
    rows = [[stage, *(f"{nats:.4f}" for nats in out[stage]["bound"].values())] for stage in stages]
    return table(["weights", *(f"B = {b}" for b in out["ar"]["bound"])], rows)


def lengths_table(out, stages):
    rows = []
    for i, first in enumerate(out["ar"]["lengths"]):
        of = [out[stage]["lengths"][i] for stage in stages]
        rows.append([first["k"], first["users"], *(
            f"{percent(r['valid'])}, {percent(r['faithful'])}, {r['gain']:+.3f} "
            f"({r['reference_gain']:+.3f})" for r in of)])
    return table(["candidates", "users", *stages], rows)


def markdown(out):
    """Five tables. out: {stage: analysis}, and what "naive" has of it."""
    stages = [stage for stage in out if stage != "naive"]
    return "\n\n".join([
        "## Steps for the answer",
        "Valid rate (strict N@10) of the answer, decoded in about n steps after the stage's own "
        "trace.",
        steps_table(out),
        "## Which failure where",
        "Share of answers with a label at this slot that stood further left; with the candidate "
        "of this incoming position dropped.",
        failures_table(out, stages, "duplicate_by_slot"),
        failures_table(out, stages, "dropped_by_position"),
        "## Falsified traces",
        "The best and the last candidate of an answer exchange their evidence in the trace; then "
        "the answer is decoded again.",
        falsified_table(out, stages),
        "## Likelihood bound",
        "Nats a real token of the reference responses; at B = 1 exact, the AR likelihood.",
        bound_table(out, stages),
        "## Shorter lists",
        "The first candidates alone, for users whose target is among them: valid, faithful, gain "
        "in strict N@10 over the incoming order (the reference order's gain).",
        lengths_table(out, stages)]) + "\n"


if __name__ == "__main__":
    script(main, __doc__, also=Options)
