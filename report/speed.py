"""Speed: tokens a second, always beside the AR decode of the same run on the same prompts."""
import time

import numpy as np

from data import PAD, examples_of, tensors
from plumbing.processes import device_of
from trainer import respond

BATCHES = (1, 64)


def in_turn(jobs, seconds):
    """Runs jobs {name: f(round) -> number of tokens written} in turn, for about so many seconds:
    {name: (rounds, 2)}, the seconds and the tokens of each round.

    The first round warms up and is not counted; there is at least one more. Every other round
    goes in reverse order, so that a machine that slows down slows all jobs alike."""
    taken = {name: [] for name in jobs}
    began = time.perf_counter()
    round_ = 0
    while round_ < 2 or time.perf_counter() - began < seconds:
        names = list(jobs)
        if round_ % 2:
            names.reverse()
        for name in names:
            start = time.perf_counter()
            n_tokens = jobs[name](round_)
            spent = time.perf_counter() - start
            if round_ > 0:
                taken[name].append((spent, n_tokens))
        round_ += 1
    return {name: np.array(rounds) for name, rounds in taken.items()}


def job(cfg, world, decoder, batch):
    """A job for in_turn: writes whole responses to `batch` test users, other ones every round."""
    prompts = examples_of(world.test, cfg.trace)[0]

    def run(round_):
        rows = np.arange(round_ * batch, (round_ + 1) * batch) % len(prompts)
        prompt, _ = tensors(prompts, rows, device_of(cfg))
        parts = respond(cfg, world, decoder, prompt)
        return sum(int((part.tokens != PAD).sum()) for part in parts)  # waits for a GPU
    return run


def rounds_at(batch, decoders, seconds):
    """Times decoders {row: (settings, World, decoder)} in turn: {row: (rounds, 2)}, see in_turn."""
    return in_turn({row: job(*of_row, batch) for row, of_row in decoders.items()}, seconds)


def speeds(cfg, world, decoders, seconds):
    """Times the decoders {row: decoder}, one of which is "ar", for so many seconds at each batch
    size: {row: {"latency_ms": of a single response, "speedup_b1", "speedup_b64"}}.

    All are medians over rounds. A speed-up is that of tokens a second over AR's in the same round.
    The prompt's forward counts."""
    times = {row: {} for row in decoders}
    of_rows = {row: (cfg, world, decoder) for row, decoder in decoders.items()}
    for batch in BATCHES:
        taken = rounds_at(batch, of_rows, seconds)
        rate = {row: rounds[:, 1] / rounds[:, 0] for row, rounds in taken.items()}  # (rounds,)
        for row, found in times.items():
            if batch == 1:
                found["latency_ms"] = 1000 * float(np.median(taken[row][:, 0]))
            # A round in which AR writes nothing has no ratio.
            ratio = rate[row] / np.where(rate["ar"] > 0, rate["ar"], np.nan)
            found[f"speedup_b{batch}"] = float(np.median(ratio))
    return times
