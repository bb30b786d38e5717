"""Your own data as a world: a page to copy and change. All stages on it, and the table:

    python experiments/own_world.py --data_dir my/data --config toy

my/data/sequences.txt has a user a line: an id, then the ids of the items in time order. The last
item is the test target, the one before it the validation target, the others are for training.

    prompt   <history> pop:5 pop:2 pop:4  <candidates> L1 1st:1 2nd:0 3rd:1 pop:3  L2 1st:2 ...
    trace    <profile> pop:5  L1 best:1 links:2 pop:3  L2 best:2 links:1 pop:4
    answer   <answer> L2 L1 [EOS]

1st, 2nd, 3rd: how many users have both the candidate and the user's last item, the one before it,
the one before that. pop: how many have the item. Numbers are levels: 0, 1-2, 3-6, 7-14, ... are
0, 1, 2, 3, ... A trace sums up: the best of the three, how many are links, the user's most popular
item. The reference order is a learned scorer's: each word of a trace has points, and a candidate
has the sum of its words'. Type the command again to go on; all is in <run_dir>/own/<config>/.
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from plumbing.script import script  # noqa: E402  first: it sets how threads wait

import dataclasses  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

import evaluate, train_ar, train_cft, train_opd, train_rl, trainer  # noqa: E401, E402
from beauty.amazon import read_lines, read_sequences  # noqa: E402
from beauty.prerank import FOLDS, Counts, Histories, check_size, top_candidates  # noqa: E402
from data import (CANDIDATES, HISTORY, LABEL, NONE, PROFILE, SPECIAL, Split, World,  # noqa: E402
                  draw_list_lengths, responses)
from plumbing.checkpoint import checksum  # noqa: E402
from plumbing.settings import UserError  # noqa: E402

LEVELS = {"1st": 4, "2nd": 4, "3rd": 4, "best": 4, "links": 4, "pop": 8}  # word -> its numbers


def level(n, word):
    return np.log2(n + 1).astype(int).clip(max=LEVELS[word] - 1)


def find(cfg, words, counts, sequences, user, length):
    """Candidates after the first length (N,) items of users (N,), as tokens: name -> (N, ...)."""
    start = np.cumsum([0, *map(len, sequences)])[user]
    histories = Histories(np.concatenate(sequences), start, length)
    cands = top_candidates(counts, histories)[:, :cfg.n_candidates]    # (N, K)
    hit = cands == histories.flat[start + length][:, None]             # is it the next item?
    last = histories.recent(3)                                         # (N, 3), -1: none
    both = counts.C.numpy()[last[:, :, None], cands[:, None]]          # (N, 3, K)
    links = level(both * (last >= 0)[:, :, None], "best")
    say = {word: words.index(f"{word}:0") for word in LEVELS}          # the token of its 0
    label = np.broadcast_to(LABEL + np.arange(cfg.n_candidates), cands.shape)
    pop = say["pop"] + level(counts.cnt, "pop")                        # of all items
    shown = [say[word] + links[:, i] for i, word in enumerate(("1st", "2nd", "3rd"))]
    stated = [say["best"] + links.max(1), say["links"] + (links > 0).sum(1)]
    return {"target": np.where(hit.any(1), hit.argmax(1), -1),
            "history": np.where(last >= 0, pop[last], NONE),
            "prompt": np.stack([label, *shown, pop[cands]], -1),       # (N, K, 5)
            "trace": np.stack([label, *stated, pop[cands]], -1)}       # (N, K, 4)


def train_lists(cfg, words, counts, sequences):
    """All training examples. Counts that know the user know the target: others' are taken."""
    parts, everyone = [], np.arange(len(sequences))
    for fold in range(FOLDS):
        users = everyone[fold::FOLDS]
        n = [len(sequences[i]) - 3 for i in users]                     # the last 2 are no targets
        length = np.concatenate([np.arange(1, m + 1) for m in n])
        with counts.without(fold):                                     # without these users
            parts.append(find(cfg, words, counts, sequences, users.repeat(n), length))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def learn_points(trace, target, n_words):
    """Points of each word, whole numbers: too few of them to learn a user by heart."""
    points = torch.zeros(n_words, dtype=torch.double, requires_grad=True)
    optimizer = torch.optim.Adam([points], 0.05)
    for _ in range(200):
        optimizer.zero_grad()
        F.cross_entropy(points[trace].sum(-1), torch.from_numpy(target)).backward()
        optimizer.step()
    return (100 * points.detach()).round().numpy()


def write(lists, points, length):
    """The lists, cut to length (N,) candidates each, as a Split."""
    place = np.arange(lists["trace"].shape[1])
    listed, history = place < length[:, None], lists["history"]
    def text(start, *parts):
        return np.insert(np.concatenate(parts, 1), 0, start, axis=1).astype(np.int16)
    ...
