"""Makes the weights of a run small enough to be given away, as `make demo` starts from them.

    python experiments/export.py --config toy --to weights/new

The stages AR and CFT are written to <to>/<config>/seed<seed>/ without their optimisers, their
weights in bfloat16. Every script reads them there, with the same checks: --run_dir weights/new.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import dataclasses
import os
from dataclasses import dataclass

import torch

from plumbing.checkpoint import checksum, load_stage, own_path, save_tensors
from plumbing.processes import RANK
from plumbing.script import script
from plumbing.settings import Text, UserError
from trainer import load_world


@dataclass(frozen=True)
class Options:
    to: Text() = "weights/new"  # the folder that gets them


def main(cfg, options):
    if RANK:  # of several processes one writes
        return
    world, start = load_world(cfg), None
    there = dataclasses.replace(cfg, run_dir=options.to)
    # Both must have finished, and neither may be there, before one is written.
    states = {stage: load_stage(cfg, stage, world)[1] for stage in ("ar", "cft")}
    for path in [own_path(there, stage) for stage in states]:
        if os.path.exists(path):
            raise UserError(f"{path} is there already: name another folder with --to, or delete "
                            "it first")
    for stage, state in states.items():
        path = own_path(there, stage)
        state = {k: v for k, v in state.items() if k not in ("optimizers", "path")}
        state["model"] = {name: w.to(torch.bfloat16) for name, w in state["model"].items()}
        state["start"] = start or state["start"]  # CFT now begins with the rounded weights of AR
        save_tensors(path, state)
        start = checksum({name: w.float() for name, w in state["model"].items()})
        print(f"{path}: {os.path.getsize(path) / 1e6:.1f} MB")


if __name__ == "__main__":
    script(main, __doc__, Options)
