"""Invariants of data.py: reading answers and traces, the toy world and its oracle."""
import itertools
from dataclasses import replace

import numpy as np
import pytest

from config import Config
from data import (ANSWER, LABEL, PROFILE, TOY_HISTORY, TOY_PRIOR, TOY_Q, TOY_VALUES, faithfulness,
                  list_lengths, pack, parse_answers, responses, toy_oracle, toy_split, toy_words, toy_world)
from model import EOS, MASK, PAD

CFG = Config(n_train=300, n_val=50, n_test=1500, vary_lists=0.5)
L1, L2, L3, L4, L5 = range(LABEL, LABEL + 5)
WORD = LABEL + 40  # some word of a trace


@pytest.fixture(scope="module")
def world():
    return toy_world(CFG)


def text(world, tokens):
    return [world.words[t] for t in tokens if t != PAD]


# --- Answers -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("tokens, k, order, flags, trace_tokens", [
    # flags: valid, duplicated, dropped, out of set, identity
    ([WORD, WORD, ANSWER, L3, L1, L2, EOS], 3, [2, 0, 1, -1], "v", 2),
    ([ANSWER, L1, L2, L3, EOS], 3, [0, 1, 2, -1], "vi", 0),
    ([ANSWER, L4, L3, L2, L1, EOS], 4, [3, 2, 1, 0], "v", 0),
    ([WORD, ANSWER, L2, L1, EOS], 2, [1, 0, -1, -1], "v", 1),
    ([WORD, ANSWER, L2, L2, L1, L3, EOS], 3, [1, 0, 2, -1], "d", 1),           # an extra label: duplicate, no drop
    ([WORD, ANSWER, L3, L2, L3, EOS], 3, [2, 1, 0, -1], "dm", 1),              # first occurrences stay, the missing follow
    ([WORD, ANSWER, L2, EOS], 3, [1, 0, 2, -1], "m", 1),
    ([WORD, ANSWER, L1, EOS], 3, [0, 1, 2, -1], "mi", 1),
    ([WORD, ANSWER, EOS], 3, [0, 1, 2, -1], "mi", 1),
    ([WORD, ANSWER, L3, L4, L1, L2, EOS], 3, [2, 0, 1, -1], "o", 1),           # a label beyond the list
    ([WORD, ANSWER, L3, WORD, L1, L2, EOS], 3, [2, 0, 1, -1], "o", 1),         # a trace word
    ([WORD, ANSWER, L3, ANSWER, L1, L2, EOS], 3, [2, 0, 1, -1], "o", 1),
    ([WORD, ANSWER, L5, L2, L2, EOS], 3, [1, 0, 2, -1], "dmo", 1),
    ([WORD, ANSWER, L3, L1, L2], 3, [2, 0, 1, -1], "", 1),                     # complete, but without [EOS]
    ([WORD, L1, L2, L3, EOS], 3, [0, 1, 2, -1], "mi", 4),                      # labels of the trace are no answer
    ([WORD, L1, L2, L3], 3, [0, 1, 2, -1], "mi", 4),
    ([EOS], 3, [0, 1, 2, -1], "mi", 0)])
def test_parse_answers_by_hand(tokens, k, order, flags, trace_tokens):
    padded = np.array([tokens + [PAD] * (8 - len(tokens)), [ANSWER, L1, L2, EOS] + [PAD] * 4])  # and a valid neighbour
    got = parse_answers(padded, np.where(np.arange(4) < np.array([[k], [2]]), np.arange(4), -1))
    assert got.order[0].tolist() == order and got.trace_tokens[0] == trace_tokens
    names = dict(v="valid", d="duplicated", m="dropped", o="out_of_set", i="identity")
    assert "".join(c for c in "vdmoi" if getattr(got, names[c])[0]) == flags
    assert got.order[1].tolist() == [0, 1, -1, -1] and got.valid[1] and got.identity[1]


# --- Traces --------------------------------------------------------------------------------------------------------------

A, B = WORD, WORD + 1
RULE = [PROFILE, A, B, L1, A, L2, B, L3, A]


@pytest.mark.parametrize("trace, score", [
    (RULE, 1),
    ([], 0),
    ([PROFILE, A, B], 1 / 4),
    (RULE[:-1], 3 / 4),                                                # the last statement is cut short
    (RULE[:-2], 3 / 4),                                                # one is missing
    (RULE + [A], 3 / 4),                                               # one is too long
    (RULE + [L1, A], 4 / 5),                                           # repeated
    ([PROFILE, A, B, L1, A, L2, B, L2, B], 3 / 4),                     # repeated in place of another
    (RULE + [L4, A], 4 / 5),                                           # about a non-candidate, or one too many
    ([PROFILE, A, B, L1, A, L2, B, L4, A], 3 / 4),
    ([PROFILE, A, B, L1, A, L2, A, L3, A], 3 / 4),                     # false
    (RULE + [L2, A], 4 / 5),                                           # true and false
    ([PROFILE, A, B, L3, A, L2, B, L1, A], 1),                         # the order does not matter
    ([A] + RULE, 4 / 5),                                               # unparsable words in front
    ([B, A, L3], 0),
    (RULE + [PROFILE, A, B] * 4, 4 / 8)])
@pytest.mark.parametrize("end", [[ANSWER, L2, L1, L3, EOS], [EOS], []])
def test_faithfulness_by_hand(trace, score, end):
    tokens = np.array([trace + end + [PAD] * 3])
    assert faithfulness(tokens, np.array([RULE + [PAD]]), 16)[0] == pytest.approx(score)


def test_repair_and_identity_follow_the_incoming_order_of_random_labels():
    incoming = np.array([[2, 0, 1, -1]] * 3)
    tokens = np.array([[WORD, ANSWER, L3, L1, L2, EOS], [WORD, ANSWER, L2, EOS, PAD, PAD], [WORD, ANSWER, L1, L2, L3, EOS]])
    got = parse_answers(tokens, incoming)
    assert got.order.tolist() == [[2, 0, 1, -1], [1, 2, 0, -1], [0, 1, 2, -1]]
    assert got.identity.tolist() == [True, False, False] and got.valid.tolist() == [True, False, True]


def test_random_labels_name_the_same_candidates_in_another_way():
    plain, random = (toy_world(replace(CFG, random_labels=r)).val for r in (False, True))
    assert not np.array_equal(random.incoming, plain.incoming) and np.array_equal(np.sort(random.incoming), np.sort(plain.incoming))
    for split in (plain, random):  # the same labels stand in the prompt, the trace and the incoming order
        for n in range(len(split)):
            labels = split.incoming[n][split.incoming[n] >= 0] + LABEL
            for text in (split.prompt[n], split.trace[n]):
                assert [t for t in text.tolist() if LABEL <= t < LABEL + CFG.n_labels] == labels.tolist()
    some = range(5)
    assert any((random.order[n] != plain.order[n]).any() for n in some)
    assert (responses(random.trace, random.order) != PAD).sum() == (responses(plain.trace, plain.order) != PAD).sum()


def test_reference_responses_are_valid_and_faithful(world):
    for split in (world.train, world.val, world.test):
        tokens = responses(split.trace, split.order)
        answers = parse_answers(tokens, split.incoming)
        assert answers.valid.all() and (answers.order == split.order).all()
        assert (answers.trace_tokens == (split.trace != PAD).sum(1)).all()
        assert (faithfulness(tokens, split.trace, world.n_labels) == 1).all()


def test_faithfulness_falls_when_any_one_token_of_a_trace_is_replaced(world):
    trace = world.train.trace[0][world.train.trace[0] != PAD]
    wrong = [np.where(np.arange(len(trace)) == i, token, trace)
             for i, token in itertools.product(range(len(trace)), range(len(world.words))) if token != trace[i]]
    assert (faithfulness(np.array(wrong), np.array([trace] * len(wrong)), world.n_labels) < 1).all()


def test_longest_response_fits(world):
    for split in (world.train, world.val, world.test):
        assert (responses(split.trace, split.order) != PAD).sum(1).max() <= world.max_response


# --- The toy world --------------------------------------------------------------------------------------------------------

def read_prompt(words):
    """History and candidates of a prompt, from its words alone: lists of items, [("x", 1), ("y", 0), ("z", 4)] each."""
    assert words[0] == "<history>"
    middle = words.index("<candidates>")
    items = lambda part: [[(w[0], int(w[1:])) for w in part[i:i + 3]] for i in range(0, len(part), 3)]
    shown = words[middle + 1:]
    empty = shown.count("<none>")  # four words a place, at the list's end
    assert empty % 4 == 0 and shown[len(shown) - empty:] == ["<none>"] * empty
    shown = shown[:len(shown) - empty]
    labels, rest = shown[::4], [w for i, w in enumerate(shown) if i % 4]
    return items(words[1:middle]), items(rest), labels


def rows_of(world):
    return [(split, n) for split in (world.train, world.test) for n in range(40)]


def test_the_trace_follows_from_the_prompt_alone(world):
    for split, n in rows_of(world):
        history, candidates, labels = read_prompt(text(world, split.prompt[n]))
        assert len(history) == TOY_HISTORY and labels == [f"L{i + 1}" for i in range(split.k[n])]
        count = lambda a, v: sum((a, v) in item for item in history)
        expected = ["<profile>"] + [a + str(max(range(TOY_VALUES), key=lambda v: (count(a, v), -v))) for a in "xyz"]
        for label, item in zip(labels, candidates):
            expected += [label] + [f"{a}{v}:{min(count(a, v), 3)}" for a, v in item]
        assert text(world, split.trace[n]) == expected + ["<none>"] * 4 * (CFG.n_candidates - len(labels))


def bayes(history, candidates):
    """P(target = candidate | prompt), summed over the 125 latent triples of favourites."""
    posterior = np.zeros(len(candidates))
    p = lambda item, liked: np.prod([TOY_Q * (v == f) + (1 - TOY_Q) / TOY_VALUES for (_, v), f in zip(item, liked)])
    for favourites in itertools.product(range(TOY_VALUES), repeat=3):
        taken = np.prod([p(item, favourites) for item in history])
        for c, item in enumerate(candidates):  # the other candidates are uniform, whichever is the target
            posterior[c] += taken * p(item, favourites) * np.exp(-TOY_PRIOR * c)
    return posterior / posterior.sum()


def test_the_oracle_is_the_exact_bayes_posterior(world):
    for split, n in rows_of(world)[::3]:
        history, candidates, _ = read_prompt(text(world, split.prompt[n]))
        order, p = split.order[n][:split.k[n]].tolist(), bayes(history, candidates)
        assert sorted(order) == list(range(split.k[n])) and (split.order[n][split.k[n]:] == -1).all()
        assert all(p[a] >= p[b] * (1 - 1e-9) for a, b in zip(order, order[1:]))
        counts = np.array([[[sum((a, v) in item for item in history) for v in range(TOY_VALUES)] for a in "xyz"]])
        items = np.array([[[v for _, v in item] for item in candidates] + [[0, 0, 0]]])  # one item behind the list's end
        score = toy_oracle(counts, items, np.array([split.k[n]]))[0]
        assert score[-1] == -np.inf
        np.testing.assert_allclose(np.exp(score[:-1]) / np.exp(score).sum(), p, rtol=1e-9)


def test_equal_evidence_is_ranked_as_it_came(world):
    pairs = 0
    for n in range(len(world.test)):
        evidence = [tuple(s) for s in np.split(world.test.trace[n][4:4 + 4 * CFG.n_candidates], CFG.n_candidates)]
        order = world.test.order[n].tolist()
        for a, b in itertools.combinations(range(CFG.n_candidates), 2):
            if evidence[a][1:] == evidence[b][1:]:
                pairs += 1
                assert order.index(a) < order.index(b)
    assert pairs > 100


def test_targets_are_drawn_from_the_oracle_posterior():
    split = toy_split(1500, np.full(1500, 4), replace(CFG, n_candidates=5), np.random.default_rng(0))
    words = np.array(toy_words(CFG.n_labels))
    best, hits = split.order[:, 0], split.order[:, 0] == split.target
    p = np.array([bayes(*read_prompt(list(words[row[row != PAD]]))[:2])[b] for row, b in zip(split.prompt[:200], best)])
    assert abs(hits.mean() - p.mean()) < 4 * (hits.std() / 1500 ** 0.5 + p.std() / 200 ** 0.5)
    assert (split.target >= 0).all() and (split.target < 4).all()


def test_items_that_a_user_takes_agree_as_often_as_the_favourites_say(world):
    part, n = world.test, np.arange(len(world.test))
    history = part.prompt[:, 1:1 + 3 * TOY_HISTORY].reshape(len(n), TOY_HISTORY, 3)
    candidates = part.prompt[:, -4 * CFG.n_candidates:].reshape(len(n), CFG.n_candidates, 4)[:, :, 1:]
    agree = TOY_Q ** 2 + (1 - TOY_Q ** 2) / TOY_VALUES  # both the favourite, or one of them at least uniform
    assert abs((history[:, 0] == history[:, 1]).mean() - agree) < 0.04
    assert abs((candidates[n, part.target] == history[:, 2]).mean() - agree) < 0.04
    assert abs((candidates[n, part.target - 1] == history[:, 2]).mean() - 1 / TOY_VALUES) < 0.04  # another: by chance


def test_targets_follow_the_position_prior(world):
    share = np.bincount(world.test.target, minlength=CFG.n_candidates) / len(world.test)
    prior = np.exp(-TOY_PRIOR * np.arange(CFG.n_candidates))
    assert np.abs(share - prior / prior.sum()).max() < 0.05


def test_the_toy_world_is_the_same_on_every_call_and_for_every_seed(world):
    for cfg in (CFG, replace(CFG, seed=5)):
        again = toy_world(cfg)
        assert again.words == world.words
        for name in ("train", "val", "test"):
            for field in ("prompt", "trace", "order", "target", "k"):
                assert np.array_equal(getattr(getattr(again, name), field), getattr(getattr(world, name), field))
    assert not np.array_equal(world.val.prompt, world.test.prompt[:len(world.val)])


def test_words_are_distinct_and_tokens_are_in_the_vocabulary(world):
    assert len(set(world.words)) == len(world.words) and world.words[LABEL] == "L1"
    assert [world.words[t] for t in (PAD, MASK, EOS, PROFILE)] == ["[PAD]", "[MASK]", "[EOS]", "<profile>"]
    for split in (world.train, world.val, world.test):
        for tokens in (split.prompt, responses(split.trace, split.order)):
            assert tokens.min() >= 0 and tokens.max() < len(world.words) and not (tokens == MASK).any()
        filled = split.prompt != PAD
        assert (np.sort(filled, axis=1) == filled).all() and filled[:, -1].all()  # padded on the left


# --- Small parts -----------------------------------------------------------------------------------------------------------

def test_pack_moves_padding_and_keeps_the_order():
    tokens = np.array([[3, PAD, 5, PAD, PAD], [PAD, 6, PAD, 7, 4], [PAD, PAD, 9, PAD, PAD]])
    assert pack(tokens, left=True).tolist() == [[PAD, 3, 5], [6, 7, 4], [PAD, PAD, 9]]
    assert pack(tokens, left=False).tolist() == [[3, 5, PAD], [6, 7, 4], [9, PAD, PAD]]


def test_responses_by_hand():
    trace, order = np.array([[PROFILE, A, PAD], [PROFILE, A, B]], np.int16), np.array([[1, 0, -1], [2, 0, 1]], np.int8)
    assert responses(trace, order).tolist() == [[PROFILE, A, ANSWER, L2, L1, EOS, PAD, PAD],
                                                [PROFILE, A, B, ANSWER, L3, L1, L2, EOS]]


def test_list_lengths_vary_for_the_given_share_over_the_whole_range():
    lengths = lambda share: list_lengths(4000, replace(CFG, vary_lists=share), np.random.default_rng(0))
    assert (lengths(0.0) == CFG.n_candidates).all()
    share = np.bincount(lengths(1.0), minlength=CFG.n_candidates + 1)[CFG.min_list:] / 4000
    assert share.sum() == 1 and np.abs(share - 0.2).max() < 0.03
    assert abs((lengths(0.3) != CFG.n_candidates).mean() - 0.3 * 0.8) < 0.03
