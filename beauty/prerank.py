"""Amazon Beauty's pre-ranker: counts over the sequences, and the candidates that they put first.

How strongly item i of a history speaks for item j is counted over users: T[i, j] grows for every
user who has both, more if j came after i and if few items lie between them.

    score(j) = sum over the history's items i, the k-th most recent, k <= 50, of
               k^-1.5  (popularity of i + 10)^-0.3  T[i, j]

A user's training examples use the counts of *other* users (20 folds): counts that know the user
would leak the target.
"""
import contextlib
import os
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from plumbing.settings import UserError

K = 10           # candidates kept
FOLDS = 20       # user folds of the counts
REACH = 50       # history items that a score looks at
TOGETHER = 1000  # examples scored at a time


def check_size(sequences, n_items):
    """Raises UserError for data that the pre-ranker has too few or too many of."""
    longest = max(len(s) for s in sequences)
    if n_items - longest < 4 * K:
        raise UserError(f"the data is too small: of its {n_items} items a user has up to "
                        f"{longest}, and the pre-ranker needs {4 * K} others to choose from; pass "
                        "--data_dir with larger data")
    if len(sequences) < FOLDS:
        raise UserError(f"the data is too small: {len(sequences)} users with 3 or more items, and "
                        f"the counts need {FOLDS}; pass --data_dir with larger data")
    needed = 16 * n_items ** 2  # bytes: T and C, in float32, before and after an item a user
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > there:
        raise UserError(f"the data is too large: the counts of {n_items} items take "
                        f"{needed / 1e9:.1f} GB, and this machine has {there / 1e9:.1f}; leave "
                        "rare items out of items.tsv and sequences.txt")


# --- Counts -----------------------------------------------------------------------------------

def link_pairs(parts):
    """T's terms, one for each ordered pair of items of a user that are <= 100 places apart.

    parts: the item arrays of the users -> i, j, value, user, each (P,). With j `gap` places after
    i among n items, the value is n^-1/4 gap^-3/4; in the other direction an eighth of it."""
    n = np.array([len(p) for p in parts])
    flat = np.concatenate(parts)
    user = np.repeat(np.arange(len(parts)), n)
    out = []
    for gap in range(1, 101):
        at = np.flatnonzero(user[gap:] == user[:-gap])  # pairs (at, at + gap) within one user
        i, j, u = flat[at], flat[at + gap], user[at]
        value = n[u] ** -0.25 * gap ** -0.75
        out.append((i, j, value, u))
        out.append((j, i, 0.125 * value, u))            # "j came before i" is weak evidence for j
    i, j, value, u = (np.concatenate(column) for column in zip(*out))
    # Multiples of 2^-16 keep float32 sums exact in any order: taking a fold's users out of T leaves
    # what T would be had they never been there, true zeros included. A rounding residue would leak
    # the target.
    return i, j, np.round(value * 65536) / 65536, u


class Counts:
    """What the sequences without their last `cut` items say.

    T (I, I) float32: summed links; C (I, I): number of links; cnt (I,) int: popularity."""

    def __init__(self, sequences, n_items, cut):
        parts = [s[:-cut] for s in sequences]
        i, j, value, self.user = link_pairs(parts)
        self.cell = torch.from_numpy(i * n_items + j)  # of T and C, as one long row
        self.value = torch.from_numpy(value).float()
        self.seen = [np.concatenate(parts[fold::FOLDS]) for fold in range(FOLDS)]
        self.T, self.C = torch.zeros(2, n_items, n_items)
        self.cnt = np.bincount(np.concatenate(parts), minlength=n_items)
        self._add(slice(None), 1)

    def _add(self, rows, sign):
        cell, value = self.cell[rows], self.value[rows]
        self.T.view(-1).index_add_(0, cell, sign * value)
        self.C.view(-1).index_add_(0, cell, sign * torch.ones_like(value))

    @contextlib.contextmanager
    def without(self, fold):
        """The counts of all users but those of a fold (user number % FOLDS)."""
        rows = torch.from_numpy(self.user % FOLDS == fold)
        seen = np.bincount(self.seen[fold], minlength=len(self.cnt))
        self._add(rows, -1)
        self.cnt -= seen
        yield
        self._add(rows, 1)
        self.cnt += seen


# --- Scores -----------------------------------------------------------------------------------

@dataclass
class Histories:
    """N histories, each flat[start : start + length], oldest item first."""
    flat: np.ndarray    # the items of all users, end to end
    start: np.ndarray   # (N,)
    length: np.ndarray  # (N,)

    def take(self, rows):
        return Histories(self.flat, self.start[rows], self.length[rows])

    def recent(self, n):
        """(N, n) the last n items, most recent first, -1 where a history is shorter."""
        place = self.length[:, None] - 1 - np.arange(n)   # in the history; negative: none
        at = self.start[:, None] + np.maximum(place, 0)
        return np.where(place >= 0, self.flat[at], -1)


def attributes(items):
    """-> (n_items, 4) ids of brand (0 = unknown), level 1, level 2, full path of the category.
    Equal ids are equal names."""
    columns = [[brand for brand, _ in items]]
    for depth in (1, 2, None):
        columns.append([path[:depth] for _, path in items])
    numbered = []
    for names in columns:
        different = sorted(set(names))
        first = 1 if names is columns[0] and "" not in different else 0  # brand 0 is unknown
        id_of = {name: first + i for i, name in enumerate(different)}
        numbered.append([id_of[name] for name in names])
    return np.stack(numbered, 1)


def weighted_rows(table, item, offset, weight):
    """Row n of the result is the sum of weight * table[item] over the history of example n.

    As a matrix product: W @ table, where W (n, I) holds an example's weights at its items and is 0
    elsewhere. embedding_bag does that without W: item and weight hold the examples' entries end to
    end, and offset (n,) says where each example begins."""
    weight = torch.from_numpy(weight).float()
    return F.embedding_bag(torch.from_numpy(item), table, torch.from_numpy(offset), mode="sum",
                           per_sample_weights=weight)


def all_scores(counts, histories, attr=None):
    """Scores (N, I) of all items after N histories; -1 for those that a history has.

    attr: attributes(), for the hybrid, which also rewards equal brands and categories."""
    n = histories.length
    example = np.repeat(np.arange(len(n)), n)           # of each entry: whose history it is in
    offset = np.cumsum(n) - n
    place = np.arange(n.sum()) - offset[example]        # 0, 1, ... within the history
    item = histories.flat[histories.start[example] + place]
    k = n[example] - place                              # 1 = the most recent
    spread = (counts.cnt + 10.0) ** -0.3                # a popular item says less
    weight = np.where(k <= REACH, k ** -1.5 * spread[item], 0)
    scores = weighted_rows(counts.T, item, offset, weight)
    if attr is not None:
        recency = np.where(k <= REACH, 1 / k, 0)
        recency /= np.bincount(example, recency)[example]   # sums to 1 over a history
        for column, gain in ((3, 0.3), (2, 0.3), (0, 1.0)):
            table = F.one_hot(torch.from_numpy(attr[:, column])).float()
            if column == 0:
                table[:, 0] = 0                         # unknown brands are not equal
            share = weighted_rows(table, item, offset, recency)  # of a history, for each id
            scores *= 1 + gain * share[:, attr[:, column]]
    scores[example, item] = -1
    scores += torch.from_numpy(counts.cnt * 1e-12).float()  # without any link: by popularity
    return scores


def score_parts(counts, histories, attr):
    """Yields (rows, scores (rows, I)), TOGETHER examples at a time; once with no rows if N = 0."""
    for first in range(0, max(1, len(histories.length)), TOGETHER):
        rows = slice(first, first + TOGETHER)
        yield rows, all_scores(counts, histories.take(rows), attr)


def top_candidates(counts, histories, attr=None):
    """The K items that score highest after each of N histories -> (N, K)."""
    found = []
    for _, scores in score_parts(counts, histories, attr):
        top, items = (x.numpy() for x in scores.topk(4 * K))
        # Scores that are equal up to rounding (2^-12 of an octave) are ties. Popularity breaks
        # them, then the shuffled item number.
        level = np.round(np.log2(np.maximum(top, 1e-9)) * 4096)
        order = np.lexsort((items, -counts.cnt[items], -level))[:, :K]
        found.append(np.take_along_axis(items, order, 1))
    return np.concatenate(found)


def scores_among(counts, histories, items, attr=None):
    """The scores (N, n) of given items (N, n) after N histories."""
    found = []
    for rows, scores in score_parts(counts, histories, attr):
        found.append(np.take_along_axis(scores.numpy(), items[rows], 1))
    return np.concatenate(found)
