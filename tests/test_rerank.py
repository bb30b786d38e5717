"""Requests: prompts as the test users have them, rows that do not depend on their batch, one sentence for every bad line."""
import io
import json

import numpy as np
import pytest
import torch

import common
import rerank
import validity
from beauty import prepare
from config import STAGES, parse_args
from amazon import read_beauty
from data import CANDIDATES, LABEL, load_world
from make_beauty import make_beauty
from model import EOS, PAD
from test_recipe import TINY as RECIPE, refused

TINY = [*RECIPE, "--min_list", "2"]

TOY = {"history": [[0, 1, 2]] * 3 + [[4, 4, 4]] * 4, "candidates": [[0, 1, 2], [3, 3, 3], [0, 1, 2], [4, 0, 1]]}


@pytest.fixture(scope="module", params=["toy", "small"])
def made(request, tmp_path_factory):
    """(options, settings, world) of a run whose student is finished, with random weights that write something."""
    folder = tmp_path_factory.mktemp(request.param)
    options = ["--config", request.param, "--run_dir", str(folder), "--data_dir", str(folder / "data"), "--commit", "threshold"]
    make_beauty(folder / "data", n_users=120)
    cfg = parse_args("", [*TINY, *options])
    world = load_world(cfg)
    finish(cfg, world, "cft")
    return options, cfg, world


def finish(cfg, world, stage):
    run = common.Run(cfg, stage, common.new_model(cfg, world), world)
    with torch.no_grad():
        for p in run.model.parameters():  # see conftest.tiny_gpt
            p.normal_(std=0.5 if p.dim() == 2 else 1.0)
        run.model.embed.weight[EOS] *= 2  # so that responses have many lengths
    run._save(run.n_steps)


def rerank_lines(monkeypatch, capsys, options, *lines):
    """The command on these lines at the standard input -> its exit code, its lines, what it says on stderr."""
    data = b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
    monkeypatch.setattr("sys.argv", ["rerank.py", *TINY, *options, "--requests", "-"])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        common.script(rerank.main, rerank.__doc__)
    said = capsys.readouterr()
    return stop.value.code, [json.loads(line) for line in said.out.splitlines()], said.err.splitlines()


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
    for name, i in names.items():
        named.setdefault(i, []).append(int(name) if name.isdigit() and len(named) % 2 else name)  # 7, "7" and "A00006" alike
    test, rng = prepare(sequences, items)[2], np.random.default_rng(0)
    name = lambda rows: [rng.choice(np.array(named[i], object)) for i in rows]
    for user, cands in zip(test.user[:len(world.test)], test.cands):
        yield {"history": name(sequences[user][:-1]), "candidates": name(cands[:cfg.n_candidates])}


def examples_of(cfg, world, requests):
    item, examples = (rerank.toy if cfg.world == "toy" else rerank.beauty)(cfg, world)
    return examples(*zip(*[rerank.read_request(json.dumps(request).encode(), item, cfg)[1:] for request in requests]))


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
    requests = [{**r, "candidates": r["candidates"][:cfg.min_list + i % (cfg.n_candidates - cfg.min_list + 1)]} for i, r in enumerate(requests_of(cfg, world))]
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
    for batch in ("1", "100"):
        code, lines, said = rerank_lines(monkeypatch, capsys, [*options, "--eval_batch", batch], *requests)
        assert code == 0 and not said and [line["line"] for line in lines] == list(range(1, len(requests) + 1))
        found.append(lines)
    assert found[0] == found[1]
    for request, line in zip(requests, found[0]):
        assert line.keys() == {"line", "ranking", "valid", "faithful", "trace", "forwards", "tokens", "stage"} and line["stage"] == "cft"
        key = lambda x: json.dumps(x)
        assert sorted(line["ranking"], key=key) == sorted(request["candidates"], key=key)
    assert len({line["trace"] for line in found[0]}) > 3


def test_items_that_the_data_does_not_know_have_attributes_and_no_links(made):
    _, cfg, world = made
    if cfg.world == "toy":
        return
    items, names = read_beauty(cfg.data_dir)[1::3]
    name = next(n for n, i in names.items() if items[i][0])
    brand, path = items[names[name]]
    same = {"brand": brand, "categories": " > ".join(path)}
    other = {"brand": "", "categories": next(" > ".join(p) for _, p in items if p[:2] != path[:2])}
    with np.errstate(all="raise"):
        split = examples_of(cfg, world, [{"history": [name, name], "candidates": [same, other]}])
    prompt, trace = ([world.words[t] for t in row] for row in (without_padding(split.prompt)[0], without_padding(split.trace)[0]))
    shown = prompt[prompt.index(world.words[CANDIDATES]) + 1:]
    assert shown[:4] == ["L1", "b1", " > ".join(path[:2]), "p1"] and shown[6:8] == ["L2", "b?"] and shown[9] == "p2"
    assert trace[3:7] == ["L1", "brand:2,last", "depth:3", "leaf:2"] and trace[9:12] == ["L2", "brand:unknown", "depth:0"]
    kept = dict(zip(("link", "via"), world.nearest["link"][:, 0]))  # link 0, via 0, as it is rounded
    assert shown[4] == shown[10] == trace[7] == f"link:{kept['link']},{kept['via']}"


ITEM = "give an item id or asin of items.tsv"
BAD = [  # line, what is said about it
    (b"{", "no JSON"), (b"\xff\xfe{", "no JSON"), (b'{"history": [NaN]}', "no JSON"), (b"[" * 30000, "nested too deeply"),
    (b'{"history": ' + b"[" * 5000 + b"]" * 5000 + b"}", "nested too deeply"), (b"[" + b" " * 2 ** 17 + b"]", "more than 65536 bytes"),
    (b'{"id": ' + b"1" * 5000 + b"}", "no JSON"), ([], "expected {"), (7, "expected {"), (None, "expected {"), ("x", "expected {"),
    ({}, "expected {"), (lambda r: r.pop("history"), "expected {"), (lambda r: r.pop("candidates"), "found {'history"),
    (lambda r: r.update(candidate=1), "'candidate': 1"), (lambda r: r.update(id=[1]), "an \"id\" (string or integer)"),
    (lambda r: r.update(id=True), "'id': True"), (lambda r: r.update(history="A1"), "expected {"),
    (lambda r: r.update(candidates={}), "expected {"), (lambda r: r.update(history=[]), "the history must have at least"),
    (lambda r: r["candidates"].__delitem__(slice(1, None)), "here they have 7 and 1"),
    (lambda r: r["candidates"].extend(r["candidates"] * 5), "here they have 7 and 24")]
BAD_ITEM = {
    "toy": [(x, "unknown item") for x in (1, None, [], [1, 2], [1, 2, 5], [1, 2, -1], [1, 2, 1.0], [1, 2, True], [1, 2, "1"], [[1]] * 3)],
    "small": [(x, ITEM) for x in (0, -1, 1.0, True, None, "", "x", " 7", "07", 10 ** 30, [7], {}, {"brand": "x"}, {"brand": 1, "categories": "A"},
                                  {"brand": "", "categories": "A", "price": 1}, "\ud800")] + [
        ({"brand": "", "categories": c}, "unknown category") for c in ("", "Nowhere", "Top 0", "Top 0 > ", "Top 0 > Mid 99", "L1", "z" * 999)] + [
        ("A00000", "candidates 1 and 5 are the same item")]}


def test_every_bad_line_gets_its_sentence_and_the_others_go_on(made, monkeypatch, capsys):
    options, cfg, _ = made
    good = TOY if cfg.world == "toy" else {"history": [1, 2, 3, 4, 5, 6, 7], "candidates": [1, "8", 9, "A00010"]}
    lines, expected = [{"id": "first", **good}, b"", b" \r"], [None]
    for bad, sentence in BAD:
        if callable(bad):
            change, bad = bad, json.loads(json.dumps(good))
            change(bad)
        lines += [bad]
        expected += [sentence]
    for item, sentence in BAD_ITEM[cfg.config]:
        lines += [{**good, "candidates": good["candidates"] + [item]}]
        expected += [sentence]
    bad = lines[3:]
    lines += [{"id": "last", **good}]
    expected += [None]
    code, found, said = rerank_lines(monkeypatch, capsys, options, *lines)
    assert code == 1 and len(found) == len(expected) and [found[0]["id"], found[-1]["id"]] == ["first", "last"]
    assert sum(sentence is not None for sentence in expected) == len(said)
    said = iter(said)
    for line, sentence in zip(found, expected):
        if sentence is None:
            assert {**line, "id": 0} == {**found[0], "id": 0}
        else:
            assert line.keys() == {"line", "error"} and sentence in line["error"] and len(line["error"]) < 300 and "\n" not in line["error"]
            assert next(said) == f"line {line['line']}: {line['error']}"
            assert lines[line["line"] - 1] in bad


def test_what_stops_everything_is_one_sentence_and_exit_code_2(made, monkeypatch, capsys, tmp_path):
    options, cfg, _ = made
    for path, sentence in ((["--requests", str(tmp_path / "none")], "No such file"), (["--requests", str(tmp_path)], "Is a directory"),
                           ([], "pass --requests with a file"), (["--requests", "-", "--seed", "7"], f"python train_cft.py --config {cfg.config}")):
        assert sentence in refused(rerank, monkeypatch, capsys, tmp_path, *options, "--min_list", "2", *path)
    assert rerank_lines(monkeypatch, capsys, options) == (0, [], [])


def test_the_last_finished_stage_answers_and_without_traces_nothing_is_claimed(monkeypatch, capsys, tmp_path):
    options = ["--run_dir", str(tmp_path), "--trace", "false"]
    cfg = parse_args("", [*TINY, *options])
    world = load_world(cfg)
    for stage in STAGES:
        finish(cfg, world, stage)
    code, (line,), _ = rerank_lines(monkeypatch, capsys, options, {"id": 3, **TOY})
    assert code == 0 and line["stage"] == "rl" and line["faithful"] is None and line["id"] == 3


def test_validity_is_counted_on_a_list_for_every_user(made, monkeypatch, capsys):
    options, cfg, world = made
    monkeypatch.setattr(validity, "TOY_LISTS", 50)
    split = validity.many_lists(cfg, world)
    assert (split.k == cfg.n_candidates).all()
    if cfg.world == "toy":
        assert len(split) == 50 and not {p.tobytes() for p in split.prompt} & {p.tobytes() for p in world.test.prompt}
    else:  # where the target is in the list, the list is that of validation, but for the evidence of counts
        sequences, items, *_ = read_beauty(cfg.data_dir)
        assert len(split) == len(sequences)
        shown = lambda prompt: [word for word in (world.words[t] for t in prompt if t != PAD) if not word.startswith(("link:", "co:"))]
        users = prepare(sequences, items)[1].user[:len(world.val)]
        assert len(users) > 3 and all(shown(split.prompt[u]) == shown(p) for u, p in zip(users, world.val.prompt))
    finish(cfg, world, "ar")
    monkeypatch.setattr("sys.argv", ["validity.py", *TINY, *options])
    common.script(validity.main, validity.__doc__)
    row = [cell.strip() for cell in capsys.readouterr().out.splitlines()[-1].strip("|").split("|")]
    invalid, wrong = int(row[3]), [int(x) for x in row[5:8]]
    assert row[:3] == ["cft", "0", str(len(split))] and max(wrong) <= invalid == round(len(split) * (1 - float(row[4].split()[0]) / 100))
