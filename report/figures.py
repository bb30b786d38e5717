"""The figures of a report, drawn from report.json alone, and the animated picture of a decode.

The figures come last and cannot cost the table: one that fails is a sentence on stderr.
"""
import os
import sys
import warnings

import numpy as np

from config import folder
from data import PAD
from plumbing.checkpoint import save_atomically
from report.table import mean_rows

COLOURS = {"ar": "#333333", "naive": "#b0b0b0", "cft": "#1f77b4", "opd": "#2ca02c",
           "rl": "#d62728", "own ar": "#777777", "lossless": "#9467bd"}


def pyplot():
    """matplotlib.pyplot for files alone, whatever a notebook has put into MPLBACKEND."""
    os.environ["MPLBACKEND"] = "Agg"
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt


def draw_figures(cfg, report):
    """Draws all figures of a report into runs/<config>/, and raises nothing."""
    for name, draw in (("tradeoff.png", tradeoff_figure), ("speed.png", speed_figure)):
        path = folder(cfg, name)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a narrow margin
                save_figure(path, draw(report))
        except Exception as error:  # what fails here is matplotlib's, or the disk's
            print(f"warning: {path} could not be drawn ({type(error).__name__}: {error}); the "
                  "report is complete without it", file=sys.stderr, flush=True)


def save_figure(path, figure):
    def write(temporary):
        figure.savefig(temporary, format="png", dpi=130, facecolor="white")

    figure.tight_layout()
    save_atomically(path, write)
    pyplot().close(figure)


def tradeoff_figure(report):
    """Valid answers and strict N@10 against forwards, a point for each tau.

    AR is a point on the left alone: the curves are of the first users, and AR's N@10 of all."""
    ar = next(row for row in mean_rows(report) if row["stage"] == "ar")
    figure, (left, right) = pyplot().subplots(1, 2, figsize=(10, 4))

    def valid(row):
        return 100 * row["valid"]

    def ndcg(row):
        return row["strict"]["ndcg@10"]

    for axes, name, value in ((left, "valid answers, %", valid), (right, "N@10, strict", ndcg)):
        for stage in ("naive", "cft", "opd", "rl"):
            rows = [row for row in report["curve"] if row["stage"] == stage]
            points = sorted((row["forwards"], value(row)) for row in rows)
            if points:
                axes.plot(*zip(*points), "o-", color=COLOURS[stage], label=stage, ms=4)
        if axes is left:
            axes.plot(ar["forwards"], value(ar), "s", color=COLOURS["ar"], label="ar")
        axes.set(xlabel="forwards a response", ylabel=name, xscale="log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("{x:g}")
        axes.tick_params(axis="x", which="both", labelsize=7)
        axes.legend(fontsize=8)
    left.set_ylim(-3, 103)
    figure.suptitle(f"{report['dataset']}: quality against forwards, one point for each tau")
    return figure


def speed_figure(report):
    """Tokens a second of the rows that were timed, at both batch sizes."""
    rows = [row for row in mean_rows(report) if row["times"]]
    names = [row["stage"] for row in rows]
    figure, axes = pyplot().subplots(1, 2, figsize=(8, 3.2))
    for ax, batch in zip(axes, (1, 64)):
        rates = [row["times"][f"tokens_per_s_b{batch}"] for row in rows]
        bars = ax.bar(names, rates, color=[COLOURS[name] for name in names])
        ax.bar_label(bars, [f"{rate:,.0f}" for rate in rates], fontsize=8)
        ax.set(ylabel="tokens a second", title=f"batch {batch}")
        ax.margins(y=0.15)
    figure.suptitle(report["device"])
    return figure


# --- The animated picture ---------------------------------------------------------------------

CELL, HEIGHT, ACROSS = 88, 30, 10  # pixels of a slot, slots in a line
MOST = 11                           # characters of a word


def write_gif(path, user, written, milliseconds=900):
    """Writes a picture (GIF) of a decode (denoise.Written) forward by forward: a slot is grey
    until the forward that writes it, and then has the colour of that forward."""
    frames = [frame(user, written, done) for done in range(len(written.ends) + 1)]
    rest = [milliseconds] * (len(frames) - 1) + [4 * milliseconds]

    def write(temporary):
        frames[0].save(temporary, format="GIF", save_all=True, append_images=frames[1:],
                       duration=rest, loop=0)
    save_atomically(path, write)


def frame(user, written, done):
    """The picture after so many forwards: every block begins a new line."""
    from PIL import Image, ImageColor, ImageDraw, ImageFont  # Pillow comes with matplotlib
    places = {}                                                   # slot -> column, line
    line, column, block = 0, 0, 0
    for slot in np.flatnonzero(written.tokens != PAD):
        if column == ACROSS or written.block[slot] != block:
            line, column, block = line + 1, 0, written.block[slot]
        places[slot] = column, line
        column += 1

    size = ACROSS * CELL + 8, (line + 2) * HEIGHT + 6 * int(block) + 8
    image = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(15)
    draw.text((8, 8), f"after {done} of {len(written.ends)} forwards", "black", font)
    for slot, (column, line) in places.items():
        x = 4 + column * CELL
        y = 4 + (line + 1) * HEIGHT + 6 * written.block[slot]
        forward = written.forward[slot]
        there = forward < done
        hue = 200 + 150 * forward / max(1, len(written.ends) - 1)
        fill = ImageColor.getrgb(f"hsl({hue:.0f}, 70%, 82%)") if there else "#dddddd"
        draw.rounded_rectangle((x, y, x + CELL - 4, y + HEIGHT - 4), 4, fill)
        word = user.words[written.tokens[slot]]
        if len(word) > MOST:
            word = word[:MOST - 1] + "…"
        draw.text((x + 6, y + 4), word if there else "[MASK]", "black" if there else "#888", font)
    return image
