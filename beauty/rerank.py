"""Re-ranks your own requests with the last finished stage of a run, at the operating point.

    python beauty/rerank.py --config small --requests requests.jsonl > ranked.jsonl
    python beauty/rerank.py --config small --requests -        # a line in, a line out

A line is a request: {"history": [...], "candidates": [...]}, with an "id" (string or integer) if
you like; the history oldest first, the candidates in their incoming order, n_candidates / 2 to
n_candidates of them. An item is

    Beauty  an item id of items.tsv (integer or string), or an asin, or
            {"brand": "...", "categories": "A > B > C"} for an item that the data does not know:
            it has no links and no popularity; A > B must be known, the brand may be ""
    toy     a list of three values 0 to 4; a history has at least six, of which the last six count

It gives one line, in the same order: "id", or "line", its number; "ranking", the candidates as
given, best first; "valid", whether the answer named each once (if not, the ranking is repaired as
in data.parse_answers); "trace", what was written before the answer (L3: the third candidate; b2:
the second brand of the prompt; values as in evidence.FIELDS); "faithful", the share of true
statements in it (null without traces); "forwards", "tokens", "stage"; with --trace bound,
"decisive", {"L3": "L1"}: L1 would be first without what the trace says of L3. A line that cannot
be read gives {"line": n, "error": "..."}, and the sentence on stderr; the others go on. Blank
lines are skipped. A request is answered as soon as its line is there; lines that wait together are
answered together. Exit code: 0, 1 after a line that could not be read, 2 for what stops everything.
"""
import itertools
import json
import os
import reprlib
import sys
from dataclasses import dataclass

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from plumbing.script import script  # noqa: E402  first: it prepares for torch
from beauty.amazon import read_beauty  # noqa: E402
from beauty.evidence import Found, make_lists, merge_rare  # noqa: E402
from beauty.prerank import K, Counts, Histories, attributes  # noqa: E402
from beauty.tokens import tokenize  # noqa: E402
from data import PAD, faithfulness, parse_answers, statements, tensors  # noqa: E402
from plumbing.checkpoint import device_of, last_student  # noqa: E402
from plumbing.decoding import BATCH  # noqa: E402
from plumbing.settings import Text, UserError  # noqa: E402
from report.decisive import decisive  # noqa: E402
from toy.world import TOY_ATTRIBUTES, TOY_HISTORY, TOY_VALUES, toy_examples  # noqa: E402
from trainer import decode, load_world  # noqa: E402

MAX_LINE = 2 ** 16  # bytes
KINDS = {"history": [list], "candidates": [list], "id": [str, int]}


@dataclass(frozen=True)
class Options:
    requests: Text() = ""  # file with a request a line; - for the standard input


# --- Reading ----------------------------------------------------------------------------------

def batches(file):
    """Yields lists of (number, line) of a binary file without its blank lines: all lines that are
    there already, at most BATCH. It waits only while there is none. Of a line that is too long
    only the beginning is kept."""
    number, rest, ended = 0, b"", False
    while not ended:
        chunk = file.read1(MAX_LINE)  # what is there; nothing at the end of the file
        ended = not chunk
        *whole, rest = (rest + chunk).split(b"\n")
        if ended:
            whole, rest = [rest], b""
        rest = rest[:MAX_LINE + 1]
        numbered = [(number + i, line) for i, line in enumerate(whole, 1) if line.strip()]
        number += len(whole)
        for first in range(0, len(numbered), BATCH):
            yield numbered[first:first + BATCH]


def parse_request(line):
    """A line -> the request, a dict with the right keys and types. Raises UserError."""
    if len(line) > MAX_LINE:
        raise UserError(f"the line has more than {MAX_LINE} bytes")
    try:
        request = json.loads(line, parse_constant=int)  # int("NaN") is a ValueError
    except (ValueError, RecursionError):
        raise UserError("this is no JSON, or nested too deeply")
    needed = KINDS.keys() - {"id"}
    good = isinstance(request, dict) and needed <= request.keys() <= KINDS.keys()
    if not good or any(type(request[key]) not in KINDS[key] for key in request):
        raise UserError('expected {"history": [...], "candidates": [...]}, and an "id" (string or '
                        f"integer) if you like, found {reprlib.repr(request)}")
    return request


def read_request(line, reader, cfg):
    """A line -> the request (a dict), its history and its candidates as reader.item reads them.
    Raises UserError."""
    request = parse_request(line)
    history = [reader.item(x) for x in request["history"]]
    candidates = [reader.item(x) for x in request["candidates"]]
    n, shortest = len(candidates), reader.shortest_history
    if len(history) < shortest or not cfg.min_list <= n <= cfg.n_candidates:
        raise UserError(f"the history must have at least {shortest} items, the list of candidates "
                        f"{cfg.min_list} to {cfg.n_candidates}: here they have {len(history)} and "
                        f"{n}")
    for i, j in itertools.combinations(range(n), 2):
        # Two items that are described may well be described alike.
        if candidates[i] == candidates[j] and isinstance(candidates[i], int):
            raise UserError(f"candidates {i + 1} and {j + 1} are the same item")
    return request, history, candidates


# --- The worlds -------------------------------------------------------------------------------

def filled(rows, width):
    """Lists of items -> each repeated or cut to width items, by its first one."""
    return [(row + row[:1] * width)[:width] for row in rows]


class ToyRequests:
    shortest_history = TOY_HISTORY

    def __init__(self, cfg, world):
        self.cfg = cfg

    def item(self, x):
        """An item as a request gives it -> a tuple of values. Raises UserError."""
        good = isinstance(x, list) and len(x) == TOY_ATTRIBUTES
        if not good or any(type(v) is not int or not 0 <= v < TOY_VALUES for v in x):
            raise UserError(f"unknown item {reprlib.repr(x)}: on the toy world an item is a list "
                            "of three values 0 to 4")
        return tuple(x)

    def examples(self, histories, candidates):
        """Lists of lists of items -> Split."""
        width = self.cfg.n_candidates
        length = np.array([len(row) for row in candidates])
        place = np.arange(width)
        incoming = np.where(place < length[:, None], place, -1)
        history = np.array([row[-TOY_HISTORY:] for row in histories])
        items = np.array(filled(candidates, width))
        no_target = np.full(len(length), -1)
        return toy_examples(history, items, incoming, no_target, self.cfg.n_labels)


class BeautyRequests:
    """The evidence is that of test users: it counts all but the last item of every sequence."""
    shortest_history = 1

    def __init__(self, cfg, world):
        self.cfg, self.world, self.hybrid = cfg, world, cfg.world == "beauty_hybrid"
        sequences, self.items, _, _, self.names = read_beauty(cfg.data_dir)
        # One more row, of zeros: that of all items which the data does not know.
        self.counts = Counts(sequences, len(self.items) + (not self.hybrid), 1)
        self.categories = {path[:2] for _, path in self.items}

    def item(self, x):
        """An item as a request gives it -> its number, or (brand, path) if the data does not know
        it. Raises UserError."""
        if type(x) in (int, str) and str(x) in self.names:
            return self.names[str(x)]
        described = (isinstance(x, dict) and x.keys() == {"brand", "categories"}
                     and all(isinstance(value, str) for value in x.values()))
        if not described or self.hybrid:  # the hybrid's scores need the attributes of all items
            raise UserError(f"unknown item {reprlib.repr(x)}: give an item id or asin of "
                            "items.tsv, or (not with --world beauty_hybrid) an object with brand "
                            "and categories")
        path = tuple(part.strip() for part in x["categories"].split(" > "))
        if not all(path) or path[:2] not in self.categories:
            raise UserError(f"unknown category {x['categories'][:60]!r}: no item of items.tsv has "
                            "the same first two levels")
        return x["brand"].strip(), path

    def examples(self, histories, candidates):
        """Lists of lists of items -> Split."""
        # New items are numbered after those of the data.
        named = itertools.chain(*histories, *candidates)
        new = list(dict.fromkeys(x for x in named if isinstance(x, tuple)))
        number = {x: len(self.items) + i for i, x in enumerate(new)}
        histories = [[number.get(x, x) for x in row] for row in histories]
        candidates = [[number.get(x, x) for x in row] for row in candidates]
        n = len(candidates)
        length = np.array([len(row) for row in candidates])
        end = np.array([len(row) for row in histories])
        flat = np.concatenate(histories).astype(np.int64)
        # Short lists are filled up with their first candidate: no maximum over them changes.
        cands, no_target = np.array(filled(candidates, K)), np.full(n, -1)
        found = Found(np.arange(n), end, cands, no_target)
        items = self.items + new
        told = Histories(flat, np.cumsum(end) - end, end)
        lists, _ = make_lists(self.counts, attributes(items), self.hybrid, told, found)
        merge_rare(lists, self.world.nearest)
        lists.score = np.zeros(found.cands.shape)  # no ranking is known
        return tokenize(lists, items, self.world.words, length, self.cfg.n_candidates)


def requests_of(cfg, world):
    reader = BeautyRequests if cfg.world.startswith("beauty") else ToyRequests
    return reader(cfg, world)


# --- Answering --------------------------------------------------------------------------------

def answers(cfg, world, stage, model, split):
    """Decodes a Split. Yields, row by row, the ranking (places in the list) and what else there is
    to say."""
    prompt, _ = tensors(split, range(len(split)), device_of(cfg))
    decoded = decode(cfg, model, prompt, world.max_response)
    tokens = decoded.tokens.cpu().numpy()
    parsed = parse_answers(tokens, split.incoming)
    true = faithfulness(world.plain(tokens), split.trace, world.n_labels)
    for n, row in enumerate(tokens):
        trace = []
        for statement in statements(row, world.n_labels):
            trace.append(" ".join(world.words[token] for token in statement))
        result = {
            "valid": bool(parsed.valid[n]),
            "faithful": float(true[n]) if cfg.trace != "none" else None,
            "trace": "; ".join(trace), "forwards": int(decoded.forwards[n]),
            "tokens": int((row != PAD).sum()), "stage": stage}
        if cfg.trace == "bound":
            found = decisive(cfg, world, (stage, model), row, split.incoming[n])
            result["decisive"] = {world.words[a]: world.words[b] for a, b in found.items()}
        yield parsed.order[n, :split.list_length[n]], result


def answer_batch(batch, reader, cfg, world, student):
    """Lines [(number, bytes)] -> one dict a line, in their order: a result or an error."""
    out, good = [], []
    for number, line in batch:
        try:
            request, history, candidates = read_request(line, reader, cfg)
            out.append({"id": request["id"]} if "id" in request else {"line": number})
            good.append((out[-1], request["candidates"], history, candidates))
        except UserError as error:
            out.append({"line": number, "error": str(error)})
            print(f"line {number}: {error}", file=sys.stderr)
    if good:
        results, given, histories, candidates = zip(*good)
        split = reader.examples(histories, candidates)
        if cfg.trace == "none":
            split.trace = split.trace[:, :0]
        found = answers(cfg, world, *student, split)
        for result, items, (ranking, rest) in zip(results, given, found):
            result["ranking"] = [items[place] for place in ranking]
            result.update(rest)
    return out


def main(cfg, options):
    try:
        file = sys.stdin.buffer if options.requests == "-" else open(options.requests, "rb")
    except OSError as error:
        raise UserError(f"cannot read the requests '{options.requests}' ({error.strerror}): pass "
                        "--requests with a file, or -")
    world, failed = load_world(cfg), False
    student = last_student(cfg, world)  # the stage's name, the model
    reader = requests_of(cfg, world)
    for batch in batches(file):
        out = answer_batch(batch, reader, cfg, world, student)
        failed = failed or any("error" in line for line in out)
        print(*map(json.dumps, out), sep="\n", flush=True)
    sys.exit(int(failed))


if __name__ == "__main__":
    script(main, __doc__, Options)
