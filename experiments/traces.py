"""Does a ranking follow its trace? The trace of a finished run is edited, and the answer is decoded
again after it.

    python experiments/traces.py --config toy --seeds 0,1,2
    python experiments/traces.py --config toy --seeds 0,1,2 --unbound runs/free  # 1,600 steps of CFT

The second also asks the stages of a run with --trace free, and says how N@10 differs.

    prompt edit   the prompt becomes another user's, the trace stays: share of rankings that change
                  (0 with --trace bound)
    exchange      the first and the last candidate of the answer exchange their evidence: share of
                  rankings that change
    consistency   toy: an item of the history has another value, and the trace says so, while the
                  prompt still has the old one. Of the pairs of candidates that differ for the
                  oracle by what a place of the list is worth at least, the share that the model
                  orders as the oracle does for the new value
    turned        the same, of the pairs that the oracle now orders the other way round
    first half    N@10 after the first half of the trace alone

Where the answer sees the prompt (--trace free), the trace is given in whole blocks, and the
student writes the rest of it. Writes trace.json and trace.md into the run's folder.
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from plumbing.script import script  # noqa: E402  first: it sets how threads wait

import dataclasses  # noqa: E402
from dataclasses import dataclass  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402

from analyse import exchange, whole_blocks  # noqa: E402
from config import folder  # noqa: E402
from data import LABEL, NONE, PAD, parse_answers  # noqa: E402
from evaluate import paired_interval, score_order, stage_decoder  # noqa: E402
from fast.decode import fast_block_decode  # noqa: E402
from model import ar_decode  # noqa: E402
from ours.bound import answer_length, for_answer, what_is_read  # noqa: E402
from plumbing.checkpoint import device_of, finished_stages  # noqa: E402
from plumbing.decoding import BATCH, decode_split  # noqa: E402
from plumbing.settings import Text, UserError  # noqa: E402
from report.options import finished_seeds  # noqa: E402
from report.rows import write_json, write_text  # noqa: E402
from sampler import block_decode  # noqa: E402
from toy.world import (TOY_ATTRIBUTES, TOY_HISTORY, TOY_PRIOR, TOY_VALUES,  # noqa: E402
                       toy_examples, toy_oracle, toy_words)
from trainer import load_world, rule_of  # noqa: E402

FREE = dict(trace="free", block_size=16, cft_steps=1600)  # what a conversion needs there
MEASURES = ("ndcg@10", "prompt_edit_changes", "exchange", "consistency", "turned", "first_half")


@dataclass(frozen=True)
class Options:
    seeds: Text() = "0,1,2"  # numbers with commas
    unbound: Text() = ""     # the --run_dir of a run with --trace free and other settings alike


# --- Answers after a given trace ----------------------------------------------------------------

def written(cfg, world, model, stage):
    """What a stage writes for the test users: tokens (N, R)."""
    decoder = stage_decoder(cfg, world, model, stage, cfg.tau)
    return decode_split(cfg, world.test, decoder, stage)[0]


def answer_after(cfg, world, model, stage, prompt, trace):
    """Answers to prompts (n, P) after traces (n, T) -> tokens (n, R); only the answer in them is
    new."""
    if cfg.trace == "bound":
        own, read = for_answer(cfg), what_is_read(trace)
        if stage == "ar":
            return ar_decode(model, read, answer_length(cfg))[0]
        return block_decode(model, read, answer_length(cfg), own.block_size, rule_of(own)).tokens
    if stage == "ar":  # what stands before is a prompt like any other
        return ar_decode(model, torch.cat((prompt, trace), dim=1), answer_length(cfg))[0]
    given = trace[:, :whole_blocks(trace.shape[1], cfg.block_size)]
    return fast_block_decode(model, prompt, world.max_response, cfg.block_size, rule_of(cfg),
                             prefix=given).tokens


def orders(cfg, world, model, stage, prompts, traces):
    """Rankings (N, K) after traces (N, T), both arrays; prompts (N, P) as in a Split."""
    found = []
    for start in range(0, len(traces), BATCH):
        rows = slice(start, start + BATCH)
        given = [torch.from_numpy(x[rows]).long().to(device_of(cfg)) for x in (prompts, traces)]
        tokens = answer_after(cfg, world, model, stage, *given).cpu().numpy()
        found.append(parse_answers(tokens, world.test.incoming[rows]).order)
    return np.concatenate(found)


# --- The edits ----------------------------------------------------------------------------------

def exchanged(trace, order):
    """The first and the last candidate of each ranking (N, K) exchange their evidence."""
    k = int((order[0] >= 0).sum())
    at = np.array([int((trace[0] == LABEL + i).argmax()) for i in range(k)])
    stride = at[1] - at[0]                                        # tokens a statement
    pair = at[order[:, [0, k - 1]]]                               # (N, 2)
    return exchange(torch.from_numpy(trace), pair, stride).numpy()


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
    split = world.test
    tokens = written(cfg, world, model, stage)
    answers = parse_answers(tokens, split.incoming)
    strict = score_order(split, answers.order)["strict ndcg@10"] * answers.valid

    trace, prompt = split.trace.astype(np.int64), split.prompt.astype(np.int64)
    same = orders(cfg, world, model, stage, prompt, trace)
    other = orders(cfg, world, model, stage, np.roll(prompt, 1, axis=0), trace)
    forged_trace = exchanged(trace, same)
    differs = (forged_trace != trace).any(1)  # equal evidence changes nothing: left out
    forged = orders(cfg, world, model, stage, prompt, forged_trace)
    half = trace.copy()
    half[:, trace.shape[1] // 2:] = PAD if cfg.trace == "bound" else NONE
    after_half = orders(cfg, world, model, stage, prompt, half)
    out = {"ndcg@10": strict.mean(), "prompt_edit_changes": (other != same).any(1).mean(),
           "exchange": (forged != same).any(1)[differs].mean(), "consistency": None, "turned": None,
           "first_half": score_order(split, after_half)["strict ndcg@10"].mean()}
    if cfg.world == "toy":
        edited, before, after = toy_counterfactual(world)
        new = orders(cfg, world, model, stage, prompt, edited.trace.astype(np.int64))
        clear = abs(after[:, :, None] - after[:, None]) >= TOY_PRIOR  # (N, K, K)
        as_oracle = ~turned(-after, places(new))  # a high score is a low place
        out["consistency"] = as_oracle[clear].mean()
        out["turned"] = as_oracle[turned(before, after, TOY_PRIOR)].mean()
    return {name: None if value is None else float(value) for name, value in out.items()}, strict


def asked(cfg, seeds):
    """{stage: ([measures of each seed], N@10 (seeds, N))} of a run."""
    found, world = {}, load_world(cfg)
    for seed in seeds:
        of_seed = dataclasses.replace(cfg, seed=seed)
        for stage, (model, _) in finished_stages(of_seed, world).items():
            values, strict = measures(of_seed, world, model, stage)
            print(f"{cfg.trace}, seed {seed}, {stage}: {values}", flush=True)
            found.setdefault(stage, ([], []))
            found[stage][0].append(values)
            found[stage][1].append(strict)
    return {stage: (values, np.stack(strict)) for stage, (values, strict) in found.items()}


def lines_of(cfg, found, unbound):
    """The entries of trace.json of one run. unbound: what `asked` found of the other, or {}."""
    out = []
    for stage, (values, strict) in found.items():
        line = {"config": cfg.config, "stage": stage, "level": 2 if cfg.trace == "bound" else 0,
                "seeds": len(values), "users": strict.shape[1]}
        for name in MEASURES:
            of = [value[name] for value in values]
            line[name] = None if None in of else float(np.mean(of))
        line["diff_to_unbound"] = None
        if stage in unbound:
            other = unbound[stage][1]
            n = min(len(strict), len(other))
            line["diff_to_unbound"] = paired_interval(strict[:n] - other[:n])[0]
        out.append(line)
    return out


def markdown(lines):
    head = ["stage", "answer sees", "N@10", "− unbound", "prompt edit", "exchange", "consistency",
            "turned", "first half"]
    rows = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for line in lines:
        low, mean, high = line["diff_to_unbound"] or (None, None, None)
        shares = ("–" if line[name] is None else f"{100 * line[name]:.1f} %"
                  for name in MEASURES[1:5])
        cells = [line["stage"], "the trace" if line["level"] else "prompt and trace",
                 f"{line['ndcg@10']:.3f}",
                 "–" if mean is None else f"{mean:+.4f}" + (
                     "" if low is None else f" [{low:+.4f}, {high:+.4f}]"),
                 *shares, f"{line['first_half']:.3f}"]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows) + "\n"


def main(cfg, options):
    if cfg.trace == "none":
        raise UserError("there is no trace to edit: use --trace bound or --trace free")
    seeds, free, lines = finished_seeds(cfg, options.seeds), {}, []
    if options.unbound:
        other = dataclasses.replace(cfg, **FREE, run_dir=options.unbound, teacher="")
        free = asked(other, finished_seeds(other, options.seeds))
        lines = lines_of(other, free, {})
    lines += lines_of(cfg, asked(cfg, seeds), free)
    write_json(folder(cfg, "trace.json"), lines)
    write_text(folder(cfg, "trace.md"), markdown(lines))
    print(markdown(lines))


if __name__ == "__main__":
    script(main, __doc__, also=Options)
