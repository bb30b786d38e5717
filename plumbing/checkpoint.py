"""Checkpoints of the stages: written so that a kill, a full disk or a second run in the same
folder spoils nothing, and read only with the settings, the data and the code they belong to."""
import ast
import contextlib
import dataclasses
import errno
import functools
import hashlib
import json
import math
import os
import shlex
import subprocess
import sys
from pathlib import Path

import torch

from config import PRESETS, STAGES, Config, folder
from model import GPT
from plumbing.processes import RANK, device_of
from plumbing.settings import UserError, settings_of

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None
    import msvcrt

# What the checkpoint of another run must share beside the words and the data, or its tokens would
# mean something else
MEANING = ("n_layer", "n_head", "d_model", "trace", "wording", "n_candidates")


# --- Files ------------------------------------------------------------------------------------

def save_atomically(path, write):
    """Calls write(temporary path), then moves that file to path: a reader sees the old file or
    the new one, never a part. Of several processes only the first writes."""
    if RANK:
        return
    temporary = f"{path}.{os.getpid()}.part"
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        write(temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        raise UserError(f"cannot write {path} ({str(error).splitlines()[0]}): free some space or "
                        "choose another place")
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


@contextlib.contextmanager
def locked(path):
    """Keeps other runs out of the folder of a file. The lock ends with the process."""
    if RANK:  # the first process holds the lock
        yield
        return
    place = os.path.dirname(path) or "."
    try:
        os.makedirs(place, exist_ok=True)
        file = open(os.path.join(place, "lock"), "a")
    except OSError as error:
        raise UserError(f"cannot write to {place} ({error.strerror}): choose another --run_dir")
    with file:
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            else:
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):  # another process holds it
                raise UserError(f"another run is writing to {place}: let it finish, or choose "
                                "another --run_dir")
            raise UserError(f"cannot lock {file.name}: {error.strerror}")
        yield


def open_log(path, first):
    """Opens a log that has a line for each step, to append lines from step `first` on.

    A run that was killed may have logged steps that it did not save. They are done again, so
    their lines are removed, and so are the files that it was writing."""
    if RANK:
        return open(os.devnull, "a")
    for left in Path(path).parent.glob("*.part"):
        left.unlink()
    kept = []
    if os.path.exists(path):
        lines = Path(path).read_text().splitlines(keepends=True)
        whole = [line for line in lines if line.endswith("}\n")]
        kept = [line for line in whole if json.loads(line)["step"] < first]
    save_atomically(path, lambda temporary: Path(temporary).write_text("".join(kept)))
    return open(path, "a")


def checksum(*content):
    """Returns a text that differs for different tensors, plain values, lists and dicts."""
    out = hashlib.sha256()

    def add(x):
        if isinstance(x, torch.Tensor):
            out.update(repr((x.dtype, x.shape)).encode())
            out.update(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        elif isinstance(x, dict):
            add(list(x.items()))
        elif isinstance(x, (list, tuple)):
            out.update(repr((type(x).__name__, len(x))).encode())
            for part in x:
                add(part)
        else:
            out.update(repr(x).encode())

    add(content)
    return out.hexdigest()


def save_tensors(path, saved):
    """Writes a dict of tensors and plain values, with a checksum."""
    content = {**saved, "checksum": checksum(saved)}
    save_atomically(path, lambda temporary: torch.save(content, temporary))


def load_tensors(path):
    """Returns what save_tensors wrote, on the CPU. Runs no code that a file may contain.

    Raises UserError if the file is damaged or not ours."""
    with open(path, "rb") as file:
        try:
            saved = torch.load(file, map_location="cpu", weights_only=True)
            if saved.pop("checksum") == checksum(saved):
                if saved.get("finished"):
                    world = saved["settings"]["world"]
                    code = code_needed(saved["stage"], world, saved["code"])
                    TRAINED_BY.setdefault(saved["stage"], set()).add(short(code))
                return saved
            why = "its checksum differs"
        except Exception as error:  # torch raises many kinds for a file that is cut short
            why = type(error).__name__
    raise UserError(f"{path} is damaged, or no file of this version of the project ({why}): delete "
                    "it and run the script that writes it again")


# --- Models -----------------------------------------------------------------------------------

def new_model(cfg, world):
    """Returns a model with random weights. Raises UserError if texts are too long for it."""
    torch.manual_seed(cfg.seed)
    model = GPT(len(world.words), cfg.n_layer, cfg.n_head, cfg.d_model)
    check_fits(cfg, world, len(model.cos))
    return model.to(device_of(cfg))


def check_fits(cfg, world, n_positions):
    """Refuses texts that are longer than the positions of the model.

    A response is filled up to whole blocks. The teacher is checked with the student's blocks too,
    so that nobody trains a teacher that cannot be converted."""
    prompt = max(split.prompt.shape[1] for split in (world.train, world.val, world.test))
    for longest in world.longest[cfg.trace]:
        block_size = min(cfg.block_size, longest)
        response = math.ceil(longest / block_size) * block_size
        if prompt + response > n_positions:
            raise UserError(f"a prompt of {prompt} tokens and a response of {response}, in blocks "
                            f"of {block_size}, are more than the {n_positions} positions of "
                            "the model: choose a smaller --block_size or --n_candidates")
        prompt = response  # a trace is read again, to write the answer


# --- Finding the checkpoint of a stage --------------------------------------------------------

def own_path(cfg, stage):
    """Returns the path where this run saves a stage."""
    return folder(cfg, f"seed{cfg.seed}", stage, "checkpoint.pt")


def log_path(cfg, stage):
    """Returns the path of a stage's log, beside its checkpoint."""
    return os.path.join(os.path.dirname(own_path(cfg, stage)), "metrics.jsonl")


def finished(cfg, stage):
    """Returns the checkpoint of a stage that has finished, with its path, or None.

    This run's own comes first, then that of --from: the folder of a run or of a stage."""
    paths = [own_path(cfg, stage)]
    # The students of --from do not descend from a student that this run has trained itself.
    students = STAGES[1:STAGES.index(stage) + 1]
    if cfg.from_ and not any(os.path.exists(own_path(cfg, student)) for student in students):
        paths.append(os.path.join(cfg.from_, stage, "checkpoint.pt"))
        paths.append(os.path.join(cfg.from_, "checkpoint.pt"))
    for path in filter(os.path.exists, paths):
        state = load_tensors(path)
        teaches = state.get("stage") == "rl" and state["settings"]["block_size"] == 1
        its_stage = "ar" if teaches and path != paths[0] else state.get("stage")
        if state.get("finished") and its_stage == stage:
            return {**state, "path": path}
    return None


def read_checkpoint(cfg, stage, world):
    """Returns the checkpoint of a stage that has finished, or None.

    Raises UserError if it is damaged, or of other settings or data."""
    state = finished(cfg, stage)
    if state:
        check_same(cfg, stage, world, state)
    return state


def check_same(cfg, stage, world, state):
    """Raises UserError if a checkpoint was made with other settings, words or data.

    Another run may have trained in another way, but its tokens must mean the same. Prints one
    line if the code has changed."""
    path = state["path"]
    own = path == own_path(cfg, stage)
    # A setting that is younger than the checkpoint had the value that is its default now.
    defaults = {field.name: field.default for field in dataclasses.fields(cfg)}
    there = {**defaults, **state.get("settings", {})}
    names = settings_of(cfg, stage) if own else MEANING
    differ = [f"{name}={there[name]} there, {getattr(cfg, name)} now"
              for name in sorted(names) if there[name] != getattr(cfg, name)]
    if (state.get("words"), state.get("world")) != (world.words, world.checksum):
        differ.append("the data has changed since")
    if differ:
        mend = "another --run_dir, or train it anew with --again true" if own else "another --from"
        raise UserError(f"{path} was made with other settings or data ({'; '.join(differ[:4])}): "
                        f"use the same, or {mend}")
    changed = changed_code(stage, cfg.world, state.get("code", {}))
    if changed:
        have = "has" if len(changed) == 1 else "have"
        names = ", ".join(changed[:6] + ["..."] * (len(changed) > 6))
        tell_once(f"{path} was trained by other code ({names} {have} changed since): --again true "
                  "trains it anew")


# --- The code that made a checkpoint ----------------------------------------------------------

def without_comments(text):
    """Returns the text of a Python file without comments, docstrings and what it imports from
    plumbing/, which is no part of the lesson."""
    tree = ast.parse(text)
    tree.body = [node for node in tree.body
                 if not (getattr(node, "module", None) or "").startswith("plumbing.")]
    for node in ast.walk(tree):
        may_have_one = isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef))
        if may_have_one and ast.get_docstring(node):
            node.body[0] = ast.Pass()
    return ast.unparse(tree)


def code_of(*patterns):
    """Returns {file: short checksum} of the files that match, such as "toy/*.py"."""
    root = Path(__file__).parents[1]
    found = {}
    for path in [path for pattern in patterns for path in sorted(root.glob(pattern))]:
        code = without_comments(path.read_text("utf-8"))
        found[path.relative_to(root).as_posix()] = hashlib.sha256(code.encode()).hexdigest()[:12]
    return found


def commit_of(*patterns):
    """Returns the commit of the files that match, with a "+" if it has others; "unknown" without
    git or outside a clone."""
    def git(*words):
        words = ["git", "--git-dir=.git", "--glob-pathspecs", *words]
        root = Path(__file__).parents[1]
        return subprocess.run(words, cwd=root, capture_output=True, text=True, check=True).stdout
    try:
        changed = git("status", "--porcelain", "--", *patterns)
        return git("rev-parse", "--short=12", "HEAD").strip() + "+" * bool(changed)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


# The code that what a stage learns may depend on, as the program starts: it does not see what is
# edited while it runs.
LESSON = ("*.py", "toy/*.py", "ours/*.py", "beauty/*.py")
CODE, COMMIT = code_of(*LESSON), commit_of(*LESSON)
TRAINED_BY = {}  # {stage: {code}} of the finished checkpoints that were read so far, see made_by


def short(code):
    """Returns 12 digits for {file: short checksum}."""
    return checksum(code)[:12]


def code_needed(stage, world, code):
    """Returns the part of {file: short checksum} that the weights of a stage may depend on. world:
    the setting of that name."""
    later = STAGES[STAGES.index(stage) + 1:]
    unused = {f"train_{name}.py" for name in later}
    unused |= {"evaluate.py", "config.py", "ours/lossless.py"}  # settings are compared themselves
    if not world.startswith("beauty"):
        unused |= {name for name in code if name.startswith("beauty/")}
    return {name: there for name, there in code.items() if name not in unused}


def changed_code(stage, world, there):
    """Returns the names of the files that have changed since a checkpoint of a stage was made."""
    here, there = code_needed(stage, world, CODE), code_needed(stage, world, there)
    return sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))


def made_by(cfg):
    """Returns what a results file says about its making: the code that evaluated, the code that
    trained each stage, the settings that are not the preset's, the command."""
    preset = Config(**{"config": cfg.config, **PRESETS[cfg.config]})
    settings = {k: v for k, v in vars(cfg).items() if v != getattr(preset, k)}
    command = shlex.join(["python", *sys.orig_argv[1:]])
    return {"commit": COMMIT, "code": short(CODE),
            "weights": {stage: sorted(codes) for stage, codes in TRAINED_BY.items()},
            "config": cfg.config, "settings": settings,
            "command": command.replace(f"{Path(__file__).parents[1]}{os.sep}", "")}


@functools.cache
def tell_once(line):
    """Prints a line to stderr, but no second time."""
    if RANK == 0:
        print(line, file=sys.stderr)


# --- Using checkpoints ------------------------------------------------------------------------

def load_weights(state, model):
    """Puts the weights of a checkpoint into a model."""
    try:
        model.load_state_dict(state["model"])
    except RuntimeError:
        raise UserError(f"{state['path']} has the weights of another version of model.py: train "
                        "it anew with --again true")


def load_stage(cfg, stage, world, state=None):
    """Returns (model, checkpoint) of a stage, read from disk unless its checkpoint is given.

    Raises UserError if the stage has not finished."""
    state = state or read_checkpoint(cfg, stage, world)
    if state is None:
        raise UserError(f"no finished checkpoint {own_path(cfg, stage)}: first run `python "
                        f"train_{stage}.py --config {cfg.config}` with the same settings, or name "
                        "a run that has it with --from")
    model = new_model(cfg, world)
    load_weights(state, model)
    return model.eval(), state


def start_from(cfg, world, stage):
    """Returns the model that a stage begins with: random weights for the teacher, else those of
    the latest stage before it that has finished. So OPD may be left out."""
    if stage == "ar":
        return new_model(cfg, world)
    earlier = STAGES[:STAGES.index(stage)]
    if stage != "cft" and cfg.block_size > 1:
        earlier = earlier[1:]  # only CFT makes a student of a teacher
    for before in reversed(earlier):
        state = read_checkpoint(cfg, before, world)
        if state:
            break
    model, state = load_stage(cfg, before, world, state)
    if RANK == 0:
        print(f"{stage}: begins with the weights of {state['path']}", flush=True)
    return model


def finished_stages(cfg, world):
    """Returns {stage: (model, checkpoint)} of all stages that have finished.

    Raises UserError without a finished teacher."""
    found = {}
    for stage in STAGES:
        state = read_checkpoint(cfg, stage, world)
        if state or stage == "ar":
            found[stage] = load_stage(cfg, stage, world, state)
    return found


def last_student(cfg, world):
    """Returns (stage, model) of the last stage after AR that has finished."""
    for stage in reversed(STAGES[1:]):
        state = read_checkpoint(cfg, stage, world)
        if state or stage == "cft":
            return stage, load_stage(cfg, stage, world, state)[0]


# --- A run in the middle of a stage (trainer.Run) ---------------------------------------------

def resume(cfg, stage, model, optimizers, world, began_with):
    """Goes on from this run's checkpoint of a stage, if there is one: loads model and optimizers.

    Returns (first step to do, seconds so far, whether the stage has finished). began_with is the
    checksum of the weights that the stage begins with."""
    path = own_path(cfg, stage)
    if cfg.again or not os.path.exists(path):
        return 0, 0.0, False
    state = {**load_tensors(path), "path": path}
    check_same(cfg, stage, world, state)
    if state["start"] != began_with:
        raise UserError(f"{path} was begun from other weights (--from or the stage before has "
                        "changed): use the same, or train it anew with --again true")
    load_weights(state, model)
    if state["finished"]:
        return state["step"], state["seconds"], True
    try:
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
    except (KeyError, ValueError):
        raise UserError(f"{path} has the optimizers of another version of trainer.py: train it "
                        "anew with --again true")
    return state["step"], state["seconds"], False


def save_run(run, done):
    """Writes the checkpoint of a trainer.Run that has done so many steps."""
    save_tensors(run.path, {
        "stage": run.stage, "settings": settings_of(run.cfg, run.stage), "code": CODE,
        "world": run.world.checksum, "words": run.world.words, "start": run.began_with,
        "model": run.model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in run.optimizers],
        "step": done, "finished": done == run.n_steps, "seconds": run.seconds})
