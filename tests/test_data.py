"""Invariants of data.py and toy/world.py: reading answers and traces, the toy world, its oracle."""
import itertools
from dataclasses import fields, replace

import numpy as np
import pytest

import toy.world
from config import Config
from data import (ANSWER, EOS, LABEL, MASK, PAD, PROFILE, Split, draw_list_lengths, faithfulness,
                  pack, parse_answers, responses, tensors)
from toy.world import (TOY_EXPERT, TOY_HISTORY, TOY_PRIOR, TOY_Q, TOY_VALUES, toy_examples,
                       toy_oracle, toy_split, toy_users, toy_words, toy_world)

CFG = Config(n_train=300, n_val=50, n_test=1500, vary_lists=0.5)
SPLITS = ("train", "val", "test")
L1, L2, L3, L4, L5 = range(LABEL, LABEL + 5)
WORD = LABEL + 40  # some word of a trace


@pytest.fixture(scope="module")
def world():
    return toy_world(CFG)


def splits_of(world):
    return [getattr(world, name) for name in SPLITS]


def text(world, tokens):
    return [world.words[t] for t in tokens if t != PAD]


def same(a, b):
    """Whether two splits hold the same users, to the last token."""
    return all(np.array_equal(getattr(a, f.name), getattr(b, f.name)) for f in fields(Split))


# --- Answers ----------------------------------------------------------------------------------

@pytest.mark.parametrize("tokens, k, order, flags, trace_tokens", [
    # flags: valid, duplicated, missing, out of set, identity
    ([WORD, WORD, ANSWER, L3, L1, L2, EOS], 3, [2, 0, 1, -1], "v", 2),
    ([ANSWER, L1, L2, L3, EOS], 3, [0, 1, 2, -1], "vi", 0),
    ([ANSWER, L4, L3, L2, L1, EOS], 4, [3, 2, 1, 0], "v", 0),
    ([WORD, ANSWER, L2, L1, EOS], 2, [1, 0, -1, -1], "v", 1),
    # An extra label: a duplicate, but no drop.
    ([WORD, ANSWER, L2, L2, L1, L3, EOS], 3, [1, 0, 2, -1], "d", 1),
    # First mentions stay, the missing follow.
    ([WORD, ANSWER, L3, L2, L3, EOS], 3, [2, 1, 0, -1], "dm", 1),
    ([WORD, ANSWER, L2, EOS], 3, [1, 0, 2, -1], "m", 1),
    ([WORD, ANSWER, L1, EOS], 3, [0, 1, 2, -1], "mi", 1),
    ([WORD, ANSWER, EOS], 3, [0, 1, 2, -1], "mi", 1),
    # A label beyond the list, a trace word, a second <answer>.
    ([WORD, ANSWER, L3, L4, L1, L2, EOS], 3, [2, 0, 1, -1], "o", 1),
    ([WORD, ANSWER, L3, WORD, L1, L2, EOS], 3, [2, 0, 1, -1], "o", 1),
    ([WORD, ANSWER, L3, ANSWER, L1, L2, EOS], 3, [2, 0, 1, -1], "o", 1),
    ([WORD, ANSWER, L5, L2, L2, EOS], 3, [1, 0, 2, -1], "dmo", 1),
    # Complete, but without [EOS].
    ([WORD, ANSWER, L3, L1, L2], 3, [2, 0, 1, -1], "", 1),
    # Labels of the trace are no answer.
    ([WORD, L1, L2, L3, EOS], 3, [0, 1, 2, -1], "mi", 4),
    ([WORD, L1, L2, L3], 3, [0, 1, 2, -1], "mi", 4),
    ([EOS], 3, [0, 1, 2, -1], "mi", 0)])
def test_parse_answers_by_hand(tokens, k, order, flags, trace_tokens):
    neighbour = [ANSWER, L1, L2, EOS] + [PAD] * 4  # a valid one
    padded = np.array([tokens + [PAD] * (8 - len(tokens)), neighbour])
    got = parse_answers(padded, np.where(np.arange(4) < np.array([[k], [2]]), np.arange(4), -1))
    assert got.order[0].tolist() == order and got.trace_tokens[0] == trace_tokens
    names = dict(v="valid", d="duplicated", m="dropped", o="out_of_set", i="identity")
    assert "".join(c for c in "vdmoi" if getattr(got, names[c])[0]) == flags
    assert got.order[1].tolist() == [0, 1, -1, -1] and got.valid[1] and got.identity[1]


def test_repair_and_identity_follow_the_incoming_order_of_random_labels():
    incoming = np.array([[2, 0, 1, -1]] * 3)
    tokens = np.array([[WORD, ANSWER, L3, L1, L2, EOS], [WORD, ANSWER, L2, EOS, PAD, PAD],
                       [WORD, ANSWER, L1, L2, L3, EOS]])
    got = parse_answers(tokens, incoming)
    assert got.order.tolist() == [[2, 0, 1, -1], [1, 2, 0, -1], [0, 1, 2, -1]]
    assert got.identity.tolist() == [True, False, False]
    assert got.valid.tolist() == [True, False, True]


# --- Traces -----------------------------------------------------------------------------------

A, B = WORD, WORD + 1
RULE = [PROFILE, A, B, L1, A, L2, B, L3, A]


@pytest.mark.parametrize("trace, score", [
    (RULE, 1),
    ([], 0),
    ([PROFILE, A, B], 1 / 4),
    (RULE[:-1], 3 / 4),                             # the last statement is cut short
    (RULE[:-2], 3 / 4),                             # one is missing
    (RULE + [A], 3 / 4),                            # one is too long
    (RULE + [L1, A], 4 / 5),                        # repeated
    ([PROFILE, A, B, L1, A, L2, B, L2, B], 3 / 4),  # repeated in place of another
    (RULE + [L4, A], 4 / 5),                        # about no candidate, or one too many
    ([PROFILE, A, B, L1, A, L2, B, L4, A], 3 / 4),
    ([PROFILE, A, B, L1, A, L2, A, L3, A], 3 / 4),  # false
    (RULE + [L2, A], 4 / 5),                        # true and false
    ([PROFILE, A, B, L3, A, L2, B, L1, A], 1),      # the order does not matter
    ([A] + RULE, 4 / 5),                            # unreadable words in front
    ([B, A, L3], 0),
    (RULE + [PROFILE, A, B] * 4, 4 / 8)])
@pytest.mark.parametrize("end", [[ANSWER, L2, L1, L3, EOS], [EOS], []])
def test_faithfulness_by_hand(trace, score, end):
    tokens = np.array([trace + end + [PAD] * 3])
    assert faithfulness(tokens, np.array([RULE + [PAD]]), 16)[0] == pytest.approx(score)


def test_reference_responses_are_valid_and_faithful(world):
    for split in splits_of(world):
        tokens = responses(split.trace, split.order)
        answers = parse_answers(tokens, split.incoming)
        assert answers.valid.all() and (answers.order == split.order).all()
        assert (answers.trace_tokens == (split.trace != PAD).sum(1)).all()
        assert (faithfulness(tokens, split.trace, world.n_labels) == 1).all()


def test_faithfulness_falls_when_any_one_token_of_a_trace_is_replaced(world):
    row = int((world.train.list_length == CFG.n_candidates).argmax())  # without empty places
    trace = world.train.trace[row][world.train.trace[row] != PAD]
    wrong = []
    for i, token in itertools.product(range(len(trace)), range(len(world.words))):
        if token != trace[i]:
            wrong.append(np.where(np.arange(len(trace)) == i, token, trace))
    rule = np.array([trace] * len(wrong))
    assert (faithfulness(np.array(wrong), rule, world.n_labels) < 1).all()


def test_longest_response_fits(world):
    for split in splits_of(world):
        lengths = (responses(split.trace, split.order) != PAD).sum(1)
        assert lengths.max() <= world.max_response


# --- The toy world ----------------------------------------------------------------------------

def items_of(words):
    """Items of a part of a prompt, three words each: [("x", 1), ("y", 0), ("z", 4)]."""
    pairs = [(word[0], int(word[1:])) for word in words]
    return [pairs[i:i + 3] for i in range(0, len(pairs), 3)]


def read_prompt(words):
    """History, candidates and labels of a prompt, from its words alone."""
    assert words[0] == "<history>"
    middle = words.index("<candidates>")
    shown = words[middle + 1:]
    empty = shown.count("<none>")  # four words a place, at the list's end
    assert empty % 4 == 0 and shown[len(shown) - empty:] == ["<none>"] * empty
    shown = shown[:len(shown) - empty]
    labels, rest = shown[::4], [w for i, w in enumerate(shown) if i % 4]
    return items_of(words[1:middle]), items_of(rest), labels


def rows_of(world):
    return [(split, n) for split in (world.train, world.test) for n in range(40)]


def count(history, attribute, value):
    return sum((attribute, value) in item for item in history)


def favourite(history, attribute):
    """The value that a history has most often, the smallest of several."""
    return max(range(TOY_VALUES), key=lambda v: (count(history, attribute, v), -v))


def test_the_trace_follows_from_the_prompt_alone(world):
    for split, n in rows_of(world):
        history, candidates, labels = read_prompt(text(world, split.prompt[n]))
        assert len(history) == TOY_HISTORY
        assert labels == [f"L{i + 1}" for i in range(split.list_length[n])]
        expected = ["<profile>"] + [f"{a}{favourite(history, a)}" for a in "xyz"]
        for label, item in zip(labels, candidates):
            expected += [label] + [f"{a}{v}:{min(count(history, a, v), 3)}" for a, v in item]
        expected += ["<none>"] * 4 * (CFG.n_candidates - len(labels))
        assert text(world, split.trace[n]) == expected


def p_taken(item, liked):
    """P(attributes of an item that is taken | the favourites)."""
    each = [TOY_Q * (v == f) + (1 - TOY_Q) / TOY_VALUES for (_, v), f in zip(item, liked)]
    return np.prod(each)


def bayes(history, candidates):
    """P(target = candidate | prompt), summed over the 125 latent triples of favourites."""
    posterior = np.zeros(len(candidates))
    for liked in itertools.product(range(TOY_VALUES), repeat=3):
        likelihood = np.prod([p_taken(item, liked) for item in history])
        for c, item in enumerate(candidates):  # the others are uniform, whichever is the target
            posterior[c] += likelihood * p_taken(item, liked) * np.exp(-TOY_PRIOR * c)
    return posterior / posterior.sum()


def counts_of(history):
    """(1, A, V), as toy_oracle wants them."""
    return np.array([[[count(history, a, v) for v in range(TOY_VALUES)] for a in "xyz"]])


def test_the_oracle_is_the_exact_bayes_posterior(world):
    for split, n in rows_of(world)[::3]:
        history, candidates, _ = read_prompt(text(world, split.prompt[n]))
        k = split.list_length[n]
        order, p = split.order[n][:k].tolist(), bayes(history, candidates)
        assert sorted(order) == list(range(k)) and (split.order[n][k:] == -1).all()
        assert all(p[a] >= p[b] * (1 - 1e-9) for a, b in zip(order, order[1:]))
        items = [[v for _, v in item] for item in candidates]
        items.append([0, 0, 0])  # one item after the list's end
        score = toy_oracle(counts_of(history), np.array([items]), np.array([k]))[0]
        assert score[-1] == -np.inf
        np.testing.assert_allclose(np.exp(score[:-1]) / np.exp(score).sum(), p, rtol=1e-9)


def test_an_expert_weighs_the_place_too_much_and_the_target_comes_first_where_it_is_told(world):
    expert, told = (toy_world(replace(CFG, world=f"toy_{kind}")) for kind in ("expert", "target"))
    differ = 0
    for split, n in rows_of(world)[::3]:
        name = {id(world.train): "train", id(world.val): "val", id(world.test): "test"}[id(split)]
        other, best = getattr(expert, name), getattr(told, name)
        assert (other.prompt[n] == split.prompt[n]).all() and other.target[n] == split.target[n]
        history, candidates, _ = read_prompt(text(world, split.prompt[n]))
        k, p = split.list_length[n], bayes(history, candidates)
        p = p * np.exp(-(TOY_EXPERT - 1) * TOY_PRIOR * np.arange(k))
        order = other.order[n][:k].tolist()
        assert all(p[a] >= p[b] * (1 - 1e-9) for a, b in zip(order, order[1:]))
        target = split.target[n]
        assert best.order[n][:k].tolist() == [target] + [c for c in order if c != target]
        differ += order != split.order[n][:k].tolist()
    assert differ > 5


def test_equal_evidence_is_ranked_as_it_came(world):
    pairs, K = 0, CFG.n_candidates
    for n in range(len(world.test)):
        evidence = [tuple(s) for s in np.split(world.test.trace[n][4:4 + 4 * K], K)]
        order = world.test.order[n].tolist()
        for a, b in itertools.combinations(range(K), 2):
            if evidence[a][1:] == evidence[b][1:]:
                pairs += 1
                assert order.index(a) < order.index(b)
    assert pairs > 100


def test_targets_are_drawn_from_the_oracle_posterior():
    users = toy_users(np.full(1500, 4), 5, False, np.random.default_rng(0))
    split = toy_examples(*users, CFG.n_labels)
    words = np.array(toy_words(CFG.n_labels))
    best, hits = split.order[:, 0], split.order[:, 0] == split.target
    p = []
    for row, b in zip(split.prompt[:200], best):
        history, candidates, _ = read_prompt(list(words[row[row != PAD]]))
        p.append(bayes(history, candidates)[b])
    p = np.array(p)
    noise = hits.std() / 1500 ** 0.5 + p.std() / 200 ** 0.5
    assert abs(hits.mean() - p.mean()) < 4 * noise
    assert (split.target >= 0).all() and (split.target < 4).all()


def test_items_that_a_user_takes_agree_as_often_as_the_favourites_say(world):
    part, n, K = world.test, np.arange(len(world.test)), CFG.n_candidates
    history = part.prompt[:, 1:1 + 3 * TOY_HISTORY].reshape(len(n), TOY_HISTORY, 3)
    candidates = part.prompt[:, -4 * K:].reshape(len(n), K, 4)[:, :, 1:]
    # Both take the favourite; or one of them at least is uniform.
    agree = TOY_Q ** 2 + (1 - TOY_Q ** 2) / TOY_VALUES
    assert abs((history[:, 0] == history[:, 1]).mean() - agree) < 0.04
    assert abs((candidates[n, part.target] == history[:, 2]).mean() - agree) < 0.04
    another = candidates[n, part.target - 1]  # agrees by chance
    assert abs((another == history[:, 2]).mean() - 1 / TOY_VALUES) < 0.04


def test_targets_follow_the_position_prior(world):
    share = np.bincount(world.test.target, minlength=CFG.n_candidates) / len(world.test)
    prior = np.exp(-TOY_PRIOR * np.arange(CFG.n_candidates))
    assert np.abs(share - prior / prior.sum()).max() < 0.05


def test_random_labels_name_the_same_candidates_in_another_way():
    plain = toy_world(CFG).val
    random = toy_world(replace(CFG, world="toy_random_labels")).val
    assert not np.array_equal(random.incoming, plain.incoming)
    assert np.array_equal(np.sort(random.incoming), np.sort(plain.incoming))
    # The same labels stand in the prompt, the trace and the incoming order.
    for split in (plain, random):
        for n in range(len(split)):
            labels = split.incoming[n][split.incoming[n] >= 0] + LABEL
            for row in (split.prompt[n], split.trace[n]):
                shown = [t for t in row.tolist() if LABEL <= t < LABEL + CFG.n_labels]
                assert shown == labels.tolist()
    assert any((random.order[n] != plain.order[n]).any() for n in range(5))
    long = [(responses(s.trace, s.order) != PAD).sum() for s in (random, plain)]
    assert long[0] == long[1]
    # They are the same users: without the labels nothing differs.
    for a, b in ((random.prompt, plain.prompt), (random.trace, plain.trace)):
        is_label = (b >= LABEL) & (b < LABEL + CFG.n_labels)
        assert np.array_equal(a[~is_label], b[~is_label])
    place = np.take_along_axis(random.incoming, plain.target[:, None].astype(int), 1)[:, 0]
    assert np.array_equal(place, random.target)


def test_the_toy_world_is_the_same_on_every_call_and_for_every_seed(world):
    for cfg in (CFG, replace(CFG, seed=5)):
        again = toy_world(cfg)
        assert again.words == world.words
        for name in SPLITS:
            a, b = getattr(again, name), getattr(world, name)
            assert same(a, b) and np.array_equal(a.list_length, b.list_length)
    assert not np.array_equal(world.val.prompt, world.test.prompt[:len(world.val)])


@pytest.mark.parametrize("kind", ["toy", "toy_random_labels"])
def test_no_split_changes_with_the_size_of_another_and_a_shorter_one_is_a_beginning(kind):
    base = Config(world=kind, n_train=100, n_val=40, n_test=2000)
    whole = toy_world(base)
    for name, n in (("train", 30), ("val", 7), ("test", 50), ("train", 101), ("val", 2001)):
        other = toy_world(replace(base, **{f"n_{name}": n}))
        for each in SPLITS:
            a, b = getattr(whole, each), getattr(other, each)
            assert len(b) == (n if each == name else len(a))
            shorter = slice(0, min(len(a), len(b)))
            assert same(a.take(shorter), b.take(shorter)), (name, n, each)


@pytest.mark.parametrize("kind", ["toy", "toy_random_labels"])
@pytest.mark.parametrize("number", [0, 1, 2])
def test_the_first_users_are_the_same_when_more_are_drawn_than_go_together(
        kind, number, monkeypatch):
    monkeypatch.setattr(toy.world, "TOY_DRAWN", 30)
    cfg = replace(CFG, world=kind)
    long = toy_split(100, number, cfg)
    assert len(long) == 100 and len(np.unique(long.prompt, axis=0)) == 100
    for n in (1, 29, 30, 31, 60, 61):
        assert same(toy_split(n, number, cfg), long.take(slice(0, n)))


def test_each_split_has_a_stream_of_its_own():
    parts = [toy_split(50, number, replace(CFG, vary_lists=0.0)).prompt for number in (0, 1, 2)]
    assert len(np.unique(np.concatenate(parts), axis=0)) == 150


def test_only_training_lists_vary_in_length(world):
    K = CFG.n_candidates
    assert set(world.train.list_length.tolist()) == set(range(CFG.min_list, K + 1))
    assert (world.val.list_length == K).all() and (world.test.list_length == K).all()


def test_words_are_distinct_and_tokens_are_in_the_vocabulary(world):
    assert len(set(world.words)) == len(world.words) and world.words[LABEL] == "L1"
    special = [world.words[t] for t in (PAD, MASK, EOS, PROFILE)]
    assert special == ["[PAD]", "[MASK]", "[EOS]", "<profile>"]
    for split in splits_of(world):
        for tokens in (split.prompt, responses(split.trace, split.order)):
            assert tokens.min() >= 0 and tokens.max() < len(world.words)
            assert not (tokens == MASK).any()
        filled = split.prompt != PAD  # padded on the left
        assert (np.sort(filled, axis=1) == filled).all() and filled[:, -1].all()


# --- Small parts ------------------------------------------------------------------------------

def test_pack_moves_padding_and_keeps_the_order():
    tokens = np.array([[3, PAD, 5, PAD, PAD], [PAD, 6, PAD, 7, 4], [PAD, PAD, 9, PAD, PAD]])
    assert pack(tokens, left=True).tolist() == [[PAD, 3, 5], [6, 7, 4], [PAD, PAD, 9]]
    assert pack(tokens, left=False).tolist() == [[3, 5, PAD], [6, 7, 4], [9, PAD, PAD]]


def test_responses_by_hand():
    trace = np.array([[PROFILE, A, PAD], [PROFILE, A, B]], np.int16)
    order = np.array([[1, 0, -1], [2, 0, 1]], np.int8)
    assert responses(trace, order).tolist() == [[PROFILE, A, ANSWER, L2, L1, EOS, PAD, PAD],
                                                [PROFILE, A, B, ANSWER, L3, L1, L2, EOS]]


def test_tensors_are_the_rows_asked_for_without_columns_of_padding():
    prompt = np.array([[PAD, PAD, 4, 5], [PAD, 3, 4, 5], [2, 3, 4, 5]], np.int16)
    trace = np.array([[A, PAD, PAD], [A, B, PAD], [A, B, A]], np.int16)
    none = np.zeros(3, np.int8)
    order = np.array([[0, 1], [1, 0], [0, 1]], np.int8)
    split = Split(prompt, trace, order, none, order)
    got = tensors(split, [1, 0], "cpu")
    assert got[0].tolist() == [[3, 4, 5], [PAD, 4, 5]]
    assert got[1].tolist() == [[A, B, ANSWER, L2, L1, EOS], [A, ANSWER, L1, L2, EOS, PAD]]


def test_list_lengths_vary_for_the_given_share_over_the_whole_range():
    def lengths(share):
        return draw_list_lengths(4000, replace(CFG, vary_lists=share), np.random.default_rng(0))

    assert (lengths(0.0) == CFG.n_candidates).all()
    share = np.bincount(lengths(1.0), minlength=CFG.n_candidates + 1)[CFG.min_list:] / 4000
    assert share.sum() == 1 and np.abs(share - 0.2).max() < 0.03
    assert abs((lengths(0.3) != CFG.n_candidates).mean() - 0.3 * 0.8) < 0.03
