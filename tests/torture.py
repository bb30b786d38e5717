"""What may happen to a run: kills at random moments, damaged and hostile files. `make torture`, and
a small dose in test_torture.py.

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
from beauty.amazon import read_beauty
from beauty.world import beauty_world, read_world
from make_beauty import make_beauty
from plumbing.arguments import parse_args
from plumbing.checkpoint import checkpoint_path, load_stage, new_model, save_run
from plumbing.settings import UserError
from plumbing.teacher import teacher_responses
from trainer import Run, load_world

TINY = ("--d_model 16 --n_head 2 --n_layer 1 --n_train 64 --n_val 1 --n_test 16 --batch_size 4 "
        "--cft_prompts 16 --cft_gold false --ar_steps 100 --cft_steps 40 --opd_steps 20 "
        "--rl_steps 20 --rl_prompts 2 --rl_group 3 --every 1 --threads 1 --tau 0.9").split()


# --- Kills ------------------------------------------------------------------------------------

def train(stage, run_dir):
    """Starts a stage. What it says goes to a file: a pipe that nobody reads would stop it."""
    script = os.path.join(ROOT, f"train_{stage}.py")
    with open(run_dir + ".said", "w") as said:
        return subprocess.Popen([sys.executable, script, *TINY, "--run_dir", run_dir],
                                stdout=subprocess.DEVNULL, stderr=said)


def finish(stage, run_dir):
    job = train(stage, run_dir)
    assert job.wait() == 0, open(run_dir + ".said").read()[-2000:]


def kill_somewhere(job, folder, rng):
    """kill -9 at a random moment of the steps or, every other time, while a checkpoint is being
    written. False if it was too late."""
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
    job.wait()
    return not late


def kills(n, folder, seed=0, say=print):
    """Every stage once undisturbed and once killed n / 4 times: the same weights to the last bit,
    each step logged once."""
    os.makedirs(folder, exist_ok=True)
    rng = random.Random(seed)
    whole, killed = os.path.join(folder, "whole"), os.path.join(folder, "killed")
    for i, stage in enumerate(("ar", "cft", "opd", "rl")):
        finish(stage, whole)
        place = os.path.join(killed, "toy", "seed0", stage)
        times = n * (i + 1) // 4 - n * i // 4
        done = sum(kill_somewhere(train(stage, killed), place, rng) for _ in range(times))
        finish(stage, killed)
        a, b = (torch.load(os.path.join(x, "toy", "seed0", stage, "checkpoint.pt"),
                           weights_only=True) for x in (whole, killed))
        assert a["finished"] and b["finished"]
        assert all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"])
        with open(os.path.join(place, "metrics.jsonl")) as f:
            assert [json.loads(line)["step"] for line in f] == list(range(a["step"]))
        assert not glob.glob(os.path.join(place, "*.part"))
        say(f"{stage}: killed {done} times, the same weights")


# --- Damaged and hostile files ----------------------------------------------------------------

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
        spoiled = value * float("nan") if value.is_floating_point() else value + 10 ** 6
        return rng.choice((value.flatten()[:-1], value.double(), value.flatten(), spoiled))
    return rng.choice((None, -1, 10 ** 12, "x" * 1000, b"\0", [], {}, {"a": 1}, [value],
                       torch.zeros(3), True, float("nan")))


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


def spoiled(path, start, marker, rng):
    """What a file that held the bytes `start` holds after a mutation."""
    if not path.endswith(".pt") or rng.random() < 0.5:
        return spoil_bytes(start, rng)
    bomb = {"stage": "ar", "model": Bomb(marker)}
    if rng.random() < 0.05:
        return pickle.dumps(bomb)
    if rng.random() < 0.05:
        torch.save(bomb, path)
    else:
        with open(path, "wb") as f:
            f.write(start)
        torch.save(spoil_dict(torch.load(path, weights_only=True), rng), path)
    with open(path, "rb") as f:
        return f.read()


def three_checkpoints(cfg, world):
    """The bytes of a teacher's checkpoint: before its first step, half-way, finished."""
    found = []

    def save(run, done):
        save_run(run, done)
        with open(checkpoint_path(cfg, "ar"), "rb") as f:
            found.append(f.read())

    run = Run(cfg, "ar", new_model(cfg, world), world)
    for step in run.steps():
        if step == 0:
            save(run, 0)
        run.update(sum((p ** 2).sum() for p in run.model.parameters()))
        save(run, step + 1)
    return found


def fuzz(n, folder, seed=0, say=print):
    """n mutated files at the loaders: each ends in success or in a UserError, within seconds, and
    nothing is executed."""
    os.makedirs(folder, exist_ok=True)
    raw, marker = os.path.join(folder, "raw"), os.path.join(folder, "executed")
    make_beauty(raw, n_users=60, n_items=60)
    toy = parse_args("", [*TINY, "--run_dir", folder, "--ar_steps", "2"])
    small = parse_args("", [*TINY, "--config", "small", "--data_dir", raw, "--run_dir", folder])
    world = load_world(toy)
    unfinished, stepped, finished = three_checkpoints(toy, world)
    teacher_responses(toy, world, 16)
    beauty_world(small)
    teacher, cache = checkpoint_path(toy, "ar"), os.path.join(folder, "small", "world.pt")
    outputs = os.path.join(os.path.dirname(teacher), "outputs.pt")

    def load_teacher():
        Run(toy, "ar", new_model(toy, world), world)  # the optimiser is read too
        load_stage(toy, "ar", world)

    loaders = {
        os.path.join(raw, "items.tsv"): lambda: read_beauty(raw),
        os.path.join(raw, "sequences.txt"): lambda: read_beauty(raw),
        teacher: load_teacher,
        outputs: lambda: teacher_responses(toy, world, 16),
        cache: lambda: read_world(small, key),
    }
    key = torch.load(cache, weights_only=True)["key"]
    good = {path: open(path, "rb").read() for path in loaders}
    rng, refused = random.Random(seed), 0

    def too_long(*_):
        raise TimeoutError("a loader hung")

    signal.signal(signal.SIGALRM, too_long)
    for i in range(n):
        path = rng.choice(list(loaders))
        where = f"mutation {i} (seed {seed}) of {path}"
        start = rng.choice((unfinished, stepped, finished)) if path == teacher else good[path]
        new = spoiled(path, start, marker, rng)
        with open(path, "wb") as f:
            f.write(new)
        signal.alarm(20)
        try:
            loaders[path]()
        except UserError as error:
            refused += 1
            sentence = str(error)
            assert sentence.strip() and "\n" not in sentence, f"{where}: {error!r}"
        except Exception as error:
            shutil.copy(path, os.path.join(folder, "culprit"))
            raise AssertionError(f"{where}, kept as culprit: {error!r}") from error
        finally:
            signal.alarm(0)
        assert not os.path.exists(marker), f"{where} was executed"
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
