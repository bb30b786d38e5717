import math

import numpy as np
import pytest

from analyse import shorter
from config import parse_args
from data import ANSWER, LABEL, TOY_HISTORY, Split, World, toy_examples
from evaluate import METRICS, average, make_row, paired_bootstrap, ranking_metrics, score, score_order
from model import EOS, PAD


def naive_metrics(order, target):
    """Recall, NDCG (with the general DCG / ideal DCG) and MRR from a ranking and binary relevance."""
    relevance = [float(c == target) for c in order]
    dcg = lambda rel, c: sum(r / math.log2(i + 2) for i, r in enumerate(rel[:c]))
    out = {f"recall@{c}": sum(relevance[:c]) for c in (1, 3, 5)}
    out |= {f"ndcg@{c}": dcg(relevance, c) / dcg(sorted(relevance, reverse=True), c) for c in (3, 5, 10)}
    return out | {"mrr": 1 / (relevance.index(1) + 1)}


def test_metrics_equal_the_general_definitions_at_every_rank():
    rng = np.random.default_rng(0)
    for target in range(10):
        order = rng.permutation(10)
        got = ranking_metrics(np.array([order.tolist().index(target)]))
        assert set(got) == set(METRICS)
        assert {m: pytest.approx(v[0]) for m, v in got.items()} == naive_metrics(order.tolist(), target)


def tiny_world(answers, targets, k=3):
    """Split of lists of length 3 whose traces are one profile and nothing else, and the responses to it."""
    n = len(answers)
    split = Split(np.full((n, 2), 9, np.int16), np.full((n, 1), 6, np.int16), np.tile(np.arange(k), (n, 1)).astype(np.int8),
                  np.array(targets, np.int8), np.tile(np.arange(k), (n, 1)).astype(np.int8))
    tokens = np.full((n, 8), PAD)
    for row, answer in zip(tokens, answers):
        full = [6, ANSWER, *(LABEL + a for a in answer), EOS]
        row[:len(full)] = full
    return World([], 5, split, split, split, "test", {}), split, tokens


def test_strict_and_served_scores_by_hand():
    #            valid      duplicate: served 1 0 2  dropped: served 2 0 1   out of set: served 2 0 1
    world, split, tokens = tiny_world([[2, 0, 1], [1, 1, 0], [2], [2, 4, 0, 1]], targets=[2, 1, 1, 0])
    got = score(world, split, tokens, np.array([2, 2, 2, 4]))
    assert got["valid"].tolist() == [1, 0, 0, 0]
    assert got["duplicated"].tolist() == [0, 1, 0, 0]
    assert got["dropped"].tolist() == [0, 1, 1, 0]
    assert got["out_of_set"].tolist() == [0, 0, 0, 1]
    assert got["served recall@1"].tolist() == [1, 1, 0, 0] and got["strict recall@1"].tolist() == [1, 0, 0, 0]
    assert got["served mrr"].tolist() == pytest.approx([1, 1, 1 / 3, 1 / 2]) and got["strict mrr"].tolist() == [1, 0, 0, 0]
    assert got["served ndcg@3"].tolist() == pytest.approx([1, 1, 1 / 2, 1 / math.log2(3)])
    assert got["faithful"].tolist() == [1, 1, 1, 1] and got["trace_tokens"].tolist() == [1, 1, 1, 1]
    assert got["tokens"].tolist() == [6, 6, 4, 7]
    row = make_row("cft", (8, 0.9), 0, got, {"ar": got, "prerank": score_order(split, split.order)})
    assert row["tokens_per_forward"] == 23 / 10 and row["strict"]["recall@1"] == 1 / 4 and row["recall@1"] == 1 / 2
    assert row["diff_to_ar"]["mrr"] == [0, 0, 0] and row["seed_se"] is None


def test_the_prerank_row_scores_the_incoming_order():
    _, split, _ = tiny_world([[0, 1, 2]] * 3, targets=[0, 1, 2])
    got = score_order(split, split.order)
    assert got["strict mrr"].tolist() == pytest.approx([1, 1 / 2, 1 / 3]) and got["identity"].tolist() == [1, 1, 1]


def test_paired_bootstrap_covers_the_mean_and_shrinks_with_pairing():
    rng = np.random.default_rng(1)
    user, noise = rng.normal(size=2000), 0.1 * rng.normal(size=2000)
    low, mean, high = paired_bootstrap(user + noise + 0.05, user)
    assert low < mean < high and mean == pytest.approx(0.05 + noise.mean())
    assert high - low == pytest.approx(2 * 1.96 * 0.1 / 2000 ** 0.5, rel=0.1)  # the users' own spread cancels


def test_scores_are_averaged_over_seeds_user_by_user():
    assert average([{"mrr": np.array([1.0, 0.0])}, {"mrr": np.array([0.0, 0.0])}])["mrr"].tolist() == [0.5, 0]


def test_the_help_names_every_setting(capsys):
    with pytest.raises(SystemExit):
        parse_args("what it does", ["--help"])
    out = capsys.readouterr().out
    assert "what it does" in out and "block_size: int = 16" in out and "rl_eps_high" in out


def test_a_list_cut_short_is_the_list_of_its_first_candidates():
    rng, n, K, k = np.random.default_rng(0), 200, 8, 5
    history, items, target = rng.integers(5, size=(n, TOY_HISTORY, 3)), rng.integers(5, size=(n, K, 3)), rng.integers(K, size=n)
    incoming = np.tile(np.arange(K), (n, 1))
    cut = shorter(toy_examples(history, items, incoming, target, 16), k)
    want = toy_examples(history, items, np.where(incoming < k, incoming, -1), target, 16).take(np.flatnonzero(target < k))
    assert len(cut) == len(want) > 50
    for field in cut.__dataclass_fields__:
        assert np.array_equal(getattr(cut, field), getattr(want, field)), field
