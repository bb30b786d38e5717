"""What all stages repeat, written once: set-up, several processes, checkpoints, learning-rate schedule, log, progress bar."""
import contextlib
import ctypes
import fcntl
import glob
import hashlib
import itertools
import json
import math
import os
import sys
import time

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from config import STAGES, UserError, folder, parse_args, settings_of
from data import LABEL, parse_answers, tensors
from model import GPT
from sampler import block_decode


def script(main, doc):
    """Run main(cfg) of a stage script; what the user can mend is one sentence on stderr and exit code 2."""
    try:
        cfg = parse_args(doc)
        torch.set_num_threads(cfg.threads)
        keep_memory()
        if torch.cuda.is_available():
            torch.set_float32_matmul_precision("high")  # TF32: decoding is several times faster, and still float32 between products
        if RANKS > 1:
            if torch.cuda.is_available():
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            dist.init_process_group("nccl" if device_of(cfg).type == "cuda" else "gloo")
        main(cfg)
        if RANKS > 1:
            dist.destroy_process_group()
    except BrokenPipeError:  # who reads, `head` say, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (UserError, OSError) as error:  # OSError: what the disk says (full, gone, read-only)
        time.sleep(3 * (RANK > 0))  # what all processes find is said once: torchrun ends the others when the first has ended
        print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(2) if RANKS > 1 else sys.exit(2)  # an orderly exit might wait for the others


def keep_memory():
    """Tells glibc to keep freed memory: fresh pages, which the kernel fills with zeros, are 10 to 20 % of a CFT step of `small`."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)            # M_MMAP_MAX: no allocation is a mapping of its own
        libc.mallopt(-1, 2 ** 31 - 1)  # M_TRIM_THRESHOLD: nothing is given back


# --- Several processes, started by torchrun -------------------------------------------------------------------------------
# Every process draws the same whole batch and works on its rows of it; a loss is the sum over its rows, divided by the
# normaliser of the whole batch, so that the sum of the processes' gradients (Run.update) is the gradient of one process.

RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def mine(n):
    """The part of a batch of n rows that this process works on, a slice. UserError if the processes cannot share it evenly."""
    if n % RANKS:
        raise UserError(f"{RANKS} processes cannot share {n} rows evenly: choose --batch_size and --rl_prompts as multiples of {RANKS}")
    return slice(RANK * n // RANKS, (RANK + 1) * n // RANKS)


def total(x):
    """The sum of a tensor over all processes; no gradient passes."""
    x = x.detach().clone()
    if RANKS > 1:
        dist.all_reduce(x)
    return x


def gathered(x):
    """What each process has, in their order: a list."""
    out = [x] * RANKS
    if RANKS > 1:
        dist.all_gather_object(out, x)
    return out


def of_my_own(gen):
    """A generator that differs from process to process, for what they draw apart (roll-outs); with one process, gen itself."""
    return gen if RANKS == 1 else torch.Generator().manual_seed(gen.initial_seed() + 1 + RANK)


def device_of(cfg):
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if cfg.device == "auto" else cfg.device)


def generator(cfg, name, step):
    """A random generator that depends on (seed, name of the stage or use, step) and nothing else. It is the CPU's, so that a GPU
    sees the same batches and masks and is never waited for."""
    key = np.random.SeedSequence([cfg.seed, step, *name.encode()]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(key) % 2 ** 63)


def new_model(cfg, world):
    torch.manual_seed(cfg.seed)
    return GPT(len(world.words), cfg.n_layer, cfg.n_head, cfg.d_model).to(device_of(cfg))


def half(cfg, device):
    """Autocast to bfloat16 for training forwards, where settings and hardware allow. Weights, optimiser and sampling stay
    in float32. On CPUs with native bfloat16 products a step takes about 0.6 of the time."""
    native = device.type == "cuda" or (torch.backends.mkldnn.is_available() and torch.cpu._is_avx512_bf16_supported())
    return torch.autocast(device.type, torch.bfloat16, enabled=cfg.bfloat16 and native)


SHAPE = ("n_layer", "n_head", "d_model")  # what weights must have in common to be exchanged


# --- Checkpoints ---------------------------------------------------------------------------------------------------------

def save_atomically(path, write):
    """write(temporary path), then move it into place: a reader sees the old file or the new one, never a part. Of several
    processes the first alone writes."""
    if RANK:
        return
    os.makedirs(os.path.dirname(path), exist_ok=True)
    temporary = f"{path}.{os.getpid()}.part"
    try:
        write(temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        raise UserError(f"cannot write {path} ({str(error).splitlines()[0]}): free some space or choose another --run_dir")
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


@contextlib.contextmanager
def locked(folder):
    """Holds a folder, made if need be, against a second run (of several processes the first does); dies with the process."""
    if RANK:
        yield
        return
    try:
        os.makedirs(folder, exist_ok=True)
        file = open(os.path.join(folder, "lock"), "w")
    except OSError as error:
        raise UserError(f"cannot write to {folder} ({error.strerror}): choose another --run_dir")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"another run is writing to {folder}: let it finish, or choose another --run_dir")
        yield


def checksum(*content):
    """A text that is another one for other content: tensors, plain values, and lists and dicts of these."""
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
    """Write a dict of tensors and plain values, with a checksum."""
    save_atomically(path, lambda temporary: torch.save({**saved, "checksum": checksum(saved)}, temporary))


def load_tensors(path):
    """What save_tensors wrote, on the CPU; never runs code that a file may hold. UserError if the file is damaged or not ours."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if saved.pop("checksum") == checksum(saved):
            return saved
        why = "its checksum differs"
    except Exception as error:  # torch raises many kinds for a file that is cut short or not its own
        why = type(error).__name__
    raise UserError(f"{path} is damaged or no file of this project ({why}): delete it and run the script that writes it again")


def checkpoint_path(cfg, stage):
    if stage == "ar" and cfg.teacher:
        return cfg.teacher
    return folder(cfg, f"seed{cfg.seed}", stage, "checkpoint.pt")


def log_path(cfg, stage):
    """The log of a stage, beside its checkpoint: a line a step."""
    return os.path.join(os.path.dirname(checkpoint_path(cfg, stage)), "metrics.jsonl")


def read_checkpoint(cfg, stage, world):
    """The checkpoint of a stage as a dict, or None if there is none. UserError if it is damaged or of other settings."""
    path = checkpoint_path(cfg, stage)
    if not os.path.exists(path):
        return None
    state = load_tensors(path)
    borrowed = stage == "ar" and cfg.teacher  # it may come from a run with other settings, as long as it fits
    wanted = {k: v for k, v in settings_of(cfg, stage).items() if k in SHAPE or not borrowed}
    there = state.get("settings", {})
    differ = [f"{k}={there.get(k)} there, {v} now" for k, v in sorted(wanted.items()) if there.get(k) != v]
    if state.get("stage") != stage or state["words"] != world.words:
        differ.append("another stage or vocabulary")
    if differ:
        raise UserError(f"{path} was made with other settings ({'; '.join(differ[:4])}): use the same, or another --run_dir, or delete it")
    return state


def start_from(cfg, world, stage):
    """The model that a stage starts from: --init, or the finished stage before it, or, for the first (None), random weights."""
    if not cfg.init:
        return load_stage(cfg, stage, world)[0] if stage else new_model(cfg, world)
    if not os.path.exists(cfg.init):
        raise UserError(f"--init {cfg.init}: there is no such checkpoint")
    state = load_tensors(cfg.init)
    if "stage" not in state or state["words"] != world.words or any(state["settings"][k] != getattr(cfg, k) for k in SHAPE):
        raise UserError(f"--init {cfg.init} is of another vocabulary or model shape: use the settings it was made with")
    return load_weights(cfg.init, state, new_model(cfg, world))


def load_weights(path, state, model):
    """The model with the weights of the checkpoint in a file."""
    try:
        model.load_state_dict(state["model"])
    except RuntimeError:
        raise UserError(f"{path} holds the weights of another version of model.py: delete it and run the script of its stage again")
    return model


def load_stage(cfg, stage, world, state=None):
    """The finished model of a stage, in eval mode, and its checkpoint (read from disk unless it is given). UserError if the
    stage has not finished."""
    state = state or read_checkpoint(cfg, stage, world)
    if state is None or not state["finished"]:
        raise UserError(f"no finished checkpoint {checkpoint_path(cfg, stage)}: first run `python train_{stage}.py --config {cfg.config}` "
                        "with the same settings" + (", or name another with --teacher" if stage == "ar" else ""))
    return load_weights(checkpoint_path(cfg, stage), state, new_model(cfg, world)).eval(), state


def finished_stages(cfg, world):
    """{stage: (model, checkpoint)} of the teacher and of every stage that has finished. UserError without a finished teacher."""
    states = {stage: read_checkpoint(cfg, stage, world) for stage in STAGES}
    return {s: load_stage(cfg, s, world, state) for s, state in states.items() if s == "ar" or state and state["finished"]}


def last_student(cfg, world):
    """The last finished stage behind the teacher: its name, and its model in eval mode. UserError if there is none."""
    found = [(stage, state) for stage in STAGES[1:] if (state := read_checkpoint(cfg, stage, world)) and state["finished"]]
    if not found:
        raise UserError(f"there is no finished student: first run `python train_cft.py --config {cfg.config}`")
    stage, state = found[-1]
    return stage, load_stage(cfg, stage, world, state)[0]


def serve(cfg, model, prompt, max_len, **other):
    """block_decode at the operating point, or with other settings."""
    point = {"block_size": cfg.block_size, "rule": cfg.commit, "tau": cfg.tau, "clash": cfg.clash, "labels": range(LABEL, LABEL + cfg.n_labels)}
    return block_decode(model, prompt, max_len, **{**point, **other})


# --- The loop around a stage's own loss -----------------------------------------------------------------------------------

class Run:
    """Optimiser, schedule, checkpoints, log and bar of one stage. Use:

        run = Run(cfg, "cft", model, world)
        for step in run.steps():           # continues where a killed run stopped
            log = run.update(loss)         # once or several times
            run.log(**log)
    """

    def __init__(self, cfg, stage, model, world):
        self.cfg, self.stage, self.model, self.world = cfg, stage, model, world
        self.lr, steps = getattr(cfg, f"{stage}_lr"), getattr(cfg, f"{stage}_steps")
        self.n_steps = min(steps, cfg.max_steps or steps)
        decay = [p for p in model.parameters() if p.dim() == 2]
        rest = [p for p in model.parameters() if p.dim() != 2]
        self.optimizer = torch.optim.AdamW([{"params": decay, "weight_decay": cfg.weight_decay},
                                            {"params": rest, "weight_decay": 0.0}], lr=self.lr, betas=(0.9, 0.98), fused=device_of(cfg).type == "cuda")
        self.first, self.seconds, self.shown, self.finished = 0, 0.0, {}, False
        self.start = checksum(model.state_dict())  # of the weights that the stage begins with
        state = read_checkpoint(cfg, stage, world)
        if state is not None:
            if state.get("start") != self.start:
                raise UserError(f"{checkpoint_path(cfg, stage)} was begun from other weights (--teacher, --init or the stage before "
                                "has changed): name those again, or use another --run_dir, or delete it")
            load_weights(checkpoint_path(cfg, stage), state, model)
            self.optimizer.load_state_dict(state["optimizer"])
            self.first, self.seconds, self.finished = state["step"], state["seconds"], state["finished"]
        self.log_path = log_path(cfg, stage)

    def steps(self):
        """Yield the numbers of the steps to do, saving as they pass."""
        if self.finished:
            print(f"{self.stage}: finished already ({checkpoint_path(self.cfg, self.stage)}); delete it to train again")
            return
        if not RANK:
            print(f"{self.stage}: {sum(p.numel() for p in self.model.parameters()) / 1e6:.2f}M parameters on {device_of(self.cfg)}, steps "
                  f"{self.first} to {self.n_steps}, into {os.path.dirname(self.log_path)}", flush=True)
        self.started, before = time.perf_counter(), self.seconds
        with locked(os.path.dirname(self.log_path)), self._cut_log() as self.log_file, \
                tqdm(range(self.first, self.n_steps), initial=self.first, total=self.n_steps, desc=self.stage, disable=RANK > 0) as self.bar:
            for self.step in self.bar:
                yield self.step
                done = self.step + 1
                self.seconds = before + time.perf_counter() - self.started
                if done % self.cfg.save_every == 0 or done == self.n_steps:
                    self.log_file.flush()
                    self._save(done)

    def update(self, loss):
        """One optimiser step on a scalar loss (of several processes, each its share of the sum); returns the loss of all and the
        gradient norm before clipping, for the log."""
        scale = min(1.0, (self.step + 1) / min(self.cfg.warmup, 1 + self.n_steps // 10))  # a short stage warms up in a tenth of it
        progress = self.step / max(1, self.n_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * scale * 0.5 * (1 + math.cos(math.pi * progress))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if RANKS > 1:  # by hand: DistributedDataParallel expects one forward a backward, and here are up to three
            for p in self.model.parameters():
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                dist.all_reduce(p.grad)
        loss = total(loss)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.cfg.grad_clip)
        self.optimizer.step()
        loss, norm = loss.item(), norm.item()  # waits for the GPU: the only time in a step
        if not math.isfinite(loss + norm):
            raise UserError(f"{self.stage}: loss {loss}, gradient norm {norm} at step {self.step}: try a lower --{self.stage}_lr; "
                            f"the last checkpoint is {checkpoint_path(self.cfg, self.stage)}")
        return {"loss": loss, "grad_norm": norm}

    def log(self, **values):
        """One line of metrics.jsonl, and the bar. seconds: since this process began the stage."""
        values["lr"] = self.optimizer.param_groups[0]["lr"]
        line = {"step": self.step, **values, "seconds": round(time.perf_counter() - self.started, 2)}
        self.log_file.write(json.dumps(line) + "\n")
        self.shown.update(values)
        self.bar.set_postfix({k: f"{v:.3g}" for k, v in self.shown.items()})

    def time_to_validate(self):
        """Every valid_every steps, and after 1, 2, 4, 8, ...: the answers fall into place early."""
        done = self.step + 1
        return done % self.cfg.valid_every == 0 or done & (done - 1) == 0 or done == self.n_steps

    def _save(self, done):
        state = {"stage": self.stage, "settings": settings_of(self.cfg, self.stage), "words": self.world.words, "start": self.start,
                 "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "step": done,
                 "finished": done == self.n_steps, "seconds": self.seconds}
        save_tensors(checkpoint_path(self.cfg, self.stage), state)

    def _cut_log(self):
        """The log, open for more, without the lines of steps that will be done again (a killed run logs more than it saved)."""
        for left in glob.glob(os.path.join(glob.escape(os.path.dirname(self.log_path)), "*.part")) if not RANK else ():
            os.remove(left)  # of a run that was killed while it wrote
        lines = []
        if os.path.exists(self.log_path) and self.first:
            with open(self.log_path) as f:
                lines = [line for line in f if line.endswith("}\n") and json.loads(line)["step"] < self.first]
        save_atomically(self.log_path, lambda path: open(path, "w").writelines(lines))
        return open(os.devnull if RANK else self.log_path, "a")


def draw_batch(n, size, gen):
    """Row numbers (size,) below n, drawn with replacement."""
    return torch.randint(n, (size,), generator=gen).numpy()


def valid_rate(tokens, split, rows):
    """Share of valid answers among responses (n, R) to the rows of a split."""
    return float(parse_answers(tokens.cpu().numpy(), split.incoming[rows]).valid.mean())


def decode_split(cfg, split, decoder, desc):
    """Run decoder(prompt, rows) -> tokens (n, R), R always the same, forwards (n,) over a split in batches: (N, R) int64, (N,)."""
    starts, found = range(0, len(split), cfg.eval_batch), {}
    for i in tqdm(starts[RANK::RANKS], desc=desc, leave=False, disable=RANK > 0):
        rows = range(i, min(len(split), i + cfg.eval_batch))
        tokens, forwards = decoder(tensors(split, rows, device_of(cfg))[0], rows)
        found[i] = tokens.cpu().numpy(), forwards.cpu().numpy()
    found = {i: part for of_rank in gathered(found) for i, part in of_rank.items()}
    tokens, forwards = zip(*(found[i] for i in starts))
    return np.concatenate(tokens), np.concatenate(forwards)
