"""What all stages repeat, written once: the world, random numbers, the loop, decoding."""
import json
import math
import time

import numpy as np
import torch
from tqdm import tqdm

from beauty.world import beauty_world
from data import (LABEL, MASK, PAD, as_prompt, examples_of, joined, pack, parse_answers,
                  tensors)
from model import Sampling, ar_decode
from ours.commit import Apart
from ours.wording import reword
from plumbing.checkpoint import (checksum, locked, log_path, open_log, own_path, resume, save_run)
from plumbing.processes import RANK, device_of, mean_gradients
from plumbing.settings import UserError
from sampler import NEVER, Decoded, Threshold, block_decode
from toy.world import toy_world

WEIGHT_DECAY = 0.05  # of the matrices of the layers
BATCH = 256          # rows that are decoded together


def load_world(cfg):
    """The World that the settings name."""
    world = toy_world(cfg) if cfg.world.startswith("toy") else beauty_world(cfg)
    return reword(world, cfg.wording)


def rng_for(cfg, name, step):
    """A random generator that depends on (seed, name of a stage or use, step), and on the number
    of the process where there are several.

    So a run that is killed draws the same when it goes on. It is a generator of the CPU, so a
    run on a GPU sees the same batches and masks."""
    key = np.random.SeedSequence([cfg.seed, step, RANK, *name.encode()])
    return torch.Generator().manual_seed(int(key.generate_state(1, np.uint64)[0]) % 2 ** 63)


def autocast(cfg, device):
    """bfloat16 for training forwards, if cfg.bfloat16: on any GPU, and on CPUs that have it. On
    such a CPU a step takes about 0.6 of the time. A GPU that lacks it needs --bfloat16 false.
    Weights, optimiser and sampling stay in float32."""
    native = device.type == "cuda" or (
        torch.backends.mkldnn.is_available() and torch.cpu._is_avx512_bf16_supported())
    return torch.autocast(device.type, torch.bfloat16, enabled=cfg.bfloat16 and native)


def optimizers_of(model, lr):
    """[Muon, AdamW]: Muon for the matrices of the layers, AdamW for embeddings and gains. Ours:
    the paper names no optimiser, and with AdamW alone the same losses take more steps.

    Muon replaces the momentum of a matrix by the nearest orthogonal matrix (Jordan et al. 2024),
    scaled to the size of an AdamW step (arXiv 2502.16982), so that one rate serves both."""
    matrices = [p for p in model.layers.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if all(p is not m for m in matrices)]
    return [
        torch.optim.Muon(matrices, lr, WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr, betas=(0.9, 0.98), weight_decay=0.0)]


# --- The loop around a stage's own loss -------------------------------------------------------

class Run:
    """Optimisers, schedule, checkpoints, log and bar of one stage. A step here is one batch of
    training; a step of a block (sampler.py) is one forward pass of a decode. Use:

        run = Run(cfg, "cft", model, world)
        for step in run.steps():           # continues where a killed run stopped
            log = run.update(loss)         # once, or several times as in RL
            run.log(**log)
    """

    def __init__(self, cfg, stage, model, world):
        self.cfg, self.stage, self.model, self.world = cfg, stage, model, world
        self.peak_lr = getattr(cfg, f"{stage}_lr")
        self.n_steps = getattr(cfg, f"{stage}_steps")
        self.path = own_path(cfg, stage)
        self.optimizers = optimizers_of(model, self.peak_lr)
        self.shown = {}  # in the bar
        self.began_with = checksum(model.state_dict())  # resume refuses another start
        # (0, 0.0, False) for a new run; else resume has loaded the weights and the optimisers.
        self.first, self.seconds, self.finished = resume(
            cfg, stage, model, self.optimizers, world, self.began_with)

    def steps(self):
        """Yields the numbers of the steps to do, and saves as they pass."""
        if self.finished:
            print(f"{self.stage}: finished already ({self.path}); --again true trains it anew")
            return
        if not RANK:
            size = sum(p.numel() for p in self.model.parameters()) / 1e6
            print(f"{self.stage}: {size:.2f}M parameters on {device_of(self.cfg)}, "
                  f"steps {self.first} to {self.n_steps}, into {self.path}", flush=True)
        before = self.seconds
        self.began = time.perf_counter()
        todo = range(self.first, self.n_steps)
        with (locked(self.path),
              open_log(log_path(self.cfg, self.stage), self.first) as self.log_file,
              tqdm(todo, self.stage, self.n_steps, initial=self.first, disable=RANK > 0) as bar):
            self.bar = bar
            for self.step in bar:  # update and log read self.step
                yield self.step
                done = self.step + 1
                self.seconds = before + time.perf_counter() - self.began
                if done % self.cfg.every == 0 or done == self.n_steps:
                    self.log_file.flush()
                    save_run(self, done)
            if not self.n_steps:  # a stage of no steps: the weights that it begins with
                save_run(self, 0)

    def lr_at(self, step):
        """Linear warm-up over cfg.warmup steps, or a tenth of a short stage; a cosine down to 0."""
        warmup = min(self.cfg.warmup, 1 + self.n_steps // 10)
        rise = min(1.0, (step + 1) / warmup)
        fall = 0.5 * (1 + math.cos(math.pi * (step / self.n_steps)))
        return self.peak_lr * rise * fall

    def update(self, loss):
        """One optimiser step on a scalar loss -> the loss, and the gradient's norm, for the log."""
        lr = self.lr_at(self.step)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
            for group in optimizer.param_groups:
                group["lr"] = lr
        loss.backward()
        mean_gradients(self.model)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.cfg.grad_clip)
        for optimizer in self.optimizers:
            optimizer.step()
        loss, norm = loss.item(), norm.item()
        if not math.isfinite(loss + norm):
            raise UserError(f"{self.stage}: loss {loss}, gradient norm {norm} at step {self.step}: "
                            f"try a lower --{self.stage}_lr; the last checkpoint is {self.path}")
        return {"loss": loss, "grad_norm": norm}

    def log(self, **values):
        """A line of metrics.jsonl, and the bar. seconds: since this process began the stage."""
        values["lr"] = self.lr_at(self.step)
        seconds = round(time.perf_counter() - self.began, 2)
        line = {"step": self.step, **values, "seconds": seconds}
        self.log_file.write(json.dumps(line) + "\n")
        self.shown.update(values)
        self.bar.set_postfix({name: f"{value:.3g}" for name, value in self.shown.items()})

    def time_to_validate(self):
        """Every so many steps, and after 1, 2, 4, 8, ...: answers fall into place early."""
        done = self.step + 1
        power_of_two = (done & (done - 1)) == 0
        return done % self.cfg.every == 0 or power_of_two or done == self.n_steps


# --- Decoding ---------------------------------------------------------------------------------

def rule_of(cfg, tau=None):
    """The commit rule of the settings, at their tau or at another."""
    tau = cfg.tau if tau is None else tau
    if cfg.commit == "threshold":
        return Threshold(tau)
    return Apart(tau, range(LABEL, LABEL + cfg.n_labels))         # ours


def sampling_on(device, temperature, rng):
    """Sampling on a device. torch wants a generator of the same device, so one is seeded from
    rng."""
    seed = int(torch.randint(2 ** 62, (), generator=rng))
    return Sampling(temperature, torch.Generator(device).manual_seed(seed))


def ar_decoder(model):
    """A decoder that writes token by token: decoder(prompt (N, P), max_len) -> Decoded.

    It is recorded as a decode in blocks of one token, each committed in its step 0."""
    def decoder(prompt, max_len):
        tokens, logp, forwards = ar_decode(model, prompt, max_len)
        filled = torch.where(tokens == PAD, MASK, tokens)
        step = torch.where(tokens == PAD, NEVER, 0)
        return Decoded(tokens, filled, step, logp, forwards, block_size=1)
    return decoder


def block_decoder(cfg, model, tau=None):
    """A decoder that writes block by block, greedily, at the settings' tau or at another."""
    def decoder(prompt, max_len):
        return block_decode(model, prompt, max_len, cfg.block_size, rule_of(cfg, tau))
    return decoder


def respond(cfg, world, decoder, prompt):
    """Whole responses to prompts (N, P): one Decoded for each kind of example (data.examples_of).

    With --trace bound a decoder is asked twice: for the trace, then for the answer to it."""
    parts = []
    for max_len in world.longest[cfg.trace]:
        if parts:  # the answer is written from the trace alone
            trace = parts[-1].tokens.cpu().numpy()                # (N, R)
            prompt = torch.from_numpy(as_prompt(trace)).to(prompt.device)
        parts.append(decoder(prompt, max_len))
    return parts


def decode_split(cfg, world, split, decoder):
    """Responses to all users of a split, in batches: what was written of each kind, a list of
    arrays (N, R_kind), and the forwards (N,) that it took."""
    prompts = examples_of(split, cfg.trace)[0]
    written, forwards = [], []
    for first in range(0, len(split), BATCH):
        rows = range(first, min(first + BATCH, len(split)))
        prompt, _ = tensors(prompts, rows, device_of(cfg))
        parts = respond(cfg, world, decoder, prompt)
        written.append([part.tokens.cpu().numpy() for part in parts])
        forwards.append(sum(part.forwards for part in parts).cpu().numpy())
    by_kind = [np.concatenate(batches) for batches in zip(*written)]
    return by_kind, np.concatenate(forwards)


def validate(cfg, world, decoder, n=64):
    """Figures for the log, of the first n validation users: valid (share of valid answers), match
    (share of tokens as in the reference) and tokens_per_forward."""
    split = world.val.take(slice(0, n))
    written, forwards = decode_split(cfg, world, split, decoder)
    tokens = joined(written)                                      # (n, R)
    text = pack(tokens, left=False)
    width = max(text.shape[1], split.response.shape[1])
    text = np.pad(text, ((0, 0), (0, width - text.shape[1])))
    reference = np.pad(split.response, ((0, 0), (0, width - split.response.shape[1])))
    return {
        "valid": float(parse_answers(tokens, split.incoming).valid.mean()),
        "match": float((text == reference)[reference != PAD].mean()),
        "tokens_per_forward": float((tokens != PAD).sum() / forwards.sum())}
