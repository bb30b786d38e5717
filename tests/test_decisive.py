"""report/decisive.py: the statements whose loss changes the first place, and no others."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import evaluate
import scripts
import train_ar
import train_cft
from config import Config
from conftest import tiny_gpt
from data import ANSWER, EOS, LABEL, PAD, parse_answers
from ours.wording import reword
from report import decisive as module
from report.decisive import decisive, without_evidence
from report.show import decided
from toy.world import toy_world

CFG = Config(trace="bound", n_train=8, n_val=8, n_test=30, device="cpu", block_size=16)
L1, L2, L3, L4, L5, L6, L7, L8 = range(LABEL, LABEL + 8)


@pytest.fixture(scope="module")
def world():
    return toy_world(CFG)


def response(world, *totals):
    """A response whose trace gives L1, L2, ... evidence of so many counts each, up to 9."""
    text = "<profile> x0 y0 z0"
    for n, total in enumerate(totals):
        counts = [min(3, max(0, total - 3 * i)) for i in range(3)]
        text += f" L{n + 1} x0:{counts[0]} y0:{counts[1]} z0:{counts[2]}"
    tokens = [world.words.index(word) for word in text.split()]
    labels = [LABEL + n for n in range(len(totals))]
    return np.array([*tokens, PAD, ANSWER, *labels, EOS, PAD])


def by_counts(world, place=0):
    """In the place of a model: the candidate with the most counts first (or that of another
    place), of equal ones the first of the list."""
    count = np.array([int(word[-1]) if ":" in word else 0 for word in world.words])

    def answer_to(cfg, stage, model, traces):
        assert (traces[:, 0] == 6).all()  # <profile>; nothing of the answer is read
        totals = count[traces[:, 4:36].reshape(-1, 8, 4)].sum(2)
        order = np.argsort(-totals, axis=1, kind="stable")
        order = np.concatenate((order[:, place:], order[:, :place]), axis=1)
        return torch.from_numpy(np.pad(order + LABEL, ((0, 0), (1, 0)), constant_values=ANSWER))
    return answer_to


@pytest.mark.parametrize("totals, place, expected", [
    ([4, 0, 2, 9, 0, 7, 1, 1], 0, {L4: L6}),          # the best one's, and no other's
    ([4, 0, 2, 9, 0, 7, 1, 1], 1, {L4: L1, L6: L1}),  # the second of all is first
    ([0, 0, 0, 0, 0, 0, 0, 0], 0, {}),                # nothing is said
    ([1, 0, 0, 0, 0, 0, 0, 0], 0, {}),                # L1 is first without it, too
    ([1, 1, 0, 0, 0, 0, 0, 0], 0, {L1: L2})])
def test_what_changes_the_first_place_is_named(world, monkeypatch, totals, place, expected):
    monkeypatch.setattr(module, "answer_to", by_counts(world, place))
    found = decisive(CFG, world, ("cft", None), response(world, *totals), np.arange(8))
    assert found == expected


def test_the_line_names_them(world):
    assert decided(world.words, {L4: L6}).endswith("what is said of L4 (without it L6 is first)")
    both = decided(world.words, {L4: L1, L6: L2})
    assert "L4 (without it L1 is first), L6 (without it L2 is first)" in " ".join(both.split())
    assert decided(world.words, {}).endswith("no statement by itself")


@pytest.mark.parametrize("stage", ["ar", "cft"])
def test_a_model_is_asked_for_every_edit_as_for_one(world, stage):
    """A random model; each edit by hand, alone."""
    model, split = tiny_gpt(4, len(world.words), torch.float32), world.test
    with torch.no_grad():
        model.embed.weight[ANSWER:L8 + 1] *= 2  # it writes <answer> and labels
    token_of = {word: token for token, word in enumerate(world.words)}

    def first(row, incoming):
        tokens = module.answer_to(CFG, stage, model, torch.tensor([row])).numpy()
        return LABEL + int(parse_answers(tokens, incoming[None]).order[0, 0])

    named = 0
    for n in range(12):
        trace, incoming = split.trace[n].astype(int).tolist(), split.incoming[n]
        whole, expected = first(trace, incoming), {}
        for place in range(4, 36, 4):
            edited = list(trace)
            for at in range(place + 1, place + 4):
                edited[at] = token_of[world.words[trace[at]][:3] + "0"]
            if (new := first(edited, incoming)) != whole:
                expected[trace[place]] = new
        written = split.response[n].astype(int)
        assert decisive(CFG, world, (stage, model), written, incoming) == expected
        named += len(expected)
    assert 0 < named < 12 * 8


@pytest.mark.parametrize("text", [[PAD, PAD, ANSWER, L1, EOS], [L2, PAD, L1, EOS], [PAD], [30]])
def test_whatever_was_written_is_read(world, text):
    model = tiny_gpt(1, len(world.words), torch.float32)
    found = decisive(CFG, world, ("cft", model), np.array(text), np.arange(8))
    assert found.keys() <= {L2}


def test_words_without_evidence():
    words = ["L1", "x", "brand:unknown", "brand:0", "brand:1,last", "link:0,0", "link:7,2",
             "co:0,0,0", "co:0,1,1", "co:4,3,6", "depth:0", "depth:2", "A: B > C"]
    nearest = {"link": np.array([[0, 0], [0, 1]]), "co": np.array([[0, 0], [1, 1], [1, 2]]),
               "depth": np.array([[0, 1, 1, 3]])}
    become = without_evidence(SimpleNamespace(words=words, nearest=nearest))
    assert [words[token] for token in become] == [
        "L1", "x", "brand:0", "brand:0", "brand:0", "link:0,0", "link:0,0",
        "co:0,1,1", "co:0,1,1", "co:0,1,1", "depth:0", "depth:0", "A: B > C"]


def test_synonyms_lose_what_they_say(world):
    other = reword(world, "token")
    become = without_evidence(other)
    assert other.words[become[other.words.index("x3:2'")]] == "x3:0"


@pytest.mark.parametrize("trace", ["bound", "free", "none"])
def test_only_a_bound_run_prints_it(monkeypatch, tmp_path, capsys, trace):
    options = ["--trace", trace, "--block_size", "16"]
    for script in (train_ar, train_cft):
        scripts.run(script, monkeypatch, tmp_path, *options)
    capsys.readouterr()
    scripts.run(evaluate, monkeypatch, tmp_path, *options, "--show", "2")
    said = capsys.readouterr().out
    assert said.count("  decisive  ") == (2 if trace == "bound" else 0)
    assert said.count("true next item") == 2
