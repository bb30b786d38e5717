"""Requests: prompts as the test users have them, rows that do not depend on their batch, an answer
as soon as a line is there, one sentence for every bad line."""
import io
import json
import os
import subprocess
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from beauty import rerank
from beauty.amazon import read_beauty
from beauty.evidence import prepare
from config import STAGES
from data import CANDIDATES, EOS, LABEL, PAD
from make_beauty import make_beauty
from plumbing.arguments import parse_args
from plumbing.checkpoint import new_model, save_run
from plumbing.script import script
from trainer import Run, load_world

TINY = ("--d_model 16 --n_head 2 --n_layer 1 --n_train 64 --n_val 8 --n_test 16 --batch_size 4 "
        "--threads 1 --tau 0.9").split()
TOY = {"history": [[0, 1, 2]] * 3 + [[4, 4, 4]] * 4,
       "candidates": [[0, 1, 2], [3, 3, 3], [0, 1, 2], [4, 0, 1]]}
SMALL = {"history": [1, 2, 3, 4, 5, 6, 7], "candidates": [1, "8", 9, "A00010", 12]}


@pytest.fixture(scope="module", params=["toy", "small"])
def made(request, tmp_path_factory):
    """(options, settings, world) of a run whose student is finished, with random weights that
    write something."""
    folder = tmp_path_factory.mktemp(request.param)
    options = ["--config", request.param, "--run_dir", str(folder), "--commit", "threshold",
               "--data_dir", str(folder / "data")]
    make_beauty(folder / "data", n_users=120)
    cfg = parse_args("", [*TINY, *options])
    world = load_world(cfg)
    finish(cfg, world, "cft")
    return options, cfg, world


def finish(cfg, world, stage):
    run = Run(cfg, stage, new_model(cfg, world), world)
    with torch.no_grad():
        for p in run.model.parameters():  # see conftest.tiny_gpt
            p.normal_(std=0.5 if p.dim() == 2 else 1.0)
        run.model.embed.weight[EOS] *= 2  # so that responses have many lengths
    save_run(run, run.n_steps)


class LineByLine(io.BytesIO):
    """A pipe that is fed line by line."""

    def read1(self, size=-1):
        return self.readline()


def run_rerank(monkeypatch, capsys, *arguments, file=None):
    """The command -> its exit code, its lines, what it says on stderr."""
    if file:
        monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=file))
    monkeypatch.setattr("sys.argv", ["rerank.py", *TINY, *arguments])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        script(rerank.main, rerank.__doc__, rerank.Options)
    said = capsys.readouterr()
    return stop.value.code, said.out.splitlines(), said.err.splitlines()


def rerank_lines(monkeypatch, capsys, options, *lines, kind=io.BytesIO):
    """The command on these lines at the standard input; its own lines are read as JSON."""
    data = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    code, out, said = run_rerank(monkeypatch, capsys, *options, "--requests", "-",
                                 file=kind(b"\n".join(data)))
    return code, [json.loads(line) for line in out], said


def requests_of(cfg, world):
    """The test users as requests: ids, asins and attributes as in the files."""
    if cfg.world == "toy":
        for row in world.test.prompt:
            values = [int(world.words[t][1]) for t in row if t >= LABEL + world.n_labels]
            items = [values[i:i + 3] for i in range(0, len(values), 3)]
            yield {"history": items[:6], "candidates": items[6:]}
        return
    sequences, items, _, _, names = read_beauty(cfg.data_dir)
    named = {}
    for name, i in names.items():  # 7, "7" and "A00006" alike
        as_number = name.isdigit() and len(named) % 2
        named.setdefault(i, []).append(int(name) if as_number else name)
    test, rng = prepare(sequences, items)[2], np.random.default_rng(0)

    def some_name(row):
        return [rng.choice(np.array(named[i], object)) for i in row]

    for user, cands in zip(test.user[:len(world.test)], test.cands):
        yield {"history": some_name(sequences[user][:-1]),
               "candidates": some_name(cands[:cfg.n_candidates])}


def examples_of(cfg, world, requests):
    reader = rerank.requests_of(cfg, world)
    lines = [json.dumps(request).encode() for request in requests]
    return reader.examples(*zip(*(rerank.read_request(line, reader, cfg)[1:] for line in lines)))


def without_padding(tokens):
    return [[int(t) for t in row if t != PAD] for row in tokens]


def test_requests_of_the_test_users_are_their_prompts_to_the_token(made):
    _, cfg, world = made
    requests = list(requests_of(cfg, world))
    split = examples_of(cfg, world, requests)
    assert len(requests) == len(world.test) > 5
    assert without_padding(split.prompt) == without_padding(world.test.prompt)
    assert without_padding(split.trace) == without_padding(world.test.trace)
    assert (split.incoming == world.test.incoming).all()


def various(cfg, world):
    """Requests of many lengths, on Beauty with items that the data does not know."""
    requests = []
    for i, r in enumerate(requests_of(cfg, world)):
        length = cfg.min_list + i % (cfg.n_candidates - cfg.min_list + 1)
        requests.append({**r, "candidates": r["candidates"][:length]})
    if cfg.world == "beauty":
        items = read_beauty(cfg.data_dir)[1]
        for i, r in enumerate(requests[::2]):
            brand, path = items[i]
            new = {"brand": brand, "categories": " > ".join(path[:2]) + " > New"}
            r["candidates"] = [new, *r["candidates"], dict(new)][:cfg.n_candidates]
            r["history"] = (r["history"] + [new] * (i % 3))[-1 - i:]
    return requests


def test_a_request_has_the_same_result_alone_and_in_a_batch(made, monkeypatch, capsys):
    options, cfg, world = made
    requests, found = various(cfg, world), []
    for kind in (LineByLine, io.BytesIO):
        code, lines, said = rerank_lines(monkeypatch, capsys, options, *requests, kind=kind)
        assert code == 0 and not said
        assert [line["line"] for line in lines] == list(range(1, len(requests) + 1))
        found.append(lines)
    assert found[0] == found[1]
    for request, line in zip(requests, found[0]):
        assert list(line) == ["line", "ranking", "valid", "faithful", "trace", "forwards", "tokens",
                              "stage", "decisive"] and line["stage"] == "cft"
        ranked = sorted(map(json.dumps, line["ranking"]))
        assert ranked == sorted(map(json.dumps, request["candidates"]))
    assert len({line["trace"] for line in found[0]}) > 3


def test_items_that_the_data_does_not_know_have_attributes_and_no_links(made):
    _, cfg, world = made
    if cfg.world == "toy":
        return
    items, names = read_beauty(cfg.data_dir)[1::3]
    name = next(n for n, i in names.items() if items[i][0])
    brand, path = items[names[name]]
    same = {"brand": brand, "categories": " > ".join(path)}
    others = [" > ".join(p) for _, p in items if p[:2] != path[:2]]
    other = {"brand": "", "categories": others[0]}
    request = {"history": [name, name], "candidates": [same, other, same, same, same]}
    with np.errstate(all="raise"):
        split = examples_of(cfg, world, [request])
    (prompt,), (trace,) = without_padding(split.prompt), without_padding(split.trace)
    prompt, trace = [world.words[t] for t in prompt], [world.words[t] for t in trace]
    shown = prompt[prompt.index(world.words[CANDIDATES]) + 1:]
    assert shown[:4] == ["L1", "b1", " > ".join(path[:2]), "p1"]
    assert shown[6:8] == ["L2", "b?"] and shown[9] == "p2"
    assert trace[3:7] == ["L1", "brand:2,last", "depth:3", "leaf:2"]
    assert trace[9:12] == ["L2", "brand:unknown", "depth:0"]
    link, via = world.nearest["link"][:, 0]  # link 0, via 0, as it is rounded
    assert shown[4] == shown[10] == trace[7] == f"link:{link},{via}"


# --- Lines as they come -----------------------------------------------------------------------

class Chunks:
    """A file that has these pieces, and at each reading whatever is there of one."""

    def __init__(self, *pieces):
        self.left = list(pieces)

    def read1(self, size):
        if not self.left:
            return b""
        piece, self.left[0] = self.left[0][:size], self.left[0][size:]
        if not self.left[0]:
            self.left.pop(0)
        return piece


def test_all_lines_that_are_there_come_together_and_no_others():
    def batches(*pieces):
        return list(rerank.batches(Chunks(*pieces)))

    assert batches() == batches(b"\n \n\r\n") == []
    assert batches(b"a\n", b"b\nc\n", b"d") == [[(1, b"a")], [(2, b"b"), (3, b"c")], [(4, b"d")]]
    assert batches(b"a", b"b\n\n", b"c\r\n") == [[(1, b"ab")], [(3, b"c\r")]]
    many = batches(b"x\n" * 600)
    assert [len(batch) for batch in many] == [256, 256, 88] and many[-1][-1] == (600, b"x")
    first, second = batches(b"y" * 500_000 + b"\n", b"z")
    assert first[0][0] == 1 and rerank.MAX_LINE < len(first[0][1]) <= 2 * rerank.MAX_LINE + 1
    assert second == [(2, b"z")]


def test_a_line_in_a_line_out(made):
    """The next line is fed only when the one before has been answered."""
    options, cfg, _ = made
    if cfg.world != "toy":
        return  # the lines are read alike
    command = [sys.executable, rerank.__file__, *TINY, *options, "--requests", "-"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE) as running:
        patience = threading.Timer(90, running.kill)  # if it answers nothing
        patience.start()
        for i in range(3):
            running.stdin.write(json.dumps({"id": i, **TOY}).encode() + b"\n")
            running.stdin.flush()
            line = running.stdout.readline()
            assert line, running.stderr.read().decode()
            assert json.loads(line)["id"] == i
        running.stdin.write(b"{\n")
        running.stdin.flush()
        assert json.loads(running.stdout.readline())["line"] == 4
        running.stdin.close()
        assert running.wait(60) == 1 and running.stdout.read() == b""
        patience.cancel()


# --- Bad lines --------------------------------------------------------------------------------

def without(key):
    return lambda request: request.pop(key)


def changed(**values):
    return lambda request: request.update(values)


def with_candidates(change):
    return lambda request: request.update(candidates=change(request["candidates"]))


BAD = [  # a line, or a change of a good request; what is said about it
    (b"{", "no JSON"),
    (b"\xff\xfe{", "no JSON"),
    (b'{"history": [NaN]}', "no JSON"),
    (b"[" * 30000, "nested too deeply"),
    (b'{"history": ' + b"[" * 5000 + b"]" * 5000 + b"}", "nested too deeply"),
    (b"[" + b" " * 2 ** 17 + b"]", "more than 65536 bytes"),
    (b'{"id": ' + b"1" * 5000 + b"}", "no JSON"),
    ([], "expected {"),
    (7, "expected {"),
    (None, "expected {"),
    ("x", "expected {"),
    ({}, "expected {"),
    (without("history"), "expected {"),
    (without("candidates"), "found {'history"),
    (changed(candidate=1), "'candidate': 1"),
    (changed(id=[1]), "an \"id\" (string or integer)"),
    (changed(id=True), "'id': True"),
    (changed(history="A1"), "expected {"),
    (changed(candidates={}), "expected {"),
    (changed(history=[]), "the history must have at least"),
    (with_candidates(lambda c: c[:1]), "here they have 7 and 1"),
    (with_candidates(lambda c: (c * 6)[:24]), "here they have 7 and 24")]
DESCRIBED = {"brand": "", "categories": "A"}
ITEM = "give an item id or asin of items.tsv"
BAD_ITEM = {
    "toy": [(x, "unknown item") for x in (
        1, None, [], [1, 2], [1, 2, 5], [1, 2, -1], [1, 2, 1.0], [1, 2, True], [1, 2, "1"],
        [[1]] * 3)],
    "small": [(x, ITEM) for x in (
        0, -1, 1.0, True, None, "", "x", " 7", "07", 10 ** 30, [7], {}, {"brand": "x"},
        {"brand": 1, "categories": "A"}, {**DESCRIBED, "price": 1}, "\ud800")]
    + [({"brand": "", "categories": c}, "unknown category") for c in (
        "", "Nowhere", "Top 0", "Top 0 > ", "Top 0 > Mid 99", "L1", "z" * 999)]
    + [("A00000", "candidates 1 and 6 are the same item")]}


def test_every_bad_line_gets_its_sentence_and_the_others_go_on(made, monkeypatch, capsys):
    options, cfg, _ = made
    good = TOY if cfg.world == "toy" else SMALL
    lines, expected = [{"id": "first", **good}, b"", b" \r"], [None]
    for bad, sentence in BAD:
        if callable(bad):
            change, bad = bad, json.loads(json.dumps(good))
            change(bad)
        lines.append(bad)
        expected.append(sentence)
    for item, sentence in BAD_ITEM[cfg.config]:
        lines.append({**good, "candidates": good["candidates"] + [item]})
        expected.append(sentence)
    bad = lines[3:]
    lines.append({"id": "last", **good})
    expected.append(None)
    code, found, said = rerank_lines(monkeypatch, capsys, options, *lines)
    assert code == 1 and len(found) == len(expected)
    assert [found[0]["id"], found[-1]["id"]] == ["first", "last"]
    assert sum(sentence is not None for sentence in expected) == len(said)
    said = iter(said)
    for line, sentence in zip(found, expected):
        if sentence is None:
            assert {**line, "id": 0} == {**found[0], "id": 0}
        else:
            assert line.keys() == {"line", "error"} and sentence in line["error"]
            assert len(line["error"]) < 300 and "\n" not in line["error"]
            assert next(said) == f"line {line['line']}: {line['error']}"
            assert lines[line["line"] - 1] in bad


def test_what_stops_everything_is_one_sentence_and_exit_code_2(made, monkeypatch, capsys, tmp_path):
    options, cfg, _ = made
    for more, sentence in (
            (["--requests", str(tmp_path / "none")], "No such file"),
            (["--requests", str(tmp_path)], "Is a directory"),
            ([], "pass --requests with a file"),
            (["--requests", "-", "--seed", "7"], f"python train_cft.py --config {cfg.config}"),
            (["--request", "-"], "--requests")):
        code, out, said = run_rerank(monkeypatch, capsys, *options, *more)
        assert code == 2 and not out and len(said) == 1 and sentence in said[0]
    assert rerank_lines(monkeypatch, capsys, options) == (0, [], [])


def test_other_data_than_the_students_is_refused(made, monkeypatch, capsys):
    options, cfg, _ = made
    if cfg.world == "toy":
        return
    path = os.path.join(cfg.data_dir, "sequences.txt")
    with open(path) as file:
        text = file.read()
    lines = text.splitlines()
    user, *items = lines[5].split()
    with open(path, "w") as file:
        file.write("\n".join([*lines[:5], " ".join([user, *items[::-1]]), *lines[6:]]) + "\n")
    code, out, said = run_rerank(monkeypatch, capsys, *options, "--requests", "-")
    with open(path, "w") as file:
        file.write(text)
    assert code == 2 and not out and "the data has changed" in said[-1]
    assert rerank_lines(monkeypatch, capsys, options, SMALL)[0] == 0


def test_the_last_finished_stage_answers_and_without_traces_nothing_is_claimed(
        monkeypatch, capsys, tmp_path):
    options = ["--run_dir", str(tmp_path), "--trace", "none"]
    cfg = parse_args("", [*TINY, *options])
    world = load_world(cfg)
    for stage in STAGES:
        finish(cfg, world, stage)
    code, (line,), _ = rerank_lines(monkeypatch, capsys, options, {"id": 3, **TOY})
    assert code == 0 and line["stage"] == "rl" and line["faithful"] is None and line["id"] == 3
    assert "decisive" not in line


def test_validity_is_counted_on_a_list_for_every_user(made, monkeypatch, capsys):
    import validity
    options, cfg, world = made
    monkeypatch.setattr(validity, "TOY_LISTS", 50)
    split = validity.many_lists(cfg, world)
    assert (split.list_length == cfg.n_candidates).all()

    def shown(prompt):
        words = [world.words[token] for token in prompt if token != PAD]
        return [word for word in words if not word.startswith(("link:", "co:"))]

    if cfg.world == "toy":
        others = {p.tobytes() for p in world.test.prompt}
        assert len(split) == 50 and not {p.tobytes() for p in split.prompt} & others
    else:  # a list of validation, where the target is in it, but for the evidence of counts
        sequences, items, *_ = read_beauty(cfg.data_dir)
        users = prepare(sequences, items)[1].user[:len(world.val)]
        assert len(split) == len(sequences) and len(users) > 3
        for user, prompt in zip(users, world.val.prompt):
            assert shown(split.prompt[user]) == shown(prompt)

    finish(cfg, world, "ar")
    monkeypatch.setattr("sys.argv", ["validity.py", *TINY, *options])
    capsys.readouterr()
    script(validity.main, validity.__doc__, validity.Options)
    last = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| cft")][-1]
    row = [cell.strip() for cell in last.strip("|").split("|")]
    invalid, wrong = int(row[3]), [int(x) for x in row[5:8]]
    assert row[:3] == ["cft", "0", str(len(split))] and max(wrong) <= invalid
    assert invalid == round(len(split) * (1 - float(row[4].split()[0]) / 100))
