"""What each choice is worth: one run a line and seed, all from the same start, in one table.

    python experiments/ablations.py --config toy --ablate cft   # from the AR teacher of this run
    python experiments/ablations.py --config toy --ablate opd   # from its finished CFT student
    python experiments/ablations.py --config toy --lines "as it is,half as long"

Every line is a command that you could type: a stage script, or opd_variants.py. Other options
(--cft_steps, --opd_steps, ...) go through to it, and a stopped table goes on where it was. A
line's student is judged on the test users at thresholds around the operating point, and compared
where it is fair: by the best that it reaches with as many forwards as the first line, and by the
forwards that it needs to be as good as AR. Writes ablations_<ablate>.md into the run's folder.
"""
import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from plumbing.script import script  # noqa: E402  first: it sets how threads wait

import dataclasses  # noqa: E402
import json  # noqa: E402
import subprocess  # noqa: E402
from dataclasses import dataclass  # noqa: E402

import numpy as np  # noqa: E402

import opd_variants  # noqa: E402
from config import PRESETS, Config, folder  # noqa: E402
from evaluate import score, stage_decoder  # noqa: E402
from ours.bound import joined, write  # noqa: E402
from plumbing.checkpoint import checkpoint_path, load_stage  # noqa: E402
from plumbing.decoding import decode_split  # noqa: E402
from plumbing.settings import OneOf, Text, UserError, kinds  # noqa: E402
from report.options import finished_seeds  # noqa: E402
from report.rows import write_json, write_text  # noqa: E402
from rules import Factor  # noqa: E402
from sampler import block_decode  # noqa: E402
from trainer import load_world, rule_of  # noqa: E402


@dataclass(frozen=True)
class Options:
    ablate: OneOf("cft", "opd") = "cft"  # whose choices
    lines: Text() = "all"    # names with commas; others are held against the first
    seeds: Text() = "0,1,2"  # numbers with commas; all: those that have a checkpoint


# Options of the stage script or of opd_variants.py, and three that are read here: cft_steps as a
# share of the steps of the run; control: CFT for OPD's FLOPs; factor: another commit rule.
LINES = {
    "cft": {
        "as it is": {},
        "block size 4": dict(block_size=4),
        "block size 8": dict(block_size=8),
        "block size 32": dict(block_size=32),
        "answer weight 1": dict(answer_weight=1.0),
        "a price on labels that are taken": dict(cft_penalty=10.0),
        "half as long": dict(cft_steps=0.5),
        "the teacher's outputs": dict(cft_gold=False),
        "no misplaced labels": dict(cft_misplace=0.0),
        "plain threshold rule": dict(commit="threshold"),
        "factor rule": dict(factor=True),
    },
    "opd": {
        "CFT for the same FLOPs": dict(control=True),
        "as it is": {},
        "no anchor": dict(opd_anchor=0.0),
        "three times the rate": dict(opd_lr=6e-4),
        "forward KL": dict(opd_divergence="forward"),
        "reverse KL": dict(opd_divergence="reverse"),
        "tokens committed in the state": dict(states="committed"),
        "the leftmost masked token": dict(states="next"),
        "no extra answer states": dict(answer_states=0),
        "softer teacher": dict(teacher_temperature=2.0),
        "cut after a wrong label": dict(cut=True),
        "drawn roll-outs": dict(rollout_temperature=1.0),
        "labels to the right not excluded": dict(opd_exclude=False),
        "off-policy: teacher's text": dict(source="teacher", cft_gold=False),
    },
}
THRESHOLDS = (0.3, 0.5, 0.7, 0.9, 0.98)
FACTORS = (1.5, 1.0, 0.5, 0.25, 0.1, 0.03)
# FLOPs of an OPD step in CFT steps, in token-forwards, a backward counting as two: OPD decodes
# (about 4 prompts' worth of tokens), reads the text with teacher and student, and takes a CFT
# step as anchor.
OPD_COST = 2.2
OWN = ("config", "seed", "run_dir", "teacher", "init")  # settings that ablations give to a line


# --- A line: its command, its student ---------------------------------------------------------

def command_of(cfg, ablate, name):
    """The stage that a line trains, its script, and the script's options {name: value}."""
    options = dict(LINES[ablate][name])
    options.pop("factor", None)  # of decoding alone
    if options.pop("control", False):
        options = dict(cft_steps=int(cfg.opd_steps * OPD_COST), cft_lr=cfg.opd_lr)
        return "cft", "train_cft.py", options
    if "cft_steps" in options:
        options["cft_steps"] = int(cfg.cft_steps * options["cft_steps"])
    if kinds(opd_variants.Options).keys() & options.keys():
        return "opd", "experiments/opd_variants.py", options
    return ablate, f"train_{ablate}.py", options


def overrides(cfg):
    """What the command line has changed in the preset, for stages that are run from here."""
    preset = Config(**{"config": cfg.config, **PRESETS[cfg.config]})
    return {name: value for name, value in dataclasses.asdict(cfg).items()
            if value != getattr(preset, name) and name not in OWN}


def arguments(options):
    """Options {name: value} as a command line has them: [--name, value, ...]."""
    kind, out = kinds(Config, opd_variants.Options), []
    for name, value in options.items():
        out += [f"--{name}", kind[name].text(value)]
    return out


def train(path, options):
    """Runs a script, its path counted from the root, with options {name: value}."""
    command = [sys.executable, os.path.join(ROOT, path), *arguments(options)]
    done = subprocess.run(command)
    if done.returncode:
        raise UserError(f"{path} has stopped, see above: mend that, and type the same again")


def rules_of(cfg, factor):
    """The rules of a curve, the fastest first, and the number of the one at the operating point.
    (The factor rule has another scale: there it is one in the middle.)"""
    if factor:
        return [Factor(tau) for tau in FACTORS], len(FACTORS) // 2
    taus = sorted({*THRESHOLDS, cfg.tau})
    return [rule_of(cfg, tau) for tau in taus], taus.index(cfg.tau)


def measured(cfg, world, decoder, name):
    """[forwards, valid, strict N@10] of decoder(prompt, rows), averaged over the test users."""
    tokens, forwards = decode_split(cfg, world.test, decoder, name)
    got = score(world, world.test, tokens, forwards)
    return [float(got[key].mean()) for key in ("forwards", "valid", "strict ndcg@10")]


def curve(cfg, world, stage, factor):
    """[[forwards, valid, strict N@10]] of a finished student, a point a rule."""
    model, _ = load_stage(cfg, stage, world)
    points = []
    for rule in rules_of(cfg, factor)[0]:
        def of_request(own, prompt, max_len, _):
            return block_decode(model, prompt, max_len, own.block_size, rule)

        def decoder(prompt, rows):
            decoded = joined(write(cfg, of_request, prompt, world.max_response))
            return decoded.tokens, decoded.forwards
        points.append(measured(cfg, world, decoder, f"tau {rule.tau}"))
    return points


def line_curve(cfg, world, ablate, name, start):
    """Trains the student of a line for cfg.seed, unless it is there -> its curve (points, 3)."""
    stage, path, options = command_of(cfg, ablate, name)
    factor = "factor" in LINES[ablate][name]
    # A commit rule needs no training of its own: its student is that of "as it is".
    place = "as it is" if factor or "commit" in options else name
    place = "".join(c if c.isalnum() else "_" for c in place)
    own = {**start, "seed": cfg.seed, "run_dir": folder(cfg, "ablations", ablate, place)}
    settings = {name: value for name, value in options.items() if name in kinds(Config)}
    line = dataclasses.replace(cfg, **settings, **own)
    rule = "factor" if factor else line.commit
    saved = os.path.join(os.path.dirname(checkpoint_path(line, stage)), f"curve_{rule}.json")
    if not os.path.exists(saved):
        train(path, {"config": cfg.config, **overrides(cfg), **options, **own})
        write_json(saved, curve(line, world, stage, factor))
    with open(saved) as file:
        return np.array(json.load(file))


# --- The table --------------------------------------------------------------------------------

def forwards_needed(points, goal):
    """Forwards a response from which on a curve (points, 3) has 99 % valid answers and a strict
    N@10 of `goal`, linear between its points; nan if it has them nowhere."""
    need = np.array([0.99, goal])
    for before, here in zip([points[0], *points], points):
        if (here[1:] >= need).all():
            short, rise = need - before[1:], here[1:] - before[1:]
            missing = short > 0  # what is missing before has risen here
            part = (short[missing] / rise[missing]).max(initial=0.0)
            return before[0] + part * (here[0] - before[0])
    return float("nan")


def best_within(points, most, column):
    """The best value of a column of a curve (points, 3) with at most so many forwards, or nan.

    No interpolation: forwards do not fall evenly with the threshold; a curve may be vertical."""
    within = points[points[:, 0] <= most, column]
    return within.max() if len(within) else np.nan


def mean_se(values, form, unit=""):
    """A mean over seeds ± its standard error, as text; – if a seed has no value."""
    if np.isnan(values).any():
        return "–"
    text = f"{np.mean(values):{form}}"
    if len(values) > 1:
        text += f" ± {np.std(values, ddof=1) / len(values) ** 0.5:{form}}"
    return text + unit


def row(cfg, ablate, name, curves, most, goal):
    """A line of the table: curves, one a seed."""
    _, path, options = command_of(cfg, ablate, name)
    factor = "factor" in LINES[ablate][name]
    command = "in ablations.py" if factor else f"`{' '.join([path, *arguments(options)])}`"
    here = rules_of(cfg, factor)[1]
    at = np.array(curves)[:, here]                                # (seeds, 3)
    valid = [best_within(points, most, 1) for points in curves]
    ndcg = [best_within(points, most, 2) for points in curves]
    needed = [forwards_needed(points, goal) for points in curves]
    return [name, command, mean_se(at[:, 0], ".2f"), mean_se(100 * at[:, 1], ".2f", " %"),
            mean_se(at[:, 2], ".4f"), mean_se(100 * np.array(valid), ".2f", " %"),
            mean_se(ndcg, ".4f"), mean_se(needed, ".2f")]


def table(cfg, ablate, found, goal):
    """Markdown. found: {line: [curve of a seed]}, at least of the first line."""
    first = next(iter(found))
    factor = "factor" in LINES[ablate][first]
    at = rules_of(cfg, factor)[1]
    most = 1.02 * np.mean([points[at, 0] for points in found[first]])  # 2 % are allowed
    head = ["", "options", "forwards", "valid", "N@10, strict", f"valid, ≤ {most:.2f}",
            f"N@10, ≤ {most:.2f}", "needed"]
    rows = [row(cfg, ablate, name, curves, most, goal) for name, curves in found.items()]
    lines = [f"{len(found[first])} seed(s) of {ablate.upper()} from one start, ± standard error "
             f"over seeds. At threshold {cfg.tau}; then the best on the curve with at most "
             f"{most:.2f} forwards a response, and the forwards needed for 99 % valid answers and "
             f"an N@10 of AR's − .005 ({goal:.4f}). –: not reached, by a seed at least.", "",
             "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    lines += ["| " + " | ".join(cells) + " |" for cells in rows]
    return "\n".join(lines) + "\n"


# --- The run ----------------------------------------------------------------------------------

def chosen_lines(options):
    """The names of --lines. Raises UserError for one that there is not."""
    there = LINES[options.ablate]
    if options.lines == "all":
        return list(there)
    names = [name.strip() for name in options.lines.split(",")]
    unknown = [name for name in names if name not in there]
    if unknown:
        raise UserError(f"--lines: no line is called {', '.join(unknown)}; there are: "
                        f"{'; '.join(there)}")
    return names


def main(cfg, options):
    names, seeds = chosen_lines(options), finished_seeds(cfg, options.seeds)
    world, ablate = load_world(cfg), options.ablate
    # What is missing is said before anything is decoded or trained.
    teacher, _ = load_stage(cfg, "ar", world)
    start = {"teacher": checkpoint_path(cfg, "ar")}
    if ablate == "opd":
        load_stage(cfg, "cft", world)
        start["init"] = checkpoint_path(cfg, "cft")
    ar = stage_decoder(cfg, world, teacher, "ar", None)
    goal = measured(cfg, world, ar, "AR")[2] - 0.005
    found = {}
    for name in names:
        found[name] = [line_curve(dataclasses.replace(cfg, seed=seed), world, ablate, name, start)
                       for seed in seeds]
        text = table(cfg, ablate, found, goal)
        write_text(folder(cfg, f"ablations_{ablate}.md"), text)
    print(text)


if __name__ == "__main__":
    script(main, __doc__, also=Options)
