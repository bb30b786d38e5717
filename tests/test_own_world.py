"""experiments/own_world.py: a file of sequences as a world, from end to end."""
import contextlib
import dataclasses
import itertools
import json
import os

import numpy as np
import pytest

import evaluate
import own_world
import scripts
import train_cft
import trainer
from config import Config
from conftest import ROOT
from data import NONE, faithfulness, parse_answers
from plumbing.checkpoint import load_tensors

K = 8
ITEMS = 120


def lines_of(n_users=300, seed=0):
    """Users who mostly go from an item to one of its three followers: ["id item item ...", ...]."""
    rng = np.random.default_rng(seed)
    follower = rng.integers(ITEMS, size=(ITEMS, 3))
    lines = []
    for user in range(n_users):
        items = [rng.integers(ITEMS)]
        for _ in range(rng.integers(3, 10)):
            liked = follower[items[-1], rng.integers(3)]
            items.append(liked if rng.random() < 0.7 else rng.integers(ITEMS))
        items = dict.fromkeys(int(item) + 1 for item in items)
        lines.append(" ".join(map(str, [user + 1, *items])))
    return lines


def written(folder, lines):
    folder.mkdir(exist_ok=True)
    (folder / "sequences.txt").write_text("".join(f"{line}\n" for line in lines))
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return written(tmp_path_factory.mktemp("data"), lines_of())


@pytest.fixture(scope="module")
def world(folder):
    return own_world.own_world(Config(data_dir=folder))


def splits(world):
    return world.train, world.val, world.test


def lists(monkeypatch, folder):
    """Every list that the world of a file is made of: {(user, history length): (prompt, trace,
    the target's item number or None)}; the sequences as numbers."""
    seen, of, candidates = {}, [], []
    find, top = own_world.find, own_world.top_candidates

    def recorded(cfg, older, counts, sequences, user, length):
        fields = find(cfg, older, counts, sequences, user, length)
        of[:] = sequences
        for n, key in enumerate(zip(user.tolist(), length.tolist())):
            target = fields[3][n]
            item = candidates[-1][n, target] if target >= 0 else None
            assert key not in seen
            seen[key] = fields[0][n].tolist(), fields[1][n].tolist(), item
        return fields

    def kept(*args):
        candidates.append(top(*args))
        return candidates[-1]
    with monkeypatch.context() as patch:
        patch.setattr(own_world, "find", recorded)
        patch.setattr(own_world, "top_candidates", kept)
        own_world.own_world(Config(data_dir=folder))
    return seen, of


# --- The page ---------------------------------------------------------------------------------

def test_the_page_is_short():
    with open(os.path.join(ROOT, "experiments", "own_world.py")) as file:
        lines = file.read().splitlines()
    assert len(lines) <= 120 and max(map(len, lines)) <= 100


# --- Who knows what ---------------------------------------------------------------------------

def test_targets_are_the_last_items(monkeypatch, folder):
    seen, sequences = lists(monkeypatch, folder)
    file = [line.split()[1:] for line in lines_of()]
    file = [items for items in file if len(items) >= 3]
    number = dict(zip(itertools.chain(*file), itertools.chain(*(s.tolist() for s in sequences))))
    assert [[number[item] for item in items] for items in file] == [s.tolist() for s in sequences]
    assert len(set(number.values())) == len(number)                  # the file, in other numbers
    ids = sorted(number, key=int)
    assert abs(np.corrcoef([int(i) for i in ids], [number[i] for i in ids])[0, 1]) < 0.3

    wanted = {(user, length) for user, s in enumerate(sequences) for length in range(1, len(s))}
    assert seen.keys() == wanted                      # up to n - 3 in training, n - 2, n - 1
    for (user, length), (_, _, item) in seen.items():
        assert item in (None, sequences[user][length])


def test_what_a_user_takes_later_changes_nothing_before(monkeypatch, tmp_path, folder):
    before, sequences = lists(monkeypatch, folder)
    lines = [line for line in lines_of() if len(line.split()) > 3]

    def changed(user, at):
        """The lists when a user's items from place `at` on are others."""
        _, *items = lines[user].split()
        others = [i for i in map(str, range(1, ITEMS + 1)) if i not in items]
        new = items[:at] + others[5 * user % 40:][:len(items) - at]
        edited = [*lines[:user], f"{user + 1} {' '.join(new)}", *lines[user + 1:]]
        return lists(monkeypatch, written(tmp_path, edited))[0]

    def moved(after, user, at):
        """Which lists of users are others: the user's own up to `at`, those of others."""
        differ = [key for key in before if before[key][:2] != after[key][:2]]
        own = [key for key in differ if key[0] == user and key[1] <= at]
        return own, [key for key in differ if key[0] != user]

    long = [user for user, s in enumerate(sequences) if len(s) > 6]
    for user, back in zip(long, (1, 2, 3, 4, 3, 3)):  # 1: the target of test, 2: of validation
        at = len(sequences[user]) - back
        own, others = moved(changed(user, at), user, at)
        assert not own
        # Only training and validation items are counted; those of the test nowhere.
        assert bool(others) == (back > 1)

    # The same test finds counts that know the user.
    monkeypatch.setattr(own_world.Counts, "without", lambda *_: contextlib.nullcontext())
    before, _ = lists(monkeypatch, folder)
    at = len(sequences[long[2]]) - 3
    assert moved(changed(long[2], at), long[2], at)[0]


def test_counts_find_the_next_item(world):
    train = world.train
    hits = train.target >= 0
    assert hits.mean() > 4 * K / ITEMS                               # among the candidates
    first = {name: (order == train.target[:, None])[hits][:, 0].mean()
             for name, order in (("incoming", train.incoming), ("points", train.order))}
    assert 1.5 / K < first["incoming"] <= first["points"]
    for split in (world.val, world.test):
        assert len(split) > 50 and (split.target >= 0).all()


# --- Prompts, traces, orders ------------------------------------------------------------------

def told(prompt):
    """The trace that follows from the words of a prompt, by plain rules."""
    at = prompt.index("<candidates>")
    history = [word for word in prompt[1:at] if word != "<none>"]
    assert prompt[0] == "<history>" and at == 4 and history
    trace = ["<profile>", max(history, key=lambda word: int(word.split(":")[1]))]
    for n in range(at + 1, len(prompt), 5):
        label, *three, pop = prompt[n:n + 5]
        names, levels = zip(*(word.split(":") for word in three))
        assert names == ("1st", "2nd", "3rd") and pop.startswith("pop:")
        linked = sum(level != "0" for level in levels)
        trace += [label, f"best:{max(levels)}", f"links:{linked}", pop]
    return trace


def test_a_trace_is_a_function_of_its_prompt(world):
    assert len(set(world.words)) == len(world.words)
    for split in splits(world):
        for n in range(0, len(split), 7):
            prompt = [world.words[token] for token in split.prompt[n]]
            assert [world.words[token] for token in split.trace[n]] == told(prompt)
    assert (world.train.prompt == NONE).any()                        # histories of one item
    said = {world.words[token] for token in np.unique(world.train.trace)}
    assert {"best:0", "best:2", "links:0", "links:3", "pop:1"} <= said


def test_the_checker_accepts_references_and_nothing_else(world):
    for split in splits(world):
        answers = parse_answers(split.response, split.incoming)
        assert answers.valid.all() and (answers.order == split.order).all()
        assert (faithfulness(split.response, split.trace, world.n_labels) == 1).all()
        assert split.response.max() < len(world.words)
    false = world.val.response.copy()
    false[:, 4] += np.where(false[:, 4] % 2, 1, -1)                  # links of L1
    assert (faithfulness(false, world.val.trace, world.n_labels) < 1).all()


def test_the_order_follows_from_the_trace(world):
    order = {}
    for split in splits(world):
        assert (np.sort(split.order, 1) == np.arange(K)).all()
        assert (split.incoming == np.arange(K)).all()
        for trace, best_first in zip(split.trace.tolist(), split.order.tolist()):
            assert order.setdefault(tuple(trace), best_first) == best_first
    assert (world.test.order == world.test.incoming).all(1).mean() < 0.5


def test_sizes_of_splits_change_nothing_else(folder, world):
    cfg = Config(data_dir=folder, n_val=5, n_test=7)
    fewer = own_world.own_world(cfg)
    assert fewer.checksum == world.checksum
    assert (fewer.test.prompt == world.test.prompt[:7]).all()
    assert (fewer.val.order == world.val.order[:5]).all()
    ten = own_world.own_world(dataclasses.replace(cfg, n_candidates=10))
    assert ten.test.order.shape == (7, 10) and ten.checksum != world.checksum


def test_users_without_training_targets(tmp_path, world):
    """Three items leave a user none; here a whole fold is of such users."""
    lines = [line for line in lines_of() if len(line.split()) > 3]
    lines = [" ".join(line.split()[:4]) if n % 20 == 5 else line for n, line in enumerate(lines)]
    fewer = own_world.own_world(Config(data_dir=written(tmp_path, lines)))
    assert 0 < len(fewer.train) < len(world.train)


# --- From end to end --------------------------------------------------------------------------

def run(module, monkeypatch, run_dir, *options):
    monkeypatch.setattr(module, "Options", evaluate.Options, raising=False)
    for place, name in ((trainer, "beauty_world"), (evaluate, "make_report")):
        monkeypatch.setattr(place, name, getattr(place, name))       # is put back after the test
    scripts.run(module, monkeypatch, run_dir, *scripts.EVALUATION, *options)


def weights(run_dir):
    return {stage: load_tensors(scripts.checkpoint(run_dir / "own", stage))["model"]
            for stage in ("ar", "cft", "opd", "rl")}


def same(a, b):
    return all((a[stage][name] == b[stage][name]).all() for stage in a for name in a[stage])


def stopped_after(n, function):
    """The function, which is stopped by Ctrl-C after n calls."""
    calls = itertools.count()

    def called(*args):
        if next(calls) == n:
            raise KeyboardInterrupt
        return function(*args)
    return called


def test_all_stages_and_the_table(monkeypatch, capsys, tmp_path, folder):
    at = ("--data_dir", folder)
    run(own_world, monkeypatch, tmp_path, *at)
    table = capsys.readouterr().out
    assert "own data: 16 test users" in table
    for row in ("prerank", "writer", "ar", "naive", "cft", "opd", "rl", "constrained"):
        assert f"\n{row} " in table
    with open(tmp_path / "own" / "toy" / "report.json") as file:
        report = json.load(file)
    assert report["dataset"] == "own data" and report["source"].endswith("sequences.txt")
    assert os.path.exists(tmp_path / "own" / "toy" / "tradeoff.png")
    first = weights(tmp_path)

    # Again: everything is there. A run that is stopped in a stage goes on, to the same weights.
    run(own_world, monkeypatch, tmp_path, *at, "--n_test", "4")
    again = capsys.readouterr().out
    assert again.count("finished already") == 4 and "own data: 4 test users" in again
    other = tmp_path / "other"
    with pytest.raises(SystemExit) as stop, monkeypatch.context() as patch:
        patch.setattr(train_cft, "batch_loss", stopped_after(3, train_cft.batch_loss))
        run(own_world, monkeypatch, other, *at)
    assert stop.value.code == 130
    run(own_world, monkeypatch, other, *at, "--n_test", "4")
    assert "steps 2 to 6" in capsys.readouterr().out
    assert same(weights(other), first)

    # Checkpoints belong to the file.
    lines = lines_of()
    user, *items = lines[7].split()
    edited = written(tmp_path / "edited", [*lines[:7], " ".join([user, *items[::-1]]), *lines[8:]])
    refused = scripts.refused(own_world, monkeypatch, capsys, tmp_path, "--data_dir", edited,
                              run=run)
    assert "the data has changed since" in refused


@pytest.mark.parametrize("lines, expected", [
    (None, "sequences.txt is missing in"),
    ([], "sequences.txt is empty"),
    (["1 4 5 6", "x 4 5 6"], "line 2: expected a user id and its item ids"),
    (["1 4 5 6", "2"], "line 2: expected a user id and its item ids"),
    (["1 4 5 6", "1 7 8 9"], "line 2: user id 1 is there twice"),
    (["1 4 5", "2 4 5 6"], "too small: of its 3 items a user has up to 3"),
    ([f"{u} {u} {u + 1}" for u in range(1, 60)], "has no user with 3 or more items"),
    (lines_of(19), "too small: 19 users with 3 or more items"),
    ([" ".join(line.split()[:4]) for line in lines_of(200)], "is too small: no candidate is"),
])
def test_what_cannot_work_is_one_sentence(monkeypatch, capsys, tmp_path, lines, expected):
    place = tmp_path / "data"
    place.mkdir()
    if lines is not None:
        written(place, lines)
    message = scripts.refused(own_world, monkeypatch, capsys, tmp_path, "--data_dir", str(place),
                              run=run)
    assert expected in message
