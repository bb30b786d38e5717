"""What a training step of every stage costs, and where: part of speed.py."""
import contextlib
import dataclasses
import io
import tempfile
import time
from collections import Counter
from unittest import mock

import numpy as np
import torch

import train_ar
import train_cft
import train_opd
import train_rl
from plumbing.checkpoint import checkpoint_path, device_of
from trainer import Run

STEPS = 12  # the first two warm up, the last one validates
SCRIPTS = {"ar": train_ar, "cft": train_cft, "opd": train_opd, "rl": train_rl}
UPDATE = {"backward": (torch.Tensor, "backward"), "Muon": (torch.optim.Muon, "step"),
          "AdamW": (torch.optim.AdamW, "step")}
PARTS = {  # stage: what is timed, name -> (where a function is looked up, its name)
    "ar": {"batch": (train_ar, "tensors"), "misplaced labels": (train_ar, "misplaced"),
           "forward": (train_ar, "causal_hidden"), **UPDATE},
    "cft": {"batch": (train_cft, "cft_batch"), "forward and loss": (train_cft, "cft_loss"),
            **UPDATE},
    "opd": {"roll-out": (train_opd, "roll_out"),
            "divergence: student and teacher read": (train_opd, "opd_loss"),
            "CFT loss": (train_opd, "batch_loss"), **UPDATE},
    "rl": {"roll-out": (train_rl, "roll_out"), "replay": (train_rl, "replay_logp"),
           "divergence": (train_rl, "opd_loss"), **UPDATE}}


def settings(cfg, stage, run_dir):
    """A few steps of a stage, from the run's own checkpoints, in a folder of their own."""
    start = {"teacher": "", "init": ""}
    if stage != "ar":
        before = "ar" if stage == "cft" else "cft"
        start = {"teacher": checkpoint_path(cfg, "ar"), "init": checkpoint_path(cfg, before)}
    return dataclasses.replace(cfg, run_dir=run_dir, **{f"{stage}_steps": STEPS}, **start)


class Clock:
    """Seconds of the named functions, step by step."""

    def __init__(self, device):
        self.device, self.spent, self.rows = device, Counter(), []
        self.began = self.now()

    def now(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def timed(self, name, function):
        def run(*args, **other):
            start = self.now()
            out = function(*args, **other)
            self.spent[name] += self.now() - start
            return out
        return run

    def end_of_step(self, run, **values):
        """In the place of Run.log."""
        self.rows.append(dict(self.spent) | {"step": self.now() - self.began})
        self.spent.clear()
        self.began = self.now()

    def median(self, name):
        return float(np.median([row.get(name, 0.0) for row in self.rows[2:-1]]))


def costs(cfg, world, stage):
    """A few steps of a stage's own script: median seconds of a step and of its parts, the dearest
    first."""
    clock, parts = Clock(device_of(cfg)), PARTS[stage]
    patches = [(where, name, clock.timed(part, getattr(where, name)))
               for part, (where, name) in parts.items()]
    patches.append((Run, "log", lambda run, **values: clock.end_of_step(run, **values)))
    # The world is there: the new folder has no copy of it.
    patches.append((SCRIPTS[stage], "load_world", lambda cfg: world))
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        for patch in patches:
            stack.enter_context(mock.patch.object(*patch))
        clock.began = clock.now()
        SCRIPTS[stage].main(settings(cfg, stage, folder))
    seconds = {part: clock.median(part) for part in parts}
    dearest = sorted(seconds.items(), key=lambda item: -item[1])
    return {"step": clock.median("step"), "parts": dict(dearest)}


def training(cfg, world):
    """{stage: costs}, CFT also with one noised copy of every block, as the two streams of BD3-LM
    have it."""
    out = {stage: costs(cfg, world, stage) for stage in PARTS}
    once = dataclasses.replace(cfg, answer_states=0)
    return out | {"cft, one copy of a block": costs(once, world, "cft")}
