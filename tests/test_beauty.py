"""Counts, candidates and evidence of Amazon Beauty against plain loops, on synthetic files."""
import numpy as np
import pytest

import beauty
from beauty import FIELDS, STATED, Lists, merge_rare, prepare, rare
from amazon import read_beauty
from make_beauty import make_beauty
from prerank import FOLDS, Counts, link_pairs

K, HIST = beauty.K, beauty.HIST


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("beauty")
    make_beauty(folder, n_users=120)
    seqs, items, *_ = read_beauty(str(folder))
    return seqs, items, prepare(seqs, items)


def plain_counts(seqs, n_items):
    """T, C and popularity of sequences, as loops."""
    T, C, cnt = np.zeros((n_items, n_items)), np.zeros((n_items, n_items)), np.zeros(n_items)
    for s in seqs:
        np.add.at(cnt, s, 1)
        for a in range(len(s)):
            for b in range(a + 1, len(s)):
                v = len(s) ** -0.25 * (b - a) ** -0.75
                T[s[a], s[b]] += round(v * 65536) / 65536
                T[s[b], s[a]] += round(v / 8 * 65536) / 65536
                C[s[a], s[b]] += 1
                C[s[b], s[a]] += 1
    return T, C, cnt


def plain_score(T, cnt, history, item):
    return sum(k ** -1.5 * (cnt[h] + 10) ** -0.3 * T[h, item] for k, h in enumerate(reversed(history), 1))


def test_counts_are_those_of_the_loops_with_and_without_a_fold(files):
    seqs, items, _ = files
    for cut in (1, 3):
        counts = Counts(seqs, len(items), cut)
        for fold in (None, 0, FOLDS - 1):
            T, C, cnt = plain_counts([s[:-cut] for u, s in enumerate(seqs) if u % FOLDS != fold], len(items))
            if fold is None:
                found = counts.T.numpy(), counts.C.numpy(), counts.cnt
                assert all((a == b).all() for a, b in zip(found, (T, C, cnt)))
            else:
                with counts.without(fold):
                    assert (counts.T.numpy() == T).all() and (counts.C.numpy() == C).all() and (counts.cnt == cnt).all()
        T, C, cnt = plain_counts([s[:-cut] for s in seqs], len(items))
        assert (counts.T.numpy() == T).all() and (counts.cnt == cnt).all()  # and back again


@pytest.mark.parametrize("split, cut", [("train", 2), ("val", 1), ("test", 1)])
def test_the_evidence_knows_what_lies_before_the_target_and_nothing_of_the_user(files, split, cut):
    seqs, items, prepared = files
    lists = dict(zip(("train", "val", "test"), prepared))[split]
    rng = np.random.default_rng(0)
    for n in rng.choice(len(lists.user), 25, replace=False):
        user = lists.user[n]
        known = [s[:-cut] for u, s in enumerate(seqs) if split == "test" or u % FOLDS != user % FOLDS]
        T, C, cnt = plain_counts(known, len(items))
        if split == "train":  # which prefix it is follows from its history
            last = int((lists.hist[n] >= 0).argmin()) or HIST
            ends = [e for e in range(1, len(seqs[user]) - 2) if min(e, HIST) == last and (e <= HIST or seqs[user][e - 1] == lists.hist[n, 0])]
            end = ends[0]
        else:
            end = len(seqs[user]) - (2 if split == "val" else 1)
        history, target = list(seqs[user][:end]), seqs[user][end]
        assert lists.hist[n].tolist() == (history[::-1] + [-1] * HIST)[:HIST]
        place = np.flatnonzero(lists.cands[n] == target)
        assert lists.target[n] == (place[0] if len(place) else -1)
        assert not set(history) & set(lists.cands[n].tolist())
        scores = [plain_score(T, cnt, history, c) + cnt[c] * 1e-12 for c in lists.cands[n]]
        ev = {name: v[n] for name, v in lists.evidence.items()}
        for c, item in enumerate(lists.cands[n]):
            level = np.clip(2 * np.log2(max(scores[c], 1e-9) / max(scores)) + 7, 0, 7)
            assert abs(ev["link"][c] - level) <= 0.501
            assert ev["co"][c] == min(7, int(np.log2(C[history[-1], item] + 1)))
            assert ev["pop"][c] == min(7, int(np.log2(cnt[item] + 1)))
            assert ev["links"][c] == min(3, sum(T[h, item] > 0 for h in history[::-1][:HIST]))


def test_rare_combinations_become_their_nearest_frequent_neighbours():
    rng = np.random.default_rng(0)

    def lists(n):
        return Lists(None, None, None, None, {f: rng.integers(0, size, (n, K)).astype(np.uint8) for f, size in FIELDS.items()})

    train, other = lists(3000), lists(50)
    for name, value in (("link", 6), ("via", 1)):  # all but a few statements agree
        train.evidence[name][20:] = value
    train.evidence["link"][:20], train.evidence["via"][:20] = 0, 5
    train.evidence["link"][0, 0], train.evidence["via"][0, 0] = 7, 2  # once: rare
    before = {f: v.copy() for f, v in train.evidence.items()}
    nearest = rare(train)
    for part in (train, other):
        merge_rare(part, nearest)
    assert set(zip(train.evidence["link"].ravel(), train.evidence["via"].ravel())) == {(6, 1), (0, 5)}
    assert (train.evidence["link"][0, 0], train.evidence["via"][0, 0]) == (6, 1)
    pairs = np.stack((other.evidence["link"], other.evidence["via"]))
    assert set(map(tuple, pairs.reshape(2, -1).T.tolist())) <= {(6, 1), (0, 5)}
    alone = {f for f in FIELDS if not any(f in fields and len(fields) > 1 for fields in STATED.values())}
    assert all((train.evidence[f] == before[f]).all() for f in alone)


def test_links_of_an_empty_training_part_are_none():
    i, j, v, u = link_pairs([np.array([], int), np.array([3, 5])])
    assert (i.tolist(), j.tolist(), u.tolist()) == ([3, 5], [5, 3], [1, 1]) and np.isfinite(v).all()
