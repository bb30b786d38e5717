"""How often is an answer invalid? Counted on far more lists than have their target in them.

    python experiments/validity.py --config small   # all 22,363 users before their validation item
    python experiments/validity.py --config toy     # 20,000 fresh lists

At 99.9 % valid the test users of one seed have two invalid answers: nothing can be told from so
few. Validity needs no target, so every list will do. On Amazon Beauty it takes 2 minutes a stage
and seed. Writes validity.md into the run's folder.
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from plumbing.script import script  # noqa: E402  first: it sets how threads wait

import dataclasses  # noqa: E402
from dataclasses import dataclass  # noqa: E402

import numpy as np  # noqa: E402

from beauty.amazon import read_beauty  # noqa: E402
from beauty.prerank import Counts, Histories, attributes, top_candidates  # noqa: E402
from beauty.rerank import BeautyRequests  # noqa: E402
from config import folder  # noqa: E402
from data import parse_answers  # noqa: E402
from evaluate import stage_decoder  # noqa: E402
from plumbing.checkpoint import finished_stages  # noqa: E402
from plumbing.decoding import decode_split  # noqa: E402
from plumbing.settings import Text  # noqa: E402
from report.options import finished_seeds  # noqa: E402
from report.rows import write_text  # noqa: E402
from toy.world import toy_split  # noqa: E402
from trainer import load_world  # noqa: E402

TOY_LISTS = 20000
FRESH = 8  # the number of a toy split that nothing else uses
HEAD = ["stage", "seed", "answers", "invalid", "valid", "duplicated", "dropped", "out of set",
        "forwards"]


@dataclass(frozen=True)
class Options:
    seeds: Text() = "all"  # of the conversions, with commas; all: those that have finished


def many_lists(cfg, world):
    """A Split without targets: on the toy world fresh lists; on Beauty a list a user, what the
    pre-ranker puts after all but the last two items, read as a request (beauty/rerank.py)."""
    if cfg.world.startswith("toy"):
        return toy_split(TOY_LISTS, FRESH, cfg)
    sequences, items, *_ = read_beauty(cfg.data_dir)
    histories = [sequence[:-2] for sequence in sequences]
    length = np.array([len(history) for history in histories])
    counts = Counts(sequences, len(items), 2)
    attr = attributes(items) if cfg.world == "beauty_hybrid" else None
    flat = Histories(np.concatenate(histories), np.cumsum(length) - length, length)
    candidates = top_candidates(counts, flat, attr)[:, :cfg.n_candidates]
    reader = BeautyRequests(cfg, world)
    return reader.examples([history.tolist() for history in histories], candidates.tolist())


def row(cfg, world, split, stage, model):
    """What a student writes for all lists: a line of the table."""
    decoder = stage_decoder(cfg, world, model, stage, cfg.tau)
    tokens, forwards = decode_split(cfg, split, decoder, f"seed {cfg.seed} {stage}")
    got = parse_answers(tokens, split.incoming)
    counts = [(~got.valid).sum(), got.duplicated.sum(), got.dropped.sum(), got.out_of_set.sum()]
    invalid, *wrong = (str(int(count)) for count in counts)
    return [stage, str(cfg.seed), str(len(split)), invalid, f"{100 * got.valid.mean():.3f} %",
            *wrong, f"{forwards.mean():.2f}"]


def main(cfg, options):
    world = load_world(cfg)
    seeds, split = finished_seeds(cfg, options.seeds), many_lists(cfg, world)
    lines = [HEAD, ["---"] * len(HEAD)]
    for seed in seeds:
        here = dataclasses.replace(cfg, seed=seed)
        for stage, (model, _) in finished_stages(here, world).items():
            if stage == "ar":
                continue
            lines.append(row(here, world, split, stage, model))
            text = "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
            write_text(folder(cfg, "validity.md"), text)
    print(text)


if __name__ == "__main__":
    script(main, __doc__, also=Options)
