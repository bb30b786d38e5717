"""Evaluation: every stage on the same test users, one table, report.json, figures.

    python evaluate.py --config toy      # about 2 minutes on 2 CPU cores
    python evaluate.py --config small    # Amazon Beauty, about 3 minutes on 2 CPU cores
    python evaluate.py --config toy --show 3   # three users, and what the last student wrote for them

Reads the checkpoints under runs/<config>/seed*/, writes report.json, report.md and figures to runs/<config>/. The block-
diffusion rows are decoded at one operating point (block size, commit rule, tau) for trace and answer alike; the curve
around it serves the figures. Two scores a metric: *as served* (an invalid answer is repaired) and *strict* (it counts 0).
"""
import dataclasses
import functools
import glob
import json
import os
import time

import numpy as np
import torch

from common import RANK, decode_split, device_of, finished_stages, load_tensors, save_atomically, save_tensors, script, serve
from config import STAGES, UserError, folder
from data import ANSWER, LABEL, faithfulness, load_world, parse_answers, tensors
from figures import figures
from model import EOS, PAD, ar_decode
from show import show

ROWS = ("ar", "naive", "cft", "opd", "rl", "constrained")  # of the table, in their order
METRICS, SPEED_BATCH = ("recall@1", "recall@3", "recall@5", "ndcg@3", "ndcg@5", "ndcg@10", "mrr"), 64


# --- Metrics and statistics ---------------------------------------------------------------------------------------------

def ranking_metrics(rank):
    """Metrics of one relevant item at rank (N,), 0 = first: {name: (N,) float}.

    recall@c = [rank < c];  ndcg@c = [rank < c] / log2(rank + 2)  (the ideal DCG of one item is 1);  mrr = 1 / (rank + 1).
    """
    out = {f"recall@{c}": (rank < c).astype(float) for c in (1, 3, 5)}
    out |= {f"ndcg@{c}": (rank < c) / np.log2(rank + 2) for c in (3, 5, 10)}
    return out | {"mrr": 1 / (rank + 1)}


@functools.lru_cache(maxsize=2)  # every comparison of n users resamples the same users: drawing them costs the most
def resampled(n, n_draws=2000):
    """How often each of n users is drawn in each of n_draws bootstrap samples: (n_draws, n)."""
    return np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=n_draws)


def paired_bootstrap(a, b):
    """95 % interval of mean(a - b) over users, who are drawn with replacement: (N,), (N,) -> [low, mean, high]."""
    difference = a - b
    low, high = np.quantile(resampled(len(difference)) @ difference / len(difference), [0.025, 0.975])
    return [float(low), float(difference.mean()), float(high)]


# --- Decoding a whole split -----------------------------------------------------------------------------------------------

def score(world, split, tokens, forwards=None):
    """Everything that is measured on responses (N, R) to the rows of a split: {name: (N,) array}."""
    answers = parse_answers(tokens, split.incoming)
    out = score_order(split, answers.order)
    out |= {f"strict {m}": out[f"served {m}"] * answers.valid for m in METRICS}
    for name in ("valid", "duplicated", "dropped", "out_of_set", "identity", "trace_tokens"):
        out[name] = getattr(answers, name).astype(float)
    if split.trace.shape[1]:  # else nothing is claimed
        out["faithful"] = faithfulness(tokens, split.trace, world.n_labels)
    if forwards is not None:
        out["forwards"], out["tokens"] = forwards.astype(float), (tokens != PAD).sum(1).astype(float)
    return out


def score_order(split, order):
    """The same for a ranking that no model wrote: order (N, K)."""
    rank = (order == split.target[:, None]).argmax(1)
    served = ranking_metrics(rank)
    return ({f"served {m}": v for m, v in served.items()} | {f"strict {m}": v for m, v in served.items()} |
            {"valid": np.ones(len(rank)), "identity": (order == split.incoming).all(1).astype(float)})


def constrain_answer(world, split, device):
    """Constrained decoding, a reference row only: forces the response's layout and a permutation of the labels.

    Behind the rule's trace length stands <answer>, then k labels, then [EOS]; open answer slots are assigned labels
    greedily, the surest first, a label that is used or assigned being closed to all other slots.
    """
    starts = torch.from_numpy((split.trace != PAD).sum(1) + 1).to(device)[:, None]  # (N, 1) first answer slot
    lengths, word = torch.from_numpy(split.k).to(device)[:, None], torch.arange(len(world.words), device=device)
    labels = word[LABEL:LABEL + world.n_labels]

    def constrain(logits, response, slots, rows):
        start, length = starts[rows], lengths[rows]  # (n, 1)
        for token, at in ((ANSWER, start - 1), (EOS, start + length)):
            logits = logits.masked_fill((slots == at)[..., None] != (word == token), -1e4)
        inside = lambda slot: (slot >= start) & (slot < start + length)
        answer = torch.where(inside(torch.arange(response.shape[1], device=device)), response, PAD)  # (n, R)
        closed = (answer[..., None] == labels).any(1) | (labels - LABEL >= length)  # (n, n_labels)
        free = (inside(slots) & (response.gather(1, slots) < EOS))[..., None] & ~closed[:, None]  # (n, B, n_labels)
        p = logits[..., LABEL:LABEL + world.n_labels].masked_fill(~free, -1e4).softmax(-1) * free
        forced = torch.zeros_like(logits, dtype=torch.bool)
        for _ in range(int(length.max())):
            best, at = p.flatten(1).max(1)
            r = (best > 0).nonzero()[:, 0]
            slot, label = at[r] // world.n_labels, at[r] % world.n_labels
            forced[r, slot, LABEL + label] = True
            p[r, slot] = 0
            p[r, :, label] = 0
        return torch.where(forced.any(-1, keepdim=True) & ~forced, -1e4, logits)

    return constrain


def stage_decoder(cfg, world, model, stage, tau):
    """The decoder of a stage as decode_split wants it: plain AR for the teacher, block diffusion for the others."""
    if stage == "ar":
        return lambda prompt, rows: ar_decode(model, prompt, world.max_response)[::2]  # tokens, forwards

    def decoder(prompt, rows):
        constrain = constrain_answer(world, world.test.take(rows), prompt.device) if stage == "constrained" else None
        decoded = serve(cfg, model, prompt, world.max_response, tau=tau, constrain=constrain)
        return decoded.tokens, decoded.forwards
    return decoder


# --- Speed: always against the AR decode of the same run -------------------------------------------------------------------

def in_turn(jobs, seconds):
    """Run jobs {name: f(round) -> tokens (N, R)} in turn for about so many seconds, at least one round after the first, which warms
    up; every other round in reverse order -> {name: (rounds, 2) seconds and tokens}, {name: [tokens]}."""
    taken, texts, start, i = {name: [] for name in jobs}, {name: [] for name in jobs}, time.perf_counter(), 0
    while i < 2 or time.perf_counter() - start < seconds:
        for name in list(jobs)[::1 - 2 * (i % 2)]:
            t = time.perf_counter()
            out = jobs[name](i)
            n = int((out != PAD).sum())  # waits for the GPU too
            if i > 0:
                taken[name].append((time.perf_counter() - t, n)), texts[name].append(out)
        i += 1
    return {name: np.array(rows) for name, rows in taken.items()}, texts


def prompts_of_round(cfg, world, i, batch):
    """The test prompts (batch, P) of round i: other ones every round."""
    return tensors(world.test, np.arange(i * batch, (i + 1) * batch) % len(world.test), device_of(cfg))[0]


def speed(cfg, world, teacher, student, batch, max_len=None):
    """Tokens/s of AR and block decoding in turn on the same prompts, other ones every round, for about eval_speed_seconds.

    Returns {"ar": tokens/s, "block": tokens/s, "ratio": block / ar, "ar_ms", "block_ms": milliseconds a batch}, medians over the
    rounds; generated tokens only, wall time of the whole decode, the prompt's forward included.
    """
    if RANK:  # the first process measures and reports
        return dict.fromkeys(("ar", "block", "ratio", "ar_ms", "block_ms"), 0.0)
    max_len = max_len or world.max_response
    prompt = lambda i: prompts_of_round(cfg, world, i, batch)
    taken, _ = in_turn({"ar": lambda i: ar_decode(teacher, prompt(i), max_len)[0],
                        "block": lambda i: serve(cfg, student, prompt(i), max_len).tokens}, cfg.eval_speed_seconds)
    rate = {name: t[:, 1] / t[:, 0] for name, t in taken.items()}
    return {"ratio": float(np.median(rate["block"] / rate["ar"])), **{name: float(np.median(r)) for name, r in rate.items()},
            **{f"{name}_ms": float(np.median(1000 * t[:, 0])) for name, t in taken.items()}}


# --- The report ------------------------------------------------------------------------------------------------------------

NO_TIMING = dict.fromkeys(("tokens_per_s_b1", "speedup_b1", "latency_ms", "tokens_per_s_batch", "speedup_batch", "batch"))
PER_USER = ("valid", "duplicated", "dropped", "out_of_set", "faithful", "identity", "trace_tokens", "forwards")


def make_row(stage, point, seed, scores, reference, timing=None, train_seconds=None, reported=False):
    """One row of report.json. scores: {name: (N,)}, already averaged over seeds where seed is "mean"; reference:
    {stage: scores} of the same users, for the paired differences. What does not apply is None."""
    n = len(scores["served mrr"])
    mean = lambda name: float(scores[name].mean()) if name in scores else None
    row = {"stage": stage, "block_size": point[0], "tau": point[1], "seed": seed, "reported": reported, "n_users": n}
    row |= {m: mean(f"served {m}") for m in METRICS}
    row["strict"] = {m: mean(f"strict {m}") for m in METRICS}
    row |= {name: mean(name) for name in PER_USER}
    row["tokens_per_forward"] = mean("tokens") / mean("forwards") if "forwards" in scores else None
    gain = lambda s: s["strict ndcg@10"].mean() - reference["prerank"]["strict ndcg@10"].mean()
    row["ar_gain_share"] = float(gain(scores) / gain(reference["ar"])) if "ar" in reference else None
    row["se"] = {m: float(scores[f"strict {m}"].std() / n ** 0.5) for m in METRICS}
    row["seed_se"] = None
    for name in ("ar", "prerank", "cft", "opd"):
        other = reference.get(name)
        row[f"diff_to_{name}"] = other and {m: paired_bootstrap(scores[f"strict {m}"], other[f"strict {m}"]) for m in METRICS}
    row["train_seconds"] = train_seconds
    return row | (timing or NO_TIMING)


def average(runs):
    """Scores of several seeds, averaged user by user: [{name: (N,)}] -> {name: (N,)}."""
    return {name: np.mean([r[name] for r in runs], axis=0) for name in runs[0]}


def finished_seeds(cfg):
    """The seeds to report: those asked for, or all of which a checkpoint is found."""
    if cfg.seeds != "all":
        try:
            return [int(s) for s in cfg.seeds.split(",")]
        except ValueError:
            raise UserError(f"--seeds must be all or numbers with commas, not '{cfg.seeds}'")
    found = sorted({int(os.path.basename(os.path.dirname(os.path.dirname(p)))[4:])
                    for p in glob.glob(folder(cfg, "seed*", "*", "checkpoint.pt"))} or ({cfg.seed} if cfg.teacher else set()))
    if not found:
        raise UserError(f"no checkpoint under {folder(cfg)}: first run `python train_ar.py --config {cfg.config}`")
    return found


def evaluate_seed(cfg, world, seed, known):
    """All rows of one seed: {(stage, tau, reported): (scores, timing, train_seconds)} for every stage that finished;
    reported: at the operating point, all users; else a point of the curve.
    known: the rows of AR and naive, where another seed with the same teacher has them."""
    cfg = dataclasses.replace(cfg, seed=seed)
    n_curve = min(cfg.eval_curve_users, len(world.test))
    curve = [t for t in map(float, cfg.eval_taus.split(",")) if t != cfg.tau]
    finished = finished_stages(cfg, world)
    models, seconds = {s: model for s, (model, _) in finished.items()}, {s: state["seconds"] for s, (_, state) in finished.items()}
    last = list(models)[-1]
    models["naive"] = models["ar"]  # the teacher's weights under the student's sampler
    if last != "ar":
        models["constrained"] = models[last]
    out = {k: (scores, dict(timing), seconds) for k, (scores, timing, seconds) in known.items()}

    def add(stage, tau, users, reported):
        split = world.test.take(slice(0, users))
        tokens, forwards = decode_split(cfg, split, stage_decoder(cfg, world, models[stage], stage, tau),
                                        f"seed {seed} {stage} tau {tau}")
        timing = dict(NO_TIMING)
        if reported and (stage in STAGES[1:] or (stage, last) == ("naive", "ar")):  # a teacher alone is timed too
            one, many = (speed(cfg, world, models["ar"], models[stage], b) | {"ar_ratio": 1.0} for b in (1, SPEED_BATCH))
            for name, ratio, row in (("block", "ratio", timing), ("ar", "ar_ratio", out["ar", None, True][1])):
                row.update(tokens_per_s_b1=one[name], speedup_b1=one[ratio], latency_ms=one[f"{name}_ms"],
                           tokens_per_s_batch=many[name], speedup_batch=many[ratio], batch=SPEED_BATCH)
        scores = score(world, split, tokens, forwards)
        out[stage, tau, reported] = scores, timing, seconds.get(stage)
        if reported:  # the operating point is on the curve too, with the curve's users
            out[stage, tau, False] = {k: v[:n_curve] for k, v in scores.items()}, NO_TIMING, seconds.get(stage)

    for stage in ROWS:
        if stage in models and not (known and stage in ("ar", "naive")):
            add(stage, None if stage == "ar" else cfg.tau, len(world.test), True)
            for tau in curve if stage not in ("ar", "constrained") else ():  # tau 1 is the slow end: naive's best chance
                add(stage, tau, n_curve, False)
    return out, models


def report_rows(cfg, per_seed, mean_of, still):
    """The rows of report.json: per_seed {seed: what evaluate_seed gives}, mean_of {(stage, tau, reported): scores averaged over
    seeds}, still {name: (scores, timing)} of rankings that are not decoded here."""
    n = len(still["prerank"][0]["valid"])

    def reference(of, users):
        """The scores that a row's differences are taken against, of the same users; of: key -> scores."""
        found = {s: of((s, None if s == "ar" else cfg.tau, True)) for s in ("ar", "cft", "opd")} | {"prerank": still["prerank"][0]}
        return {s: {k: v[:users] for k, v in scores.items()} for s, scores in found.items() if scores}

    rows = [make_row(stage, (None, None), "mean", scores, reference(mean_of.get, n), timing, reported=True) for stage, (scores, timing) in still.items()]
    for key, scores in mean_of.items():
        (stage, tau, reported), users = key, len(scores["valid"])
        point, have = (None if stage == "ar" else cfg.block_size, tau), {s: found for s, found in per_seed.items() if key in found}
        made = [make_row(stage, point, seed, found[key][0], reference(lambda k: found[k][0] if k in found else None, users),
                         *found[key][1:], reported) for seed, found in have.items()]
        timings = [found[key][1] for found in have.values()]
        timing = {k: timings[0][k] and float(np.mean([t[k] for t in timings])) for k in NO_TIMING}
        mean = make_row(stage, point, "mean", scores, reference(mean_of.get, users), timing,
                        made[0]["train_seconds"] and float(np.mean([r["train_seconds"] for r in made])), reported)
        if len(have) > 1:
            mean["seed_se"] = {m: float(np.std([r["strict"][m] for r in made], ddof=1) / len(have) ** 0.5) for m in METRICS}
        rows += [*made, mean]
    return rows


def main(cfg):
    world, name = load_world(cfg), "report"
    if cfg.show:
        return show(cfg, world)
    if cfg.eval_split == "val":
        world, name = dataclasses.replace(world, test=world.val, references={}), "report_val"
    seeds, beside = finished_seeds(cfg), scores_beside(cfg, world)  # what is missing is said before anything is decoded
    per_seed, known = {}, {}
    for seed in seeds:
        per_seed[seed], models = evaluate_seed(cfg, world, seed, known)
        known = {k: v for k, v in per_seed[seed].items() if k[0] in ("ar", "naive")} if cfg.teacher else {}
        first_models = models if seed == seeds[0] else first_models
    orders = {"prerank": world.test.incoming, "oracle" if cfg.world == "toy" else "writer": world.test.order, **world.references}
    still = {name: (score_order(world.test, order), None) for name, order in orders.items()} | beside
    keys = dict.fromkeys(key for found in per_seed.values() for key in found)  # some seeds may lack late stages
    mean_of = {key: average([found[key][0] for found in per_seed.values() if key in found]) for key in sorted(keys, key=lambda key: ROWS.index(key[0]))}
    report = {"config": cfg.config, "dataset": "Amazon Beauty" if cfg.world == "beauty" else "toy world",
              "source": world.source, "split": cfg.eval_split, "n_users": len(world.test), "device": device_name(cfg), "seeds": seeds,
              "operating_point": {"block_size": cfg.block_size, "commit": cfg.commit, "clash": cfg.clash, "tau": cfg.tau},
              "data": world.notes, "rows": report_rows(cfg, per_seed, mean_of, still)}
    users = {stage: {k: torch.from_numpy(v) for k, v in scores.items()} for (stage, _, reported), scores in mean_of.items() if reported}
    latency = {r["stage"]: r["latency_ms"] for r in report["rows"] if r["reported"] and r["seed"] == "mean"}
    save_tensors(folder(cfg, f"{name}_users.pt"), users | {"target": torch.from_numpy(world.test.target), "latency_ms": latency})
    save_atomically(folder(cfg, f"{name}.json"), lambda p: open(p, "w").write(json.dumps(report, indent=1) + "\n"))
    save_atomically(folder(cfg, f"{name}.md"), lambda p: open(p, "w").write(markdown(report)))
    if RANK:
        return
    if cfg.eval_split == "test":
        figures(cfg, world, report, per_seed[seeds[0]], first_models, speed, (1, SPEED_BATCH))
    print(f"\n{summary(report)}\nwritten: {folder(cfg)}/{name}.json and .md" + (", figures" if cfg.eval_split == "test" else ""))


def parse_beside(cfg):
    """--beside name=folder:stage,... -> [(name, folder, stage)]"""
    out = []
    for item in filter(None, cfg.beside.split(",")):
        try:
            name, where = item.split("=")
            where, stage = where.rsplit(":", 1)
        except ValueError:
            raise UserError(f"--beside takes name=folder:stage, for example longer=runs/longer/small:ar, not '{item}'")
        out.append((name, where, stage))
    return out


def scores_beside(cfg, world):
    """Scores and latency of other runs on the same users: --beside name=folder:stage,... -> {name: ({metric: (N,)}, timing)}."""
    out = {}
    for name, where, stage in parse_beside(cfg):
        path = os.path.join(where, "report_users.pt" if cfg.eval_split == "test" else "report_val_users.pt")
        if not os.path.exists(path):
            raise UserError(f"--beside: there is no {path}: first run evaluate.py there")
        saved = load_tensors(path)
        if stage not in saved or not torch.equal(saved["target"], torch.from_numpy(world.test.target)):
            raise UserError(f"--beside: {path} has no stage {stage}, or scores of other users")
        out[name] = {k: v.numpy() for k, v in saved[stage].items()}, NO_TIMING | {"latency_ms": saved.get("latency_ms", {}).get(stage)}
    return out


def device_name(cfg):
    if device_of(cfg).type == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU, {cfg.threads} threads"


# The columns of the tables: title -> keys of a row, format.
STAGES_SHOWN = {
    "stage": ("stage", ""), "R@1": ("strict recall@1", ".3f"), "N@10": ("strict ndcg@10", ".3f"), "MRR": ("strict mrr", ".3f"),
    "N@10 − AR": ("diff_to_ar ndcg@10", ""), "share of gain": ("ar_gain_share", ".1%"), "valid": ("valid", ".2%"), "faithful": ("faithful", ".1%"),
    "identity": ("identity", ".1%"), "forwards": ("forwards", ".1f"), "tok/fwd": ("tokens_per_forward", ".2f"), "ms": ("latency_ms", ".0f"),
    "× AR, batch 1": ("speedup_b1", ".2f"), "× AR, batch 64": ("speedup_batch", ".2f")}
MORE = {
    "stage": ("stage", ""), "duplicated": ("duplicated", ".2%"), "dropped": ("dropped", ".2%"), "out of set": ("out_of_set", ".2%"),
    "trace tokens": ("trace_tokens", ".1f"), "R@3": ("strict recall@3", ".3f"), "R@5": ("strict recall@5", ".3f"), "N@3": ("strict ndcg@3", ".3f"),
    "N@5": ("strict ndcg@5", ".3f"), "± N@10, users": ("se ndcg@10", ".4f"), "± N@10, seeds": ("seed_se ndcg@10", ".4f"),
    "training s": ("train_seconds", ".0f")}
CURVE = {
    "stage": ("stage", ""), "tau": ("tau", ""), "users": ("n_users", ""), "N@10": ("strict ndcg@10", ".3f"), "± users": ("se ndcg@10", ".3f"),
    "valid": ("valid", ".2%"), "faithful": ("faithful", ".1%"), "forwards": ("forwards", ".1f"), "tok/fwd": ("tokens_per_forward", ".2f")}


def cell(row, keys, form):
    """What a row has under these keys, as text: a number, an interval, or – where it does not apply."""
    value = functools.reduce(lambda value, key: value and value[key], keys.split(), row)
    if value is None or value == [0, 0, 0]:  # of AR to itself
        return "–"
    return "{1:+.4f} [{0:+.4f}, {2:+.4f}]".format(*value) if isinstance(value, list) else format(value, form)


def markdown(report):
    """report.md: the stage table, as the README shows it; what else there is at the operating point; the curve around it."""
    def table(columns, rows):
        return "\n".join(["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|",
                          *("| " + " | ".join(cell(r, *column) for column in columns.values()) + " |" for r in rows)])

    point, mean = report["operating_point"], [r for r in report["rows"] if r["seed"] == "mean"]
    stages, curve = [r for r in mean if r["reported"]], [r for r in mean if r["tau"] is not None and not r["reported"]]
    return "\n\n".join([
        f"# {report['dataset']} ({report['config']}): {report['n_users']} {report['split']} users, seeds {report['seeds']}, {report['device']}",
        f"Data: {report['source']}. Operating point: block size {point['block_size']}, {point['commit']} {point['tau']}. Scores are strict (an "
        "invalid answer counts 0), averaged over seeds; N@10 − AR has its paired 95 % interval over users; the share is that of AR's gain in "
        "N@10 over the incoming order.",
        table(STAGES_SHOWN, stages),
        "What is wrong with invalid answers (shares of all answers; they may overlap), more metrics, and standard errors:",
        table(MORE, stages), "The curve around the operating point, on the first users:", table(CURVE, curve)]) + "\n"


def summary(report):
    """The stage table for a terminal, 80 columns: what to look at first."""
    columns = [(STAGES_SHOWN[name][0], form) for name, form in (
        ("stage", ""), ("R@1", ".3f"), ("N@10", ".3f"), ("share of gain", ".1%"), ("valid", ".1%"), ("faithful", ".1%"), ("identity", ".1%"),
        ("forwards", ".1f"), ("tok/fwd", ".2f"), ("× AR, batch 1", ".2f"))]
    heads = [("stage", "R@1", "N@10", "share", "valid", "faith-", "as the", "for-", "tokens", "× AR"), ("", "", "", "of gain", "", "ful", "input", "wards", "a fwd", "b 1")]
    rows = [[cell(r, *column) for column in columns] for r in report["rows"] if r["reported"] and r["seed"] == "mean"]
    point = report["operating_point"]
    return "\n".join([f"{report['dataset']}: {report['n_users']} {report['split']} users, seeds {report['seeds']}, block size "
                      f"{point['block_size']}, {point['commit']} {point['tau']}; strict scores", "",
                      *("{:14}{:>6}{:>7}{:>9}{:>8}{:>8}{:>8}{:>7}{:>7}{:>6}".format(*line) for line in heads + rows), ""])


if __name__ == "__main__":
    script(main, __doc__)
