"""Does a ranking follow its trace? A finished model is given a trace as its own, and writes the
answer to it.

    python experiments/traces.py --config toy --seeds 0,1,2

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

All traces are the rule's, of the test users. Writes trace.json and trace.md to runs/<config>/.
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
from data import LABEL, parse_answers
from plumbing.checkpoint import device_of, finished_stages
from plumbing.script import script
from plumbing.settings import Text, UserError
from report.table import chosen_seeds, write_json, write_text
from tables import share, table
from toy.world import (TOY_ATTRIBUTES, TOY_HISTORY, TOY_PRIOR, TOY_VALUES, written_as_tokens,
                       toy_oracle, toy_words)
from trainer import BATCH, ar_decoder, block_decoder, load_world, respond

MEASURES = ("prompt edited", "traces exchanged", "falsified", "turned", "consistent")


@dataclass(frozen=True)
class Options:
    seeds: Text() = ""  # such as 0,1,2; empty: that of --seed


def rankings(cfg, world, writer, prompt, trace):
    """Rankings (N, K) that are served where the model has written trace (N, T) to prompt (N, P).

    Both requests are made as for every user (trainer.respond), but the first is not decoded."""
    tokens = []
    for first in range(0, len(trace), BATCH):
        rows = slice(first, first + BATCH)
        read, said = [torch.from_numpy(x[rows]).long().to(device_of(cfg)) for x in (prompt, trace)]
        decoders = [lambda *_: SimpleNamespace(tokens=said), writer]
        parts = respond(cfg, world, lambda *asked: decoders.pop(0)(*asked), read)
        tokens.append(parts[-1].tokens.cpu().numpy())
    return parse_answers(np.concatenate(tokens), world.test.incoming).order


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


def toy_edited(world):
    """Test users of whom an item of the history has another value, that of a candidate, in one
    attribute: a Split, and the oracle's scores (N, K) before and after."""
    split, rng = world.test, np.random.default_rng(3)
    first = toy_words(world.n_labels).index("x0") + TOY_VALUES * np.arange(TOY_ATTRIBUTES)
    N, K = split.incoming.shape                                   # all lists are full
    n_history = TOY_HISTORY * TOY_ATTRIBUTES                      # tokens, after <history>
    history = split.prompt[:, 1:1 + n_history].reshape(N, TOY_HISTORY, TOY_ATTRIBUTES) - first
    listed = split.prompt[:, 2 + n_history:].reshape(N, K, 1 + TOY_ATTRIBUTES)
    items = listed[..., 1:] - first                               # (N, K, A)

    def oracle():
        counts = (history[..., None] == np.arange(TOY_VALUES)).sum(1)  # (N, A, V)
        return toy_oracle(counts, items, np.full(N, K))           # (N, K)
    before = oracle()
    row, attribute = np.arange(N), rng.integers(TOY_ATTRIBUTES, size=N)
    value = items[row, rng.integers(K, size=N), attribute]
    history[row, rng.integers(TOY_HISTORY, size=N), attribute] = value
    edited = written_as_tokens(history, items, split.incoming, split.target, world.n_labels)
    return edited, before, oracle()


def consistent(order, before, after):
    """Of the pairs of candidates that the scores before and after (N, K) order differently, by
    what a place of the list is worth at least: the share that rankings (N, K) order as after."""
    old, new = (score[:, :, None] - score[:, None] for score in (before, after))  # (N, K, K)
    asked = (old * new < 0) & (np.minimum(abs(old), abs(new)) >= TOY_PRIOR)
    place = np.argsort(order, axis=1)                             # (N, K) of each label
    ahead = place[:, :, None] < place[:, None]                    # (N, K, K)
    return (ahead == (new > 0))[asked].mean() if asked.any() else np.nan


# --- The measures -------------------------------------------------------------------------------

def measures(cfg, world, writer):
    """{measure: a share} of a model, and nan for what the world cannot tell."""
    split = world.test
    prompt, trace = split.prompt, split.trace
    own = rankings(cfg, world, writer, prompt, trace)             # (N, K)
    other_prompt = rankings(cfg, world, writer, np.roll(prompt, 1, axis=0), trace)
    other_trace = rankings(cfg, world, writer, prompt, np.roll(trace, 1, axis=0))
    false = falsified(trace, own)
    differs = (false != trace).any(1)                             # (N,) equal evidence says nothing
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


def main(cfg, options):
    if cfg.trace == "free":
        raise UserError("with --trace free an answer sees the prompt beside its trace, and no "
                        "trace can be given alone: use a run with --trace bound")
    if cfg.wording != "fixed":
        raise UserError(f"with --wording {cfg.wording} an edited trace would mix its wordings: "
                        "use --wording fixed")
    world, found = load_world(cfg), {}
    for seed in chosen_seeds(cfg, options.seeds):
        of_seed = dataclasses.replace(cfg, seed=seed)
        for stage, (model, _) in finished_stages(of_seed, world).items():
            writer = ar_decoder(model) if stage == "ar" else block_decoder(of_seed, model)
            found.setdefault(stage, {})[seed] = measures(of_seed, world, writer)
            print(f"seed {seed}, {stage}: done", flush=True)
    lines = [{"stage": stage, "users": len(world.test), "seeds": list(seeds),
              **{name: float(np.mean([x[name] for x in seeds.values()])) for name in MEASURES}}
             for stage, seeds in found.items()]
    rows = [[line["stage"], *("-" if np.isnan(line[name]) else share(line[name])
                              for name in MEASURES)] for line in lines]
    text = table(["stage", *MEASURES], rows)
    write_json(folder(cfg, "trace.json"), {"config": cfg.config, "stages": lines})
    write_text(folder(cfg, "trace.md"), text + "\n")
    print(text)


if __name__ == "__main__":
    script(main, __doc__, Options)
