"""This module reads the two files of Amazon Beauty.

sequences.txt has one user a line: a user id, then the ids of his items in time order. items.tsv
has a header, then one item a line: item_id, asin, brand and categories, with tabs between them.

    sequences.txt    7 512 31 31077
    items.tsv        512 <tab> B004756YJA <tab> OPI <tab> Makeup > Nails > Nail Polish

Whatever is wrong with a file is told in one sentence (UserError) that names the line.

The order inside a day is not known, because reviews carry a date and no time. A user's reviews of
one day stand in the order of their asins. docs/beauty.md says why that matters.
"""
import os

import numpy as np

from plumbing.settings import UserError

HEADER = ["item_id", "asin", "brand", "categories"]


def read_lines(path):
    """This yields (line number, text) for every line of a text file."""
    number = 0
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                yield number, line.rstrip("\n")
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): pass --data_dir with the folder "
                        "of sequences.txt and items.tsv")
    except UnicodeDecodeError:
        raise UserError(f"{path} is no UTF-8 text after line {number}: convert it to UTF-8")
    if number == 0:
        raise UserError(f"{path} is empty: pass --data_dir with the folder of the whole file")


def bad_line(path, number, expected, line):
    """This makes the error that says what was expected in a line, and what is there."""
    return UserError(f"{path}, line {number}: expected {expected}, found {line[:80]!r}")


def read_items(path):
    """This reads items.tsv.

    It returns the items, a list of (brand, tuple of category names), and a dict that gives the
    place in this list for every item id and every asin."""
    items, place_of = [], {}
    for number, line in read_lines(path):
        fields = [field.strip() for field in line.split("\t")]
        if number == 1:
            if fields != HEADER:
                raise bad_line(path, number, "the header " + " <tab> ".join(HEADER), line)
            continue
        item, asin, brand, categories = fields if len(fields) == 4 else [""] * 4
        categories = tuple(name.strip() for name in categories.split(" > "))
        if not (item and asin and all(categories)):
            raise bad_line(path, number, "item_id <tab> asin <tab> brand <tab> A > B > C", line)
        for name in {item, asin}:
            if name in place_of:
                raise UserError(f"{path}, line {number}: {name} is there twice, as an item id or "
                                "an asin: keep one of the two lines")
            place_of[name] = len(items)
        items.append((brand, categories))
    return items, place_of


def read_sequences(path, place_of):
    """This reads sequences.txt: one list of places for every user, in the file's order.

    place_of gives the place of an item id."""
    sequences, users = [], set()
    for number, line in read_lines(path):
        user, *names = line.split() or [""]
        if not names:
            raise bad_line(path, number, "a user id and item ids with blanks between them", line)
        for name in names:
            if name not in place_of:
                raise UserError(f"{path}, line {number}: items.tsv lacks the item {name[:80]!r}: "
                                "use two files that were made together")
        if user in users:
            raise UserError(f"{path}, line {number}: the user {user} is there twice: keep one of "
                            "the two lines")
        users.add(user)
        sequences.append([place_of[name] for name in names])
    return sequences


def read_beauty(data_dir):
    """This reads the files of a folder. It returns

    sequences: one array (length,) of item numbers for every user, in time order
    items: one (brand, tuple of category names) for every item number
    n_skipped: how many users were left out, because they have fewer than three items
    names: a dict from an item id or an asin to the item number"""
    items, place_of = read_items(os.path.join(data_dir, "items.tsv"))
    path = os.path.join(data_dir, "sequences.txt")
    everyone = read_sequences(path, place_of)
    # A user needs one item for training, one for validation and one for the test.
    sequences = [places for places in everyone if len(places) >= 3]
    if not sequences:
        raise UserError(f"{path} has no user with 3 or more items: pass --data_dir with another "
                        "folder")

    # The ids leak. They are numbered by first appearance, so they tell which items are bought
    # together. We shuffle items and users, and no model sees an id.
    rng = np.random.default_rng(20140)
    order = rng.permutation(len(items))              # (items,) item number -> place in the file
    number = np.argsort(order)                       # (items,) place in the file -> item number
    users = rng.permutation(len(sequences))          # (users,)
    sequences = [number[sequences[user]] for user in users]
    items = [items[place] for place in order]
    names = {name: int(number[place]) for name, place in place_of.items()}
    return sequences, items, len(everyone) - len(sequences), names
