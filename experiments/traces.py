"""Does a ranking follow its trace? The trace of a finished run is edited, and the answer is decoded
again after it.

    python experiments/traces.py --config toy --seeds 0,1,2
    python experiments/traces.py --config toy --seeds 0,1,2 --unbound runs/free --none runs/none

The second also asks the stages of a run with --trace free and of one with --trace none, and says
how N@10 differs from the former. Other settings of those runs are read from their checkpoints.

    prompt edit   the prompt becomes another user's, the trace stays: share of rankings that change
                  (0 with --trace bound)
    exchange      the first and the last candidate of the answer exchange their evidence: share of
                  rankings that change
    consistency   toy: an item of the history has another value, and the trace says so, while the
                  prompt still has the old one. Of the pairs of candidates that differ for the
                  oracle by what a place of the list is worth at least, the share that the model
                  orders as the oracle does for the new value
    turned        the same, of the pairs that the oracle now orders the other way round
    first 25 %    N@10 where the answer sees only so many statements of the reference trace. Most
                  answers to a cut trace leave candidates out: strict, they count 0; served, those
                  come last in their incoming order

Where the answer sees the prompt (--trace free), the trace is given in whole blocks, and the
student writes the rest of it. Writes trace.json and trace.md into the run's folder.
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from plumbing.script import script  # noqa: E402  first: it sets how threads wait

import dataclasses  # noqa: E402
import itertools  # noqa: E402
from dataclasses import dataclass  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402

from analyse import exchange, interval, percent, table, whole_blocks  # noqa: E402
from config import STAGES, Config, folder  # noqa: E402
from data import LABEL, NONE, PAD, parse_answers, statements  # noqa: E402
from evaluate import paired_interval, score_order, stage_decoder  # noqa: E402
from fast.decode import fast_block_decode  # noqa: E402
from model import ar_decode  # noqa: E402
from ours.bound import answer_length  # noqa: E402
from plumbing.checkpoint import (checkpoint_path, device_of, finished_stages,  # noqa: E402
                                 load_tensors)
from plumbing.decoding import BATCH, decode_split  # noqa: E402
from plumbing.settings import Text, UserError  # noqa: E402
from report.decisive import answer_to  # noqa: E402
from report.options import finished_seeds  # noqa: E402
from report.rows import write_json, write_text  # noqa: E402
from toy.world import (TOY_ATTRIBUTES, TOY_HISTORY, TOY_PRIOR, TOY_VALUES,  # noqa: E402
                       toy_examples, toy_oracle, toy_words)
from trainer import load_world, rule_of  # noqa: E402

SEES = {"none": "the prompt", "free": "prompt and trace", "bound": "the trace"}
LEVEL = {"none": None, "free": 0, "bound": 2}
MEASURES = ("ndcg@10", "prompt_edit_changes", "exchange", "consistency", "turned")
CURVES = ("truncated_served", "truncated")  # [[share, N@10]]; the latter strict
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of a trace's statements


@dataclass(frozen=True)
class Options:
    seeds: Text() = "0,1,2"  # numbers with commas
    unbound: Text() = ""     # the --run_dir of a run with --trace free
    none: Text() = ""        # the --run_dir of a run with --trace none


# --- Answers after a given trace ----------------------------------------------------------------

def written(cfg, world, model, stage):
    """What a stage writes for the test users: tokens (N, R)."""
    decoder = stage_decoder(cfg, world, model, stage, cfg.tau)
    return decode_split(cfg, world.test, decoder, stage)[0]


def answer_after(cfg, world, model, stage, prompt, trace):
    """Answers to prompts (n, P) after traces (n, T) -> tokens (n, R); only the answer in them is
    new."""
    if cfg.trace == "bound":
        return answer_to(cfg, stage, model, trace)
    if stage == "ar":  # what stands before is a prompt like any other
        return ar_decode(model, torch.cat((prompt, trace), dim=1), answer_length(cfg))[0]
    given = trace[:, :whole_blocks(trace.shape[1], cfg.block_size)]
    return fast_block_decode(model, prompt, world.max_response, cfg.block_size, rule_of(cfg),
                             prefix=given).tokens


def answers(cfg, world, model, stage, prompts, traces):
    """Answers after traces (N, T), an array; prompts (N, P) as in a Split."""
    found = []
    for start in range(0, len(traces), BATCH):
        rows = slice(start, start + BATCH)
        given = [torch.from_numpy(x[rows]).long().to(device_of(cfg)) for x in (prompts, traces)]
        found.append(answer_after(cfg, world, model, stage, *given).cpu().numpy())
    return parse_answers(np.concatenate(found), world.test.incoming)


# --- The edits ----------------------------------------------------------------------------------

def exchanged(trace, order):
    """The first and the last candidate of each ranking (N, K) exchange their evidence."""
    k = int((order[0] >= 0).sum())
    at = np.array([int((trace[0] == LABEL + i).argmax()) for i in range(k)])
    stride = at[1] - at[0]                                        # tokens a statement
    pair = at[order[:, [0, k - 1]]]                               # (N, 2)
    return exchange(torch.from_numpy(trace), pair, stride).numpy()


def truncated(cfg, world, trace, share):
    """Traces (N, T), all lists being full, with this share of their statements, the first ones."""
    length = [len(part) for part in statements(trace[0], world.n_labels)]
    out = trace.copy()
    out[:, sum(length[:int(share * len(length))]):] = PAD if cfg.trace == "bound" else NONE
    return out


def toy_score(history, items):
    """The oracle's score of candidates: history (n, H, A), items (n, K, A) -> (n, K)."""
    counts = (history[..., None] == np.arange(TOY_VALUES)).sum(1)  # (n, A, V)
    return toy_oracle(counts, items, np.full(len(items), items.shape[1]))


def toy_counterfactual(world):
    """Test users of the toy world, of whom an item of the history has another value: the value of
    a candidate, in one attribute -> a Split, and the oracle's scores (N, K) before and after."""
    split, rng = world.test, np.random.default_rng(3)
    words = toy_words(world.n_labels)
    first = words.index("x0") + TOY_VALUES * np.arange(TOY_ATTRIBUTES)
    n, K = split.incoming.shape                                   # all lists are full
    length, step = TOY_HISTORY * TOY_ATTRIBUTES, 1 + TOY_ATTRIBUTES
    history = split.prompt[:, 1:1 + length].reshape(n, TOY_HISTORY, TOY_ATTRIBUTES) - first
    listed = split.prompt[:, 2 + length:].reshape(n, K, step)
    items = listed[..., 1:] - first
    before = toy_score(history, items)
    row, attribute = np.arange(n), rng.integers(TOY_ATTRIBUTES, size=n)
    value = items[row, rng.integers(K, size=n), attribute]
    history[row, rng.integers(TOY_HISTORY, size=n), attribute] = value
    edited = toy_examples(history, items, split.incoming, split.target, world.n_labels)
    return edited, before, toy_score(history, items)


def turned(before, after, least=0.0):
    """Which pairs of candidates two scores (N, K) order differently: bool (N, K, K); of those that
    differ by at least so much, both before and after."""
    one, two = (score[:, :, None] - score[:, None] for score in (before, after))
    return (one * two < 0) & (np.minimum(abs(one), abs(two)) >= least)


def places(order):
    """Rankings (N, K) of labels -> the place of each label (N, K)."""
    return np.argsort(order, axis=1)


# --- Measures -----------------------------------------------------------------------------------

def measures(cfg, world, model, stage):
    """{measure: a number, or None}, and N@10 strict of each user (N,)."""
    def ndcg(parsed):
        """N@10 served (N,); strict (N,)."""
        served = score_order(split, parsed.order)["served ndcg@10"]
        return served, served * parsed.valid

    def after(prompt, trace):
        return answers(cfg, world, model, stage, prompt, trace)

    split = world.test
    _, own = ndcg(parse_answers(written(cfg, world, model, stage), split.incoming))
    out = {**dict.fromkeys(MEASURES + CURVES), "ndcg@10": float(own.mean())}
    if cfg.trace == "none":
        return out, own
    trace, prompt = split.trace.astype(np.int64), split.prompt.astype(np.int64)
    same = after(prompt, trace).order
    other = after(np.roll(prompt, 1, axis=0), trace).order
    out["prompt_edit_changes"] = float((other != same).any(1).mean())
    forged_trace = exchanged(trace, same)
    differs = (forged_trace != trace).any(1)  # equal evidence changes nothing: left out
    forged = after(prompt, forged_trace).order
    out["exchange"] = float((forged != same).any(1)[differs].mean())
    if cfg.world == "toy":
        edited, before, now = toy_counterfactual(world)
        new = after(prompt, edited.trace.astype(np.int64)).order
        clear = abs(now[:, :, None] - now[:, None]) >= TOY_PRIOR  # (N, K, K)
        as_oracle = ~turned(-now, places(new))  # a high score is a low place
        out["consistency"] = float(as_oracle[clear].mean())
        out["turned"] = float(as_oracle[turned(before, now, TOY_PRIOR)].mean())
    cut = [ndcg(after(prompt, truncated(cfg, world, trace, share))) for share in SHARES]
    for name, of_users in zip(CURVES, zip(*cut)):
        out[name] = [[share, float(x.mean())] for share, x in zip(SHARES, of_users)]
    return out, own


def asked(cfg, seeds):
    """{stage: {seed: (measures, N@10 (N,))}} of a run, of all stages that have finished."""
    found, world = {}, load_world(cfg)
    for seed in seeds:
        of_seed = dataclasses.replace(cfg, seed=seed)
        for stage, (model, _) in finished_stages(of_seed, world).items():
            values, strict = measures(of_seed, world, model, stage)
            print(f"{cfg.trace}, seed {seed}, {stage}: {values}", flush=True)
            found.setdefault(stage, {})[seed] = values, strict
    return found


def other_run(cfg, run_dir, trace, seeds):
    """The settings of a run elsewhere: those that its checkpoints were made with."""
    there = dataclasses.replace(cfg, run_dir=run_dir, trace=trace, teacher="")
    known = {field.name for field in dataclasses.fields(Config)} - {"trace"}
    for seed, stage in itertools.product(finished_seeds(there, seeds), reversed(STAGES)):
        path = checkpoint_path(dataclasses.replace(there, seed=seed), stage)
        if os.path.exists(path):
            made = load_tensors(path)["settings"]
            return dataclasses.replace(there, **{n: v for n, v in made.items() if n in known})
    return there  # finished_stages will say what is missing


def lines_of(cfg, found, unbound):
    """The entries of trace.json of one run. unbound: what `asked` found of the other, or {}."""
    out = []
    for stage, of_seed in found.items():
        values, strict = zip(*of_seed.values())
        line = {"config": cfg.config, "stage": stage, "trace": cfg.trace,
                "level": LEVEL[cfg.trace], "seeds": len(values), "users": len(strict[0])}
        for name in MEASURES + CURVES:
            of = [value[name] for value in values]
            line[name] = None if None in of else np.mean(of, axis=0).tolist()
        both = [seed for seed in of_seed if seed in unbound.get(stage, {})]
        differ = [of_seed[seed][1] - unbound[stage][seed][1] for seed in both]
        line["diff_to_unbound"] = paired_interval(np.stack(differ))[0] if both else None
        out.append(line)
    return out


def markdown(lines):
    """The measures, and N@10 of truncated traces: two tables."""
    rows, cut = [], []
    for line in lines:
        who = [line["stage"], SEES[line["trace"]]]
        rows.append([
            *who, f"{line['ndcg@10']:.3f}", interval(line["diff_to_unbound"]),
            *(percent(line[name]) for name in MEASURES[1:])])
        for name, score in zip(CURVES, ("served", "strict")):
            if line[name]:
                cut.append([*who, score, *(f"{ndcg:.3f}" for _, ndcg in line[name])])
    head = ["stage", "answer sees"]
    return "\n\n".join((
        table(head + ["N@10", "− unbound", "prompt edit", "exchange", "consistency", "turned"],
              rows),
        table(head + ["score"] + [f"first {100 * share:.0f} %" for share in SHARES], cut))) + "\n"


def main(cfg, options):
    if cfg.trace == "none":
        raise UserError("there is no trace to edit: use --trace bound or --trace free")
    free, lines = {}, []
    if options.unbound:
        other = other_run(cfg, options.unbound, "free", options.seeds)
        free = asked(other, finished_seeds(other, options.seeds))
        lines = lines_of(other, free, {})
    if options.none:
        other = other_run(cfg, options.none, "none", options.seeds)
        lines = lines_of(other, asked(other, finished_seeds(other, options.seeds)), free) + lines
    lines += lines_of(cfg, asked(cfg, finished_seeds(cfg, options.seeds)), free)
    write_json(folder(cfg, "trace.json"), lines)
    write_text(folder(cfg, "trace.md"), markdown(lines))
    print(markdown(lines))


if __name__ == "__main__":
    script(main, __doc__, also=Options)
