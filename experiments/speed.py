"""Everything about speed, measured in one run on one machine: the student against AR, against peers, and as work grows.

    python experiments/speed.py --config small --threads 2    # about 7 minutes on 2 CPU cores
    python experiments/speed.py --config small --beside "answer-only=runs/answer_only/small:ar"   # its latency too

Reads the checkpoints of the run and writes speed.json, speed.md and cost.png beside its report. Decoders run in turn on the
same prompts, round after round (the first warms up); a ratio is the median over rounds of seconds a token. Tokens count up to
[EOS], times are of whole decodes, the prompt's forward included. --eval_speed_seconds bounds every measurement.
"""
import dataclasses
import json
import math
import os
import subprocess
import sys
import time

import numpy as np
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from common import (decode_split, device_of, last_student, load_stage, new_model, save_atomically, script, serve,  # noqa: E402
                    start_from)
from config import folder  # noqa: E402
from data import ANSWER, LABEL, NONE, PROFILE, load_world, tensors  # noqa: E402
from sampler import block_decode  # noqa: E402
from evaluate import device_name, in_turn, parse_beside, prompts_of_round, score, stage_decoder  # noqa: E402
from model import EOS, GPT, PAD, KVCache, ar_decode  # noqa: E402
import peers  # noqa: E402
from training import training  # noqa: E402

BATCHES, LENGTHS, BLOCKS = (1, 4, 16, 64, 256), (64, 128, 256, 512, 1024), (4, 8, 16, 32)


# --- Clocks ----------------------------------------------------------------------------------------------------------------

def ratio(taken, a, b):
    """Median over rounds of (seconds a token of a) / (seconds a token of b)."""
    cost = lambda name: taken[name][:, 0] / taken[name][:, 1]
    return float(np.median(cost(a) / cost(b)))


def clock(cfg, world, share=1.0):
    """measure({name: decode(prompt)}, batch): in_turn on test prompts, others every round, for that share of eval_speed_seconds;
    the prompts are among the texts."""
    prompt = lambda i, n: prompts_of_round(cfg, world, i, n)

    def measure(jobs, batch):
        taken, texts = in_turn({name: lambda i, f=f: f(prompt(i, batch)) for name, f in jobs.items()}, share * cfg.eval_speed_seconds)
        return taken, texts | {"prompt": [prompt(i + 1, batch) for i in range(len(next(iter(taken.values()))))]}
    return measure


@torch.no_grad()
def forward_seconds(cfg, model, batch, widths, n_keys, seconds):
    """Median seconds of bare forwards over a cache of n_keys slots, with the logits that a decoder asks for: {width: seconds}."""
    device, cache = device_of(cfg), KVCache(model, batch, n_keys)

    def forward(width):
        tokens, slots = torch.full((batch, width), LABEL, device=device), slice(n_keys - width, n_keys)
        mask = torch.ones(1, 1, width, n_keys, dtype=torch.bool, device=device)
        position = torch.arange(n_keys, device=device)[None, slots].expand(batch, -1)
        return lambda _: model.logits(model(tokens, position, mask, cache, slots, n_keys, last=min(width, cfg.block_size))).argmax(-1)
    taken, _ = in_turn({w: forward(w) for w in widths}, seconds)
    return {w: float(np.median(t[:, 0])) for w, t in taken.items()}


# --- What is counted -------------------------------------------------------------------------------------------------------

def evidence_tokens(tokens, n_labels):
    """Evidence tokens of responses (N, R) -> (N,): what stands before <answer> and is no label and no template word. Labels and
    <profile> stand where the prompt's order puts them, so a decoder gets them for nothing."""
    before = np.cumsum((tokens == ANSWER) | (tokens == EOS), axis=1) == 0
    label = (tokens >= LABEL) & (tokens < LABEL + n_labels)
    return (before & ~label & ~np.isin(tokens, (PROFILE, NONE, PAD))).sum(1)


def counts(cfg, world, model, users=None):
    """What the student writes at the operating point, for the first users: tokens and evidence tokens a forward, forwards a response, share of valid answers."""
    split = world.test.take(slice(0, users))
    tokens, forwards = decode_split(cfg, split, stage_decoder(cfg, world, model, "student", cfg.tau),
                                    f"block size {cfg.block_size}, tau {cfg.tau}")
    written, n = score(world, split, tokens, forwards), forwards.sum()
    return {"n_users": len(split), "tokens_per_forward": float((tokens != PAD).sum() / n),
            "evidence_tokens_per_forward": float(evidence_tokens(tokens, world.n_labels).sum() / n), "forwards_per_response": float(forwards.mean()),
            "tokens_per_response": float((tokens != PAD).sum(1).mean()), "blocks_per_response": float((-(-(tokens != PAD).sum(1) // cfg.block_size)).mean()),
            "valid": float(written["valid"].mean())}


def efficiency(cfg, model, P, count, speedup):
    """How much of what the forwards alone would give is achieved at batch 1: speedup / (tokens a forward / cost of a forward).

    The cost is the mean measured time of the student's bare forwards over that of AR's, each width as often as it occurs in
    a response: P + B or P once (the prompt), 2 B where a block opens and stores the one before, B inside a block, 1 in AR. On a GPU
    the window is always 2 B wide."""
    B, L, F, blocks = cfg.block_size, *(count[k + "_per_response"] for k in ("tokens", "forwards", "blocks"))
    t = forward_seconds(cfg, model, 1, (1, B, 2 * B, P, P + B), P + B + int(L), cfg.eval_speed_seconds)
    inside = 0 if device_of(cfg).type == "cuda" else F - blocks
    student = (t[P + B] + (F - 1 - inside) * t[2 * B] + inside * t[B]) / F
    ar = (t[P] + (L - 1) * t[1]) / L
    cost = student / ar
    return {"efficiency_b1": speedup / (count["tokens_per_forward"] / cost), "cost_ratio": cost, "cost_ratio_block_to_1": t[B] / t[1],
            "forward_ms_b1": {str(w): 1000 * s for w, s in t.items()}, "bare_ms": {"ar": 1000 * ar * L, "student": 1000 * student * F}}


# --- As work grows: random weights, a schedule that commits the measured number of tokens a forward ---------------------------

def endless(cfg, world, max_len):
    """A GPT of the run's shape with random weights that never writes [EOS]."""
    torch.manual_seed(cfg.seed)
    model = GPT(len(world.words), cfg.n_layer, cfg.n_head, cfg.d_model, max_positions=2048 + max_len).to(device_of(cfg)).eval()
    logits = model.logits

    def without_end(hidden):
        out = logits(hidden)
        out[..., EOS] = -1e4
        return out
    model.logits = without_end
    return model


def scaled(cfg, world, batch, length, per_forward):
    """Speed-up of responses of `length` tokens at so many tokens a forward. Rule `steps` knows whole steps a block only, so the two
    numbers of steps around the wanted one are measured, and the time between them is a straight line in the number of forwards."""
    model, B = endless(cfg, world, length), cfg.block_size
    near = sorted({max(1, math.floor(B / per_forward)), min(B, math.ceil(B / per_forward))})
    decode = lambda prompt, steps: block_decode(model, prompt, length, B, "steps", steps)
    taken, _ = clock(cfg, world, 3.0)({"ar": lambda p: ar_decode(model, p, length)[0], **{s: lambda p, s=s: decode(p, s).tokens for s in near}}, batch)
    forwards = [float(decode(tensors(world.test, range(1), device_of(cfg))[0], s).forwards[0]) for s in near]
    cost = [ratio(taken, s, "ar") for s in near]  # time over that of AR
    wanted = length / per_forward
    part = (wanted - forwards[0]) / (forwards[1] - forwards[0]) if forwards[0] != forwards[-1] else 0.0
    return {"speedup": 1 / (cost[0] + part * (cost[-1] - cost[0])), "batch": batch, "length": length, "steps": near, "forwards": forwards,
            "rounds": len(taken["ar"])}


def fit(points, rows=False):
    """Least squares of seconds = a + b width batch (+ c batch with rows: each row reads its own keys, however few ask), every point
    in units of itself: [(width, batch, seconds)] -> [a, b] or [a, b, c]."""
    w, n, t = np.array(points, float).T
    columns = (1 / t, w * n / t, n / t)[:3 if rows else 2]
    return np.linalg.lstsq(np.stack(columns, axis=1), np.ones(len(t)), rcond=None)[0].tolist()


def forward_cost(of, width, batch):
    """Seconds of a forward by the cost model `of`, [a, b] or [a, b, c]."""
    return float(np.dot(of, (1, width * batch, batch)[:len(of)]))


def predicted(of, B, P, batch, length, per_forward):
    """Speed-up by the cost model alone, with the widths of `efficiency`."""
    t, F, blocks = lambda width: forward_cost(of, width, batch), length / per_forward, math.ceil(length / B)
    return (t(P) + (length - 1) * t(1)) / (t(P + B) + (blocks - 1) * t(2 * B) + max(0, F - blocks) * t(B))


def crossover(points):
    """Batch at which the speed-up falls below 1, between measured batches on a logarithmic axis, or None: [(batch, speedup)] -> float."""
    for (n, s), (m, r) in zip(points, points[1:]):
        if s >= 1 > r:
            return float(np.exp(np.interp(0, [-math.log(s), -math.log(r)], [math.log(n), math.log(m)])))


def curves(cfg, world, teacher, student, count):
    """The curves of speed.json, and the cost model with the crossover batch."""
    f, B, P = count["tokens_per_forward"], cfg.block_size, tensors(world.test, range(64), "cpu")[0].shape[1]
    length, out, points = max(B, math.ceil(count["tokens_per_response"] / B) * B), [], []
    model = new_model(cfg, world).eval()
    for batch in BATCHES:
        t = forward_seconds(cfg, model, batch, sorted({1, max(1, B // 2), B, 2 * B}), P + B + length, cfg.eval_speed_seconds / 2)
        points += [(w, batch, s) for w, s in t.items()]
    two, three = fit(points), fit(points, rows=True)
    for name, grid in (("length", [(1, n) for n in LENGTHS]), ("batch", [(n, length) for n in BATCHES])):
        for batch, n in grid:
            out.append({"against": name, **scaled(cfg, world, batch, n, f), "tokens_per_forward": f, "model": predicted(two, B, P, batch, n, f),
                        "model_rows": predicted(three, B, P, batch, n, f)})
    for change in [{"block_size": n} for n in sorted({*BLOCKS, B})] + [{"tau": t} for t in map(float, cfg.eval_taus.split(",")) if t != cfg.tau]:
        there = dataclasses.replace(cfg, **change)
        taken, _ = clock(cfg, world, 2.0)(decoders(there, world, teacher, student), 1)
        out.append({"against": next(iter(change)), "block_size": there.block_size, "tau": there.tau, "speedup": ratio(taken, "ar", "student"),
                    "batch": 1, **counts(there, world, student, cfg.eval_curve_users)})
    on = lambda key: [(c["batch"], c[key]) for c in out if c["against"] == "batch"]
    error = lambda of: float(np.median([abs(forward_cost(of, w, n) / t - 1) for w, n, t in points]))
    model = lambda of: {"a_ms": 1000 * of[0]} | {f"{name}_us": 1e6 * v for name, v in zip("bc", of[1:])} | {"median_error": error(of)}
    cost = {**model(two), "rows": model(three), "length": length, "prompt": P, "crossover_batch": crossover(on("speedup")),
            "crossover_batch_model": crossover(on("model")), "crossover_batch_model_rows": crossover(on("model_rows")),
            "forwards": [{"width": w, "batch": n, "ms": 1000 * t} for w, n, t in points]}
    return out, cost


# --- The run ---------------------------------------------------------------------------------------------------------------

def decoders(cfg, world, teacher, student, others=()):
    """{name: decode(prompt) -> tokens} of AR, the student at the operating point, and the AR models of other runs."""
    out = {"ar": lambda p: ar_decode(teacher, p, world.max_response)[0],
           "student": lambda p: serve(cfg, student, p, world.max_response).tokens}
    return out | {name: lambda p, m=m: ar_decode(m, p, world.max_response)[0] for name, m in dict(others).items()}


def beside(cfg, world):
    """AR models of other runs, as evaluate's --beside names them: {name: model} of every name=folder:ar."""
    path = lambda where: os.path.join(where, f"seed{cfg.seed}", "ar", "checkpoint.pt")
    return {name: start_from(dataclasses.replace(cfg, init=path(where)), world, None)
            for name, where, stage in parse_beside(cfg) if stage == "ar"}


def git_hash():
    """The commit that is checked out, or None."""
    try:
        return subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def main(cfg):
    start, world = time.perf_counter(), load_world(cfg)
    teacher = load_stage(cfg, "ar", world)[0]
    (stage, student), others = last_student(cfg, world), beside(cfg, world)
    count = counts(cfg, world, student)
    taken = {n: clock(cfg, world, 5.0 if n == 1 else 2.0)(decoders(cfg, world, teacher, student, others if n == 1 else ()), n)[0] for n in (1, 8, 64)}
    key = {"config": cfg.config, "device": device_name(cfg), "threads": cfg.threads}
    run = {**key, "commit": git_hash(), "torch": torch.__version__, "stage": stage, "seed": cfg.seed,
           "operating_point": {"block_size": cfg.block_size, "commit": cfg.commit, "tau": cfg.tau, "clash": cfg.clash}, **count}
    run |= {f"speedup_b{batch}": ratio(taken[batch], "ar", "student") for batch in taken} | {"rounds_b1": len(taken[1]["ar"])}
    run["latency_ms"] = {name: dict(zip(("p50", "p95"), (1000 * np.quantile(t[:, 0], (0.5, 0.95))).tolist())) for name, t in taken[1].items()}
    P = round(float((world.test.prompt != PAD).sum(1).mean()))
    run |= efficiency(cfg, student, P, count, run["speedup_b1"])
    run |= peers.compare(cfg, world.max_response, teacher, student, clock(cfg, world, 3.0), ratio)
    lines, run["cost"] = curves(cfg, world, teacher, student, count)
    run["training"] = training(cfg, world)
    run["seconds"] = time.perf_counter() - start
    try:  # what other devices and numbers of threads have written stays
        before = json.load(open(folder(cfg, "speed.json")))
    except (OSError, ValueError):
        before = {"runs": [], "curves": []}
    kept = lambda name: [r for r in before[name] if any(r[k] != v for k, v in key.items())]
    result = {"runs": kept("runs") + [run], "curves": kept("curves") + [{**key, **c} for c in lines]}
    save_atomically(folder(cfg, "speed.json"), lambda p: open(p, "w").write(json.dumps(result, indent=1) + "\n"))
    save_atomically(folder(cfg, "speed.md"), lambda p: open(p, "w").write("\n".join(
        markdown(r, [c for c in result["curves"] if all(c[k] == r[k] for k in key)]) for r in result["runs"])))
    figure(run, lines, folder(cfg, "cost.png"))
    print(f"\n{markdown(run, lines)}\nwritten: {folder(cfg)}/speed.json, speed.md, cost.png ({run['seconds']:.0f} s)")


# --- What is shown ---------------------------------------------------------------------------------------------------------

def table(head, rows):
    """Markdown: head and rows are lists of cells; numbers get two digits."""
    cell = lambda v: "–" if v is None else f"{v:.2f}" if isinstance(v, float) else str(v)
    line = lambda cells: "| " + " | ".join(map(cell, cells)) + " |"
    return "\n".join((line(head), "|---" * len(head) + "|", *map(line, rows), ""))


def markdown(run, lines):
    """One run as tables."""
    point, cost, percent = run["operating_point"], run["cost"], lambda v: f"{100 * v:.1f} %"
    short = lambda v: "–" if v is None else f"{v:.0f}"
    same = lambda v: (f"{percent(v['identical'])} of {v['n']}", f"{v['differ']}, {v.get('ties', v.get('equal_in_float64'))}")
    hf, block, compared = run["ar_vs_transformers"], run["sampler_vs_peers"], []
    if hf:
        compared += [("AR", f"transformers {hf['version']} generate, {hf[f'cache_b{n}']} cache, batch {n}", hf[f"ratio_b{n}"], *same(hf[f"agreement_b{n}"])) for n in (1, 64)]
    for name, v in (block or {}).items():
        compared.append((f"student, threshold {v['tau']}, {v['forwards']['ours']:.1f} forwards",
                         f"{name}, batch 1, {v['forwards']['theirs']:.1f} forwards", v["ratio_b1"], *same(v)))
    compared += [("student", f"prompt lookup of AR, batch 1: {name} ({v['speedup_over_ar']:.2f} × AR)", v["ratio"], "AR's: " + same(v)[0], same(v)[1])
                 for name, v in run["vs_prompt_lookup"]["of"].items()]
    return "\n".join((
        f"## {run['config']}, {run['device']}\n",
        f"{run['stage']}, block size {point['block_size']}, {point['commit']} {point['tau']}, clash {point['clash']}; {run['n_users']} users; torch {run['torch']}, "
        f"commit {(run['commit'] or 'none')[:10]}. × AR: tokens/s over AR's, the median of alternating rounds.\n",
        table(("tokens a forward", "evidence tokens a forward", "forwards", "valid", "× AR, batch 1", "batch 8", "batch 64", "efficiency, batch 1"),
              [(run["tokens_per_forward"], run["evidence_tokens_per_forward"], run["forwards_per_response"], percent(run["valid"]),
                *(run[f"speedup_b{n}"] for n in (1, 8, 64)), run["efficiency_b1"])]),
        f"A forward of the student costs {run['cost_ratio']:.2f} of AR's at batch 1 (one block wide to one token wide: {run['cost_ratio_block_to_1']:.2f}). "
        f"The forwards alone of a response: AR {run['bare_ms']['ar']:.1f} ms, student {run['bare_ms']['student']:.1f} ms.\n",
        table(("ms a response, batch 1", "p50", "p95"), [(name, t["p50"], t["p95"]) for name, t in run["latency_ms"].items()]),
        table(("ours", "peer", "ours is × as fast", "identical responses", "differ, by round-off"), compared), *(f"Not measured: {reason}.\n" for reason in run["missing"]),
        f"Random weights, {run['tokens_per_forward']:.2f} tokens a forward. Model: {cost['a_ms']:.3f} ms + {cost['b_us']:.2f} µs × width × batch, median error "
        f"{percent(cost['median_error'])}; with rows, {cost['rows']['a_ms']:.3f} ms + {cost['rows']['b_us']:.2f} µs × width × batch + {cost['rows']['c_us']:.2f} µs × batch, "
        f"median error {percent(cost['rows']['median_error'])}. The speed-up falls below 1 at batch {short(cost['crossover_batch'])} (model: "
        f"{short(cost['crossover_batch_model'])}; with rows: {short(cost['crossover_batch_model_rows'])}).\n",
        table(("against", "batch", "length", "× AR", "model", "with rows"), [[c[k] for k in ("against", "batch", "length", "speedup", "model", "model_rows")] for c in lines if "model" in c]),
        f"The real student, batch 1; counts of the first {lines[-1]['n_users']} users.\n",
        table(("block size", "tau", "× AR", "tokens a forward", "valid"),
              [(c["block_size"], str(c["tau"]), c["speedup"], c["tokens_per_forward"], percent(c["valid"])) for c in lines if "valid" in c]),
        "Training: seconds of a step, and its three largest costs.\n",
        table(("stage", "s a step", "× an AR step", "largest", "second", "third"),
              [(stage, f"{t['step']:.3f}", t["step"] / run["training"]["ar"]["step"],
                *(f"{name}, {percent(s / t['step'])}" for name, s in list(t["parts"].items())[:3])) for stage, t in run["training"].items()])))


def figure(run, lines, path):
    """cost.png: the speed-up against batch, length, and what the real student's block size and tau make of it."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(1, 3, figsize=(15, 4.2))
    for ax, name, label in ((axes[0], "batch", "batch"), (axes[1], "length", "output length (tokens), batch 1")):
        found = [c for c in lines if c["against"] == name]
        ax.plot([c[name] for c in found], [c["speedup"] for c in found], "o-", label="random weights, measured")
        ax.plot([c[name] for c in found], [c["model"] for c in found], "k--", label="cost model: a + b × width × batch")
        ax.plot([c[name] for c in found], [c["model_rows"] for c in found], "k:", label="… + c × batch")
        ax.set(xscale="log", xlabel=label, ylabel="× AR", title=f"speed-up at {run['tokens_per_forward']:.1f} tokens a forward")
        ax.set_xticks([c[name] for c in found], [c[name] for c in found])
        ax.minorticks_off()
    axes[0].plot((1, 8, 64), [run[f"speedup_b{n}"] for n in (1, 8, 64)], "s", label="the student, measured")
    axes[0].axhline(1, color="#999999", lw=0.8)
    for name in ("block_size", "tau"):
        here = lambda c: c["against"] == name or "valid" in c and (c["block_size"], c["tau"]) == tuple(run["operating_point"][k] for k in ("block_size", "tau"))
        found = sorted((c[name], c["tokens_per_forward"], c["speedup"]) for c in lines if here(c))
        axes[2].plot([x for _, x, _ in found], [y for *_, y in found], "o-", label=name.replace("_", " "))
        for value, x, y in found:
            axes[2].annotate(f"{value:g}", (x, y), textcoords="offset points", xytext=(4, 4), fontsize=8)
    axes[2].set(xlabel="tokens a forward", ylabel="× AR, batch 1", title="the real student")
    for ax in axes:
        ax.set_ylim(0)
        ax.legend(fontsize=8)
    fig.tight_layout()
    fig.savefig(path, dpi=130, facecolor="white")
    plt.close(fig)


if __name__ == "__main__":
    script(main, __doc__)
