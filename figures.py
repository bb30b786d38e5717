"""The figures of the report, drawn from report.json, the training logs and the models."""
import dataclasses
import json
import os

import numpy as np
import torch

from common import device_of, log_path, serve
from config import STAGES, folder
from data import tensors
from diffusion import segment_mask
from model import PAD

COLOURS = {"ar": "#333333", "naive": "#b0b0b0", "cft": "#1f77b4", "opd": "#2ca02c", "rl": "#d62728"}


def figures(cfg, world, report, scores, models, speed, batches):
    """Into runs/<config>/: stages.png, tradeoff.png, throughput.png, trace_lengths.png, mask.png, denoising.png and .gif.

    scores: {(stage, tau, reported): (scores, ...)} and models {stage: GPT} of one seed; speed: evaluate.speed, at the two batches."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.animation import FuncAnimation, PillowWriter

    def save(fig, name):
        fig.tight_layout()
        fig.savefig(folder(cfg, name), dpi=130, facecolor="white")
        plt.close(fig)

    save(tradeoff_figure(report, plt), "tradeoff.png")
    save(mask_figure(plt), "mask.png")
    save(stages_figure(cfg, report, plt), "stages.png")

    last = [s for s in STAGES if s in models][-1]
    lengths = [n for n in (cfg.block_size, 2 * cfg.block_size, 4 * cfg.block_size) if n < world.max_response] + [world.max_response]
    if last != "ar":
        quick = dataclasses.replace(cfg, eval_speed_seconds=cfg.eval_speed_seconds / 3)
        fig, axes = plt.subplots(1, 2, figsize=(10, 4))
        for ax, batch in zip(axes, batches):
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
        fig, show_until, order = denoising_figure(cfg, world, models[last], plt)
        frames = [(-1, 0), *order[::1 + len(order) // 32], *order[-1:] * 3]  # nothing, forward by forward (at most 32), a rest at the end
        FuncAnimation(fig, lambda i: show_until(frames[i]), len(frames)).save(folder(cfg, "denoising.gif"), PillowWriter(fps=2), dpi=60)
        save(fig, "denoising.png")


def stages_figure(cfg, report, plt):
    """The structural gap, opened and closed: which answers are valid stage by stage, and how CFT brings them back, from its log."""
    rows = {r["stage"]: r for r in report["rows"] if r["seed"] == "mean" and r["reported"] and r["stage"] in (*COLOURS, "constrained")}
    fig, (bars, curve) = plt.subplots(1, 2, figsize=(10, 4))
    kinds = {"valid": "#2ca02c", "duplicated": "#d62728", "dropped": "#ff7f0e", "out_of_set": "#9467bd"}
    for i, (kind, colour) in enumerate(kinds.items()):
        at = np.arange(len(rows)) + 0.2 * (i - 1.5)
        drawn = bars.bar(at, [100 * r[kind] for r in rows.values()], 0.19, color=colour, label=kind.replace("_", " "))
        if kind == "valid":
            bars.bar_label(drawn, [f"{100 * r['valid']:.1f}" for r in rows.values()], fontsize=8)
    bars.set(xticks=range(len(rows)), xticklabels=rows, ylabel="% of the answers", ylim=(0, 119), title="at the operating point")
    bars.legend(ncol=4, fontsize=7, loc="upper center")
    path = log_path(dataclasses.replace(cfg, seed=report["seeds"][0]), "cft")
    log = [line for line in map(json.loads, open(path)) if "valid" in line] if os.path.exists(path) else []
    steps = [line["step"] + 1 for line in log]
    curve.plot(steps, [100 * line["valid"] for line in log], "o-", color=kinds["valid"], ms=3)
    curve.set(xlabel="CFT steps", ylabel="valid answers, % of 64", xscale="log", ylim=(-3, 105), title="while CFT goes on")
    other = curve.twinx()
    other.plot(steps, [line["tokens_per_forward"] for line in log], "-", color=COLOURS["cft"], lw=1)
    other.set_ylabel("tokens a forward", color=COLOURS["cft"])
    other.set_ylim(0)
    return fig


def tradeoff_figure(report, plt):
    """Invalid answers and strict N@10 against tokens a forward; the naive conversion's N@10 lies far below the axis."""
    rows = [r for r in report["rows"] if r["seed"] == "mean" and not r["reported"]]  # all of the same users
    fig, axes = plt.subplots(1, 2, figsize=(10, 4))
    for ax, name, get in ((axes[0], "invalid answers, %", lambda r: 100 * (1 - r["valid"])), (axes[1], "N@10, strict", lambda r: r["strict"]["ndcg@10"])):
        for stage in ("naive", "cft", "opd", "rl"):
            line = sorted((r["tokens_per_forward"], get(r)) for r in rows if r["stage"] == stage)
            if line:
                ax.plot(*zip(*line), "o-", color=COLOURS[stage], label=stage, ms=4)
        ar = next(r for r in rows if r["stage"] == "ar")
        ax.axhline(get(ar), color=COLOURS["ar"], ls="--", label="ar (1 token a forward)")
        ax.set(xlabel="tokens a forward", ylabel=name)
    axes[0].set_yscale("symlog", linthresh=0.1)  # linear up to .1 %, so that 0 has a place
    axes[0].set_ylim(-0.02, 150)
    best = max(r["strict"]["ndcg@10"] for r in rows)
    prerank = get(ar) - ar["diff_to_prerank"]["ndcg@10"][1]
    axes[1].axhline(prerank, color="#999999", ls=":", label="incoming order")
    axes[1].set_ylim(prerank - 0.3 * (best - prerank) - 0.005, best + 0.1 * (best - prerank) + 0.005)
    for ax in axes:
        ax.legend(fontsize=8)
    fig.suptitle(f"{report['dataset']}: quality against parallelism, one point a threshold ({ar['n_users']} users)")
    return fig


def denoising_figure(cfg, world, model, plt):
    """One test response as a grid, one block a row, coloured by the denoising step at which each token was committed.

    Returns the figure, a function that hides what came after (block, step), and these pairs in the order of the forwards."""
    prompt, _ = tensors(world.test, range(1), device_of(cfg))
    decoded = serve(cfg, model, prompt, world.max_response)
    B = cfg.block_size
    tokens, steps = decoded.tokens[0].cpu().numpy().reshape(-1, B), decoded.commit_step[0].cpu().numpy().reshape(-1, B)
    used = (tokens != PAD).any(1)
    tokens, steps = tokens[used], steps[used]
    shown = tokens != PAD
    n_steps = int(steps[shown].max()) + 1
    colours = plt.get_cmap("viridis_r")(np.linspace(0.05, 0.6, n_steps))
    fig, ax = plt.subplots(figsize=(max(6, 1.05 * B), 0.55 * len(tokens) + 1.2))
    cells = {}  # (block, step) -> what appears there
    for i, j in zip(*np.nonzero(shown)):
        ax.add_patch(plt.Rectangle((j, i), 0.96, 0.92, color="#dddddd"))  # [MASK]
        box = ax.add_patch(plt.Rectangle((j, i), 0.96, 0.92, color=colours[steps[i, j]]))
        word = world.words[tokens[i, j]]
        word = word if len(word) < 14 else word.split(" > ")[-1][:12] + "…"
        text = ax.text(j + 0.48, i + 0.46, word, ha="center", va="center", fontsize=8, color="black" if steps[i, j] < n_steps / 2 else "white")
        cells.setdefault((int(i), int(steps[i, j])), []).extend((box, text))
    for s in range(n_steps):
        ax.plot([], [], "s", color=colours[s], ms=9, label=f"step {s + 1}")
    ax.set(xlim=(0, B), ylim=(len(tokens), 0), yticks=np.arange(len(tokens)) + 0.5, yticklabels=[f"block {i + 1}" for i in range(len(tokens))],
           xticks=[], title=f"{int(shown.sum())} tokens in {int(decoded.forwards[0])} forwards")
    ax.legend(ncol=n_steps, loc="upper center", bbox_to_anchor=(0.5, -0.02), frameon=False)
    fig.tight_layout()

    def show_until(last):
        for when, artists in cells.items():
            for artist in artists:
                artist.set_visible(when <= last)

    return fig, show_until, sorted(cells)


def mask_figure(plt, P=4, B=4, block=(0, 1, 1)):
    """What sees what in a training forward: the real mask, for a prompt of P tokens, a response of two blocks, and a segment for
    each entry of `block`, the noised copy of the block that it names."""
    S, T = P + 2 * B, P + 2 * B + len(block) * B
    sees = np.zeros((T, T))
    sees[:, :S] = segment_mask(P, 2 * B, B, torch.tensor([block]))[0]
    number = np.arange(T - S) // B
    sees[S:, S:] = 2 * (number[:, None] == number)  # by construction, without a mask: model.attend_segments
    fig, ax = plt.subplots(figsize=(6.4, 6))
    ax.imshow(sees, cmap=plt.matplotlib.colors.ListedColormap(["white", "#7fb2d6", "#f2a65a"]))
    names = ["prompt", "clean 1", "clean 2", *(f"block {b + 1}, noised" for b in block)]
    edges = [0, P, *range(P + B, T + 1, B)]
    middle = [(a + b - 1) / 2 for a, b in zip(edges, edges[1:])]
    for e in edges[1:-1]:
        ax.axhline(e - 0.5, color="#888888", lw=0.8)
        ax.axvline(e - 0.5, color="#888888", lw=0.8)
    ax.set(xticks=middle, yticks=middle, yticklabels=names, xlabel="is seen", ylabel="sees")
    ax.set_xticklabels(names, rotation=40, ha="right")
    return fig


