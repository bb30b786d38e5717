"""Five questions that the table of evaluate.py leaves open, asked of a finished run.

    python experiments/analyse.py --config toy      # 2 minutes on 2 CPU cores
    python experiments/analyse.py --config small    # Amazon Beauty, 4 minutes

1. How many steps does the answer need? The trace is decoded as always, then the answer in a given number of steps.
2. Which failure where? Duplicates by place in the answer, dropped labels by place in the incoming list.
3. Does the trace matter? Two candidates exchange their evidence in the finished trace; does the ranking change?
4. How tight is the likelihood bound? Nats a token at several block sizes, before and after the conversion.
5. What about shorter lists? The first candidates alone, down to the shortest list of training.
Writes analysis.json and analysis.md beside the report; --seed picks the conversion.
"""
import dataclasses
import json
import os
import sys

import numpy as np
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from common import decode_split, device_of, finished_stages, generator, save_atomically, script, serve  # noqa: E402
from config import UserError, folder  # noqa: E402
from data import LABEL, NONE, load_world, parse_answers, tensors  # noqa: E402
from diffusion import diffusion_loss  # noqa: E402
from evaluate import ranking_metrics, score, score_order  # noqa: E402
from model import PAD  # noqa: E402


def decode(cfg, world, model, split, prefix=None, **other):
    """What a model decodes at the operating point, or with other settings, behind prefix (N, L) if there is one: tokens (N, R) on
    the CPU."""
    def decoder(prompt, rows):
        given = None if prefix is None else prefix[rows.start:rows.stop].to(prompt.device)
        decoded = serve(cfg, model, prompt, world.max_response, prefix=given, **other)
        return decoded.tokens, decoded.forwards
    return torch.from_numpy(decode_split(cfg, split, decoder, "decode")[0])


def whole_traces(tokens, world, split):
    """Rows (n,) of responses whose trace has the length that the rule gives it, the layout being known there, and that
    length, <answer> included. Lists of a split that is tested are equally long, and so are their traces."""
    length = int((split.trace[0] != PAD).sum())
    rows = np.flatnonzero(parse_answers(tokens.numpy(), split.incoming).trace_tokens == length)
    return rows, length + 1


def answer_steps(cfg, world, model, tokens):
    """[{steps, valid, ndcg@10}]: the answer decoded in about `steps` steps a block, behind the trace that `tokens` has."""
    rows, length = whole_traces(tokens, world, world.test)
    given = length // cfg.block_size * cfg.block_size  # whole blocks: where the answer starts inside one, a few trace tokens too
    out, split = [], world.test.take(rows)
    for steps in (1, 2, 3, 4, 6, 8, 16):
        if steps <= cfg.block_size:
            got = decode(cfg, world, model, split, tokens[rows][:, :given], rule="steps", tau=steps)
            answers = parse_answers(got.numpy(), split.incoming)
            ndcg = ranking_metrics((answers.order == split.target[:, None]).argmax(1))["ndcg@10"]
            out.append({"steps": steps, "valid": answers.valid.mean(), "ndcg@10": (ndcg * answers.valid).mean()})
    return out


def failures(tokens, world):
    """Shares of answers, by place: a label that stood earlier in the answer (by slot), a label that never comes (by list
    position), something that is no label of the list (by slot)."""
    rows, length = whole_traces(tokens, world, world.test)
    k = int(world.test.k[0])
    label = tokens[rows][:, length:length + k].numpy() - LABEL  # (n, k)
    earlier = (label[:, :, None] == label[:, None]) & np.tri(k, k=-1, dtype=bool)
    there = (label[:, :, None] == np.arange(k)).any(1)
    return {"duplicate_by_slot": earlier.any(2).mean(0).tolist(), "dropped_by_position": (~there).mean(0).tolist(),
            "no_label_by_slot": ((label < 0) | (label >= k)).mean(0).tolist(), "answers": len(rows)}


def falsified(cfg, world, model, tokens, B):
    """The evidence of the best and of the last candidate of each answer changes places in the trace, their labels staying;
    then the answer is decoded again. Shares of answers that change, and where the two candidates go."""
    rows, length = whole_traces(tokens, world, world.test)
    split, given = world.test.take(rows), length // B * B
    before = parse_answers(tokens[rows].numpy(), split.incoming)
    k, forged = int(split.k[0]), tokens[rows].clone()
    at = [int((split.trace[0] == LABEL + i).argmax()) for i in range(k)]  # where each statement starts, its label first
    stride = at[1] - at[0]
    inside = before.order[:, :k] < sum(a + stride <= given for a in at)  # statements that stand in whole blocks (all, on Beauty)
    every = np.arange(len(rows))
    pair = np.stack((before.order[every, inside.argmax(1)], before.order[every, k - 1 - inside[:, ::-1].argmax(1)]), 1)
    start = torch.from_numpy(np.array(at)[pair])  # (n, 2)
    n, lane = torch.arange(len(rows))[:, None, None], torch.arange(1, stride)
    place = start[..., None] + lane  # (n, 2, stride-1)
    forged[n, place] = forged[n, place.flip(1)]
    changed = (forged != tokens[rows]).any(1).numpy()  # equal evidence changes nothing: left out
    out = {"answers": int(changed.sum())}
    orders = {}
    for name, text in (("same", tokens[rows]), ("forged", forged)):
        got = decode(cfg, world, model, split, text[:, :given], block_size=B)
        orders[name] = parse_answers(got.numpy(), split.incoming).order[changed]
    rank = lambda order, which: (order == pair[changed][:, which, None]).argmax(1).mean() + 1
    out["changed_without_forgery"] = (orders["same"] != before.order[changed]).any(1).mean()
    out["ranking_changed"] = (orders["forged"] != orders["same"]).any(1).mean()
    out["first_changed"] = (orders["forged"][:, 0] != orders["same"][:, 0]).mean()
    for name in orders:
        out |= {f"rank_of_best_{name}": rank(orders[name], 0), f"rank_of_last_{name}": rank(orders[name], 1)}
    return out


@torch.no_grad()
def bound(cfg, model, prompt, response, block_size, draws=16):
    """Upper bound on the negative log-likelihood of reference responses, nats a token; at block size 1 it is exact."""
    losses = [diffusion_loss(model, prompt, response, block_size, generator=generator(cfg, "bound", draw)).item()
              for draw in range(1 if block_size == 1 else draws)]
    return sum(losses) / len(losses)


def shorter(split, k):
    """The examples whose target is among the first k candidates, cut to these: -> Split. The lists must have K candidates, and
    labels be places in them."""
    cut = split.take(np.flatnonzero((split.target >= 0) & (split.target < k)))  # a copy
    K = cut.incoming.shape[1]
    stride = int((split.trace[0] == LABEL + 1).argmax() - (split.trace[0] == LABEL).argmax())  # tokens a candidate
    for tokens in (cut.prompt, cut.trace):  # candidates end both
        tokens[:, tokens.shape[1] - stride * (K - k):] = NONE
    cut.incoming[:, k:] = -1
    cut.order = np.pad(cut.order[cut.order < k].reshape(-1, k), ((0, 0), (0, K - k)), constant_values=-1)
    return cut


def lengths(cfg, world, model, B):
    """[{k, users, valid, faithful, gain, reference_gain}] for lists of k candidates: gains in strict N@10 over the incoming order."""
    out = []
    for k in range(cfg.min_list, cfg.n_candidates + 1):
        split = shorter(world.test, k)
        if not len(split):
            continue
        tokens = decode(cfg, world, model, split, block_size=B).numpy()
        got, reference, before = score(world, split, tokens), score_order(split, split.order), score_order(split, split.incoming)
        gain = lambda scores: (scores["strict ndcg@10"] - before["strict ndcg@10"]).mean()
        out.append({"k": k, "users": len(split), "valid": got["valid"].mean(), "faithful": got["faithful"].mean(),
                    "gain": gain(got), "reference_gain": gain(reference)})
    return out


def main(cfg):
    if not cfg.trace or cfg.random_labels:
        raise UserError("analyse.py takes traces apart by their layout: it needs --trace true and --random_labels false")
    world, out = load_world(cfg), {}
    models = {s: model for s, (model, _) in finished_stages(cfg, world).items()}
    if len(models) == 1:
        raise UserError(f"there is no conversion to analyse: first run `python train_cft.py --config {cfg.config}`")
    users = min(cfg.eval_curve_users, len(world.test))  # of these, all but the places of failures, which are rare
    few = dataclasses.replace(world, test=world.test.take(slice(0, users)))
    prompt, response = tensors(world.test, range(min(64, users)), device_of(cfg))
    for stage in dict.fromkeys(s for s in ("ar", "cft", list(models)[-1]) if s in models):
        model, B = models[stage], 1 if stage == "ar" else cfg.block_size
        row = out[stage] = {}
        tokens = decode(cfg, world, model, world.test, block_size=B)
        if not len(whole_traces(tokens[:users], few, few.test)[0]):
            raise UserError(f"{stage}: no trace has its proper length, there is nothing to analyse: train for longer")
        if stage == "ar":
            traces = tokens[:users]
        row["failures"] = failures(tokens, world)
        row["falsified"] = falsified(cfg, few, model, tokens[:users], B)
        row["answer_steps"] = answer_steps(cfg, few, model, tokens[:users]) if B > 1 else None
        row["bound"] = {b: bound(cfg, model, prompt, response, b) for b in (1, 4, 8, 16)}
        row["lengths"] = lengths(cfg, few, model, B)
    # the naive conversion decodes the answer behind the AR teacher's own trace
    out["naive"] = {"answer_steps": answer_steps(cfg, few, models["ar"], traces)}
    text = markdown(out)
    save_atomically(folder(cfg, "analysis.json"), lambda p: open(p, "w").write(json.dumps(out, indent=1) + "\n"))
    save_atomically(folder(cfg, "analysis.md"), lambda p: open(p, "w").write(text))
    print(text)


def markdown(out):
    """Five tables."""
    table = lambda head, rows: ["| " + " | ".join(map(str, head)) + " |", "|---" * len(head) + "|",
                                *("| " + " | ".join(map(str, row)) + " |" for row in rows), ""]
    percent, stages = lambda v: f"{100 * v:.1f} %", [s for s in out if s != "naive"]
    students = [s for s in ("naive", *stages) if out[s]["answer_steps"]]
    lines = ["## Steps for the answer", "", "Valid rate (strict N@10) of the answer, decoded in about n steps behind the stage's own trace.", ""]
    lines += table(["steps", *students], [[row["steps"], *(f"{percent(out[s]['answer_steps'][i]['valid'])} ({out[s]['answer_steps'][i]['ndcg@10']:.3f})"
                                                          for s in students)] for i, row in enumerate(out[students[0]]["answer_steps"])])
    lines += ["## Which failure where", "", "Share of answers with a label at this slot that stood earlier; with the candidate of this "
              "incoming position dropped.", ""]
    for name in ("duplicate_by_slot", "dropped_by_position"):
        values = {s: out[s]["failures"][name] for s in stages}
        lines += table([name.replace("_", " "), *range(1, 1 + len(next(iter(values.values()))))],
                       [[s, *map(percent, v)] for s, v in values.items()])
    lines += ["## Falsified traces", "", "The best and the last candidate of an answer exchange their evidence in the trace; then the answer is "
              "decoded again.", ""]
    lines += table(["stage", "answers", "ranking changed", "first changed", "rank of the best: before, after", "rank of the last: before, after"],
                   [[s, f["answers"], percent(f["ranking_changed"]), percent(f["first_changed"]),
                     f"{f['rank_of_best_same']:.2f}, {f['rank_of_best_forged']:.2f}", f"{f['rank_of_last_same']:.2f}, {f['rank_of_last_forged']:.2f}"]
                    for s, f in ((s, out[s]["falsified"]) for s in stages)])
    lines += ["## Likelihood bound", "", "Nats a token of the reference responses; at B = 1 exact, the AR likelihood.", ""]
    lines += table(["weights", *(f"B = {b}" for b in out["ar"]["bound"])], [[s, *(f"{v:.4f}" for v in out[s]["bound"].values())] for s in stages])
    lines += ["## Shorter lists", "", "The first candidates alone, for users whose target is among them: valid, faithful, gain in strict N@10 over the "
              "incoming order (the reference order's gain).", ""]
    lines += table(["candidates", "users", *stages], [[row["k"], row["users"], *(
        f"{percent(r['valid'])}, {percent(r['faithful'])}, {r['gain']:+.3f} ({r['reference_gain']:+.3f})" for r in (out[s]["lengths"][i] for s in stages))]
        for i, row in enumerate(out["ar"]["lengths"])])
    return "\n".join(lines)


if __name__ == "__main__":
    script(main, __doc__)
