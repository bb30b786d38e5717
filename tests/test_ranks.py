"""Two processes under torchrun (gloo, CPU) do what one does."""
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

import evaluate
import gradients
import train_ar
import train_cft
from conftest import ROOT
from plumbing import processes
from scripts import EVALUATION, TINY, checkpoint, run
from test_runs import log_of

ODD = ["--bfloat16", "false", "--ar_steps", "12", "--cft_steps", "12", "--batch_size", "5",
       "--n_test", "20", "--rl_prompts", "3"]  # rows that two processes cannot share evenly


def torchrun(script, *options):
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
            os.path.join(ROOT, script), *options]


def in_two(script, run_dir, *options):
    command = torchrun(script, *TINY, "--run_dir", str(run_dir), *ODD, *options)
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


def figures_of(run_dir):
    """The rows of a report, which is then deleted, without what a clock says."""
    path = os.path.join(run_dir, "toy", "report.json")
    with open(path) as file:
        rows = json.load(file)["rows"]
    os.remove(path)
    timing = ("tokens_per_s", "speedup", "latency")
    return [{key: value for key, value in row.items() if not key.startswith(timing)}
            for row in rows]


def test_two_processes_train_and_evaluate_like_one(monkeypatch, tmp_path):
    for stage, module in (("ar", train_ar), ("cft", train_cft)):
        run(module, monkeypatch, tmp_path / "one", *ODD)
        in_two(f"train_{stage}.py", tmp_path / "two")
        one, two = (log_of(tmp_path / name, stage) for name in ("one", "two"))
        assert [line["step"] for line in one] == [line["step"] for line in two] == list(range(12))
        for a, b in zip(one, two):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
            assert a.get("valid") == b.get("valid")
    for stage in ("opd", "rl"):  # here each process draws its own part of the roll-outs
        in_two(f"train_{stage}.py", tmp_path / "two")
        assert [line["step"] for line in log_of(tmp_path / "two", stage)] == list(range(4))
    run(evaluate, monkeypatch, tmp_path / "two", *ODD)
    alone = figures_of(tmp_path / "two")
    in_two("evaluate.py", tmp_path / "two", *EVALUATION)
    assert figures_of(tmp_path / "two") == alone and len(alone) > 20


def test_a_step_has_one_gradient_however_many_share_its_rows(tmp_path):
    gradients.main(tmp_path / "one.pt")
    command = torchrun(gradients.__file__, str(tmp_path / "two.pt"))
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = torch.load(tmp_path / "one.pt"), torch.load(tmp_path / "two.pt")
    for kind, stages in one.items():
        for stage, weights in stages.items():
            for name, g in weights.items():
                assert g.abs().max() > 0, (kind, stage, name)
                torch.testing.assert_close(g, two[kind][stage][name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("n, ranks", [(12, 3), (7, 2), (1, 4), (5, 4), (8, 1)])
def test_rows_are_shared_in_order_and_equally(n, ranks, monkeypatch):
    monkeypatch.setattr(processes, "RANKS", ranks)
    parts = []
    for rank in range(ranks):
        monkeypatch.setattr(processes, "RANK", rank)
        parts.append(processes.my_rows(n).tolist())
    assert len({len(part) for part in parts}) == 1
    assert sum(parts, [])[:n] == list(range(n))


def test_two_processes_draw_different_roll_outs(tmp_path):
    """Of one prompt given twice each process decodes one copy; all get both."""
    code = f"""
import sys
sys.path[:0] = [{ROOT!r}]
import dataclasses, json, torch
from plumbing import processes
@dataclasses.dataclass
class Out:
    tokens: torch.Tensor
    rank: torch.Tensor
def decoder(prompt, rng):
    return Out(torch.randint(10 ** 9, prompt.shape, generator=rng), prompt * 0 + processes.RANK)
processes.start("cpu")
out = processes.shared_decode(decoder, torch.ones(3, 2).long(), torch.Generator().manual_seed(0))
squares = processes.shared_map(lambda x: x * x, range(5))
with open({str(tmp_path)!r} + f"/{{processes.RANK}}.json", "w") as file:  # what both print mixes
    json.dump([out.tokens[:, 0].tolist(), out.rank[:, 0].tolist(), squares], file)
processes.stop()
"""
    script = tmp_path / "draw.py"
    script.write_text(code)
    done = subprocess.run(torchrun(str(script)), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second  # both have the whole
    tokens, ranks, squares = first
    assert len(set(tokens)) == 3 and ranks == [0, 0, 1] and squares == [0, 1, 4, 9, 16]


def test_a_killed_process_ends_the_job_with_a_message(tmp_path):
    command = torchrun("train_ar.py", *TINY, "--run_dir", str(tmp_path), "--ar_steps", "100000")
    said = tmp_path / "said"  # no pipe: the bar would fill it, and the run stop
    with open(said, "w") as stderr:
        job = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=stderr,
                               start_new_session=True)
    try:
        deadline = time.time() + 120
        while not os.path.exists(checkpoint(tmp_path, "ar")):
            assert time.time() < deadline and job.poll() is None
            time.sleep(0.2)
        children = subprocess.run(["pgrep", "-P", str(job.pid)], capture_output=True, text=True)
        os.kill(int(children.stdout.split()[-1]), signal.SIGKILL)
        assert job.wait(timeout=120) != 0 and "SIGKILL" in said.read_text()
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
