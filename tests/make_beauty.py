"""Synthetic files in the layout of Amazon Beauty, for tests and CI:
`python tests/make_beauty.py FOLDER`."""
import os
import sys

import numpy as np


def make_beauty(folder, n_users=400, n_items=200, n_groups=10, per_user=8):
    """Users stay mostly within a group of items that share a category and a few brands, so that
    counts predict. per_user: items of a user before repeated ones are taken out."""
    rng = np.random.default_rng(0)
    os.makedirs(folder, exist_ok=True)
    group = rng.integers(n_groups, size=n_items)
    with open(os.path.join(folder, "items.tsv"), "w") as f:
        f.write("item_id\tasin\tbrand\tcategories\n")
        for i in range(n_items):
            brand = ["", f"Brand {group[i]}", f"Brand {rng.integers(n_groups)}"][rng.integers(3)]
            path = f"Top {group[i] % 3} > Mid {group[i]} > Leaf {group[i]}.{i % 2}"
            f.write(f"{i + 1}\tA{i:05d}\t{brand}\t{path}\n")
    with open(os.path.join(folder, "sequences.txt"), "w") as f:
        for u in range(n_users):
            mine = np.flatnonzero(group == rng.integers(n_groups))
            liked = rng.random(per_user) < 0.8
            near, any_ = rng.choice(mine, per_user), rng.integers(n_items, size=per_user)
            items = np.where(liked, near, any_) + 1
            f.write(f"{u + 1} " + " ".join(map(str, dict.fromkeys(items.tolist()))) + "\n")


if __name__ == "__main__":
    make_beauty(sys.argv[1])
