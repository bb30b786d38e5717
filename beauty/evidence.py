"""The candidate lists of Amazon Beauty, and the evidence of each candidate.

All evidence is computed from counts over the sequences (prerank.py) and from brands and category
paths. A trace states it; tokens.py says how.
"""
from dataclasses import dataclass

import numpy as np

from beauty.prerank import FOLDS, K, Counts, Histories, scores_among, top_candidates

HIST = 8        # history items shown
FIELDS = dict(  # the evidence of a candidate: name -> number of values
    pos=K + 1,     # 1..10, its place in the list (its label)
    pop=8,         # log2 of its count
    link=8,        # its score relative to the best: 7 = within 2^-1/4, then half an octave a level
    via=HIST + 1,  # which history item adds most to the score: 1 = the most recent, 0 = none
    co=8,          # log2 of the users who have it and the most recent item, in any order
    links=4,       # how many of the 8 history items link to it: 0, 1, 2, 3+
    brand=8,       # 0 unknown, 1 new; else 1, 2, 3+ history items of it: 2, 4, 6, +1 if the last is
    depth=4,       # levels of its category path shared with the most recent item, 3 = the full path
    leaf=4)        # how many of the 8 history items have its full path: 0, 1, 2, 3+
STATED = {      # token of a trace -> the fields it states
    "depth": ("depth",),
    "leaf": ("leaf",),
    "link": ("link", "via"),
    "co": ("co", "links", "pop")}
RARE = 2000     # see rare


# --- Evidence of a candidate ------------------------------------------------------------------

def attributes(items):
    """The ids (I, 4) of each item's brand (0 = unknown), level 1, level 2 and full path of its
    category. In a column, equal ids are equal names."""
    id_of, rows = {"": 0}, []
    for brand, path in items:
        names = [brand, path[:1], path[:2], path]
        rows.append([id_of.setdefault(name, len(id_of)) for name in names])
    return np.array(rows)


def link_evidence(counts, hist, cands, scores):
    """The evidence (N, 10) that only the counts know, a dict.

    hist (N, 8) are the history items, cands and scores (N, 10) the candidates."""
    there = hist >= 0                                                  # (N, 8)
    spread = (counts.cnt[hist] + 10.0) ** -0.3                         # (N, 8)
    weight = np.arange(1, HIST + 1) ** -1.5 * spread * there           # (N, 8)
    strength = counts.T.numpy()[hist[:, :, None], cands[:, None]]      # (N, 8, 10)
    strength = strength * there[:, :, None]                            # (N, 8, 10)
    part = strength * weight[:, :, None]         # (N, 8, 10) what an item adds to the score
    best = scores.max(1, keepdims=True)                                # (N, 1)
    share = scores / best.clip(1e-30)                                  # (N, 10)
    octaves = np.log2(np.maximum(share, 1e-9))                         # (N, 10)
    together = counts.C.numpy()[hist[:, :1], cands]                    # (N, 10)
    return dict(
        pos=np.broadcast_to(np.arange(1, K + 1), cands.shape),
        pop=np.log2(counts.cnt[cands] + 1).clip(0, 7),
        link=np.round(2 * octaves + 7).clip(0, 7),
        via=np.where(part.max(1) > 0, part.argmax(1) + 1, 0),
        co=np.floor(np.log2(together + 1)).clip(0, 7),
        links=(strength > 0).sum(1).clip(0, 3))


def attribute_evidence(attr, hist, cands):
    """The evidence (N, 10) that follows from brands and category paths, a dict."""
    of_history = attr[hist][:, :, None]                                # (N, 8, 1, 4)
    of_candidate = attr[cands][:, None]                                # (N, 1, 10, 4)
    there = (hist >= 0)[:, :, None, None]                              # (N, 8, 1, 1)
    same = (of_history == of_candidate) & there                        # (N, 8, 10, 4)
    known = attr[cands][:, :, 0] > 0                                   # (N, 10)
    n_brand = same[..., 0].sum(1)                                      # (N, 10)
    is_last = same[:, 0, :, 0]                                         # (N, 10)
    brand = np.where(n_brand > 0, 2 * n_brand.clip(0, 3) + is_last, 1)  # (N, 10)
    return dict(
        brand=np.where(known, brand, 0),
        depth=same[:, 0, :, 1:].sum(-1),
        leaf=same[..., 3].sum(1).clip(0, 3))


# --- Lists of candidates ----------------------------------------------------------------------

ARRAYS = ("user", "hist", "cands", "target", "score")  # the fields of Lists, but for the evidence


@dataclass
class Lists:
    """N lists of candidates."""
    user: np.ndarray    # (N,)
    hist: np.ndarray    # (N, 8) items, most recent first, -1 absent
    cands: np.ndarray   # (N, 10) items in pre-ranked order
    target: np.ndarray  # (N,) place of the true next item in cands, -1 if it is not there
    score: np.ndarray   # (N, 10) float32, by the counts of the evidence; later by the writer
    evidence: dict      # name -> (N, 10) uint8

    def take(self, rows):
        evidence = {name: values[rows] for name, values in self.evidence.items()}
        arrays = [getattr(self, name)[rows] for name in ARRAYS]
        return Lists(*arrays, evidence)


def joined(parts):
    """Several Lists as one."""
    evidence = {}
    for name in FIELDS:
        evidence[name] = np.concatenate([part.evidence[name] for part in parts])
    arrays = [np.concatenate([getattr(part, name) for part in parts]) for name in ARRAYS]
    return Lists(*arrays, evidence)


def make_lists(counts, attr, user, histories, cands, target):
    """Lists of given candidates (N, 10), with the evidence of these counts."""
    hist = histories.recent(HIST)                                      # (N, 8)
    scores = scores_among(counts, histories, cands)                    # (N, 10)
    evidence = link_evidence(counts, hist, cands, scores)
    evidence.update(attribute_evidence(attr, hist, cands))
    evidence = {name: values.astype(np.uint8) for name, values in evidence.items()}
    return Lists(user, hist, cands, target, scores, evidence)


class Data:
    """The sequences of all users, and the attributes of the items."""

    def __init__(self, sequences, items):
        self.attr = attributes(items)                                  # (I, 4)
        self.flat = np.concatenate(sequences)                          # (M,) end to end
        self.length = np.array([len(items) for items in sequences])    # (users,)
        self.start = np.cumsum(self.length) - self.length              # (users,)

    def find(self, older, newer, user, length, hits_only=False):
        """Lists after the first length (N,) items of the users (N,).

        The older counts find the candidates, the newer ones give the evidence. With hits_only, the
        lists without their target are left out."""
        histories = Histories(self.flat, self.start[user], length)
        cands = top_candidates(older, histories)                       # (N, 10)
        hit = cands == histories.next_item()[:, None]                  # (N, 10)
        target = np.where(hit.any(1), hit.argmax(1), -1)               # (N,)
        rows = np.flatnonzero(hit.any(1)) if hits_only else np.arange(len(user))
        return make_lists(
            newer, self.attr, user[rows], histories.take(rows), cands[rows], target[rows])


# --- Who knows what ---------------------------------------------------------------------------
# The last items of a user's sequence, and what is counted of it:
#
#     ... u  w  x  v  t        t: target in test, v: in validation, x and those before: in training
#     =======>                 cut 3: without the last three items
#     ==========>              cut 2: the training part
#     =============>           cut 1: all but the test target
#
#              target      candidates: counts of       evidence: counts of
#     train    up to x     other users, cut 3          other users, cut 2
#     val      v           all users,   cut 2          other users, cut 1
#     test     t           all users,   cut 2          all users,   cut 1
#
# No counts know the user's own target: where they reach it, they are those of other users. The
# evidence is newer than the pre-ranker, as in real systems: it knows one more item of every user.
# Training lists are made like that too, so that they look like those of validation and test.

def prefixes(data, users):
    """Every history of the users' training parts that has a target in it: user and length, both
    (N,). A sequence of n items has those of 1 to n - 3 items."""
    n = data.length[users] - 3                                         # (users,)
    user = np.repeat(users, n)                                         # (N,)
    first = np.repeat(np.cumsum(n) - n, n)       # (N,) row where the user's prefixes begin
    length = np.arange(len(user)) - first + 1                          # (N,)
    return user, length


def prepare(sequences, items):
    """The Lists of training, validation and test.

    Training has every prefix. Validation and test have the users whose target is among the
    candidates, since a re-ranker can do nothing for the others."""
    data = Data(sequences, items)
    everyone = np.arange(len(sequences))
    folds = [everyone[fold::FOLDS] for fold in range(FOLDS)]
    cut3 = Counts(sequences, len(items), 3)
    cut2 = Counts(sequences, len(items), 2)
    train = []
    for fold, users in enumerate(folds):
        with cut3.without(fold), cut2.without(fold):
            train.append(data.find(cut3, cut2, *prefixes(data, users)))

    del cut3  # a table of counts is large
    cut1 = Counts(sequences, len(items), 1)
    val = []
    for fold, users in enumerate(folds):
        with cut1.without(fold):
            val.append(data.find(cut2, cut1, users, data.length[users] - 2, hits_only=True))
    test = data.find(cut2, cut1, everyone, data.length - 1, hits_only=True)
    return joined(train), joined(val), test


# --- Rare combinations ------------------------------------------------------------------------
# A word that training hardly ever shows cannot be copied from the prompt; most of the traces that
# failed did so at such a word. So we round the evidence that shares a token to combinations that
# training has at least once in RARE statements. Nothing is lost by it.
#
#     link:0,3 (a weak link, most of it by the third item)  ->  link:0,2

def number(evidence, fields):
    """The number (N, 10) of each combination of values, in the order of tokens.beauty_words."""
    values = [evidence[field] for field in fields]
    return np.ravel_multi_index(values, [FIELDS[field] for field in fields])


def rare(train):
    """What each combination becomes: the nearest one that is kept, by the sum of differences.

    It returns, for each name in STATED, an array (fields, combinations) of values, uint8."""
    nearest = {}
    for name, fields in STATED.items():
        value = np.indices([FIELDS[field] for field in fields])
        value = value.reshape(len(fields), -1)                         # (fields, combinations)
        numbers = number(train.evidence, fields).ravel()               # (N 10,)
        times = np.bincount(numbers, minlength=value.shape[1])         # (combinations,)
        kept = np.flatnonzero(times * RARE >= times.sum())             # (kept,)
        apart = np.abs(value[:, :, None] - value[:, None, kept]).sum(0)  # (combinations, kept)
        apart = apart - times[kept] / times.sum()                      # ties: the more frequent
        becomes = kept[apart.argmin(1)]                                # (combinations,)
        nearest[name] = value[:, becomes].astype(np.uint8)
    return nearest


def merge_rare(lists, nearest):
    """This rounds the evidence of lists, in place. nearest: see rare."""
    for name, fields in STATED.items():
        rounded = nearest[name][:, number(lists.evidence, fields)]     # (fields, N, 10)
        lists.evidence.update(zip(fields, rounded))
