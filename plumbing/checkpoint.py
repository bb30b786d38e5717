"""Checkpoints that survive what may happen to a run: a kill at any moment, a full disk, a second
run in the same folder, settings or data that changed in between."""
import contextlib
import glob
import hashlib
import itertools
import json
import math
import os

import torch

from config import STAGES, folder
from fast.gpt import FastGPT
from model import GPT
from plumbing.arguments import settings_of
from plumbing.processes import RANK
from plumbing.settings import UserError

try:
    import fcntl
except ModuleNotFoundError:
    fcntl = None  # Windows: plumbing/script.py says that it is not supported

SHAPE = ("n_layer", "n_head", "d_model")  # what weights must share to be exchanged


def device_of(cfg):
    if cfg.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(cfg.device)


# --- Files ------------------------------------------------------------------------------------

def save_atomically(path, write):
    """write(temporary path), then moves the file into place: a reader sees the old file or the
    new one, never a part. Of several processes only the first writes."""
    if RANK:
        return
    temporary = f"{path}.{os.getpid()}.part"
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        write(temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        reason = str(error).splitlines()[0]
        raise UserError(f"cannot write {path} ({reason}): free some space or choose another "
                        "--run_dir")
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


@contextlib.contextmanager
def locked(path):
    """Holds the folder of a file against a second run. The lock dies with the process."""
    if RANK:  # the first process holds it
        yield
        return
    place = os.path.dirname(path) or "."
    try:
        os.makedirs(place, exist_ok=True)
        file = open(os.path.join(place, "lock"), "w")
    except OSError as error:
        raise UserError(f"cannot write to {place} ({error.strerror}): choose another --run_dir")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"another run is writing to {place}: let it finish, or choose another "
                            "--run_dir")
        yield


def open_log(path, first):
    """A log with a line a step, open for more lines.

    A run that was killed has logged more steps than it saved: lines from step `first` on are cut
    off, since those steps are done again. Its half-written files are removed."""
    if RANK:
        return open(os.devnull, "a")
    for left in glob.glob(os.path.join(glob.escape(os.path.dirname(path)), "*.part")):
        os.remove(left)
    lines = []
    if first and os.path.exists(path):
        with open(path) as f:
            whole = [line for line in f if line.endswith("}\n")]
        lines = [line for line in whole if json.loads(line)["step"] < first]

    def write(temporary):
        with open(temporary, "w") as f:
            f.writelines(lines)
    save_atomically(path, write)
    return open(path, "a")


def checksum(*content):
    """A text that differs for different content: tensors, plain values, lists and dicts of them."""
    out = hashlib.sha256()

    def add(x):
        if isinstance(x, torch.Tensor):
            out.update(repr((x.dtype, x.shape)).encode())
            out.update(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        elif isinstance(x, (dict, list, tuple)):
            out.update(repr((type(x).__name__, len(x))).encode())
            for part in itertools.chain(*x.items()) if isinstance(x, dict) else x:
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
    """What save_tensors wrote, on the CPU. Never runs code that a file may hold.

    Raises UserError if the file is damaged or not ours."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if saved.pop("checksum") == checksum(saved):
            return saved
        why = "its checksum differs"
    except Exception as error:  # torch raises many kinds for a file that is cut short or foreign
        why = type(error).__name__
    raise UserError(f"{path} is damaged or no file of this project ({why}): delete it and run the "
                    "script that writes it again")


# --- Models -----------------------------------------------------------------------------------

def new_model(cfg, world):
    """A model with random weights. Raises UserError if texts would not fit its positions."""
    torch.manual_seed(cfg.seed)
    kind = FastGPT if cfg.fast else GPT
    model = kind(len(world.words), cfg.n_layer, cfg.n_head, cfg.d_model)
    check_fits(cfg, world, len(model.cos))
    return model.to(device_of(cfg))


def check_fits(cfg, world, n_positions):
    """Refuses prompts and responses that are longer together than a model has positions.

    A response takes whole blocks. All stages are asked for the student's, so that nobody trains a
    teacher for a student that cannot be."""
    prompt = max(split.prompt.shape[1] for split in (world.train, world.val, world.test))
    response = math.ceil(world.max_response / cfg.block_size) * cfg.block_size
    if prompt + response > n_positions:
        raise UserError(f"a prompt of {prompt} tokens and a response of {response}, in blocks of "
                        f"{cfg.block_size}, are more than the {n_positions} positions of the "
                        "model: choose a smaller --block_size or --n_candidates")


def load_weights(path, state, model):
    """The model, with the weights of the checkpoint `state`, which was read from path."""
    try:
        model.load_state_dict(state["model"])
    except RuntimeError:
        raise UserError(f"{path} holds the weights of another version of model.py: delete it and "
                        "run the script of its stage again")
    return model


# --- Checkpoints of stages --------------------------------------------------------------------

def checkpoint_path(cfg, stage):
    if stage == "ar" and cfg.teacher:
        return cfg.teacher
    return folder(cfg, f"seed{cfg.seed}", stage, "checkpoint.pt")


def log_path(cfg, stage):
    """The log of a stage, beside its checkpoint: a line a step."""
    return os.path.join(os.path.dirname(checkpoint_path(cfg, stage)), "metrics.jsonl")


def read_checkpoint(cfg, stage, world):
    """The checkpoint of a stage as a dict, or None if there is none.

    Raises UserError if it is damaged, or of other settings or other data."""
    path = checkpoint_path(cfg, stage)
    if not os.path.exists(path):
        return None
    state = load_tensors(path)
    differ = differences(cfg, stage, world, state)
    if differ:
        raise UserError(f"{path} was made with other settings or data ({'; '.join(differ[:4])}): "
                        "use the same, or another --run_dir, or delete it")
    return state


def differences(cfg, stage, world, state):
    """What a checkpoint was made with that is different now, in words."""
    wanted, there = settings_of(cfg, stage), state.get("settings", {})
    if stage == "ar" and cfg.teacher:  # a borrowed teacher only has to fit
        wanted = {name: wanted[name] for name in SHAPE}
    differ = []
    for name, value in sorted(wanted.items()):
        if there.get(name) != value:
            differ.append(f"{name}={there.get(name)} there, {value} now")
    # After RL at block size 1 a teacher is still autoregressive.
    teaches = stage == "ar" and cfg.teacher and there.get("block_size") == 1
    if not (state.get("stage") == stage or teaches) or state.get("words") != world.words:
        differ.append("another stage or vocabulary")
    elif state.get("world") != world.checksum:
        differ.append("the data has changed since")
    return differ


def start_from(cfg, world, stage):
    """The model that a stage begins with: --init, or the stage before it, or random weights.

    stage: the stage before, None for the first."""
    if not cfg.init:
        return load_stage(cfg, stage, world)[0] if stage else new_model(cfg, world)
    if not os.path.exists(cfg.init):
        raise UserError(f"--init {cfg.init}: there is no such checkpoint")
    state = load_tensors(cfg.init)
    there = state.get("settings", {})
    same_shape = all(there.get(name) == getattr(cfg, name) for name in SHAPE)
    if "stage" not in state or state["words"] != world.words or not same_shape:
        raise UserError(f"--init {cfg.init} is of another vocabulary or model shape: use the "
                        "settings it was made with")
    return load_weights(cfg.init, state, new_model(cfg, world))


def load_stage(cfg, stage, world, state=None):
    """The finished model of a stage, and its checkpoint, read from disk unless it is given.

    Raises UserError if the stage has not finished."""
    state = state or read_checkpoint(cfg, stage, world)
    path = checkpoint_path(cfg, stage)
    if state is None or not state["finished"]:
        other = ", or name another with --teacher" if stage == "ar" else ""
        raise UserError(f"no finished checkpoint {path}: first run `python train_{stage}.py "
                        f"--config {cfg.config}` with the same settings{other}")
    return load_weights(path, state, new_model(cfg, world)).eval(), state


def finished_stages(cfg, world):
    """{stage: (model, checkpoint)} of the teacher and of every other stage that has finished.

    Raises UserError without a finished teacher."""
    found = {}
    for stage in STAGES:
        state = read_checkpoint(cfg, stage, world)
        if stage == "ar" or state and state["finished"]:
            found[stage] = load_stage(cfg, stage, world, state)
    return found


def last_student(cfg, world):
    """(stage, model) of the last stage after AR that has finished. Raises UserError if none has."""
    for stage in reversed(STAGES[1:]):
        state = read_checkpoint(cfg, stage, world)
        if state and state["finished"]:
            return stage, load_stage(cfg, stage, world, state)[0]
    raise UserError(f"no finished student under {folder(cfg)}: first run `python train_cft.py "
                    f"--config {cfg.config}` with the same settings")


# --- A run in the middle of a stage (trainer.Run) ---------------------------------------------

def resume(run):
    """Goes on from the checkpoint of a run's stage, if there is one: sets its first step, its
    seconds so far, and whether it has finished; loads model and optimisers.

    Raises UserError if that checkpoint was begun from other weights."""
    run.first, run.seconds, run.finished = 0, 0.0, False
    run.began_with = checksum(run.model.state_dict())
    state = read_checkpoint(run.cfg, run.stage, run.world)
    if state is None:
        return
    if state.get("start") != run.began_with:
        raise UserError(f"{run.path} was begun from other weights (--teacher, --init or the stage "
                        "before has changed): name those again, or use another --run_dir, or "
                        "delete it")
    run.first, run.seconds, run.finished = state["step"], state["seconds"], state["finished"]
    load_weights(run.path, state, run.model)
    if run.finished:
        return
    if "optimizers" not in state:
        raise UserError(f"{run.path} is of another version of trainer.py: delete it and train "
                        "again")
    for optimizer, saved in zip(run.optimizers, state["optimizers"]):
        optimizer.load_state_dict(saved)


def save_run(run, done):
    """Writes the checkpoint of a run that has done so many steps."""
    save_tensors(run.path, {
        "stage": run.stage, "settings": settings_of(run.cfg, run.stage),
        "world": run.world.checksum, "words": run.world.words, "start": run.began_with,
        "model": run.model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in run.optimizers],
        "step": done, "finished": done == run.n_steps, "seconds": run.seconds})
