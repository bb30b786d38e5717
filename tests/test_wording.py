"""Invariants of the wording dial (ours/wording.py): what synonyms change, and what they do not."""
from dataclasses import fields, replace

import numpy as np
import pytest
import torch

import evaluate
import train_ar
import train_cft
import train_opd
import train_rl
from beauty.rerank import answers
from config import Config
from data import LABEL, NONE, PAD, PROFILE, Split, statements
from experiments import analyse
from make_beauty import make_beauty
from ours.wording import consistency, entropy_bits, reword
from plumbing.arguments import parse_args, settings_of
from plumbing.settings import UserError
from sampler import Decoded
from scripts import run
from toy.world import toy_world
from trainer import load_world

CFG = Config(trace="free", block_size=16, n_train=2000, n_val=50, n_test=300)
SPLITS = ("train", "val", "test")
WORDINGS = ("token", "statement", "trace")


@pytest.fixture(scope="module", params=["toy", "toy_random_labels", "small"])
def world(request, tmp_path_factory):
    if request.param != "small":
        return toy_world(replace(CFG, world=request.param))
    folder = str(tmp_path_factory.mktemp("beauty"))
    make_beauty(folder, n_users=120)
    return load_world(parse_args("", ["--config", "small", "--data_dir", folder, "--run_dir",
                                      folder]))


def synonym(world, tokens):
    """Which tokens are synonyms."""
    return tokens != world.canonical[tokens]


def free(world, trace):
    """Which tokens of a trace have a synonym, or are one: by their words."""
    fixed = {PAD, PROFILE, NONE, *range(LABEL, LABEL + world.n_labels)}
    return ~np.isin(trace, list(fixed))


def response_of(world, split):
    return split.response.astype(int)


def assert_same(a, b, but=()):
    for f in fields(Split):
        if f.name not in but:
            x, y = getattr(a, f.name), getattr(b, f.name)
            assert x.dtype == y.dtype and np.array_equal(x, y), f.name


# --- The vocabulary and the traces --------------------------------------------------------------

def test_fixed_is_the_world_as_it_is(world):
    assert reword(world, "fixed") is world and world.canonical is None
    tokens = response_of(world, world.test)
    assert world.plain(tokens) is tokens and entropy_bits(world, "fixed") == 0
    assert Config().wording == "fixed" and "wording" in settings_of(Config(), "ar")
    again = load_world(CFG)
    assert again.checksum == "toy" and again.words == toy_world(CFG).words


@pytest.mark.parametrize("wording", WORDINGS)
def test_only_traces_change_and_only_to_synonyms(world, wording):
    new, n = reword(world, wording), len(world.words)
    assert new.words[:n] == world.words and len(set(new.words)) == len(new.words)
    first = LABEL + world.n_labels
    assert new.words[n:] == [word + "'" for word in world.words[first:]]
    assert new.canonical[:n].tolist() == list(range(n)) and new.checksum != world.checksum
    assert [new.words[t] + "'" for t in new.canonical[n:]] == new.words[n:]
    for name in SPLITS:
        old, split = getattr(world, name), getattr(new, name)
        assert_same(split, old, but=["trace"])
        assert split.trace.dtype == old.trace.dtype and split.trace.max() < len(new.words)
        assert np.array_equal(new.plain(split.trace), old.trace)
        assert not synonym(new, split.trace)[~free(world, old.trace)].any()
        assert (response_of(new, split) != response_of(world, old)).any()
        assert np.array_equal(new.plain(split.response), old.response)
    assert new.max_response == world.max_response


@pytest.mark.parametrize("wording", WORDINGS)
def test_coins_are_fair_and_shared_as_the_dial_says(world, wording):
    new = reword(world, wording)
    trace = new.train.trace.astype(int)
    can, is_synonym = free(world, world.train.trace), synonym(new, trace)
    by_statement, by_trace = [], []
    for row in trace:
        parts = [[t for t in part if t >= LABEL + world.n_labels]
                 for part in statements(row, world.n_labels)]
        marks = [synonym(new, np.array(part)) for part in parts]
        by_statement += [mark.mean() for mark in marks]
        by_trace.append(np.concatenate(marks).mean())
    by_statement, by_trace = np.array(by_statement), np.array(by_trace)

    def mixed(share):
        return ((share > 0) & (share < 1)).mean()

    n_coins = {"token": can.sum(), "statement": len(by_statement), "trace": len(trace)}[wording]
    values = {"token": is_synonym[can], "statement": by_statement, "trace": by_trace}[wording]
    assert abs(values.mean() - 0.5) < 4 * 0.5 / n_coins ** 0.5
    assert (mixed(by_statement) == 0) == (wording != "token")
    assert (mixed(by_trace) == 0) == (wording == "trace")
    if wording == "token":  # neighbours have nothing to do with each other
        both = can[:, 1:] & can[:, :-1]
        alike = (is_synonym[:, 1:] == is_synonym[:, :-1])[both]
        assert abs(alike.mean() - 0.5) < 4 * 0.5 / len(alike) ** 0.5
    if wording == "statement":  # nor have the statements of a user
        assert mixed(by_trace) > 0.9
    # The splits have coins of their own.
    n, T = new.test.trace.shape
    same = is_synonym[:n] == synonym(new, new.test.trace)
    assert not same[can[:n] & free(world, world.test.trace)].all()


@pytest.mark.parametrize("wording", WORDINGS)
def test_the_first_users_are_the_same_whatever_their_number(wording):
    many = load_world(replace(CFG, wording=wording))
    for n in (1, 7, 50):
        few = load_world(replace(CFG, wording=wording, n_train=n, n_val=n, n_test=n))
        assert few.words == many.words and few.checksum == many.checksum
        for name in SPLITS:
            assert_same(getattr(few, name), getattr(many, name).take(slice(n)))


def test_words_that_cannot_have_a_synonym_are_refused():
    world = toy_world(replace(CFG, n_train=2, n_val=2, n_test=2))
    with pytest.raises(UserError, match="--wording trace needs a synonym"):
        reword(replace(world, words=[*world.words, "x0'"]), "trace")
    with pytest.raises(UserError, match="15 bits"):
        reword(replace(world, words=[f"w{i}" for i in range(20000)]), "trace")


def test_without_traces_nothing_is_worded():
    world = load_world(replace(CFG, wording="statement", trace="none"))
    assert world.max_response == 1 + CFG.n_candidates + 1
    assert world.train.response.max() < LABEL + world.n_labels


# --- The checker --------------------------------------------------------------------------------

@pytest.mark.parametrize("wording", WORDINGS)
def test_every_wording_of_a_true_trace_is_true_and_none_of_a_false_one(world, wording):
    new = reword(world, wording)
    for name in SPLITS:
        split = getattr(new, name)
        # As the reference is worded, as it was before, and as in another mode.
        for other in (new, world, reword(world, "token")):
            tokens = response_of(other, getattr(other, name))
            assert (evaluate.score(new, split, tokens)["faithful"] == 1).all()
    tokens, n_statements = response_of(new, new.test), 1 + new.test.list_length
    places = np.flatnonzero(free(world, world.test.trace[0]))
    for place in places[[0, 2, -1]]:
        for shift in (0, len(world.words) - LABEL - world.n_labels):  # false in either wording
            wrong, plain = tokens.copy(), world.test.response[:, place]
            last = len(world.words) - 1
            wrong[:, place] = np.where(plain == last, last - 1, last) + shift
            got = evaluate.score(new, new.test, wrong)["faithful"]
            assert got == pytest.approx(1 - 1 / n_statements)


@pytest.mark.parametrize("wording", WORDINGS)
def test_requests_take_every_wording(wording, monkeypatch):
    world = load_world(replace(CFG, wording=wording, n_train=8, n_test=4))
    tokens = torch.from_numpy(response_of(world, world.test))
    zero = torch.zeros_like(tokens)
    reference = Decoded(tokens, tokens, zero, zero, zero[:, 0])
    monkeypatch.setattr("beauty.rerank.decode", lambda *_: reference)
    asked = replace(world.test, trace=toy_world(CFG).test.trace[:4])  # a request's has no synonyms
    rows = [row for _, row in answers(CFG, world, "cft", None, asked)]
    assert all(row["faithful"] == 1 for row in rows) and any("'" in row["trace"] for row in rows)


# --- Measures -----------------------------------------------------------------------------------

def test_entropy_counts_the_coins(world):
    trace = world.test.trace
    bits = {"token": free(world, trace).sum(1).mean(),
            "statement": np.mean(1 + world.test.list_length), "trace": 1}
    for wording in WORDINGS:
        assert entropy_bits(world, wording) == bits[wording]
        assert entropy_bits(reword(world, wording), wording) == bits[wording]


def test_entropy_by_hand():
    world = toy_world(replace(CFG, n_train=2, n_val=2, n_test=2))
    bits = [entropy_bits(world, wording) for wording in ("fixed", *WORDINGS)]
    assert bits == [0, 3 + 3 * 8, 1 + 8, 1]
    x, L1 = LABEL + world.n_labels, LABEL
    world.test.trace = np.array([[PROFILE, x, L1, L1 + 1, x, x, PAD]], np.int16)
    assert [entropy_bits(world, w) for w in WORDINGS] == [3, 2, 1]  # L1 says nothing: no coin


def test_consistency_by_hand():
    world = reword(toy_world(replace(CFG, n_train=2, n_val=2, n_test=2)), "trace")
    a, b = LABEL + world.n_labels, LABEL + world.n_labels + 1
    shift = (len(world.words) - a) // 2
    A, B, L1 = a + shift, b + shift, LABEL  # A is the synonym of a
    rows = np.array([[PROFILE, a, b, L1, A, B, 7, a],      # 7: <answer>
                     [PROFILE, a, B, L1, A, B, PAD, PAD],
                     [PROFILE, A, B, L1, A, B, PAD, PAD],
                     [PROFILE, A, L1, b, 7, A, b, PAD],    # statements of a word each
                     [PROFILE, L1, a, 7, L1, L1, L1, L1],
                     [7, a, B, PAD, PAD, PAD, PAD, PAD]])
    nan = np.nan
    expected = {"statement": [1, .5, 1, nan, nan, nan], "trace": [0, 0, 1, 0, nan, nan]}
    for wording, want in expected.items():
        np.testing.assert_array_equal(consistency(world, rows, wording), want)


@pytest.mark.parametrize("wording", WORDINGS)
def test_references_are_as_consistent_as_their_coins(world, wording):
    new = reword(world, wording)
    tokens = response_of(new, new.train)
    by_statement, by_trace = (consistency(new, tokens, w) for w in ("statement", "trace"))
    assert (by_statement == 1).all() == (wording != "token")
    assert (by_trace == 1).all() == (wording == "trace")
    if wording == "token" and world.checksum == "toy":  # three words: 2^-2
        assert abs(by_statement.mean() - 0.25) < 0.02


# --- Runs ---------------------------------------------------------------------------------------

def test_a_worded_run_trains_is_evaluated_shown_and_refuses_another_wording(
        tmp_path, monkeypatch, capsys):
    wording = ["--wording", "statement"]
    for module in (train_ar, train_cft, train_opd, train_rl, evaluate):
        run(module, monkeypatch, tmp_path, *wording)
    assert (tmp_path / "toy" / "report.json").exists()
    run(evaluate, monkeypatch, tmp_path, *wording, "--show", "2")
    assert "user 2" in capsys.readouterr().out
    for other in WORDINGS[0], "fixed":
        with pytest.raises(SystemExit):
            run(train_cft, monkeypatch, tmp_path, "--wording", other)
        assert f"wording=statement there, {other} now" in capsys.readouterr().err


@pytest.mark.parametrize("wording", ["fixed", *WORDINGS])
def test_analyse_forges_nothing_where_evidence_differs_in_its_wording_alone(wording, monkeypatch):
    world = toy_world(replace(CFG, n_train=8))
    evidence = world.test.trace[:100, 4:].reshape(100, -1, 4)[:, :, 1:]  # (100, 8, 3), a view
    evidence[:] = evidence[:, :1]  # the first 100 users: all candidates alike
    world = reword(world, wording)
    tokens = torch.from_numpy(response_of(world, world.test))
    monkeypatch.setattr(analyse, "decode", lambda *_: tokens)
    assert analyse.falsified(CFG, world, None, tokens)["answers"] == CFG.n_test - 100
