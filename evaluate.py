"""Evaluation: every stage on the same test users, in one table.

    python evaluate.py --config toy            # about 2 minutes on 2 CPU cores
    python evaluate.py --config toy --show 3   # three users, and what the last student wrote

Reads the checkpoints under runs/<config>/seed*/; writes report.json, report.md and figures there.
Students are decoded at one operating point (block size, commit rule, tau); a curve over tau serves
the figures. A metric is taken *as served* (an invalid answer is repaired) and *strict* (it counts
0). Beside the stages: *naive*, the teacher's weights under the student's sampler, and
*constrained*, the last student, allowed permutations only; *lossless*, AR's text, drafted by it.
"""
import dataclasses
import functools
import math

from plumbing.script import script  # before numpy and torch: see there

import numpy as np

from data import PAD, faithfulness, parse_answers
from plumbing.checkpoint import finished_stages
from plumbing.decoding import decode_split
from plumbing.processes import RANK
from report.beside import results_beside
from report.constrained import constrained_decode
from report.figures import draw_figures
from report.lossless import lossless_write
from report.options import Options, chosen_split, finished_seeds
from report.rows import SCORED, Result, first_users, known_orders, make_report, write_report
from report.show import show
from report.speed import add_times
from report.table import summary
from trainer import ar_write, decode, load_world

METRICS = ("recall@1", "recall@3", "recall@5", "ndcg@3", "ndcg@5", "ndcg@10", "mrr")
PARSED = ("valid", "duplicated", "dropped", "out_of_set", "identity", "trace_tokens")
OF_TEACHER = ("ar", "naive")
OF_AR = {"ar": ar_write, "lossless": lossless_write}  # the text is the teacher's
MUST_DIFFER = 50  # fewer users that differ support no interval: it would be too narrow


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
    """All that is measured on responses (N, R) to the rows of a split: {name: (N,) array}."""
    answers = parse_answers(tokens, split.incoming)
    out = score_order(split, answers.order)
    for metric in METRICS:
        out[f"strict {metric}"] = out[f"served {metric}"] * answers.valid
    for name in PARSED:
        out[name] = getattr(answers, name).astype(float)
    if split.trace.shape[1]:  # else nothing is claimed
        said, rule = world.plain(tokens), world.plain(split.trace)
        out["faithful"] = faithfulness(said, rule, world.n_labels)
    if forwards is not None:
        out["forwards"] = forwards.astype(float)
        out["tokens"] = (tokens != PAD).sum(1).astype(float)
    return out


def score_order(split, order):
    """The same for rankings (N, K) that no model wrote."""
    rank = (order == split.target[:, None]).argmax(1)
    identity = (order == split.incoming).all(1).astype(float)
    out = {"valid": np.ones(len(rank)), "identity": identity}
    for metric, values in ranking_metrics(rank).items():
        out[f"served {metric}"] = values
        out[f"strict {metric}"] = values
    return out


# --- Is a difference more than chance? --------------------------------------------------------

@functools.lru_cache(maxsize=2)  # all comparisons of n users share them: drawing costs the most
def resampled(n, n_draws=2000):
    """How often each of n users is drawn in bootstrap samples of n: (n_draws, n)."""
    return np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=n_draws)


def paired_bootstrap(a, b):
    """95 % interval of mean(a - b), scores (N,) of the same users, drawn with replacement:
    [low, mean, high]. Paired, so what makes a user hard for both cancels."""
    difference = a - b
    means = resampled(len(difference)) @ difference / len(difference)
    low, high = np.quantile(means, [0.025, 0.975])
    return [float(low), float(difference.mean()), float(high)]


def paired_interval(difference):
    """95 % interval of a mean difference (seeds, N), a - b, of N users -> [low, mean, high], and
    how many users differ on some seed. low and high are None where fewer than 50 do.

    The bootstrap draws users and holds the seeds fixed. Other seeds would train other students,
    so the variance of the mean over k seeds is added: side = sqrt(side^2 + 1.96^2 s^2 / k).
    How often it holds the true value is simulated in tests/test_evaluate.py."""
    n_differ = int((difference != 0).any(0).sum())
    low, mean, high = paired_bootstrap(difference.mean(0), 0.0)
    if n_differ < MUST_DIFFER:
        return [None, mean, None], n_differ
    by_seeds = 0.0
    if len(difference) > 1:
        by_seeds = 1.96 * difference.mean(1).std(ddof=1) / len(difference) ** 0.5
    low = mean - math.hypot(mean - low, by_seeds)
    high = mean + math.hypot(high - mean, by_seeds)
    return [low, mean, high], n_differ


# --- Decoding every stage ---------------------------------------------------------------------

def stage_decoder(cfg, world, model, stage, tau):
    """The decoder of a stage as decode_split wants it: token by token for the teacher."""
    def decoder(prompt, rows):
        if stage in OF_AR:
            decoded = OF_AR[stage](cfg, model, prompt, world.max_response)
        elif stage == "constrained":
            decoded = constrained_decode(cfg, world, model, prompt, rows)
        else:
            decoded = decode(cfg, model, prompt, world.max_response, tau)
        return decoded.tokens, decoded.forwards
    return decoder


def evaluate_stage(cfg, options, world, model, stage):
    """A stage at the operating point, on all users; at other taus on the first: [Result]."""
    def at(tau, n_users, reported):
        split = world.test.take(slice(0, n_users))
        decoder = stage_decoder(cfg, world, model, stage, tau)
        tokens, forwards = decode_split(cfg, split, decoder, f"seed {cfg.seed} {stage} tau {tau}")
        return Result(stage, cfg.seed, tau, reported, score(world, split, tokens, forwards))

    few = min(options.eval_curve_users, len(world.test))
    served = at(None if stage == "ar" else cfg.tau, len(world.test), True)
    scores = first_users(served.scores, few)  # the operating point is on the curve too
    results = [served, dataclasses.replace(served, reported=False, scores=scores)]
    if stage not in ("constrained", *OF_AR):
        others = sorted(set(options.eval_taus) - {cfg.tau})
        results += [at(tau, few, False) for tau in others]
    return results


def evaluate_seed(cfg, options, world, known):
    """Results of every finished stage of a seed; its teacher's are taken from known, if given."""
    finished = finished_stages(cfg, world)
    models = {stage: model for stage, (model, _) in finished.items()}
    last = list(models)[-1]
    models["naive"] = models["ar"]
    if last != "ar":
        models |= {"constrained": models[last], "lossless": (models["ar"], models[last])}

    results = [dataclasses.replace(result, seed=cfg.seed) for result in known]
    for stage in SCORED:
        if stage in models and not (known and stage in OF_TEACHER):
            results += evaluate_stage(cfg, options, world, models[stage], stage)
    add_times(cfg, options, world, models, finished, results)
    return results


def main(cfg, options):
    world, name = chosen_split(load_world(cfg), options)
    if options.show:
        return show(cfg, world, options.show)
    results = []
    for row, order in known_orders(cfg, world).items():
        results.append(Result(row, None, None, True, score_order(world.test, order)))
    results += results_beside(cfg, options, world)  # other runs (--beside)
    known = []
    for seed in finished_seeds(cfg, options.seeds):
        found = evaluate_seed(dataclasses.replace(cfg, seed=seed), options, world, known)
        results += found
        if cfg.teacher:  # one for all seeds: it is decoded once
            known = [result for result in found if result.stage in OF_TEACHER]

    report = make_report(cfg, options, world, results, paired_interval)
    if RANK == 0:  # printed first: a full disk or a figure that fails must not cost the table
        print(f"\n{summary(report)}", flush=True)
    write_report(cfg, name, report, results, world.test.target)
    if RANK == 0:
        draw_figures(cfg, options, world, report, results)


if __name__ == "__main__":
    script(main, __doc__, Options)
