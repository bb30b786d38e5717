"""Writes docs/denoising.gif: one response, forward by forward, as a student of a run writes it.

    python experiments/gif.py --config toy --tau 0.9
    python experiments/gif.py --config toy --run_dir runs/early --cft_steps 300 --tau 0.9

Trains nothing: it takes the last student that has finished under --run_dir, and the settings that
it was trained with have to be given. A finished student writes nearly all in the first step; a
high --tau, or a student of a few hundred CFT steps, shows several.
"""
import os
import sys
from dataclasses import dataclass

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from plumbing.script import script  # noqa: E402  before torch: see there

from plumbing.checkpoint import last_student, save_atomically  # noqa: E402
from plumbing.settings import Text, UserError, Whole  # noqa: E402
from report.figures import denoising_figure, write_gif  # noqa: E402
from trainer import load_world  # noqa: E402


@dataclass(frozen=True)
class Options:
    user: Whole(1, 10 ** 9) = 1  # which test user
    out: Text() = os.path.join(ROOT, "docs", "denoising.gif")  # where the GIF goes


def main(cfg, options):
    world = load_world(cfg)
    if options.user > len(world.test):
        raise UserError(f"--user {options.user}: there are {len(world.test)} test users")
    stage, model = last_student(cfg, world)
    fig, show_until, order = denoising_figure(cfg, world, model, options.user - 1)
    save_atomically(options.out, lambda path: write_gif(path, fig, show_until, order))
    print(f"{options.out}: {stage}, tau {cfg.tau}, {len(order)} forwards")


if __name__ == "__main__":
    script(main, __doc__, Options)
