"""Evaluation: every stage on the same test users, in one table.

    python evaluate.py --config toy               # on 2 CPU cores: about a minute
    python evaluate.py --config toy --show 3      # three users: what AR and the student wrote
    python evaluate.py --config toy --seeds 0,1,2

Reads the checkpoints of --seed, or those of --seeds, under runs/<config>/, and writes report.json
and report.md there. The students are decoded with one block size, commit rule and tau; on the first
users also with other values of tau (the curve). Every metric of a ranking is computed twice: *as
served*, where an invalid answer is repaired, and *strict*, where it scores 0. The rows:

    prerank      the incoming order
    oracle       the order that the training text has (Beauty: writer)
    ar           the teacher, decoded token by token
    naive        the teacher's weights in the block sampler, without further training
    cft, opd, rl the students, decoded in blocks
    own ar       the weights of cft, decoded token by token
    lossless     the same text as own ar, drafted in blocks (ours/lossless.py)
"""
import dataclasses
from dataclasses import dataclass
from functools import partial

import numpy as np

from data import PAD, faithfulness, joined, parse_answers
from ours.lossless import lossless_decode
from plumbing.checkpoint import finished_stages
from plumbing.processes import RANK
from plumbing.script import script
from plumbing.settings import Numbers, OneOf, Real, Text, UserError, Whole
from report.intervals import paired_interval
from report.show import show
from report.speed import speeds
from report.table import (Result, chosen_seeds, first_users, known_orders, make_report, summary,
                          write_report)
from trainer import ar_decoder, block_decoder, decode_split, load_world, rule_of

METRICS = ("recall@1", "recall@3", "recall@5", "ndcg@3", "ndcg@5", "ndcg@10", "mrr")
PARSED = ("valid", "duplicated", "dropped", "out_of_set", "identity", "trace_tokens")
CURVE = ("cft", "opd", "rl")           # rows that are decoded at several tau
TIMED = ("ar", "cft", "lossless")      # rows whose speed is measured


@dataclass(frozen=True)
class Options:  # an annotation is the range that is allowed (plumbing/settings.py)
    show: Whole(0, 10 ** 6) = 0  # print so many test users, and what AR and the student wrote
    seeds: Text() = ""           # seeds that are averaged, such as 0,1,2; empty: that of --seed
    eval_split: OneOf("test", "val") = "test"  # val, to choose settings: writes report_val.json
    eval_taus: Numbers(above=0, high=1) = (0.5, 0.7, 0.9)  # of the curve, beside tau itself
    eval_curve_users: Whole(1, 10 ** 9) = 200  # users on the curve; the table has all
    eval_speed_seconds: Real(0, 3600) = 4.0    # spent on speed at each batch size

    PRESETS = {"small": dict(eval_curve_users=300), "full": dict(eval_curve_users=1000)}


# --- Metrics ----------------------------------------------------------------------------------

def ranking_metrics(rank):
    """Metrics of one relevant item at rank (N,), 0 = first: {name: (N,) float}.

    recall@c = [rank < c];  ndcg@c = [rank < c] / log2(rank + 2), since the ideal DCG of one item
    is 1;  mrr = 1 / (rank + 1)."""
    out = {}
    for c in (1, 3, 5):
        out[f"recall@{c}"] = (rank < c).astype(float)
    for c in (3, 5, 10):
        out[f"ndcg@{c}"] = (rank < c) / np.log2(rank + 2)
    out["mrr"] = 1 / (rank + 1)
    return out


def score_order(split, order):
    """Metrics of rankings (N, K), as if every one were valid: {name: (N,)}."""
    rank = (order == split.target[:, None]).argmax(1)             # (N,)
    identity = (order == split.incoming).all(1).astype(float)
    out = {"valid": np.ones(len(rank)), "identity": identity}
    for metric, values in ranking_metrics(rank).items():
        out[f"served {metric}"] = values
        out[f"strict {metric}"] = values
    return out


def score(world, split, tokens, forwards=None):
    """All that is measured on whole responses (N, R) to the users of a split: {name: (N,)}."""
    answers = parse_answers(tokens, split.incoming)
    out = score_order(split, answers.order)
    for metric in METRICS:
        out[f"strict {metric}"] = out[f"served {metric}"] * answers.valid
    for name in PARSED:
        out[name] = getattr(answers, name).astype(float)
    said, rule = world.plain(tokens), world.plain(split.trace)
    out["faithful"] = faithfulness(said, rule, world.n_labels)
    if forwards is not None:
        out["forwards"] = forwards.astype(float)
        out["tokens"] = (tokens != PAD).sum(1).astype(float)
    return out


# --- Decoding every stage ---------------------------------------------------------------------

def models_of(stages):
    """{stage: (model, checkpoint)} -> {row: model}, the rows of the table that can be decoded."""
    ar, _ = stages["ar"]
    models = {"ar": ar, "naive": ar}
    models |= {stage: model for stage, (model, _) in stages.items()}
    # CFT with the AR loss in the mix makes a model that decodes token by token as well.
    if "cft" in stages:
        cft, checkpoint = stages["cft"]
        if checkpoint["settings"]["cft_ar_weight"]:
            models["own ar"] = models["lossless"] = cft
    return models


def decoder_of(cfg, row, model, tau=None):
    """The decoder of a row (trainer.py), at the settings' tau or at another."""
    if row in ("ar", "own ar"):
        return ar_decoder(model)
    if row == "lossless":
        return partial(lossless_decode, model, block_size=cfg.block_size, rule=rule_of(cfg))
    return block_decoder(cfg, model, tau)


def evaluate_row(cfg, options, world, row, model):
    """A row at the settings' tau, on all test users, then the points of its curve: [Result]."""
    def result(n_users, tau, on_curve):
        split = world.test.take(slice(0, n_users))
        decoder = decoder_of(cfg, row, model, tau)
        written, forwards = decode_split(cfg, world, split, decoder)
        return Result(row, cfg.seed, score(world, split, joined(written), forwards), tau, on_curve)

    print(f"seed {cfg.seed}: {row} ...", flush=True)
    if row not in CURVE:
        return [result(len(world.test), None, False)]
    in_table = result(len(world.test), cfg.tau, False)
    n = min(options.eval_curve_users, len(world.test))
    # The table's tau is a point of the curve too: its first users need not be decoded again.
    curve = [dataclasses.replace(in_table, scores=first_users(in_table.scores, n), on_curve=True)]
    curve += [result(n, tau, True) for tau in set(options.eval_taus) - {cfg.tau}]
    return [in_table, *sorted(curve, key=lambda point: point.tau)]


def evaluate_seed(cfg, options, world):
    """The Results of all stages of a seed, with their speed and the time that training took."""
    stages = finished_stages(cfg, world)
    models = models_of(stages)
    results = []
    for row, model in models.items():
        results += evaluate_row(cfg, options, world, row, model)
    timed = {row: decoder_of(cfg, row, models[row]) for row in TIMED if row in models}
    times = speeds(cfg, world, timed, options.eval_speed_seconds)
    for result in results:
        if not result.on_curve:
            result.times = times.get(result.row, {})
        if result.row in stages:
            result.train_seconds = stages[result.row][1]["seconds"]
    return results


def main(cfg, options):
    if RANK:  # of several processes one evaluates
        return
    world = load_world(cfg)
    if options.eval_split == "val":
        world = dataclasses.replace(world, test=world.val, references={})
    if options.show:
        return show(cfg, world, options.show)
    results = [Result(row, None, score_order(world.test, order))
               for row, order in known_orders(cfg, world).items()]
    seeds = chosen_seeds(cfg, options.seeds)
    if cfg.from_ and len(seeds) > 1:
        raise UserError("--from names one run, which has one seed: leave out --seeds")
    for seed in seeds:
        results += evaluate_seed(dataclasses.replace(cfg, seed=seed), options, world)

    report = make_report(cfg, options, world, results, paired_interval)
    print("\n" + summary(report), flush=True)  # first: a full disk must not cost the table
    name = "report" if options.eval_split == "test" else "report_val"
    write_report(cfg, name, report)


if __name__ == "__main__":
    script(main, __doc__, Options)
