"""A dose of `make torture` for every day, and disks that refuse."""
import os
import resource
import stat
import subprocess
import sys

import pytest
import torch

import torture
import train_ar
import trainer
from conftest import ROOT
from scripts import TINY, checkpoint, refused, run


def stopped(monkeypatch, capsys, run_dir):
    """Runs AR, which must stop on the way; the last thing it says, after the bar."""
    with pytest.raises(SystemExit) as stop:
        run(train_ar, monkeypatch, run_dir)
    message = capsys.readouterr().err.replace("\r", "\n").strip().split("\n")[-1]
    assert stop.value.code == 2 and message.startswith("error: ")
    return message


def test_kill_9_once_a_stage_changes_no_bit(tmp_path):
    torture.kills(4, str(tmp_path))


def test_mutated_files_end_in_success_or_in_one_sentence(tmp_path):
    torture.fuzz(500, str(tmp_path))


def test_a_full_disk_is_named_and_the_checkpoint_before_is_kept(monkeypatch, tmp_path):
    short = ["--ar_steps", "2", "--cft_steps", "2"]
    run(train_ar, monkeypatch, tmp_path, *short)
    before = open(checkpoint(tmp_path, "ar"), "rb").read()

    def limit():  # a file can grow to 20 kB; a checkpoint cannot
        resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))

    for script, run_dir in (("train_cft.py", tmp_path), ("train_ar.py", tmp_path / "new")):
        command = [sys.executable, os.path.join(ROOT, script), *TINY, *short]
        done = subprocess.run([*command, "--run_dir", str(run_dir)], capture_output=True, text=True,
                              preexec_fn=limit)
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
        assert "error: cannot write" in done.stderr and "free some space" in done.stderr
    assert open(checkpoint(tmp_path, "ar"), "rb").read() == before
    assert not list(tmp_path.rglob("*.part"))


def test_a_folder_that_may_not_be_written_is_named(monkeypatch, capsys, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    assert "cannot write" in refused(train_ar, monkeypatch, capsys, blocked)
    if os.geteuid():  # root may write anywhere
        os.chmod(tmp_path, stat.S_IRUSR | stat.S_IXUSR)
        assert "cannot write" in refused(train_ar, monkeypatch, capsys, tmp_path / "runs")
        os.chmod(tmp_path, stat.S_IRWXU)


def test_what_the_disk_says_while_a_run_logs_is_one_sentence(monkeypatch, capsys, tmp_path):
    def full(self, **values):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trainer.Run, "log", full)
    assert "No space left" in stopped(monkeypatch, capsys, tmp_path)


@pytest.mark.parametrize("spoil", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_stops_the_run_and_names_the_checkpoint(
        spoil, monkeypatch, capsys, tmp_path):
    real = trainer.Run.update

    def update(self, loss):
        return real(self, loss * spoil if self.step == 4 else loss)

    monkeypatch.setattr(trainer.Run, "update", update)
    message = stopped(monkeypatch, capsys, tmp_path)
    assert "at step 4" in message
    assert f"the last checkpoint is {checkpoint(tmp_path, 'ar')}" in message
    state = torch.load(checkpoint(tmp_path, "ar"), weights_only=True)
    assert state["step"] == 4
    assert all(torch.isfinite(weight).all() for weight in state["model"].values())
