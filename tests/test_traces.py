"""experiments/traces.py: edits of traces, and what is said of the answers after them."""
import itertools
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

import train_ar
import train_cft
import train_opd
import traces
from config import Config
from data import LABEL, NONE, PAD
from scripts import refused, run
from toy.world import TOY_ATTRIBUTES, TOY_HISTORY, toy_world


@pytest.fixture(scope="module")
def world():
    return toy_world(Config(n_train=10, n_val=10, n_test=200))


def test_one_value_of_the_history_is_another_and_the_trace_says_so(world):
    edited, before, after = traces.toy_counterfactual(world)
    length = 1 + TOY_HISTORY * TOY_ATTRIBUTES
    differ = edited.prompt != world.test.prompt
    assert not differ[:, length:].any() and (differ.sum(1) <= 1).all()
    assert differ.any(1).mean() > 0.5  # the value may have been there already
    said = (edited.trace != world.test.trace).any(1)
    assert said[differ.any(1)].mean() > 0.9 and not said[~differ.any(1)].any()
    for split, score in ((world.test, before), (edited, after)):
        assert (np.argsort(-score, axis=1, kind="stable") == split.order).all()


def test_pairs_that_are_turned_by_loops():
    rng = np.random.default_rng(0)
    before, after = rng.normal(size=(2, 5, 4))
    for least in (0.0, 0.5):
        got = traces.turned(before, after, least)
        for n, (a, b) in itertools.product(range(5), itertools.product(range(4), repeat=2)):
            one, two = before[n, a] - before[n, b], after[n, a] - after[n, b]
            assert got[n, a, b] == (one * two < 0 and min(abs(one), abs(two)) >= least)


def test_first_and_last_exchange_all_but_their_labels(world):
    trace, order = world.test.trace.astype(int), world.test.order
    forged = traces.exchanged(trace, order)
    for row, new, ranking in zip(trace[:20], forged, order):
        at = {label: list(row).index(LABEL + label) for label in ranking}
        first, last = ranking[0], ranking[-1]
        expected = row.copy()
        for one, other in ((first, last), (last, first)):
            expected[at[one] + 1:at[one] + 4] = row[at[other] + 1:at[other] + 4]
        assert (new == expected).all()


def test_so_many_statements_are_left(world):
    cfg, trace = Config(), world.test.trace.astype(int)
    left = [4 * n for n in (0, 2, 4, 6, 9)]  # tokens: a profile and 8 candidates, 4 each
    for share, n in zip(traces.SHARES, left):
        for setting, gap in (("bound", PAD), ("free", NONE)):
            cut = traces.truncated(replace(cfg, trace=setting), world, trace, share)
            assert (cut[:, :n] == trace[:, :n]).all() and (cut[:, n:] == gap).all()


def test_a_run_and_others_whose_answers_see_their_prompts(monkeypatch, tmp_path, capsys):
    free = ["--trace", "free", "--block_size", "16", "--cft_steps", "3"]
    none = ["--trace", "none", "--ar_steps", "4"]
    for module in (train_ar, train_cft):
        run(module, monkeypatch, tmp_path / "bound", "--cft_gold", "true")
        run(module, monkeypatch, tmp_path / "free", "--cft_gold", "true", *free)
    run(train_opd, monkeypatch, tmp_path / "bound", "--cft_gold", "true")
    run(train_ar, monkeypatch, tmp_path / "none", *none)
    options = ["--cft_gold", "true", "--seeds", "0", "--unbound", str(tmp_path / "free"),
               "--none", str(tmp_path / "none")]
    run(traces, monkeypatch, tmp_path / "bound", *options)
    with open(tmp_path / "bound" / "toy" / "trace.json") as file:
        lines = json.load(file)
    assert [(line["stage"], line["trace"], line["level"]) for line in lines] == [
        ("ar", "none", None), ("ar", "free", 0), ("cft", "free", 0),
        ("ar", "bound", 2), ("cft", "bound", 2), ("opd", "bound", 2)]
    for line in lines:
        assert line["seeds"] == 1 and line["users"] == 16
        assert line["level"] != 2 or line["prompt_edit_changes"] == 0
        assert (line["diff_to_unbound"] is None) == (
            line["level"] == 0 or line["stage"] == "opd")
        if line["trace"] == "none":
            assert all(line[name] is None for name in traces.MEASURES[1:] + traces.CURVES)
            continue
        for name in ("exchange", "consistency", "turned"):
            assert 0 <= line[name] <= 1
        for (share, served), (same, strict) in zip(line["truncated_served"], line["truncated"]):
            assert share == same and strict <= served
        assert [share for share, _ in line["truncated"]] == [0, 0.25, 0.5, 0.75, 1]
    out = capsys.readouterr().out
    assert "| ar | the prompt |" in out and "| opd | the trace |" in out
    assert "| stage | answer sees | score | first 0 % | first 25 % |" in out
    assert "trace=free there, none now" in refused(
        traces, monkeypatch, capsys, tmp_path / "bound", *options[:4], "--none",
        str(tmp_path / "free"))
    assert "--trace bound or --trace free" in refused(
        traces, monkeypatch, capsys, tmp_path, "--trace", "none")


def test_a_model_that_ranks_by_the_prompt_is_found_out(world, monkeypatch):
    """Answers as the oracle gives them for the prompt, or for the trace."""
    edited, before, after = traces.toy_counterfactual(world)
    must = traces.turned(before, after, traces.TOY_PRIOR)
    assert must.sum() > 20

    def measured(by_trace):
        def answers(cfg, world, model, stage, prompts, given):
            told = edited if by_trace and (given == edited.trace).all() else world.test
            return SimpleNamespace(order=told.order, valid=np.arange(200) < 50)
        monkeypatch.setattr(traces, "answers", answers)
        monkeypatch.setattr(traces, "written", lambda *_: world.test.response)
        return traces.measures(replace(Config(), n_test=200), world, None, "ar")[0]

    whole = measured(True)  # an answer that is not valid counts 0
    for (_, served), (_, strict) in zip(whole["truncated_served"], whole["truncated"]):
        assert 0 < strict < 0.4 * served
    assert whole["turned"] == 1 and whole["consistency"] == 1
    assert measured(False)["turned"] == 0 and measured(False)["consistency"] < 1
