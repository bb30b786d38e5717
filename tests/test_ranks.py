"""Two processes under torchrun (gloo, CPU) do what one does."""
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

import common
import evaluate
import gradients
import train_ar
import train_cft
from conftest import ROOT
from test_recipe import TINY, run

OPTIONS = ["--bfloat16", "false", "--ar_steps", "20", "--cft_steps", "20", "--n_test", "20"]


def torchrun(script, *options):
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", os.path.join(ROOT, script), *options]


def in_two(script, run_dir, *options):
    done = subprocess.run(torchrun(script, *TINY, "--run_dir", str(run_dir), *OPTIONS, *options), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def log_of(run_dir, stage):
    with open(os.path.join(run_dir, "toy", "seed0", stage, "metrics.jsonl")) as f:
        return [json.loads(line) for line in f]


def test_two_processes_train_and_evaluate_like_one(monkeypatch, tmp_path):
    for module, stage in ((train_ar, "ar"), (train_cft, "cft")):
        run(module, monkeypatch, tmp_path / "one", *OPTIONS)
        in_two(f"train_{stage}.py", tmp_path / "two")
        one, two = log_of(tmp_path / "one", stage), log_of(tmp_path / "two", stage)
        assert [line["step"] for line in one] == [line["step"] for line in two] == list(range(20))
        for a, b in zip(one, two):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-4) and a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
    for stage in ("opd", "rl"):
        in_two(f"train_{stage}.py", tmp_path / "two")
        assert [line["step"] for line in log_of(tmp_path / "two", stage)] == list(range(4))
    run(evaluate, monkeypatch, tmp_path / "two", *OPTIONS)
    report = lambda: json.load(open(tmp_path / "two" / "toy" / "report.json"))["rows"]
    alone = report()
    os.remove(tmp_path / "two" / "toy" / "report.json")
    in_two("evaluate.py", tmp_path / "two")
    timing = ("tokens_per_s", "speedup", "latency")
    assert [{k: v for k, v in row.items() if not k.startswith(timing)} for row in report()] == \
        [{k: v for k, v in row.items() if not k.startswith(timing)} for row in alone]


def test_opd_and_rl_have_one_gradient_however_many_share_the_roll_outs(tmp_path):
    gradients.main(tmp_path / "one.pt")
    done = subprocess.run(torchrun("tests/gradients.py", str(tmp_path / "two.pt")), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = torch.load(tmp_path / "one.pt"), torch.load(tmp_path / "two.pt")
    for stage in ("opd", "rl"):
        for name, g in one[stage].items():
            assert g.abs().max() > 0
            torch.testing.assert_close(g, two[stage][name], rtol=1e-9, atol=1e-12)


def test_processes_that_cannot_share_a_batch_say_so(monkeypatch):
    monkeypatch.setattr(common, "RANKS", 3)
    with pytest.raises(common.UserError, match="3 processes cannot share 4 rows evenly"):
        common.mine(4)
    parts = []
    for rank in range(3):
        monkeypatch.setattr(common, "RANK", rank)
        parts += list(range(12))[common.mine(12)]
    assert parts == list(range(12))


def test_a_killed_process_ends_the_job_with_a_message(tmp_path):
    job = subprocess.Popen(torchrun("train_ar.py", *TINY, "--run_dir", str(tmp_path), "--ar_steps", "100000"), stdout=subprocess.DEVNULL,
                           stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        deadline = time.time() + 120
        while not os.path.exists(tmp_path / "toy" / "seed0" / "ar" / "checkpoint.pt"):
            assert time.time() < deadline and job.poll() is None
            time.sleep(0.2)
        workers = subprocess.run(["pgrep", "-P", str(job.pid)], capture_output=True, text=True).stdout.split()
        os.kill(int(workers[-1]), signal.SIGKILL)
        message = job.communicate(timeout=120)[1]
        assert job.returncode != 0 and "SIGKILL" in message
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
