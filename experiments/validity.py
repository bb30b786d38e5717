"""How often is an answer invalid? Counted on far more lists than have their target in them.

    python experiments/validity.py --config small --seeds 0,1,2   # all 22,363 users before their validation item; 2 minutes a stage and seed
    python experiments/validity.py --config toy                   # 20,000 fresh lists

At 99.9 % valid the test users of one seed have two invalid answers: nothing can be told from so few. Validity needs no target, so
every list will do. Writes validity.md into the run's folder.
"""
import dataclasses
import os
import sys

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import rerank  # noqa: E402
from amazon import read_beauty  # noqa: E402
from common import decode_split, finished_stages, save_atomically, script  # noqa: E402
from config import folder  # noqa: E402
from data import load_world, parse_answers, toy_split  # noqa: E402
from evaluate import finished_seeds, stage_decoder  # noqa: E402
from prerank import Counts, attributes, prerank  # noqa: E402

TOY_LISTS = 20000


def many_lists(cfg, world):
    """-> Split without targets: of the toy world fresh lists; on Beauty a list a user, what the pre-ranker puts behind all but the last
    two items, as a request (rerank.py)."""
    if cfg.world == "toy":
        return toy_split(TOY_LISTS, np.full(TOY_LISTS, cfg.n_candidates), cfg, np.random.default_rng([8]))
    sequences, items, *_ = read_beauty(cfg.data_dir)
    counts, end = Counts(sequences, len(items), 2), np.array([len(s) - 2 for s in sequences])
    histories = [s[:-2] for s in sequences]
    candidates = prerank(counts.T, counts.cnt, np.concatenate(histories), np.cumsum(end) - end, end, attributes(items) if cfg.hybrid else None)
    _, examples = rerank.beauty(cfg, world)
    return examples([h.tolist() for h in histories], candidates.tolist())


def main(cfg):
    world = load_world(cfg)
    seeds, split = finished_seeds(cfg), many_lists(cfg, world)
    lines = ["| stage | seed | answers | invalid | valid | duplicated | dropped | out of set | forwards |", "|---" * 9 + "|"]
    for seed in seeds:
        for stage, (model, _) in finished_stages(dataclasses.replace(cfg, seed=seed), world).items():
            if stage == "ar":
                continue
            tokens, forwards = decode_split(cfg, split, stage_decoder(cfg, world, model, stage, cfg.tau), f"seed {seed} {stage}")
            got = parse_answers(tokens, split.incoming)
            wrong = " | ".join(str(int(getattr(got, name).sum())) for name in ("duplicated", "dropped", "out_of_set"))
            lines.append(f"| {stage} | {seed} | {len(split)} | {int((~got.valid).sum())} | {100 * got.valid.mean():.3f} % | {wrong} | {forwards.mean():.2f} |")
            save_atomically(folder(cfg, "validity.md"), lambda path: open(path, "w").write("\n".join(lines) + "\n"))
    print("\n".join(lines))


if __name__ == "__main__":
    script(main, __doc__)
