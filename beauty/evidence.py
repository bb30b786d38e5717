"""Amazon Beauty: the candidate lists and the evidence of each candidate.

Everything is computed from counts over the sequences (prerank.py). A trace states the evidence;
tokens.py says how.
"""
from dataclasses import dataclass, fields as fields_of

import numpy as np

from beauty.prerank import FOLDS, K, Counts, Histories, attributes, scores_among, top_candidates

HIST = 8        # history items shown
FIELDS = dict(  # evidence of a candidate: name -> number of values
    pos=K + 1,     # 1..10, place in the pre-ranked list (its label)
    pop=8,         # log2 of its count
    link=8,        # score relative to the best: 7 = within 2^-1/4, then half an octave a level
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

def octaves(x):
    return np.log2(np.maximum(x, 1e-9))


def link_evidence(counts, hist, cands, scores):
    """Evidence that only the counts know: hist (N, 8), cands and scores (N, 10)
    -> dict of (N, 10)."""
    there = hist >= 0
    spread = (counts.cnt[hist] + 10.0) ** -0.3
    weight = np.arange(1, HIST + 1) ** -1.5 * spread * there                    # (N, 8)
    strength = counts.T.numpy()[hist[:, :, None], cands[:, None]]               # (N, 8, 10)
    strength = strength * there[:, :, None]
    part = strength * weight[:, :, None]          # what each history item adds to the score
    best = scores.max(1, keepdims=True).clip(1e-30)  # 0 where no item is known
    together = counts.C.numpy()[hist[:, :1], cands]                             # (N, 10)
    return dict(
        pos=np.broadcast_to(np.arange(1, K + 1), cands.shape),
        pop=np.log2(counts.cnt[cands] + 1).clip(0, 7),
        link=np.round(2 * octaves(scores / best) + 7).clip(0, 7),
        via=np.where(part.max(1) > 0, part.argmax(1) + 1, 0),
        co=np.floor(np.log2(together + 1)).clip(0, 7),
        links=(strength > 0).sum(1).clip(0, 3))


def attribute_evidence(attr, hist, cands):
    """Evidence that can be read off brands and category paths. -> dict of (N, 10)."""
    of_history = attr[hist][:, :, None]                               # (N, 8, 1, 4)
    of_candidate = attr[cands][:, None]                               # (N, 1, 10, 4)
    same = (of_history == of_candidate) & (hist >= 0)[:, :, None, None]
    known = of_candidate[:, 0, :, 0] > 0                              # (N, 10)
    n_brand = same[..., 0].sum(1)                                     # (N, 10)
    not_last = 1 - same[:, 0, :, 0]                                   # (N, 10)
    brand = 1 + 2 * n_brand.clip(0, 3)                                # 1, 3, 5, 7
    brand = np.where(n_brand > 0, brand - not_last, brand)            # 2, 4, 6: not the last item
    return dict(brand=np.where(known, brand, 0),
                depth=same[:, 0, :, 1:].sum(-1),
                leaf=same[..., 3].sum(1).clip(0, 3))


# --- Lists of candidates ----------------------------------------------------------------------

@dataclass
class Lists:
    """N candidate lists of one split."""
    user: np.ndarray          # (N,)
    hist: np.ndarray          # (N, 8) items, most recent first, -1 absent
    cands: np.ndarray         # (N, 10) items in pre-rank order
    target: np.ndarray        # (N,) place of the true next item in cands, -1 if it is not there
    evidence: dict            # name -> (N, 10) uint8
    score: np.ndarray = None  # (N, 10) float32, the writer's

    def take(self, rows):
        evidence = {name: values[rows] for name, values in self.evidence.items()}
        score = None if self.score is None else self.score[rows]
        return Lists(self.user[rows], self.hist[rows], self.cands[rows], self.target[rows],
                     evidence, score)


def joined(parts):
    """Several Lists, without scores, as one."""
    arrays, evidence = [], {}
    for name in ("user", "hist", "cands", "target"):
        arrays.append(np.concatenate([getattr(part, name) for part in parts]))
    for name in parts[0].evidence:
        evidence[name] = np.concatenate([part.evidence[name] for part in parts])
    return Lists(*arrays, evidence)


@dataclass
class Found:
    """Candidates after N histories."""
    user: np.ndarray    # (N,)
    length: np.ndarray  # (N,) of the history: the target is the item after it
    cands: np.ndarray   # (N, 10)
    target: np.ndarray  # (N,) its place in cands, -1 if it is not there

    def take(self, rows):
        return Found(*(getattr(self, field.name)[rows] for field in fields_of(self)))


class Data:
    """The sequences end to end, with what the functions below need to know of them."""

    def __init__(self, sequences, items, hybrid):
        self.attr, self.hybrid = attributes(items), hybrid
        self.flat = np.concatenate(sequences)
        self.length = np.array([len(s) for s in sequences])
        self.start = np.cumsum(self.length) - self.length

    def histories(self, user, length):
        return Histories(self.flat, self.start[user], length)

    def find(self, counts, user, length):
        """Candidates (Found) after the first `length` items of users, both (N,)."""
        histories = self.histories(user, length)
        cands = top_candidates(counts, histories, self.attr if self.hybrid else None)
        next_item = self.flat[self.start[user] + length]
        hit = cands == next_item[:, None]                             # (N, 10)
        target = np.where(hit.any(1), hit.argmax(1), -1)
        return Found(user, length, cands, target)

    def lists(self, counts, found):
        """Found -> Lists, with the evidence of these counts; and the pre-ranker's scores."""
        histories = self.histories(found.user, found.length)
        return make_lists(counts, self.attr, self.hybrid, histories, found)


def make_lists(counts, attr, hybrid, histories, found):
    """Lists (N) of found candidates, and the scores (N, 10) that the pre-ranker gives them with
    these counts. Items beyond the counts share the counts' last row."""
    last = len(counts.cnt) - 1
    hist = histories.recent(HIST)
    counted = Histories(np.minimum(histories.flat, last), histories.start, histories.length)
    cands = np.minimum(found.cands, last)
    scores = scores_among(counts, counted, cands, attr if hybrid else None)
    evidence = (link_evidence(counts, np.minimum(hist, last), cands, scores)
                | attribute_evidence(attr, hist, found.cands))
    evidence = {name: values.astype(np.uint8) for name, values in evidence.items()}
    return Lists(found.user, hist, found.cands, found.target, evidence), scores


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

def train_lists(data, older, newer):
    """A list for every prefix of the training part. older: counts with cut 3, newer: cut 2."""
    parts, everyone = [], np.arange(len(data.length))
    for fold in range(FOLDS):                    # a user is never scored by counts that know him
        users = everyone[fold::FOLDS]
        n = data.length[users] - 3               # prefixes of 1 .. n items
        user = np.repeat(users, n)
        first = np.repeat(np.cumsum(n) - n, n)   # where the user's prefixes begin
        length = np.arange(len(user)) - first + 1
        with older.without(fold), newer.without(fold):
            found = data.find(older, user, length)
            parts.append(data.lists(newer, found)[0])
    return joined(parts)


def prepare(sequences, items, hybrid=False):
    """-> train, val, test Lists, and the test candidates' order by the pre-ranker with the newer
    counts (N, K).

    train holds every prefix; val and test only the users whose target is among the candidates."""
    data, everyone = Data(sequences, items, hybrid), np.arange(len(sequences))
    older = Counts(sequences, len(items), 3)
    newer = Counts(sequences, len(items), 2)
    train = train_lists(data, older, newer)

    older = newer
    newer = Counts(sequences, len(items), 1)
    found = data.find(older, everyone, data.length - 2)
    found = found.take(found.target >= 0)
    val = []
    for fold in range(FOLDS):                    # newer counts know the validation target
        with newer.without(fold):
            own = found.take(found.user % FOLDS == fold)
            val.append(data.lists(newer, own)[0])

    found = data.find(older, everyone, data.length - 1)
    test, scores = data.lists(newer, found.take(found.target >= 0))
    return train, joined(val), test, np.argsort(-scores, axis=1, kind="stable")


# --- Rare combinations ------------------------------------------------------------------------
# Words that training hardly ever sees cannot be copied from the prompt: they made most of the
# traces fail that failed. So evidence that shares a token is rounded to combinations that
# training has at least once in RARE statements, and nothing is lost by it.
#
#     link:0,3 (a weak link, most of it by the third item)  ->  link:0,2

def number(evidence, fields):
    """Numbers of combinations of values, as in tokens.beauty_words: dict of (N, 10) -> (N, 10)."""
    values = [evidence[field] for field in fields]
    return np.ravel_multi_index(values, [FIELDS[field] for field in fields])


def rare(train):
    """What each combination becomes: the nearest kept one, by the sum of differences.
    -> name in STATED -> (fields, combinations) uint8"""
    nearest = {}
    for name, fields in STATED.items():
        value = np.indices([FIELDS[field] for field in fields])
        value = value.reshape(len(fields), -1)                        # (fields, combinations)
        numbers = number(train.evidence, fields).ravel()
        seen = np.bincount(numbers, minlength=value.shape[1])         # (combinations,) times
        kept = np.flatnonzero(seen * RARE >= seen.sum())
        apart = np.abs(value[:, :, None] - value[:, None, kept])
        far = apart.sum(0)                                            # (combinations, kept)
        far = far - seen[kept] / seen.sum()                           # ties: the more frequent
        becomes = kept[far.argmin(1)]                                 # (combinations,)
        nearest[name] = value[:, becomes].astype(np.uint8)
    return nearest


def merge_rare(lists, nearest):
    """Rounds the lists' evidence, in place. nearest: see rare."""
    for name, fields in STATED.items():
        rounded = nearest[name][:, number(lists.evidence, fields)]
        lists.evidence |= dict(zip(fields, rounded))
