"""Does an unconditional format reward teach to copy the incoming order? RL from two students.

    python experiments/hacking.py --config toy     # 8 runs of RL, about 8 minutes on 1 CPU core

Needs the AR teacher and the CFT student of the run. A weak student is made first, by a short CFT.
Then RL goes on from each without the anchor, the format bonus paid only for a target that rose, or
always, with two values of alpha. RL's own log says how many sampled answers are valid, and copy
the incoming order; the greedy traces of the test users are read at the end. Writes hacking.md and
hacking.png.
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from plumbing.script import script  # noqa: E402  first: it sets how threads wait

import dataclasses  # noqa: E402
import itertools  # noqa: E402
import json  # noqa: E402

import numpy as np  # noqa: E402

from ablations import overrides, train  # noqa: E402
from config import folder  # noqa: E402
from evaluate import score, stage_decoder  # noqa: E402
from plumbing.checkpoint import (checkpoint_path, load_stage, log_path,  # noqa: E402
                                 save_atomically)
from plumbing.decoding import decode_split  # noqa: E402
from report.rows import write_text  # noqa: E402
from trainer import load_world  # noqa: E402

WEAK_STEPS, STEPS, ALPHAS = 150, 40, (0.1, 0.5)
HEAD = ["student", "bonus", "α", "valid, first and last fifth", "copied, first and last fifth",
        "groups with a signal", "nats a token, first and last fifth", "faithful", "trace tokens"]


def trained(cfg, stage, **options):
    """Runs a stage with other settings, unless it has finished; returns them all."""
    train(f"train_{stage}.py",
          {"config": cfg.config, **overrides(cfg), "seed": cfg.seed, **options})
    return dataclasses.replace(cfg, **options)


def read_log(cfg, stage):
    with open(log_path(cfg, stage)) as file:
        return [json.loads(line) for line in file]


def traces(cfg, world):
    """Scores of the RL student's greedy answers to the test users: {name: (N,)}."""
    model, _ = load_stage(cfg, "rl", world)
    decoder = stage_decoder(cfg, world, model, "rl", cfg.tau)
    tokens, forwards = decode_split(cfg, world.test, decoder, "test users")
    return score(world, world.test, tokens, forwards)


def ends(log, name):
    """The mean of a figure over the first and over the last fifth of a log; nan if it has none
    there (a roll-out without a signal has no update)."""
    fifth, means = len(log) // 5, []
    for part in (log[:fifth], log[-fifth:]):
        values = [line[name] for line in part if name in line]
        means.append(np.mean(values) if values else np.nan)
    return means


def row(run, log, written):
    start, conditional, alpha = run
    valid, copied = ([f"{100 * value:.1f} %" for value in ends(log, name)]
                     for name in ("sampled_valid", "copied"))
    nats = [f"{value:.3f}" for value in ends(log, "sampled_nats")]
    signal = np.mean([line["signal"] for line in log])
    return [start, "if the target rose" if conditional else "always", str(alpha),
            " → ".join(valid), " → ".join(copied), f"{100 * signal:.0f} %", " → ".join(nats),
            f"{100 * written['faithful'].mean():.1f} %", f"{written['trace_tokens'].mean():.1f}"]


def main(cfg):
    world, teacher = load_world(cfg), checkpoint_path(cfg, "ar")
    for stage in ("ar", "cft"):
        load_stage(cfg, stage, world)  # what is missing is said before anything is trained

    def place(name):
        return folder(cfg, "hacking", name)

    weak = trained(cfg, "cft", teacher=teacher, run_dir=place("weak"), cft_steps=WEAK_STEPS,
                   warmup=10)
    starts = {"weak": checkpoint_path(weak, "cft"), "finished": checkpoint_path(cfg, "cft")}
    logs, rows = {}, []
    for run in itertools.product(starts, (True, False), ALPHAS):
        start, conditional, alpha = run
        there = trained(cfg, "rl", teacher=teacher, init=starts[start],
                        run_dir=place(f"{start}_{conditional}_{alpha}"),
                        rl_conditional=conditional, rl_alpha=alpha, rl_anchor=0.0, rl_steps=STEPS)
        logs[run] = read_log(there, "rl")
        rows.append(row(run, logs[run], traces(there, world)))
    lines = [HEAD, ["---"] * len(HEAD), *rows]
    text = "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
    write_text(folder(cfg, "hacking.md"), text)
    save_atomically(folder(cfg, "hacking.png"), lambda path: figure(logs, path))
    print(text)


def moving_mean(log, name, n=10):
    values = [line[name] for line in log]
    return [100 * np.mean(values[max(0, i + 1 - n):i + 1]) for i in range(len(values))]


def figure(logs, path):
    """Valid and copied answers against roll-outs, means over ten."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(1, 2, figsize=(10, 4))
    for ax, start in zip(axes, ("weak", "finished")):
        for (of, conditional, alpha), log in logs.items():
            if of != start:
                continue
            colour = "#1f77b4" if conditional else "#d62728"
            style = dict(color=colour, ls="-" if alpha == ALPHAS[-1] else "--", lw=1.2)
            label = f"{'if it rose' if conditional else 'always'}, α = {alpha}"
            ax.plot(moving_mean(log, "sampled_valid"), **style)
            ax.plot(moving_mean(log, "copied"), **style, label=label)
        ax.set(xlabel="roll-outs", ylabel="% of the sampled answers", ylim=(-3, 103),
               title=f"from a {start} student")
        ax.text(0, 40, "valid", fontsize=9)
        ax.text(0, 7, "copied", fontsize=9)
        ax.legend(fontsize=8, loc=(0.62, 0.16))
    fig.tight_layout()
    fig.savefig(path, dpi=110, facecolor="white", format="png")
    plt.close(fig)


if __name__ == "__main__":
    script(main, __doc__)
