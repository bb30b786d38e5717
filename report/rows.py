"""The rows of report.json: every decode, then the mean over its seeds, with differences.

What does not apply to a row is None. A *difference* is [low, mean, high]; low and high are None
where too few users differ for an interval, and differ_from_... says how many do.
"""
import json
import math
from dataclasses import dataclass, field

import numpy as np
import torch

from config import folder
from plumbing.checkpoint import save_atomically, save_tensors
from plumbing.processes import RANK
from report.speed import NO_TIMING, device_name
from report.table import markdown

# The rows of the table, in order.
SCORED = ("ar", "naive", "cft", "opd", "rl", "constrained", "lossless")
COMPARED = ("ar", "prerank", "cft", "opd")  # rows that the others are compared with
PER_USER = ("valid", "duplicated", "dropped", "out_of_set", "faithful", "identity",
            "trace_tokens", "forwards")


@dataclass
class Result:
    """The scores of one decode of a split, or of a ranking that is not decoded here."""
    stage: str
    seed: int | None   # None: no seed of this run made it (the incoming order, another run)
    tau: float | None  # None: not decoded in blocks
    reported: bool     # at the operating point, all users; else a point of the curve
    scores: dict       # {name: (N,)}, see evaluate.score
    timing: dict = field(default_factory=lambda: dict(NO_TIMING))
    train_seconds: float | None = None

    @property
    def point(self):
        return self.stage, self.tau, self.reported


def known_orders(cfg, world):
    """Rankings of the test users that nobody has to decode: {row: order (N, K)}."""
    best = "oracle" if cfg.world.startswith("toy") else "writer"
    best = {"expert": "expert", "target": "target first"}.get(cfg.world.split("_")[-1], best)
    return {"prerank": world.test.incoming, best: world.test.order, **world.references}


def groups(results):
    """The results of each point, one a seed: rankings first, then stages, in the table's order."""
    found = {}
    for result in results:
        found.setdefault(result.point, []).append(result)

    def place(point):
        stage = point[0]
        return SCORED.index(stage) if stage in SCORED else -1
    return [found[point] for point in sorted(found, key=place)]


def report_rows(cfg, results, interval):
    """All rows: of each point one a seed, then their mean. interval: evaluate.paired_interval."""
    rows = []
    for group in groups(results):
        for result in group:
            if result.seed is not None:
                rows.append(make_row(cfg, result.seed, [result], results, interval))
        rows.append(make_row(cfg, "mean", group, results, interval))
    return rows


def make_row(cfg, seed, group, results, interval):
    """One row, from the results of one seed, or of several that are averaged."""
    first = group[0]
    n_users = len(first.scores["valid"])
    metrics = [name.removeprefix("strict ") for name in first.scores if name.startswith("strict ")]
    row = {"stage": first.stage, "block_size": cfg.block_size if first.tau else None,
           "tau": first.tau, "seed": seed, "reported": first.reported, "n_users": n_users,
           "seeds": [result.seed for result in group if result.seed is not None]}

    row |= {metric: mean(group, f"served {metric}") for metric in metrics}
    row["strict"] = {metric: mean(group, f"strict {metric}") for metric in metrics}
    row |= {name: mean(group, name) for name in PER_USER}
    row["tokens_per_forward"] = None
    if "forwards" in first.scores:
        row["tokens_per_forward"] = mean(group, "tokens") / mean(group, "forwards")

    row["ar_gain_share"] = share_of_gain(group, results)
    row["se"] = {metric: user_error(group, metric) for metric in metrics}
    row["seed_se"] = None
    if len(group) > 1:
        row["seed_se"] = {metric: seed_error(group, metric) for metric in metrics}
    for name in COMPARED:
        pairs = partners(group, results, name)
        both = {metric: interval(differences(pairs, metric)) for metric in metrics if pairs}
        row[f"diff_to_{name}"] = {m: found[0] for m, found in both.items()} or None
        row[f"differ_from_{name}"] = {m: found[1] for m, found in both.items()} or None

    row["train_seconds"] = mean_of([result.train_seconds for result in group])
    return row | {key: mean_of([result.timing[key] for result in group]) for key in NO_TIMING}


# --- What a row says --------------------------------------------------------------------------

def mean_of(values):
    """Their mean; None if one is None."""
    return None if None in values else float(np.mean(values))


def mean(group, name):
    """Mean of a score over users and seeds."""
    if name not in group[0].scores:
        return None
    return float(np.mean([result.scores[name] for result in group]))


def user_error(group, metric):
    """Standard error over users, the seeds as they are."""
    per_user = np.mean([result.scores[f"strict {metric}"] for result in group], axis=0)
    return float(per_user.std() / len(per_user) ** 0.5)


def seed_error(group, metric):
    """Standard error over seeds, the users as they are."""
    per_seed = [result.scores[f"strict {metric}"].mean() for result in group]
    return float(np.std(per_seed, ddof=1) / len(per_seed) ** 0.5)


def partners(group, results, name):
    """What a row is compared with: [(its scores, scores of the row `name`)], a pair a seed.

    Both are of the same users and the same seed, so a mean is compared with the mean over its own
    seeds. A ranking that has no seed is compared with every seed."""
    pairs = []
    for own in group:
        n_users = len(own.scores["valid"])
        for other in results:
            same_seed = own.seed == other.seed or None in (own.seed, other.seed)
            if other.stage == name and other.reported and same_seed:
                pairs.append((own.scores, first_users(other.scores, n_users)))
    return pairs


def first_users(scores, n):
    return {name: values[:n] for name, values in scores.items()}


def differences(pairs, metric):
    """(seeds, N), strict."""
    return np.array([own[f"strict {metric}"] - other[f"strict {metric}"] for own, other in pairs])


def share_of_gain(group, results, metric="ndcg@10"):
    """The row's gain over the incoming order, as a share of AR's gain, on the row's own seeds.

    None where AR gains nothing: there is nothing to have a share of."""
    if not partners(group, results, "ar") or not partners(group, results, "prerank"):
        return None
    own_gain = differences(partners(group, results, "prerank"), metric).mean()
    against_ar = differences(partners(group, results, "ar"), metric).mean()
    ar_gain = own_gain - against_ar
    return float(own_gain / ar_gain) if ar_gain > 1e-12 else None


# --- The report -------------------------------------------------------------------------------

def make_report(cfg, options, world, results, interval):
    """What report.json holds."""
    seeds = sorted({result.seed for result in results if result.seed is not None})
    return {
        "config": cfg.config,
        "dataset": "Amazon Beauty" if cfg.world.startswith("beauty") else "toy world",
        "source": world.source,
        "split": options.eval_split,
        "n_users": len(world.test),
        "device": device_name(cfg),
        "seeds": seeds,
        "operating_point": {"block_size": cfg.block_size, "commit": cfg.commit,
                            "clash": cfg.clash, "tau": cfg.tau},
        "data": world.notes,
        "rows": report_rows(cfg, results, interval)}


def finite(x):
    """x with None for every number that is infinite or undefined: strict JSON has no such."""
    if isinstance(x, dict):
        return {key: finite(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [finite(value) for value in x]
    if isinstance(x, np.generic):
        x = x.item()
    if isinstance(x, float) and not math.isfinite(x):
        return None
    return x


def write_text(path, text):
    def write(temporary):
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
    save_atomically(path, write)


def write_json(path, content):
    write_text(path, json.dumps(finite(content), indent=1, allow_nan=False) + "\n")


def write_report(cfg, name, report, results, target):
    """Writes <name>.json, <name>.md, and <name>_users.pt, which holds every user's scores, for
    `--beside`. target (N,): the users, as the other run knows them."""
    saved = {"target": torch.from_numpy(target), "latency_ms": {}}
    for group in groups(results):
        stage = group[0].stage
        if group[0].reported:
            names = group[0].scores
            saved[stage] = {key: torch.from_numpy(np.mean([r.scores[key] for r in group], axis=0))
                            for key in names}
            saved["latency_ms"][stage] = mean_of([r.timing["latency_ms"] for r in group])
    save_tensors(folder(cfg, f"{name}_users.pt"), saved)
    write_json(folder(cfg, f"{name}.json"), report)
    write_text(folder(cfg, f"{name}.md"), markdown(report))
    if RANK == 0:
        print(f"written: {folder(cfg)}/{name}.json and .md", flush=True)
