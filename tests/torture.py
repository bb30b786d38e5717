"""What may happen to a run: kills at random moments, damaged and hostile files. `make torture`, and a small dose in test_torture.py.

    python tests/torture.py 20 10000 FOLDER     # kills of training runs, mutated files
"""
import glob
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import torch

from conftest import ROOT  # which also sets the path to the modules
import amazon
import beauty
import common
import train_cft
from config import UserError, parse_args
from data import load_world
from make_beauty import make_beauty

TINY = ("--d_model 16 --n_head 2 --n_layer 1 --n_train 64 --n_val 8 --n_test 16 --batch_size 4 --cft_prompts 16 --cft_gold false --eval_batch 8 "
        "--ar_steps 300 --cft_steps 60 --opd_steps 30 --rl_steps 30 --rl_prompts 2 --rl_group 3 --save_every 1 --valid_every 50 "
        "--threads 1 --tau 0.9").split()


# --- Kills ------------------------------------------------------------------------------------------------------------------

def train(stage, run_dir):
    return subprocess.Popen([sys.executable, os.path.join(ROOT, f"train_{stage}.py"), *TINY, "--run_dir", run_dir],
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def kill_somewhere(job, folder, rng):
    """kill -9 at a random moment of the steps or, every other time, while a checkpoint is being written. False if it was too late."""
    log, writing = os.path.join(folder, "metrics.jsonl"), rng.random() < 0.5
    known = os.path.getsize(log) if os.path.exists(log) else 0
    while job.poll() is None and not (os.path.exists(log) and os.path.getsize(log) > known):
        time.sleep(0.001)
    if writing:
        while job.poll() is None and not glob.glob(os.path.join(folder, "checkpoint.pt.*.part")):
            pass
    else:
        time.sleep(rng.random() * 0.5)
    late = job.poll() is not None
    job.send_signal(signal.SIGKILL)
    job.communicate()
    return not late


def kills(n, folder, seed=0, say=print):
    """Every stage once undisturbed and once killed n / 4 times: the same weights to the last bit, each step logged once."""
    rng, whole, killed = random.Random(seed), os.path.join(folder, "whole"), os.path.join(folder, "killed")
    for i, stage in enumerate(("ar", "cft", "opd", "rl")):
        place = lambda run_dir: os.path.join(run_dir, "toy", "seed0", stage)
        job = train(stage, whole)
        assert job.wait() == 0, job.stderr.read()
        done = sum(kill_somewhere(train(stage, killed), place(killed), rng) for _ in range(n * (i + 1) // 4 - n * i // 4))
        job = train(stage, killed)
        assert job.wait() == 0, job.stderr.read()
        a, b = (torch.load(os.path.join(place(x), "checkpoint.pt"), weights_only=True) for x in (whole, killed))
        assert a["finished"] and b["finished"] and all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])
        with open(os.path.join(place(killed), "metrics.jsonl")) as f:
            assert [json.loads(line)["step"] for line in f] == list(range(a["step"]))
        assert not glob.glob(os.path.join(place(killed), "*.part"))
        say(f"{stage}: killed {done} times, the same weights")


# --- Damaged and hostile files ------------------------------------------------------------------------------------------------

class Bomb:
    """A pickle that runs a command when it is loaded carelessly."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def spoil_bytes(raw, rng):
    """Flips, cuts, repeats, inserts."""
    raw = bytearray(raw)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at, n = rng.randrange(len(raw) + 1), rng.choice((1, 1, 4, 100))
        kind = rng.randrange(5)
        if kind == 0 and raw:
            raw[min(at, len(raw) - 1)] = rng.randrange(256)
        elif kind == 1:
            del raw[at:at + n]
        elif kind == 2:
            raw[at:at] = bytes(rng.randrange(256) for _ in range(n))
        elif kind == 3:
            raw[at:at] = raw[max(0, at - n):at]
        else:
            del raw[at:]
    return bytes(raw)


def spoil_value(value, rng):
    """Something else in the place of a value, of the same type or another."""
    if isinstance(value, torch.Tensor) and value.numel() and rng.random() < 0.5:
        return rng.choice((value.flatten()[:-1], value.double(), value.flatten(), value * float("nan") if value.is_floating_point() else value + 10 ** 6))
    return rng.choice((None, -1, 10 ** 12, "x" * 1000, b"\0", [], {}, {"a": 1}, [value], torch.zeros(3), True, float("nan")))


def spoil_dict(state, rng):
    """One entry, at any depth, is lost, replaced or added."""
    state = dict(state)
    key = rng.choice(list(state))
    if isinstance(state[key], dict) and state[key] and rng.random() < 0.7:
        state[key] = spoil_dict(state[key], rng)
    elif rng.random() < 0.3:
        del state[key]
    elif rng.random() < 0.2:
        state["more"] = spoil_value(None, rng)
    else:
        state[key] = spoil_value(state[key], rng)
    return state


def fuzz(n, folder, seed=0, say=print):
    """n mutated files at the loaders: each ends in success or in a UserError, within seconds, and nothing is executed."""
    os.makedirs(folder, exist_ok=True)
    raw, marker = os.path.join(folder, "raw"), os.path.join(folder, "executed")
    make_beauty(raw, n_users=60, n_items=60)
    toy = parse_args("", [*TINY, "--run_dir", folder, "--max_steps", "2"])
    small = parse_args("", [*TINY, "--config", "small", "--data_dir", raw, "--run_dir", folder, "--n_labels", "20", "--n_train", "64"])
    world = load_world(toy)
    common.Run(toy, "ar", common.new_model(toy, world), world)._save(1)  # half-way: the optimiser is read too
    unfinished = open(common.checkpoint_path(toy, "ar"), "rb").read()
    run = common.Run(toy, "ar", common.new_model(toy, world), world)
    run.n_steps, run.step = 2, 1
    loss = sum((p ** 2).sum() for p in run.model.parameters())
    run.update(loss)
    run._save(1)
    stepped = open(common.checkpoint_path(toy, "ar"), "rb").read()
    run._save(2)
    finished = open(common.checkpoint_path(toy, "ar"), "rb").read()
    model = common.load_stage(toy, "ar", world)[0]
    train_cft.teacher_outputs(toy, world, model)
    beauty.beauty_world(small)
    outputs, cache = (os.path.join(folder, *p) for p in (("toy", "seed0", "ar", "outputs.pt"), ("small", "world.pt")))
    loaders = {
        os.path.join(raw, "items.tsv"): lambda: amazon.read_beauty(raw),
        os.path.join(raw, "sequences.txt"): lambda: amazon.read_beauty(raw),
        common.checkpoint_path(toy, "ar"): lambda: (common.Run(toy, "ar", common.new_model(toy, world), world), common.load_stage(toy, "ar", world)),
        outputs: lambda: train_cft.teacher_outputs(toy, world, model),
        cache: lambda: beauty.read_world(small, cache, key, "prepared files"),
    }
    key = torch.load(cache, weights_only=True)["key"]
    good = {path: open(path, "rb").read() for path in loaders}
    bomb = pickle.dumps({"stage": "ar", "model": Bomb(marker)})
    rng, refused = random.Random(seed), 0

    def too_long(*_):
        raise TimeoutError("a loader hung")

    signal.signal(signal.SIGALRM, too_long)
    for i in range(n):
        path = rng.choice(list(loaders))
        start = rng.choice((unfinished, stepped, finished)) if path == common.checkpoint_path(toy, "ar") else good[path]
        if path.endswith(".pt") and rng.random() < 0.5:
            if rng.random() < 0.1:
                new = bomb
                if rng.random() < 0.5:
                    torch.save({"stage": "ar", "model": Bomb(marker)}, path)
                    new = open(path, "rb").read()
            else:
                with open(path, "wb") as f:
                    f.write(start)
                torch.save(spoil_dict(torch.load(path, weights_only=True), rng), path)
                new = open(path, "rb").read()
        else:
            new = spoil_bytes(start, rng)
        with open(path, "wb") as f:
            f.write(new)
        signal.alarm(20)
        try:
            loaders[path]()
        except UserError as error:
            refused += 1
            assert str(error).strip() and "\n" not in str(error), f"mutation {i} (seed {seed}) of {path}: {error!r}"
        except Exception as error:
            shutil.copy(path, os.path.join(folder, "culprit"))
            raise AssertionError(f"mutation {i} (seed {seed}) of {path}, kept as culprit: {type(error).__name__}: {error}") from error
        finally:
            signal.alarm(0)
        assert not os.path.exists(marker), f"mutation {i} (seed {seed}) of {path} was executed"
        with open(path, "wb") as f:
            f.write(good[path])
    assert not glob.glob(os.path.join(folder, "**", "*.part"), recursive=True)
    say(f"{n} mutated files: {refused} refused in one sentence, {n - refused} read, none executed")


if __name__ == "__main__":
    torch.set_num_threads(1)
    seed = int(np.random.SeedSequence().entropy % 2 ** 31)
    print(f"seed {seed}")
    kills(int(sys.argv[1]), sys.argv[3], seed)
    fuzz(int(sys.argv[2]), os.path.join(sys.argv[3], "fuzz"), seed)
