"""What does the trace buy, and what does it cost? The same model without one.

    python experiments/no_trace.py --config small --seeds 0,1,2

Trains AR and CFT, in as many steps, on examples whose response is the answer alone:

    <history> x1 y2 z3  x3 y2 z3  ...  x2 y4 z3  ->  <answer> L4 L1 L2 L3 [EOS]

They stand beside the AR and the CFT of the preset, which must have finished. Speed is that of
whole responses, because their lengths differ: how many times as fast as AR with a trace, in the
same rounds. Writes a report, no_trace.json and no_trace.md, to runs/<config>/.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import dataclasses
from dataclasses import dataclass
from unittest import mock

import numpy as np

import train_ar
import train_cft
from data import joined
from evaluate import decoder_of, score
from plumbing.checkpoint import load_stage
from plumbing.script import script
from plumbing.settings import OneOf, Real, Text, UserError
from report.intervals import paired_interval
from report.speed import BATCHES, rounds_at
from report.table import Result, chosen_seeds, make_report, write_report
from trainer import decode_split, load_world


@dataclass(frozen=True)
class Options:
    seeds: Text() = ""                        # such as 0,1,2; empty: that of --seed
    eval_split: OneOf("test") = "test"        # whose lists are ranked
    eval_speed_seconds: Real(0, 3600) = 20.0  # spent on speed at each batch size


def without_traces(world):
    """The World whose users have an empty trace, and all else as it was."""
    splits = {}
    for name in ("train", "val", "test"):
        split = getattr(world, name)
        splits[name] = dataclasses.replace(split, trace=split.trace[:, :0])
    return dataclasses.replace(world, checksum=f"{world.checksum}, no traces", **splits)


def train(cfg, world):
    """Runs the scripts of AR and CFT on this World, not on the one that the settings name."""
    for stage in (train_ar, train_cft):
        with mock.patch.object(stage, "load_world", return_value=world):
            stage.main(cfg)


def times_as_fast(decoders, seconds):
    """How many times as fast as the first decoder each is: {row: {"speedup_b1", "speedup_b64"}}.

    decoders: {row: (settings, World, decoder)}."""
    found = {row: {} for row in decoders}
    for batch in BATCHES:
        taken = rounds_at(batch, decoders, seconds)               # {row: (rounds, 2)}
        first = next(iter(taken.values()))[:, 0]                  # (rounds,) seconds
        for row, rounds in taken.items():
            found[row][f"speedup_b{batch}"] = np.median(first / rounds[:, 0])
    return found


def main(cfg, options):
    if cfg.trace == "free" or cfg.from_:
        raise UserError("the models with a trace are those of a preset with --trace bound: leave "
                        "out --trace and --from")
    world = load_world(cfg)
    own = dataclasses.replace(cfg, trace="free", run_dir=f"{cfg.run_dir}/no_trace")
    worlds = {"": (cfg, world), ", no trace": (own, without_traces(world))}
    results = []
    for seed in chosen_seeds(cfg, options.seeds):
        decoders = {}
        for kind, (settings, its_world) in worlds.items():
            of_seed = dataclasses.replace(settings, seed=seed)
            if kind:
                train(of_seed, its_world)
            for stage in ("ar", "cft"):
                model, _ = load_stage(of_seed, stage, its_world)
                decoders[stage + kind] = of_seed, its_world, decoder_of(of_seed, stage, model)
        speed = times_as_fast(decoders, options.eval_speed_seconds)
        for row, (of_seed, its_world, decoder) in decoders.items():
            written, forwards = decode_split(of_seed, its_world, its_world.test, decoder)
            scores = score(its_world, its_world.test, joined(written), forwards)
            if its_world is not world:
                del scores["faithful"]  # there is nothing to be true
            results.append(Result(row, seed, scores, times=speed[row]))
        print(f"seed {seed}: done", flush=True)

    report = make_report(cfg, options, world, results, paired_interval)
    report["speed"] = ("× AR says how many times as fast as ar a whole response is written, in the "
                       f"same rounds, on {report['device']}.")
    write_report(cfg, "no_trace", report)


if __name__ == "__main__":
    script(main, __doc__, Options)
