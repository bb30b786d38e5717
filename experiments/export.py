"""The weights of a run, small enough to be given away: what `make demo` starts from.

    python experiments/export.py --config toy --into weights

Copies the checkpoints of stages without their optimisers, the weights in bfloat16, to
<into>/<config>/seed<seed>/. Every script reads them there, with the same checks: --run_dir weights.
Prints how many of the test users' answers change.
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from plumbing.script import script  # noqa: E402  first: it sets how threads wait

import dataclasses  # noqa: E402
from dataclasses import dataclass  # noqa: E402

import torch  # noqa: E402

from evaluate import stage_decoder  # noqa: E402
from plumbing.checkpoint import (checkpoint_path, checksum, finished_stages,  # noqa: E402
                                 load_stage, save_tensors)
from plumbing.decoding import decode_split  # noqa: E402
from plumbing.settings import Text, UserError  # noqa: E402
from trainer import load_world  # noqa: E402


@dataclass(frozen=True)
class Options:
    into: Text() = "weights"  # the folder that gets them
    stages: Text() = "ar,cft"  # which ones, with commas


def stripped(state, start):
    """A checkpoint without optimisers, its weights in bfloat16. start: the checksum of the weights
    it was begun from, as they are given away; None for the first stage."""
    weights = {name: w.to(torch.bfloat16) for name, w in state["model"].items()}
    kept = {name: value for name, value in state.items() if name != "optimizers"}
    return {**kept, "model": weights, "start": start or state["start"]}


def answers(cfg, world, model, stage):
    """Greedy responses (N, R) to the test users."""
    decoder = stage_decoder(cfg, world, model, stage, None if stage == "ar" else cfg.tau)
    return decode_split(cfg, world.test, decoder, stage)[0]


def main(cfg, options):
    world = load_world(cfg)
    given = dataclasses.replace(cfg, run_dir=options.into)
    start = None
    wanted = [stage.strip() for stage in options.stages.split(",")]
    finished = finished_stages(cfg, world)
    missing = [stage for stage in wanted if stage not in finished]
    if missing:
        raise UserError(f"--stages: there is no finished {', '.join(missing)}; there are "
                        f"{', '.join(finished)}")
    for stage in wanted:
        model, state = finished[stage]
        path = checkpoint_path(given, stage)
        save_tensors(path, stripped(state, start))
        rounded, _ = load_stage(given, stage, world)
        start = checksum(rounded.state_dict())
        before, after = (answers(cfg, world, m, stage) for m in (model, rounded))
        differ = int((before != after).any(1).sum())
        print(f"{path}: {os.path.getsize(path) / 1e6:.1f} MB; {differ} of {len(after)} responses "
              "of the test users differ in a token")


if __name__ == "__main__":
    script(main, __doc__, also=Options)
