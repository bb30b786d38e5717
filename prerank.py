"""Amazon Beauty's pre-ranker: counts over the sequences, and the candidates that they put first.

A user's training examples use the counts of *other* users (20 folds): counts that know the user would leak the target.
"""
import contextlib

import numpy as np
import torch
import torch.nn.functional as F

K = 10      # candidates kept
FOLDS = 20  # user folds of the counts


def link_pairs(parts):
    """T's terms, one for each ordered pair of items of a user's training part that are <= 100 steps apart.
    parts: list of item arrays -> i, j, value, user, each (P,)."""
    n = np.array([len(p) for p in parts])
    flat, user = np.concatenate(parts), np.repeat(np.arange(len(parts)), n)
    out = []
    for gap in range(1, 101):
        at = np.flatnonzero(user[gap:] == user[:-gap])         # pairs (at, at + gap) within one user
        i, j, u = flat[at], flat[at + gap], user[at]
        v = n[u] ** -0.25 * gap ** -0.75
        out += [(i, j, v, u), (j, i, 0.125 * v, u)]            # "j came before i" is weak evidence for j
    i, j, v, u = (np.concatenate(c) for c in zip(*out))
    # Multiples of 2^-16 keep float32 sums exact in any order: taking a fold's users out of T leaves what T
    # would be had they never been there, true zeros included. A rounding residue would leak the target.
    return i, j, np.round(v * 65536) / 65536, u


def attributes(items):
    """-> (n_items, 4) ids of brand (0 = unknown), level 1, level 2, full path (equal ids = equal names)."""
    cols = [[b for b, _ in items], [p[:1] for _, p in items], [p[:2] for _, p in items], [p for _, p in items]]
    number = [{v: i for i, v in enumerate(sorted(set(c)))} for c in cols]
    if "" not in number[0]:
        number[0] = {b: i + 1 for b, i in number[0].items()}
    return np.stack([[num[v] for v in c] for num, c in zip(number, cols)], 1)


def prerank(T, cnt, flat, start, end, attr=None, among=None):
    """Top K next items after flat[start : start + end] for N examples.
    score(j) = sum_{k=1..50} k^-1.5 (cnt[h_-k] + 10)^-0.3 T[h_-k, j], seen items excluded.
    T (I, I); cnt (I,); start, end (N,); attr: attributes(), for the hybrid -> items (N, K).
    among (N, K): the scores (N, K) of these items instead, as they stand."""
    found, spread = [], (cnt + 10.0) ** -0.3
    for a in range(0, max(1, len(end)), 1000):
        s, n = start[a:a + 1000], end[a:a + 1000]
        row, offset = np.repeat(np.arange(len(n)), n), np.cumsum(n) - n
        step = np.arange(n.sum()) - offset[row]                # 0.. within the row
        h, k = flat[s[row] + step], n[row] - step              # k = 1: the most recent
        w = np.where(k <= 50, k ** -1.5 * spread[h], 0)
        bag = lambda table, w: F.embedding_bag(torch.from_numpy(h), table, torch.from_numpy(offset), mode="sum",
                                               per_sample_weights=torch.from_numpy(w).float())
        S = bag(T, w)                                          # (n, I) weighted sums of T's rows
        if attr is not None:                                   # recency-weighted share of equal attributes
            recency = np.where(k <= 50, 1 / k, 0)
            recency /= np.bincount(row, recency)[row]
            for col, gain in ((3, 0.3), (2, 0.3), (0, 1.0)):
                onehot = F.one_hot(torch.from_numpy(attr[:, col])).float()
                if col == 0:
                    onehot[:, 0] = 0                           # unknown brands are not equal
                S *= 1 + gain * bag(onehot, recency)[:, attr[:, col]]
        S[row, h] = -1
        S += torch.from_numpy(cnt * 1e-12).float()             # without any link: by popularity
        if among is not None:
            found.append(np.take_along_axis(S.numpy(), among[a:a + 1000], 1))
            continue
        top, idx = (x.numpy() for x in S.topk(4 * K))
        tie = np.round(np.log2(np.maximum(top, 1e-9)) * 4096)  # scores equal up to rounding are ties ...
        order = np.lexsort((idx, -cnt[idx], -tie))[:, :K]      # ... broken by popularity, then by permuted id
        found.append(np.take_along_axis(idx, order, 1))
    return np.concatenate(found)


class Counts:
    """What the sequences without their last `cut` items say: T summed links, C number of links (I, I), cnt popularity (I,)."""

    def __init__(self, seqs, n_items, cut):
        parts = [s[:-cut] for s in seqs]
        i, j, v, self.user = link_pairs(parts)
        self.cell, self.v = torch.from_numpy(i * n_items + j), torch.from_numpy(v).float()
        self.seen = [np.concatenate(parts[f::FOLDS]) for f in range(FOLDS)]
        self.T, self.C = torch.zeros(2, n_items, n_items)
        self.cnt = np.bincount(np.concatenate(parts), minlength=n_items)
        self._add(slice(None), 1)

    def _add(self, rows, sign):
        cell = self.cell[rows]
        self.T.view(-1).index_add_(0, cell, sign * self.v[rows])
        self.C.view(-1).index_add_(0, cell, torch.full((len(cell),), float(sign)))

    @contextlib.contextmanager
    def without(self, fold):
        """The counts of all users but those of a fold."""
        rows, seen = torch.from_numpy(self.user % FOLDS == fold), np.bincount(self.seen[fold], minlength=len(self.cnt))
        self._add(rows, -1)
        self.cnt -= seen
        yield
        self._add(rows, 1)
        self.cnt += seen
