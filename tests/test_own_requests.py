"""Your own requests (beauty/rerank.py): prompts as the test users have them, results that do not
depend on their batch, one sentence for every bad line. Your own data (experiments/own_world.py): no
target is known before it."""
import io
import json
from types import SimpleNamespace

import pytest
import torch

import own_world
from beauty import rerank
from beauty.amazon import read_beauty
from beauty.evidence import prepare
from beauty.prerank import FOLDS
from config import Config
from data import EOS, PAD
from make_beauty import make_beauty
from plumbing.checkpoint import new_model, save_run
from plumbing.script import script
from plumbing.settings import parse_args
from trainer import Run, load_world

TINY = ("--config small --d_model 16 --n_head 2 --n_layer 1 --n_train 64 --n_val 8 --n_test 16 "
        "--threads 1 --commit threshold").split()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(options, settings, World, requests of the test users) of a run whose student has finished,
    with random weights that write something."""
    folder = tmp_path_factory.mktemp("requests")
    make_beauty(folder / "data", n_users=120)
    options = [*TINY, "--run_dir", str(folder), "--data_dir", str(folder / "data")]
    cfg = parse_args("", options)
    world = load_world(cfg)
    run = Run(cfg, "cft", new_model(cfg, world), world)
    with torch.no_grad():
        for p in run.model.parameters():
            p.normal_(std=0.5 if p.dim() == 2 else 1.0)
        run.model.embed.weight[EOS] *= 2  # so that responses have many lengths
    save_run(run, run.n_steps)

    sequences, items, _, names = read_beauty(cfg.data_dir)
    name_of = {number: int(name) for name, number in names.items() if name.isdigit()}
    asin_of = {number: name for name, number in names.items() if not name.isdigit()}
    test = prepare(sequences, items)[2].take(slice(cfg.n_test))
    requests = []
    for user, cands in zip(test.user, test.cands):
        history = [name_of[item] for item in sequences[user][:-1]]
        requests.append({"history": history, "candidates": [asin_of[item] for item in cands]})
    return options, cfg, world, requests


def rerank_lines(monkeypatch, capsys, options, *lines, file="-"):
    """The script on lines at the standard input: its exit code, its lines, what stderr has."""
    data = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(b"\n".join(data))))
    monkeypatch.setattr("sys.argv", ["rerank.py", *options, "--requests", str(file)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        script(rerank.main, rerank.__doc__, rerank.Options)
    out, said = capsys.readouterr()
    return stop.value.code, [json.loads(line) for line in out.splitlines()], said.splitlines()


def test_requests_of_the_test_users_are_their_prompts_to_the_token(made):
    _, cfg, world, requests = made
    reader = rerank.Reader(cfg, world)
    read = [reader.read(json.dumps(request).encode())[1:] for request in requests]
    split = reader.examples(*zip(*read))
    assert len(split) == len(world.test) > 5
    width = split.prompt.shape[1]
    assert (split.prompt == world.test.prompt[:, -width:]).all()
    assert (world.test.prompt[:, :-width] == PAD).all()
    assert (split.trace == world.test.trace).all() and (split.incoming == world.test.incoming).all()


def test_a_request_has_the_same_result_alone_and_in_a_batch(made, monkeypatch, capsys, tmp_path):
    options, cfg, world, requests = made
    shorter = [{"id": n, **request, "candidates": request["candidates"][:5 + n % 6]}
               for n, request in enumerate(requests)]
    path = tmp_path / "requests.jsonl"
    path.write_text("".join(json.dumps(request) + "\n" for request in shorter))
    code, alone, said = rerank_lines(monkeypatch, capsys, options, *shorter)
    assert code == 0 and not said
    assert rerank_lines(monkeypatch, capsys, options, file=path) == (0, alone, [])
    assert len({line["trace"] for line in alone}) > 3
    for n, (request, line) in enumerate(zip(shorter, alone)):
        assert line["id"] == n and line["stage"] == "cft" and line["forwards"] > 0
        assert sorted(line["ranking"]) == sorted(request["candidates"])


def test_every_bad_line_gets_its_sentence_and_the_others_go_on(made, monkeypatch, capsys):
    options = made[0]
    good = {"history": [1, 2, 3], "candidates": [4, "5", 6, "A00010", 12]}
    bad = [(line, "expected {") for line in (
        b"{", b"\xff{", b"[" * 30000, [], 7, "x", {}, {"history": [1]}, {**good, "history": "1"},
        {**good, "candidates": {}})]
    bad += [
        ({**good, "history": []}, "1 or more items in the history"),
        ({**good, "candidates": [1, 2]}, "here are 3 and 2"),
        ({**good, "candidates": list(range(1, 12))}, "here are 3 and 11"),
        ({**good, "candidates": [4, 5, 6, 7, "A00003"]}, "are the same item")]
    for item in (0, -1, 1.0, True, None, "", "07", 10 ** 30, [7], {}, "\ud800", "B0"):
        bad.append(({**good, "history": [1, item]}, "unknown item"))
    lines = [{"id": "first", **good}, b"", *(line for line, _ in bad), {"id": "last", **good}]
    code, (first, *found, last), said = rerank_lines(monkeypatch, capsys, options, *lines)
    assert code == 1 and len(said) == len(found) == len(bad)
    assert {**first, "id": "last"} == last and sorted(first["ranking"], key=str) == sorted(
        good["candidates"], key=str)
    for number, (line, (_, sentence), told) in enumerate(zip(found, bad, said), 3):
        assert line == {"line": number, "error": line["error"]} and sentence in line["error"]
        assert told == f"line {number}: {line['error']}" and len(told) < 300


def test_what_stops_everything_is_one_sentence(made, monkeypatch, capsys, tmp_path):
    options, cfg, *_ = made
    for more, file, sentence in (
            ([], tmp_path / "none", "No such file"),
            ([], tmp_path, "Is a directory"),
            ([], "", "pass --requests with a file"),
            (["--seed", "7"], "-", "train_cft.py --config small"),
            (["--world", "toy"], "-", "use --config small")):
        code, lines, said = rerank_lines(monkeypatch, capsys, [*options, *more], file=file)
        assert code == 2 and not lines and len(said) == 1 and sentence in said[0]
    make_beauty(tmp_path, n_users=121)
    options = [*options, "--data_dir", str(tmp_path)]
    code, lines, said = rerank_lines(monkeypatch, capsys, options)
    assert code == 2 and not lines and "the data has changed" in said[-1]


# --- own_world.py -------------------------------------------------------------------------------

def own_prompts(monkeypatch, folder, sequences):
    """{(user, length of the history): prompt} of the own world of sequences, lists of item ids."""
    lines = [" ".join(map(str, [user, *items])) for user, items in enumerate(sequences)]
    (folder / "sequences.txt").write_text("\n".join(lines))
    prompts, find = {}, own_world.find

    def keeping(cfg, older, counts, sequences, user, length):
        fields = find(cfg, older, counts, sequences, user, length)
        prompts.update(zip(zip(user.tolist(), length.tolist()), fields[0].tolist()))
        return fields
    with monkeypatch.context() as patch:
        patch.setattr(own_world, "find", keeping)
        own_world.own_world(Config(data_dir=str(folder)))
    return prompts


def test_no_target_of_own_data_is_known_to_a_prompt_before_it(monkeypatch, tmp_path):
    make_beauty(tmp_path, n_users=120)
    lines = (tmp_path / "sequences.txt").read_text().splitlines()
    sequences = [line.split()[1:] for line in lines]
    before = own_prompts(monkeypatch, tmp_path, sequences)
    fold = [user for user in range(0, len(sequences), FOLDS) if len(sequences[user]) > 4]
    for place in (1, 2, 4):  # of a target, from the end: test, validation, training
        exchanged = list(map(list, sequences))
        for user, other in zip(fold, fold[1:] + fold[:1]):
            exchanged[user][-place] = sequences[other][-place]
        after = own_prompts(monkeypatch, tmp_path, exchanged)
        changed = {key for key in before if before[key] != after[key]}
        for user in fold:
            lengths = [length for name, length in changed if name == user]
            assert all(length > len(sequences[user]) - place for length in lengths)
        # The counts of the others do change; no prompt knows a last item.
        assert changed or place == 1
