"""Ours: a dial for how much of a trace is chance (--wording).

A trace is a function of the prompt, so tokens that are written at once fit together by
themselves. Free text is not like that: it can be said in several ways, and one that has been begun
must be kept to. Here every word of a trace but labels, <profile> and <none> has a synonym (x3:1
and x3:1'), and a coin says which of the two is written:

    fixed       L1 x3:1  y4:0  z4:0    L2 x4:0  y1:1  z2:0     no coin: as everywhere else
    token       L1 x3:1' y4:0  z4:0'   L2 x4:0  y1:1' z2:0     a coin for each token
    statement   L1 x3:1' y4:0' z4:0'   L2 x4:0  y1:1  z2:0     for each statement
    trace       L1 x3:1' y4:0' z4:0'   L2 x4:0' y1:1' z2:0'    for the whole trace

A token by itself is equally doubtful in the last three. But a forward draws its slots
independently, which is right for `token` alone: elsewhere it mixes wordings. The history
and the candidates are never reworded; only a trace shows a synonym. All wordings are equally true
(World.plain).
"""
import dataclasses

import numpy as np

from data import LABEL, statements
from plumbing.settings import UserError

MARK = "'"  # the synonym of x3:1 is x3:1'


def reword(world, wording):
    """The World with synonyms in its traces; with "fixed" it stays as it is.

    The synonyms come last in the vocabulary. Every word after the labels gets one, also a word
    that no trace has: so their numbers do not depend on the size of a split. Raises UserError if a
    synonym is a word already, or if there are too many words for int16."""
    if wording == "fixed":
        return world
    first, n_words = LABEL + world.n_labels, len(world.words)
    words = world.words + [word + MARK for word in world.words[first:]]
    if len(set(words)) < len(words) or len(words) > np.iinfo(np.int16).max:
        raise UserError(f"--wording {wording} needs a synonym for each of {n_words - first} words, "
                        f"the word and {MARK}: one is a word already, or they are more than a "
                        "token's 15 bits can number; use --wording fixed or other categories")
    splits = {}
    for number, name in enumerate(("train", "val", "test")):
        split = getattr(world, name)
        synonym = drawn(split.trace, number, world.n_labels, wording)
        trace = np.where(synonym, split.trace + n_words - first, split.trace)
        splits[name] = dataclasses.replace(split, trace=trace.astype(np.int16))
    canonical = np.append(np.arange(n_words), np.arange(first, n_words))  # (V,)
    checksum = f"{world.checksum}, wording: {wording}"
    return dataclasses.replace(world, words=words, canonical=canonical, checksum=checksum, **splits)


def drawn(trace, number, n_labels, wording):
    """Where the traces (N, T) of split `number` get a synonym: bool (N, T).

    The coins fall row by row, so a user has the same ones whatever N is. There is one for every
    position; a statement takes that of its first token, a trace that of its first."""
    coin = np.random.default_rng([8, number]).integers(2, size=trace.shape, dtype=bool)  # (N, T)
    decided = np.take_along_axis(coin, decided_at(trace, n_labels, wording), 1)
    return decided & has_synonym(trace, n_labels)


def has_synonym(tokens, n_labels):
    """Which tokens are words with a synonym, or synonyms: bool, of their shape."""
    return tokens >= LABEL + n_labels


def decided_at(trace, n_labels, wording):
    """The position whose coin decides each token of traces (N, T): (N, T)."""
    at = np.broadcast_to(np.arange(trace.shape[1]), trace.shape)
    if wording == "token":
        return at
    if wording == "trace":
        return np.zeros_like(at)
    is_label = (trace >= LABEL) & ~has_synonym(trace, n_labels)
    return np.maximum.accumulate(np.where(is_label, at, 0), axis=1)  # 0: <profile>


# --- Measures -----------------------------------------------------------------------------------

def entropy_bits(world, wording):
    """Entropy of how a test user's trace is worded, in bits. It is exact: the number of coins that
    decide at least one token, averaged over users. The World may be reworded or not."""
    if wording == "fixed":
        return 0.0
    trace = world.test.trace                                      # (N, T)
    at = decided_at(trace, world.n_labels, wording)
    user, slot = np.nonzero(has_synonym(trace, world.n_labels))
    decides = np.zeros(trace.shape, bool)
    decides[user, at[user, slot]] = True
    return float(decides.sum(1).mean())


def consistency(world, tokens, wording):
    """Share of statements, in responses (N, R), that keep to one wording -> (N,); for "trace",
    whether the whole trace does. nan where no part has two words with synonyms.

    Slots drawn independently keep m words alike with probability 2^(1 - m)."""
    share = np.full(len(tokens), np.nan)
    for n, row in enumerate(tokens):
        parts = statements(row, world.n_labels)
        if wording == "trace":
            parts = [sum(parts, ())]
        kept = []
        for part in parts:
            words = [token for token in part if has_synonym(token, world.n_labels)]
            if len(words) > 1:
                kept.append(len({token == world.canonical[token] for token in words}) == 1)
        if kept:
            share[n] = np.mean(kept)
    return share
