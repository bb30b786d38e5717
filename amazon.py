"""The files of Amazon Beauty: read, and made from the raw files of the 2014 release.

    python amazon.py               # read the prepared files and print their counts
    python amazon.py --download    # fetch the raw files, convert them, check the counts
    python amazon.py --convert     # convert raw files that are already there

sequences.txt has a user a line, `user_id item_id item_id ...` in time order; items.tsv an item a line, with a header. Whatever is wrong
with a file is one sentence (UserError) that names the line and what to do; old files stay until new ones are whole.
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

from config import UserError

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
    hint = (f"fetch {BASE_URL}{name} anew, then run `python amazon.py --convert`" if name in RAW_LIMITS else
            "pass --data_dir with the folder of the prepared files, or run `python amazon.py --download`")
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
                        f"delete {' and '.join(RAW_LIMITS)}, then run `python amazon.py --download`")


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
                            f"file by hand, put it into {raw_dir} and run `python amazon.py --convert`") from None


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
