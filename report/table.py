"""The rows of a report, their files (report.json, report.md), and the table for the terminal.

A row says what one decoder did on average, for one seed or (seed "mean") over its seeds. What does
not apply to a row is None. A *difference* to another row is [low, mean, high], and "differ" says
how many users differ; low and high are None where too few do for an interval.
"""
import dataclasses
import json
import math
import textwrap
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from config import folder
from plumbing.checkpoint import CODE, made_by, save_atomically
from plumbing.processes import device_of
from plumbing.settings import UserError
from report.intervals import interval_text

COMPARED = ("prerank", "ar", "cft", "opd", "own ar")  # rows that the others are compared with
COMPARISONS = {  # what is compared: its name in report.json, its name in the scores
    "recall@1": "strict recall@1",
    "ndcg@10": "strict ndcg@10",
    "mrr": "strict mrr",
    "valid": "valid"}
MEANS = ("valid", "duplicated", "dropped", "out_of_set", "faithful", "identity", "trace_tokens",
         "forwards")

# Columns of the tables: title, where a row has the value (keys after one another), format.
STAGES_SHOWN = [
    ("stage", "stage", ""),
    ("R@1", "strict recall@1", ".3f"),
    ("N@10", "strict ndcg@10", ".3f"),
    ("MRR", "strict mrr", ".3f"),
    ("N@10 − AR", "diff_to_ar ndcg@10", ""),
    ("valid", "valid", ".2%"),
    ("faithful", "faithful", ".1%"),
    ("identity", "identity", ".1%"),
    ("forwards", "forwards", ".1f"),
    ("tokens per forward", "tokens_per_forward", ".2f"),
    ("ms", "times latency_ms", ".0f"),
    ("× AR, batch 1", "times speedup_b1", ".2f"),
    ("× AR, batch 64", "times speedup_b64", ".2f")]
MORE = [
    ("stage", "stage", ""),
    ("duplicated", "duplicated", ".2%"),
    ("dropped", "dropped", ".2%"),
    ("out of set", "out_of_set", ".2%"),
    ("trace tokens", "trace_tokens", ".1f"),
    ("R@3", "strict recall@3", ".3f"),
    ("N@3", "strict ndcg@3", ".3f"),
    ("N@10 as served", "served ndcg@10", ".3f"),
    ("training s", "train_seconds", ".0f")]
CURVE_SHOWN = [
    ("stage", "stage", ""),
    ("tau", "tau", ""),
    ("N@10", "strict ndcg@10", ".3f"),
    ("valid", "valid", ".2%"),
    ("faithful", "faithful", ".1%"),
    ("forwards", "forwards", ".1f"),
    ("tokens per forward", "tokens_per_forward", ".2f")]
IN_TERMINAL = ("stage", "R@1", "N@10", "valid", "faithful", "forwards", "× AR, batch 1")
NOTHING = "–"


# --- Results: the scores of every user ---------------------------------------------------------

@dataclass
class Result:
    """The scores of one decode of the test users, or of a ranking that no model wrote."""
    row: str
    seed: int | None            # None: a ranking that no model wrote
    scores: dict                # {name: (N,)}, see evaluate.score
    tau: float | None = None    # None: not decoded at a threshold
    on_curve: bool = False      # a point of the curve, of the first users; else a row of the table
    times: dict = field(default_factory=dict)  # see report/speed.py
    train_seconds: float | None = None


def known_orders(cfg, world):
    """Rankings of the test users that no model wrote: {row: order (N, K)}."""
    kind = cfg.world.split("_")[-1]
    best = "oracle" if cfg.world.startswith("toy") else "writer"
    best = {"expert": "expert", "target": "target first"}.get(kind, best)
    return {"prerank": world.test.incoming, best: world.test.order, **world.references}


def chosen_seeds(cfg, seeds):
    """The seeds of a text such as 0,1,2, as a list; if it is empty, the seed of the settings."""
    if not seeds:
        return [cfg.seed]
    try:
        return sorted({int(seed) for seed in seeds.split(",")})
    except ValueError:
        raise UserError(f"--seeds must be whole numbers with commas between them, not {seeds!r}")


def first_users(scores, n):
    return {name: values[:n] for name, values in scores.items()}


# --- Rows -------------------------------------------------------------------------------------

def report_rows(results, interval):
    """The rows of results: those of each seed, then their mean. interval: a function that does
    what intervals.paired_interval does."""
    groups = {}
    for result in results:
        groups.setdefault((result.row, result.tau), []).append(result)
    rows = []
    for group in groups.values():
        if group[0].seed is not None:
            rows += [make_row(result.seed, [result], results, interval) for result in group]
        rows.append(make_row("mean", group, results, interval))
    return rows


def make_row(seed, group, results, interval):
    """One row, from the Result of one seed, or from those of several, which are averaged."""
    first = group[0]
    metrics = [name.removeprefix("strict ") for name in first.scores if name.startswith("strict ")]
    row = {
        "stage": first.row,
        "seed": seed,
        "seeds": [result.seed for result in group if result.seed is not None],
        "tau": first.tau,
        "n_users": len(first.scores["valid"]),
        "strict": {metric: mean(group, f"strict {metric}") for metric in metrics},
        "served": {metric: mean(group, f"served {metric}") for metric in metrics}}
    row |= {name: mean(group, name) for name in MEANS}
    row["tokens_per_forward"] = None
    if "forwards" in first.scores:
        row["tokens_per_forward"] = mean(group, "tokens") / mean(group, "forwards")
    for name in COMPARED:
        found = {own: interval(differences(group, results, name, score))
                 for own, score in COMPARISONS.items() if partners(group, results, name)}
        key = name.replace(" ", "_")
        row[f"diff_to_{key}"] = {own: both[0] for own, both in found.items()} or None
        row[f"differ_from_{key}"] = {own: both[1] for own, both in found.items()} or None

    row["times"] = {key: mean_of([result.times.get(key) for result in group])
                    for key in first.times}
    row["train_seconds"] = mean_of([result.train_seconds for result in group])
    return row


def mean_of(values):
    """The mean of numbers; None if one of them is None."""
    return None if None in values else float(np.mean(values))


def mean(group, name):
    """The mean of a score over users and seeds."""
    if name not in group[0].scores:
        return None
    return float(np.mean([result.scores[name] for result in group]))


def partners(group, results, name):
    """What a row is compared with: [(its scores, the scores of row `name`)], a pair for each seed.

    Both are of the same users and the same seed. So a mean over seeds is compared with the mean
    over the same seeds. A ranking without a seed is compared with every seed."""
    pairs = []
    for own in group:
        for other in results:
            same_seed = own.seed == other.seed or None in (own.seed, other.seed)
            if other.row == name and not other.on_curve and same_seed:
                pairs.append((own.scores, other.scores))
    return pairs


def differences(group, results, name, score):
    """How much more a row scores than row `name`: (seeds, N)."""
    return np.array([own[score] - other[score] for own, other in partners(group, results, name)])


# --- The report and its files -----------------------------------------------------------------

def device_name(cfg):
    if device_of(cfg).type == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU, {cfg.threads} threads"


def make_report(cfg, options, world, results, interval):
    """What report.json holds: settings, rows, and the curve, whose points are averaged."""
    in_table = [result for result in results if not result.on_curve]
    curve = report_rows([result for result in results if result.on_curve], interval)
    return plain({
        "config": cfg.config,
        "dataset": "Amazon Beauty" if cfg.world.startswith("beauty") else "toy world",
        "source": world.source,
        "split": options.eval_split,
        "n_users": len(world.test),
        "seeds": sorted({result.seed for result in results if result.seed is not None}),
        "device": device_name(cfg),
        "settings": dataclasses.asdict(cfg) | dataclasses.asdict(options),
        "made_by": made_by(cfg),
        "code": CODE,
        "data": world.notes,
        "rows": report_rows(in_table, interval),
        "curve": [row for row in curve if row["seed"] == "mean"]})


def plain(x):
    """x as JSON knows it: no arrays, six decimals, and None for numbers that are not finite."""
    if isinstance(x, dict):
        return {key: plain(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [plain(value) for value in x]
    if isinstance(x, np.generic):
        x = x.item()
    if isinstance(x, float):
        return round(x, 6) if math.isfinite(x) else None
    return x


def write_text(path, text):
    save_atomically(path, lambda temporary: Path(temporary).write_text(text, "utf-8"))


def write_json(path, content):
    """Writes a dict with a line for each key, and for each item of a list of dicts."""
    lines = []
    for key, value in plain(content).items():
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        if isinstance(value, list) and value and isinstance(value[0], dict):
            items = [json.dumps(item, ensure_ascii=False, allow_nan=False) for item in value]
            text = "[\n" + ",\n".join(items) + "]"
        lines.append(f"{json.dumps(key)}: {text}")
    write_text(path, "{" + ",\n".join(lines) + "}\n")


def write_report(cfg, name, report):
    write_json(folder(cfg, f"{name}.json"), report)
    write_text(folder(cfg, f"{name}.md"), markdown(report))
    print(f"written: {folder(cfg, name)}.json and .md", flush=True)


# --- Text -------------------------------------------------------------------------------------

def value_at(row, keys):
    """row["a"]["b"] for the keys "a b"; None where there is none."""
    for key in keys.split():
        row = (row or {}).get(key)
    return row


def cell(row, keys, form):
    """What a row has there, as text."""
    value = value_at(row, keys)
    if value is None or (row["stage"] == "ar" and "diff_to_ar" in keys):
        return NOTHING
    if not isinstance(value, list):
        return format(value, form)
    if value[0] is None:
        differ = value_at(row, keys.replace("diff_to", "differ_from"))
        return f"{interval_text(value)} ({differ} differ)"
    return interval_text(value)


def table(columns, rows):
    """A markdown table."""
    lines = [[title for title, _, _ in columns], ["---"] * len(columns)]
    for row in rows:
        cells = [cell(row, keys, form) for _, keys, form in columns]
        lines.append([text.replace("|", "\\|") for text in cells])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def mean_rows(report):
    return [row for row in report["rows"] if row["seed"] == "mean"]


def listed(seeds):
    return ", ".join(map(str, seeds))


def seeds_of_rows(report):
    """A sentence about the rows that are the mean of fewer seeds than the report; or nothing."""
    fewer = [f"{row['stage']} of {listed(row['seeds'])}" for row in mean_rows(report)
             if row["seeds"] and row["seeds"] != report["seeds"]]
    if not fewer:
        return ""
    return (f"Not all rows are of all seeds: {'; '.join(fewer)}. A difference is always between "
            "the same seeds.")


def heading(report):
    """What was evaluated, and how it was decoded."""
    cfg = report["settings"]
    seeds = ("seed " if len(report["seeds"]) == 1 else "seeds ") + listed(report["seeds"])
    return (f"{report['dataset']} ({report['config']}): {report['n_users']} {report['split']} "
            f"users, {seeds}; block size {cfg['block_size']}, commit rule {cfg['commit']}, "
            f"tau {cfg['tau']}; strict scores")


def markdown(report):
    """report.md: the table, what else was measured, the curve."""
    curve = report["curve"]
    paragraphs = [
        f"# {heading(report)}",
        f"Data: {report['source']}. Strict scores count an invalid answer as 0. All numbers are "
        "means over users and seeds. *N@10 − AR* has its 95 % interval over users and, of several "
        "seeds, over seeds; where fewer than 50 users differ there is none. *identity*: answers "
        "that repeat the incoming order.",
        report.get("speed") or f"Speed is that of {report['device']}, timed in turn with ar on "
        "the same prompts. Only ar, cft and lossless are timed: opd and rl are models of the same "
        "shape as cft, decoded by the same sampler, so a forward takes as long.",
        seeds_of_rows(report),
        table(STAGES_SHOWN, mean_rows(report)),
        "What is wrong with invalid answers (shares of all answers; they may overlap), and more:",
        table(MORE, mean_rows(report))]
    if curve:
        paragraphs += [f"The curve over tau, on the first {curve[0]['n_users']} users:",
                       table(CURVE_SHOWN, curve)]
    return "\n\n".join(filter(None, paragraphs)) + "\n"


def summary(report):
    """The table for a terminal of 80 columns."""
    columns = [column for column in STAGES_SHOWN if column[0] in IN_TERMINAL]
    lines = [[title for title, _, _ in columns]]
    for row in mean_rows(report):
        lines.append([cell(row, keys, form) for _, keys, form in columns])
    widths = [max(map(len, cells)) for cells in zip(*lines)]
    text = []
    for first, *others in lines:
        numbers = [f"{other:>{width}}" for other, width in zip(others, widths[1:])]
        text.append("  ".join([f"{first:{widths[0]}}", *numbers]))
    notes = filter(None, ["", seeds_of_rows(report)])
    return "\n".join([textwrap.fill(heading(report), 80), "", *text, "", *notes])
