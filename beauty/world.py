"""Amazon Beauty as a World. It is prepared once, which takes a minute, and kept in world.pt."""
import dataclasses
import os
import sys

import numpy as np
import torch

from beauty.amazon import read_beauty
from beauty.evidence import STATED, merge_rare, prepare, rare
from beauty.prerank import K, check_size
from beauty.tokens import beauty_words, tokenize
from beauty.writer import points, write_scores
from config import folder
from data import Split, World, draw_list_lengths
from plumbing.checkpoint import checksum, code_of, load_tensors, save_tensors
from plumbing.processes import RANK, barrier
from plumbing.settings import UserError

FRESH = "prerank, fresh"  # a reference row: the pre-ranker with the counts of the evidence
VERSION = "8"             # to be raised when the meaning of the kept arrays changes
SPLITS = ("train", "val", "test")


def beauty_world(cfg):
    """The World of the settings, from world.pt if that is of the same data and settings."""
    if cfg.n_candidates > K:
        raise UserError(f"on Beauty --n_candidates can be at most {K}, not {cfg.n_candidates}")
    sequences, items, n_skipped, _ = read_beauty(cfg.data_dir)
    check_size(sequences, len(items))
    # Two sums of what was read: a checkpoint has that of the content, world.pt that of everything
    # it depends on, its code included.
    content = checksum(VERSION, items, [torch.from_numpy(own) for own in sequences])
    code = code_of("beauty/*.py", "data.py")
    key = checksum(content, code, n_skipped, cfg.world, cfg.n_candidates, cfg.n_labels, cfg.min_list,
                   cfg.vary_lists, cfg.n_train, cfg.n_val, cfg.n_test)
    path = folder(cfg, "world.pt")
    world = read_world(path, key)
    if world is None and RANK == 0:
        print("preparing Amazon Beauty: pre-ranker, evidence, ranking writer (about a minute, "
              "once) ...", file=sys.stderr)
        made = make_world(cfg, sequences, items)
        made["notes"].update(skipped_users=n_skipped)
        save_tensors(path, {"key": key, "content": content, **made})
    barrier()  # the other processes wait until the first has written it
    return world or read_world(path, key)


def read_world(path, key):
    """The World that is kept, or None: there is none, or it is of other data or settings."""
    saved = load_tensors(path) if os.path.exists(path) else {}
    if saved.get("key") != key:
        return None
    splits = {name: Split(*(x.numpy() for x in saved[name])) for name in SPLITS}
    return World(
        words=saved["words"],
        n_labels=saved["n_labels"],
        **splits,
        source="prepared files",
        notes=saved["notes"],
        references={FRESH: saved["fresh"].numpy()},
        nearest={name: x.numpy() for name, x in zip(STATED, saved["nearest"])},
        checksum=saved["content"])


def training_rows(hit, cfg, rng):
    """Which training examples are used, at most n_train: all whose target is in the list, since
    these are the population that is tested, then others, because the writer orders any list."""
    first = rng.permutation(np.flatnonzero(hit))
    others = rng.permutation(np.flatnonzero(~hit))
    return rng.permutation(np.concatenate((first, others))[:cfg.n_train])


def rank_lists(cfg, train, val, test):
    """This sets the scores of lists, by which they are ordered, as the world says."""
    if cfg.world == "beauty":
        write_scores(train, val, test)
        return
    for lists in (train, val, test):
        lists.score = points(lists.evidence)
        if cfg.world == "beauty_target":
            hit = np.flatnonzero(lists.target >= 0)
            lists.score[hit, lists.target[hit]] = np.inf


def make_world(cfg, sequences, items):
    """This prepares the World. It returns what is kept of it."""
    train, val, test = prepare(sequences, items)
    # Shorter lists (--n_candidates) have the target of fewer users.
    hit = (train.target >= 0) & (train.target < cfg.n_candidates)
    val = val.take(val.target < cfg.n_candidates)
    test = test.take(test.target < cfg.n_candidates)
    if not (hit.any() and len(val.user) and len(test.user)):
        raise UserError("the data is too small: of training, validation or test no list has its "
                        "target among the candidates: pass --data_dir with larger data")
    fresh = np.argsort(-test.score[:, :cfg.n_candidates], axis=1, kind="stable")  # (N, K)
    nearest = rare(train)
    for lists in (train, val, test):
        merge_rare(lists, nearest)
    rank_lists(cfg, train, val, test)

    notes = {
        "users": len(sequences), "items": len(items),
        "train_examples": len(train.user), "train_hits": int(hit.sum()),
        "val_hits": len(val.user), "test_hits": len(test.user)}
    words = beauty_words(items, cfg.n_labels)
    rng = np.random.default_rng(11)
    train = train.take(training_rows(hit, cfg, rng))
    kept = {
        "words": words, "n_labels": cfg.n_labels, "notes": notes,
        "fresh": torch.from_numpy(fresh[:cfg.n_test]),
        "nearest": [torch.from_numpy(x) for x in nearest.values()]}
    of_split = (train, val.take(slice(cfg.n_val)), test.take(slice(cfg.n_test)))
    for name, lists in zip(SPLITS, of_split):
        length = np.full(len(lists.user), cfg.n_candidates)  # (N,)
        if name == "train":
            length = draw_list_lengths(len(lists.user), cfg, rng)
        split = tokenize(lists, items, words, length, cfg.n_candidates)
        arrays = [getattr(split, field.name) for field in dataclasses.fields(split)]
        kept[name] = [torch.from_numpy(array) for array in arrays]
    return kept
