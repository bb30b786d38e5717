"""Training runs as a user meets them: refused, killed, stopped, begun again, side by side."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

import evaluate
import train_ar
import train_cft
import train_opd
import train_rl
import trainer
from beauty import rerank
from config import Config
from conftest import ROOT, tiny_gpt
from make_beauty import make_beauty
from plumbing import checkpoint as files
from plumbing import processes
from plumbing.arguments import parse_args
from plumbing.settings import UserError
from scripts import TINY, checkpoint, refused, run

STAGES = {"ar": train_ar, "cft": train_cft, "opd": train_opd, "rl": train_rl}


def log_of(run_dir, stage, config="toy"):
    """The lines of a stage's log, without times."""
    folder = os.path.dirname(checkpoint(run_dir, stage, config))
    with open(os.path.join(folder, "metrics.jsonl")) as f:
        lines = [json.loads(line) for line in f]
    for line in lines:
        assert line.pop("seconds") >= 0
    return lines


def same_weights(a, b):
    a, b = (torch.load(path, weights_only=True) for path in (a, b))
    assert a["finished"] and b["finished"]
    return all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"])


class Killed(Exception):
    pass


def kill_at(step, monkeypatch, module, run_dir, *options):
    """Runs a stage that dies in the middle of a step, its line already in the log."""
    real = trainer.Run.log

    def log_then_die(self, **values):
        real(self, **values)
        if self.step == step:
            self.log_file.flush()
            raise Killed

    monkeypatch.setattr(trainer.Run, "log", log_then_die)
    with pytest.raises(Killed):
        run(module, monkeypatch, run_dir, *options)
    monkeypatch.setattr(trainer.Run, "log", real)


# --- Refused before anything is written -------------------------------------------------------

@pytest.mark.parametrize("options, expected", [
    (["--world", "beauty", "--data_dir", "nowhere"], "there is no folder nowhere"),
    (["--teacher", "x.pt"], "leave out --teacher"),
    (["--block_size", "980"], "more than the 1024 positions of the model: choose a smaller"),
    (["--block_size", "980", "--fast", "false"], "more than the 1024 positions"),
    (["--n_candidates", "113"], "--n_candidates must be a whole number at least 2 and at most 63"),
    (["--grad_clip", "0"], "--grad_clip must be a number above 0"),
])
def test_settings_that_cannot_work_are_refused(options, expected, monkeypatch, capsys, tmp_path):
    assert expected in refused(train_ar, monkeypatch, capsys, tmp_path, *options)
    assert not list(tmp_path.iterdir())


def test_the_longest_list_and_the_largest_block_that_fit_are_trained(monkeypatch, tmp_path):
    one = ["--ar_steps", "1", "--cft_steps", "1", "--cft_gold", "true", "--batch_size", "1",
           "--n_val", "1", "--tau", "0.001", "--commit", "threshold"]
    for stage in ("ar", "cft"):
        run(STAGES[stage], monkeypatch, tmp_path / "list", "--n_candidates", "63", *one)
        run(STAGES[stage], monkeypatch, tmp_path / "block", "--block_size", "512", *one)


@pytest.mark.parametrize("world", ["toy", "toy_random_labels"])
def test_whether_texts_fit_is_a_matter_of_one_position(world):
    cfg = Config(world=world, block_size=16, n_train=50, n_val=5, n_test=5)
    of_world = trainer.load_world(cfg)
    longest = of_world.train.prompt.shape[1] + 16 * -(-of_world.max_response // 16)
    files.check_fits(cfg, of_world, longest)
    with pytest.raises(UserError, match=f"more than the {longest - 1} positions"):
        files.check_fits(cfg, of_world, longest - 1)


@pytest.mark.parametrize("stage, before", [("cft", "ar"), ("opd", "ar"), ("rl", "opd")])
def test_a_stage_without_its_predecessor_names_the_command(stage, before, monkeypatch, capsys,
                                                           tmp_path):
    expected = f"python train_{before}.py --config toy"
    assert expected in refused(STAGES[stage], monkeypatch, capsys, tmp_path)


# --- Checkpoints of others --------------------------------------------------------------------

def test_foreign_and_damaged_checkpoints_are_refused_and_kept(monkeypatch, capsys, tmp_path):
    run(train_ar, monkeypatch, tmp_path)
    path = checkpoint(tmp_path, "ar")
    whole = open(path, "rb").read()

    def says(module, *options):
        return refused(module, monkeypatch, capsys, tmp_path, *options)

    assert "d_model=16 there, 32 now" in says(train_cft, "--d_model", "32")
    assert f"ar_lr={Config().ar_lr} there, 0.1 now" in says(train_ar, "--ar_lr", "0.1")
    for damaged in (whole[:len(whole) // 2], b"", b"not a checkpoint"):
        open(path, "wb").write(damaged)
        for module in (train_ar, train_cft):
            assert "damaged" in says(module)
        assert open(path, "rb").read() == damaged  # it is for the user to delete it
    torch.save({"weights": torch.zeros(3)}, path)
    assert "no file of this project" in says(train_cft)


def test_settings_that_change_no_weight_may_change(monkeypatch, capsys, tmp_path):
    run(train_ar, monkeypatch, tmp_path)
    capsys.readouterr()
    for options in (["--tau", "0.3"], ["--every", "3"], ["--fast", "false"], ["--n_test", "9"]):
        run(train_ar, monkeypatch, tmp_path, *options)
        assert "finished already" in capsys.readouterr().out


def test_conversions_may_share_a_teacher_and_start_from_any_fitting_checkpoint(
        monkeypatch, capsys, tmp_path):
    run(train_ar, monkeypatch, tmp_path / "a")
    teacher = checkpoint(tmp_path / "a", "ar")
    for seed in ("0", "1"):  # two conversions of one teacher, in a folder that has none of its own
        run(train_cft, monkeypatch, tmp_path / "b", "--seed", seed, "--teacher", teacher,
            "--answer_weight", "2")
    assert not os.path.exists(checkpoint(tmp_path / "b", "ar"))
    kept = sorted(os.listdir(os.path.dirname(teacher)))
    assert kept == ["checkpoint.pt", "lock", "metrics.jsonl", "outputs.pt"]

    start = checkpoint(tmp_path / "b", "cft")
    steps = ["--rl_steps", "1", "--rl_lr", "1e-9", "--block_size", "1", "--answer_weight", "2"]
    run(train_rl, monkeypatch, tmp_path / "c", "--teacher", teacher, "--init", start, *steps)
    before, after = (torch.load(p)["model"] for p in (start, checkpoint(tmp_path / "c", "rl")))
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)

    def says(module, folder, *options):
        return refused(module, monkeypatch, capsys, tmp_path / folder, *options)

    assert "no finished checkpoint nowhere" in says(train_cft, "d", "--teacher", "nowhere")
    assert "no such checkpoint" in says(train_cft, "d", "--init", "nowhere")
    assert "damaged" in says(train_cft, "d", "--init", __file__)
    wide = ["--teacher", teacher, "--d_model", "32"]
    assert "d_model=16 there, 32 now" in says(train_cft, "d", *wide)
    assert "shape" in says(train_ar, "d", "--init", teacher, "--d_model", "32")
    other = ["--teacher", teacher, "--init", teacher, *steps]
    assert "begun from other weights" in says(train_rl, "c", *other)


def test_a_teacher_may_have_been_through_rl_if_it_is_still_autoregressive(
        monkeypatch, capsys, tmp_path):
    run(train_ar, monkeypatch, tmp_path)
    first = checkpoint(tmp_path, "ar")
    start = ["--teacher", first, "--init", first, "--rl_steps", "1"]
    for B in ("1", "4"):
        run(train_rl, monkeypatch, tmp_path / B, *start, "--block_size", B)
    teacher, student = (checkpoint(tmp_path / B, "rl") for B in ("1", "4"))
    run(train_cft, monkeypatch, tmp_path / "cft", "--teacher", teacher)
    begun_with = torch.load(checkpoint(tmp_path / "cft", "cft"))["start"]
    assert begun_with == files.checksum(torch.load(teacher)["model"])
    message = refused(train_cft, monkeypatch, capsys, tmp_path / "other", "--teacher", student)
    assert "another stage or vocabulary" in message


def test_responses_of_another_teacher_are_decoded_anew(monkeypatch, tmp_path):
    run(train_ar, monkeypatch, tmp_path)
    run(train_cft, monkeypatch, tmp_path)
    path = os.path.join(os.path.dirname(checkpoint(tmp_path, "ar")), "outputs.pt")
    old = torch.load(path)["made_of"]
    for stage in ("ar", "cft"):
        os.remove(checkpoint(tmp_path, stage))
    for module in (train_ar, train_cft):
        run(module, monkeypatch, tmp_path, "--ar_steps", "40", "--ar_lr", "0.02")
    assert torch.load(path)["made_of"] != old


def other_data(folder):
    """The last two items of one user change places."""
    path = folder / "sequences.txt"
    user, *items = path.read_text().split("\n")[0].split()
    items[-1], items[-2] = items[-2], items[-1]
    rest = path.read_text().split("\n")[1:]
    path.write_text("\n".join([" ".join([user, *items]), *rest]))


def test_no_stage_goes_on_or_starts_on_other_data(monkeypatch, capsys, tmp_path):
    make_beauty(tmp_path / "data")
    beauty = ["--config", "small", "--data_dir", str(tmp_path / "data")]
    run(train_ar, monkeypatch, tmp_path, *beauty)
    kill_at(3, monkeypatch, train_cft, tmp_path, *beauty)
    shutil.copytree(tmp_path / "data", tmp_path / "before")
    other_data(tmp_path / "data")
    trainer.load_world(parse_args("", [*TINY, "--run_dir", str(tmp_path), *beauty]))
    (tmp_path / "requests").write_text("")
    ask = ["--requests", str(tmp_path / "requests")]
    for module in (train_ar, train_cft, evaluate, rerank):
        own = ask if module is rerank else []
        message = refused(module, monkeypatch, capsys, tmp_path, *beauty, *own)
        assert "the data has changed since" in message and "another --run_dir" in message
    # Where the data lies, and how much of it is tested on, is another matter.
    moved = ["--config", "small", "--data_dir", str(tmp_path / "before"), "--n_test", "12"]
    run(train_cft, monkeypatch, tmp_path, *moved)
    assert torch.load(checkpoint(tmp_path, "cft", "small"))["finished"]


# --- Interrupted ------------------------------------------------------------------------------

@pytest.mark.parametrize("fast", ["true", "false"])
def test_a_killed_run_continues_to_the_very_same_weights(fast, monkeypatch, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for stage, module in STAGES.items():
        run(module, monkeypatch, whole, "--fast", fast)
        kill_at(2, monkeypatch, module, killed, "--fast", fast)
        assert torch.load(checkpoint(killed, stage))["step"] == 2
        run(module, monkeypatch, killed, "--fast", fast)
        assert same_weights(checkpoint(whole, stage), checkpoint(killed, stage))
        lines = log_of(whole, stage)
        assert lines == log_of(killed, stage)
        assert [line["step"] for line in lines] == list(range(len(lines)))
        assert all(line["lr"] >= 0 for line in lines)


def test_every_weight_has_one_optimiser_and_the_matrices_of_layers_have_muon(kind):
    model = tiny_gpt(kind=kind)
    muon, adamw = trainer.optimizers_of(model, 0.1)
    assert type(muon) is torch.optim.Muon and type(adamw) is torch.optim.AdamW
    names = {id(p): name for name, p in model.named_parameters()}
    of_muon, of_adamw = ([names[id(p)] for group in optimizer.param_groups
                          for p in group["params"]] for optimizer in (muon, adamw))
    assert sorted(of_muon + of_adamw) == sorted(names.values())
    matrices = {name for name, p in model.layers.named_parameters() if p.dim() == 2}
    assert len(matrices) >= 2 * len(model.layers)
    assert set(of_muon) == {f"layers.{name}" for name in matrices}
    assert "embed.weight" in of_adamw


def test_both_optimisers_take_the_rate_of_the_schedule_and_move_their_weights(
        monkeypatch, tmp_path):
    cfg = parse_args("", [*TINY, "--run_dir", str(tmp_path)])
    world = trainer.load_world(cfg)
    job = trainer.Run(cfg, "ar", files.new_model(cfg, world), world)
    for step in job.steps():
        before = [p.detach().clone() for p in job.model.parameters()]
        job.update(sum((p ** 2).sum() for p in job.model.parameters()))
        assert all(not torch.equal(a, b) for a, b in zip(before, job.model.parameters()))
        rates = [group["lr"] for optimizer in job.optimizers for group in optimizer.param_groups]
        assert rates == [job.lr_at(step)] * len(rates)


def test_going_on_restores_both_optimisers_and_refuses_a_checkpoint_without(
        monkeypatch, capsys, tmp_path):
    kill_at(3, monkeypatch, train_ar, tmp_path)
    path = checkpoint(tmp_path, "ar")
    cfg = parse_args("", [*TINY, "--run_dir", str(tmp_path)])
    world, saved = trainer.load_world(cfg), files.load_tensors(path)
    job = trainer.Run(cfg, "ar", files.new_model(cfg, world), world)
    fresh = trainer.optimizers_of(job.model, cfg.ar_lr)
    assert len(job.optimizers) == len(saved["optimizers"]) == 2
    for now, there, new in zip(job.optimizers, saved["optimizers"], fresh):
        assert files.checksum(now.state_dict()) == files.checksum(there)
        assert there["state"] and not new.state_dict()["state"]
    # An older version had one optimiser.
    saved["optimizer"] = saved.pop("optimizers")[1]
    files.save_tensors(path, saved)
    old = open(path, "rb").read()
    message = refused(train_ar, monkeypatch, capsys, tmp_path)
    assert f"{path} is of another version of trainer.py: delete it" in message
    assert open(path, "rb").read() == old


def test_a_stage_of_no_steps_hands_its_weights_on(monkeypatch, capsys, tmp_path):
    none = [f"--{stage}_steps=0" for stage in STAGES]
    for stage, module in STAGES.items():
        run(module, monkeypatch, tmp_path, *none)
        state = torch.load(checkpoint(tmp_path, stage))
        assert state["finished"] and state["step"] == 0 and log_of(tmp_path, stage) == []
        assert same_weights(checkpoint(tmp_path, "ar"), checkpoint(tmp_path, stage))
        run(module, monkeypatch, tmp_path, *none)
        assert "finished already" in capsys.readouterr().out
    cfg = parse_args("", [*TINY, *none])
    begun_with = files.new_model(cfg, trainer.load_world(cfg)).state_dict()
    assert all(torch.equal(begun_with[name], state["model"][name]) for name in begun_with)


def test_a_second_run_into_the_same_folder_is_refused(monkeypatch, capsys, tmp_path):
    with files.locked(checkpoint(tmp_path, "ar")):
        assert "another run is writing" in refused(train_ar, monkeypatch, capsys, tmp_path)
    run(train_ar, monkeypatch, tmp_path)


def test_ctrl_c_is_one_line_that_says_how_to_go_on(tmp_path):
    options = [*TINY, "--run_dir", str(tmp_path), "--ar_steps", "100000"]
    command = [sys.executable, os.path.join(ROOT, "train_ar.py"), *options]
    said = tmp_path.with_suffix(".said")  # no pipe: the bar would fill it, and the run stop
    with open(said, "w") as stderr:
        job = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=stderr,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    deadline = time.time() + 120
    while not os.path.exists(checkpoint(tmp_path, "ar")):
        assert time.time() < deadline and job.poll() is None
        time.sleep(0.05)
    job.send_signal(signal.SIGINT)
    assert job.wait(timeout=60) == 130
    err = said.read_text().replace("\r", "\n").strip().split("\n")
    assert not any("Traceback" in line for line in err)
    assert err[-1] == "stopped; to go on from the last checkpoint, type again: " + " ".join(command)
    folder = os.path.dirname(checkpoint(tmp_path, "ar"))
    assert sorted(os.listdir(folder)) == ["checkpoint.pt", "lock", "metrics.jsonl"]


# --- Where it runs ----------------------------------------------------------------------------

def complete(rank="0", ranks="2", local="0", address="localhost", port="29500"):
    return dict(zip(processes.VARIABLES, (rank, ranks, local, address, port)))


def test_what_a_launcher_says_is_believed():
    assert processes.launched({}) == (0, 1) == processes.launched({"LOCAL_RANK": "0"})
    assert processes.launched(complete("0", "1")) == (0, 1)
    assert processes.launched(complete("1", "2", "1")) == (1, 2)
    assert processes.launched(complete("5", "8", "1")) == (5, 8)


@pytest.mark.parametrize("environment", [
    {"RANK": "1"}, {"RANK": ""}, {"RANK": "0"}, {"WORLD_SIZE": "2"}, {"WORLD_SIZE": ""},
    {"RANK": "3", "WORLD_SIZE": "1"}, {"RANK": "0", "WORLD_SIZE": "2"},
    complete("2"), complete("-1"), complete("x"), complete(""), complete("0", "0"),
    complete("0", "x"), complete("0", ""), complete(local=""), complete(local="1"),
    complete(address=""), complete(port=""), complete(port="x"), complete(port="99999"),
    {k: v for k, v in complete().items() if k != "LOCAL_RANK"},
    {k: v for k, v in complete().items() if k != "MASTER_ADDR"}], ids=str)
def test_what_no_launcher_says_is_refused(environment):
    with pytest.raises(UserError, match="torchrun") as error:
        processes.launched(environment)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("environment", [
    {"RANK": "1"}, {"RANK": ""}, {"RANK": "3", "WORLD_SIZE": "1"},
    {"WORLD_SIZE": "2", "RANK": "0"}], ids=str)
def test_a_process_that_takes_itself_for_one_of_several_does_not_train(environment, tmp_path):
    command = [sys.executable, os.path.join(ROOT, "train_ar.py"), *TINY, "--run_dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True,
                          env={**os.environ, **environment})
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: the environment has RANK=") and not os.listdir(tmp_path)


def in_python(code, *options, **environment):
    return subprocess.run([sys.executable, "-c", code, *options], cwd=ROOT, text=True,
                          capture_output=True, env={**os.environ, **environment})


def test_windows_is_answered_in_one_sentence(tmp_path):
    without_fcntl = ("import runpy, sys; sys.modules['fcntl'] = None; sys.argv[0] = 'train_ar.py'; "
                     "runpy.run_path('train_ar.py', run_name='__main__')")
    done = in_python(without_fcntl, *TINY, "--run_dir", str(tmp_path))
    assert done.returncode == 2 and done.stderr.startswith("error: Windows is not supported")
    assert done.stderr.count("\n") == 1 and not os.listdir(tmp_path)


@pytest.mark.parametrize("name", [*(f"train_{stage}.py" for stage in STAGES),
                                  "evaluate.py", "beauty/rerank.py"])
def test_threads_are_told_to_sleep_where_others_are_busy_before_torch_is_loaded(name):
    code = """
import builtins, io, os, runpy, sys
class Watch:
    def find_spec(self, name, *_):
        if name == "torch":
            print(os.environ.get("OMP_WAIT_POLICY"), flush=True)
            os._exit(0)
real, stats = open, ["cpu 9 0 0 100 0 0 0 0", sys.argv[2]]
def fake(path, *args, **kwargs):
    return io.StringIO(stats.pop(0)) if path == "/proc/stat" else real(path, *args, **kwargs)
builtins.open = fake
sys.meta_path.insert(0, Watch())
sys.path.insert(0, "")
runpy.run_path(sys.argv[1])
"""
    unset = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    idle, busy = "cpu 9 0 0 140 0 0 0 0", "cpu 29 0 0 120 0 0 0 0"
    for policy, stat, expected in (({}, idle, "None\n"), ({}, busy, "PASSIVE\n"),
                                   ({}, "no figures", "None\n"),
                                   ({"OMP_WAIT_POLICY": "ACTIVE"}, busy, "ACTIVE\n")):
        done = subprocess.run([sys.executable, "-c", code, name, stat], cwd=ROOT, text=True,
                              capture_output=True, env={**unset, **policy})
        assert done.stdout == expected, done.stderr
