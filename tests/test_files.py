"""Checkpoints: damaged files, full disks, second runs, other runs, other settings, other code."""
import errno
import json
import os
import pickle
from dataclasses import replace
from types import SimpleNamespace

import torch

from config import Config
from conftest import refusal
from plumbing import checkpoint as ck

TINY = Config(n_layer=1, n_head=1, d_model=8, block_size=4, device="cpu")


def tiny_world(**changes):
    split = SimpleNamespace(prompt=torch.zeros(1, 5))
    world = dict(words=list("abcdef"), checksum="data", train=split, val=split, test=split,
                 longest={"free": [6, 3], "bound": [6, 3]})
    return SimpleNamespace(**{**world, **changes})


WORLD = tiny_world()


def train(cfg, stage, done=2, n_steps=2):
    """Stands in for a training script that is killed after `done` steps. Returns the weights."""
    model = ck.start_from(cfg, WORLD, stage)
    run = SimpleNamespace(
        cfg=cfg, stage=stage, world=WORLD, model=model, n_steps=n_steps, seconds=1.5,
        path=ck.own_path(cfg, stage), optimizers=[torch.optim.AdamW(model.parameters())],
        began_with=ck.checksum(model.state_dict()))
    first, _, finished = ck.resume(cfg, stage, model, run.optimizers, WORLD, run.began_with)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    for _ in range(first, done):
        run.optimizers[0].step()
    if not finished:
        ck.save_run(run, done)
    return model.state_dict()


def begin(cfg, stage):
    """The weights that a stage begins with."""
    return ck.start_from(cfg, WORLD, stage).state_dict()


def same(a, b):
    return ck.checksum(a) == ck.checksum(b)


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = str(tmp_path / "new" / "x.pt")
    ck.save_tensors(path, {"a": torch.arange(3)})

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    def torch_full(*args):
        raise RuntimeError("[enforce fail at inline_container.cc] . write failed\nframe #0: ...")
    for module, name, fail in ((os, "replace", full), (torch, "save", torch_full)):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, fail)
            assert f"cannot write {path} (" in refusal(ck.save_tensors, path, {"a": 1})
        assert os.listdir(tmp_path / "new") == ["x.pt"]
        assert torch.equal(ck.load_tensors(path)["a"], torch.arange(3))


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


def test_a_damaged_or_foreign_file_is_refused_and_never_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ck.save_tensors("x.pt", {"a": torch.arange(1000), "b": [1, "two", None]})
    whole = (tmp_path / "x.pt").read_bytes()
    place = whole.index(torch.arange(1000).numpy().tobytes()) + 80
    flipped = whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1:]
    contents = [b"", b"text", whole[:-30], whole[:500], flipped, pickle.dumps(Evil(), 2)]
    changed = {**torch.load("x.pt"), "b": [1, "two", 0]}
    for foreign in ({"a": 1}, [1], Evil(), changed):
        torch.save(foreign, "foreign.pt")
        contents.append((tmp_path / "foreign.pt").read_bytes())
    for content in contents:
        (tmp_path / "y.pt").write_bytes(content)
        assert "y.pt is damaged, or no file of this version of the project" in refusal(
            ck.load_tensors, "y.pt")
    assert not os.path.exists("evil")


def test_checksums_tell_contents_apart():
    x = torch.zeros(2)
    different = [x, x + 1, x.double(), x[None], [x], [1, 2], (1, 2), [[1], 2], ["1", 2], {1: 2}, [],
                 [1, [2, 3]], [[1, 2], 3], 1, 1.0, True, None]
    assert len({ck.checksum(content) for content in different}) == len(different)


def test_a_lock_keeps_other_runs_out_and_other_failures_are_told(tmp_path, monkeypatch):
    path, held = str(tmp_path / "a" / "checkpoint.pt"), "another run is writing to"

    def enter():
        with ck.locked(path):
            pass
    with ck.locked(path):
        assert held in refusal(enter)
    enter()
    for number, expected in ((errno.EACCES, held), (errno.EAGAIN, held),
                             (errno.ENOLCK, f"cannot lock {tmp_path / 'a' / 'lock'}: No locks")):
        def locking(*args):
            raise OSError(number, os.strerror(number))
        with monkeypatch.context() as patch:
            patch.setattr(ck.fcntl, "flock", locking)
            assert refusal(enter).startswith(expected)
        with monkeypatch.context() as patch:  # as on Windows
            patch.setattr(ck, "fcntl", None)
            patch.setattr(ck, "msvcrt", SimpleNamespace(LK_NBLCK=2, locking=locking), raising=False)
            assert refusal(enter).startswith(expected)


def test_a_log_is_cut_to_the_steps_that_were_saved(tmp_path):
    path = tmp_path / "metrics.jsonl"
    (tmp_path / "checkpoint.pt.1.part").write_text("left by a kill")
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in range(5)) + '{"st')
    for first, kept in ((3, [0, 1, 2, 3]), (0, [0])):
        with ck.open_log(str(path), first) as log:
            log.write(json.dumps({"step": first}) + "\n")
        assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == kept
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_texts_that_do_not_fit_are_refused():
    positions = len(ck.new_model(TINY, WORLD).cos)
    for *trace, fits in ([positions // 4 * 4 - 8], [10, positions // 4 * 4 - 12]):  # 10: 12 slots
        ck.new_model(TINY, tiny_world(longest={"bound": [*trace, fits]}))
        assert "positions of the model: choose a smaller --block_size" in refusal(
            ck.new_model, TINY, tiny_world(longest={"bound": [*trace, fits + 1]}))


def test_a_stage_begins_with_the_latest_before_it(tmp_path):
    cfg = replace(TINY, run_dir=str(tmp_path))
    assert "first run `python train_ar.py --config toy`" in refusal(begin, cfg, "cft")
    weights = {"ar": train(cfg, "ar")}
    for stage in ("opd", "rl"):  # a teacher is no student
        assert "first run `python train_cft.py --config toy`" in refusal(begin, cfg, stage)
    assert same(begin(replace(cfg, block_size=1), "rl"), weights["ar"])  # but RL may train it
    weights["cft"] = train(cfg, "cft")
    train(cfg, "opd", done=1)  # unfinished
    assert same(begin(cfg, "rl"), weights["cft"]) and not same(weights["ar"], weights["cft"])
    assert ck.last_student(cfg, WORLD)[0] == "cft"
    weights["opd"] = train(cfg, "opd")
    assert same(begin(cfg, "rl"), weights["opd"])
    found = ck.finished_stages(cfg, WORLD)
    assert list(found) == ["ar", "cft", "opd"]
    assert all(same(model.state_dict(), weights[stage]) for stage, (model, _) in found.items())


def test_a_run_goes_on_only_as_it_began(tmp_path):
    cfg = replace(TINY, run_dir=str(tmp_path))
    whole = train(replace(cfg, run_dir=str(tmp_path / "whole")), "ar", 4, 4)
    train(cfg, "ar", 2, 4)
    assert same(train(cfg, "ar", 4, 4), whole)
    other = replace(cfg, ar_lr=0.5, tau=0.7, opd_lr=0.5)  # tau and OPD do not count
    assert "(ar_lr=0.004 there, 0.5 now): use the same, or another --run_dir" in refusal(
        train, other, "ar")
    for world in (tiny_world(words=list("abcdeg")), tiny_world(checksum="new")):
        assert "the data has changed since" in refusal(ck.load_stage, cfg, "ar", world)
    train(cfg, "cft")
    train(replace(cfg, again=True), "ar", 3, 3)  # another teacher
    assert "was begun from other weights" in refusal(train, cfg, "cft")
    path = ck.own_path(cfg, "cft")
    for key, other, file in (("model", {}, "model.py"), ("optimizers", [{}], "trainer.py")):
        train(replace(cfg, again=True), "cft")
        state = ck.load_tensors(path)
        ck.save_tensors(path, {**state, "finished": False, key: other})
        assert f"another version of {file}" in refusal(train, cfg, "cft")
    ck.save_tensors(path, {**state, "optimizers": []})  # a finished stage needs none
    train(cfg, "cft")


def test_again_trains_anew_and_keeps_the_old_file_until_it_saves(tmp_path):
    cfg = replace(TINY, run_dir=str(tmp_path))
    again = replace(cfg, again=True, ar_lr=0.5)
    old = train(cfg, "ar")
    model = ck.new_model(again, WORLD)
    assert ck.resume(again, "ar", model, [], WORLD, "") == (0, 0.0, False)
    assert same(ck.load_stage(cfg, "ar", WORLD)[0].state_dict(), old)
    new = train(again, "ar", 5, 5)
    assert not same(old, new)
    assert same(ck.load_stage(again, "ar", WORLD)[0].state_dict(), new)


def test_another_run_is_named_by_its_folder_or_by_that_of_a_stage(tmp_path):
    there = replace(TINY, run_dir=str(tmp_path / "there"))
    weights = {stage: train(there, stage, i + 1, i + 1)
               for i, stage in enumerate(("ar", "cft", "opd"))}
    run = str(tmp_path / "there" / "toy" / "seed0")
    # Another run may have been trained in another way: other seed, other rate, other text.
    cfg = replace(TINY, run_dir=str(tmp_path / "here"), seed=1, cft_lr=0.5, world="toy_target")
    of_run, of_stage = replace(cfg, from_=run), replace(cfg, from_=f"{run}/cft")
    assert same(begin(of_run, "cft"), weights["ar"])
    assert same(begin(of_run, "rl"), weights["opd"])
    assert same(begin(of_stage, "rl"), weights["cft"])
    assert ck.finished(of_stage, "ar") is ck.finished(of_stage, "opd") is None
    own = train(of_run, "cft")  # this run's own student comes before all students of the other
    assert same(begin(of_run, "rl"), own)
    assert list(ck.finished_stages(of_run, WORLD)) == ["ar", "cft"]
    teacher = replace(there, block_size=1, run_dir=str(tmp_path / "teacher"), from_=f"{run}/ar")
    after_rl = train(teacher, "rl")
    of_teacher = replace(cfg, seed=2, from_=os.path.dirname(ck.own_path(teacher, "rl")))
    assert same(begin(of_teacher, "cft"), after_rl) and not ck.finished(of_teacher, "rl")
    assert ck.finished(teacher, "rl")
    changes = dict(trace="free", wording="token", n_candidates=4, n_layer=2, n_head=2,
                   d_model=16)  # with which its tokens would mean something else
    for name, value in changes.items():
        assert f"({name}={getattr(there, name)} there, {value} now): use the same" in refusal(
            begin, replace(of_run, run_dir=str(tmp_path / "third"), **{name: value}), "opd")
    for world in (tiny_world(words=list("abcdeg")), tiny_world(checksum="new")):
        assert "the data has changed since" in refusal(ck.start_from, of_teacher, world, "cft")


def test_what_counts_as_other_code():
    text = ('from plumbing.a import f\nfrom data import g\n'
            'def h(x):\n    "What."\n    return f(g(x))\n')
    for old, new, same in (("plumbing.a", "plumbing.b", True), ("x):", "x):  # why", True),
                           ("What", "How", True), ("data", "model", False),
                           ("f(g(x))", "g(f(x))", False)):
        changed = text.replace(old, new)
        assert changed != text
        assert (ck.without_comments(changed) == ck.without_comments(text)) == same, changed


def test_a_checkpoint_tells_once_that_the_code_has_changed(tmp_path, monkeypatch, capsys):
    assert {"model.py", "toy/world.py", "train_cft.py", "beauty/writer.py"} <= ck.CODE.keys()
    cfg, code = replace(TINY, run_dir=str(tmp_path)), dict(ck.CODE)
    monkeypatch.setattr(ck, "TRAINED_BY", {})
    for world, change, names in (
            ("toy", {}, ""), ("toy", {"evaluate.py": "x", "train_cft.py": "x"}, ""),
            ("toy", {"beauty/writer.py": "x"}, ""), ("toy", {"model.py": "x"}, "model.py has"),
            ("toy", {"toy/world.py": "x", "data.py": "x"}, "data.py, toy/world.py have"),
            ("beauty", {"beauty/writer.py": "x"}, "beauty/writer.py has")):
        cfg = replace(cfg, world=world)
        monkeypatch.setattr(ck, "CODE", code)
        ck.tell_once.cache_clear()
        train(replace(cfg, again=True), "ar")
        monkeypatch.setattr(ck, "CODE", {**code, **change})
        capsys.readouterr()
        begin(cfg, "cft")
        begin(cfg, "cft")
        expected = f"{ck.own_path(cfg, 'ar')} was trained by other code ({names} changed since): " \
                   "--again true trains it anew\n"
        assert capsys.readouterr().err == (expected if names else "")
