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
from common import Run, checkpoint_path, device_of

STEPS = 12  # the first two warm up, the last one validates
UPDATE = {"backward": (torch.Tensor, "backward"), "optimiser": (torch.optim.AdamW, "step")}
PARTS = {  # stage: its script, and the parts that are timed: name -> where a function of that name is looked up
    "ar": (train_ar, {"batch": (train_ar, "tensors"), "misplaced labels": (train_ar, "misplaced"), "forward": (train_ar, "causal_hidden"), **UPDATE}),
    "cft": (train_cft, {"batch": (train_cft, "tensors"), "misplaced labels": (train_cft, "misplaced"), "forward and loss": (train_cft, "diffusion_loss"), **UPDATE}),
    "opd": (train_opd, {"roll-out": (train_opd, "rollout"), "divergence: student and teacher read": (train_opd, "opd_loss"),
                        "CFT loss": (train_opd, "cft_loss"), **UPDATE}),
    "rl": (train_rl, {"roll-out": (train_rl, "rollout"), "replay": (train_rl, "replay_logp"), "CFT loss": (train_rl, "cft_loss"), **UPDATE})}


def costs(cfg, world, stage):
    """A few steps of a stage's own script in a folder of their own: median seconds of a step and of its parts, the dearest first."""
    script, parts = PARTS[stage]
    device, spent, rows, began = device_of(cfg), Counter(), [], None

    def now():
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def timed(name, function):
        def run(*args, **other):
            start = now()
            out = function(*args, **other)
            spent[name] += now() - start
            return out
        return run

    def end_of_step(run, **values):
        nonlocal began
        rows.append(dict(spent) | {"step": now() - began})
        spent.clear()
        began = now()

    start = {"teacher": "", "init": ""} if stage == "ar" else {"teacher": checkpoint_path(cfg, "ar"), "init": checkpoint_path(cfg, "ar" if stage == "cft" else "cft")}
    patches = [(where, name, timed(part, getattr(where, name))) for part, (where, name) in parts.items()]
    patches += [(Run, "log", end_of_step), (script, "load_world", lambda cfg: world)]  # the folder would have to be filled with it again
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()), contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(mock.patch.object(*patch))
        began = now()
        script.main(dataclasses.replace(cfg, run_dir=folder, max_steps=STEPS, **start))
    median = lambda name: float(np.median([row.get(name, 0.0) for row in rows[2:-1]]))
    return {"step": median("step"), "parts": dict(sorted(((part, median(part)) for part in parts), key=lambda p: -p[1]))}


def training(cfg, world):
    """{stage: costs}, CFT also with one noised copy of every block, as the two streams of BD3-LM have it."""
    out = {stage: costs(cfg, world, stage) for stage in PARTS}
    return out | {"cft, one copy of a block": costs(dataclasses.replace(cfg, cft_noise="uniform", cft_answer_states=0), world, "cft")}
