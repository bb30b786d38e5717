"""The figures of the report, drawn from report.json, the training logs and the models.

They come last and cannot cost the table: one that fails is a sentence on stderr.
"""
import dataclasses
import io
import json
import math
import os
import sys
import warnings

import numpy as np
import torch

from config import STAGES, folder
from data import PAD, tensors
from diffusion import block_mask
from ours.bound import answer_length
from plumbing.checkpoint import device_of, finished_stages, log_path, save_atomically
from report.denoise import opened
from report.speed import BATCHES, speed
from sampler import NEVER
from trainer import decode

COLOURS = {"ar": "#333333", "naive": "#b0b0b0", "cft": "#1f77b4", "opd": "#2ca02c",
           "rl": "#d62728"}
WIDEST = 20  # slots in a row of the denoising figure
KINDS = {"valid": "#2ca02c", "duplicated": "#d62728", "dropped": "#ff7f0e",
         "out_of_set": "#9467bd"}


def pyplot():
    """matplotlib.pyplot for files alone, whatever a notebook has put into MPLBACKEND."""
    os.environ["MPLBACKEND"] = "Agg"
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt


def draw_figures(cfg, options, world, report, results):
    """Draws all figures of a report on test users into runs/<config>/. Raises nothing."""
    if report["split"] != "test":
        return
    cfg = dataclasses.replace(cfg, seed=report["seeds"][0])
    figures = {"tradeoff.png": lambda: tradeoff_figure(report),
               "mask.png": mask_figure,
               "stages.png": lambda: stages_figure(cfg, report),
               "trace_lengths.png": lambda: trace_figure(cfg, results)}
    models = {}

    def load():
        for stage, (model, _) in finished_stages(cfg, world).items():
            models[stage] = model

    attempt("figures of the models", load)
    if len(models) > 1:
        figures["throughput.png"] = lambda: throughput_figure(cfg, options, world, models)
    for name, figure in figures.items():
        attempt(name, lambda: save(cfg, figure(), name))
    if len(models) > 1:
        last = list(models)[-1]
        attempt("denoising.png", lambda: save_denoising(cfg, world, models[last]))


def attempt(what, draw):
    """draw(), or why not, in a sentence."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a character that the font lacks, a narrow margin
            draw()
    except Exception as error:  # what can fail here is matplotlib's, the disk's, a log's
        reason = (str(error).splitlines() or [""])[0]
        print(f"warning: {what} could not be drawn ({type(error).__name__}: {reason}); the report "
              "is complete without", file=sys.stderr, flush=True)


def save(cfg, fig, name):
    def write(temporary):
        fig.savefig(temporary, format="png", dpi=130, facecolor="white")

    fig.tight_layout()
    save_atomically(folder(cfg, name), write)
    pyplot().close(fig)


# --- From the report and the logs -------------------------------------------------------------

def read_log(path):
    """The lines of a metrics.jsonl as dicts; damaged ones are left out."""
    lines = []
    if os.path.exists(path):
        with open(path, encoding="utf-8", errors="replace") as file:
            for text in file:
                try:
                    line = json.loads(text)
                except ValueError:
                    continue
                if isinstance(line, dict):
                    lines.append(line)
    return lines


def stages_figure(cfg, report):
    """The structural gap, opened and closed: which answers are valid stage by stage, and how CFT
    brings them back, from its log."""
    rows = {}
    for row in report["rows"]:
        if row["seed"] == "mean" and row["reported"] and row["stage"] in (*COLOURS, "constrained"):
            rows[row["stage"]] = row
    fig, (bars, curve) = pyplot().subplots(1, 2, figsize=(10, 4))
    for i, (kind, colour) in enumerate(KINDS.items()):
        at = np.arange(len(rows)) + 0.2 * (i - 1.5)
        percent = [100 * row[kind] for row in rows.values()]
        drawn = bars.bar(at, percent, 0.19, color=colour, label=kind.replace("_", " "))
        if kind == "valid":
            bars.bar_label(drawn, [f"{p:.1f}" for p in percent], fontsize=8)
    bars.set(xticks=range(len(rows)), xticklabels=rows, ylabel="% of the answers",
             ylim=(0, 119), title="at the operating point")
    bars.legend(ncol=4, fontsize=7, loc="upper center")

    wanted = {"step", "valid", "tokens_per_forward"}
    log = [line for line in read_log(log_path(cfg, "cft")) if wanted <= line.keys()]
    steps = [line["step"] + 1 for line in log]
    curve.plot(steps, [100 * line["valid"] for line in log], "o-", color=KINDS["valid"], ms=3)
    curve.set(xlabel="CFT steps", ylabel="valid answers, % of 64", ylim=(-3, 105),
              title="while CFT goes on")
    if steps:
        curve.set_xscale("log")
    other = curve.twinx()
    other.plot(steps, [line["tokens_per_forward"] for line in log], "-", color=COLOURS["cft"],
               lw=1)
    other.set_ylabel("tokens a forward", color=COLOURS["cft"])
    other.set_ylim(0)
    return fig


def tradeoff_figure(report):
    """Invalid answers and strict N@10 against tokens a forward, a point a threshold. The naive
    conversion's N@10 lies far below the axis."""
    rows = [row for row in report["rows"] if row["seed"] == "mean" and not row["reported"]]
    ar = next(row for row in rows if row["stage"] == "ar")
    fig, (left, right) = pyplot().subplots(1, 2, figsize=(10, 4))

    def invalid(row):
        return 100 * (1 - row["valid"])

    def ndcg(row):
        return row["strict"]["ndcg@10"]

    for ax, name, value in ((left, "invalid answers, %", invalid), (right, "N@10, strict", ndcg)):
        for stage in ("naive", "cft", "opd", "rl"):
            points = [(row["tokens_per_forward"], value(row)) for row in rows
                      if row["stage"] == stage]
            if points:
                x, y = zip(*sorted(points))
                ax.plot(x, y, "o-", color=COLOURS[stage], label=stage, ms=4)
        ax.axhline(value(ar), color=COLOURS["ar"], ls="--", label="ar (1 token a forward)")
        ax.set(xlabel="tokens a forward", ylabel=name)
    left.set_yscale("symlog", linthresh=0.1)  # linear up to .1 %, so that 0 has a place
    left.set_ylim(-0.02, 150)
    best = max(ndcg(row) for row in rows)
    prerank = ndcg(ar) - ar["diff_to_prerank"]["ndcg@10"][1]
    right.axhline(prerank, color="#999999", ls=":", label="incoming order")
    room = max(best - prerank, 0)
    right.set_ylim(prerank - 0.3 * room - 0.005, best + 0.1 * room + 0.005)
    for ax in (left, right):
        ax.legend(fontsize=8)
    fig.suptitle(f"{report['dataset']}: quality against parallelism, one point a threshold "
                 f"({ar['n_users']} users)")
    return fig


def trace_figure(cfg, results):
    """How long the traces are, stage by stage, of one seed."""
    lengths = {result.stage: result.scores["trace_tokens"] for result in results
               if result.reported and result.seed == cfg.seed and result.stage in STAGES}
    longest = int(max(tokens.max() for tokens in lengths.values()))
    fig, ax = pyplot().subplots(figsize=(6, 4))
    for stage, tokens in lengths.items():
        ax.hist(tokens, bins=np.arange(0, longest + 3), histtype="step", lw=1.5,
                color=COLOURS[stage], label=f"{stage}, mean {tokens.mean():.1f}")
    ax.set(xlabel="trace tokens", ylabel="users", yscale="log")
    ax.legend()
    return fig


# --- From the models --------------------------------------------------------------------------

def throughput_figure(cfg, options, world, models):
    """Tokens a second of AR and of the last student, by the length of what they write."""
    last = list(models)[-1]
    B, most = cfg.block_size, world.max_response
    least = answer_length(cfg) if cfg.trace == "bound" else 0     # the rest is the trace's
    lengths = [n for n in (B, 2 * B, 4 * B) if least < n < most] + [most]
    fig, axes = pyplot().subplots(1, 2, figsize=(10, 4))
    for ax, batch in zip(axes, BATCHES):
        timing = [speed(cfg, world, models["ar"], models[last], batch,
                        options.eval_speed_seconds / 3, length) for length in lengths]
        ax.plot(lengths, [t["ar"] for t in timing], "o--", color=COLOURS["ar"],
                label="AR, cached")
        ax.plot(lengths, [t["block"] for t in timing], "o-", color=COLOURS[last],
                label=f"{last}, block size {B}")
        ax.set(xlabel="output length (tokens, at most)", ylabel="generated tokens / s",
               title=f"batch {batch}", ylim=0)
        ax.legend()
    return fig


def save_denoising(cfg, world, model, user=0):
    """denoising.png and denoising.gif: one test response, token by token."""
    fig, show_until, order = denoising_figure(cfg, world, model, user)
    save_atomically(folder(cfg, "denoising.gif"),
                    lambda temporary: write_gif(temporary, fig, show_until, order))
    show_until(order[-1])
    save(cfg, fig, "denoising.png")


def denoising_figure(cfg, world, model, user=0, tau=None):
    """The response to one test user as a grid, one block a row (a wide one takes several),
    coloured by the step of its block in which each token was committed.

    Returns the figure, a function that hides what came after (block, step), and these pairs in
    the order of the forwards."""
    prompt, _ = tensors(world.test, range(user, user + 1), device_of(cfg))
    B = cfg.block_size
    tokens, steps = opened(decode(cfg, model, prompt, world.max_response, tau), B)
    narrower = (0, -len(tokens) % B)  # the last block, with --trace bound
    tokens = np.pad(tokens, narrower, constant_values=PAD).reshape(-1, B)
    steps = np.pad(steps, narrower, constant_values=NEVER).reshape(-1, B)
    per = -(-B // WIDEST)  # rows of a block
    W = -(-B // per)
    fill = (0, 0), (0, per * W - B)
    tokens = np.pad(tokens, fill, constant_values=PAD).reshape(-1, W)
    steps = np.pad(steps, fill, constant_values=NEVER).reshape(-1, W)
    words = [[short(world.words[token]) for token in row] for row in tokens]
    width = 0.35 + 0.075 * max(len(word) for row in words for word in row)
    fig, ax = pyplot().subplots(figsize=(max(6, width * W), 0.55 * len(tokens) + 1.2))
    names = ["" if i % per else f"block {i // per + 1}" for i in range(len(tokens))]
    ax.set(xlim=(0, W), ylim=(len(tokens), 0), yticks=np.arange(len(tokens)) + 0.5,
           yticklabels=names, xticks=[], title=" ")
    cells = draw_cells(ax, words, np.where(tokens != PAD, steps, -1), per)
    for i, j in zip(*np.nonzero(steps != NEVER)):  # a forward may write nothing that stays
        cells.setdefault((int(i) // per, int(steps[i, j])), [])
    fig.tight_layout()
    n_tokens = int((tokens != PAD).sum())

    def show_until(last):
        done = [when for when in cells if when <= last]
        written = sum(len(cells[when]) // 2 for when in done)
        for when, artists in cells.items():
            for artist in artists:
                artist.set_visible(when <= last)
        plural = "" if len(done) == 1 else "s"
        ax.set_title(f"{written} of {n_tokens} tokens in {len(done)} forward{plural}")

    show_until((len(tokens), 0))
    return fig, show_until, sorted(cells)


def draw_cells(ax, words, steps, per):
    """Words and their steps, `per` rows a block, -1 where nothing was written -> {(block, step):
    the boxes and texts that appear there}."""
    plt = pyplot()
    n_steps = int(steps.max()) + 1
    colours = plt.get_cmap("viridis_r")(np.linspace(0.05, 0.6, n_steps))
    cells = {}
    for i, j in zip(*np.nonzero(steps >= 0)):
        step = int(steps[i, j])
        ax.add_patch(plt.Rectangle((j, i), 0.96, 0.92, color="#dddddd"))  # [MASK]
        box = ax.add_patch(plt.Rectangle((j, i), 0.96, 0.92, color=colours[step]))
        # A word of the data is no markup: a $ would begin a formula.
        text = ax.text(j + 0.48, i + 0.46, words[i][j], ha="center", va="center", fontsize=11,
                       color="black" if step < n_steps / 2 else "white", parse_math=False)
        cells.setdefault((int(i) // per, step), []).extend((box, text))
    for step in range(n_steps):
        ax.plot([], [], "s", color=colours[step], ms=9, label=f"step {step + 1}")
    ax.legend(ncol=min(n_steps, 8), loc="upper center", bbox_to_anchor=(0.5, -0.02),
              frameon=False)
    return cells


def short(word, most=14):
    """A word that fits a cell; of a path of categories, its end."""
    if len(word) < most:
        return word
    return word.split(" > ")[-1][:most - 2] + "…"


def write_gif(path, fig, show_until, order, most=32, dpi=60, milliseconds=700):
    """Nothing, then forward by forward (at most so many frames), and a rest at the end."""
    from PIL import Image
    moments = [(-1, 0), *order[::math.ceil(len(order) / most)], order[-1]]
    frames = []
    for moment in moments:
        show_until(moment)
        image = io.BytesIO()
        fig.savefig(image, format="png", dpi=dpi, facecolor="white")
        frames.append(Image.open(image).convert("RGB"))
    time = [milliseconds] * (len(frames) - 1) + [4 * milliseconds]
    frames[0].save(path, format="GIF", save_all=True, append_images=frames[1:], duration=time,
                   loop=0)


def mask_figure(P=4, B=4, block=(0, 1, 1)):
    """What sees what in a training forward: the real mask, for a prompt of P tokens, a response
    of two blocks, and a segment for each entry of `block`, a copy of the block it names."""
    plt = pyplot()
    shared, total = P + 2 * B, P + 2 * B + len(block) * B
    sees = block_mask(P, 2 * B, B, torch.tensor([block]))[0].numpy().astype(int)
    sees[shared:, shared:] *= 2  # a colour of its own: a segment sees itself
    fig, ax = plt.subplots(figsize=(6.4, 6))
    ax.imshow(sees, cmap=plt.matplotlib.colors.ListedColormap(["white", "#7fb2d6", "#f2a65a"]))
    names = ["prompt", "clean 1", "clean 2", *(f"block {b + 1}, noised" for b in block)]
    edges = [0, P, *range(P + B, total + 1, B)]
    middle = [(a + b - 1) / 2 for a, b in zip(edges, edges[1:])]
    for edge in edges[1:-1]:
        ax.axhline(edge - 0.5, color="#888888", lw=0.8)
        ax.axvline(edge - 0.5, color="#888888", lw=0.8)
    ax.set(xticks=middle, yticks=middle, yticklabels=names, xlabel="is seen", ylabel="sees")
    ax.set_xticklabels(names, rotation=40, ha="right")
    return fig
