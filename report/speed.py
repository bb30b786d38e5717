"""Speed: tokens a second, always beside the AR decode of the same run on the same prompts."""
import time

import numpy as np
import torch

from config import STAGES
from data import PAD, tensors
from plumbing.checkpoint import device_of
from plumbing.processes import RANK
from report.lossless import lossless_write
from trainer import ar_write, decode

BATCHES = (1, 64)
NO_TIMING = dict.fromkeys(("tokens_per_s_b1", "speedup_b1", "latency_ms", "tokens_per_s_batch",
                           "speedup_batch", "batch"))


def device_name(cfg):
    if device_of(cfg).type == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU, {cfg.threads} threads"


def in_turn(jobs, seconds):
    """Runs jobs {name: f(round) -> tokens (N, R)} in turn, for about so many seconds.

    -> {name: (rounds, 2) seconds and tokens}, {name: [tokens]}. The first round warms up and is
    not counted; one more there is at least. Every other round goes in reverse order."""
    taken = {name: [] for name in jobs}
    texts = {name: [] for name in jobs}
    began = time.perf_counter()
    round_ = 0
    while round_ < 2 or time.perf_counter() - began < seconds:
        names = list(jobs)
        if round_ % 2:
            names.reverse()
        for name in names:
            start = time.perf_counter()
            tokens = jobs[name](round_)
            n_tokens = int((tokens != PAD).sum())  # waits for the GPU too
            spent = time.perf_counter() - start
            if round_ > 0:
                taken[name].append((spent, n_tokens))
                texts[name].append(tokens)
        round_ += 1
    return {name: np.array(rows) for name, rows in taken.items()}, texts


def prompts_of_round(cfg, world, round_, batch):
    """Test prompts (batch, P): other ones every round."""
    rows = np.arange(round_ * batch, (round_ + 1) * batch) % len(world.test)
    return tensors(world.test, rows, device_of(cfg))[0]


def speed_jobs(cfg, world, teacher, student, batch, max_len):
    """What is timed: a round of AR decoding and one of block decoding, of the same prompts.
    student: a GPT, or (teacher, student), whose text is AR's."""
    def ar(round_):
        return ar_write(cfg, teacher, prompts_of_round(cfg, world, round_, batch), max_len).tokens

    write = lossless_write if isinstance(student, tuple) else decode

    def block(round_):
        return write(cfg, student, prompts_of_round(cfg, world, round_, batch), max_len).tokens
    return {"ar": ar, "block": block}


def speed(cfg, world, teacher, student, batch, seconds, max_len=None):
    """Generated tokens a second, wall time of whole decodes, the prompt's forward included.

    -> {"ar", "block": tokens/s, "ratio": block / ar, "ar_ms", "block_ms": milliseconds a batch},
    medians over rounds, which take about so many seconds."""
    if RANK:  # the first process measures and reports
        return dict.fromkeys(("ar", "block", "ratio", "ar_ms", "block_ms"), 0.0)
    jobs = speed_jobs(cfg, world, teacher, student, batch, max_len or world.max_response)
    taken, _ = in_turn(jobs, seconds)
    rate = {name: rounds[:, 1] / rounds[:, 0] for name, rounds in taken.items()}
    out = {name: float(np.median(rates)) for name, rates in rate.items()}
    # A round in which AR writes nothing has no ratio.
    ratios = (rate["block"] / np.where(rate["ar"] > 0, rate["ar"], np.nan))
    out["ratio"] = float(np.nanmedian(ratios)) if np.isfinite(ratios).any() else None
    for name, rounds in taken.items():
        out[f"{name}_ms"] = float(np.median(1000 * rounds[:, 0]))
    return out


def add_times(cfg, options, world, models, finished, results):
    """Fills in the results of one seed [rows.Result]: how fast they are decoded, how long their
    stages were trained. models {stage: GPT}; finished {stage: (model, checkpoint)}."""
    taken = timings(cfg, world, models, options.eval_speed_seconds)
    for result in results:
        if result.reported:
            result.timing = taken.get(result.stage, NO_TIMING)
        if result.stage in finished:
            result.train_seconds = finished[result.stage][1]["seconds"]


def timings(cfg, world, models, seconds):
    """The timing of AR and of every student (a teacher alone: of its weights under the block
    sampler): {stage: the fields of NO_TIMING}. models {stage: GPT}."""
    students = [stage for stage in (*STAGES[1:], "lossless") if stage in models] or ["naive"]
    found = {}
    for stage in students:
        one, many = (speed(cfg, world, models["ar"], models[stage], batch, seconds)
                     for batch in BATCHES)
        found[stage] = timing(one, many, "block", one["ratio"], many["ratio"])
        found["ar"] = timing(one, many, "ar", 1.0, 1.0)  # as measured beside the last of them
    return found


def timing(one, many, name, speedup, speedup_batch):
    """one, many: what `speed` says of batch 1 and of the large batch."""
    return {"tokens_per_s_b1": one[name], "speedup_b1": speedup,
            "latency_ms": one[f"{name}_ms"], "tokens_per_s_batch": many[name],
            "speedup_batch": speedup_batch, "batch": BATCHES[1]}
