"""Amazon Beauty as a World: prepared once, about a minute, and kept in runs/<config>/world.pt."""
import os
import sys
from dataclasses import fields as fields_of

import numpy as np
import torch

from beauty.amazon import read_beauty
from beauty.evidence import STATED, merge_rare, prepare, rare
from beauty.prerank import K, check_size
from beauty.tokens import beauty_words, tokenize
from beauty.writer import points, write_scores
from config import folder
from data import Split, World, draw_list_lengths
from plumbing.checkpoint import checksum, load_tensors, save_tensors
from plumbing.processes import RANK, barrier
from plumbing.settings import UserError

FRESH = "prerank, fresh"  # reference row: the pre-ranker with the counts of the evidence
CACHE = "8"               # to be raised when the meaning of the cached arrays changes
SPLITS = ("train", "val", "test")


def beauty_world(cfg):
    """Amazon Beauty as a World. Raises UserError for files that cannot be read or used."""
    if cfg.n_candidates > K:
        raise UserError(f"on Beauty --n_candidates can be at most {K}, not {cfg.n_candidates}")
    sequences, items, source, n_skipped, _ = read_beauty(cfg.data_dir)
    check_size(sequences, len(items))
    # What was read, in two sums: a checkpoint holds that of the content, the cache that of
    # everything the file depends on.
    content = checksum(CACHE, items, [torch.from_numpy(s) for s in sequences])
    key = checksum(content, source, cfg.world, cfg.n_candidates, cfg.n_labels, cfg.min_list,
                   cfg.vary_lists, cfg.n_train, cfg.n_val, cfg.n_test)
    world = read_world(cfg, key)
    if not world and RANK == 0:
        make_world(cfg, key, source, content, (sequences, items, n_skipped))
    barrier()  # the other processes wait until the first has written it
    return world or read_world(cfg, key)


def read_world(cfg, key):
    """The World that is kept, or None: there is none, or it is of other data or settings."""
    path = folder(cfg, "world.pt")
    saved = load_tensors(path) if os.path.exists(path) else {}
    if saved.get("key") != key:
        return None
    splits = [Split(*(t.numpy() for t in saved[name])) for name in SPLITS]
    nearest = {name: t.numpy() for name, t in zip(STATED, saved["nearest"])}
    references = {FRESH: saved["fresh"].numpy()}
    return World(saved["words"], cfg.n_labels, *splits, saved["source"], saved["notes"],
                 references, nearest, saved["content"])


def training_rows(hit, cfg, rng):
    """Which training examples (at most n_train) are used: all whose target is in the list (the
    population that is tested), filled up with others, because the writer orders any list."""
    first = rng.permutation(np.flatnonzero(hit))
    others = rng.permutation(np.flatnonzero(~hit))
    return rng.permutation(np.concatenate((first, others))[:cfg.n_train])


def written_lists(sequences, items, cfg):
    """-> train, val, test Lists with rounded evidence and scores, the order of the test candidates
    by fresh counts, and how evidence is rounded."""
    train, val, test, fresh = prepare(sequences, items, cfg.world == "beauty_hybrid")
    # Shorter lists (--n_candidates) have the target of fewer users.
    in_val = np.flatnonzero(val.target < cfg.n_candidates)
    in_test = np.flatnonzero(test.target < cfg.n_candidates)
    hits = {"train": (train.target >= 0).sum(), "val": len(in_val), "test": len(in_test)}
    for name, n in hits.items():
        if not n:
            raise UserError(f"the data is too small: no list of {name} has its target among the "
                            "candidates; pass --data_dir with larger data")
    nearest = rare(train)
    for lists in (train, val, test):
        merge_rare(lists, nearest)
    if cfg.world in ("beauty_expert", "beauty_target"):
        for lists in (train, val, test):
            lists.score = points(lists.evidence)
    else:
        write_scores(train, val, test)
    if cfg.world == "beauty_target":
        for lists in (train, val, test):
            hit = np.flatnonzero(lists.target >= 0)
            lists.score[hit, lists.target[hit]] = np.inf
    fresh = fresh[in_test]
    fresh = fresh[fresh < cfg.n_candidates].reshape(-1, cfg.n_candidates)
    return train, val.take(in_val), test.take(in_test), fresh, nearest


def make_world(cfg, key, source, content, data):
    """Prepares the World and writes the file that read_world reads."""
    print("preparing Amazon Beauty: pre-ranker, evidence, ranking writer (about a minute, once) "
          "...", file=sys.stderr)
    sequences, items, n_skipped = data
    train, val, test, fresh, nearest = written_lists(sequences, items, cfg)
    words = beauty_words(items, cfg.n_labels)
    rng = np.random.default_rng(11)
    hit = (train.target >= 0) & (train.target < cfg.n_candidates)
    notes = {
        "users": len(sequences), "skipped_users": n_skipped, "items": len(items),
        "train_examples": len(train.user), "train_hits": int(hit.sum()),
        "val_hits": len(val.user), "test_hits": len(test.user)}
    train = train.take(training_rows(hit, cfg, rng))
    val, test = val.take(slice(cfg.n_val)), test.take(slice(cfg.n_test))
    saved = {"key": key, "source": source, "content": content, "words": words, "notes": notes,
             "fresh": torch.from_numpy(fresh[:cfg.n_test]),
             "nearest": [torch.from_numpy(x) for x in nearest.values()]}
    for name, lists in zip(SPLITS, (train, val, test)):
        length = np.full(len(lists.user), cfg.n_candidates)
        if name == "train":
            length = draw_list_lengths(len(lists.user), cfg, rng)
        split = tokenize(lists, items, words, length, cfg.n_candidates)
        arrays = [getattr(split, field.name) for field in fields_of(split)]
        saved[name] = [torch.from_numpy(array) for array in arrays]
    save_tensors(folder(cfg, "world.pt"), saved)
