"""Invariants of data.py and toy/world.py: examples, answers, traces, the toy world, its oracle."""
import itertools
from dataclasses import fields, replace

import numpy as np
import pytest
import torch

import toy.world
from config import Config
from conftest import gen
from data import (ANSWER, EOS, LABEL, PAD, PROFILE, Examples, Split, is_answer_label, as_prompt,
                  draw_examples, draw_list_lengths, draw_rows, examples_of, faithfulness, in_answer,
                  joined, pack, parse_answers, responses, tensors, token_weights)
from toy.world import (TOY_EXPERT, TOY_HISTORY, TOY_PRIOR, TOY_Q, TOY_VALUES, toy_oracle, toy_split,
                       toy_world)

CFG = Config(n_train=300, n_val=50, n_test=1500, vary_lists=0.5)
K = CFG.n_candidates
L1, L2, L3, L4, L5 = range(LABEL, LABEL + 5)
WORD = LABEL + 40  # some word of a trace
A, B = WORD, WORD + 1


@pytest.fixture(scope="module")
def world():
    return toy_world(CFG)


def splits_of(world):
    return [world.train, world.val, world.test]


def text(world, tokens):
    return [world.words[t] for t in tokens if t != PAD]


def same(a, b):
    """Whether two splits hold the same users, to the last token."""
    return all(np.array_equal(getattr(a, f.name), getattr(b, f.name)) for f in fields(Split))


# --- Examples ---------------------------------------------------------------------------------

def test_the_examples_that_users_give_by_hand():
    prompt = np.array([[PAD, 3, 4], [3, 4, 5]], np.int16)
    trace = np.array([[PROFILE, A, PAD], [PROFILE, A, B]], np.int16)
    order = np.array([[1, 0, -1], [2, 0, 1]], np.int8)
    split = Split(prompt, trace, order, np.zeros(2, np.int8), order)
    whole = [[PROFILE, A, ANSWER, L2, L1, EOS, PAD, PAD], [PROFILE, A, B, ANSWER, L3, L1, L2, EOS]]
    assert responses(trace, order).tolist() == split.response.tolist() == whole
    free, = examples_of(split, "free")
    assert free.prompt is prompt and free.response.tolist() == whole
    first, second = examples_of(split, "bound")
    assert first.prompt is prompt
    assert first.response.tolist() == [[PROFILE, A, EOS, PAD], [PROFILE, A, B, EOS]]
    # The answer is written from the trace alone.
    assert second.prompt.tolist() == [[PAD, PROFILE, A], [PROFILE, A, B]]
    assert second.response.tolist() == [[ANSWER, L2, L1, EOS, PAD], [ANSWER, L3, L1, L2, EOS]]
    assert as_prompt(first.response).tolist() == second.prompt.tolist()
    again = joined([first.response, second.response])
    assert pack(again, left=False).tolist() == whole and again.shape == (2, 9)
    # Something has to be read, even of an empty trace.
    assert as_prompt(np.array([[EOS, PAD], [A, EOS]])).tolist() == [[EOS], [A]]


def test_batches():
    prompt = np.array([[PAD, PAD, 4, 5], [PAD, 3, 4, 5], [2, 3, 4, 5]], np.int16)
    examples = Examples(prompt, prompt[:, ::-1])
    got = tensors(examples, [1, 0], "cpu")
    assert got[0].tolist() == [[3, 4, 5], [PAD, 4, 5]]            # no columns of padding
    assert got[1].tolist() == [[5, 4, 3, PAD], [5, 4, PAD, PAD]]  # as wide as it may become
    rows = np.concatenate([draw_rows(8, 5, gen(seed)) for seed in range(2000)])
    assert np.abs(np.bincount(rows, minlength=8) / 10000 - 1 / 8).max() < 0.02
    kinds = [examples.take([0, 1]), examples]
    for share in (0.0, 0.67, 1.0):
        drawn = [draw_examples(kinds, 5, share, gen(seed)) for seed in range(1000)]
        assert abs(np.mean([of is examples for of, _ in drawn]) - share) < 0.05
        assert all(len(rows) == 5 and rows.max() < len(of) for of, rows in drawn)
    assert draw_examples(kinds[:1], 5, 1.0, gen())[0] is kinds[0]


def test_parts_of_a_response():
    tokens = torch.tensor([[6, 9, ANSWER, L1, EOS, PAD], [ANSWER, L2, L1, L3, EOS, PAD],
                           [6, 9, 9, L1, 9, EOS],                  # no answer
                           [6, ANSWER, ANSWER, EOS, PAD, PAD]])    # two starts
    assert token_weights(tokens, 4.0).tolist() == [
        [1, 1, 1, 4, 4, 0], [1, 4, 4, 4, 4, 0], [1] * 6, [1, 1, 4, 4, 0, 0]]
    assert in_answer(tokens).int().tolist() == [
        [0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 1], [0] * 6, [0, 0, 1, 1, 1, 1]]
    assert is_answer_label(tokens).int().tolist() == [
        [0, 0, 0, 1, 0, 0], [0, 1, 1, 1, 0, 0], [0] * 6, [0, 0, 1, 0, 0, 0]]


# --- Answers ----------------------------------------------------------------------------------

def test_answers_are_read_and_repaired():
    for tokens, k, order, flags, trace_tokens in (
            # flags: valid, duplicated, missing, out of set, identity
            ([WORD, WORD, ANSWER, L3, L1, L2, EOS], 3, [2, 0, 1, -1], "v", 2),
            ([ANSWER, L1, L2, L3, EOS], 3, [0, 1, 2, -1], "vi", 0),
            # An extra label: a duplicate, but no drop.
            ([WORD, ANSWER, L2, L2, L1, L3, EOS], 3, [1, 0, 2, -1], "d", 1),
            # First mentions stay, the missing follow.
            ([WORD, ANSWER, L3, L2, L3, EOS], 3, [2, 1, 0, -1], "dm", 1),
            ([WORD, ANSWER, L1, EOS], 3, [0, 1, 2, -1], "mi", 1),
            ([WORD, ANSWER, EOS], 3, [0, 1, 2, -1], "mi", 1),
            # A label beyond the list, a second <answer>.
            ([WORD, ANSWER, L3, L4, L1, L2, EOS], 3, [2, 0, 1, -1], "o", 1),
            ([WORD, ANSWER, L3, ANSWER, L1, L2, EOS], 3, [2, 0, 1, -1], "o", 1),
            ([WORD, ANSWER, L5, L2, L2, EOS], 3, [1, 0, 2, -1], "dmo", 1),
            # Complete, but without [EOS].
            ([WORD, ANSWER, L3, L1, L2], 3, [2, 0, 1, -1], "", 1),
            # Labels of the trace are no answer; nothing after [EOS] is.
            ([WORD, L1, L2, L3, EOS], 3, [0, 1, 2, -1], "mi", 4),
            ([WORD, ANSWER, L2, L1, EOS, L3], 3, [1, 0, 2, -1], "m", 1),
            ([EOS], 3, [0, 1, 2, -1], "mi", 0),
            # Between a trace and its answer there may be padding.
            ([WORD, PAD, PAD, ANSWER, L2, L1, EOS], 2, [1, 0, -1, -1], "v", 1)):
        neighbour = [ANSWER, L1, L2, EOS] + [PAD] * 4  # a valid one
        padded = np.array([tokens + [PAD] * (8 - len(tokens)), neighbour])
        incoming = np.where(np.arange(4) < np.array([[k], [2]]), np.arange(4), -1)
        got = parse_answers(padded, incoming)
        assert got.order[0].tolist() == order and got.trace_tokens[0] == trace_tokens
        names = dict(v="valid", d="duplicated", m="dropped", o="out_of_set", i="identity")
        assert "".join(c for c in "vdmoi" if getattr(got, names[c])[0]) == flags, tokens
        assert got.order[1].tolist() == [0, 1, -1, -1] and got.valid[1] and got.identity[1]


# --- Traces -----------------------------------------------------------------------------------

def test_faithfulness_by_hand():
    rule = [PROFILE, A, B, L1, A, L2, B, L3, A]
    for trace, score in (
            (rule, 1),
            ([], 0),
            ([PROFILE, A, B], 1 / 4),
            (rule[:-1], 3 / 4),                             # the last statement is cut short
            (rule + [A], 3 / 4),                            # one is too long
            (rule + [L1, A], 4 / 5),                        # repeated
            ([PROFILE, A, B, L1, A, L2, B, L2, B], 3 / 4),  # repeated in place of another
            (rule + [L4, A], 4 / 5),                        # about no candidate, or one too many
            ([PROFILE, A, B, L1, A, L2, A, L3, A], 3 / 4),  # false
            (rule + [L2, A], 4 / 5),                        # true and false
            ([PROFILE, A, B, L3, A, L2, B, L1, A], 1),      # the order does not matter
            ([A] + rule, 4 / 5),                            # unreadable words in front
            ([B, A, L3], 0),
            (rule + [PROFILE, A, B] * 4, 4 / 8)):
        for end in ([ANSWER, L2, L1, L3, EOS], [EOS], []):
            tokens = np.array([trace + end + [PAD] * 3])
            got = faithfulness(tokens, np.array([rule + [PAD]]), 16)[0]
            assert got == pytest.approx(score), trace


def test_reference_responses_are_valid_and_faithful(world):
    for split in splits_of(world):
        answers = parse_answers(split.response, split.incoming)
        assert answers.valid.all() and (answers.order == split.order).all()
        assert (answers.trace_tokens == (split.trace != PAD).sum(1)).all()
        assert (faithfulness(split.response, split.trace, world.n_labels) == 1).all()


# --- The toy world ----------------------------------------------------------------------------

def read_prompt(words):
    """History, candidates and labels of a prompt, by its words alone. An item: [("x", 1), ...]."""
    def items_of(words):
        pairs = [(word[0], int(word[1:])) for word in words]
        return [pairs[i:i + 3] for i in range(0, len(pairs), 3)]

    assert words[0] == "<history>"
    middle = words.index("<candidates>")
    shown = words[middle + 1:]
    empty = shown.count("<none>")  # four words a place, at the list's end
    assert empty % 4 == 0 and shown[len(shown) - empty:] == ["<none>"] * empty
    shown = shown[:len(shown) - empty]
    labels, rest = shown[::4], [w for i, w in enumerate(shown) if i % 4]
    return items_of(words[1:middle]), items_of(rest), labels


def some_rows(world, every=1):
    return [(name, n) for name in ("train", "test") for n in range(0, 40, every)]


def count(history, attribute, value):
    return sum((attribute, value) in item for item in history)


def test_the_trace_follows_from_the_prompt_alone(world):
    for name, n in some_rows(world):
        split = getattr(world, name)
        history, candidates, labels = read_prompt(text(world, split.prompt[n]))
        assert len(history) == TOY_HISTORY
        assert labels == [f"L{i + 1}" for i in range(split.list_length[n])]
        expected = ["<profile>"]
        for a in "xyz":  # the value that the history has most often, the smallest of several
            best = max(range(TOY_VALUES), key=lambda v: (count(history, a, v), -v))
            expected.append(f"{a}{best}")
        for label, item in zip(labels, candidates):
            expected += [label] + [f"{a}{v}:{min(count(history, a, v), 3)}" for a, v in item]
        expected += ["<none>"] * 4 * (K - len(labels))
        assert text(world, split.trace[n]) == expected


def bayes(history, candidates):
    """P(target = candidate | prompt), summed over the 125 latent triples of favourites."""
    def p_taken(item, liked):
        return np.prod([TOY_Q * (v == f) + (1 - TOY_Q) / TOY_VALUES
                        for (_, v), f in zip(item, liked)])

    posterior = np.zeros(len(candidates))
    for liked in itertools.product(range(TOY_VALUES), repeat=3):
        likelihood = np.prod([p_taken(item, liked) for item in history])
        for c, item in enumerate(candidates):  # the others are uniform, whichever is the target
            posterior[c] += likelihood * p_taken(item, liked) * np.exp(-TOY_PRIOR * c)
    return posterior / posterior.sum()


def test_the_oracle_is_the_exact_bayes_posterior_and_an_expert_errs_as_told(world):
    expert, told = (toy_world(replace(CFG, world=f"toy_{kind}")) for kind in ("expert", "target"))
    differ = 0
    for name, n in some_rows(world, every=3):
        split, other, best = (getattr(w, name) for w in (world, expert, told))
        history, candidates, _ = read_prompt(text(world, split.prompt[n]))
        k, p = split.list_length[n], bayes(history, candidates)
        order = split.order[n][:k].tolist()
        assert sorted(order) == list(range(k)) and (split.order[n][k:] == -1).all()
        assert all(p[a] >= p[b] * (1 - 1e-9) for a, b in zip(order, order[1:]))
        counts = np.array([[[count(history, a, v) for v in range(TOY_VALUES)] for a in "xyz"]])
        items = [[v for _, v in item] for item in candidates] + [[0, 0, 0]]  # one beyond the list
        score = toy_oracle(counts, np.array([items]), np.array([k]))[0]
        assert score[-1] == -np.inf
        np.testing.assert_allclose(np.exp(score[:-1]) / np.exp(score).sum(), p, rtol=1e-9)

        # An expert weighs the place too much; of *_target the target comes first.
        assert (other.prompt[n] == split.prompt[n]).all() and other.target[n] == split.target[n]
        p = p * np.exp(-(TOY_EXPERT - 1) * TOY_PRIOR * np.arange(k))
        erring = other.order[n][:k].tolist()
        assert all(p[a] >= p[b] * (1 - 1e-9) for a, b in zip(erring, erring[1:]))
        target = split.target[n]
        assert best.order[n][:k].tolist() == [target] + [c for c in erring if c != target]
        differ += erring != order
    assert differ > 5


def test_users_are_drawn_as_the_model_of_the_world_says(world):
    part, n = world.test, np.arange(len(world.test))
    history = part.prompt[:, 1:1 + 3 * TOY_HISTORY].reshape(len(n), TOY_HISTORY, 3)
    candidates = part.prompt[:, -4 * K:].reshape(len(n), K, 4)[:, :, 1:]
    # Two items that a user takes: both take the favourite, or one of them at least is uniform.
    agree = TOY_Q ** 2 + (1 - TOY_Q ** 2) / TOY_VALUES
    assert abs((history[:, 0] == history[:, 1]).mean() - agree) < 0.04
    assert abs((candidates[n, part.target] == history[:, 2]).mean() - agree) < 0.04
    another = candidates[n, part.target - 1]  # agrees by chance
    assert abs((another == history[:, 2]).mean() - 1 / TOY_VALUES) < 0.04
    share = np.bincount(part.target, minlength=K) / len(n)
    prior = np.exp(-TOY_PRIOR * np.arange(K))
    assert np.abs(share - prior / prior.sum()).max() < 0.05


def test_the_first_users_are_the_same_whatever_the_seed_and_the_sizes(world, monkeypatch):
    for cfg in (replace(CFG, seed=5), replace(CFG, n_train=30), replace(CFG, n_test=50, n_val=51)):
        again = toy_world(cfg)
        assert again.words == world.words
        for a, b in zip(splits_of(again), splits_of(world)):
            n = min(len(a), len(b))
            assert same(a.take(slice(n)), b.take(slice(n)))
    parts = [toy_split(50, number, replace(CFG, vary_lists=0.0)).prompt for number in (0, 1, 2)]
    assert len(np.unique(np.concatenate(parts), axis=0)) == 150   # each its own stream
    monkeypatch.setattr(toy.world, "TOY_DRAWN", 30)               # more than go together
    long = toy_split(100, 0, CFG)
    assert len(np.unique(long.prompt, axis=0)) == 100
    for n in (1, 30, 31, 60, 61):
        assert same(toy_split(n, 0, CFG), long.take(slice(n)))


def test_only_training_lists_vary_in_length_over_the_whole_range(world):
    assert set(world.train.list_length) == set(range(CFG.min_list, K + 1))
    assert (world.val.list_length == K).all() and (world.test.list_length == K).all()
    lengths = draw_list_lengths(4000, replace(CFG, vary_lists=0.3), np.random.default_rng(0))
    each = np.bincount(lengths, minlength=K + 1)[CFG.min_list:] / 4000
    assert np.abs(each - [0.06, 0.06, 0.06, 0.06, 0.76]).max() < 0.02
