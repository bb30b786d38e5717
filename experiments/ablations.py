"""What each choice is worth: one run a line and seed, all from the same start, in one table.

    python experiments/ablations.py --config toy --ablate cft --seeds 0,1,2     # CFT's choices, from the AR teacher of this run
    python experiments/ablations.py --config toy --ablate opd --seeds 0,1,2     # OPD's choices, from the finished CFT student of this run
    python experiments/ablations.py --config toy --lines "as it is,half as long"  # some lines only

Every line is a command that a student would type; other options (--cft_steps, --opd_steps, ...) go through to it, and a stopped
table goes on where it was. A line's student is judged on the test users at thresholds around the operating point, and compared
with the others where it is fair: by the best that it reaches with as many forwards as the first line, and by the forwards that it
needs to be as good as AR. Writes ablations_<stage>.md into the run's folder.
"""
import dataclasses
import json
import os
import subprocess
import sys

import numpy as np

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from common import checkpoint_path, decode_split, load_stage, save_atomically, script  # noqa: E402
from config import PRESETS, Config, UserError, folder  # noqa: E402
from data import load_world  # noqa: E402
from evaluate import finished_seeds, score, stage_decoder  # noqa: E402

LINES = {
    "cft": {
        "as it is": {},
        "block size 4": dict(block_size=4),
        "block size 8": dict(block_size=8),
        "block size 32": dict(block_size=32),
        "masks: uniform t and weight 1/t": dict(cft_noise="uniform"),
        "masks: clipped t and weight 1/t": dict(cft_noise="clipped"),
        "answer weight 1": dict(answer_weight=1.0),
        "a price on labels that are taken": dict(cft_penalty=10.0),
        "half as long": dict(cft_steps=0.5),
        "the teacher's outputs": dict(cft_gold=False),
        "no misplaced labels": dict(cft_misplace=0.0),
        "plain threshold rule": dict(commit="threshold"),
        "factor rule": dict(commit="factor"),
    },
    "opd": {
        "CFT for the same FLOPs": dict(control=True),
        "as it is": {},
        "no anchor": dict(opd_anchor=0.0),
        "three times the rate": dict(opd_lr=6e-4),
        "forward KL": dict(opd_divergence="forward"),
        "reverse KL": dict(opd_divergence="reverse"),
        "tokens committed in the state": dict(opd_states="committed"),
        "the leftmost masked token": dict(opd_states="next"),
        "no extra answer states": dict(opd_answer_states=0),
        "softer teacher": dict(opd_temperature=2.0),
        "cut behind a wrong label": dict(opd_cut=True),
        "greedy roll-outs": dict(opd_rollout_temperature=0.0),
        "labels to the right not excluded": dict(opd_exclude=False),
        "greedy and not excluded: plain OPD": dict(opd_rollout_temperature=0.0, opd_exclude=False),
        "off-policy: teacher's text": dict(opd_source="teacher", cft_gold=False),
    },
}
THRESHOLDS, FACTORS = (0.3, 0.5, 0.7, 0.9, 0.98), (1.5, 1.0, 0.5, 0.25, 0.1, 0.03)
# Token-forwards of an update, a backward counting as two: OPD decodes (about 4 prompts' worth of tokens), reads the text with
# teacher and student, and takes a CFT step as anchor; measured in tokens this is 2.2 CFT steps.
OPD_COST = 2.2


def curve(cfg, world, stage):
    """[[forwards, valid, strict N@10]] of a finished student, a point a threshold, the fastest first."""
    model = load_stage(cfg, stage, world)[0]
    return [measured(cfg, world, model, stage, tau) for tau in thresholds(cfg)]


def measured(cfg, world, model, stage, tau):
    """[forwards, valid, strict N@10] of a model of a stage, averaged over the test users."""
    tokens, forwards = decode_split(cfg, world.test, stage_decoder(cfg, world, model, stage, tau), f"{stage} tau {tau}")
    got = score(world, world.test, tokens, forwards)
    return [float(got[name].mean()) for name in ("forwards", "valid", "strict ndcg@10")]


def forwards_needed(points, goal):
    """Forwards a response from which on a curve (points, 3) has 99 % valid answers and a strict N@10 of `goal`, linear between its
    points; nan if it has them nowhere."""
    need = np.array([0.99, goal])
    for before, here in zip([points[0], *points], points):
        if (here[1:] >= need).all():
            short, rise = need - before[1:], here[1:] - before[1:]
            part = (short[short > 0] / rise[short > 0]).max(initial=0.0)  # what is short before has risen here
            return before[0] + part * (here[0] - before[0])
    return float("nan")


def thresholds(cfg):
    """Points of the curve, the fastest first; for rules with a threshold the operating point is among them."""
    return FACTORS if cfg.commit == "factor" else sorted({*THRESHOLDS, cfg.tau})


def options_of(cfg, name):
    """The script and the options of a line."""
    options, stage = dict(LINES[cfg.ablate][name]), cfg.ablate
    if "cft_steps" in options:
        options["cft_steps"] = int(cfg.cft_steps * options["cft_steps"])
    if options.pop("control", False):
        stage, options = "cft", {"cft_steps": int(cfg.opd_steps * OPD_COST), "cft_lr": cfg.opd_lr}
    return stage, options


def overrides(cfg):
    """What the command line has changed in the preset and a stage that is run from here should know: {name: value}."""
    preset = Config(**{"config": cfg.config, **PRESETS[cfg.config]})
    return {k: v for k, v in dataclasses.asdict(cfg).items()
            if v != getattr(preset, k) and k not in ("config", "seed", "seeds", "run_dir", "teacher", "init", "ablate", "lines")}


def train(stage, settings):
    """Run the script of a stage with these settings {name: value} as options."""
    text = lambda v: str(v).lower() if isinstance(v, bool) else str(v)
    subprocess.run([sys.executable, os.path.join(ROOT, f"train_{stage}.py"), *(x for k, v in settings.items() for x in (f"--{k}", text(v)))], check=True)


def main(cfg):
    names = [name.strip() for name in cfg.lines.split(",")] if cfg.lines != "all" else list(LINES[cfg.ablate])
    if unknown := set(names) - LINES[cfg.ablate].keys():
        raise UserError(f"--lines: no line is called {', '.join(unknown)}; there are: {'; '.join(LINES[cfg.ablate])}")
    world, teacher = load_world(cfg), checkpoint_path(cfg, "ar")
    model, _ = load_stage(cfg, "ar", world)
    start = {"teacher": teacher}
    if cfg.ablate == "opd":
        load_stage(cfg, "cft", world)
        start["init"] = checkpoint_path(cfg, "cft")
    seeds = [0, 1, 2] if cfg.seeds == "all" else finished_seeds(cfg)
    goal = measured(cfg, world, model, "ar", None)[2] - 0.005  # what is missing has been said before anything is decoded
    found = {}
    for name in names:
        stage, options = options_of(cfg, name)
        place = "as it is" if "commit" in options else name  # a commit rule needs no training of its own: it is finished already
        run_dir = folder(cfg, "ablations", cfg.ablate, "".join(c if c.isalnum() else "_" for c in place))
        for seed in seeds:
            line = dataclasses.replace(cfg, **{**options, **start, "seed": seed, "run_dir": run_dir})
            path = os.path.join(os.path.dirname(checkpoint_path(line, stage)), f"curve_{line.commit}.json")
            if not os.path.exists(path):
                train(stage, {"config": cfg.config, **overrides(cfg), **options, **start, "seed": seed, "run_dir": run_dir})
                points = curve(line, world, stage)
                save_atomically(path, lambda p: open(p, "w").write(json.dumps(points)))
            found.setdefault(name, []).append(np.array(json.load(open(path))))
        save_atomically(folder(cfg, f"ablations_{cfg.ablate}.md"), lambda p: open(p, "w").write(table(cfg, found, goal)))
    print(table(cfg, found, goal))


def table(cfg, found, goal):
    """Each line at the operating point's threshold, and the best point of its curve with no more forwards than the first line takes
    there, 2 % allowed. (No interpolation: the forwards do not fall evenly with the threshold, and a curve may be vertical.)"""
    at = thresholds(cfg).index(cfg.tau)
    most = 1.02 * np.mean([points[at, 0] for points in next(iter(found.values()))])
    pm = lambda v, f, unit="": "–" if np.isnan(v).any() else f"{np.mean(v):{f}}" + (f" ± {np.std(v, ddof=1) / len(v) ** 0.5:{f}}" if len(v) > 1 else "") + unit
    lines = [f"{len(next(iter(found.values())))} seed(s) of {cfg.ablate.upper()} from one start, ± standard error over seeds. At threshold {cfg.tau}; then the "
             f"best on the curve with at most {most:.2f} forwards a response, and the forwards needed for 99 % valid answers and an N@10 of AR's "
             f"less .005 ({goal:.4f}). –: not reached, by a seed at least.", "",
             f"| | options | forwards | valid | N@10, strict | valid, ≤ {most:.2f} | N@10, ≤ {most:.2f} | needed |", "|---" * 8 + "|"]
    for name, curves in found.items():
        stage, options = options_of(cfg, name)
        options = " ".join(f"--{k} {str(v).lower() if isinstance(v, bool) else v}" for k, v in options.items())
        here = len(FACTORS) // 2 if LINES[cfg.ablate][name].get("commit") == "factor" else at  # that rule has another scale
        reached = lambda column: np.array([max(c[c[:, 0] <= most, column], default=np.nan) for c in curves])
        lines.append(f"| {name} | {f'`train_{stage}.py {options}`'.replace(' `', '`')} | {pm([c[here, 0] for c in curves], '.2f')} | "
                     f"{pm([100 * c[here, 1] for c in curves], '.2f', ' %')} | {pm([c[here, 2] for c in curves], '.4f')} | "
                     f"{pm(100 * reached(1), '.2f', ' %')} | {pm(reached(2), '.4f')} | {pm([forwards_needed(c, goal) for c in curves], '.2f')} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    script(main, __doc__)
