"""The pre-ranker of Amazon Beauty counts what users take together, and puts ten items first.

How strongly an item i of a history speaks for an item j is counted over users. T[i, j] grows with
every user who has both; it grows more if j came after i and if few items lie between them.

    score(j) = sum over the items i of the history, i the k-th most recent, k <= 50, of
               k^-1.5  (popularity of i + 10)^-0.3  T[i, j]

The training examples of a user are made with the counts of *other* users, dealt into 20 folds:
counts that know the user would leak the target.
"""
import contextlib
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from plumbing.settings import UserError

K = 10               # candidates kept
FOLDS = 20           # folds of users; user u is in fold u % FOLDS
REACH = 50           # how many items of a history a score looks at
FAR = 100            # items that are further apart have no link
TOGETHER = 1000      # examples scored at a time
MOST_ITEMS = 30_000  # the counts of n items take 16 n^2 bytes: 14 GB for so many


def check_size(sequences, n_items):
    """This refuses data that the pre-ranker has too few or too many of."""
    longest = max(len(items) for items in sequences)
    if n_items - longest < 4 * K or len(sequences) < FOLDS:
        raise UserError(f"the data is too small: there are {len(sequences)} users with 3 or more "
                        f"items and must be {FOLDS}; of {n_items} items a user has up to {longest} "
                        f"and must leave {4 * K}: pass --data_dir with larger data")
    if n_items > MOST_ITEMS:
        raise UserError(f"the data is too large: its counts take 16 bytes for every pair of its "
                        f"{n_items} items: leave rare items out, or raise MOST_ITEMS in "
                        "beauty/prerank.py")


# --- Counts -----------------------------------------------------------------------------------

def link_pairs(parts):
    """This returns the terms of T: i, j, value and user, each (P,).

    parts: the items of each user, one array each. Each two items of a user that are at most 100
    places apart give two terms. With j `gap` places after i among n items, T[i, j] gets the value
    n^-1/4 gap^-3/4, and T[j, i] an eighth of it: "j came before i" says less."""
    n = np.array([len(part) for part in parts])           # (users,)
    flat = np.concatenate(parts)                          # (M,) the items of all users
    user = np.repeat(np.arange(len(parts)), n)            # (M,)
    terms = []
    for gap in range(1, FAR + 1):
        same_user = user[gap:] == user[:-gap]             # (M - gap,)
        first = np.flatnonzero(same_user)                 # (pairs,)
        i, j, u = flat[first], flat[first + gap], user[first]
        value = n[u] ** -0.25 * gap ** -0.75              # (pairs,)
        terms.append((i, j, value, u))
        terms.append((j, i, 0.125 * value, u))
    i, j, value, u = (np.concatenate(column) for column in zip(*terms))
    # Multiples of 2^-16 are added exactly in float32, in any order. So if we take the users of a
    # fold out of T, it is what it would be without them; a rounding error would leak the target.
    value = np.round(value * 65536) / 65536
    return i, j, value, u


class Counts:
    """Counts of all sequences without their last `cut` items.

    T (I, I) float32 has the summed links, C (I, I) their number, cnt (I,) how often each item
    occurs."""

    def __init__(self, sequences, n_items, cut):
        parts = [items[:-cut] for items in sequences]
        i, j, value, self.user = link_pairs(parts)        # (P,) each
        self.cell = torch.from_numpy(i * n_items + j)     # (P,) place in T, taken as one long row
        self.value = torch.from_numpy(value).float()      # (P,)
        self.items_of_fold = [np.concatenate(parts[fold::FOLDS]) for fold in range(FOLDS)]
        self.T = torch.zeros(n_items, n_items)
        self.C = torch.zeros(n_items, n_items)
        self.cnt = np.bincount(np.concatenate(parts), minlength=n_items)
        self._add(slice(None), 1)

    def _add(self, rows, sign):
        cell, value = self.cell[rows], self.value[rows]   # (p,) each
        self.T.view(-1).index_add_(0, cell, sign * value)
        self.C.view(-1).index_add_(0, cell, sign * torch.ones_like(value))

    @contextlib.contextmanager
    def without(self, fold):
        """Inside this context the counts are those of all users but the fold's."""
        rows = torch.from_numpy(self.user % FOLDS == fold)                         # (P,)
        times = np.bincount(self.items_of_fold[fold], minlength=len(self.cnt))     # (I,)
        self._add(rows, -1)
        self.cnt -= times
        yield
        self._add(rows, 1)
        self.cnt += times


# --- Scores -----------------------------------------------------------------------------------

@dataclass
class Histories:
    """N histories. Each is flat[start : start + length], oldest item first."""
    flat: np.ndarray    # (M,) the items of all users, end to end
    start: np.ndarray   # (N,)
    length: np.ndarray  # (N,)

    def take(self, rows):
        return Histories(self.flat, self.start[rows], self.length[rows])

    def recent(self, n):
        """The last n items (N, n), most recent first; -1 where a history is shorter."""
        place = self.length[:, None] - 1 - np.arange(n)   # (N, n) in the history; negative: none
        at = self.start[:, None] + np.maximum(place, 0)   # (N, n)
        return np.where(place >= 0, self.flat[at], -1)

    def next_item(self):
        """The item (N,) that follows each history."""
        return self.flat[self.start + self.length]


def all_scores(counts, histories):
    """The scores (N, I) of all items after N histories; -1 for the items of the history."""
    n = histories.length                                  # (N,)
    example = np.repeat(np.arange(len(n)), n)             # (M,) whose history an item is in
    offset = np.cumsum(n) - n                             # (N,) where each history begins
    place = np.arange(n.sum()) - offset[example]          # (M,) 0, 1, ... within the history
    item = histories.flat[histories.start[example] + place]     # (M,)
    k = n[example] - place                                # (M,) 1 = the most recent
    spread = (counts.cnt + 10.0) ** -0.3                  # (I,) a popular item says less
    weight = np.where(k <= REACH, k ** -1.5 * spread[item], 0)  # (M,)
    # Row n of the result is the sum of weight * T[item] over the items of history n.
    scores = F.embedding_bag(
        torch.from_numpy(item), counts.T, torch.from_numpy(offset), mode="sum",
        per_sample_weights=torch.from_numpy(weight).float())    # (N, I)
    scores[example, item] = -1
    scores += torch.from_numpy(counts.cnt * 1e-12).float()  # without any link: by popularity
    return scores


def score_parts(counts, histories):
    """This yields (rows, scores of all items after these rows), at most TOGETHER rows at a time."""
    n = max(1, len(histories.length))  # of no histories there is one part, without rows
    for first in range(0, n, TOGETHER):
        rows = slice(first, first + TOGETHER)
        yield rows, all_scores(counts, histories.take(rows))


def top_candidates(counts, histories):
    """The K items (N, K) that score highest after each of N histories, the best first."""
    found = []
    for _, scores in score_parts(counts, histories):
        top, items = (x.numpy() for x in scores.topk(4 * K))    # (n, 4 K) each
        # Scores that are equal up to rounding (2^-12 of an octave) are ties. Popularity breaks
        # them, then the shuffled item number.
        level = np.round(np.log2(np.maximum(top, 1e-9)) * 4096)  # (n, 4 K)
        order = np.lexsort((items, -counts.cnt[items], -level))[:, :K]
        found.append(np.take_along_axis(items, order, 1))       # (n, K)
    return np.concatenate(found)


def scores_among(counts, histories, items):
    """The scores (N, n) of given items (N, n) after N histories."""
    found = []
    for rows, scores in score_parts(counts, histories):
        found.append(np.take_along_axis(scores.numpy(), items[rows], 1))
    return np.concatenate(found)
