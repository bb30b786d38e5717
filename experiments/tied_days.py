"""What is the order inside a day worth? The pre-ranker on Amazon Beauty with that order changed.

    python experiments/tied_days.py                # 2 minutes; --data_dir as in beauty/amazon.py

A user's reviews of one day stand in the order of their asins, and the pre-ranker counts which item
came first. Days are not in the prepared files, but a run of neighbours whose asins do not rise
cannot be one day. So every day lies inside a *rising run*, and the rows below change the order
inside rising runs only, for all users, targets included, which is more than the days:

    as it is
    rising runs shuffled    no order left where days can be; a bound, since true order is lost too
    falling runs shuffled   the control: no pair of these can be of one day by the order of asins
    rising runs mirrored    as much order as before, with the smaller asin last

A row: pairs of neighbours whose asins rise (all, and the test item's); test users whose target is
among the candidates; of these R@1 and N@10 of the incoming order, then R@1 over all users.
"""
import argparse
import os
import sys

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from beauty.amazon import read_beauty  # noqa: E402
from beauty.evidence import Data  # noqa: E402
from beauty.prerank import Counts  # noqa: E402


def asin_order(names, n_items):
    """-> (n_items,) the place of each item in the order of the asins. names: item id or asin (ten
    characters) -> item number."""
    asin = {item: name for name, item in names.items() if len(name) == 10}
    rank = np.empty(n_items, int)
    rank[sorted(range(n_items), key=asin.get)] = np.arange(n_items)
    return rank


def changed(sequence, rises, change):
    """The sequence with change(items) in place of each run of items between which rises (n - 1,)
    is true."""
    borders = np.flatnonzero(~rises) + 1
    return np.concatenate([change(run) for run in np.split(sequence, borders)])


def figures(sequences, n_items, rank, items):
    """The row of these sequences."""
    data, everyone = Data(sequences, items, False), np.arange(len(sequences))
    found = data.find(Counts(sequences, n_items, 2), everyone, data.length - 1)
    place = found.target[found.target >= 0]
    rises = np.concatenate([np.diff(rank[s]) > 0 for s in sequences])
    last = np.array([rank[s[-1]] > rank[s[-2]] for s in sequences])
    return [f"{rises.mean():.3f}", f"{last.mean():.3f}", str(len(place)),
            f"{(place == 0).mean():.4f}", f"{(1 / np.log2(place + 2)).mean():.4f}",
            f"{(place == 0).sum() / len(sequences):.5f}"]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--data_dir", default="data/beauty")
    sequences, items, _, _, names = read_beauty(parser.parse_args().data_dir)
    rank, rng = asin_order(names, len(items)), np.random.default_rng(0)
    steps = [np.diff(rank[s]) for s in sequences]
    both = list(zip(sequences, steps))
    rows = {"as it is": sequences,
            "rising runs shuffled": [changed(s, d > 0, rng.permutation) for s, d in both],
            "falling runs shuffled": [changed(s, d < 0, rng.permutation) for s, d in both],
            "rising runs mirrored": [changed(s, d > 0, np.flip) for s, d in both]}
    print("| order | rising | rising, test | test hits | R@1 | N@10 | R@1, all users |")
    print("|---" * 7 + "|")
    for name, changed_sequences in rows.items():
        cells = [name, *figures(changed_sequences, len(items), rank, items)]
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
