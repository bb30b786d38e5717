"""Does an unconditional format reward teach to copy the incoming order? RL from a weak and from the finished student.

    python experiments/hacking.py --config toy     # 8 runs of RL, about 8 minutes on 1 CPU core

Needs the AR teacher and the CFT student of the run. A weak student is made first, by a short CFT. Then RL goes on from each without the
anchor, the format bonus paid only for a target that rose, or always, with two values of alpha. RL's own log says how many sampled answers
are valid, and copy the incoming order; the greedy traces of the test users are read at the end. Writes hacking.md and hacking.png.
"""
import dataclasses
import json
import os
import sys

import numpy as np

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from ablations import overrides, train  # noqa: E402
from common import checkpoint_path, decode_split, load_stage, log_path, save_atomically, script  # noqa: E402
from config import folder  # noqa: E402
from data import load_world  # noqa: E402
from evaluate import score, stage_decoder  # noqa: E402

WEAK_STEPS, STEPS, ALPHAS = 150, 40, (0.1, 0.5)


def trained(cfg, stage, **options):
    """Run a stage with other settings, unless it has finished; returns them all."""
    train(stage, {"config": cfg.config, **overrides(cfg), "seed": cfg.seed, **options})
    return dataclasses.replace(cfg, **options)


def main(cfg):
    world, teacher = load_world(cfg), checkpoint_path(cfg, "ar")
    for stage in ("ar", "cft"):
        load_stage(cfg, stage, world)  # what is missing is said before anything is trained
    here = lambda name: folder(cfg, "hacking", name)
    weak = trained(cfg, "cft", teacher=teacher, run_dir=here("weak"), cft_steps=WEAK_STEPS, warmup=10)
    starts = {"weak": checkpoint_path(weak, "cft"), "finished": checkpoint_path(cfg, "cft")}
    logs, traces = {}, {}
    for start, init in starts.items():
        for conditional in (True, False):
            for alpha in ALPHAS:
                there = trained(cfg, "rl", teacher=teacher, init=init, run_dir=here(f"{start}_{conditional}_{alpha}"), rl_conditional=conditional,
                                rl_alpha=alpha, rl_anchor=0.0, rl_steps=STEPS)
                with open(log_path(there, "rl")) as file:
                    logs[start, conditional, alpha] = [json.loads(line) for line in file]
                decoder = stage_decoder(there, world, load_stage(there, "rl", world)[0], "rl", there.tau)
                traces[start, conditional, alpha] = score(world, world.test, *decode_split(there, world.test, decoder, "test users"))
    lines = ["| student | bonus | α | valid, first and last fifth | copied, first and last fifth | groups with a signal | nats a token, first and last fifth | faithful | trace tokens |",
             "|---" * 9 + "|"]
    for (start, conditional, alpha), log in logs.items():
        fifth, written = len(log) // 5, traces[start, conditional, alpha]
        ends = lambda name: [np.mean([line[name] for line in part if name in line]) for part in (log[:fifth], log[-fifth:])]
        two = lambda name, unit=100, f=".1f": " → ".join(f"{unit * v:{f}}" for v in ends(name)) + (" %" if unit == 100 else "")
        lines.append(f"| {start} | {'if the target rose' if conditional else 'always'} | {alpha} | {two('sampled_valid')} | {two('copied')} | "
                     f"{100 * np.mean([line['signal'] for line in log]):.0f} % | {two('sampled_nats', 1, '.3f')} | "
                     f"{100 * written['faithful'].mean():.1f} % | {written['trace_tokens'].mean():.1f} |")
    text = "\n".join(lines) + "\n"
    save_atomically(folder(cfg, "hacking.md"), lambda p: open(p, "w").write(text))
    figure(logs, folder(cfg, "hacking.png"))
    print(text)


def figure(logs, path):
    """Valid and copied answers against roll-outs, means over ten."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(1, 2, figsize=(10, 4))
    for ax, start in zip(axes, ("weak", "finished")):
        for (of, conditional, alpha), log in logs.items():
            if of == start:
                style = dict(color="#1f77b4" if conditional else "#d62728", ls="-" if alpha == ALPHAS[-1] else "--", lw=1.2)
                for name in ("sampled_valid", "copied"):
                    mean = [100 * np.mean([line[name] for line in log[max(0, i - 9):i + 1]]) for i in range(len(log))]
                    ax.plot(mean, **style, label=f"{'if it rose' if conditional else 'always'}, α = {alpha}" if name == "copied" else None)
        ax.set(xlabel="roll-outs", ylabel="% of the sampled answers", ylim=(-3, 103), title=f"from a {start} student")
        ax.text(0, 40, "valid", fontsize=9)
        ax.text(0, 7, "copied", fontsize=9)
        ax.legend(fontsize=8, loc=(0.62, 0.16))
    fig.tight_layout()
    fig.savefig(path, dpi=110, facecolor="white")


if __name__ == "__main__":
    script(main, __doc__)
