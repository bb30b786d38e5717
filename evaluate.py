"""Evaluation: every stage on the same test users, in one table.

    python evaluate.py --config toy               # on 2 CPU cores: less than a minute
    python evaluate.py --config toy --show 3      # three users: what AR and the student wrote
    python evaluate.py --config toy --seeds 0,1,2

Reads the checkpoints under runs/<config>/seed*/, and writes report.json, report.md and figures to
runs/<config>/. The students are decoded with one block size, commit rule and tau; on the first
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
import functools
from dataclasses import dataclass

import numpy as np

from data import PAD, faithfulness, joined, parse_answers
from ours.lossless import lossless_decode
from plumbing.checkpoint import finished_stages
from plumbing.processes import RANK
from plumbing.script import script
from plumbing.settings import Numbers, OneOf, Real, Text, Whole
from report.figures import draw_figures
from report.show import show
from report.speed import speeds
from report.table import (Result, chosen_seeds, first_users, known_orders, make_report, summary,
                          write_report)
from trainer import ar_writer, block_writer, decode_split, load_world, rule_of

METRICS = ("recall@1", "recall@3", "recall@5", "ndcg@3", "ndcg@5", "ndcg@10", "mrr")
PARSED = ("valid", "duplicated", "dropped", "out_of_set", "identity", "trace_tokens")
CURVE = ("naive", "cft", "opd", "rl")  # rows that are decoded at several tau
TIMED = ("ar", "cft", "lossless")      # rows whose speed is measured
MUST_DIFFER = 50                       # where fewer users differ, an interval would be too narrow


@dataclass(frozen=True)
class Options:
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


def score_order(split, order):
    """The same for rankings (N, K) that no model wrote."""
    rank = (order == split.target[:, None]).argmax(1)             # (N,)
    identity = (order == split.incoming).all(1).astype(float)
    out = {"valid": np.ones(len(rank)), "identity": identity}
    for metric, values in ranking_metrics(rank).items():
        out[f"served {metric}"] = values
        out[f"strict {metric}"] = values
    return out


# --- Is a difference more than chance? --------------------------------------------------------

@functools.lru_cache(maxsize=2)  # all comparisons of n users use the same draws, which cost most
def resampled(n, n_draws=2000):
    """How often each of n users is in each bootstrap sample of n users: (n_draws, n)."""
    counts = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=n_draws)
    return counts.astype(np.float32)


def paired_bootstrap(a, b):
    """The 95 % interval of mean(a - b), scores (N,) of the same users: [low, mean, high].

    Users are drawn with replacement, and the mean is taken anew each time. a and b are paired:
    what makes a user hard for both cancels."""
    difference = a - b                                            # (N,)
    counts = resampled(len(difference))                           # (n_draws, N)
    means = counts @ difference.astype(np.float32) / len(difference)  # (n_draws,)
    low, high = np.quantile(means, [0.025, 0.975])
    return [float(low), float(difference.mean()), float(high)]


@functools.cache
def t_quantile(df):
    """The t for which a variable T of Student's distribution with df degrees of freedom lies in
    [-t, t] with probability .95.

    With T = sqrt(df) tan(angle), the density of the angle is proportional to
    cos(angle)^(df - 1). So the angle can be read off its cumulative sum."""
    angle = np.linspace(0, np.pi / 2, 100001)
    middle = (angle[1:] + angle[:-1]) / 2
    density = np.cos(middle) ** (df - 1)
    up_to = np.append(0, np.cumsum(density)) / density.sum()      # P(|T| <= sqrt(df) tan(angle))
    return float(df ** 0.5 * np.tan(np.interp(0.95, up_to, angle)))


def paired_interval(difference):
    """The 95 % interval of a mean difference, differences (seeds, N) of the same N users ->
    [low, mean, high], and how many users differ on some seed. Where fewer than 50 do, low and
    high are None.

    One seed: the bootstrap over users. k seeds: other users and other seeds would both give
    another mean, so its variance has two parts. Each is known from so few values that it gets the
    quantile of Student's t for its own degrees of freedom; two seeds have 12.7 instead of 1.96.

        users   variance over users of the mean over seeds, / n
        seeds   variance over seeds of the mean over users, / k, less what noise adds to it
        side    sqrt(t(n - 1)^2 users + t(k - 1)^2 seeds)

    How often this holds the true value is simulated in tests/test_evaluate.py."""
    k, n = difference.shape
    n_differ = int((difference != 0).any(0).sum())
    mean = float(difference.mean())
    if n_differ < MUST_DIFFER:
        return [None, mean, None], n_differ
    if k == 1:
        return paired_bootstrap(difference[0], 0.0), n_differ
    of_user = difference.mean(0)                                  # (N,)
    of_seed = difference.mean(1)                                  # (k,)
    rest = difference - of_user - of_seed[:, None] + mean         # what neither explains
    noise = (rest ** 2).sum() / ((k - 1) * (n - 1)) / (k * n)     # its variance in the mean
    users = of_user.var(ddof=1) / n
    seeds = max(0.0, of_seed.var(ddof=1) / k - noise)
    side = float(t_quantile(n - 1) ** 2 * users + t_quantile(k - 1) ** 2 * seeds) ** 0.5
    return [mean - side, mean, mean + side], n_differ


# --- Decoding every stage ---------------------------------------------------------------------

def models_of(stages):
    """{row: model} for the rows of the table that stages, {stage: (model, checkpoint)}, allow."""
    models = {"ar": stages["ar"][0], "naive": stages["ar"][0]}
    models |= {stage: model for stage, (model, _) in stages.items()}
    # Of the students only CFT's is trained to decode token by token as well.
    if "cft" in stages and stages["cft"][1]["settings"]["cft_ar_weight"]:
        models["own ar"] = models["lossless"] = models["cft"]
    return models


def decoder_of(cfg, row, model, tau=None):
    """The decoder of a row (trainer.py), at the settings' tau or at another."""
    def lossless(prompt, max_len):
        return lossless_decode(model, prompt, max_len, cfg.block_size, rule_of(cfg))

    if row == "lossless":
        return lossless
    return ar_writer(model) if row in ("ar", "own ar") else block_writer(cfg, model, tau)


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
    for seed in chosen_seeds(cfg, options.seeds):
        results += evaluate_seed(dataclasses.replace(cfg, seed=seed), options, world)

    report = make_report(cfg, options, world, results, paired_interval)
    print("\n" + summary(report), flush=True)  # first: a full disk must not cost the table
    name = "report" if options.eval_split == "test" else "report_val"
    write_report(cfg, name, report)
    if options.eval_split == "test":
        draw_figures(cfg, report)


if __name__ == "__main__":
    script(main, __doc__, Options)
