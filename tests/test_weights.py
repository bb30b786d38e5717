"""The weights that come along: what `make demo` and the small student need."""
import os

import pytest
import torch

import evaluate
from config import Config, PRESETS
from conftest import ROOT
from plumbing.arguments import settings_of
from plumbing.checkpoint import load_tensors
from plumbing.script import script


@pytest.mark.parametrize("config", ["toy", "small"])
@pytest.mark.parametrize("stage", ["ar", "cft"])
def test_weights_are_of_the_presets_and_small(config, stage):
    path = os.path.join(ROOT, "weights", config, "seed0", stage, "checkpoint.pt")
    assert os.path.getsize(path) < 2e6
    state = load_tensors(path)  # checks the sum, too
    cfg = Config(**{"config": config, **PRESETS[config]})
    assert state["finished"] and state["settings"] == settings_of(cfg, stage)
    assert all(weight.dtype == torch.bfloat16 for weight in state["model"].values())


def test_the_demo_shows_users_re_ranked_by_both_decoders(monkeypatch, capsys):
    argv = [evaluate.__file__, "--config", "toy", "--run_dir", os.path.join(ROOT, "weights"),
            "--show", "3", "--threads", "1", "--n_test", "10"]
    monkeypatch.setattr("sys.argv", argv)
    script(evaluate.main, evaluate.__doc__, evaluate.Options)
    said = capsys.readouterr().out
    assert said.count("true next item") == 3 and "invalid" not in said
    assert said.count("100% of the statements true") == 6
