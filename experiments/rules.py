"""Every published commit rule on one task: which slots of a block are committed in a step?

    python experiments/rules.py --config toy --seeds 0,1,2

Each rule has one dial. The CFT student is decoded greedily at every value of it, on the same test
users. Nothing is chosen: the whole curves are the result. Writes results/rules.json, where the
entries of other configs stay, and results/rules.png. An entry:

    rule      threshold (the paper), factor, certificate, entropy, stability, conflicts, apart
              (ours), number (a fixed number of slots a step; 1: the surest one alone), or
              at once (the whole answer to a reference trace, in one forward)
    dial      its values; of `at once` the temperature, where 0 is greedy
    points    [forwards, valid, N@10] at each value, means over users and seeds. An invalid answer
              counts 0 in N@10

PUNT (arXiv 2510.21961) is not here: it tests slots for independence with forwards of its own, and
a rule of this sampler is given one forward a step. `conflicts` judges pairs from that one.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import dataclasses
import json
import math
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

from data import EOS, LABEL, MASK, after_first, examples_of, joined, tensors
from evaluate import score
from ours.commit import Apart
from plumbing.checkpoint import load_stage, made_by
from plumbing.processes import device_of
from plumbing.script import script
from plumbing.settings import Text, UserError, Whole
from report.figures import forwards_axis, save_figure
from report.table import chosen_seeds, plain, write_text
from sampler import Threshold, block_decode
from trainer import decode_split, load_world, rng_for, sampling_on


@dataclass(frozen=True)
class Options:
    seeds: Text() = ""              # such as 0,1,2; empty: that of --seed
    users: Whole(1, 10 ** 6) = 500  # test users, at most
    into: Text() = "results"        # the folder of rules.json and rules.png


# --- The rules: choose(logp (N, B, V), open_ (N, B), forced (N, B)) -> (N, B), as in sampler.py --

def entropy_of(p):
    """Entropies in nats: distributions p (..., V) -> (...,)."""
    return -torch.xlogy(p, p).sum(-1)


def progress(chosen, key, open_, forced):
    """chosen (N, B), with the forced slots; of a row without any, the slot of the highest key."""
    best = F.one_hot(torch.where(open_, key, -math.inf).argmax(1), key.shape[1]).bool()
    chosen = (chosen & open_) | forced
    return chosen | (best & ~chosen.any(1, keepdim=True))


def first(key, open_, forced, allows):
    """The n open slots of the highest keys (N, B), with the largest n that is allowed:
    allows(keys in descending order (N, B), their places 1, 2, ... (B,)) -> bool (N, B)."""
    ordered, slot = torch.where(open_, key, -math.inf).sort(dim=1, descending=True, stable=True)
    place = torch.arange(1, key.shape[1] + 1, device=key.device)  # (B,)
    n = (allows(ordered, place) * place).amax(-1, keepdim=True)   # (N, 1)
    return progress(slot.argsort(1) < n, key, open_, forced)      # argsort: the place of each slot


@dataclass(frozen=True)
class Number:
    """A fixed number of slots a step, the surest ones; 1 is one token at a time."""
    n: int

    def choose(self, logp, open_, forced):
        key = logp.amax(-1).masked_fill(forced, 1.0)  # a forced slot goes first
        return first(key, open_, forced, lambda _, n: n <= self.n)


@dataclass(frozen=True)
class Factor:
    """The n surest slots, with the largest n for which (n + 1) (1 - c_n) < factor; c_n is the
    confidence of the least sure of them (Fast-dLLM, arXiv 2505.22618)."""
    factor: float

    def choose(self, logp, open_, forced):
        return first(logp.amax(-1).exp(), open_, forced,
                     lambda c, n: (n + 1) * (1 - c) < self.factor)


@dataclass(frozen=True)
class Certificate:
    """The n surest slots, with the largest n that is certified by a margin: all are right with
    probability 1 - sum of (1 - c_i) at least, whatever their dependence, and any other choice has
    1 - c_n at most (Fast-dLLM++, arXiv 2606.02955)."""
    margin: float

    def choose(self, logp, open_, forced):
        return first(logp.amax(-1).exp(), open_, forced, lambda c, n: (
            (1 - (1 - c).cumsum(1)).clamp(min=0) - (1 - c) > self.margin))


@dataclass(frozen=True)
class Entropy:
    """The n slots of the least entropy, with the largest n for which their entropies, without the
    largest one, sum up to at most a budget in nats (EB-Sampler, arXiv 2505.24857)."""
    budget: float

    def choose(self, logp, open_, forced):
        return first(-entropy_of(logp.exp()), open_, forced,
                     lambda key, n: key - key.cumsum(1) <= self.budget)


@dataclass(frozen=True)
class Stability:
    """What is surer than tau and has hardly moved in the last two steps, KL(now || the step
    before) < .01 in both (KLASS, arXiv 2511.05664). For greedy decoding: the rule keeps the step
    before, and to know which rows stay in the batch it must know what they commit."""
    tau: float
    before: dict = field(default_factory=dict, compare=False)

    def choose(self, logp, open_, forced):
        key = logp.amax(-1).exp()                                 # (N, B)
        calm = stable = torch.zeros_like(open_)
        if not forced.any():  # slot 0 is forced in the first step of a block, and in no other
            calm = (logp.exp() * (logp - self.before["logp"])).sum(-1) < 0.01
            stable = calm & self.before["calm"]
        chosen = progress((key > self.tau) & stable, key, open_, forced)
        ended = after_first(torch.where(chosen, logp.argmax(-1), MASK), EOS)
        stays = (open_ & ~chosen & ~ended).any(1)                 # (N,) a full block waits outside
        self.before.update(logp=logp[stays], calm=calm[stays])
        return chosen


@dataclass(frozen=True)
class Conflicts:
    """What two rounds of q_i = sigmoid(c_i - sum over j of D_ij q_j) leave at tau or above. c_i is
    log p(best token) - log p(second), and D_ij, relative to its largest value, says how alike two
    slots are: 1 - JSD / log 2 (mean field, arXiv 2606.15805)."""
    tau: float

    def choose(self, logp, open_, forced):
        p, B = logp.exp(), logp.shape[1]
        best, second = logp.topk(2).values.unbind(-1)             # (N, B)
        h = entropy_of(p)                                         # (N, B)
        jsd = torch.stack([entropy_of((p + p[:, i, None]) / 2) - (h + h[:, i, None]) / 2
                           for i in range(B)], dim=1)             # (N, B, B); a loop saves memory
        pair = open_[:, None] & open_[:, :, None] & ~torch.eye(B, dtype=bool, device=p.device)
        alike = (1 - jsd / math.log(2)).clamp(min=0) * pair
        alike /= alike.amax((1, 2), keepdim=True).clamp(min=1e-9)
        q = (best - second).sigmoid()                             # (N, B)
        for _ in range(2):
            q = (best - second - (alike @ q[..., None])[..., 0]).sigmoid()
        return progress(q >= self.tau, q, open_, forced)


def rules_of(cfg):
    """{name: the rule at each value of its dial, from slow to fast}."""
    taus = (0.99, 0.9, 0.7, 0.5, 0.3, 0.1)
    labels = range(LABEL, LABEL + cfg.n_labels)
    return {
        "threshold": [Threshold(tau) for tau in taus],
        "factor": [Factor(x) for x in (0.1, 0.3, 1.0, 2.0, 4.0, 10.0)],
        "certificate": [Certificate(x) for x in (0.97, 0.9, 0.7, 0.3, 0.0, -0.5)],
        "entropy": [Entropy(x) for x in (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)],
        "stability": [Stability(tau) for tau in taus],
        "conflicts": [Conflicts(tau) for tau in (0.99, 0.95, 0.9, 0.7, 0.5, 0.3)],
        "apart": [Apart(tau, labels) for tau in taus],
        "number": [Number(n) for n in (1, 2, 4, 8, 16, 64)]}


# --- The measurement ----------------------------------------------------------------------------

def point(world, split, tokens, forwards):
    """[forwards, valid, N@10] of responses (N, R)."""
    scores = score(world, split, tokens, forwards)
    return [scores[name].mean() for name in ("forwards", "valid", "strict ndcg@10")]


def by_rule(cfg, world, split, model, rule):
    def decoder(prompt, max_len):
        return block_decode(model, prompt, max_len, cfg.block_size, rule)
    written, forwards = decode_split(cfg, world, split, decoder)
    return point(world, split, joined(written), forwards)


def at_once(cfg, world, split, model, temperature):
    """The point of answers to the reference traces, each written in one forward."""
    device, max_len = device_of(cfg), world.longest[cfg.trace][-1]
    prompt, _ = tensors(examples_of(split, cfg.trace)[-1], range(len(split)), device)  # (N, P)
    sampling = sampling_on(device, temperature, rng_for(cfg, "at once", 0))
    done = block_decode(model, prompt, max_len, max_len, Number(max_len), sampling)
    return point(world, split, done.tokens.cpu().numpy(), done.forwards.cpu().numpy())


def measured(cfg, options):
    """The entries of a config, a dict for each rule."""
    world, seeds, points = load_world(cfg), chosen_seeds(cfg, options.seeds), {}
    split = world.test.take(slice(0, options.users))
    rules, temperatures = rules_of(cfg), (0.0, 1.0)
    for seed in seeds:
        of_seed = dataclasses.replace(cfg, seed=seed)
        asked = of_seed, world, split, load_stage(of_seed, "cft", world)[0]
        for name, found in rules.items():
            points.setdefault(name, []).append([by_rule(*asked, rule) for rule in found])
            print(f"seed {seed}, {name}: done", flush=True)
        points.setdefault("at once", []).append([at_once(*asked, x) for x in temperatures])
    # The dial of a rule is its first field.
    dials = {name: [next(iter(vars(rule).values())) for rule in found]
             for name, found in rules.items()}
    dials["at once"], made = temperatures, made_by(cfg)
    return [{"config": cfg.config, "rule": name, "seeds": seeds, "users": len(split),
             "dial": dials[name], "points": np.mean(of_seeds, axis=0).tolist(), "made_by": made}
            for name, of_seeds in points.items()]


def drawn(entries):
    """The figure: a panel for each config, a line for each rule."""
    configs = list(dict.fromkeys(entry["config"] for entry in entries))
    figure = Figure(figsize=(6 * len(configs), 4.5))
    (panels,) = figure.subplots(1, len(configs), squeeze=False)
    for axes, config in zip(panels, configs):
        for entry in entries:
            if entry["config"] == config and entry["rule"] != "at once":
                forwards, valid, _ = zip(*entry["points"])
                axes.plot(forwards, [100 * x for x in valid], "o-", ms=4, lw=1.2,
                          label=entry["rule"])
        axes.set(title=config, ylabel="valid answers, %")
        forwards_axis(axes)
    axes.legend(fontsize=8)
    return figure


def main(cfg, options):
    if cfg.trace == "free":
        raise UserError("with --trace free an answer is no request of its own, and cannot be "
                        "written at once: use a run with --trace bound")
    path, entries = Path(options.into, "rules.json"), plain(measured(cfg, options))
    there = json.loads(path.read_text("utf-8")) if path.exists() else []
    entries += [entry for entry in there if entry["config"] != cfg.config]
    entries.sort(key=lambda entry: entry["config"], reverse=True)  # toy before small
    write_text(path, "[\n" + ",\n".join(map(json.dumps, entries)) + "\n]\n")
    save_figure(path.with_suffix(".png"), drawn(entries))
    print(f"written: {path} and .png")


if __name__ == "__main__":
    script(main, __doc__, Options)
