"""What all stages repeat, written once: the world, random numbers, the loop, decoding."""
import json
import math
import time

import numpy as np
import torch
from tqdm import tqdm

import fast.decode  # noqa: F401  the quick twins register themselves
from beauty.world import beauty_world
from data import MASK, PAD, parse_answers
from model import Sampling, ar_decode
from ours.bound import joined, write
from ours.commit import Apart, label_range
from ours.wording import reword
from plumbing.checkpoint import (checkpoint_path, device_of, locked, log_path, open_log, resume,
                                 save_run)
from plumbing.optimizers import optimizers_of
from plumbing.processes import RANK, mean_gradients, share_rows, shared_decode
from plumbing.settings import UserError
from sampler import NEVER, Decoded, Threshold, block_decode
from toy.world import toy_world


def load_world(cfg):
    """The World that the settings name."""
    world = toy_world(cfg) if cfg.world.startswith("toy") else beauty_world(cfg)
    world = reword(world, cfg.wording)  # ours
    if cfg.trace == "none":  # the answer alone
        for split in (world.train, world.val, world.test):
            split.trace = split.trace[:, :0]
    return world


def rng_for(cfg, name, step):
    """A random generator that depends on (seed, name of a stage or use, step) and nothing else.

    So a run that is killed draws the same when it goes on. It is the CPU's: a GPU sees the same
    batches and masks, and is never waited for."""
    key = np.random.SeedSequence([cfg.seed, step, *name.encode()])
    return torch.Generator().manual_seed(int(key.generate_state(1, np.uint64)[0]) % 2 ** 63)


def autocast(cfg, device):
    """bfloat16 for training forwards, where settings and hardware allow it. Weights, optimiser
    and sampling stay in float32. A step takes about 0.6 of the time on CPUs that have it."""
    native = device.type == "cuda" or (
        torch.backends.mkldnn.is_available() and torch.cpu._is_avx512_bf16_supported())
    return torch.autocast(device.type, torch.bfloat16, enabled=cfg.bfloat16 and native)


# --- The loop around a stage's own loss -------------------------------------------------------

class Run:
    """Optimisers, schedule, checkpoints, log and bar of one stage. Use:

        run = Run(cfg, "cft", model, world)
        for step in run.steps():           # continues where a killed run stopped
            log = run.update(loss)         # once or several times
            run.log(**log)
    """

    def __init__(self, cfg, stage, model, world):
        self.cfg, self.stage, self.model, self.world = cfg, stage, model, world
        self.peak_lr = getattr(cfg, f"{stage}_lr")
        self.n_steps = getattr(cfg, f"{stage}_steps")
        self.path = checkpoint_path(cfg, stage)
        self.optimizers = optimizers_of(model, self.peak_lr)
        self.shown = {}  # in the bar
        resume(self)     # plumbing/checkpoint.py sets self.first, self.seconds, self.finished
        share_rows(model)

    def steps(self):
        """Yields the numbers of the steps to do, and saves as they pass."""
        if self.finished:
            print(f"{self.stage}: finished already ({self.path}); delete it to train again")
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
            for self.step in bar:
                yield self.step
                done = self.step + 1
                self.seconds = before + time.perf_counter() - self.began
                if done % self.cfg.every == 0 or done == self.n_steps:
                    self.log_file.flush()
                    save_run(self, done)
            if not self.n_steps:  # a stage of no steps: the weights that it begins with
                save_run(self, 0)

    def lr_at(self, step):
        """Linear warm-up, in a short stage over a tenth of it, then a cosine down to 0."""
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
    return Apart(tau, cfg.clash, label_range(cfg.n_labels))  # ours


def ar_write(cfg, model, prompt, max_len):
    """ar_decode, greedily -> Decoded: blocks of one token, each written in one step."""
    def decoder(own, prompt, max_len, _):
        tokens, logp, forwards = ar_decode(model, prompt, max_len)
        filled = torch.where(tokens == PAD, MASK, tokens)
        step = torch.where(tokens == PAD, NEVER, 0)
        return Decoded(tokens, filled, step, logp, forwards)
    return joined(write(cfg, decoder, prompt, max_len))


def decode(cfg, model, prompt, max_len, tau=None):
    """block_decode, greedily, at the operating point or at another tau -> Decoded."""
    def decoder(own, prompt, max_len, _):
        return block_decode(model, prompt, max_len, own.block_size, rule_of(own, tau))
    return joined(write(cfg, decoder, prompt, max_len))


def roll_out(cfg, model, prompt, max_len, tau, sampling, group=1):
    """A group of responses to each prompt (N, P), by a student as it is served, for OPD and RL:
    [(settings, prompt, Decoded)]. One part; with --trace bound two (ours/bound.py)."""
    def decoder(own, prompt, max_len, greedily):
        def share(prompt, rng):
            if prompt.is_cuda:  # torch draws on a GPU with a generator of the GPU's only
                seed = int(torch.randint(2 ** 62, (), generator=rng))
                rng = torch.Generator(prompt.device).manual_seed(seed)
            how = Sampling(0.0 if greedily else sampling.temperature, rng)
            return block_decode(model, prompt, max_len, own.block_size, rule_of(own, tau), how)
        return shared_decode(share, prompt, sampling.generator)
    return write(cfg, decoder, prompt, max_len, group)


def valid_rate(tokens, split, rows):
    """Share of valid answers among responses (n, R) to some rows of a split."""
    return float(parse_answers(tokens.cpu().numpy(), split.incoming[rows]).valid.mean())
