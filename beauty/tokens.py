"""This module writes the candidate lists of Amazon Beauty as prompts and traces.

An item is shown by three tokens: its brand (b), its category's first two levels, its full category
path (p). Brands and paths are numbered by first appearance in the prompt: evidence asks only
whether they are equal, and 20 numbers are learned several times faster than 436 brands and 227
paths. A candidate takes six tokens in the prompt and six in the trace, which answer to each other
one by one:

    prompt   L3   b2           Makeup > Nails  p5    link,via   co,links,pop
    trace    L3   brand:match  depth           leaf  link,via   co,links,pop
    means    the  how many of  levels of the   how many  copied: strength of the link and whose it
             third the history's category that of the    is; users who have both, history items
             candi- brands it  it shares with  history's that link to it, its popularity
             date  has         the last item   paths

Three tokens must be worked out from the history that the prompt shows, two are copied from the
prompt. With ten candidates a trace takes 64 tokens, <answer> included: at block sizes 4 to 64 the
answer starts a block of its own. A whole list, 2 of 8 history items and 2 candidates of it:

    prompt   <history> b1 Makeup > Nails p1 <last> b2 Skin Care > Face p2
             <candidates> L1 b1 Makeup > Nails p3 link:7,2 co:1,1,4  L2 b? ...
    trace    <profile> b2 Skin Care > Face
             L1 brand:1 depth:0 leaf:0 link:7,2 co:1,1,4  L2 brand:unknown ...
"""
import itertools

import numpy as np

from beauty.evidence import FIELDS, HIST, STATED, attributes, number
from beauty.prerank import K
from data import CANDIDATES, HISTORY, LABEL, LAST, NONE, PAD, PROFILE, SPECIAL, Split, pack
from plumbing.settings import UserError

BRAND_MATCH = ["brand:unknown", "brand:0", "brand:1", "brand:1,last", "brand:2", "brand:2,last",
               "brand:3+", "brand:3+,last"]  # the word of each value of FIELDS["brand"]


def category_of(path):
    """The word of a category path: its first two levels."""
    return " > ".join(path[:2])


def beauty_words(items, n_labels):
    """The vocabulary: template, labels, evidence, numbers of brands and paths, categories."""
    words = SPECIAL + [f"L{i + 1}" for i in range(n_labels)] + BRAND_MATCH
    for name, fields in STATED.items():
        ranges = [range(FIELDS[field]) for field in fields]
        for values in itertools.product(*ranges):
            words.append(f"{name}:{','.join(map(str, values))}")
    words += ["b?"]
    words += [f"b{i + 1}" for i in range(HIST + K)]
    words += [f"p{i + 1}" for i in range(HIST + K)]
    categories = {category_of(path) for _, path in items}
    if taken := sorted(categories.intersection(words)):
        raise UserError(f"the category {taken[0]!r} of items.tsv is a word that prompts use "
                        "otherwise; give it another name")
    words += sorted(categories)
    if len(words) > np.iinfo(np.int16).max:
        raise UserError(f"the data is too large: {len(words)} words, most of them categories (A > "
                        "B of A > B > C), and a token has 15 bits; use coarser categories")
    return words


# --- Items ------------------------------------------------------------------------------------

def first_seen(ids):
    """Ids (N, n) numbered by first appearance in their row: 0, 1, ...; -1 = none stays.

        7 3 7 -1 5   ->   0 1 0 -1 2"""
    same = ids[:, :, None] == ids[:, None]                           # (N, n, n)
    first = same.argmax(2)                                           # (N, n) where each is first
    is_first = first == np.arange(ids.shape[1])                      # (N, n)
    new = is_first & (ids >= 0)                                      # (N, n)
    number_at = new.cumsum(1) - 1                                    # (N, n) of the last new one
    numbers = np.take_along_axis(number_at, first, 1)                # (N, n)
    return np.where(ids >= 0, numbers, -1)


def most_frequent(tokens):
    """The most frequent token (N,) of each row (N, H), [PAD] aside; if several, the first."""
    same = tokens[:, :, None] == tokens[:, None]                     # (N, H, H)
    times = np.where(tokens == PAD, 0, same.sum(2))                  # (N, H)
    rows = np.arange(len(tokens))                                    # (N,)
    return tokens[rows, times.argmax(1)]


def shown_items(item, items, id_of):
    """The three tokens (N, n, 3) of each item (N, n), in the order of the prompt; -1 = none."""
    no_item = [[-1] * 4]                                             # the last row, item -1
    attr = np.concatenate((attributes(items), no_item))              # (I + 1, 4)
    category = [id_of[category_of(path)] for _, path in items]
    category = np.array([*category, PAD], np.int16)                  # (I + 1,)

    brand = attr[item, 0]                                            # (N, n) ids, 0 = unknown
    known = np.where(brand > 0, brand, -1)                           # (N, n)
    brand = np.where(brand == 0, id_of["b?"], id_of["b1"] + first_seen(known))  # (N, n) tokens
    path = id_of["p1"] + first_seen(attr[item, 3])                   # (N, n) tokens
    shown = np.stack((brand, category[item], path), -1)              # (N, n, 3)
    return np.where(item[..., None] >= 0, shown, PAD)


# --- Prompts and traces -----------------------------------------------------------------------

def evidence_tokens(evidence, id_of):
    """The tokens (N, K) that state each candidate's evidence, a dict: brand, and as in STATED."""
    tokens = {"brand": evidence["brand"] + id_of[BRAND_MATCH[0]]}
    for name, fields in STATED.items():
        first = f"{name}:{','.join('0' * len(fields))}"
        tokens[name] = id_of[first] + number(evidence, fields)
    return tokens


def places(columns, listed):
    """Columns of tokens (N, K) side by side, candidate after candidate: (N, K x columns).

    Where a place of the list is empty, that is not listed (N, K), they are <none>."""
    tokens = np.stack(columns, -1)                                   # (N, K, columns)
    tokens = np.where(listed[..., None], tokens, NONE)
    return tokens.reshape(len(tokens), -1)


def repeated(token, n):
    return np.full((n, 1), token, np.int16)


def write_prompt(shown, label, said, listed):
    """Prompts (N, P). shown (N, 8 + K, 3) has the history, oldest first, then the candidates."""
    n = len(shown)
    before, last = shown[:, :HIST - 1], shown[:, HIST - 1]           # (N, 7, 3) and (N, 3)
    brand, category, path = np.moveaxis(shown[:, HIST:], -1, 0)      # (N, K) each
    columns = [label, brand, category, path, said["link"], said["co"]]
    parts = (
        repeated(HISTORY, n), before.reshape(n, -1),
        repeated(LAST, n), last,
        repeated(CANDIDATES, n), places(columns, listed))
    return np.concatenate(parts, 1)


def write_trace(shown, label, said, listed):
    """Traces (N, T) of the same."""
    recent = shown[:, HIST - 1::-1]  # (N, 8, 3) most recent first: of equally frequent ones it wins
    brand = most_frequent(recent[..., 0])                            # (N,)
    category = most_frequent(recent[..., 1])                         # (N,)
    columns = [label]
    columns += [said[name] for name in ("brand", "depth", "leaf", "link", "co")]
    parts = (
        repeated(PROFILE, len(shown)), brand[:, None], category[:, None],
        places(columns, listed))
    return np.concatenate(parts, 1)


def tokenize(lists, items, words, list_length, width):
    """The Split of lists that are cut to list_length (N,) candidates, in `width` places (K)."""
    n = len(list_length)
    id_of = {word: token for token, word in enumerate(words)}
    place = np.arange(width)                                         # (K,)
    listed = place < list_length[:, None]                            # (N, K)
    cands = np.where(listed, lists.cands[:, :width], -1)             # (N, K)
    oldest_first = lists.hist[:, ::-1]                               # (N, 8)
    in_order = np.concatenate((oldest_first, cands), 1)              # (N, 8 + K) as in the prompt
    shown = shown_items(in_order, items, id_of)                      # (N, 8 + K, 3)
    evidence = {}
    for name, values in lists.evidence.items():
        evidence[name] = values[:, :width].astype(np.int64)          # (N, K)
    said = evidence_tokens(evidence, id_of)
    label = np.broadcast_to(LABEL + place, (n, width))               # (N, K)
    prompt = pack(write_prompt(shown, label, said, listed), left=True)  # (N, P)
    trace = write_trace(shown, label, said, listed)                  # (N, T)

    score = np.where(listed, lists.score[:, :width], -np.inf)        # (N, K)
    best_first = np.argsort(-score, axis=1, kind="stable")           # (N, K)
    order = np.where(listed, best_first, -1)                         # (N, K)
    target = np.where(lists.target < list_length, lists.target, -1)  # (N,)
    incoming = np.where(listed, place, -1)                           # (N, K)
    return Split(
        prompt.astype(np.int16), trace.astype(np.int16),
        order.astype(np.int8), target.astype(np.int8), incoming.astype(np.int8))
