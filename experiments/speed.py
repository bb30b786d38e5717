"""Everything about speed, measured in one run on one machine.

    python experiments/speed.py --config small --threads 2    # about 7 minutes on 2 CPU cores
    python experiments/speed.py --config small --beside "answer-only=runs/answer_only/small:ar"

The student against AR, against peers (peers.py), and as work grows; what training steps cost
(training.py); with --beside, the latency of AR models of other runs. Reads the checkpoints of the
run and writes speed.json, speed.md and cost.png beside its report. Decoders run in turn on the
same prompts, round after round (the first warms up); a ratio is the median over rounds of seconds
a token. Tokens count up to [EOS], times are of whole decodes, the prompt's forward included.
"""
import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from plumbing.script import script  # noqa: E402  first: it sets how threads wait

import dataclasses  # noqa: E402
import json  # noqa: E402
import math  # noqa: E402
import subprocess  # noqa: E402
import time  # noqa: E402
from dataclasses import dataclass  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402

import peers  # noqa: E402
from config import MANY, folder  # noqa: E402
from data import ANSWER, EOS, LABEL, NONE, PAD, PROFILE, tensors  # noqa: E402
from evaluate import score, stage_decoder  # noqa: E402
from fast.gpt import FastGPT, SlotCache  # noqa: E402
from model import ar_decode  # noqa: E402
from ours.bound import answer_length, for_answer, trace_length  # noqa: E402
from plumbing.checkpoint import (device_of, last_student, load_stage, load_tensors,  # noqa: E402
                                 new_model, save_atomically, start_from)
from plumbing.decoding import decode_split  # noqa: E402
from plumbing.settings import Numbers, Real, Text, UserError, Whole  # noqa: E402
from report.beside import parse_beside  # noqa: E402
from report.lossless import lossless_write  # noqa: E402
from report.rows import write_json, write_text  # noqa: E402
from report.speed import device_name, in_turn, prompts_of_round  # noqa: E402
from rules import Steps  # noqa: E402
from sampler import block_decode  # noqa: E402
from speed_table import figure, markdown  # noqa: E402
from trainer import ar_write, decode, load_world  # noqa: E402
from training import training  # noqa: E402

BATCHES, LENGTHS, BLOCKS = (1, 4, 16, 64, 256), (64, 128, 256, 512, 1024), (4, 8, 16, 32)
TIMED = (1, 8, 64)  # batches of the real student


@dataclass(frozen=True)
class Options:
    eval_speed_seconds: Real(0, 3600) = 4.0  # bounds every measurement, some at a multiple
    eval_taus: Numbers(above=0, high=1) = (0.3, 0.7, 0.9, 1.0)  # of the student, beside its own
    eval_curve_users: Whole(1, MANY) = 400  # test users whose answers are counted at those
    beside: Text() = ""  # AR models of other runs: name=folder:ar, with commas

    PRESETS = {"small": dict(eval_curve_users=300, eval_taus=(0.2, 0.7, 0.9, 1.0)),
               "full": dict(eval_curve_users=1000, eval_taus=(0.9, 0.95, 1.0))}


# --- Clocks -----------------------------------------------------------------------------------

def ratio(taken, a, b):
    """Median over rounds of (seconds a token of a) / (seconds a token of b)."""
    cost = {name: taken[name][:, 0] / taken[name][:, 1] for name in (a, b)}
    return float(np.median(cost[a] / cost[b]))


def clock(cfg, world, seconds):
    """measure({name: decode(prompt)}, batch) for about so many seconds: in_turn on test prompts,
    others every round. Returns the timings and the texts, the prompts among them."""
    def prompt(i, batch):
        return prompts_of_round(cfg, world, i, batch)

    def measure(jobs, batch):
        def job(decoder):
            return lambda i: decoder(prompt(i, batch))

        taken, texts = in_turn({name: job(decoder) for name, decoder in jobs.items()}, seconds)
        rounds = len(next(iter(taken.values())))
        texts["prompt"] = [prompt(i + 1, batch) for i in range(rounds)]
        return taken, texts
    return measure


@torch.no_grad()
def forward_seconds(cfg, model, batch, widths, n_keys, seconds):
    """Median seconds of bare forwards over a cache of n_keys slots, with the logits that a decoder
    asks for: {width: seconds}."""
    device, cache = device_of(cfg), SlotCache(model, batch, n_keys)

    def forward(width):
        tokens = torch.full((batch, width), LABEL, device=device)
        slots = slice(n_keys - width, n_keys)
        mask = torch.ones(1, 1, width, n_keys, dtype=torch.bool, device=device)
        positions = torch.arange(n_keys, device=device)[None, slots].expand(batch, -1)
        last = min(width, cfg.block_size)

        def run(_):
            hidden = model(tokens, positions, mask, cache, slots, n_keys, last=last)
            return model.logits(hidden).argmax(-1)
        return run

    taken, _ = in_turn({width: forward(width) for width in widths}, seconds)
    return {width: float(np.median(rounds[:, 0])) for width, rounds in taken.items()}


# --- What is counted --------------------------------------------------------------------------

def evidence_tokens(tokens, n_labels):
    """Evidence tokens of responses (N, R) -> (N,): what stands before <answer> and is no label and
    no template word. Labels and <profile> follow from the prompt's order: a decoder gets them for
    nothing."""
    before = np.cumsum((tokens == ANSWER) | (tokens == EOS), axis=1) == 0
    label = (tokens >= LABEL) & (tokens < LABEL + n_labels)
    return (before & ~label & ~np.isin(tokens, (PROFILE, NONE, PAD))).sum(1)


def blocks_of(cfg, world, tokens):
    """How many blocks responses (N, R) take -> (N,). The [EOS] of a trace that is a request of its
    own is no token of a response, but may take a block."""
    written, B = tokens != PAD, cfg.block_size
    if cfg.trace != "bound":
        return -(-written.sum(1) // B)
    longest = -(-trace_length(cfg, world.max_response) // B) * B
    trace, answer = written[:, :longest].sum(1), written[:, longest:].sum(1)
    of_trace = np.minimum(trace // B + 1, longest // B)
    return of_trace + -(-answer // for_answer(cfg).block_size)


def counts(cfg, world, model, users=None):
    """What the student writes at the operating point, for the first users: tokens and evidence
    tokens a forward, forwards a response, share of valid answers."""
    split = world.test.take(slice(0, users))
    decoder = stage_decoder(cfg, world, model, "student", cfg.tau)
    tokens, forwards = decode_split(cfg, split, decoder,
                                    f"block size {cfg.block_size}, tau {cfg.tau}")
    written = (tokens != PAD).sum(1)                              # (N,)
    blocks = blocks_of(cfg, world, tokens)
    n = forwards.sum()
    return {"n_users": len(split), "tokens_per_forward": float(written.sum() / n),
            "evidence_tokens_per_forward":
                float(evidence_tokens(tokens, world.n_labels).sum() / n),
            "forwards_per_response": float(forwards.mean()),
            "tokens_per_response": float(written.mean()),
            "blocks_per_response": float(blocks.mean()),
            "valid": float(score(world, split, tokens, forwards)["valid"].mean())}


def lossless_forwards(cfg, world, models, users=256):
    """Forwards a response of (teacher, student) together, the student's and the teacher's."""
    split = world.test.take(slice(0, users))
    decoder = stage_decoder(cfg, world, models, "lossless", cfg.tau)
    return float(decode_split(cfg, split, decoder, "lossless")[1].mean())


def efficiency(cfg, model, P, count, speedup, seconds):
    """How much of what the forwards alone would give is achieved at batch 1:
    speedup / (tokens a forward / cost of a forward).

    The cost is the mean measured time of the student's bare forwards over that of AR's, each width
    as often as it occurs in a response: P + B or P once (the prompt), 2 B where a block opens and
    stores the one before, B inside a block, 1 in AR. On a GPU the window is always 2 B wide. With
    --trace bound the trace is a second prompt."""
    B = cfg.block_size
    L, F, blocks = (count[f"{name}_per_response"] for name in ("tokens", "forwards", "blocks"))
    read = [P]
    if cfg.trace == "bound":
        read.append(max(1, round(L) - answer_length(cfg)))
    widths = {1, B, 2 * B, *read, *(n + B for n in read)}
    t = forward_seconds(cfg, model, 1, sorted(widths), P + B + int(L), seconds)
    inside = 0 if device_of(cfg).type == "cuda" else F - blocks
    student = sum(t[n + B] for n in read) + (F - len(read) - inside) * t[2 * B] + inside * t[B]
    student /= F
    ar = (sum(t[n] for n in read) + (L - 1) * t[1]) / L
    cost = student / ar
    return {"efficiency_b1": speedup / (count["tokens_per_forward"] / cost), "cost_ratio": cost,
            "cost_ratio_block_to_1": t[B] / t[1],
            "forward_ms_b1": {str(width): 1000 * s for width, s in t.items()},
            "bare_ms": {"ar": 1000 * ar * L, "student": 1000 * student * F}}


# --- As work grows: random weights, a schedule with the measured number of tokens a forward ---

def endless(cfg, world, max_len):
    """A model of the run's shape with random weights that never writes [EOS]."""
    torch.manual_seed(cfg.seed)
    model = FastGPT(len(world.words), cfg.n_layer, cfg.n_head, cfg.d_model,
                    max_positions=2048 + max_len).to(device_of(cfg)).eval()
    logits = model.logits

    def without_end(hidden):
        out = logits(hidden)
        out[..., EOS] = -1e4
        return out
    model.logits = without_end
    return model


def scaled(cfg, world, batch, length, per_forward, seconds):
    """Speed-up of responses of `length` tokens at so many tokens a forward.

    The rule Steps knows whole steps a block only. So the two numbers of steps around the wanted
    one are measured, and between them the time is a straight line in the number of forwards."""
    model, B = endless(cfg, world, length), cfg.block_size
    fewer, more = math.floor(B / per_forward), math.ceil(B / per_forward)
    near = sorted({max(1, fewer), min(B, more)})

    def with_steps(steps):
        return lambda prompt: block_decode(model, prompt, length, B, Steps(steps))

    def tokens_of(decoder):
        return lambda prompt: decoder(prompt).tokens

    jobs = {"ar": lambda prompt: ar_decode(model, prompt, length)[0]}
    jobs |= {steps: tokens_of(with_steps(steps)) for steps in near}
    taken, _ = clock(cfg, world, seconds)(jobs, batch)
    one, _ = tensors(world.test, range(1), device_of(cfg))
    forwards = [float(with_steps(steps)(one).forwards[0]) for steps in near]
    cost = [ratio(taken, steps, "ar") for steps in near]          # time over that of AR
    part = 0.0
    if forwards[0] != forwards[-1]:
        part = (length / per_forward - forwards[0]) / (forwards[1] - forwards[0])
    return {"speedup": 1 / (cost[0] + part * (cost[-1] - cost[0])), "batch": batch,
            "length": length, "steps": near, "forwards": forwards, "rounds": len(taken["ar"])}


# --- The cost model: seconds of a forward = a + b width batch (+ c batch) ---------------------

def fit(points, rows=False):
    """Least squares of the cost model, every point in units of itself: [(width, batch, seconds)]
    -> [a, b], or [a, b, c] with rows: each row reads its own keys, however few ask."""
    width, batch, seconds = np.array(points, float).T
    columns = (1 / seconds, width * batch / seconds, batch / seconds)[:3 if rows else 2]
    return np.linalg.lstsq(np.stack(columns, axis=1), np.ones(len(seconds)), rcond=None)[0].tolist()


def forward_cost(of, width, batch):
    """Seconds of a forward by the cost model `of`, [a, b] or [a, b, c]."""
    return float(np.dot(of, (1, width * batch, batch)[:len(of)]))


def predicted(of, B, P, batch, length, per_forward):
    """Speed-up by the cost model alone, with the widths of `efficiency`."""
    def t(width):
        return forward_cost(of, width, batch)

    F, blocks = length / per_forward, math.ceil(length / B)
    student = t(P + B) + (blocks - 1) * t(2 * B) + max(0, F - blocks) * t(B)
    return (t(P) + (length - 1) * t(1)) / student


def crossover(points):
    """Batch at which the speed-up falls below 1, between measured batches on a logarithmic axis,
    or None: [(batch, speedup)] -> float."""
    for (n, s), (m, r) in zip(points, points[1:]):
        if s >= 1 > r:
            below = -math.log(r)
            return float(np.exp(np.interp(0, [-math.log(s), below], [math.log(n), math.log(m)])))
    return None


def model_figures(of, points):
    """A cost model as speed.json has it, with its median error on the points."""
    off = [abs(forward_cost(of, width, batch) / s - 1) for width, batch, s in points]
    out = {"a_ms": 1000 * of[0], "median_error": float(np.median(off))}
    return out | {f"{name}_us": 1e6 * value for name, value in zip("bc", of[1:])}


# --- The curves -------------------------------------------------------------------------------

def prompt_width(world):
    """Of the first test prompts."""
    return tensors(world.test, range(min(64, len(world.test))), "cpu")[0].shape[1]


def whole_blocks(count, B):
    """The mean response, in whole blocks: tokens."""
    return max(B, math.ceil(count["tokens_per_response"] / B) * B)


def measured_forwards(cfg, world, n_keys, seconds):
    """Bare forwards at random weights: [(width, batch, seconds)]."""
    model, B, points = new_model(cfg, world).eval(), cfg.block_size, []
    for batch in BATCHES:
        widths = sorted({1, max(1, B // 2), B, 2 * B})
        taken = forward_seconds(cfg, model, batch, widths, n_keys, seconds)
        points += [(width, batch, s) for width, s in taken.items()]
    return points


def growing(cfg, world, count, models, seconds):
    """Speed-up against length and against batch, measured and by the two cost models."""
    B, P, f = cfg.block_size, prompt_width(world), count["tokens_per_forward"]
    grid = [("length", 1, length) for length in LENGTHS]
    grid += [("batch", batch, whole_blocks(count, B)) for batch in BATCHES]
    out = []
    for against, batch, length in grid:
        point = scaled(cfg, world, batch, length, f, 3 * seconds)
        model, model_rows = (predicted(of, B, P, batch, length, f) for of in models)
        out.append({"against": against, **point, "tokens_per_forward": f, "model": model,
                    "model_rows": model_rows})
    return out


def real_student(cfg, options, world, teacher, student):
    """Speed-up and counts of the real student at other block sizes and thresholds."""
    changes = [{"block_size": n} for n in sorted({*BLOCKS, cfg.block_size})]
    changes += [{"tau": tau} for tau in options.eval_taus if tau != cfg.tau]
    out = []
    for change in changes:
        there = dataclasses.replace(cfg, **change)
        jobs = decoders(there, world, teacher, student)
        taken, _ = clock(cfg, world, 2 * options.eval_speed_seconds)(jobs, 1)
        out.append({"against": next(iter(change)), "block_size": there.block_size,
                    "tau": there.tau, "speedup": ratio(taken, "ar", "student"), "batch": 1,
                    **counts(there, world, student, options.eval_curve_users)})
    return out


def curves(cfg, options, world, teacher, student, count):
    """The curves of speed.json, and the cost model with the crossover batch."""
    seconds, P = options.eval_speed_seconds, prompt_width(world)
    length = whole_blocks(count, cfg.block_size)
    points = measured_forwards(cfg, world, P + cfg.block_size + length, seconds / 2)
    two, three = fit(points), fit(points, rows=True)
    out = growing(cfg, world, count, (two, three), seconds)
    batches = [point for point in out if point["against"] == "batch"]

    def crosses(key):
        return crossover([(point["batch"], point[key]) for point in batches])

    cost = {**model_figures(two, points), "rows": model_figures(three, points),
            "length": length, "prompt": P, "crossover_batch": crosses("speedup"),
            "crossover_batch_model": crosses("model"),
            "crossover_batch_model_rows": crosses("model_rows"),
            "forwards": [{"width": w, "batch": n, "ms": 1000 * s} for w, n, s in points]}
    return out + real_student(cfg, options, world, teacher, student), cost


# --- The run ----------------------------------------------------------------------------------

def decoders(cfg, world, teacher, student, others=None):
    """{name: decode(prompt) -> tokens} of AR, the student at the operating point, the two
    together (lossless), and the AR models of other runs."""
    def ar(model, trace):
        own = dataclasses.replace(cfg, trace=trace)
        return lambda prompt: ar_write(own, model, prompt, world.max_response).tokens

    out = {"ar": ar(teacher, cfg.trace),
           "student": lambda prompt: decode(cfg, student, prompt, world.max_response).tokens,
           "lossless": lambda prompt: lossless_write(cfg, (teacher, student), prompt,
                                                     world.max_response).tokens}
    return out | {name: ar(*other) for name, other in (others or {}).items()}


def beside(cfg, options, world):
    """AR models of other runs, named as for evaluate.py: {name: (model, its setting `trace`)} of
    every name=folder:ar."""
    out = {}
    for name, where, stage in parse_beside(options.beside):
        if stage == "ar":
            path = os.path.join(where, f"seed{cfg.seed}", "ar", "checkpoint.pt")
            model = start_from(dataclasses.replace(cfg, init=path), world, None)
            out[name] = model, load_tensors(path)["settings"]["trace"]
    return out


def git_hash():
    """The commit that is checked out, or None."""
    try:
        return subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True,
                              text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def real_speed(cfg, options, world, teacher, student):
    """The real student against AR at several batches, and latencies at batch 1."""
    seconds, out = options.eval_speed_seconds, {}
    for batch in TIMED:
        others = beside(cfg, options, world) if batch == 1 else None
        measure = clock(cfg, world, 5 * seconds if batch == 1 else 2 * seconds)
        taken, _ = measure(decoders(cfg, world, teacher, student, others), batch)
        out[f"speedup_b{batch}"] = ratio(taken, "ar", "student")
        out[f"lossless_speedup_b{batch}"] = ratio(taken, "ar", "lossless")
        if batch == 1:
            out["rounds_b1"] = len(taken["ar"])
            out["latency_ms"] = {}
            for name, rounds in taken.items():
                p50, p95 = (1000 * np.quantile(rounds[:, 0], (0.5, 0.95))).tolist()
                out["latency_ms"][name] = {"p50": p50, "p95": p95}
    return out


def measure_all(cfg, options, world):
    """-> the run and the curves, as speed.json has them."""
    start, seconds = time.perf_counter(), options.eval_speed_seconds
    teacher, _ = load_stage(cfg, "ar", world)
    stage, student = last_student(cfg, world)
    count = counts(cfg, world, student)
    point = {name: getattr(cfg, name) for name in ("block_size", "commit", "tau", "clash")}
    run = {"config": cfg.config, "device": device_name(cfg), "threads": cfg.threads,
           "commit": git_hash(), "torch": torch.__version__, "stage": stage, "seed": cfg.seed,
           "operating_point": point, **count}
    run["lossless_forwards"] = lossless_forwards(cfg, world, (teacher, student))
    run |= real_speed(cfg, options, world, teacher, student)
    P = round(float((world.test.prompt != PAD).sum(1).mean()))
    run |= efficiency(cfg, student, P, count, run["speedup_b1"], seconds)
    models, measure = (teacher, student), clock(cfg, world, 3 * seconds)
    longest = world.max_response
    if cfg.trace == "bound":  # peers write the first request: the trace
        longest = trace_length(cfg, longest)
    run |= peers.compare(cfg, longest, models, measure, ratio)
    lines, run["cost"] = curves(cfg, options, world, teacher, student, count)
    run["training"] = training(cfg, world)
    run["seconds"] = time.perf_counter() - start
    return run, lines


def main(cfg, options):
    if not cfg.fast:
        raise UserError("speed.py measures the decoders of fast/: leave out --fast false")
    world = load_world(cfg)
    run, lines = measure_all(cfg, options, world)
    key = {name: run[name] for name in ("config", "device", "threads")}
    try:  # what other devices and numbers of threads have written stays
        with open(folder(cfg, "speed.json")) as file:
            before = json.load(file)
    except (OSError, ValueError):
        before = {"runs": [], "curves": []}

    def same(row):
        return all(row[name] == value for name, value in key.items())

    kept = {name: [row for row in rows if not same(row)] for name, rows in before.items()}
    result = {"runs": kept["runs"] + [run],
              "curves": kept["curves"] + [{**key, **line} for line in lines]}
    write_json(folder(cfg, "speed.json"), result)
    tables = []
    for row in result["runs"]:
        key = {name: row[name] for name in key}
        tables.append(markdown(row, [line for line in result["curves"] if same(line)]))
    write_text(folder(cfg, "speed.md"), "\n".join(tables))
    save_atomically(folder(cfg, "cost.png"), lambda path: figure(run, lines, path))
    print(f"\n{markdown(run, lines)}\nwritten: {folder(cfg)}/speed.json, speed.md, cost.png "
          f"({run['seconds']:.0f} s)")


if __name__ == "__main__":
    script(main, __doc__, also=Options)
