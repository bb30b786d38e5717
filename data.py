"""Worlds, prompts, traces and answers: everything between a file on disk and token ids.

An example is a prompt (history and K candidates in pre-ranked order), a trace (a profile, then the evidence of every
candidate, in the prompt's order; never a rank or a winner) and an answer (the K labels, best first). Every statement of
a trace is computed from what the prompt shows, so a written trace can be checked by rule.

    response = <profile> ... L1 e e e L2 e e e ... <answer> L4 L1 ... [EOS]

Two worlds share this format: the toy world (synthetic, with a Bayes oracle) and Amazon Beauty.
"""
import argparse
import ast
import collections
import dataclasses
import functools
import gzip
import html
import http.client
import json
import os
import re
import sys
import tempfile
import urllib.error
import urllib.request
import zlib
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from config import UserError
from model import EOS, PAD

SPECIAL = ["[PAD]", "[MASK]", "[EOS]", "<history>", "<last>", "<candidates>", "<profile>", "<answer>"]
HISTORY, LAST, CANDIDATES, PROFILE, ANSWER, LABEL = 3, 4, 5, 6, 7, 8  # label i is token LABEL + i


@dataclass
class Split:
    """Examples as arrays, one row each: everything a stage or the evaluation may look at."""
    prompt: np.ndarray  # (N, P) int16, left-padded
    trace: np.ndarray   # (N, T) int16, right-padded: the trace as the rule writes it from the prompt
    order: np.ndarray   # (N, max_list) int8, labels best first by oracle or trace writer, -1 behind the list's end
    target: np.ndarray  # (N,) int8, label of the true next item, -1 if it is not in the list
    incoming: np.ndarray  # (N, max_list) int8, labels of the candidates in pre-ranked order (0, 1, ... unless labels are random)

    def __len__(self):
        return len(self.prompt)

    @functools.cached_property  # drawing a batch asks for it at every step
    def k(self):
        """(N,) lengths of the lists."""
        return (self.incoming >= 0).sum(1)

    @functools.cached_property
    def response(self):
        """(N, R) int16, right-padded: trace, <answer>, labels, [EOS]."""
        return responses(self.trace, self.order)

    def take(self, rows):
        return Split(*(getattr(self, f)[rows] for f in self.__dataclass_fields__))


@dataclass
class World:
    words: list         # token id -> word
    n_labels: int
    train: Split
    val: Split
    test: Split
    source: str         # where the data came from, for the report
    notes: dict         # measured facts about the data: counts, pre-ranker figures
    references: dict = dataclasses.field(default_factory=dict)  # name -> (N, max_list) order of the test candidates, a row beside ours
    nearest: dict = dataclasses.field(default_factory=dict)     # beauty: how evidence is rounded, see beauty.rare

    @property
    def max_response(self):
        """Longest response of the world, in training lists too: trace, <answer>, labels, [EOS]."""
        return self.train.trace.shape[1] + 1 + self.train.order.shape[1] + 1


def tensors(split, rows, device):
    """The rows' prompts and reference responses as int64 tensors: (n, P), (n, R), no column all padding."""
    prompt, response = split.prompt[rows], split.response[rows]
    prompt, response = prompt[:, (prompt != PAD).any(0)], response[:, (response != PAD).any(0)]
    return torch.from_numpy(prompt).to(device).long(), torch.from_numpy(response).to(device).long()


def responses(trace, order):
    """trace (N, T), order (N, K) list positions, -1 = none -> responses (N, T + K + 2), right-padded."""
    N = len(trace)
    column = lambda token: np.full((N, 1), token, np.int16)
    labels = np.where(order >= 0, order + LABEL, PAD).astype(np.int16)
    return pack(np.concatenate((trace, column(ANSWER), labels, column(EOS)), axis=1), left=False)


def pack(tokens, left):
    """Move the [PAD] tokens of each row to one side, the other tokens keeping their order: (N, T) -> (N, T)."""
    is_pad = tokens == PAD
    order = np.argsort(~is_pad if left else is_pad, axis=1, kind="stable")
    tokens = np.take_along_axis(tokens, order, axis=1)
    used = int((tokens != PAD).sum(1).max())
    return tokens[:, -used:] if left else tokens[:, :used]


# --- Reading what a model wrote ----------------------------------------------------------------------------------------

@dataclass
class Answers:
    """Parsed answers of N responses, arrays over rows."""
    order: np.ndarray         # (N, K) the ranking as served: invalid answers repaired; -1 behind the list's end
    valid: np.ndarray         # (N,) bool: exactly the k labels of the list, each once, then [EOS]
    duplicated: np.ndarray    # (N,) bool: a label twice
    dropped: np.ndarray       # (N,) bool: a label of the list missing
    out_of_set: np.ndarray    # (N,) bool: a token that is no label of the list
    identity: np.ndarray      # (N,) bool: the ranking as served is the incoming order
    trace_tokens: np.ndarray  # (N,) tokens before <answer>


def parse_answers(tokens, incoming):
    """Read the answers of responses (N, R), right-padded, to lists with the labels incoming (N, K), -1 behind their end.

    Repair, as a server would: first occurrences are kept, missing labels follow in pre-ranked order.
    """
    tokens, width = np.asarray(tokens), incoming.shape[1]
    R, k = tokens.shape[1], (incoming >= 0).sum(1)
    place = np.argsort(np.where(incoming >= 0, incoming, np.arange(width)), axis=1)  # (N, K) of each label in the incoming order
    at = np.arange(R)
    started = np.cumsum(tokens == ANSWER, axis=1) > 0
    start = np.where(started.any(1), started.argmax(1), (tokens != PAD).sum(1))
    ended = tokens == EOS
    end = np.where(ended.any(1), ended.argmax(1), (tokens != PAD).sum(1))
    inside = (at > start[:, None]) & (at < end[:, None])
    position = tokens - LABEL
    is_label = inside & (position >= 0) & (position < k[:, None])
    hit = is_label[:, :, None] & (position[:, :, None] == np.arange(width))  # (N, R, K)
    times = hit.sum(1)  # (N, K)
    listed = np.arange(width) < k[:, None]
    first = np.where(times > 0, hit.argmax(1), R + place)  # missing labels sort behind, in pre-ranked order
    first = np.where(listed, first, 10 ** 6)
    order = np.where(listed, np.argsort(first, axis=1, kind="stable"), -1)
    duplicated, dropped = (times > 1).any(1), ((times == 0) & listed).any(1)
    out_of_set = (inside & ~is_label).any(1)
    valid = ended.any(1) & ~duplicated & ~dropped & ~out_of_set
    identity = (order == incoming).all(1)
    return Answers(order, valid, duplicated, dropped, out_of_set, identity, np.minimum(start, end))


def statements(tokens, n_labels):
    """Split one trace (a sequence of ids) into statements: each starts at <profile> or at a label. What stands before
    the first start is a statement too (and matches nothing)."""
    parts = []
    for token in tokens:
        if token in (PAD, ANSWER, EOS):
            break
        if not parts or token == PROFILE or LABEL <= token < LABEL + n_labels:
            parts.append([])
        parts[-1].append(int(token))
    return [tuple(part) for part in parts]


def faithfulness(tokens, trace, n_labels):
    """Share of true statements in the traces of responses (N, R) -> (N,) in [0, 1].

    Correct statements / max(required, made). `trace` (N, T) holds what the rule writes from the prompt: one profile and
    one statement a candidate are required; missing, repeated, unparsable or about a non-candidate counts as wrong.
    """
    score = np.zeros(len(tokens))
    for n, (row, reference) in enumerate(zip(tokens, trace)):
        made, required = statements(row, n_labels), set(statements(reference, n_labels))
        score[n] = len(required.intersection(made)) / max(len(required), len(made), 1)
    return score


# --- The toy world ------------------------------------------------------------------------------------------------------
# An item has 3 attributes of 5 values. A user has one favourite value an attribute, never shown; each attribute of an item
# that the user takes is the favourite with probability q, else uniform. Other candidates are uniform. The pre-ranker
# knows nothing but a position prior for the target. So the best ranking given the prompt has a closed form.

TOY_ATTRIBUTES, TOY_VALUES, TOY_HISTORY, TOY_Q, TOY_PRIOR = 3, 5, 6, 0.6, 0.25
TOY_MOST = 3  # evidence counts stop here: 3 means 3 or more


def toy_words(n_labels):
    return (SPECIAL + [f"L{i + 1}" for i in range(n_labels)] + [f"{a}{v}" for a in "xyz" for v in range(TOY_VALUES)] +
            [f"{a}{v}:{c}" for a in "xyz" for v in range(TOY_VALUES) for c in range(TOY_MOST + 1)])


def toy_oracle(counts, items, k):
    """Bayes score of each candidate: log P(target = c | prompt) + const, (N, K); -inf behind the list's end.

    counts (N, A, V) of the history, items (N, K, A), k (N,). The favourite's posterior is f_v ~ rho^count_v with
    rho = (q + (1-q)/V) / ((1-q)/V); an item taken by the user has value v with probability p_v = q f_v + (1-q)/V, any
    other item with 1/V. Hence score = log prior(position) + sum over attributes of log(V p_v).
    """
    other = (1 - TOY_Q) / TOY_VALUES
    f = ((TOY_Q + other) / other) ** counts.astype(np.float64)
    p = TOY_Q * f / f.sum(-1, keepdims=True) + other  # (N, A, V)
    rows, attributes = np.arange(len(items))[:, None, None], np.arange(TOY_ATTRIBUTES)
    score = np.log(TOY_VALUES * p[rows, attributes, items]).sum(-1) - TOY_PRIOR * np.arange(items.shape[1])
    return np.where(np.arange(items.shape[1]) < k[:, None], score, -np.inf)


def toy_split(n, k, cfg, rng):
    """n examples with lists of length k (n,), K = cfg.max_list columns."""
    A, V, H, K = TOY_ATTRIBUTES, TOY_VALUES, TOY_HISTORY, cfg.max_list
    favourite = rng.integers(V, size=(n, 1, A))
    taken = lambda m: np.where(rng.random((n, m, A)) < TOY_Q, favourite, rng.integers(V, size=(n, m, A)))
    history, items = taken(H), rng.integers(V, size=(n, K, A))
    listed = np.arange(K) < k[:, None]  # (n, K)
    prior = np.where(listed, np.exp(-TOY_PRIOR * np.arange(K)), 0)
    target = (rng.random((n, 1)) * prior.sum(1, keepdims=True) > prior.cumsum(1)).sum(1)
    items[np.arange(n), target] = taken(1)[:, 0]
    incoming = np.where(listed, np.arange(K), -1)
    if cfg.random_labels:  # of the list's own k labels
        incoming = np.where(listed, np.argsort(np.where(listed, rng.random((n, K)), 2), axis=1), -1)
    return toy_examples(history, items, incoming, incoming[np.arange(n), target], cfg.n_labels)


def toy_examples(history, items, incoming, target, n_labels):
    """The Split of histories (n, TOY_HISTORY, A) and candidates (n, K, A), values 0 .. V - 1, with the labels incoming (n, K), -1
    behind a list's end; target (n,): the label of the true next item."""
    A, V, n, words, listed = TOY_ATTRIBUTES, TOY_VALUES, len(items), toy_words(n_labels), incoming >= 0
    counts = (history[..., None] == np.arange(V)).sum(1)  # (n, A, V)
    score = toy_oracle(counts, items, listed.sum(1))
    order = np.where(listed, np.take_along_axis(incoming, np.argsort(-score, axis=1, kind="stable"), 1), -1)
    attribute = words.index("x0") + np.arange(A) * V
    column = lambda token: np.full((n, 1), token, np.int16)
    labels = LABEL + incoming[..., None]
    shown = np.where(listed[..., None], np.concatenate((labels, items + attribute), axis=2), PAD).reshape(n, -1)
    prompt = pack(np.concatenate((column(HISTORY), (history + attribute).reshape(n, -1), column(CANDIDATES), shown), 1), left=True)
    # Profile: the most frequent value of each attribute (ties: the smallest). Evidence: each of the candidate's three
    # values with how often the history has it, up to 3: x2:3. (A bare count is learned several times more slowly: the
    # value in the token is what teaches the model to look the candidate up.)
    times = counts[np.arange(n)[:, None, None], np.arange(A), items].clip(max=TOY_MOST)
    seen = words.index("x0:0") + (np.arange(A) * V + items) * (TOY_MOST + 1) + times
    evidence = np.where(listed[..., None], np.concatenate((labels, seen), axis=2), PAD).reshape(n, -1)
    trace = pack(np.concatenate((column(PROFILE), counts.argmax(2) + attribute, evidence), 1), left=False)
    return Split(prompt.astype(np.int16), trace.astype(np.int16), order.astype(np.int8), target.astype(np.int8), incoming.astype(np.int8))


def list_lengths(n, cfg, rng):
    """Training list lengths (n,): K, or, for a share vary_lists, uniform in [min_list, max_list]. Without variation
    the answer's length could be learned by heart, and a label out of the list could never appear."""
    return np.where(rng.random(n) < cfg.vary_lists, rng.integers(cfg.min_list, cfg.max_list + 1, n), cfg.n_candidates)


def toy_world(cfg):
    rng = np.random.default_rng([7])  # one world for all seeds of the training
    fixed = lambda n: np.full(n, cfg.n_candidates)
    train = toy_split(cfg.n_train, list_lengths(cfg.n_train, cfg, rng), cfg, rng)
    val, test = toy_split(cfg.n_val, fixed(cfg.n_val), cfg, rng), toy_split(cfg.n_test, fixed(cfg.n_test), cfg, rng)
    return World(toy_words(cfg.n_labels), cfg.n_labels, train, val, test, "synthetic", {})


# --- Amazon Beauty: the files -------------------------------------------------------------------------------------------

BASE_URL = "https://snap.stanford.edu/data/amazon/productGraph/categoryFiles/"
RAW_LIMITS = {"reviews_Beauty_5.json.gz": 60 * 10**6, "meta_Beauty.json.gz": 140 * 10**6}  # bytes, compressed
COUNTS = (22_363, 198_502, 12_101)  # users, interactions, items of the 2014 release
HEADER = ["item_id", "asin", "brand", "categories"]
MAX_LINE, MAX_BYTES = 2**20, 2**31  # a small .gz can inflate to anything, so both are bounded
MIN_SEEN = 5  # attributes seen fewer times are dropped, as in the prepared files
POSITIVE = re.compile(r"[1-9][0-9]{0,8}")
NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
ASIN = re.compile(r"""['"]asin['"]: *['"]([A-Za-z0-9_-]+)['"]""")


def read_lines(path):
    """Yields (line number, text) of a plain or .gz file; a missing, damaged, huge or empty one raises UserError."""
    name, number, total = os.path.basename(path), 0, 0
    hint = (f"fetch {BASE_URL}{name} anew, then run `python data.py --convert`" if name in RAW_LIMITS else
            "pass --data_dir with the folder of the prepared files, or run `python data.py --download`")
    try:
        with (gzip.open if path.endswith(".gz") else open)(path, "rb") as file:
            while line := file.readline(MAX_LINE + 1):
                number, total = number + 1, total + len(line)
                if len(line) > MAX_LINE or total > MAX_BYTES:
                    raise UserError(f"{path}, line {number}: over {MAX_LINE} bytes a line or {MAX_BYTES} in all; {hint}")
                yield number, line.decode("utf-8").rstrip("\r\n")
    except (FileNotFoundError, NotADirectoryError):
        folder = os.path.dirname(path) or "."
        what = f"the file {name} is missing in {folder}" if os.path.isdir(folder) else f"there is no folder {folder}"
        raise UserError(f"{what}; {hint}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}, line {number}: the text is not UTF-8; {hint}") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}, line {number + 1}: the file is cut off or unreadable ({error}); {hint}") from None
    if not number:
        raise UserError(f"{path} is empty; {hint}")


def bad_line(path, number, expected, line):
    more = "…" if len(line) > 80 else ""
    return UserError(f"{path}, line {number}: expected {expected}, found {line[:80]!r}{more}")


def read_beauty(data_dir):
    """Returns (sequences: list of (length,) int64 item indices in time order, items: list of (brand, path tuple), source: str,
    n_skipped: users with fewer than 3 items, names: item id or asin -> item index, to read requests). Raises UserError for a
    missing or malformed file."""
    path, items, index, asins = os.path.join(data_dir, "items.tsv"), [], {}, {}
    for number, line in read_lines(path):
        fields = line.split("\t")
        parts = tuple(part.strip() for part in fields[-1].split(" > "))
        if number == 1:
            if fields != HEADER:
                raise bad_line(path, 1, "the header " + repr("\t".join(HEADER)), line)
            continue
        if len(fields) != 4 or not POSITIVE.fullmatch(fields[0]) or not fields[1].strip() or not all(parts):
            raise bad_line(path, number, "4 tab-separated fields: item_id (positive), asin, brand, A > B > C", line)
        if fields[0] in index:
            raise UserError(f"{path}, line {number}: item id {fields[0]} is there twice; keep one of the two lines")
        index[fields[0]] = asins[fields[1].strip()] = len(items)
        items.append((fields[2].strip(), parts))

    path, sequences, users = os.path.join(data_dir, "sequences.txt"), [], set()
    for number, line in read_lines(path):
        user, *fields = line.split() or [""]
        indices = [index.get(field) for field in fields]
        if None in indices and POSITIVE.fullmatch(missing := fields[indices.index(None)]):
            raise UserError(f"{path}, line {number}: items.tsv lacks item {missing}; use two files made together")
        if not fields or None in indices or not POSITIVE.fullmatch(user):
            raise bad_line(path, number, "a user id and its item ids, positive integers separated by blanks", line)
        if user in users:
            raise UserError(f"{path}, line {number}: user id {user} is there twice; keep one of the two lines")
        users.add(user)
        sequences.append(indices)
    n_skipped = sum(len(s) < 3 for s in sequences)
    sequences = [s for s in sequences if len(s) >= 3]  # an item each to train, validate and test on
    if not sequences:
        raise UserError(f"{path} has no user with 3 or more items; pass --data_dir with another folder")

    # Ids leak: numbered by first appearance, they tell which items are bought together. No model sees them.
    rng = np.random.default_rng(20140)
    order = rng.permutation(len(items))
    rank = np.argsort(order)
    sequences = [rank[sequences[user]] for user in rng.permutation(len(sequences))]
    source_path, source = os.path.join(data_dir, "source.txt"), "prepared files"
    if os.path.exists(source_path):
        source = next(read_lines(source_path))[1].strip()[:200] or source
    names = {name: int(rank[old]) for name, old in {**asins, **index}.items()}
    return sequences, [items[old] for old in order], source, n_skipped, names


def check_counts(data_dir):
    """Raises UserError unless the folder holds as many users, interactions and items as the 2014 release."""
    sequences, items, _, n_skipped, _ = read_beauty(data_dir)
    found = (len(sequences) + n_skipped, sum(map(len, sequences)), len(items))
    if found != COUNTS:
        raise UserError(f"found {found} users, interactions and items, not the {COUNTS} of the 2014 release; "
                        f"delete {' and '.join(RAW_LIMITS)}, then run `python data.py --download`")


def clean(text):
    # Lone surrogates cannot be written as UTF-8; tabs and newlines would break the table.
    return " ".join(html.unescape(text).encode("utf-8", "ignore").decode("utf-8").split())


def convert_raw(raw_dir, out_dir, check=None):
    """Writes items.tsv, sequences.txt and source.txt from the raw files; check(folder of the new files), if given, runs
    before they replace the old ones. Raises UserError, and then leaves the old files as they were."""
    reviews_path, meta_path = (os.path.join(raw_dir, name) for name in RAW_LIMITS)
    history = {}  # user -> [(time, asin)], users by first appearance
    for number, line in read_lines(reviews_path):
        try:
            review = json.loads(line)
            user, asin, time = review["reviewerID"], review["asin"], review["unixReviewTime"]
            good = NAME.fullmatch(user) and NAME.fullmatch(asin) and type(time) is int
        except (ValueError, KeyError, TypeError, RecursionError):
            good = False
        if not good:
            raise bad_line(reviews_path, number, "a JSON object with reviewerID, asin and unixReviewTime", line)
        history.setdefault(user, []).append((time, asin))
    ids, sequences = {}, []
    for reviews in history.values():
        reviews.sort(key=lambda review: review[0])  # stable: ties, frequent at day resolution, keep the file's order
        sequences.append([ids.setdefault(asin, len(ids) + 1) for _, asin in reviews])

    attributes = {}  # asin -> (brand, parts)
    for number, line in read_lines(meta_path):
        found = ASIN.findall(line)
        if found and ids.keys().isdisjoint(found):
            continue  # 19 of 20 lines: parsing them would take minutes
        try:
            meta = ast.literal_eval(line)  # never eval: that would run whatever a downloaded file says
            paths = meta.get("categories") or []
            if not all(isinstance(path, list) for path in paths):
                raise TypeError
            parts = [clean(part) for path in paths for part in path[1:]]  # joined, each less its root (Beauty)
            if meta["asin"] in ids:
                attributes[meta["asin"]] = clean(meta.get("brand") or ""), [part for part in parts if part]
        except (ValueError, SyntaxError, TypeError, AttributeError, KeyError, MemoryError, RecursionError):
            raise bad_line(meta_path, number, "a Python literal {'asin': …, 'categories': [[…]], …}", line) from None
    # One count for brands and parts alike: the prepared files keep a brand seen once where a category has its name.
    seen = collections.Counter(name for brand, parts in attributes.values() for name in [brand, *parts] if name)
    rows = ["\t".join(HEADER)]
    for asin, number in ids.items():
        brand, parts = attributes.get(asin, ("", []))
        path = " > ".join(part for part in parts if seen[part] >= MIN_SEEN) or "Unknown"
        rows.append(f"{number}\t{asin}\t{brand if seen[brand] >= MIN_SEEN else ''}\t{path}")
    texts = {"items.tsv": rows, "source.txt": ["converted from " + " and ".join(RAW_LIMITS)],
             "sequences.txt": [" ".join(map(str, [user, *seq])) for user, seq in enumerate(sequences, 1)]}
    try:
        os.makedirs(out_dir, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out_dir) as staging:  # in out_dir, so that os.replace stays on one disk
            for name, lines in texts.items():
                with open(os.path.join(staging, name), "w", encoding="utf-8", newline="\n") as file:
                    file.write("\n".join(lines) + "\n")
            if check:
                check(staging)
            for name in texts:
                os.replace(os.path.join(staging, name), os.path.join(out_dir, name))
    except OSError as error:
        raise UserError(f"cannot write to {out_dir} ({error}); pass a --data_dir you may write to") from None


def fetch(url, part, limit, timeout):
    """Downloads url into the file part, going on where that file ends. Raises OSError, HTTPException, UserError."""
    start = os.path.getsize(part) if os.path.exists(part) else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        response = urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not start:
            raise
        os.remove(part)  # nothing after start: the part is whole or of another file, and a fresh start settles which
        return fetch(url, part, limit, timeout)
    with response:
        resumed = response.status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {start}-")
        if response.status != 200 and not resumed:
            raise OSError(f"unexpected answer {response.status} to a request from byte {start} on")
        size, length = start if resumed else 0, response.headers.get("Content-Length")
        total = size + int(length) if length else None
        with (open(part, "ab" if resumed else "wb") as file,  # a server that ignores Range sends all of it again
              tqdm(total=total, initial=size, unit="B", unit_scale=True, desc=os.path.basename(url)) as bar):
            while (total or 0) <= limit and size <= limit and (block := response.read(2**16)):
                size += len(block)
                file.write(block)
                bar.update(len(block))
    if max(size, total or 0) > limit:
        os.remove(part)
        raise UserError(f"{url} is larger than the {limit} bytes expected; fetch the 2014 file by hand")
    if total is not None and size != total:
        raise OSError(f"the connection ended at byte {size} of {total}")


def download_raw(raw_dir, timeout=30):
    """Fetches the raw files that raw_dir lacks; an interrupted one goes on at its .part file. Raises UserError."""
    for name, limit in RAW_LIMITS.items():
        path = os.path.join(raw_dir, name)
        try:
            os.makedirs(raw_dir, exist_ok=True)
            if not os.path.exists(path):
                fetch(BASE_URL + name, path + ".part", limit, timeout)
                os.replace(path + ".part", path)  # the final name only ever holds a whole file
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise UserError(f"downloading {BASE_URL}{name} failed ({error}); run this again to go on, or fetch the "
                            f"file by hand, put it into {raw_dir} and run `python data.py --convert`") from None


# --- One entry for every script -------------------------------------------------------------------------------------------

def load_world(cfg):
    """The world that the settings name."""
    if cfg.world == "toy":
        world = toy_world(cfg)
    else:
        from beauty import beauty_world  # it imports this file
        world = beauty_world(cfg)
    if not cfg.trace:
        for split in (world.train, world.val, world.test):
            split.trace = split.trace[:, :0]
    return world


def main():
    parser = argparse.ArgumentParser(description="Without a flag: read the data and print its counts.")
    parser.add_argument("--data_dir", default="data/beauty", help="the folder of the prepared and the raw files")
    parser.add_argument("--download", action="store_true", help="fetch the raw files, convert them, check the counts")
    parser.add_argument("--convert", action="store_true", help="convert raw files already there, check the counts")
    args = parser.parse_args()
    try:
        if args.download:
            download_raw(args.data_dir)
        if args.download or args.convert:
            convert_raw(args.data_dir, args.data_dir, check_counts)
        sequences, items, source, n_skipped, _ = read_beauty(args.data_dir)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"{args.data_dir} ({source}): {len(sequences):,} users, {sum(map(len, sequences)):,} interactions, "
          f"{len(items):,} items; {n_skipped:,} users with fewer than 3 items skipped")


if __name__ == "__main__":
    main()
