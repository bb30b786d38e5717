"""Metrics against naive ones, the coverage of intervals by simulation, rows of several seeds."""
import math

import numpy as np
import pytest

from data import ANSWER, EOS, LABEL, PAD, PROFILE, Split, World
from evaluate import METRICS, ranking_metrics, score, score_order
from report.intervals import paired_bootstrap, paired_interval
from report.table import Result, first_users, partners, report_rows


# --- Metrics ----------------------------------------------------------------------------------

def naive_metrics(order, target):
    """Recall, NDCG (the general DCG / ideal DCG) and MRR of a ranking and binary relevance."""
    def dcg(relevance, c):
        return sum(r / math.log2(i + 2) for i, r in enumerate(relevance[:c]))

    relevance = [float(label == target) for label in order]
    out = {f"recall@{c}": sum(relevance[:c]) for c in (1, 3, 5)}
    for c in (3, 5, 10):
        out[f"ndcg@{c}"] = dcg(relevance, c) / dcg(sorted(relevance, reverse=True), c)
    return out | {"mrr": 1 / (relevance.index(1) + 1)}


def test_metrics_equal_the_general_definitions_at_every_rank():
    rng = np.random.default_rng(0)
    for target in range(12):
        order = rng.permutation(12)
        got = ranking_metrics(np.array([order.tolist().index(target)]))
        assert set(got) == set(METRICS)
        wanted = naive_metrics(order.tolist(), target)
        assert {m: pytest.approx(values[0]) for m, values in got.items()} == wanted


def tiny_world(answers, targets, K=3):
    """A split of lists of length 3 whose traces are one profile and nothing else, and the
    responses to it that give these answers."""
    n = len(answers)
    lists = np.tile(np.arange(K), (n, 1)).astype(np.int8)
    split = Split(np.full((n, 2), 9, np.int16), np.full((n, 1), PROFILE, np.int16), lists,
                  np.array(targets, np.int8), lists)
    tokens = np.full((n, 8), PAD)
    for row, answer in zip(tokens, answers):
        full = [PROFILE, PAD, ANSWER, *(LABEL + label for label in answer), EOS]
        row[:len(full)] = full
    return World([], 5, split, split, split, "test", {}), split, tokens


def test_strict_and_served_scores_by_hand():
    # valid; duplicate: served as 1 0 2; dropped: served as 2 0 1; out of set: served as 2 0 1
    answers = [[2, 0, 1], [1, 1, 0], [2], [2, 4, 0, 1]]
    world, split, tokens = tiny_world(answers, targets=[2, 1, 1, 0])
    got = score(world, split, tokens, np.array([2, 2, 2, 4]))
    wanted = {
        "valid": [1, 0, 0, 0],
        "duplicated": [0, 1, 0, 0],
        "dropped": [0, 1, 1, 0],
        "out_of_set": [0, 0, 0, 1],
        "served recall@1": [1, 1, 0, 0],
        "strict recall@1": [1, 0, 0, 0],
        "served mrr": [1, 1, 1 / 3, 1 / 2],
        "strict mrr": [1, 0, 0, 0],
        "served ndcg@3": [1, 1, 1 / 2, 1 / math.log2(3)],
        "faithful": [1, 1, 1, 1],
        "trace_tokens": [1, 1, 1, 1],
        "tokens": [6, 6, 4, 7],
        "forwards": [2, 2, 2, 4]}
    for name, values in wanted.items():
        assert got[name].tolist() == pytest.approx(values), name

    order = score_order(split, split.incoming)
    assert order["strict mrr"].tolist() == pytest.approx([1 / 3, 1 / 2, 1 / 2, 1])
    assert order["identity"].tolist() == [1, 1, 1, 1]
    results = [Result("prerank", None, order), Result("ar", 0, got), Result("cft", 0, got, 0.9)]
    row = row_of(results, "cft", 0)
    assert row["tokens_per_forward"] == 23 / 10
    assert row["strict"]["recall@1"] == 1 / 4 and row["served"]["recall@1"] == 1 / 2
    assert row["diff_to_ar"]["mrr"] == [None, 0, None]
    assert row["diff_to_opd"] is None


# --- Intervals --------------------------------------------------------------------------------

def test_paired_bootstrap_shrinks_with_pairing():
    rng = np.random.default_rng(1)
    user, noise = rng.normal(size=2000), 0.1 * rng.normal(size=2000)
    low, mean, high = paired_bootstrap(user + noise + 0.05, user)
    assert low < mean < high and mean == pytest.approx(0.05 + noise.mean())
    # The users' own spread cancels.
    assert high - low == pytest.approx(2 * 1.96 * 0.1 / 2000 ** 0.5, rel=0.1)


def test_where_few_users_differ_there_is_no_interval():
    few = np.zeros((1, 400))
    few[0, :49] = 1.0
    assert paired_interval(few) == ([None, 49 / 400, None], 49)
    few[0, 49] = -1.0
    (low, mean, high), n_differ = paired_interval(few)
    assert n_differ == 50 and low < mean == 48 / 400 < high
    # The differences of one seed may cancel those of another: these users differ all the same.
    for other in (-few, 0 * few):
        assert paired_interval(np.concatenate((few, other)))[1] == 50


def differences(rng, k, seeds, n=200, noise=0.7):
    """Draws (k, n) of mean 0: an effect of the user, one of the seed, whose spread in the mean is
    `seeds` times that of the users, and noise."""
    of_seed = seeds * rng.normal(size=(k, 1)) * (k / n) ** 0.5
    return of_seed + rng.normal(size=n) + noise * rng.normal(size=(k, n))


def test_the_interval_of_several_seeds_covers_the_mean_over_users_and_seeds():
    cases = [(2, 0), (2, 1), (2, 4), (2, 10), (3, 0), (3, 0.5), (3, 1), (3, 2), (3, 4), (3, 10),
             (5, 1), (5, 4)]
    for k, seeds in cases:
        rng, hits = np.random.default_rng(0), 0
        for _ in range(1000):
            (low, _, high), _ = paired_interval(differences(rng, k, seeds))
            hits += low <= 0 <= high
        assert 920 <= hits <= 985, (k, seeds, hits)


# --- Rows of several seeds --------------------------------------------------------------------

def scores_of(ndcg):
    """Scores of users whose metrics all have these values."""
    ndcg = np.asarray(ndcg, float)
    out = {"valid": np.ones(len(ndcg)), "identity": np.zeros(len(ndcg))}
    for metric in METRICS:
        out[f"served {metric}"] = out[f"strict {metric}"] = ndcg
    return out


def row_of(results, stage, seed="mean"):
    found = [row for row in report_rows(results, paired_interval)
             if row["stage"] == stage and row["seed"] == seed]
    assert len(found) == 1
    return found[0]


def unequal_seeds(n=120):
    """Seed 0 has all stages, seed 1 only AR and CFT, which are far better there."""
    rng = np.random.default_rng(0)
    base = {0: rng.uniform(0.1, 0.3, n), 1: rng.uniform(0.7, 0.9, n)}
    results = [Result("prerank", None, scores_of(np.full(n, 0.05)))]
    for seed, of_seed in base.items():
        results.append(Result("ar", seed, scores_of(of_seed)))
        results.append(Result("cft", seed, scores_of(of_seed + 0.01), 0.5))
    opd = scores_of(base[0] + 0.01 + 0.07 * rng.random(n))
    results.append(Result("opd", 0, opd, 0.5))
    return results, base


def test_a_mean_row_is_compared_with_the_mean_over_its_own_seeds():
    results, base = unequal_seeds()
    one, mean = row_of(results, "opd", 0), row_of(results, "opd")
    for name in ("diff_to_ar", "diff_to_cft", "diff_to_prerank", "differ_from_cft", "strict"):
        assert mean[name] == one[name], name  # of one seed, so its mean is its own row
    assert mean["seeds"] == [0] and row_of(results, "cft")["seeds"] == [0, 1]
    # The other way round, too: what CFT is compared with has seed 0 only.
    low, middle, high = mean["diff_to_cft"]["ndcg@10"]
    found = row_of(results, "cft")["diff_to_opd"]["ndcg@10"]
    assert found == pytest.approx([-high, -middle, -low], abs=1e-3) and middle > 0.02

    # A row of all seeds has their mean.
    cft, both = row_of(results, "cft"), (base[0] + base[1]) / 2
    assert cft["strict"]["ndcg@10"] == pytest.approx(both.mean() + 0.01)
    half = abs(base[1].mean() - base[0].mean()) / 2
    # A ranking without a seed is compared with every seed: their spread is in the interval.
    low, middle, high = row_of(results, "prerank")["diff_to_ar"]["ndcg@10"]
    assert middle == pytest.approx(0.05 - both.mean()) and high - low > 10 * half


def test_points_of_the_curve_are_no_partners():
    results, _ = unequal_seeds()
    point = Result("cft", 0, first_users(scores_of(np.ones(120)), 40), 0.9, on_curve=True)
    opd = results[-1:]
    assert partners(opd, [*results, point], "cft") == partners(opd, results, "cft")
    assert len(partners(opd, results, "cft")) == 1
