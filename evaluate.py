"""Evaluation: every stage on the same test users, one table, report.json, figures.

    python evaluate.py --config toy      # about 3 minutes on 2 CPU cores
    python evaluate.py --config small    # Amazon Beauty, about 10 minutes on 2 CPU cores

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
from tqdm import tqdm

from common import device_of, load_stage, read_checkpoint, save_atomically, script
from config import STAGES, UserError, folder
from data import ANSWER, LABEL, faithfulness, load_world, parse_answers, tensors
from diffusion import block_decode
from model import EOS, PAD, ar_decode

SPEED_BATCH = 64
METRICS = ("recall@1", "recall@3", "recall@5", "ndcg@3", "ndcg@5", "ndcg@10", "mrr")


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
    answers = parse_answers(tokens, split.k, split.order.shape[1])
    rank = (answers.order == split.target[:, None]).argmax(1)
    served = ranking_metrics(rank)
    out = {f"served {m}": v for m, v in served.items()} | {f"strict {m}": v * answers.valid for m, v in served.items()}
    for name in ("valid", "duplicated", "dropped", "out_of_set", "identity", "trace_tokens"):
        out[name] = getattr(answers, name).astype(float)
    out["faithful"] = faithfulness(tokens, split.trace, world.n_labels)
    if forwards is not None:
        out["forwards"], out["tokens"] = forwards.astype(float), (tokens != PAD).sum(1).astype(float)
    return out


def score_order(split, order):
    """The same for a ranking that no model wrote: order (N, K)."""
    rank = (order == split.target[:, None]).argmax(1)
    served = ranking_metrics(rank)
    listed = np.arange(order.shape[1]) < split.k[:, None]
    return ({f"served {m}": v for m, v in served.items()} | {f"strict {m}": v for m, v in served.items()} |
            {"valid": np.ones(len(rank)), "identity": ((order == np.arange(order.shape[1])) | ~listed).all(1).astype(float)})


def decode_split(cfg, world, split, decoder, desc):
    """Run decoder(prompt, rows) -> (tokens, forwards) over a split in batches: tokens (N, R) int64, forwards (N,)."""
    all_tokens, all_forwards = [], []
    for i in tqdm(range(0, len(split), cfg.eval_batch), desc=desc, leave=False):
        rows = range(i, min(len(split), i + cfg.eval_batch))
        tokens, forwards = decoder(tensors(split, rows, device_of(cfg))[0], rows)
        all_tokens.append(tokens.cpu().numpy())
        all_forwards.append(forwards.cpu().numpy())
    width = max(t.shape[1] for t in all_tokens)
    return np.concatenate([np.pad(t, ((0, 0), (0, width - t.shape[1]))) for t in all_tokens]), np.concatenate(all_forwards)


def constrain_answer(world, split):
    """Constrained decoding, a reference row only: forces the response's layout and a permutation of the labels.

    Behind the rule's trace length stands <answer>, then k labels, then [EOS]; open answer slots are assigned labels
    greedily, the surest first, a label that is used or assigned being closed to all other slots.
    """
    trace_len = torch.from_numpy((split.trace != PAD).sum(1))
    k = torch.from_numpy(split.k.astype(np.int64))

    def constrain(logits, response, slots, rows, first):
        start = (trace_len[first + rows.cpu()].to(logits.device) + 1)[:, None]  # (n, 1) first answer slot
        length = k[first + rows.cpu()].to(logits.device)[:, None]
        for token, at in ((ANSWER, start - 1), (EOS, start + length)):
            logits = logits.masked_fill((slots == at)[..., None] != (torch.arange(logits.shape[-1], device=logits.device) == token), -1e4)
        inside = (slots >= start) & (slots < start + length)  # (n, B)
        labels = LABEL + torch.arange(world.n_labels, device=logits.device)
        position = torch.arange(response.shape[1], device=logits.device)
        written = ((response[:, :, None] == labels) & ((position >= start) & (position < start + length))[..., None]).any(1)
        closed = written | (labels - LABEL >= length)  # (n, n_labels)
        table = logits[..., LABEL:LABEL + world.n_labels].masked_fill(closed[:, None], -1e4)
        table = table.masked_fill(~(inside & (response.gather(1, slots) < EOS))[..., None], -1e4)
        p, forced, n = table.softmax(-1) * (table > -1e3), torch.zeros_like(table, dtype=torch.bool), len(table)
        for _ in range(int(length.max())):
            best, at = p.flatten(1).max(1)
            slot, label = at // world.n_labels, at % world.n_labels
            r = torch.arange(n, device=logits.device)[best > 0]
            forced[r, slot[r], label[r]] = True
            p[r, slot[r]] = 0
            p[r, :, label[r]] = 0
        other = torch.ones_like(logits, dtype=torch.bool)
        other[..., LABEL:LABEL + world.n_labels] = ~forced
        return torch.where(forced.any(-1, keepdim=True) & other, -1e4, logits)

    return constrain


def stage_decoder(cfg, world, model, stage, tau):
    """The decoder of a stage as decode_split wants it: plain AR for the teacher, block diffusion for the others."""
    if stage == "ar":
        def decoder(prompt, rows):
            tokens, _, forwards = ar_decode(model, prompt, world.max_response)
            return tokens, forwards
        return decoder
    constrain = constrain_answer(world, world.test) if stage == "constrained" else None

    def decoder(prompt, rows):
        hook = (lambda *a: constrain(*a, first=rows[0])) if constrain else None
        decoded = block_decode(model, prompt, world.max_response, cfg.block_size, cfg.commit, tau, constrain=hook)
        return decoded.tokens, decoded.forwards
    return decoder


# --- Speed: always against the AR decode of the same run -------------------------------------------------------------------

def speed(cfg, world, teacher, student, batch, max_len=None):
    """Tokens/s of AR and block decoding in alternating runs on the same prompts, for about eval_speed_seconds.

    Returns {"ar": tokens/s, "block": tokens/s, "ratio": block / ar}; generated tokens only, wall time of the whole
    decode, the prompt's forward included.
    """
    max_len, device = max_len or world.max_response, device_of(cfg)
    seconds, tokens, start, i = [0.0, 0.0], [0, 0], time.perf_counter(), 0
    decoders = (lambda p: ar_decode(teacher, p, max_len)[0],
                lambda p: block_decode(student, p, max_len, cfg.block_size, cfg.commit, cfg.tau).tokens)
    while i < 2 or time.perf_counter() - start < cfg.eval_speed_seconds:
        rows = np.arange(i * batch, (i + 1) * batch) % len(world.test)
        prompt, _ = tensors(world.test, rows, device)
        for j, decode in enumerate(decoders):
            if device.type == "cuda":
                torch.cuda.synchronize()
            t = time.perf_counter()
            out = decode(prompt)
            n = int((out != PAD).sum())  # waits for the GPU too
            if i > 0:  # the first round warms up
                seconds[j] += time.perf_counter() - t
                tokens[j] += n
        i += 1
    ar, block = (n / s for n, s in zip(tokens, seconds))
    return {"ar": ar, "block": block, "ratio": block / ar}


# --- The report ------------------------------------------------------------------------------------------------------------

NO_TIMING = dict.fromkeys(("tokens_per_s_b1", "speedup_b1", "tokens_per_s_batch", "speedup_batch", "batch"))
PER_USER = ("valid", "duplicated", "dropped", "out_of_set", "faithful", "identity", "trace_tokens", "forwards")


def make_row(stage, point, seed, scores, reference, timing=None, train_seconds=None, reported=False):
    """One row of report.json. scores: {name: (N,)}, already averaged over seeds where seed is "mean"; reference:
    {"ar": scores, "prerank": scores} of the same users, for the paired differences. What does not apply is None."""
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
    for name in ("ar", "prerank"):
        other = reference.get(name)
        row[f"diff_to_{name}"] = other and {m: paired_bootstrap(scores[f"strict {m}"], other[f"strict {m}"]) for m in METRICS}
    row["train_seconds"] = train_seconds
    return row | (timing or NO_TIMING)


def average(runs):
    """Scores of several seeds, averaged user by user: [{name: (N,)}] -> {name: (N,)}."""
    return {name: np.mean([r[name] for r in runs], axis=0) for name in runs[0]}


def finished_seeds(cfg):
    """The seeds to report: those asked for, or all whose AR stage has left a checkpoint."""
    if cfg.seeds != "all":
        try:
            return [int(s) for s in cfg.seeds.split(",")]
        except ValueError:
            raise UserError(f"--seeds must be all or numbers with commas, not '{cfg.seeds}'")
    found = sorted(int(os.path.basename(os.path.dirname(os.path.dirname(p)))[4:])
                   for p in glob.glob(folder(cfg, "seed*", "ar", "checkpoint.pt")))
    if not found:
        raise UserError(f"no checkpoint under {folder(cfg)}: first run `python train_ar.py --config {cfg.config}`")
    return found


def evaluate_seed(cfg, world, seed):
    """All rows of one seed: {(stage, tau, reported): (scores, timing, train_seconds)} for every stage that finished."""
    cfg = dataclasses.replace(cfg, seed=seed)
    n_curve = min(cfg.eval_curve_users, len(world.test))
    curve = [float(t) for t in cfg.eval_taus.split(",")]
    models, seconds = {}, {}
    for stage in STAGES:
        state = read_checkpoint(cfg, stage, world)
        if stage == "ar" or state and state["finished"]:  # without a teacher there is nothing to compare with
            models[stage], state = load_stage(cfg, stage, world, state)
            seconds[stage] = state["seconds"]
    models["naive"] = models["ar"]  # the teacher's weights under the student's sampler
    last = [s for s in STAGES if s in models][-1]
    if last != "ar":
        models["constrained"] = models[last]
    out = {}

    def add(stage, tau, users, reported):
        split = world.test.take(slice(0, users))
        tokens, forwards = decode_split(cfg, world, split, stage_decoder(cfg, world, models[stage], stage, tau),
                                        f"seed {seed} {stage} tau {tau}")
        timing = dict(NO_TIMING)
        if reported and stage in STAGES[1:]:
            one, many = (speed(cfg, world, models["ar"], models[stage], b) for b in (1, SPEED_BATCH))
            timing = {"tokens_per_s_b1": one["block"], "speedup_b1": one["ratio"], "tokens_per_s_batch": many["block"],
                      "speedup_batch": many["ratio"], "batch": SPEED_BATCH}
            out["ar", None, True][1].update({"tokens_per_s_b1": one["ar"], "speedup_b1": 1.0, "tokens_per_s_batch": many["ar"],
                                             "speedup_batch": 1.0, "batch": SPEED_BATCH})
        out[stage, tau, reported] = score(world, split, tokens, forwards), timing, seconds.get(stage)

    for stage in ("ar", "naive", "cft", "opd", "rl", "constrained"):
        if stage not in models:
            continue
        add(stage, None if stage == "ar" else cfg.tau, len(world.test), True)
        for tau in curve if stage not in ("ar", "constrained") else ():
            # tau = 1 is the slow end, one token a step: there the naive conversion has its best chance
            add(stage, tau, n_curve, False)
    return out, models


def main(cfg):
    world, name = load_world(cfg), "report"
    if cfg.eval_split == "val":
        world, name = dataclasses.replace(world, test=world.val), "report_val"
    seeds = finished_seeds(cfg)
    per_seed = {}
    for seed in seeds:
        per_seed[seed], models = evaluate_seed(cfg, world, seed)
        if seed == seeds[0]:
            shown = models
    n = len(world.test)
    still = {"prerank": score_order(world.test, np.where(world.test.order >= 0, np.arange(world.test.order.shape[1]), -1)),
             "oracle" if cfg.world == "toy" else "writer": score_order(world.test, world.test.order)}
    cut = lambda scores, users: {k: v[:users] for k, v in scores.items()}
    ar_mean = average([per_seed[s]["ar", None, True][0] for s in seeds])
    rows = [make_row(name, (None, None), "mean", s, {"ar": ar_mean, "prerank": still["prerank"]}, reported=True)
            for name, s in still.items()]
    for key in dict.fromkeys(key for seed in seeds for key in per_seed[seed]):  # a stage may have finished for some seeds only
        stage, tau, reported = key
        have = [s for s in seeds if key in per_seed[s]]
        point = (None if stage == "ar" else cfg.block_size, tau)
        made = []
        for seed in have:
            scores, timing, seconds = per_seed[seed][key]
            users = len(scores["valid"])
            reference = {"ar": cut(per_seed[seed]["ar", None, True][0], users), "prerank": cut(still["prerank"], users)}
            made.append(make_row(stage, point, seed, scores, reference, timing, seconds, reported))
        scores = average([per_seed[s][key][0] for s in have])
        timings = [per_seed[s][key][1] for s in have]
        timing = {k: timings[0][k] and float(np.mean([t[k] for t in timings])) for k in NO_TIMING}
        reference = {"ar": cut(ar_mean, users), "prerank": cut(still["prerank"], users)}
        mean = make_row(stage, point, "mean", scores, reference, timing, made[0]["train_seconds"] and
                        float(np.mean([r["train_seconds"] for r in made])), reported)
        if len(have) > 1:
            mean["seed_se"] = {m: float(np.std([r["strict"][m] for r in made], ddof=1) / len(have) ** 0.5) for m in METRICS}
        rows += [*made, mean]
    report = {"config": cfg.config, "dataset": "Amazon Beauty" if cfg.world == "beauty" else "toy world",
              "source": world.source, "split": cfg.eval_split, "n_users": n, "device": device_name(cfg), "seeds": seeds,
              "operating_point": {"block_size": cfg.block_size, "commit": cfg.commit, "tau": cfg.tau},
              "data": world.notes, "rows": rows}
    text = markdown(report)
    save_atomically(folder(cfg, f"{name}.json"), lambda p: open(p, "w").write(json.dumps(report, indent=1) + "\n"))
    save_atomically(folder(cfg, f"{name}.md"), lambda p: open(p, "w").write(text))
    if cfg.eval_split == "test":
        figures(cfg, world, report, per_seed[seeds[0]], shown)
    print(f"\n{summary(report)}\nwritten: {folder(cfg)}/{name}.json and .md" + (", figures" if cfg.eval_split == "test" else ""))


def device_name(cfg):
    if device_of(cfg).type == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU, {cfg.threads} threads"


def markdown(report):
    """The stage table: rows at the operating point, averaged over seeds. Strict scores, ± standard error over users."""
    point = report["operating_point"]
    percent = lambda v: "–" if v is None else f"{100 * v:.1f} %"
    number = lambda v, digits=1: "–" if v is None else f"{v:.{digits}f}"
    lines = [f"# {report['dataset']} ({report['config']}): {report['n_users']} {report['split']} users, seeds {report['seeds']}, {report['device']}", "",
             f"Data: {report['source']}. Operating point: block size {point['block_size']}, {point['commit']} {point['tau']}. "
             "Scores are strict (an invalid answer counts 0), ± standard error over users; the difference in N@10 to AR has "
             "its paired 95 % interval; the share is that of AR's gain in N@10 over the pre-ranked order.", "",
             "| stage | R@1 | R@5 | N@10 | MRR | N@10 − AR | share of gain | valid | dup. | dropped | out of set | faithful | "
             "identity | trace | forwards | tok/fwd | × AR, batch 1 | × AR, batch 64 | train s |", "|---" * 19 + "|"]
    for r in report["rows"]:
        if not (r["reported"] and r["seed"] == "mean"):
            continue
        s, d = r["strict"], r["diff_to_ar"] and r["diff_to_ar"]["ndcg@10"]
        pm = lambda m: f"{s[m]:.3f} ± {r['se'][m]:.3f}"
        name = r["stage"] + (f" ({len(report['seeds'])} seeds)" if len(report["seeds"]) > 1 and r["train_seconds"] else "")
        lines.append("| " + " | ".join([
            name, pm("recall@1"), pm("recall@5"), pm("ndcg@10"), pm("mrr"),
            f"{d[1]:+.3f} [{d[0]:+.3f}, {d[2]:+.3f}]" if d else "–", percent(r["ar_gain_share"]), percent(r["valid"]),
            *(percent(r[k]) for k in ("duplicated", "dropped", "out_of_set", "faithful", "identity")),
            number(r["trace_tokens"]), number(r["forwards"]), number(r["tokens_per_forward"], 2),
            number(r["speedup_b1"], 2), number(r["speedup_batch"], 2), number(r["train_seconds"], 0)]) + " |")
    lines += ["", "The curve around the operating point (the first users only where there are fewer):", "",
              "| stage | tau | users | N@10 | valid | faithful | forwards | tok/fwd |", "|---" * 8 + "|"]
    for r in report["rows"]:
        if r["tau"] is not None and r["seed"] == "mean":
            lines.append(f"| {r['stage']} | {r['tau']} | {r['n_users']} | {r['strict']['ndcg@10']:.3f} ± {r['se']['ndcg@10']:.3f} | "
                         f"{percent(r['valid'])} | {percent(r['faithful'])} | {r['forwards']:.1f} | {r['tokens_per_forward']:.2f} |")
    return "\n".join(lines) + "\n"


def summary(report):
    """The stage table for a terminal, 92 columns: what to look at first."""
    show = lambda v, text: "–" if v is None else text.format(v)
    lines = [f"{'stage':12}{'R@1':>7}{'N@10':>7}{'share of':>10}{'valid':>9}{'faithful':>10}{'same as':>9}{'forwards':>10}{'tokens a':>10}{'speed-up':>9}",
             f"{'':12}{'':7}{'':7}{'AR gain':>10}{'':9}{'':10}{'input':>9}{'':10}{'forward':>10}{'batch 1':>9}"]
    for r in report["rows"]:
        if r["reported"] and r["seed"] == "mean":
            lines.append(f"{r['stage']:12}{r['strict']['recall@1']:7.3f}{r['strict']['ndcg@10']:7.3f}{show(r['ar_gain_share'], '{:.1%}'):>10}"
                         f"{show(r['valid'], '{:.1%}'):>9}{show(r['faithful'], '{:.1%}'):>10}{show(r['identity'], '{:.1%}'):>9}"
                         f"{show(r['forwards'], '{:.1f}'):>10}{show(r['tokens_per_forward'], '{:.2f}'):>10}{show(r['speedup_b1'], '{:.2f}'):>9}")
    point = report["operating_point"]
    return "\n".join([f"{report['dataset']}: {report['n_users']} {report['split']} users, seeds {report['seeds']}, block size "
                      f"{point['block_size']}, {point['commit']} {point['tau']}; strict scores", "", *lines, ""])


# --- Figures -----------------------------------------------------------------------------------------------------------------

COLOURS = {"ar": "#333333", "naive": "#b0b0b0", "cft": "#1f77b4", "opd": "#2ca02c", "rl": "#d62728"}


def figures(cfg, world, report, scores, models):
    """Four figures into runs/<config>/: tradeoff.png, throughput.png, trace_lengths.png, denoising.png."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    def save(fig, name):
        fig.tight_layout()
        fig.savefig(folder(cfg, name), dpi=130, facecolor="white")
        plt.close(fig)

    rows = [r for r in report["rows"] if r["seed"] == "mean"]
    fig, axes = plt.subplots(1, 2, figsize=(10, 4))
    for ax, name, get in ((axes[0], "valid answers", lambda r: r["valid"]), (axes[1], "N@10, strict", lambda r: r["strict"]["ndcg@10"])):
        for stage in ("naive", "cft", "opd", "rl"):
            line = sorted((r["tokens_per_forward"], get(r)) for r in rows if r["stage"] == stage)
            if line:
                ax.plot(*zip(*line), "o-", color=COLOURS[stage], label=stage, ms=4)
        at = next(get(r) for r in rows if r["stage"] == "ar")
        ax.axhline(at, color=COLOURS["ar"], ls="--", label="ar (1 token a forward)")
        ax.set(xlabel="tokens a forward", ylabel=name)
        ax.legend()
    axes[1].axhline(next(get(r) for r in rows if r["stage"] == "prerank"), color="#999999", ls=":")
    fig.suptitle(f"{report['dataset']}: quality against parallelism, one point a threshold")
    save(fig, "tradeoff.png")

    last = [s for s in STAGES if s in models][-1]
    lengths = [n for n in (cfg.block_size, 2 * cfg.block_size, 4 * cfg.block_size) if n < world.max_response] + [world.max_response]
    if last != "ar":
        quick = dataclasses.replace(cfg, eval_speed_seconds=cfg.eval_speed_seconds / 3)
        fig, axes = plt.subplots(1, 2, figsize=(10, 4))
        for ax, batch in zip(axes, (1, SPEED_BATCH)):
            timing = [speed(quick, world, models["ar"], models[last], batch, n) for n in lengths]
            ax.plot(lengths, [t["ar"] for t in timing], "o--", color=COLOURS["ar"], label="AR, cached")
            ax.plot(lengths, [t["block"] for t in timing], "o-", color=COLOURS[last], label=f"{last}, block size {cfg.block_size}")
            ax.set(xlabel="output length (tokens, at most)", ylabel="generated tokens / s", title=f"batch {batch}", ylim=0)
            ax.legend()
        save(fig, "throughput.png")

    fig, ax = plt.subplots(figsize=(6, 4))
    tallest = max(int(scores[k][0]["trace_tokens"].max()) for k in scores if k[2])
    for stage in [s for s in ("ar", "cft", "opd", "rl") if s in models]:
        found = next(v for k, v in scores.items() if k[0] == stage and k[2])[0]["trace_tokens"]
        ax.hist(found, bins=np.arange(0, tallest + 3), histtype="step", color=COLOURS[stage], label=f"{stage}, mean {found.mean():.1f}", lw=1.5)
    ax.set(xlabel="trace tokens", ylabel="users", yscale="log")
    ax.legend()
    save(fig, "trace_lengths.png")
    if last != "ar":
        save(denoising_figure(cfg, world, models[last], plt), "denoising.png")


def denoising_figure(cfg, world, model, plt):
    """One test response as a grid, one block a row, coloured by the denoising step at which each token was committed."""
    prompt, _ = tensors(world.test, range(1), device_of(cfg))
    decoded = block_decode(model, prompt, world.max_response, cfg.block_size, cfg.commit, cfg.tau)
    B = cfg.block_size
    tokens, steps = decoded.tokens[0].cpu().numpy().reshape(-1, B), decoded.commit_step[0].cpu().numpy().reshape(-1, B)
    used = (tokens != PAD).any(1)
    tokens, steps = tokens[used], steps[used]
    shown = tokens != PAD
    n_steps = int(steps[shown].max()) + 1
    colours = plt.get_cmap("viridis_r")(np.linspace(0.05, 0.6, n_steps))
    fig, ax = plt.subplots(figsize=(1.05 * B, 0.55 * len(tokens) + 1.2))
    for i, j in zip(*np.nonzero(shown)):
        ax.add_patch(plt.Rectangle((j, i), 0.96, 0.92, color=colours[steps[i, j]]))
        word = world.words[tokens[i, j]]
        word = word if len(word) < 14 else word.split(" > ")[-1][:12] + "…"
        ax.text(j + 0.48, i + 0.46, word, ha="center", va="center", fontsize=8, color="black" if steps[i, j] < n_steps / 2 else "white")
    for s in range(n_steps):
        ax.plot([], [], "s", color=colours[s], ms=9, label=f"step {s + 1}")
    ax.set(xlim=(0, B), ylim=(len(tokens), 0), yticks=np.arange(len(tokens)) + 0.5, yticklabels=[f"block {i + 1}" for i in range(len(tokens))],
           xticks=[], title=f"{int(shown.sum())} tokens in {int(decoded.forwards[0])} forwards")
    ax.legend(ncol=n_steps, loc="upper center", bbox_to_anchor=(0.5, -0.02), frameon=False)
    return fig


if __name__ == "__main__":
    script(main, __doc__)
