"""Figures go into files; the animated picture of a decode."""
import numpy as np

from data import PAD
from plumbing.checkpoint import save_atomically


def forwards_axis(axes):
    """Makes the x axis that of forwards, logarithmic, with numbers one can read."""
    axes.set(xscale="log", xlabel="forwards a response")
    axes.set_xticks((2, 3, 5, 10, 20, 40, 80), labels=(2, 3, 5, 10, 20, 40, 80))
    axes.minorticks_off()


def save_figure(path, figure):
    """Writes a figure (matplotlib.figure.Figure) as PNG."""
    def write(temporary):
        figure.savefig(temporary, format="png", dpi=130, facecolor="white")

    figure.tight_layout()
    save_atomically(path, write)


# --- The animated picture ---------------------------------------------------------------------

CELL, HEIGHT, ACROSS = 88, 30, 10  # pixels of a slot, slots in a line
MOST = 11                           # characters of a word


def write_gif(path, user, written):
    """Writes a picture (GIF) of a decode (denoise.Written) forward by forward: a slot is grey
    until the forward that writes it, and then has the colour of that forward."""
    frames = [frame(user, written, done) for done in range(len(written.ends) + 1)]
    rest = [900] * (len(frames) - 1) + [3600]                     # milliseconds

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
