"""Your own data as a world: a page to copy and to change. Trains all stages, prints their table:

    python experiments/own_world.py --data_dir my/data --config toy    # typed again, it goes on

my/data/sequences.txt has a user a line: an id, then item ids in time order. The last item is the
test target, the one before it the validation target; those before are for training. Users with
fewer than three items are left out, and so are empty lines.

    prompt   <history> pop:5 pop:2 pop:4  <candidates> L1 1st:1 2nd:0 3rd:1 pop:3  L2 1st:2 ...
    trace    <profile> pop:5  L1 best:1 links:2 pop:3  L2 best:2 links:1 pop:4
    answer   <answer> L2 L1 [EOS]

1st, 2nd, 3rd: how often the candidate stands in a sequence together with the last item of the
history, the one before, the one before that; pop: how often the item was taken. Both are counted
over the training parts of all sequences, and who takes an item twice counts twice. Levels 0, 1, 2,
3, ... are 0, 1-2, 3-6, 7-14, ... times. A trace sums up: the best level, how many are not 0, and
the highest pop of the history. The reference order is a learned scorer's: each word of a trace has
points. Output: runs/own/toy/
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import dataclasses
import os

import numpy as np
import torch

import evaluate, train_ar, train_cft, train_opd, train_rl, trainer
from beauty.amazon import read_lines
from beauty.prerank import FOLDS, K, Counts, Histories, check_size, top_candidates
from data import CANDIDATES, HISTORY, LABEL, NONE, PROFILE, SPECIAL, Split, World
from plumbing.checkpoint import checksum
from plumbing.script import script
from plumbing.settings import UserError
from report.table import chosen_seeds

WORDS, LEVELS = ("1st", "2nd", "3rd", "best", "links", "pop"), 8  # evidence: 1st:0, ..., pop:7


def read(path):
    """The items of all users with three or more: lists of names, oldest first."""
    if not os.path.exists(path):
        raise UserError(f"there is no {path}: name the folder of sequences.txt with --data_dir")
    users = {}
    for number, line in read_lines(path):
        name, *items = line.split() or [""]
        if name in users:
            raise UserError(f"{path}, line {number}: the user {name} is there twice: keep one of "
                            "the two lines")
        if name:
            users[name] = items
    sequences = [items for items in users.values() if len(items) >= 3]
    if not sequences:
        raise UserError(f"{path} has no user with 3 or more items: use longer sequences")
    print(f"{path}: {len(sequences)} users; {len(users) - len(sequences)} with fewer than 3 items "
          "are left out")
    return sequences


def find(cfg, older, counts, sequences, user, length):
    """Lists after the first length (N,) items of users (N,): the fields of a Split, unordered."""
    def level(n):
        return np.log2(n + 1).astype(int).clip(max=LEVELS - 1)

    start = np.cumsum([0, *map(len, sequences)])[user]
    histories = Histories(np.concatenate(sequences), start, length)
    items = top_candidates(older, histories)[:, :cfg.n_candidates]   # (N, K)
    hit = items == histories.next_item()[:, None]                    # (N, K)
    last = histories.recent(3)                                       # (N, 3) items, -1: none
    both = counts.C.numpy()[last[..., None], items[:, None]]         # (N, 3, K) times
    links = level(both * (last >= 0)[..., None])
    zero = {word: LABEL + cfg.n_labels + LEVELS * i for i, word in enumerate(WORDS)}
    pop = zero["pop"] + level(counts.cnt)                            # a token for every item
    history = np.where(last >= 0, pop[last], NONE)
    place = np.broadcast_to(np.arange(items.shape[1]), items.shape)
    three = [zero[word] + links[:, i] for i, word in enumerate(WORDS[:3])]
    sums = [zero["best"] + links.max(1), zero["links"] + (links > 0).sum(1)]
    shown = np.dstack((LABEL + place, *three, pop[items]))           # (N, K, 5) tokens
    stated = np.dstack((LABEL + place, *sums, pop[items]))           # (N, K, 4)
    one = np.ones((len(user), 1), int)
    prompt = np.hstack((one * HISTORY, history, one * CANDIDATES, *shown.swapaxes(0, 1)))
    trace = np.hstack((one * PROFILE, history.max(1, keepdims=True), *stated.swapaxes(0, 1)))
    return prompt, trace, place, np.where(hit.any(1), hit.argmax(1), -1), place


def put_in_order(splits, n_words):
    """Learns points of words from the targets of the first split; orders all splits by them."""
    said = [torch.from_numpy(s.trace[:, 2:].reshape(*s.order.shape, 4)) for s in splits]
    target = torch.from_numpy(splits[0].target)
    points = torch.zeros(n_words, dtype=torch.double, requires_grad=True)  # too few to know a user
    optimizer = torch.optim.Adam([points], 0.05)
    for _ in range(200):
        optimizer.zero_grad()
        score = points[said[0]].sum(-1)                              # (N, K)
        torch.nn.functional.cross_entropy(score, target, ignore_index=-1).backward()
        optimizer.step()
    for split, words in zip(splits, said):
        score = (100 * points.detach()).round()[words].sum(-1)       # (N, K), whole numbers
        split.order = (-score).argsort(dim=1, stable=True).numpy()


def own_world(cfg):
    path, rng = os.path.join(cfg.data_dir, "sequences.txt"), np.random.default_rng(0)
    if cfg.n_candidates > K:
        raise UserError(f"--n_candidates can be at most {K} here, not {cfg.n_candidates}")
    named = read(path)
    ids = sorted({item for items in named for item in items})
    index = dict(zip(ids, rng.permutation(len(ids))))  # shuffled: ids may tell what goes together
    sequences = [np.array([index[item] for item in items]) for items in named]
    check_size(sequences, len(ids))
    cut = {c: Counts(sequences, len(ids), c) for c in (1, 2, 3)}  # without the last c items
    n, parts, splits = np.array([len(s) for s in sequences]), [[], [], []], []
    for fold in range(FOLDS):  # counts that know a user know the targets: others' are taken
        users = np.arange(fold, len(n), FOLDS)
        many, lengths = users.repeat(n[users] - 3), [np.arange(1, m - 2) for m in n[users]]
        with cut[1].without(fold), cut[2].without(fold), cut[3].without(fold):
            parts[0].append(find(cfg, cut[3], cut[2], sequences, many, np.concatenate(lengths)))
            parts[1].append(find(cfg, cut[2], cut[1], sequences, users, n[users] - 2))
            parts[2].append(find(cfg, cut[2], cut[1], sequences, users, n[users] - 1))
    for part, most in zip(parts, (cfg.n_train, cfg.n_val, cfg.n_test)):
        split = Split(*map(np.concatenate, zip(*part)))
        hits = np.flatnonzero(split.target >= 0)  # the other lists are to learn from alone
        if not len(hits):
            raise UserError(f"{path} is too small: no candidate is the next item; use more users")
        splits.append(split.take(rng.permutation(hits if splits else len(split))[:most]))
    words = SPECIAL + [f"L{i + 1}" for i in range(cfg.n_labels)]
    words += [f"{word}:{i}" for word in WORDS for i in range(LEVELS)]
    put_in_order(splits, len(words))
    content = checksum([torch.from_numpy(x) for x in (*sequences, *vars(splits[0]).values())])
    return World(words, cfg.n_labels, *splits, path, {"users": len(n)}, checksum=content)


def main(cfg, options):
    cfg = dataclasses.replace(cfg, run_dir=os.path.join(cfg.run_dir, "own"), world="own")
    world, make_report = own_world(cfg), evaluate.make_report
    trainer.beauty_world = lambda cfg: world  # what load_world takes for any world but the toy
    evaluate.make_report = lambda *args: {**make_report(*args), "dataset": "own data"}
    for seed in chosen_seeds(cfg, options.seeds):
        for stage in (train_ar, train_cft, train_opd, train_rl):
            stage.main(dataclasses.replace(cfg, seed=seed))
    evaluate.main(cfg, options)


if __name__ == "__main__":
    script(main, __doc__, evaluate.Options)
