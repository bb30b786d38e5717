"""The one tool for claims: students and their controls, on the same users, with intervals.

    python experiments/compare.py cft --seeds 0,1,2
    python experiments/compare.py few_300 --seeds 0 --students "CFT,OPD" --n_test 500

The first word names an entry of experiments/entries.py. The other options are the settings of
every script; they hold for all students, where the entry gives a student no value of its own.

Students that are missing are trained by the stage scripts, with commands that you could type.
Each seed has a teacher of its own. A student is decoded on the validation users at several tau.
One tau is chosen there, and at that one the test users are decoded.

    runs/compare/<stages>-<key>/     the weights, and what was decoded. The key is a checksum of all
                                     settings that the weights depend on
    results/compare/<entry>.md       tables of students, of claims and of the curve; .json, .png

A comparison that was stopped goes on. The tables have everything that has finished with the same
settings, whichever --seeds and --students were asked for. With other settings than the entry's
the files have a checksum of these in their names.
"""
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import contextlib
import dataclasses
import functools
import json
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
from evaluate import paired_interval, score
from experiments.entries import ENTRIES
from experiments.tables import draw_curves, markdown
from ours.wording import consistency
from plumbing.checkpoint import (CODE, changed_code, checksum, load_stage, load_tensors, own_path,
                                 save_atomically, save_tensors)
from plumbing.script import script
from plumbing.settings import Text, UserError, Whole, settings_of
from trainer import ar_writer, block_writer, decode_split, load_world

# Settings of the machine, and those that compare.py sets itself
MACHINE = ("run_dir", "threads", "device", "data_dir", "again", "from_", "seed")
OF_WORLD = ("world", "data_dir", "n_candidates", "vary_lists", "wording", "n_train", "n_val",
            "n_test")
SCORES = ("forwards", "valid", "strict ndcg@10", "faithful", "copied", "one wording")


@dataclass(frozen=True)
class Options:
    entry: Text() = ""              # the first word: a name in experiments/entries.py
    seeds: Text() = "0,1,2"         # numbers with commas
    students: Text() = "all"        # names with commas; those that they start from come along
    parallel: Whole(1, 64) = 1      # trainings at a time: two with one thread each do 1.3 times
    #   the steps of one with two threads
    into: Text() = "results/compare"  # the folder of the tables


# --- Students -----------------------------------------------------------------------------------

@dataclass(frozen=True)
class Job:
    """A student of one seed: its settings, and where it comes from."""
    name: str
    cfg: Config        # all settings; run_dir is the student's own
    stages: tuple      # that it trains
    start: "Job"       # that it goes on from, or None
    key: str           # checksum of all settings that the weights depend on

    @property
    def stage(self):
        """The stage whose weights are decoded."""
        return self.stages[-1] if self.stages else self.start.stage

    def begins_with(self, stage):
        """The checkpoint that a stage of this student begins with, a path, or None."""
        number = self.stages.index(stage)
        if number:
            return own_path(self.cfg, self.stages[number - 1])
        return own_path(self.start.cfg, self.start.stage) if self.start else None

    @functools.cached_property
    def finished(self):
        """Whether all of it is trained, from the weights that its start has now."""
        return ((self.start is None or self.start.finished)
                and all(has_finished(self, stage) for stage in self.stages))


def make_job(cfg, entry, name, seed):
    """The Job of a student: the settings of the command line, those of the students that it goes
    on from, and its own."""
    student = entry.students[name]
    start = make_job(cfg, entry, student.start, seed) if student.start else None
    own = dataclasses.replace(start.cfg if start else cfg, **student.settings, seed=seed)
    stage = student.stages[-1] if student.stages else start.stage
    values = settings_of(own, stage)
    del values["seed"]
    if student.stages[-1:] not in (("ar",), ("cft",)):
        values["commit"] = own.commit  # the rule of the roll-outs, or of the decoder
    key = checksum(student.stages, values, start.key if start else "")[:8]
    name_of_folder = f"{'_'.join(student.stages) or 'decode'}-{key}"
    own = dataclasses.replace(own, run_dir=os.path.join(cfg.run_dir, "compare", name_of_folder))
    if start:
        own = dataclasses.replace(own, from_=folder(own, f"seed{seed}", "from"))
    return Job(name, own, student.stages, start, key)


def has_finished(job, stage):
    """Whether a stage is trained, from the weights that it would begin with now."""
    path, before = own_path(job.cfg, stage), job.begins_with(stage)
    if job.cfg.again or not os.path.exists(path):
        return False
    state = load_tensors(path)
    return state["finished"] and (
        before is None or state["start"] == checksum(load_tensors(before)["model"]))


# --- Training -----------------------------------------------------------------------------------

def arguments(cfg):
    """What a command line says to get these settings: [--name, value, ...]."""
    preset = Config(**{"config": cfg.config, **PRESETS[cfg.config]})
    out = ["--config", cfg.config]
    for name, value in dataclasses.asdict(cfg).items():
        if value != getattr(preset, name):
            text = str(value).lower() if isinstance(value, bool) else str(value)
            out += [f"--{name.rstrip('_')}", text]
    return out


def gather(job):
    """Copies the stages that a student goes on from into a folder for its --from."""
    if not job.start:
        return
    there = {}
    earlier = job.start
    while earlier:
        for stage in reversed(earlier.stages):
            # RL at block size 1 makes a better teacher: it takes the place of AR.
            teaches = stage == "rl" and earlier.cfg.block_size == 1 and "cft" in job.stages
            there.setdefault("ar" if teaches else stage, own_path(earlier.cfg, stage))
        earlier = earlier.start
    for stage, path in there.items():
        copy = os.path.join(job.cfg.from_, stage, "checkpoint.pt")
        save_atomically(copy, functools.partial(shutil.copyfile, path))
    # Amazon Beauty takes a minute to prepare. Without a link it is prepared anew.
    world, ours = folder(job.start.cfg, "world.pt"), folder(job.cfg, "world.pt")
    with contextlib.suppress(OSError):
        os.link(world, ours)


def train_stage(job, stage):
    """Trains one stage of a student by its script. What the script prints goes into a file."""
    words = [f"train_{stage}.py", *arguments(job.cfg)]
    output = os.path.join(os.path.dirname(own_path(job.cfg, stage)), "output.txt")
    os.makedirs(os.path.dirname(output), exist_ok=True)
    print(f"seed {job.cfg.seed}, {job.name}: python {shlex.join(words)} > {output}", flush=True)
    with open(output, "w") as file:
        code = subprocess.run([sys.executable, str(ROOT / words[0]), *words[1:]],
                              stdout=file, stderr=subprocess.STDOUT).returncode
    if code:
        said = Path(output).read_text().split("\n")
        errors = [line for line in said if line.startswith("error: ")] or [f"see {output}"]
        raise UserError(f"train_{stage}.py of {job.name}, seed {job.cfg.seed}, ended with code "
                        f"{code}: {errors[-1].removeprefix('error: ')}")


def train(job, start):
    """Trains what a student lacks, after the one that it goes on from, a Future or None."""
    if start:
        start.result()
    gather(job)
    for stage in job.stages:
        if not has_finished(job, stage):
            train_stage(job, stage)


def train_missing(jobs, parallel):
    """Trains {(student, seed): Job}, so many at a time. Each comes after the one it goes on from,
    so whoever waits for another waits for one that has begun."""
    with ThreadPoolExecutor(parallel) as pool:
        futures = {}
        for (name, seed), job in jobs.items():
            start = futures.get((job.start.name, seed)) if job.start else None
            futures[name, seed] = pool.submit(train, job, start)
        try:
            for future in futures.values():
                future.result()
        except BaseException:  # also Ctrl-C, which the trainings get too
            pool.shutdown(cancel_futures=True)
            raise


# --- Decoding -----------------------------------------------------------------------------------

WORLDS = {}


def world_of(cfg):
    """The World of these settings, and a checksum of the users of its splits by name. A world is
    loaded once for all students that share it."""
    key = tuple(getattr(cfg, name) for name in OF_WORLD)
    if key not in WORLDS:
        world = load_world(cfg)
        users = {}
        for name in ("val", "test"):
            split = getattr(world, name)
            arrays = split.prompt, split.incoming, split.target
            users[name] = checksum([torch.from_numpy(array) for array in arrays])
        WORLDS[key] = world, users
    return WORLDS[key]


def decode(job, model, split, tau):
    """Scores (N,) of a student on a split, "val" or "test", at one tau: {name: array}."""
    world, _ = world_of(job.cfg)
    users = getattr(world, split)
    writer = ar_writer(model) if tau is None else block_writer(job.cfg, model, tau)
    written, forwards = decode_split(job.cfg, world, users, writer)
    tokens = joined(written)                                      # (N, R)
    scores = score(world, users, tokens, forwards)
    scores["copied"] = scores["identity"] * scores["valid"]
    if job.cfg.wording != "fixed":  # a trace with nothing to mix keeps to one wording
        kept = consistency(world, tokens, job.cfg.wording)
        scores["one wording"] = np.nan_to_num(kept, nan=1.0)
    return {name: scores[name] for name in SCORES if name in scores}


def decoded(job, model, weights, split, tau):
    """The same, from a file if there is one. Its name is a checksum of all that the scores depend
    on, so no other weights, settings, users or code can have written it."""
    world, users = world_of(job.cfg)
    unused = (*MACHINE, "n_train", "n_val", "n_test", "every", "tau")
    settings = {name: value for name, value in dataclasses.asdict(job.cfg).items()
                if name not in unused}
    code = {file: text for file, text in CODE.items() if not file.startswith("train_")}
    key = checksum(weights, settings, code, world.checksum, users[split], tau)
    path = folder(job.cfg, f"seed{job.cfg.seed}", "decoded", f"{key[:16]}.pt")
    if os.path.exists(path):
        try:
            return {name: array.numpy() for name, array in load_tensors(path).items()}
        except UserError as error:
            print(f"{error}; it is decoded anew", flush=True)
    print(f"seed {job.cfg.seed}, {job.name}: decodes {split} users at tau {tau}", flush=True)
    scores = decode(job, model, split, tau)
    save_tensors(path, {name: torch.from_numpy(array) for name, array in scores.items()})
    return scores


@dataclass
class Found:
    """What one student of one seed reaches."""
    job: Job
    curve: dict      # tau -> {score: mean over the validation users}
    tau: float       # where it operates; None: a token at a time
    test: dict       # score -> (N,) there, on the test users
    seconds: float   # of training, those of the students that it goes on from included
    changed: list    # names of the files of code that have changed since it was trained


def seconds_of(job):
    """Seconds that a student was trained for, with those that it goes on from."""
    own = sum(load_tensors(own_path(job.cfg, stage))["seconds"] for stage in job.stages)
    return own + (seconds_of(job.start) if job.start else 0.0)


def operating_tau(curve, tau, allowed):
    """The tau with the best N@10 on the validation users, among those with at most so many
    forwards, or the fastest; without a limit that of the settings. curve: see Found."""
    if allowed is None or len(curve) == 1:
        return tau if tau in curve else next(iter(curve))
    within = [at for at in curve if curve[at]["forwards"] <= allowed]
    if not within:
        return min(curve, key=lambda at: curve[at]["forwards"])
    return max(within, key=lambda at: curve[at]["strict ndcg@10"])


def measure(entry, job):
    """Decodes a student that has finished: Found."""
    world, _ = world_of(job.cfg)
    if not job.stages:
        gather(job)
    model, state = load_stage(job.cfg, job.stage, world)
    weights = checksum(state["model"])
    in_blocks = job.stage != "ar" and job.cfg.block_size > 1
    taus = sorted({*entry.taus, job.cfg.tau}) if in_blocks else [None]
    curve = {}
    for tau in taus:
        scores = decoded(job, model, weights, "val", tau)
        curve[tau] = {name: float(array.mean()) for name, array in scores.items()}
    tau = operating_tau(curve, job.cfg.tau, entry.forwards)
    test = decoded(job, model, weights, "test", tau)
    changed = changed_code(job.stage, state["code"])
    return Found(job, curve, tau, test, seconds_of(job), changed)


# --- Claims and results -------------------------------------------------------------------------

def compare(one, other):
    """A claim as the JSON has it: one and other are {seed: Found} of a student and its control."""
    seeds = sorted(one.keys() & other.keys())
    if not seeds:
        return None
    first, second = one[seeds[0]].job, other[seeds[0]].job
    if world_of(first.cfg)[1]["test"] != world_of(second.cfg)[1]["test"]:
        raise UserError(f"{first.name} and {second.name} rank for different users, so there is no "
                        "claim between them: give both the same n_candidates and kind of world")
    claim = {"student": first.name, "control": second.name, "seeds": seeds}
    for metric in ("strict ndcg@10", "valid"):
        difference = np.stack([one[seed].test[metric] - other[seed].test[metric]
                               for seed in seeds])                # (seeds, N)
        interval, n_differ = paired_interval(difference)
        claim[metric] = {"interval": interval, "users that differ": n_differ}
    return claim


def as_json(found):
    """A student as the JSON has it. found: {seed: Found}."""
    job = next(iter(found.values())).job
    settings = {name: value for name, value in dataclasses.asdict(job.cfg).items()
                if name not in MACHINE}
    of_seed = {}
    for seed, at in sorted(found.items()):
        means = {name: round(float(array.mean()), 5) for name, array in at.test.items()}
        curve = [{"tau": tau, **{name: round(value, 5) for name, value in means.items()}}
                 for tau, means in at.curve.items()]
        of_seed[str(seed)] = {
            "tau": at.tau, **means, "seconds": round(at.seconds), "changed code": at.changed,
            "curve": curve}
    return {"key": job.key, "folder": job.cfg.run_dir, "stages": job.stages,
            "start": job.start.name if job.start else "", "settings": settings, "seeds": of_seed}


def result_of(cfg, options, entry, found):
    """All that is written: a dict. found: {student: {seed: Found}}."""
    claims = [compare(found[student], found[control]) for student, control in entry.claims
              if student in found and control in found]
    users = next(iter(next(iter(found.values())).values())).test["valid"]
    changed = overrides(cfg, entry)
    seeds = sorted({seed for of_seed in found.values() for seed in of_seed})
    command = ["python", "experiments/compare.py", options.entry, *changed,
               "--seeds", ",".join(map(str, seeds))]
    return {
        "entry": options.entry, "question": entry.question, "command": shlex.join(command),
        "config": cfg.config, "settings": entry.settings, "forwards allowed": entry.forwards,
        "code": checksum(CODE)[:12], "users": len(users), "validation users": cfg.n_val,
        "students": {name: as_json(of_seed) for name, of_seed in found.items()},
        "claims": [claim for claim in claims if claim]}


def overrides(cfg, entry):
    """The options of the command line that change the entry: [--name, value, ...]."""
    base = Config(**{"config": cfg.config, **PRESETS[cfg.config], **entry.settings})
    same = {name: getattr(base, name) for name in MACHINE}
    words = arguments(dataclasses.replace(cfg, **same))
    of_entry = arguments(base)
    pairs = list(zip(words[::2], words[1::2]))
    kept = set(zip(of_entry[::2], of_entry[1::2]))
    if cfg.config != entry.config:
        kept.discard(("--config", cfg.config))
    return [word for pair in pairs if pair not in kept for word in pair]


def write(stem, result, found):
    """Writes the three files of a result. Refuses to leave out what is there already: another
    machine may have trained it."""
    path = f"{stem}.json"
    if os.path.exists(path):
        old = json.loads(Path(path).read_text())["students"]
        for name, there in old.items():
            now = result["students"].get(name, {"key": there["key"], "seeds": {}})
            lost = sorted(there["seeds"].keys() - now["seeds"].keys())
            if now["key"] == there["key"] and lost:
                raise UserError(f"{path} has {name} of seed {', '.join(lost)} with the same "
                                "settings, whose weights are not here: train them too, or write "
                                "elsewhere with --into")
    text = json.dumps(result, separators=(",", ":"), ensure_ascii=False)
    save_atomically(path, lambda to: Path(to).write_text(text + "\n", "utf-8"))
    save_atomically(f"{stem}.md", lambda to: Path(to).write_text(markdown(result), "utf-8"))
    save_atomically(f"{stem}.png", lambda to: draw_curves(result, to))


# --- The run ------------------------------------------------------------------------------------

def numbers(seeds):
    """The seeds of a text such as 0,1,2: a list."""
    try:
        return sorted({int(seed) for seed in seeds.split(",")})
    except ValueError:
        raise UserError(f"--seeds must be whole numbers with commas between them, not '{seeds}'")


def with_starts(entry, names):
    """Names of students, with those that they go on from, in the entry's order."""
    if names == "all":
        return list(entry.students)
    wanted = {name.strip() for name in names.split(",")}
    unknown = wanted - entry.students.keys()
    if unknown:
        raise UserError(f"--students: there is no {', '.join(sorted(unknown))}; there are: "
                        f"{', '.join(entry.students)}")
    for name in reversed(entry.students):
        if name in wanted and entry.students[name].start:
            wanted.add(entry.students[name].start)
    return [name for name in entry.students if name in wanted]
