"""Does a ranking follow its trace, and for the reasons that the trace states?

    python experiments/traces.py --config toy --seeds 0,1,2

A finished model is given a trace of the rule as its own, and writes the answer to it:

    prompt edited      the prompt is another user's, the trace stays: share of rankings that change.
                       With --trace bound 0, by construction
    traces exchanged   the trace is another user's, the prompt stays: share of rankings that are
                       what the other user is given
    falsified          the first and the last candidate of a ranking exchange their evidence:
                       share of rankings that change
    turned             of the same, those where the last candidate now stands before the first
    consistent         toy: an item of the history has another value, and the trace says so. Of the
                       pairs of candidates for which that matters (their order changes, and not by
                       a trifle), the share that is ordered as the oracle does for the new value

Or it writes a trace itself. Could that carry a code, beside what the rule determines?

    capacity_bits      at most so many bits: for every place of a trace, whether its word is the
                       rule's, and which other word stands there if not (Fano's inequality); with
                       --wording also the coins that the rule throws
    cross_reader       the trace is read by the AR of the next seed, which has seen true traces
                       only: N@10 (strict) less that of the model itself, [low, mean, high]. A
                       code would be lost. None with one seed
    paraphrase         with --wording: the trace says the same, its coins are thrown anew; share of
                       rankings that change

All users are test users. Writes trace.json and trace.md to runs/<config>/. The last three stand in
trace.json also for the last stage alone, at the top.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import dataclasses
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch

from config import folder
from data import LABEL, examples_of, parse_answers
from evaluate import score
from ours.wording import drawn, entropy_bits
from plumbing.checkpoint import finished_stages, load_stage, made_by
from plumbing.processes import device_of
from plumbing.script import script
from plumbing.settings import Text, UserError
from report.intervals import interval_text, paired_interval
from report.table import chosen_seeds, plain, write_json, write_text
from tables import share, table
from toy.world import (TOY_ATTRIBUTES, TOY_HISTORY, TOY_PRIOR, TOY_VALUES, toy_oracle, toy_words,
                       written_as_tokens)
from trainer import BATCH, ar_decoder, block_decoder, decode_split, load_world, respond

ROOM = ("capacity_bits", "cross_reader", "paraphrase")
NAMES = ("prompt edited", "traces exchanged", "falsified", "turned", "consistent", *ROOM)


@dataclass(frozen=True)
class Options:
    seeds: Text() = ""  # such as 0,1,2; empty: that of --seed


def answers(cfg, world, writer, prompt, trace):
    """Answers (N, R), tokens, where the model has written trace (N, T) to prompt (N, P).

    Both requests are made as for every user (trainer.respond), but the first is not decoded."""
    tokens = []
    for first in range(0, len(trace), BATCH):
        rows = slice(first, first + BATCH)
        read, said = [torch.from_numpy(x[rows]).long().to(device_of(cfg)) for x in (prompt, trace)]
        decoders = [lambda *_: SimpleNamespace(tokens=said), writer]
        parts = respond(cfg, world, lambda *asked: decoders.pop(0)(*asked), read)
        tokens.append(parts[-1].tokens.cpu().numpy())
    return np.concatenate(tokens)


def rankings(cfg, world, writer, prompt, trace):
    """The same as the rankings (N, K) that are served."""
    return parse_answers(answers(cfg, world, writer, prompt, trace), world.test.incoming).order


# --- The edits ----------------------------------------------------------------------------------

def falsified(trace, order):
    """Traces (N, T) in which the first and the last candidate of each ranking (N, K) have
    exchanged what stands between their label and the next one."""
    is_label = trace[:, :, None] == LABEL + order[:, None]        # (N, T, K)
    place = is_label.argmax(1)                                    # (N, K) of each label
    length = np.diff(np.sort(place, axis=1)).min()                # of a statement
    row = np.arange(len(trace))[:, None]
    within = np.arange(1, length)
    first, last = (place[:, i, None] + within for i in (0, -1))   # (N, length - 1)
    out = trace.copy()
    out[row, first], out[row, last] = trace[row, last], trace[row, first]
    return out


def toy_items(split, n_labels):
    """The values that the prompts of a toy Split show: of the history (N, H, A), and of the
    candidates (N, K, A), negative in empty places."""
    first = toy_words(n_labels).index("x0") + TOY_VALUES * np.arange(TOY_ATTRIBUTES)
    N, K = split.incoming.shape
    n_history = TOY_HISTORY * TOY_ATTRIBUTES                      # tokens, after <history>
    history = split.prompt[:, 1:1 + n_history].reshape(N, TOY_HISTORY, TOY_ATTRIBUTES) - first
    listed = split.prompt[:, 2 + n_history:].reshape(N, K, 1 + TOY_ATTRIBUTES)
    return history, listed[..., 1:] - first


def oracle_scores(history, items, list_length):
    """The oracle's scores (N, K) for what prompts show: history (N, H, A), items (N, K, A),
    list_length (N,)."""
    counts = (history[..., None] == np.arange(TOY_VALUES)).sum(1)  # (N, A, V)
    return toy_oracle(counts, items.clip(0), list_length)


def toy_edited(world):
    """Test users of whom an item of the history has another value, that of a candidate, in one
    attribute: a Split, and the oracle's scores (N, K) before and after."""
    split, rng = world.test, np.random.default_rng(3)
    N, K = split.incoming.shape                                   # all lists are full
    history, items = toy_items(split, world.n_labels)             # (N, H, A), (N, K, A)
    before = oracle_scores(history, items, split.list_length)     # (N, K)
    row, attribute = np.arange(N), rng.integers(TOY_ATTRIBUTES, size=N)
    value = items[row, rng.integers(K, size=N), attribute]
    history[row, rng.integers(TOY_HISTORY, size=N), attribute] = value
    edited = written_as_tokens(history, items, split.incoming, split.target, world.n_labels)
    return edited, before, oracle_scores(history, items, split.list_length)


def consistent(order, before, after):
    """Of the pairs of candidates that the scores before and after (N, K) order differently, by
    what a place of the list is worth at least: the share that rankings (N, K) order as after."""
    old, new = (score[:, :, None] - score[:, None] for score in (before, after))  # (N, K, K)
    asked = (old * new < 0) & (np.minimum(abs(old), abs(new)) >= TOY_PRIOR)
    place = np.argsort(order, axis=1)                             # (N, K) of each label
    ahead = place[:, :, None] < place[:, None]                    # (N, K, K)
    return (ahead == (new > 0))[asked].mean() if asked.any() else np.nan


def paraphrased(world, trace, wording):
    """Traces (N, T) that say the same, with coins that no split has seen."""
    n_synonyms = len(world.words) - len(np.unique(world.canonical))
    said = world.plain(trace)
    return said + n_synonyms * drawn(said, 3, world.n_labels, wording)


# --- The measures -------------------------------------------------------------------------------

def measures(cfg, world, writer):
    """{measure: a share} of a model, and nan for what the world cannot tell."""
    split = world.test
    prompt, trace = split.prompt, split.trace
    own = rankings(cfg, world, writer, prompt, trace)             # (N, K)
    other_prompt = rankings(cfg, world, writer, np.roll(prompt, 1, axis=0), trace)
    other_trace = rankings(cfg, world, writer, prompt, np.roll(trace, 1, axis=0))
    false = falsified(trace, own)
    # (N,) whether anything else is said now: equal evidence says nothing
    differs = (world.plain(false) != world.plain(trace)).any(1)
    now = rankings(cfg, world, writer, prompt, false)
    place = np.argsort(now, axis=1)                               # (N, K) of each label
    row = np.arange(len(own))
    turned = place[row, own[:, -1]] < place[row, own[:, 0]]       # (N,)
    out = {
        "prompt edited": (other_prompt != own).any(1).mean(),
        "traces exchanged": (other_trace == np.roll(own, 1, axis=0)).all(1).mean(),
        "falsified": (now != own).any(1)[differs].mean(),
        "turned": turned[differs].mean(),
        "consistent": np.nan}
    if cfg.world == "toy":
        edited, before, after = toy_edited(world)
        order = rankings(cfg, world, writer, prompt, edited.trace)
        out["consistent"] = consistent(order, before, after)
    return {name: float(value) for name, value in out.items()}


def capacity_bits(world, trace, wording):
    """Bits that traces (N, R) can carry beside what the rule determines: an upper bound.

    If the word at a place is not the rule's with probability q, then given the rule's word its
    entropy is at most h(q) + q log2(other words), and that of a trace at most the sum."""
    ended = examples_of(world.test, "bound")[0].response          # (N, at most R)
    rule = np.pad(ended, ((0, 0), (0, trace.shape[1] - ended.shape[1])))
    q = (world.plain(trace) != world.plain(rule)).mean(0)         # (R,)
    h = -sum(p * np.log2(np.maximum(p, 1e-30)) for p in (q, 1 - q))  # 0 log 0 = 0
    bits = h + q * np.log2(len(world.words) - 1)                  # (R,)
    return bits.sum() + entropy_bits(world, wording)


def room(cfg, world, writer, other):
    """Whether a model's own traces carry more than they say: {name of ROOM: a number, but of the
    cross-reader the differences (N,)}. other: the decoder that is the cross-reader, or None."""
    split = world.test
    (trace, own), _ = decode_split(cfg, world, split, writer)     # (N, R) each
    out = {"capacity_bits": capacity_bits(world, trace, cfg.wording),
           "cross_reader": None, "paraphrase": np.nan}
    if other:
        read = answers(cfg, world, other, split.prompt, trace)    # (N, R)
        ndcg = [score(world, split, tokens)["strict ndcg@10"] for tokens in (read, own)]
        out["cross_reader"] = ndcg[0] - ndcg[1]                   # (N,)
    if cfg.wording != "fixed":
        anew = paraphrased(world, trace, cfg.wording)
        order = rankings(cfg, world, writer, split.prompt, anew)  # (N, K)
        out["paraphrase"] = (order != parse_answers(own, split.incoming).order).any(1).mean()
    return out


def line_of(stage, seeds, n_users):
    """What trace.json says of a stage, from {seed: its measures}: means, and an interval."""
    found = list(seeds.values())
    line = {"stage": stage, "users": n_users, "seeds": list(seeds)}
    line |= {name: np.mean([x[name] for x in found]) for name in NAMES if name != "cross_reader"}
    differences = [x["cross_reader"] for x in found]              # of each seed: (N,), or None
    known = differences[0] is not None
    line["cross_reader"] = paired_interval(np.array(differences))[0] if known else None
    return plain(line)


def cell(name, value):
    if value is None:
        return "-"
    if name == "cross_reader":
        return interval_text(value)
    return f"{value:.2f}" if name == "capacity_bits" else share(value)


def main(cfg, options):
    if cfg.trace == "free":
        raise UserError("with --trace free an answer sees the prompt beside its trace, and no "
                        "trace can be given alone: use a run with --trace bound")
    seeds = chosen_seeds(cfg, options.seeds)
    if cfg.from_ and len(seeds) > 1:
        raise UserError("--from names one run, which has one seed: leave out --seeds")
    world, found = load_world(cfg), {}
    for seed, next_seed in zip(seeds, seeds[1:] + seeds[:1]):
        of_seed, of_next = (dataclasses.replace(cfg, seed=n) for n in (seed, next_seed))
        other = len(seeds) > 1 and ar_decoder(load_stage(of_next, "ar", world)[0])
        for stage, (model, _) in finished_stages(of_seed, world).items():
            writer = ar_decoder(model) if stage == "ar" else block_decoder(of_seed, model)
            found.setdefault(stage, {})[seed] = (
                measures(of_seed, world, writer) | room(of_seed, world, writer, other))
            print(f"seed {seed}, {stage}: done", flush=True)
    lines = [line_of(stage, of_stage, len(world.test)) for stage, of_stage in found.items()]
    rows = [[line["stage"], *(cell(name, line[name]) for name in NAMES)] for line in lines]
    text = table(["stage", *NAMES], rows)
    last = {name: lines[-1][name] for name in ROOM}
    result = {"config": cfg.config, "made_by": made_by(cfg), **last, "stages": lines}
    write_json(folder(cfg, "trace.json"), result)
    write_text(folder(cfg, "trace.md"), f"{text}\n")
    print(text)


if __name__ == "__main__":
    script(main, __doc__, Options)
