"""Amazon Beauty: evidence, the writer of rankings, and how they become tokens.

Everything is computed from counts over the sequences (prerank.py): the pre-ranker's end before a user's last two items, the
evidence's before the target.
"""
import itertools
import os
import sys
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from amazon import read_beauty
from common import RANK, checksum, gathered, load_tensors, save_tensors
from config import UserError, folder
from data import CANDIDATES, HISTORY, LABEL, LAST, NONE, PROFILE, SPECIAL, Split, World, list_lengths, pack
from model import PAD
from prerank import FOLDS, K, Counts, attributes, prerank

HIST = 8                        # history items shown
GROUPS, SEEDS = 5, 3            # the writer's groups of users (unions of folds) and seeds a group
FIELDS = dict(                  # evidence of a candidate: name -> number of values; the trace states them
    pos=K + 1,                  # 1..10, place in the pre-ranked list (its label)
    pop=8,                      # log2 of its count
    link=8,                     # score relative to the best: 7 = within 2^-1/4, then half an octave a level
    via=HIST + 1,               # which history item adds most to the score: 1 = the most recent, 0 = none of the 8
    co=8,                       # log2 of the users who have both it and the most recent item, whatever the order
    links=4,                    # how many of the 8 history items link to it: 0, 1, 2, 3+
    brand=8,                    # 0 unknown, 1 new; else 1, 2, 3+ history items of it: 2, 4, 6, +1 if the last one is
    depth=4,                    # levels of its category path shared with the most recent item, 3 = the full path
    leaf=4)                     # how many of the 8 history items have its full path: 0, 1, 2, 3+
STATED = {"depth": ("depth",), "leaf": ("leaf",), "link": ("link", "via"), "co": ("co", "links", "pop")}  # token: the fields it states
RARE = 2000  # see merge_rare


# --- Evidence ------------------------------------------------------------------------------------------------------

def link_evidence(T, C, cnt, hist, cands, scores):
    """Evidence that only the counts know: T link strengths, C link counts (I, I), hist (N, 8), cands, scores (N, 10)
    -> dict of (N, 10)."""
    octaves = lambda x: np.log2(np.maximum(x, 1e-9))
    weight = np.arange(1, HIST + 1) ** -1.5 * (cnt[hist] + 10.0) ** -0.3 * (hist >= 0)
    T8 = T.numpy()[hist[:, :, None], cands[:, None]] * (hist >= 0)[:, :, None]                     # (N, 8, 10)
    part = T8 * weight[:, :, None]
    return dict(pos=np.broadcast_to(np.arange(1, K + 1), cands.shape),
                pop=np.log2(cnt[cands] + 1).clip(0, 7),
                link=np.round(2 * octaves(scores / scores.max(1, keepdims=True).clip(1e-30)) + 7).clip(0, 7),  # 0: no item known
                via=np.where(part.max(1) > 0, part.argmax(1) + 1, 0),
                co=np.floor(np.log2(C.numpy()[hist[:, :1], cands] + 1)).clip(0, 7),
                links=(T8 > 0).sum(1).clip(0, 3))


def attribute_evidence(attr, hist, cands):
    """Evidence that can be read off brands and category paths. -> dict of (N, 10)."""
    h, c = attr[hist][:, :, None], attr[cands][:, None]                                            # (N, 8|1, 1|10, 4)
    same = (h == c) & (hist >= 0)[:, :, None, None]                                                # (N, 8, 10, 4)
    known = c[:, 0, :, 0] > 0
    n_brand = same[..., 0].sum(1)
    return dict(brand=np.where(known, 1 + 2 * n_brand.clip(0, 3) - (n_brand > 0) * (1 - same[:, 0, :, 0]), 0),
                depth=same[:, 0, :, 1:].sum(-1),
                leaf=same[..., 3].sum(1).clip(0, 3))


@dataclass
class Lists:
    """N candidate lists of one split."""
    user: np.ndarray        # (N,)
    hist: np.ndarray        # (N, 8) items, most recent first, -1 absent
    cands: np.ndarray       # (N, 10) items in pre-rank order
    target: np.ndarray      # (N,) place of the true next item in cands, -1 where it is not among them
    evidence: dict          # name -> (N, 10) uint8
    score: np.ndarray = None  # (N, 10) float32, the writer's

    def take(self, rows):
        return Lists(self.user[rows], self.hist[rows], self.cands[rows], self.target[rows],
                     {name: v[rows] for name, v in self.evidence.items()}, self.score[rows])


def make_lists(counts, attr, hybrid, flat, start, user, end, cands, target):
    """Lists (N) of candidates (N, 10) after the first `end` items of users, whose items start at flat[start[user]], and the
    pre-ranker's scores of the candidates with these counts (N, 10). Items beyond the counts share the counts' last row."""
    back, last = end[:, None] - 1 - np.arange(HIST), len(counts.cnt) - 1
    hist = np.where(back >= 0, flat[start[user][:, None] + np.maximum(back, 0)], -1)
    known = [np.minimum(x, last) for x in (hist, cands)]
    scores = prerank(counts.T, counts.cnt, np.minimum(flat, last), start[user], end, attr if hybrid else None, known[1])
    evidence = link_evidence(counts.T, counts.C, counts.cnt, *known, scores) | attribute_evidence(attr, hist, cands)
    return Lists(user, hist, cands, target, {name: v.astype(np.uint8) for name, v in evidence.items()}), scores


def prepare(seqs, items, hybrid=False):
    """-> train, val, test Lists, and the test candidates' order by the pre-ranker with the counts of the evidence (N, K).

    train holds every prefix; val and test only users whose target is in the top K. The pre-ranker counts the training part, all
    but a user's last two items. At test time more is known: what other users did up to their validation items. The evidence
    counts it; the pre-ranker, as in real systems, is older. Training and validation lists are made alike, from counts of
    other users: the evidence has an item a user more than the pre-ranker.
    """
    attr, n_items = attributes(items), len(items)
    length = np.array([len(s) for s in seqs])
    flat, start = np.concatenate(seqs), np.cumsum(length) - length
    everyone = np.arange(len(seqs))

    def find(counts, user, end, only_hits):
        """Candidates after the first `end` items of users: user, end, candidates, place of the target."""
        cands = prerank(counts.T, counts.cnt, flat, start[user], end, attr if hybrid else None)
        hit = cands == flat[start[user] + end][:, None]
        keep = hit.any(1) if only_hits else np.ones(len(user), bool)
        return [x[keep] for x in (user, end, cands, np.where(hit.any(1), hit.argmax(1), -1))]

    lists = lambda counts, *found: make_lists(counts, attr, hybrid, flat, start, *found)

    def joined(parts):
        cat = lambda get: np.concatenate([get(p) for p in parts])
        return Lists(cat(lambda p: p.user), cat(lambda p: p.hist), cat(lambda p: p.cands), cat(lambda p: p.target),
                     {name: cat(lambda p: p.evidence[name]) for name in parts[0].evidence})

    old, new, train, val = Counts(seqs, n_items, 3), Counts(seqs, n_items, 2), [], []
    for f in range(FOLDS):                                     # a user is never scored by counts that know him
        users = everyone[f::FOLDS]
        n = length[users] - 3                                  # prefixes of 1 .. n items
        user = np.repeat(users, n)
        end = np.arange(len(user)) - np.repeat(np.cumsum(n) - n, n) + 1
        with old.without(f), new.without(f):
            train.append(lists(new, *find(old, user, end, False))[0])
    old = new
    new = Counts(seqs, n_items, 1)
    found = find(old, everyone, length - 2, True)
    for f in range(FOLDS):                                     # their own validation item is the target
        with new.without(f):
            val.append(lists(new, *(x[found[0] % FOLDS == f] for x in found))[0])
    test, scores = lists(new, *find(old, everyone, length - 1, True))
    return joined(train), joined(val), test, np.argsort(-scores, axis=1, kind="stable")


def number(evidence, fields):
    """Numbers of combinations of values, in the order of beauty_words: dict of (N, 10) -> (N, 10)."""
    return np.ravel_multi_index([evidence[f] for f in fields], [FIELDS[f] for f in fields])


def rare(train):
    """Evidence that shares a token is rounded to combinations that training has at least once in RARE statements, the nearest by
    the sum of differences: words that are hardly ever seen cannot be copied from the prompt (they made most traces fail that
    failed), and nothing is lost by leaving them out. -> name in STATED -> (fields, combinations) uint8, what each becomes"""
    nearest = {}
    for name, fields in STATED.items():
        value = np.indices([FIELDS[f] for f in fields]).reshape(len(fields), -1)                   # (fields, combinations)
        seen = np.bincount(number(train.evidence, fields).ravel(), minlength=value.shape[1])
        kept = np.flatnonzero(seen * RARE >= seen.sum())
        far = np.abs(value[:, :, None] - value[:, None, kept]).sum(0) - seen[kept] / seen.sum()    # ties: the more frequent
        nearest[name] = value[:, kept[far.argmin(1)]].astype(np.uint8)
    return nearest


def merge_rare(lists, nearest):
    """Rounds the lists' evidence; nearest: see rare."""
    for name, fields in STATED.items():
        lists.evidence |= dict(zip(fields, nearest[name][:, number(lists.evidence, fields)]))


# --- The writer of training data -----------------------------------------------------------------------------------
# A learned scorer that only writes the rankings of training examples (and is a reference row in the tables); it is
# never part of serving. It sees what a trace states, so its ranking is a function of the trace. It scores one
# candidate at a time: any sub-list of any prefix can be ordered by it.

def onehot(evidence, rows):
    """-> (N, K, sum of FIELDS) float"""
    return torch.cat([F.one_hot(torch.from_numpy(evidence[f][rows]).long(), size) for f, size in FIELDS.items()],
                     -1).float()


def fit_writer(train, seed=0, width=32, epochs=10, batch=256, lr=3e-3, decay=0.5):
    """Fits GROUPS * SEEDS pointwise MLPs side by side; member m never learns from users of group m % GROUPS.
    -> function (N, n, D) one-hot -> (members, N, n) scores"""
    gen = torch.Generator().manual_seed(seed)
    rows = np.flatnonzero(train.target >= 0)
    if not len(rows):
        raise UserError("no training example has its target among the candidates: the data is too small to learn from")
    batch = min(batch, len(rows))
    x, y, user = onehot(train.evidence, rows), torch.from_numpy(train.target[rows]), train.user[rows]
    members = torch.arange(GROUPS * SEEDS)
    weight = torch.from_numpy(np.bincount(user)[user] ** -0.5).float()     # so that long histories do not dominate
    weight = weight * (torch.from_numpy(user)[None] % GROUPS != members[:, None] % GROUPS)         # (members, N)
    sizes = [(x.shape[-1], width, 0.3), (width, width // 2, width ** -0.5), (width // 2, 1, (width // 2) ** -0.5)]
    W = [(std * torch.randn(len(members), i, o, generator=gen)).requires_grad_() for i, o, std in sizes]
    b = [torch.zeros(len(members), 1, o, requires_grad=True) for _, o, _ in sizes]

    def score(x):
        h = F.gelu(x.flatten(0, 1) @ W[0] + b[0])                          # (members, N * n, width)
        return (F.gelu(h @ W[1] + b[1]) @ W[2]).view(len(members), *x.shape[:2])

    opt = torch.optim.AdamW(W + b[:2], lr, weight_decay=decay)
    steps = epochs * (len(x) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, lr, max(steps, 20), pct_start=0.1)  # 20: no phase may be empty
    for step in range(steps):
        if step % (len(x) // batch) == 0:
            order = torch.randperm(len(x), generator=gen)
        i = order[step % (len(x) // batch) * batch:][:batch]
        loss = F.cross_entropy(score(x[i]).flatten(0, 1), y[i].repeat(len(members)), reduction="none")
        loss = (loss * weight[:, i].flatten()).view(len(members), -1).sum(1) / weight[:, i].sum(1)
        opt.zero_grad(); loss.sum().backward(); opt.step(); schedule.step()
    return torch.no_grad()(score)


def write_scores(train, *others, **kw):
    """Fills .score: train's from the members that did not see the user's group, the others' from all members."""
    score = fit_writer(train, **kw)
    for lists in (train, *others):
        group = lists.user % GROUPS
        lists.score = np.empty(lists.cands.shape, np.float32)
        for g in range(GROUPS):
            for rows in np.array_split(np.flatnonzero(group == g), 1 + (group == g).sum() // 4000):
                s = score(onehot(lists.evidence, rows))
                lists.score[rows] = (s[g::GROUPS] if lists is train else s).mean(0)


# --- From lists to tokens --------------------------------------------------------------------------------------------------
# A candidate takes six tokens in the prompt and six in the trace, and they answer to each other one by one:
#   prompt   L3   b2           Makeup > Nails  p5    link,via   co,links,pop
#   trace    L3   brand:match  depth           leaf  link,via   co,links,pop
# Three tokens must be worked out from the history that the prompt shows, two are copied from the prompt. With ten
# candidates a trace takes 64 tokens, <answer> included: at block sizes 4 to 64 the answer starts a block of its own.
# Brands (b) and full category paths (p) are numbered by first appearance in the prompt: evidence asks only whether they are
# equal, and 20 numbers are learned several times faster than 436 brands and 227 paths.

FRESH = "prerank, fresh"
CACHE = "8"  # to be raised when the meaning of the cached arrays changes
BRAND_MATCH = ["brand:unknown", "brand:0", "brand:1", "brand:1,last", "brand:2", "brand:2,last", "brand:3+", "brand:3+,last"]


def beauty_words(items, n_labels):
    """Token id -> word: template, labels, evidence values, brand and path numbers, categories of level 2."""
    values = lambda fields: itertools.product(*(map(str, range(FIELDS[f])) for f in fields))
    evidence = BRAND_MATCH + [f"{name}:{','.join(v)}" for name, fields in STATED.items() for v in values(fields)]
    numbers = [f"{x}{i + 1}" for x in "bp" for i in range(HIST + K)]
    return (SPECIAL + [f"L{i + 1}" for i in range(n_labels)] + evidence + ["b?"] + numbers +
            sorted({" > ".join(p[:2]) for _, p in items}))


def first_seen(ids):
    """Ids (N, n), -1 = none, numbered by first appearance in their row: 0, 1, ...; -1 stays."""
    first = (ids[:, :, None] == ids[:, None]).argmax(2)  # (N, n), where the id is seen first
    new = (first == np.arange(ids.shape[1])) & (ids >= 0)
    return np.where(ids >= 0, np.take_along_axis(new.cumsum(1) - 1, first, 1), -1)


def tokenize(lists, items, words, k, width):
    """Lists, cut to the lengths k (N,) -> Split with `width` columns a list."""
    N, K = len(k), width
    id_of = {w: i for i, w in enumerate(words)}
    attr = np.concatenate((attributes(items), [[-1] * 4]))  # [-1]: no item
    level2 = np.array([id_of[" > ".join(p[:2])] for _, p in items] + [PAD], np.int16)
    listed = np.arange(K) < k[:, None]
    item = np.concatenate((lists.hist[:, ::-1], np.where(listed, lists.cands[:, :K], -1)), 1)  # in the prompt's order, oldest first
    brand, path = attr[item, 0], attr[item, 3]
    brand = np.where(brand == 0, id_of["b?"], id_of["b1"] + first_seen(np.where(brand > 0, brand, -1)))
    shown = np.stack((brand, level2[item], id_of["p1"] + first_seen(path)), -1)  # (N, 8 + K, 3)
    shown = np.where(item[..., None] >= 0, shown, PAD)
    column = lambda token: np.full((N, 1), token, np.int16)
    label = np.broadcast_to(LABEL + np.arange(K), (N, K))
    evidence = {name: v[:, :K].astype(np.int64) for name, v in lists.evidence.items()}
    said = {name: id_of[f"{name}:{','.join('0' * len(fields))}"] + number(evidence, fields) for name, fields in STATED.items()}
    copied = np.stack((said["link"], said["co"]), -1)
    candidates = np.concatenate((label[..., None], shown[:, HIST:], copied), -1)
    prompt = np.concatenate((column(HISTORY), shown[:, :HIST - 1].reshape(N, -1), column(LAST), shown[:, HIST - 1],
                             column(CANDIDATES), np.where(listed[..., None], candidates, NONE).reshape(N, -1)), 1)
    match = evidence["brand"] + id_of[BRAND_MATCH[0]]
    stated = np.concatenate((np.stack((label, match, said["depth"], said["leaf"]), -1), copied), -1)
    recent = shown[:, HIST - 1::-1]  # most recent first
    profile = np.stack((column(PROFILE)[:, 0], most_frequent(recent[..., 0]), most_frequent(recent[..., 1])), 1)
    trace = np.concatenate((profile, np.where(listed[..., None], stated, NONE).reshape(N, -1)), 1)
    score = np.where(listed, lists.score[:, :K], -np.inf)
    order = np.where(listed, np.argsort(-score, axis=1, kind="stable"), -1)
    target = np.where(lists.target < k, lists.target, -1)
    return Split(pack(prompt, left=True).astype(np.int16), trace.astype(np.int16),
                 order.astype(np.int8), target.astype(np.int8), np.where(listed, np.arange(K), -1).astype(np.int8))


def most_frequent(tokens):
    """The most frequent token of each row of (N, H), [PAD] aside; of equals the most recent (the first column)."""
    times = ((tokens[:, :, None] == tokens[:, None]).sum(2)) * (tokens != PAD)
    return np.take_along_axis(tokens, times.argmax(1)[:, None], 1)[:, 0]


# --- The world --------------------------------------------------------------------------------------------------------------

def beauty_world(cfg):
    """Amazon Beauty as a World; prepared once (about a minute) and cached in runs/<config>/world.pt."""
    if cfg.n_candidates > K:
        raise UserError(f"on Beauty --n_candidates can be at most {K}, not {cfg.n_candidates}")
    sequences, items, source, n_skipped, _ = read_beauty(cfg.data_dir)
    key = checksum(CACHE, source, cfg.hybrid, cfg.n_candidates, cfg.n_labels, cfg.min_list, cfg.vary_lists, cfg.n_train, cfg.n_val,
                   cfg.n_test, items, [torch.from_numpy(s) for s in sequences])
    path = folder(cfg, "world.pt")
    world = read_world(cfg, path, key, source)
    if not world and not RANK:
        make_world(cfg, path, key, sequences, items, n_skipped)
    gathered(None)  # the others wait until the first has written it
    return world or read_world(cfg, path, key, source)


def read_world(cfg, path, key, source):
    """The World kept in a file, or None if there is none or it was made of other data or settings."""
    saved = load_tensors(path) if os.path.exists(path) else {}
    if saved.get("key") != key:
        return None
    splits = [Split(*(t.numpy() for t in saved[name])) for name in ("train", "val", "test")]
    nearest = {name: t.numpy() for name, t in zip(STATED, saved["nearest"])}
    return World(saved["words"], cfg.n_labels, *splits, source, saved["notes"], {FRESH: saved["fresh"].numpy()}, nearest)


def make_world(cfg, path, key, sequences, items, n_skipped):
    """Prepares the World and writes it to the file that read_world reads."""
    print("preparing Amazon Beauty: pre-ranker, evidence, ranking writer (about a minute, once) ...", file=sys.stderr)
    train, val, test, fresh = prepare(sequences, items, cfg.hybrid)
    nearest = rare(train)
    for lists in (train, val, test):
        merge_rare(lists, nearest)
    write_scores(train, val, test)
    in_list = lambda lists: np.flatnonzero(lists.target < cfg.n_candidates)  # of shorter lists fewer users have their target in them
    fresh, val, test = fresh[in_list(test)], val.take(in_list(val)), test.take(in_list(test))
    words, rng = beauty_words(items, cfg.n_labels), np.random.default_rng(11)
    # All examples whose target is in the list (the population that is tested), filled up with others: the writer
    # orders any list.
    hit = (train.target >= 0) & (train.target < cfg.n_candidates)
    rows = np.concatenate((rng.permutation(np.flatnonzero(hit)), rng.permutation(np.flatnonzero(~hit))))[:cfg.n_train]
    rows = rng.permutation(rows)
    notes = {"users": len(sequences), "skipped_users": n_skipped, "items": len(items), "train_examples": len(train.user),
             "train_hits": int(hit.sum()), "val_hits": len(val.user), "test_hits": len(test.user)}
    fresh = fresh[fresh < cfg.n_candidates].reshape(-1, cfg.n_candidates)
    saved = {"key": key, "words": words, "notes": notes, "fresh": torch.from_numpy(fresh[:cfg.n_test]),
             "nearest": [torch.from_numpy(x) for x in nearest.values()]}
    for name, lists, rows in (("train", train, rows), ("val", val, slice(cfg.n_val)), ("test", test, slice(cfg.n_test))):
        lists = lists.take(rows)
        k = list_lengths(len(rows), cfg, rng) if name == "train" else np.full(len(lists.user), cfg.n_candidates)
        split = tokenize(lists, items, words, k, cfg.n_candidates)
        saved[name] = [torch.from_numpy(getattr(split, f)) for f in split.__dataclass_fields__]
    save_tensors(path, saved)
