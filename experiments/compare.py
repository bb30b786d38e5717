"""The one tool for claims: students and their controls, on the same users, with intervals.

    python experiments/compare.py cft --seeds 0,1,2
    python experiments/compare.py few_300 --seeds 0 --students "CFT,OPD" --n_test 500

The first word names an entry of experiments/entries.py. The other options are the settings of
every script; they hold for all students that the entry gives no value of their own.

Students that are missing are trained by the stage scripts, with commands that you could type.
Each seed has a teacher of its own. A student is decoded on the validation users at several tau.
One tau is chosen there, and at that one the test users are decoded.

    runs/compare/<stages>-<key>/   the weights, and scores of what was decoded. The key is a
                                   checksum of all settings that the weights depend on
    runs/compare/<entry>.md        tables of the students, the claims and the curve; .json, .png

A comparison that was stopped goes on: what has finished with the same settings is used.
"""
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import contextlib
import dataclasses
import functools
import os
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from config import PRESETS, Config, folder
from data import joined
from entries import ENTRIES
from evaluate import paired_interval, score
from ours.wording import consistency
from plumbing.checkpoint import (CODE, checksum, code_of, load_stage, load_tensors, own_path,
                                 save_atomically, save_tensors)
from plumbing.script import script
from plumbing.settings import Text, UserError, Whole, settings_of
from report.table import chosen_seeds
from tables import write_result
from trainer import ar_decoder, block_decoder, decode_split, load_world

# Settings of the machine, and those that are set here for each student
NOT_COMPARED = ("run_dir", "threads", "device", "data_dir", "every", "again", "from_", "seed")
OF_WORLD = ("world", "data_dir", "n_candidates", "vary_lists", "wording", "n_train", "n_val",
            "n_test")
SCORES = ("forwards", "valid", "strict ndcg@10", "faithful", "copied", "one wording")


@dataclass(frozen=True)
class Options:
    entry: Text() = ""          # the first word: a name in experiments/entries.py
    seeds: Text() = "0,1,2"     # numbers with commas
    students: Text() = "all"    # names with commas; those that they go on from come along
    parallel: Whole(1, 64) = 1  # trainings at a time. On two cores two of them with --threads 1
    #   make 1.3 times as many steps as one with two threads


# --- Students -----------------------------------------------------------------------------------

@dataclass(frozen=True)
class Job:
    """A student of one seed, with all its settings."""
    name: str
    cfg: Config    # its run_dir is the student's own
    stages: tuple  # that it trains
    script: str    # that trains them, if it is not their own
    start: "Job"   # that it goes on from, or None
    key: str       # checksum of all settings that the weights depend on

    @property
    def paths(self):
        """The checkpoints of a student, from its teacher's on."""
        earlier = self.start.paths if self.start else []
        return [*earlier, *(own_path(self.cfg, stage) for stage in self.stages)]


def preset(name, **settings):
    return Config(**{"config": name, **PRESETS[name], **settings})


def changed(cfg, settings):
    """The settings cfg with others, {name: value}. A value "+500" is added to that of cfg."""
    values = {name: getattr(cfg, name) + int(value) if str(value).startswith("+") else value
              for name, value in settings.items()}
    return dataclasses.replace(cfg, **values)


def make_job(cfg, entry, name, seed):
    """The Job of a student. cfg: the settings of the command line."""
    student = entry.students[name]
    start = make_job(cfg, entry, student.start, seed) if student.start else None
    own = changed(start.cfg if start else cfg, {**student.settings, "seed": seed})
    stages = start.stages if start and not student.stages else student.stages
    values = settings_of(own, stages[-1])
    del values["seed"]
    if student.stages[-1:] not in (("ar",), ("cft",)):
        values["commit"] = own.commit  # the rule of the roll-outs, or of the decoder
    of_script = []
    if student.script:  # it may read any of the settings
        values = {name: value for name, value in vars(own).items() if name not in NOT_COMPARED}
        of_script = [code_of(student.script)]
    key = checksum(student.stages, values, start.key if start else "", *of_script)[:8]
    place = os.path.join(cfg.run_dir, "compare", f"{'_'.join(student.stages) or 'decode'}-{key}")
    own = dataclasses.replace(own, run_dir=place, from_="")
    if start:  # see gather
        own = dataclasses.replace(own, from_=folder(own, f"seed{seed}", "from"))
    return Job(name, own, student.stages, student.script, start, key)


def has_finished(job):
    """Whether all checkpoints of a student have finished, and each began with the weights that
    the one before has now."""
    weights = None
    for path in job.paths:
        state = load_tensors(path) if os.path.exists(path) else {"finished": False}
        if not state["finished"] or weights not in (None, state["start"]):
            return False
        weights = checksum(state["model"])
    return True


# --- Training -----------------------------------------------------------------------------------

def arguments(cfg, base):
    """What a command line says to change the settings base to cfg: [--name, value, ...]."""
    out = []
    for name, value in dataclasses.asdict(cfg).items():
        if value != getattr(base, name):
            text = str(value).lower() if isinstance(value, bool) else str(value)
            out += [f"--{name.rstrip('_')}", text]
    return out


def gather(job):
    """Copies all stages that a student goes on from into one folder, for its --from."""
    paths = job.start.paths if job.start else []
    stages = [Path(path).parent.name for path in paths]
    for number, (stage, path) in enumerate(zip(stages, paths)):
        if stage == "rl" and "cft" in [*stages[number:], *job.stages]:
            stage = "ar"  # RL before CFT: a better teacher
        copy = os.path.join(job.cfg.from_, stage, "checkpoint.pt")
        save_atomically(copy, functools.partial(shutil.copyfile, path))
    # Amazon Beauty takes a minute to prepare. Where this fails it is prepared anew.
    if paths:
        with contextlib.suppress(OSError):
            os.link(folder(job.start.cfg, "world.pt"), folder(job.cfg, "world.pt"))


def train_stage(job, stage):
    """Trains a stage by its script. What the script prints goes into a file."""
    cfg = job.cfg
    words = ["--config", cfg.config, *arguments(cfg, preset(cfg.config))]
    output = Path(own_path(cfg, stage)).with_name("output.txt")
    output.parent.mkdir(parents=True, exist_ok=True)
    program = job.script or f"train_{stage}.py"
    command = shlex.join(["python", program, *words])
    print(f"seed {cfg.seed}, {job.name}: {command} > {output}", flush=True)
    with open(output, "w") as file:
        done = subprocess.run([sys.executable, ROOT / program, *words],
                              stdout=file, stderr=subprocess.STDOUT)
    if done.returncode:
        lines = output.read_text().splitlines()
        error = [line for line in lines if line.startswith("error: ")] or [f"see {output}"]
        raise UserError(f"the training of {job.name}, seed {cfg.seed}, ended: "
                        f"{error[-1].removeprefix('error: ')}")


def train(job, start):
    """Trains what a student lacks. start: the Future of the one that it goes on from, or None."""
    if start:
        start.result()
    if not job.cfg.again and has_finished(job):
        return
    gather(job)
    for stage in job.stages:
        train_stage(job, stage)


def train_all(jobs, parallel):
    """Trains Jobs, so many at a time. Each comes after the one that it goes on from. So whoever
    waits for another waits for one that has begun."""
    with ThreadPoolExecutor(parallel) as pool:
        futures = {}
        for job in jobs:
            start = futures[job.start.name, job.cfg.seed] if job.start else None
            futures[job.name, job.cfg.seed] = pool.submit(train, job, start)
        try:
            for future in futures.values():
                future.result()
        except BaseException:  # Ctrl-C, too: the trainings have got it as well
            pool.shutdown(cancel_futures=True)
            raise


# --- Decoding -----------------------------------------------------------------------------------

WORLDS = {}  # students that differ in other settings share theirs


def world_of(cfg):
    key = tuple(getattr(cfg, name) for name in OF_WORLD)
    if key not in WORLDS:
        WORLDS[key] = load_world(cfg)
    return WORLDS[key]


def users_of(cfg, split):
    """A checksum of the users of a split, "val" or "test"."""
    users = getattr(world_of(cfg), split)
    arrays = users.prompt, users.incoming, users.target
    return checksum([torch.from_numpy(array) for array in arrays])


def decode(cfg, model, split, tau):
    """Scores of a model on all users of a split, at one tau: {name: (N,) array}. Without a tau
    it writes token by token."""
    world = world_of(cfg)
    users = getattr(world, split)
    writer = ar_decoder(model) if tau is None else block_decoder(cfg, model, tau)
    written, forwards = decode_split(cfg, world, users, writer)
    tokens = joined(written)                                      # (N, R)
    scores = score(world, users, tokens, forwards)
    scores["copied"] = scores["identity"] * scores["valid"]
    if cfg.wording != "fixed":  # a trace with nothing to mix has kept to one wording
        kept = consistency(world, tokens, cfg.wording)
        scores["one wording"] = np.nan_to_num(kept, nan=1.0)
    return {name: scores[name] for name in SCORES if name in scores}


def decoded(job, model, weights, split, tau):
    """The same, from a file if there is one. Its name is a checksum of all that scores depend on,
    so no other weights, settings, users or code can have written it."""
    cfg, unused = job.cfg, (*NOT_COMPARED, "n_val", "n_test", "tau")
    settings = {name: value for name, value in vars(cfg).items() if name not in unused}
    code = {file: text for file, text in CODE.items() if not file.startswith("train_")}
    key = checksum(weights, settings, code, world_of(cfg).checksum, users_of(cfg, split), tau)
    path = folder(cfg, f"seed{cfg.seed}", "decoded", f"{key[:16]}.pt")
    if os.path.exists(path):
        return {name: array.numpy() for name, array in load_tensors(path).items()}
    print(f"seed {cfg.seed}, {job.name}: {split} users at tau {tau}", flush=True)
    scores = decode(cfg, model, split, tau)
    save_tensors(path, {name: torch.from_numpy(array) for name, array in scores.items()})
    return scores


def operating_tau(curve, tau, allowed):
    """The tau of a curve, {tau: mean scores}, with the best N@10 on the validation users, among
    those with at most so many forwards; the fastest if there is none; without a limit `tau`."""
    if allowed is None or len(curve) == 1:
        return tau if tau in curve else None
    within = [at for at in curve if curve[at]["forwards"] <= allowed]
    if not within:
        return min(curve, key=lambda at: curve[at]["forwards"])
    return max(within, key=lambda at: curve[at]["strict ndcg@10"])


def measure(entry, job):
    """Decodes a student that has finished -> scores on the test users, {name: (N,) array}, and
    its line of the JSON."""
    cfg, stage = job.cfg, Path(job.paths[-1]).parent.name
    if not job.stages:
        gather(job)
    model, state = load_stage(cfg, stage, world_of(cfg))
    weights = checksum(state["model"])

    def mean_scores(scores):
        return {name: float(array.mean()) for name, array in scores.items()}
    in_blocks = stage != "ar" and cfg.block_size > 1
    taus = sorted({*entry.taus, cfg.tau}) if in_blocks else [None]
    curve = {tau: mean_scores(decoded(job, model, weights, "val", tau)) for tau in taus}
    tau = operating_tau(curve, cfg.tau, entry.forwards)
    test = decoded(job, model, weights, "test", tau)
    seconds = sum(load_tensors(path)["seconds"] for path in job.paths)
    return test, {"tau": tau, **mean_scores(test), "seconds": round(seconds),
                  "curve": [{"tau": at, **scores} for at, scores in curve.items()]}


# --- The comparison -----------------------------------------------------------------------------

def claim(student, control, one, other):
    """A claim, as the JSON has it. one, other: {seed: scores} of the test users."""
    seeds = sorted(one.keys() & other.keys())
    found = {"student": student, "control": control, "seeds": seeds}
    for metric in ("strict ndcg@10", "valid"):
        difference = np.stack([one[seed][metric] - other[seed][metric] for seed in seeds])
        interval, n_differ = paired_interval(difference)          # of (seeds, N)
        found[metric] = {"interval": interval, "users that differ": n_differ}
    return found


def claims_of(cfg, entry, tests):
    """All claims whose students have a seed in common. tests: {student: {seed: scores}}."""
    found = []
    for student, control in entry.claims:
        one, other = tests.get(student, {}), tests.get(control, {})
        if not one.keys() & other.keys():
            continue
        users = {users_of(make_job(cfg, entry, name, 0).cfg, "test") for name in (student, control)}
        if len(users) > 1:
            raise UserError(f"{student} and {control} rank for different users: give both the "
                            "same world and n_candidates, or make no claim of them")
        found.append(claim(student, control, one, other))
    return found


def with_starts(entry, names):
    """The names of students in a text, and of those that they go on from, in the entry's order."""
    if names == "all":
        return list(entry.students)
    wanted = {name.strip() for name in names.split(",")}
    unknown = ", ".join(sorted(wanted - entry.students.keys()))
    if unknown:
        raise UserError(f"--students: there is no {unknown}; there are: "
                        f"{', '.join(entry.students)}")
    for name in reversed(entry.students):
        if name in wanted:
            wanted.add(entry.students[name].start)
    return [name for name in entry.students if name in wanted]


def main(cfg, options):
    entry = ENTRIES.get(options.entry)
    if not entry:
        raise UserError(f"there is no entry {options.entry!r}: the first word must be one of "
                        f"{', '.join(ENTRIES)}")
    if cfg.from_ or cfg.seed:
        raise UserError("leave out --from and --seed: every student of an entry says whom it goes "
                        "on from, and --seeds names the seeds")
    names, seeds = with_starts(entry, options.students), chosen_seeds(cfg, options.seeds)
    jobs = [make_job(cfg, entry, name, seed) for name in names for seed in seeds]
    train_all(jobs, options.parallel)

    tests, students = {}, {}
    for job in jobs:
        test, line = measure(entry, job)
        differs = dict(entry.students[job.name].settings)
        if job.script:
            differs["script"] = job.script
        tests.setdefault(job.name, {})[job.cfg.seed] = test
        settings = {k: v for k, v in vars(job.cfg).items() if k not in NOT_COMPARED}
        student = students.setdefault(job.name, {
            "stages": job.stages, "start": entry.students[job.name].start,
            "differs": differs, "key": job.key,
            "folder": job.cfg.run_dir, "users": len(test["valid"]), "settings": settings,
            "seeds": {}})
        student["seeds"][str(job.cfg.seed)] = line
    write_result(cfg, options.entry, entry, students, claims_of(cfg, entry, tests))


def expanded(argv):
    """compare.py cft --seeds 0  ->  compare.py --entry cft, its settings, --seeds 0."""
    if len(argv) < 2 or argv[1].startswith("-"):
        return argv
    words = ["--entry", argv[1]]
    if argv[1] in ENTRIES:
        entry = ENTRIES[argv[1]]
        common = preset(entry.config, **entry.settings)
        words += ["--config", entry.config, *arguments(common, preset(entry.config))]
    return [argv[0], *words, *argv[2:]]


if __name__ == "__main__":
    sys.argv = expanded(sys.argv)
    script(main, __doc__, Options)
