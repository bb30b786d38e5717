"""This script re-ranks your own requests with the last finished stage of a run on Amazon Beauty.

    python beauty/rerank.py --config small --requests requests.jsonl > ranked.jsonl
    python beauty/rerank.py --config small --requests -        # a line in, a line out

A request is one line of JSON. The history has its oldest item first, the candidates are in their
incoming order, and an item is an item id or an asin of items.tsv. An "id" may be left out.

    {"id": "a7", "history": [16, 204, 31], "candidates": [512, "B004756YJA", 77, 93, 1204]}

Each request gives one line, in the same order:

    id, or line          the request's id, or the number of its line
    ranking              the candidates as they were given, best first
    valid                whether the answer named each of them once; if not, it was repaired
    trace                what was written before the answer: L3 is the third candidate, b2 the
                         second brand of the prompt, values are as in evidence.FIELDS
    faithful             the share of true statements in the trace
    forwards, tokens     what it took to write the response, and how long that is
    stage                the stage that answered

A line that cannot be read gives {"line": 7, "error": "..."}, and the others go on. The exit code
is 0, or 1 after a line that could not be read, or 2 if nothing could be answered.
"""
import itertools
import json
import os
import reprlib
import sys
from dataclasses import dataclass

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from beauty.amazon import read_beauty  # noqa: E402
from beauty.evidence import attributes, make_lists, merge_rare  # noqa: E402
from beauty.prerank import K, Counts, Histories  # noqa: E402
from beauty.tokens import tokenize  # noqa: E402
from data import PAD, faithfulness, joined, parse_answers, statements  # noqa: E402
from plumbing.checkpoint import last_student  # noqa: E402
from plumbing.script import script  # noqa: E402
from plumbing.settings import Text, UserError  # noqa: E402
from trainer import BATCH, block_decoder, decode_split, load_world  # noqa: E402


@dataclass(frozen=True)
class Options:
    requests: Text() = ""  # file with a request a line; - for the standard input


# --- Reading ----------------------------------------------------------------------------------

def parse_request(line):
    """The request of a line, a dict with a history and candidates."""
    try:
        request = json.loads(line)
        lists = [request["history"], request["candidates"]]
    except (ValueError, KeyError, TypeError, RecursionError):
        lists = [None]
    if not all(isinstance(x, list) for x in lists):
        start = line[:80].decode("utf-8", "replace")
        raise UserError(f'expected {{"history": [...], "candidates": [...]}}, found {start!r}')
    return request


class Reader:
    """It turns requests into prompts as the test users have them, with the same evidence: all but
    the last item of every sequence is counted."""

    def __init__(self, cfg, world):
        self.cfg, self.world = cfg, world
        sequences, self.items, _, self.names = read_beauty(cfg.data_dir)
        self.attr = attributes(self.items)                                   # (I, 4)
        self.counts = Counts(sequences, len(self.items), 1)

    def item(self, x):
        """The number of an item, as a request names it."""
        if type(x) in (int, str) and str(x) in self.names:
            return self.names[str(x)]
        raise UserError(f"unknown item {reprlib.repr(x)}: give an item id or asin of items.tsv")

    def read(self, line):
        """The request of a line, and the item numbers of its history and of its candidates."""
        request = parse_request(line)
        history = [self.item(x) for x in request["history"]]
        candidates = [self.item(x) for x in request["candidates"]]
        shortest, longest = self.cfg.min_list, self.cfg.n_candidates
        if not history or not shortest <= len(candidates) <= longest:
            raise UserError(f"there must be 1 or more items in the history and {shortest} to "
                            f"{longest} candidates: here are {len(history)} and {len(candidates)}")
        if len(set(candidates)) < len(candidates):
            raise UserError("two of the candidates are the same item")
        return request, history, candidates

    def examples(self, histories, candidates):
        """The Split of N requests, given as lists of item numbers."""
        n = len(histories)
        length = np.array([len(history) for history in histories])           # (N,)
        flat = np.concatenate(histories)                                     # (M,)
        told = Histories(flat, np.cumsum(length) - length, length)
        # Short lists are filled up with their first candidate: no maximum over them changes.
        filled = [(row + row[:1] * K)[:K] for row in candidates]
        no_target = np.full(n, -1)                                           # (N,)
        lists = make_lists(
            self.counts, self.attr, np.arange(n), told, np.array(filled), no_target)
        merge_rare(lists, self.world.nearest)
        list_length = np.array([len(row) for row in candidates])             # (N,)
        width = self.cfg.n_candidates
        return tokenize(lists, self.items, self.world.words, list_length, width)


# --- Answering --------------------------------------------------------------------------------

def results(cfg, world, decoder, split):
    """What is written for a Split: for each row the ranking, as places in the list, and a dict of
    what else there is to say."""
    written, forwards = decode_split(cfg, world, split, decoder)
    tokens = joined(written)                                                 # (N, R)
    answers = parse_answers(tokens, split.incoming)
    true = faithfulness(world.plain(tokens), split.trace, world.n_labels)    # (N,)
    for n, row in enumerate(tokens):
        trace = []
        for statement in statements(row, world.n_labels):
            trace.append(" ".join(world.words[token] for token in statement))
        yield answers.order[n, :split.list_length[n]], {
            "valid": bool(answers.valid[n]), "trace": "; ".join(trace), "faithful": float(true[n]),
            "forwards": int(forwards[n]), "tokens": int((row != PAD).sum())}


def answer(batch, reader, decoder, stage):
    """One dict for each line of [(number, bytes)]: a result or an error."""
    out, good = [], []
    for number, line in batch:
        try:
            request, history, candidates = reader.read(line)
        except UserError as error:
            out.append({"line": number, "error": str(error)})
            continue
        out.append({"id": request["id"]} if "id" in request else {"line": number})
        good.append((out[-1], request["candidates"], history, candidates))
    if good:
        lines, given, histories, candidates = zip(*good)
        found = results(reader.cfg, reader.world, decoder, reader.examples(histories, candidates))
        for line, items, (ranking, rest) in zip(lines, given, found):
            line.update(ranking=[items[place] for place in ranking], **rest, stage=stage)
    return out


def main(cfg, options):
    if not cfg.world.startswith("beauty"):
        raise UserError("requests name items of Amazon Beauty: use --config small or full")
    interactive = options.requests == "-"
    try:
        file = sys.stdin.buffer if interactive else open(options.requests, "rb")
    except OSError as error:
        raise UserError(f"cannot read the requests '{options.requests}' ({error.strerror}): pass "
                        "--requests with a file, or -")
    world = load_world(cfg)
    stage, model = last_student(cfg, world)
    reader, decoder = Reader(cfg, world), block_decoder(cfg, model)
    numbered = ((number, line) for number, line in enumerate(file, 1) if line.strip())
    failed = False
    while batch := list(itertools.islice(numbered, 1 if interactive else BATCH)):
        for line in answer(batch, reader, decoder, stage):
            print(json.dumps(line), flush=True)
            if "error" in line:
                failed = True
                print(f"line {line['line']}: {line['error']}", file=sys.stderr)
    sys.exit(int(failed))


if __name__ == "__main__":
    script(main, __doc__, Options)
