"""The scripts as a user runs them: bad input, interruption, and the whole recipe in miniature."""
import json
import os
import subprocess

import numpy as np
import pytest
import torch

import ablations
import analyse
import common
import evaluate
import train_ar
import train_cft
import train_opd
import train_rl
from config import Config
from data import ANSWER, responses, toy_world
from make_beauty import make_beauty
from show import show_user

TINY = ("--d_model 16 --n_head 2 --n_layer 1 --n_train 64 --n_val 8 --n_test 16 --batch_size 4 --cft_prompts 16 --cft_gold false --eval_batch 8 "
        "--ar_steps 6 --cft_steps 6 --opd_steps 4 --rl_steps 4 --rl_prompts 2 --rl_group 3 --save_every 2 --valid_every 3 "
        "--threads 1 --tau 0.9 --eval_taus 0.5,1.0 --eval_curve_users 8 --eval_speed_seconds 0.01").split()
STAGES = {"ar": train_ar, "cft": train_cft, "opd": train_opd, "rl": train_rl}


def run(module, monkeypatch, run_dir, *options):
    monkeypatch.setattr("sys.argv", [module.__file__, *TINY, "--run_dir", str(run_dir), *options])
    common.script(module.main, module.__doc__)


def refused(module, monkeypatch, capsys, run_dir, *options):
    """Run a script that must refuse: one line on stderr, exit code 2. Returns the line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(module, monkeypatch, run_dir, *options)
    message = capsys.readouterr().err.split("\r")[-1]  # behind what is left of a bar
    assert stop.value.code == 2 and message.startswith("error: ") and message.count("\n") == 1
    return message


def checkpoint(run_dir, stage, config="toy"):
    return os.path.join(run_dir, config, "seed0", stage, "checkpoint.pt")


@pytest.mark.parametrize("options, expected", [
    (["--config", "toyy"], "unknown config 'toyy'"),
    (["--cft_step", "3"], "did you mean --cft_steps"),
    (["cft_steps", "3"], "unknown option cft_steps"),
    (["--cft_steps"], "--cft_steps needs a value"),
    (["--cft_steps", "many"], "--cft_steps must be of type int"),
    (["--eval_taus", "0.5,much"], "--eval_taus must be numbers"),
    (["--rl_conditional", "maybe"], "--rl_conditional must be true or false"),
    (["--block_size", "0"], "--block_size must be at least 1"),
    (["--show", "-1"], "--show takes a number of users"),
    (["--block_size", "-3"], "--block_size must be at least 1"),
    (["--commit", "all"], "--commit must be one of independent, threshold, factor, steps"),
    (["--d_model", "18", "--n_head", "4"], "--d_model must be a multiple"),
    (["--min_list", "9"], "list lengths must satisfy"),
    (["--world", "beauty", "--data_dir", "nowhere"], "there is no folder nowhere"),
])
def test_bad_settings_are_refused_in_one_sentence(options, expected, monkeypatch, capsys, tmp_path):
    assert expected in refused(train_ar, monkeypatch, capsys, tmp_path, *options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stage, before", [("cft", "ar"), ("opd", "ar"), ("rl", "opd")])
def test_a_stage_without_its_predecessor_names_the_command(stage, before, monkeypatch, capsys, tmp_path):
    assert f"python train_{before}.py --config toy" in refused(STAGES[stage], monkeypatch, capsys, tmp_path)
    assert "train_ar.py" in refused(evaluate, monkeypatch, capsys, tmp_path)


def test_foreign_and_truncated_checkpoints_are_refused_and_kept(monkeypatch, capsys, tmp_path):
    run(train_ar, monkeypatch, tmp_path)
    path = checkpoint(tmp_path, "ar")
    whole = open(path, "rb").read()
    assert "d_model=16 there, 32 now" in refused(train_cft, monkeypatch, capsys, tmp_path, "--d_model", "32")
    assert "ar_lr=0.002 there, 0.1 now" in refused(train_ar, monkeypatch, capsys, tmp_path, "--ar_lr", "0.1")
    for damaged in (whole[:len(whole) // 2], b"", b"not a checkpoint"):
        open(path, "wb").write(damaged)
        for module in (train_ar, train_cft, evaluate):
            assert "damaged" in refused(module, monkeypatch, capsys, tmp_path)
        assert open(path, "rb").read() == damaged  # it is for the user to delete it
    torch.save({"weights": torch.zeros(3)}, path)
    assert "no file of this project" in refused(train_cft, monkeypatch, capsys, tmp_path)


def test_conversions_may_share_a_teacher_and_start_from_any_fitting_checkpoint(monkeypatch, capsys, tmp_path):
    run(train_ar, monkeypatch, tmp_path / "a")
    teacher = checkpoint(tmp_path / "a", "ar")
    for seed in ("0", "1"):  # two conversions of one teacher, in a folder that has none of its own
        run(train_cft, monkeypatch, tmp_path / "b", "--seed", seed, "--teacher", teacher, "--answer_weight", "2")
    assert not os.path.exists(checkpoint(tmp_path / "b", "ar"))
    assert sorted(os.listdir(tmp_path / "a" / "toy" / "seed0" / "ar")) == ["checkpoint.pt", "lock", "metrics.jsonl", "outputs.pt"]
    run(evaluate, monkeypatch, tmp_path / "b", "--teacher", teacher, "--answer_weight", "2")
    rows = json.load(open(tmp_path / "b" / "toy" / "report.json"))["rows"]
    made = {(r["stage"], r["seed"]): r["strict"] for r in rows if r["reported"]}
    latency = next(r["latency_ms"] for r in rows if (r["stage"], r["seed"], r["reported"]) == ("cft", "mean", True))
    assert made["ar", 0] == made["ar", 1] and {("cft", 0), ("cft", 1), ("cft", "mean")} <= made.keys()

    start, steps = checkpoint(tmp_path / "b", "cft"), ["--max_steps", "1", "--rl_lr", "1e-9", "--block_size", "1", "--answer_weight", "2"]
    run(train_rl, monkeypatch, tmp_path / "c", "--teacher", teacher, "--init", start, *steps)
    before, after = torch.load(start)["model"], torch.load(checkpoint(tmp_path / "c", "rl"))["model"]
    assert all(torch.allclose(before[k], after[k], atol=1e-6) for k in before)
    run(evaluate, monkeypatch, tmp_path / "c", "--teacher", teacher, "--beside", f"other={tmp_path / 'b' / 'toy'}:cft", *steps)
    rows = json.load(open(tmp_path / "c" / "toy" / "report.json"))["rows"]
    beside = next(r for r in rows if r["stage"] == "other")
    assert beside["strict"] == pytest.approx(made["cft", "mean"]) and beside["latency_ms"] == latency > 0

    for option, value, expected in (("--teacher", "nowhere", "no finished checkpoint nowhere"), ("--init", "nowhere", "no such checkpoint"),
                                    ("--init", __file__, "damaged")):
        assert expected in refused(train_cft, monkeypatch, capsys, tmp_path / "d", option, value)
    assert "d_model=16 there, 32 now" in refused(train_cft, monkeypatch, capsys, tmp_path / "d", "--teacher", teacher, "--d_model", "32")
    assert "shape" in refused(train_ar, monkeypatch, capsys, tmp_path / "d", "--init", teacher, "--d_model", "32")
    other = ["--teacher", teacher, "--init", teacher, *steps]
    assert "begun from other weights" in refused(train_rl, monkeypatch, capsys, tmp_path / "c", *other)
    assert "leave out --teacher" in refused(train_ar, monkeypatch, capsys, tmp_path / "d", "--teacher", teacher)
    for beside, expected in (("x", "--beside takes name=folder:stage"), ("x=nowhere:ar", "first run evaluate.py there"),
                             (f"x={tmp_path / 'b' / 'toy'}:rl", "no stage rl")):
        assert expected in refused(evaluate, monkeypatch, capsys, tmp_path / "c", "--teacher", teacher, "--beside", beside, *steps)


def test_a_second_run_into_the_same_folder_is_refused(monkeypatch, capsys, tmp_path):
    with common.locked(os.path.dirname(checkpoint(tmp_path, "ar"))):
        assert "another run is writing" in refused(train_ar, monkeypatch, capsys, tmp_path)
    run(train_ar, monkeypatch, tmp_path)


def test_outputs_of_another_teacher_are_decoded_anew(monkeypatch, tmp_path):
    run(train_ar, monkeypatch, tmp_path)
    run(train_cft, monkeypatch, tmp_path)
    path = tmp_path / "toy" / "seed0" / "ar" / "outputs.pt"
    old = torch.load(path)["made_of"]
    for stage in ("ar", "cft"):
        os.remove(checkpoint(tmp_path, stage))
    decoded, real = [], train_cft.ar_decode
    monkeypatch.setattr(train_cft, "ar_decode", lambda *args: decoded.append(args) or real(*args))
    run(train_ar, monkeypatch, tmp_path, "--ar_steps", "40", "--ar_lr", "0.02")
    run(train_cft, monkeypatch, tmp_path, "--ar_steps", "40", "--ar_lr", "0.02")
    assert decoded and torch.load(path)["made_of"] != old


def test_analysis_of_perfect_models_finds_no_failure_and_of_random_ones_says_so(monkeypatch, capsys, tmp_path):
    for module in (train_ar, train_cft):
        run(module, monkeypatch, tmp_path)
    assert "train for longer" in refused(analyse, monkeypatch, capsys, tmp_path)
    assert "needs --trace true" in refused(analyse, monkeypatch, capsys, tmp_path, "--trace", "false")

    def perfect(cfg, world, model, split, prefix=None, **other):
        """Writes the reference; behind a forged trace, whose beginning differs, the reversed ranking."""
        out = responses(split.trace, split.order)
        if prefix is not None:
            forged = (out[:, :prefix.shape[1]] != prefix.numpy()).any(1)
            out[forged] = responses(split.trace, np.where(split.order >= 0, split.order[:, split.k[0] - 1 - np.arange(split.order.shape[1])], -1))[forged]
        return torch.from_numpy(out.astype(np.int64))

    monkeypatch.setattr(analyse, "decode", perfect)
    run(analyse, monkeypatch, tmp_path)
    found = json.load(open(tmp_path / "toy" / "analysis.json"))
    assert found.keys() == {"ar", "cft", "naive"} and (tmp_path / "toy" / "analysis.md").stat().st_size > 500
    for stage in ("ar", "cft"):
        assert not any(sum(found[stage]["failures"][k]) for k in ("duplicate_by_slot", "dropped_by_position", "no_label_by_slot"))
        forged = found[stage]["falsified"]
        assert forged["answers"] > 4 and forged["changed_without_forgery"] == 0 and forged["ranking_changed"] == 1
        assert forged["rank_of_best_forged"] > forged["rank_of_best_same"]
    assert all(row["valid"] == 1 for row in found["cft"]["answer_steps"])
    assert found["ar"]["bound"]["1"] > 0


def test_ablations_run_each_line_once_and_compare_at_equal_forwards(monkeypatch, capsys, tmp_path):
    lines = {"cft": {"as it is": {}, "half as long": dict(cft_steps=0.5), "factor rule": dict(commit="factor")},
             "opd": {"CFT for the same FLOPs": dict(control=True), "as it is": {}}}
    monkeypatch.setattr(ablations, "LINES", lines)
    for module in (train_ar, train_cft):
        run(module, monkeypatch, tmp_path)
    calls, real = [], subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: calls.append(a) or real(*a, **k))
    for stage, trained in (("cft", 3), ("opd", 2)):
        for again in (False, True):  # the second time everything is there
            run(ablations, monkeypatch, tmp_path, "--ablate", stage, "--seeds", "0")
            assert len(calls) == (0 if again else trained)
            calls.clear()
        table = open(tmp_path / "toy" / f"ablations_{stage}.md").read()
        assert all(f"| {name} |" in table for name in lines[stage])
        assert ("`train_cft.py --cft_steps 3`" if stage == "cft" else "`train_cft.py --cft_steps 8 --cft_lr 0.0002`") in table
    assert "first run `python train_ar.py" in refused(ablations, monkeypatch, capsys, tmp_path / "empty")
    assert "no line is called nonsense; there are: CFT" in refused(ablations, monkeypatch, capsys, tmp_path, "--lines", "nonsense", "--ablate", "opd")


class Killed(Exception):
    pass


def test_a_killed_run_continues_to_the_very_same_weights(monkeypatch, tmp_path):
    for stage, module in STAGES.items():
        run(module, monkeypatch, tmp_path / "whole")
        log = common.Run.log

        def log_then_die(self, **values):
            log(self, **values)
            if self.step == 2:
                self.log_file.flush()
                raise Killed

        monkeypatch.setattr(common.Run, "log", log_then_die)
        with pytest.raises(Killed):
            run(module, monkeypatch, tmp_path / "killed")
        monkeypatch.setattr(common.Run, "log", log)
        assert torch.load(checkpoint(tmp_path / "killed", stage))["step"] == 2
        run(module, monkeypatch, tmp_path / "killed")
        a, b = (torch.load(checkpoint(tmp_path / name, stage)) for name in ("whole", "killed"))
        assert a["finished"] and all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])
        logs = [[json.loads(line) for line in open(os.path.join(os.path.dirname(checkpoint(tmp_path / name, stage)), "metrics.jsonl"))]
                for name in ("whole", "killed")]
        for line in logs[0] + logs[1]:
            assert line.pop("seconds") >= 0 and line["lr"] >= 0
        assert logs[0] == logs[1] and [line["step"] for line in logs[0]] == list(range(len(logs[0])))


@pytest.mark.parametrize("world", ["toy", "beauty"])
def test_the_whole_recipe_in_miniature_fulfils_the_contract_of_the_report(world, monkeypatch, tmp_path):
    options, seeds = ["--seed", "1"], [1]
    if world == "beauty":
        make_beauty(tmp_path / "data")
        options += ["--config", "small", "--data_dir", str(tmp_path / "data")]
    else:  # a second seed, of which two stages have finished
        seeds = [0, 1]
        for module in (train_ar, train_cft):
            run(module, monkeypatch, tmp_path, "--seed", "0")
    for module in (*STAGES.values(), evaluate):
        run(module, monkeypatch, tmp_path, *options)
    folder = tmp_path / ("small" if world == "beauty" else "toy")
    report = json.load(open(folder / "report.json"))
    assert {"config", "dataset", "source", "n_users", "device", "seeds", "operating_point", "rows"} <= report.keys()
    point = {"block_size": 16, "commit": "independent", "clash": 0.1 if world == "beauty" else 0.4, "tau": 0.9}
    assert report["seeds"] == seeds and report["operating_point"] == point
    row_keys = set("stage block_size tau seed reported recall@1 recall@3 recall@5 ndcg@3 ndcg@5 ndcg@10 mrr strict valid duplicated "
                   "dropped out_of_set faithful identity trace_tokens forwards tokens_per_forward ar_gain_share train_seconds se "
                   "seed_se diff_to_ar diff_to_prerank tokens_per_s_b1 speedup_b1 tokens_per_s_batch speedup_batch batch".split())
    assert all(row_keys <= row.keys() for row in report["rows"])
    stages = {row["stage"] for row in report["rows"] if row["reported"] and row["seed"] == "mean"}
    assert stages == {"prerank", *(["oracle"] if world == "toy" else ["writer", "prerank, fresh"]), "ar", "naive", "cft", "opd", "rl", "constrained"}
    for stage, made in (("cft", seeds), ("rl", [1])):
        rows = [row for row in report["rows"] if row["stage"] == stage and row["reported"]]
        assert [row["seed"] for row in rows] == [*made, "mean"] and (rows[-1]["seed_se"] is None) == (len(made) == 1)
    constrained = next(row for row in report["rows"] if row["stage"] == "constrained")
    assert constrained["valid"] == 1  # whatever the weights
    for name in ("report.md", "tradeoff.png", "throughput.png", "trace_lengths.png", "denoising.png", "denoising.gif", "mask.png"):
        assert (folder / name).stat().st_size > 500


@pytest.mark.parametrize("points, goal, forwards", [
    ([[2, .5, .6], [4, .98, .6], [5, 1., .7]], .65, 4.5),   # both rise to what is asked half-way from 4 to 5
    ([[2, .5, .6], [4, .98, .7], [5, 1., .7]], .65, 4.5),   # N@10 is there before
    ([[2, .5, .6], [4, .995, .64], [5, .995, .68]], .67, 4.75),
    ([[2, .995, .7]], .65, 2), ([[2, .5, .7]], .65, float("nan"))])
def test_forwards_needed_for_valid_answers_as_good_as_asked(points, goal, forwards):
    assert ablations.forwards_needed(np.array(points), goal) == pytest.approx(forwards, nan_ok=True)


def test_show_prints_users_and_marks_what_is_wrong(monkeypatch, capsys, tmp_path):
    for module in (train_ar, train_cft):
        run(module, monkeypatch, tmp_path)
    capsys.readouterr()
    run(evaluate, monkeypatch, tmp_path, "--show", "2")
    out = capsys.readouterr().out
    assert "user 2: " in out and "user 3" not in out and out.count("<answer>") <= 2 and not os.path.exists(tmp_path / "toy" / "report.json")
    world = toy_world(Config())
    prompt, trace, tokens = world.test.prompt[0], world.test.trace[0], world.test.response[0].astype(int)
    step = np.zeros(len(tokens), int)

    def shown(tokens):
        show_user(world, prompt, trace, tokens, step, 8)
        return capsys.readouterr().out

    assert "✗" not in shown(tokens) and shown(tokens).count("L3") == 3  # prompt, trace, answer
    false = tokens.copy()
    false[5] = next(v for v in range(world.words.index("x0:0"), len(world.words)) if v != tokens[5])  # evidence of the first candidate
    assert shown(false).count("✗") == 1
    answer = int((tokens == ANSWER).argmax())
    twice = tokens.copy()
    twice[answer + 2] = twice[answer + 1]
    assert shown(twice).count("✗") == 1
    assert shown(np.concatenate((tokens[:4], tokens[answer:]))).count("✗ nothing about") == 8
