"""This script makes sequences.txt and items.tsv from the raw files of the 2014 release.

    python beauty/convert.py FOLDER    # it holds reviews_Beauty_5.json.gz and meta_Beauty.json.gz

The result must have 22,363 users, 198,502 interactions and 12,101 items.
"""
import ast
import collections
import gzip
import html
import json
import os
import sys
import zlib

MIN_SEEN = 5  # brands and categories that are seen fewer times are dropped


def clean(text):
    """This removes tabs, line ends and what cannot be written as UTF-8."""
    text = html.unescape(text).encode("utf-8", "ignore").decode("utf-8")
    return " ".join(text.split())


def read_reviews(path):
    """This returns asin -> item id, numbered by first appearance, and the item ids of each user."""
    reviews = collections.defaultdict(list)
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for review in map(json.loads, file):
            reviews[review["reviewerID"]].append((review["unixReviewTime"], review["asin"]))
    ids, sequences = {}, []
    for own in reviews.values():
        own.sort(key=lambda review: review[0])  # by day; reviews of one day stay as they were
        sequences.append([ids.setdefault(asin, len(ids) + 1) for _, asin in own])
    return ids, sequences


def read_attributes(path, ids):
    """This returns asin -> (brand, categories), with the category paths of an item end to end."""
    attributes = {asin: ("", []) for asin in ids}
    with gzip.open(path, "rt", encoding="utf-8") as file:
        # The lines are Python literals. eval would run whatever a downloaded file says.
        for meta in map(ast.literal_eval, file):
            if meta["asin"] in ids:
                paths = meta.get("categories") or []
                names = [clean(name) for path in paths for name in path[1:]]  # without the root
                attributes[meta["asin"]] = clean(meta.get("brand") or ""), names
    return attributes


def main(folder):
    ids, sequences = read_reviews(os.path.join(folder, "reviews_Beauty_5.json.gz"))
    attributes = read_attributes(os.path.join(folder, "meta_Beauty.json.gz"), ids)
    seen = collections.Counter()  # brands and categories are counted together
    for brand, names in attributes.values():
        seen.update([brand, *names])
    items = ["item_id\tasin\tbrand\tcategories"]
    for asin, (brand, names) in attributes.items():
        brand = brand if seen[brand] >= MIN_SEEN else ""
        names = [name for name in names if name and seen[name] >= MIN_SEEN] or ["Unknown"]
        items.append(f"{ids[asin]}\t{asin}\t{brand}\t{' > '.join(names)}")
    users = [" ".join(map(str, [user, *own])) for user, own in enumerate(sequences, 1)]
    for name, lines in (("items.tsv", items), ("sequences.txt", users)):
        with open(os.path.join(folder, name), "w", encoding="utf-8", newline="\n") as file:
            file.writelines(line + "\n" for line in lines)
    print(f"{len(users):,} users, {sum(map(len, sequences)):,} interactions, {len(ids):,} items")


if __name__ == "__main__":
    if len(sys.argv) != 2 or not os.path.isdir(sys.argv[1]):
        sys.exit("usage: python beauty/convert.py FOLDER, the folder of the two raw files")
    try:
        main(sys.argv[1])
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError, SyntaxError) as error:
        sys.exit(f"error: the raw files in {sys.argv[1]} cannot be read ({error!r:.200}): download "
                 "both again")
