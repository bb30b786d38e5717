"""experiments/export.py: weights that are given away."""
import torch

import evaluate
import export
import train_ar
import train_cft
from plumbing.checkpoint import load_tensors
from scripts import EVALUATION, refused, run


def test_exported_weights_are_read_by_every_script_and_are_less_than_half(
        monkeypatch, tmp_path, capsys):
    for module in (train_ar, train_cft):
        run(module, monkeypatch, tmp_path / "run")
    run(export, monkeypatch, tmp_path / "run", "--into", str(tmp_path / "weights"))
    said = capsys.readouterr().out
    for stage in ("ar", "cft"):
        ours, given = (tmp_path / name / "toy" / "seed0" / stage / "checkpoint.pt"
                       for name in ("run", "weights"))
        assert given.stat().st_size < 0.5 * ours.stat().st_size
        assert f"{stage}/checkpoint.pt: " in said
        for name, weight in load_tensors(str(given))["model"].items():
            assert weight.dtype == torch.bfloat16
            close = load_tensors(str(ours))["model"][name]
            torch.testing.assert_close(weight.float(), close, rtol=2 ** -8, atol=0)
    for module in (train_ar, train_cft):
        run(module, monkeypatch, tmp_path / "weights")
        assert "finished already" in capsys.readouterr().out
    run(evaluate, monkeypatch, tmp_path / "weights", *EVALUATION)
    assert "cft" in capsys.readouterr().out
    said = refused(export, monkeypatch, capsys, tmp_path / "run", "--stages", "ar,opd")
    assert "no finished opd; there are ar, cft" in said
