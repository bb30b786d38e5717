"""The files of Amazon Beauty: read, and made from the raw files of the 2014 release.

    python beauty/amazon.py               # read the prepared files and print their counts
    python beauty/amazon.py --download    # fetch the raw files, convert them, check the counts
    python beauty/amazon.py --convert     # convert raw files that are already there

sequences.txt has a user a line, `user_id item_id item_id ...` in time order. items.tsv has an
item a line, after a header. Whatever is wrong with a file is one sentence (UserError) that names
the line and what to do; old files stay until the new ones are whole.

The order inside a day is not known: reviews carry a date, and the raw file is sorted by asin. A
user's reviews of one day therefore stand in the order of their asins, in the prepared files too:
the next item has the larger asin in 69 % of all pairs of neighbours (71 % at the test item, 50 %
would be chance). The pre-ranker counts which item came first, so it can profit from it;
docs/beauty.md says how much.
"""
import argparse
import ast
import collections
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

import numpy as np
from tqdm import tqdm

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from plumbing.settings import UserError  # noqa: E402

BASE_URL = "https://snap.stanford.edu/data/amazon/productGraph/categoryFiles/"
# bytes, compressed
RAW_LIMITS = {"reviews_Beauty_5.json.gz": 60 * 10**6, "meta_Beauty.json.gz": 140 * 10**6}
COUNTS = (22_363, 198_502, 12_101)   # users, interactions, items of the 2014 release
HEADER = ["item_id", "asin", "brand", "categories"]
MAX_LINE, MAX_BYTES = 2**20, 2**31   # a small .gz can inflate to anything, so both are bounded
MIN_SEEN = 5                         # attributes seen fewer times are dropped, as in the release
POSITIVE = re.compile(r"[1-9][0-9]{0,8}")
NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
ASIN = re.compile(r"""['"]asin['"]: *['"]([A-Za-z0-9_-]+)['"]""")


# --- Lines of a file --------------------------------------------------------------------------

def read_lines(path):
    """Yields (line number, text) of a plain or .gz file. Raises UserError if it is missing,
    damaged, huge or empty."""
    name, number, total = os.path.basename(path), 0, 0
    if name in RAW_LIMITS:
        hint = f"fetch {BASE_URL}{name} anew, then run `python beauty/amazon.py --convert`"
    else:
        hint = ("pass --data_dir with the folder of the prepared files, or run "
                "`python beauty/amazon.py --download`")
    try:
        with (gzip.open if path.endswith(".gz") else open)(path, "rb") as file:
            while line := file.readline(MAX_LINE + 1):
                number, total = number + 1, total + len(line)
                if len(line) > MAX_LINE or total > MAX_BYTES:
                    raise UserError(f"{path}, line {number}: over {MAX_LINE} bytes a line or "
                                    f"{MAX_BYTES} in all; {hint}")
                yield number, line.decode("utf-8").rstrip("\r\n")
    except (FileNotFoundError, NotADirectoryError):
        folder = os.path.dirname(path) or "."
        what = f"the file {name} is missing in {folder}"
        if not os.path.isdir(folder):
            what = f"there is no folder {folder}"
        raise UserError(f"{what}; {hint}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}, line {number}: the text is not UTF-8; {hint}") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}, line {number + 1}: the file is cut off or unreadable ({error}); "
                        f"{hint}") from None
    if not number:
        raise UserError(f"{path} is empty; {hint}")


def bad_line(path, number, expected, line):
    more = "…" if len(line) > 80 else ""
    return UserError(f"{path}, line {number}: expected {expected}, found {line[:80]!r}{more}")


# --- The prepared files -----------------------------------------------------------------------

def read_items(path):
    """-> items: list of (brand, path tuple) in the file's order, index: item id -> place in it,
    asins: asin -> place."""
    items, index, asins = [], {}, {}
    for number, line in read_lines(path):
        fields = line.split("\t")
        if number == 1:
            if fields != HEADER:
                raise bad_line(path, 1, "the header " + repr("\t".join(HEADER)), line)
            continue
        parts = tuple(part.strip() for part in fields[-1].split(" > "))
        good = len(fields) == 4 and POSITIVE.fullmatch(fields[0]) and fields[1].strip()
        if not good or not all(parts):
            expected = "4 tab-separated fields: item_id (positive), asin, brand, A > B > C"
            raise bad_line(path, number, expected, line)
        item, asin = fields[0], fields[1].strip()
        for what, name, known in (("item id", item, index), ("asin", asin, asins)):
            if name in known:
                raise UserError(f"{path}, line {number}: {what} {name} is there twice; "
                                "keep one of the two lines")
        index[item] = asins[asin] = len(items)
        items.append((fields[2].strip(), parts))
    for name in index.keys() & asins.keys():  # a request may name an item either way
        if index[name] != asins[name]:
            raise UserError(f"{path}: {name} is the id of one item and the asin of another; "
                            f"change that asin, to A{name} for example")
    return items, index, asins


def read_sequences(path, index):
    """-> one list of places in items.tsv a user, in the file's order. index: item id -> place."""
    sequences, users = [], set()
    for number, line in read_lines(path):
        user, *fields = line.split() or [""]
        places = [index.get(field) for field in fields]
        if None in places and POSITIVE.fullmatch(missing := fields[places.index(None)]):
            raise UserError(f"{path}, line {number}: items.tsv lacks item {missing}; "
                            "use two files made together")
        if not fields or None in places or not POSITIVE.fullmatch(user):
            expected = "a user id and its item ids, positive integers separated by blanks"
            raise bad_line(path, number, expected, line)
        if user in users:
            raise UserError(f"{path}, line {number}: user id {user} is there twice; "
                            "keep one of the two lines")
        users.add(user)
        sequences.append(places)
    return sequences


def read_beauty(data_dir):
    """Reads the prepared files. Raises UserError for a missing or malformed one. Returns
        sequences: list of (length,) int64 item numbers in time order
        items: list of (brand, path tuple)
        source: str, where the files came from
        n_skipped: how many users have fewer than 3 items
        names: item id or asin -> item number, to read requests"""
    items, index, asins = read_items(os.path.join(data_dir, "items.tsv"))
    path = os.path.join(data_dir, "sequences.txt")
    everyone = read_sequences(path, index)
    sequences = [s for s in everyone if len(s) >= 3]  # an item each to train, validate and test on
    n_skipped = len(everyone) - len(sequences)
    if not sequences:
        raise UserError(f"{path} has no user with 3 or more items; pass --data_dir with another "
                        "folder")

    # Ids leak: they are numbered by first appearance, so they tell which items are bought
    # together. Items and users are shuffled, and no model sees the ids.
    rng = np.random.default_rng(20140)
    order = rng.permutation(len(items))
    new = np.argsort(order)  # place in the file -> item number
    sequences = [new[sequences[user]] for user in rng.permutation(len(sequences))]
    names = {name: int(new[place]) for name, place in {**asins, **index}.items()}
    source_path, source = os.path.join(data_dir, "source.txt"), "prepared files"
    if os.path.exists(source_path):
        source = next(read_lines(source_path))[1].strip()[:200] or source
    return sequences, [items[place] for place in order], source, n_skipped, names


def check_counts(data_dir):
    """Raises UserError unless the folder holds as many users, interactions and items as the 2014
    release."""
    sequences, items, _, n_skipped, _ = read_beauty(data_dir)
    found = (len(sequences) + n_skipped, sum(map(len, sequences)), len(items))
    if found != COUNTS:
        raise UserError(f"found {found} users, interactions and items, not the {COUNTS} of the "
                        f"2014 release; delete {' and '.join(RAW_LIMITS)}, then run "
                        "`python beauty/amazon.py --download`")


# --- From the raw files to the prepared ones --------------------------------------------------

def read_reviews(path):
    """-> ids: asin -> item id, by first appearance; sequences: one list of item ids a user."""
    history = {}  # user -> [(time, asin)], users by first appearance
    for number, line in read_lines(path):
        try:
            review = json.loads(line)
            user, asin, time = review["reviewerID"], review["asin"], review["unixReviewTime"]
            good = NAME.fullmatch(user) and NAME.fullmatch(asin) and type(time) is int
        except (ValueError, KeyError, TypeError, RecursionError):
            good = False
        if not good:
            expected = "a JSON object with reviewerID, asin and unixReviewTime"
            raise bad_line(path, number, expected, line)
        history.setdefault(user, []).append((time, asin))
    ids, sequences = {}, []
    for reviews in history.values():
        # A stable sort: reviews of one day keep the file's order, which is that of the asins.
        reviews.sort(key=lambda review: review[0])
        sequences.append([ids.setdefault(asin, len(ids) + 1) for _, asin in reviews])
    return ids, sequences


def clean(text):
    # Lone surrogates cannot be written as UTF-8; tabs and newlines would break the table.
    text = html.unescape(text).encode("utf-8", "ignore").decode("utf-8")
    return " ".join(text.split())


def read_attributes(path, ids):
    """-> asin -> (brand, parts of its category paths), for the items in ids that have a line."""
    attributes = {}
    for number, line in read_lines(path):
        found = ASIN.findall(line)
        if found and ids.keys().isdisjoint(found):
            continue  # 19 of 20 lines: parsing them would take minutes
        try:
            meta = ast.literal_eval(line)  # never eval: it runs whatever a downloaded file says
            paths = meta.get("categories") or []
            if not all(isinstance(path, list) for path in paths):
                raise TypeError
            parts = []  # all paths joined, each without its root (Beauty)
            for names in paths:
                parts += [clean(name) for name in names[1:]]
            if meta["asin"] in ids:
                brand = clean(meta.get("brand") or "")
                attributes[meta["asin"]] = brand, [part for part in parts if part]
        except (ValueError, SyntaxError, TypeError, AttributeError, KeyError, MemoryError,
                RecursionError):
            expected = "a Python literal {'asin': …, 'categories': [[…]], …}"
            raise bad_line(path, number, expected, line) from None
    return attributes


def item_rows(ids, attributes):
    """The lines of items.tsv."""
    # One count for brands and parts alike: the prepared files keep a brand that is seen once
    # where a category has its name.
    seen = collections.Counter()
    for brand, parts in attributes.values():
        seen.update(name for name in [brand, *parts] if name)
    rows = ["\t".join(HEADER)]
    for asin, number in ids.items():
        brand, parts = attributes.get(asin, ("", []))
        brand = brand if seen[brand] >= MIN_SEEN else ""
        path = " > ".join(part for part in parts if seen[part] >= MIN_SEEN) or "Unknown"
        rows.append(f"{number}\t{asin}\t{brand}\t{path}")
    return rows


def convert_raw(raw_dir, out_dir, check=None):
    """Writes items.tsv, sequences.txt and source.txt from the raw files. check(folder of the new
    files), if given, runs before they replace the old ones. Raises UserError, and then leaves the
    old files as they were."""
    reviews_path, meta_path = (os.path.join(raw_dir, name) for name in RAW_LIMITS)
    ids, sequences = read_reviews(reviews_path)
    attributes = read_attributes(meta_path, ids)
    numbered = enumerate(sequences, 1)
    texts = {"items.tsv": item_rows(ids, attributes),
             "source.txt": ["converted from " + " and ".join(RAW_LIMITS)],
             "sequences.txt": [" ".join(map(str, [user, *items])) for user, items in numbered]}
    try:
        os.makedirs(out_dir, exist_ok=True)
        # A folder inside out_dir, so that os.replace stays on one disk.
        with tempfile.TemporaryDirectory(dir=out_dir) as staging:
            for name, lines in texts.items():
                path = os.path.join(staging, name)
                with open(path, "w", encoding="utf-8", newline="\n") as file:
                    file.write("\n".join(lines) + "\n")
            if check:
                check(staging)
            for name in texts:
                os.replace(os.path.join(staging, name), os.path.join(out_dir, name))
    except OSError as error:
        raise UserError(f"cannot write to {out_dir} ({error}); pass a --data_dir you may write "
                        "to") from None


# --- The raw files ----------------------------------------------------------------------------

def fetch(url, part, limit, timeout):
    """Downloads url into the file part, and goes on where that file ends. Raises OSError,
    HTTPException, UserError."""
    start = os.path.getsize(part) if os.path.exists(part) else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        response = urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not start:
            raise
        # Nothing after start: the part is whole or of another file. A fresh start settles which.
        os.remove(part)
        return fetch(url, part, limit, timeout)
    with response:
        told = response.headers.get("Content-Range", "")
        resumed = response.status == 206 and told.startswith(f"bytes {start}-")
        if response.status != 200 and not resumed:
            raise OSError(f"unexpected answer {response.status} to a request from byte {start} on")
        size = start if resumed else 0  # a server that ignores Range sends all of it again
        length = response.headers.get("Content-Length")
        total = size + int(length) if length else None
        bar = tqdm(total=total, initial=size, unit="B", unit_scale=True, desc=os.path.basename(url))
        with open(part, "ab" if resumed else "wb") as file, bar:
            while max(size, total or 0) <= limit and (block := response.read(2**16)):
                size += len(block)
                file.write(block)
                bar.update(len(block))
    if max(size, total or 0) > limit:
        os.remove(part)
        raise UserError(f"{url} is larger than the {limit} bytes expected; fetch the 2014 file by "
                        "hand")
    if total is not None and size != total:
        raise OSError(f"the connection ended at byte {size} of {total}")


def download_raw(raw_dir, timeout=30):
    """Fetches the raw files that raw_dir lacks; an interrupted one goes on at its .part file.
    Raises UserError."""
    for name, limit in RAW_LIMITS.items():
        path = os.path.join(raw_dir, name)
        try:
            os.makedirs(raw_dir, exist_ok=True)
            if not os.path.exists(path):
                fetch(BASE_URL + name, path + ".part", limit, timeout)
                os.replace(path + ".part", path)  # the final name only ever holds a whole file
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise UserError(f"downloading {BASE_URL}{name} failed ({error}); run this again to go "
                            f"on, or fetch the file by hand, put it into {raw_dir} and run "
                            "`python beauty/amazon.py --convert`") from None


def main():
    parser = argparse.ArgumentParser(description="Without a flag: read the data, print its counts.")
    parser.add_argument("--data_dir", default="data/beauty",
                        help="the folder of the prepared and the raw files")
    parser.add_argument("--download", action="store_true",
                        help="fetch the raw files, convert them, check the counts")
    parser.add_argument("--convert", action="store_true",
                        help="convert raw files already there, check the counts")
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
    except KeyboardInterrupt:
        print("stopped: run the same command again to go on", file=sys.stderr)
        sys.exit(130)
    print(f"{args.data_dir} ({source}): {len(sequences):,} users, "
          f"{sum(map(len, sequences)):,} interactions, {len(items):,} items; "
          f"{n_skipped:,} users with fewer than 3 items skipped")


if __name__ == "__main__":
    main()
