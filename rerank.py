"""Re-ranks your own requests with the last finished stage of a run, at the operating point.

    python rerank.py --config small --requests requests.jsonl > ranked.jsonl     # --requests -: the standard input

A line is a request: {"history": [...], "candidates": [...]}, with an "id" (string or integer) if you like; the history oldest
first, the candidates in their incoming order, min_list to n_candidates of them. An item is

    Beauty  an item id of items.tsv (integer or string), or an asin, or {"brand": "...", "categories": "A > B > C"} for an item
            that the data does not know: it has no links and no popularity; A > B must be known, the brand may be ""
    toy     a list of three values 0 to 4; a history has at least six, of which the last six count

It gives one line, in the same order: "id", or "line", its number; "ranking", the candidates as given, best first; "valid",
whether the answer named each once (if not, the ranking is repaired as in data.parse_answers); "trace", what was written before
the answer (L3: the third candidate; b2: the second brand of the prompt; values as in beauty.FIELDS); "faithful", the share of
true statements in it (null without traces); "forwards", "tokens", "stage". A line that cannot be read gives {"line": n, "error":
"..."}, and the sentence on stderr; the others go on. Blank lines are skipped. Exit code: 0, 1 after a line that could not be
read, 2 for what stops everything.
"""
import itertools
import json
import reprlib
import sys

import numpy as np

from amazon import read_beauty
from common import device_of, last_student, script, serve
from config import UserError
from data import (TOY_ATTRIBUTES, TOY_HISTORY, TOY_VALUES, faithfulness, load_world, parse_answers, statements,
                  tensors, toy_examples)
from model import PAD

MAX_LINE = 2 ** 16  # bytes
KINDS = {"history": [list], "candidates": [list], "id": [str, int]}


def lines_of(file):
    """Yields (number, line) of a binary file, blank lines left out; of a line that is too long only the beginning."""
    for number in itertools.count(1):
        line = rest = file.readline(MAX_LINE + 1)
        while rest and not rest.endswith(b"\n"):
            rest = file.readline(MAX_LINE)
        if not line:
            return
        if line.strip():
            yield number, line


def read_request(line, item, cfg):
    """A line -> the request (a dict), its history and its candidates, as item(x) reads them. UserError says what is wrong."""
    if len(line) > MAX_LINE:
        raise UserError(f"the line has more than {MAX_LINE} bytes")
    try:
        request = json.loads(line, parse_constant=int)  # int("NaN") is a ValueError
    except (ValueError, RecursionError):
        raise UserError("this is no JSON, or nested too deeply")
    if not isinstance(request, dict) or not KINDS.keys() - {"id"} <= request.keys() <= KINDS.keys() or any(
            type(request[key]) not in KINDS[key] for key in request):
        raise UserError('expected {"history": [...], "candidates": [...]}, and an "id" (string or integer) if you like, '
                        f"found {reprlib.repr(request)}")
    history, candidates = ([item(x) for x in request[key]] for key in ("history", "candidates"))
    n, shortest = len(candidates), TOY_HISTORY if cfg.world == "toy" else 1
    if len(history) < shortest or not cfg.min_list <= n <= cfg.n_candidates:
        raise UserError(f"the history must have at least {shortest} items, the list of candidates {cfg.min_list} to {cfg.n_candidates}: "
                        f"here they have {len(history)} and {n}")
    for i, j in itertools.combinations(range(n), 2):
        if candidates[i] == candidates[j] and isinstance(candidates[i], int):  # two items may well be described alike
            raise UserError(f"candidates {i + 1} and {j + 1} are the same item")
    return request, history, candidates


def toy(cfg, world):
    """-> item(x), an item as it is read (or UserError); examples(histories, candidates), lists of such lists -> Split"""
    def item(x):
        if not isinstance(x, list) or len(x) != TOY_ATTRIBUTES or any(type(v) is not int or not 0 <= v < TOY_VALUES for v in x):
            raise UserError(f"unknown item {reprlib.repr(x)}: on the toy world an item is a list of three values 0 to 4")
        return tuple(x)

    def examples(histories, candidates):
        items = np.array([(c + c[:1] * cfg.n_candidates)[:cfg.n_candidates] for c in candidates])
        place = np.arange(cfg.n_candidates)
        incoming = np.where(place < np.array([len(c) for c in candidates])[:, None], place, -1)
        history = np.array([h[-TOY_HISTORY:] for h in histories])
        return toy_examples(history, items, incoming, np.full(len(items), -1), cfg.n_labels)

    return item, examples


def beauty(cfg, world):
    """The same on Beauty. The evidence is that of test users: it counts all but the last item of every sequence of the data."""
    from beauty import make_lists, merge_rare, tokenize
    from prerank import K, Counts, attributes
    sequences, items, _, _, names = read_beauty(cfg.data_dir)
    counts = Counts(sequences, len(items) + (not cfg.hybrid), 1)  # the last row is that of all items the data does not know
    categories = {path[:2] for _, path in items}

    def item(x):
        if type(x) in (int, str) and str(x) in names:
            return names[str(x)]
        new = isinstance(x, dict) and x.keys() == {"brand", "categories"} and all(isinstance(v, str) for v in x.values())
        if not new or cfg.hybrid:  # whose scores need the attributes of all items
            raise UserError(f"unknown item {reprlib.repr(x)}: give an item id or asin of items.tsv, or (not with --hybrid) an "
                            "object with brand and categories")
        path = tuple(part.strip() for part in x["categories"].split(" > "))
        if not all(path) or path[:2] not in categories:
            raise UserError(f"unknown category {x['categories'][:60]!r}: no item of items.tsv has the same first two levels")
        return x["brand"].strip(), path

    def examples(histories, candidates):
        new = list(dict.fromkeys(x for x in itertools.chain(*histories, *candidates) if isinstance(x, tuple)))
        place = {x: len(items) + i for i, x in enumerate(new)}
        numbers = lambda rows: [np.array([place.get(x, x) for x in row]) for row in rows]
        cands = np.stack(numbers((c + c[:1] * K)[:K] for c in candidates))  # filled up with the first: no maximum changes
        k, end = (np.array([len(x) for x in rows]) for rows in (candidates, histories))
        lists, _ = make_lists(counts, attributes(items + new), cfg.hybrid, np.concatenate(numbers(histories)),
                              np.cumsum(end) - end, np.arange(len(k)), end, cands, np.full(len(k), -1))
        merge_rare(lists, world.nearest)
        lists.score = np.zeros(cands.shape)  # no ranking is known
        return tokenize(lists, items + new, world.words, k, cfg.n_candidates)

    return item, examples


def answers(cfg, world, stage, model, split):
    """Decodes a Split: yields, row by row, the ranking (places in the list) and what else there is to say."""
    prompt, _ = tensors(split, range(len(split)), device_of(cfg))
    decoded = serve(cfg, model, prompt, world.max_response)
    tokens = decoded.tokens.cpu().numpy()
    found, true = parse_answers(tokens, split.incoming), faithfulness(tokens, split.trace, world.n_labels)
    for n, row in enumerate(tokens):
        trace = "; ".join(" ".join(world.words[t] for t in part) for part in statements(row, world.n_labels))
        yield found.order[n, :split.k[n]], {
            "valid": bool(found.valid[n]), "faithful": float(true[n]) if cfg.trace else None, "trace": trace,
            "forwards": int(decoded.forwards[n]), "tokens": int((row != PAD).sum()), "stage": stage}


def main(cfg):
    try:
        file = sys.stdin.buffer if cfg.requests == "-" else open(cfg.requests, "rb")
    except OSError as error:
        raise UserError(f"cannot read the requests '{cfg.requests}' ({error.strerror}): pass --requests with a file, or -")
    world, failed = load_world(cfg), False
    stage, model = last_student(cfg, world)
    item, examples = (toy if cfg.world == "toy" else beauty)(cfg, world)
    lines = lines_of(file)
    while batch := list(itertools.islice(lines, cfg.eval_batch)):
        out, good = [], []
        for number, line in batch:
            try:
                request, *read = read_request(line, item, cfg)
                out.append({"id": request["id"]} if "id" in request else {"line": number})
                good.append((out[-1], request["candidates"], *read))
            except UserError as error:
                failed = True
                out.append({"line": number, "error": str(error)})
                print(f"line {number}: {error}", file=sys.stderr)
        if good:
            result, given, histories, candidates = zip(*good)
            split = examples(histories, candidates)
            split.trace = split.trace[:, :None if cfg.trace else 0]
            for line, items, (ranking, rest) in zip(result, given, answers(cfg, world, stage, model, split)):
                line |= {"ranking": [items[i] for i in ranking], **rest}
        print(*map(json.dumps, out), sep="\n", flush=True)
    sys.exit(int(failed))


if __name__ == "__main__":
    script(main, __doc__)
