"""Graders of the assignments in docs/exercises.md.

    pytest tests/test_exercises.py -k joint        # fails until assignment 2 is done
    UNTOUCHED=1 pytest tests/test_exercises.py     # passes if every grader fails: for the code
                                                   # as it is given

A grader computes what it asks for a second time, plainly, on random inputs. It fails by an
assertion and by nothing else, so with UNTOUCHED one that breaks for a reason of its own is seen.
"""
import importlib
import itertools
import json
import math
import os
import sys

import numpy as np
import pytest
import torch

import train_rl
from conftest import ROOT, gen, left_padded, tiny_gpt, words
from config import Config
from data import EOS, MASK, PAD
from diffusion import fill_last_block, read_blocks
from model import ar_decode
from plumbing.settings import UserError, parse_args
from train_cft import cft_loss
from trainer import rule_of

UNTOUCHED = bool(os.environ.get("UNTOUCHED"))
NAMED = any("test_exercises" in word for word in sys.argv)  # by whoever started pytest


def grader(test):
    """Marks a grader. It runs if this file is named, or if it should fail (UNTOUCHED)."""
    test = pytest.mark.skipif(not (NAMED or UNTOUCHED), reason="an assignment")(test)
    return pytest.mark.xfail(UNTOUCHED, reason="not solved in the code as it is given",
                             strict=True, raises=AssertionError)(test)


def expect(true, message):
    """An assertion whose failure shows the message and nothing else."""
    __tracebackhide__ = True
    if not true:
        raise AssertionError(message)


def near(found, wanted, tolerance, message):
    __tracebackhide__ = True
    found, wanted = np.asarray(found, dtype=float), np.asarray(wanted, dtype=float)
    expect(found.shape == wanted.shape,
           f"{message}: the shape is {found.shape}, it should be {wanted.shape}")
    expect(np.all(abs(found - wanted) <= tolerance),
           f"{message}: found {found.round(6).tolist()}, expected {wanted.round(6).tolist()}")


def work(module, name):
    """The student's function or class."""
    found = getattr(importlib.import_module(module), name, None)
    expect(found, f"{module} has no {name} yet: docs/exercises.md says what it takes")
    return found


def read(*parts):
    """A JSON file, its path from the repository's root."""
    path = os.path.join(ROOT, *parts)
    expect(os.path.exists(path), f"{path} is missing: docs/exercises.md says what writes it")
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def answer(assignment):
    found = read("answers.json").get(assignment)
    expect(isinstance(found, dict), f"answers.json has no entry {assignment!r}")
    return found


# --- 1: is a difference real? -------------------------------------------------------------------

@grader
def test_difference_signflip():
    p_of, rng = work("evaluate", "sign_flip_test"), np.random.default_rng(1)
    for case in range(12):
        n = int(rng.integers(3, 11))
        b = rng.random(n)
        a = b + (rng.integers(-3, 4, n) / 10 if case % 2 else rng.normal(0.4, 1, n))
        d = a - b
        sums = np.array(list(itertools.product([-1, 1], repeat=n))) @ d
        exact = (abs(sums) > abs(d.sum()) - 1e-9).mean()
        for x, y in ((a, b), (b, a)):
            near(p_of(x, y, n_draws=20000), exact, 0.018,
                 f"p of the differences {(x - y).round(2).tolist()}")
    zero = rng.random(30)
    near(p_of(zero, zero), 1.0, 1e-12, "p of two equal score vectors")
    near(p_of(zero + 1, zero, n_draws=999), 1 / 1000, 1e-12,
         "p of a difference that no draw reaches: the observed signs count as one draw")


@grader
def test_difference_users():
    users_needed, rng = work("evaluate", "users_needed"), np.random.default_rng(0)

    def power(n, sd, difference):  # P(|Z| > 1.96) for Z ~ N(difference sqrt(n) / sd, 1)
        shift = difference * math.sqrt(n) / sd
        return sum(math.erfc((1.959964 + sign * shift) / math.sqrt(2)) / 2 for sign in (1, -1))

    for _ in range(40):
        sd = rng.uniform(0.02, 2)
        difference = sd * rng.uniform(0.01, 0.4) * rng.choice([-1, 1])
        n = users_needed(sd, difference)
        enough, fewer = power(n, sd, difference), power(n - 1, sd, difference)
        expect(enough > 0.8 - 1e-5 and fewer < 0.8 + 1e-5,
               f"users_needed({sd:.4f}, {difference:.5f}) gives {n}: they have a power of "
               f"{enough:.6f}, one fewer {fewer:.6f}")
    found = answer("difference")
    rows = [row for row in read("results", "small", "report.json")["rows"]
            if row["stage"] == "opd" and row["seed"] != "mean"]
    share = [row["differ_from_cft"]["recall@1"] / row["n_users"] for row in rows]
    sd = np.sqrt(np.mean(share) - np.mean([row["diff_to_cft"]["recall@1"][1] ** 2 for row in rows]))
    for name, wanted in (("sd", sd), ("users_opd", users_needed(sd, 0.0014)),
                         ("users_rl", users_needed(sd, 0.0007))):
        near(found.get(name, math.nan), wanted, 0.03 * wanted, f'answers.json, "{name}"')


# --- 2: a commit rule ---------------------------------------------------------------------------

def plain_joint(p, forced, tau):
    """Slots to commit, by a loop: p {slot: confidence} of the open slots."""
    chosen, product = set(forced), math.prod(p[i] for i in forced)
    for i in sorted(p, key=lambda i: (-p[i], i)):
        if i not in forced:
            product *= p[i]
            if chosen and product <= tau:
                break
            chosen.add(i)
    return chosen


@grader
def test_joint():
    rule = work("sampler", "Joint")
    try:
        cfg = parse_args("", ["--commit", "joint", "--tau", "0.3"])
    except UserError as error:
        raise AssertionError(f"the command line does not know the rule: {error}")
    expect(rule_of(cfg) == rule(0.3), f"trainer.rule_of gives {rule_of(cfg)} for --commit joint "
                                      "--tau 0.3: it should be Joint(0.3)")
    rng, sizes = gen(0), []
    for tau in 10 * [0.05, 0.4, 0.8, 1.0]:
        logp = torch.log_softmax(12 * torch.rand(8, 6, 5, generator=rng), dim=-1)
        open_ = torch.rand(8, 6, generator=rng) < 0.7
        forced = torch.rand(8, 6, generator=rng) < 0.15
        open_[0] = False
        chosen = rule(tau).choose(logp, open_, forced & open_)
        for n in range(8):
            p = {i: logp[n, i].exp().max().item() for i in range(6) if open_[n, i]}
            must = {i for i in p if forced[n, i]}
            wanted, found = plain_joint(p, must, tau), set(chosen[n].nonzero()[:, 0].tolist())
            shown = {i: round(x, 3) for i, x in p.items()}
            expect(found == wanted, f"confidences of the open slots {shown}, forced {sorted(must)}"
                                    f", tau {tau}: chosen {sorted(found)}, not {sorted(wanted)}")
            sizes.append(len(wanted))
    assert {0, 1, 2, 3, 4} <= set(sizes)


# --- 3: curves over tau -------------------------------------------------------------------------

def chosen(*folder):
    """The row cft of report.json in a folder. Its tau must be the one that the validation users
    choose: fewest forwards of those with 99 % valid; where there is none, most valid answers."""
    test, val = read(*folder, "report.json"), read(*folder, "report_val.json")
    where = os.path.join(*folder)
    expect((test["split"], val["split"]) == ("test", "val"), f"{where}: reports of other users")
    for name in ("commit", "block_size"):
        expect(test["settings"][name] == val["settings"][name], f"{where}: two values of {name}")
    expect(test["seeds"] == val["seeds"], f"{where}: not the same seeds on both kinds of users")
    curve = [row for row in val["curve"] if row["stage"] == "cft"]
    expect(len(curve) >= 4, f"{where}: the curve of cft has fewer than four values of tau")
    good = [row for row in curve if row["valid"] >= 0.99]
    best = (min(good, key=lambda row: row["forwards"]) if good
            else max(curve, key=lambda row: row["valid"]))
    near(test["settings"]["tau"], best["tau"], 1e-9, f"{where}: tau of report.json")
    return next(row for row in test["rows"] if (row["stage"], row["seed"]) == ("cft", "mean"))


@grader
def test_curve():
    found = answer("curve")
    forwards = {rule: chosen("runs", "curve", rule, "toy")["forwards"]
                for rule in ("threshold", "apart")}
    for rule, wanted in forwards.items():
        near(found.get(rule, math.nan), wanted, 0.01, f'answers.json, "curve", "{rule}"')


# --- 4: the bound, exact ------------------------------------------------------------------------

@torch.no_grad()
def bound_by_orders(model, prompt, response, B):
    """The bound of one row without padding, (1, P) and (1, R), as a mean over orders: each shows
    the slots after the first one by one, and adds up -log p on the way -> nats."""
    text = fill_last_block(response, B)[0]
    orders, total = list(itertools.permutations(range(1, B))), 0.0
    for b in range(text.shape[1] // B):
        here, states, asked = text[0, b * B:(b + 1) * B], [], []
        for order in orders:
            for i, slot in enumerate((0, *order)):
                masked = torch.tensor([s in order[max(i - 1, 0):] for s in range(B)])
                states.append(torch.where(masked, MASK, here))
                asked.append(slot)
        block = torch.full((1, len(states)), b)
        hidden = read_blocks(model, prompt, text, torch.stack(states)[None], block)[1][0]
        every = range(len(asked))
        logp = torch.log_softmax(model.logits(hidden[every, asked]), dim=-1)
        total -= logp[every, here[asked]].sum().item() / len(orders)
    return total


@grader
def test_bound():
    exact = work("diffusion", "exact_bound")
    for B, lengths in ((1, [3, 5, 2]), (2, [4, 7, 1]), (3, [6, 2, 4]), (4, [4, 8, 5])):
        model, prompt = tiny_gpt(B), left_padded([4, 1, 6], seed=B)
        response = words(3, max(lengths), seed=B + 10)
        for row, length in zip(response, lengths):
            row[length - 1], row[length:] = EOS, PAD
        with torch.no_grad():
            found = exact(model, prompt, response, B)
        alone = [(p[p != PAD][None], r[r != PAD][None]) for p, r in zip(prompt, response)]
        near(found, [bound_by_orders(model, p, r, B) for p, r in alone], 1e-6,
             f"B = {B}: nats a row against the mean over all orders (at B = 1: AR's own)")
    # The last case is enough: what is estimated differs in no other.
    p, r = (x.repeat(200, 1) for x in alone[1])
    cfg = Config(block_size=B, answer_weight=1.0, cft_first_steps=0.0, cft_misplace=0.0,
                 cft_ar_weight=0.0, bfloat16=False)
    with torch.no_grad():
        draws = [cft_loss(cfg, model, p, r, gen(seed)).item() * r.shape[1] for seed in range(16)]
    near(found[1], np.mean(draws), 5 * np.std(draws, ddof=1) / 4,
         f"B = {B}: nats against the mean of cft_loss")


# --- 5: reward hacking --------------------------------------------------------------------------

def plain_effect(before, after, k, valid, alpha):
    """For each group: how many times as far apart the bonus puts two valid answers (1: not)."""
    without, paid = (
        train_rl.advantages(torch.from_numpy(
            train_rl.reward(before, after, k, valid, a, False)))[0].numpy() for a in (0.0, alpha))
    out = []
    for g in range(len(before)):
        slots = np.flatnonzero(valid[g])
        i, j = ((slots[after[g][slots].argmin()], slots[after[g][slots].argmax()])
                if len(slots) else (0, 0))
        apart = without[g, i] - without[g, j]
        out.append((paid[g, i] - paid[g, j]) / apart if apart else 1.0)
    return out


@grader
def test_bonus_effect():
    effect, rng, seen = work("train_rl", "bonus_effect"), np.random.default_rng(2), []
    for case in range(60):
        n = int(rng.integers(2, 9))
        k = np.repeat(rng.integers(2, 11, (12, 1)), n, axis=1)
        before = np.repeat(rng.integers(0, k[:, :1]), n, axis=1)
        stays = rng.random((12, n)) < rng.random((12, 1))
        after = np.where(stays, before, rng.integers(0, k))
        valid = rng.random((12, n)) < rng.choice([0.2, 0.7, 1.0], (12, 1))
        alpha = float(rng.choice([0.05, 0.1, 0.5, 2.0]))
        wanted = plain_effect(before, after, k, valid, alpha)
        found = np.asarray(effect(before, after, k, valid, alpha))
        expect(found.shape == (12,), f"bonus_effect gives the shape {found.shape}: one number a "
                                     "group is asked, (12,)")
        for g in range(12):
            near(found[g], wanted[g], 1e-3,
                 f"alpha {alpha}, list of {k[g, 0]}, target at {before[g, 0]}, answers put it at "
                 f"{after[g].tolist()}, valid {valid[g].tolist()}")
        seen += wanted
    assert min(seen) < 0.9 and max(seen) < 1.001 and 0.2 < np.mean(np.array(seen) > 0.999) < 0.9


# --- 6: another draft ---------------------------------------------------------------------------

def plain_lookups(prompt, tokens, n_gram, n_draft):
    """Forwards that lookup needs to write tokens after a prompt, both lists."""
    i, forwards = 0, 0
    while i < len(tokens):
        text, draft = prompt + tokens[:i], []
        for start in range(len(text) - n_gram) if i else ():  # the last one found stays
            if text[start:start + n_gram] == text[-n_gram:]:
                draft = text[start + n_gram:start + n_gram + n_draft]
        accepted = 0
        while accepted < len(draft) and draft[accepted:accepted + 1] == tokens[i + accepted:][:1]:
            accepted += 1
        i, forwards = i + accepted + 1, forwards + 1
    return forwards


@grader
def test_lookup():
    decode, saved = work("ours.lossless", "lookup_decode"), 0
    for seed, n_gram, n_draft in itertools.product((0, 4), (1, 2), (2, 8)):
        model, prompt = tiny_gpt(seed), left_padded([4, 1, 6, 9, 5], seed=seed)
        case = f"seed {seed}, n_gram {n_gram}, n_draft {n_draft}"
        truth, _, ar_forwards = ar_decode(model, prompt, 30)
        tokens, forwards = decode(model, prompt, 30, n_gram, n_draft)
        expect(tokens.shape == truth.shape and torch.equal(tokens, truth),
               f"{case}: the tokens are not those of ar_decode")
        wanted = [plain_lookups(p[p != PAD].tolist(), r[r != PAD].tolist(), n_gram, n_draft)
                  for p, r in zip(prompt, truth)]
        near(forwards, wanted, 0, f"{case}: forwards a row, counted from the texts")
        saved += int((ar_forwards - forwards).sum())
        widths = []
        hook = model.register_forward_pre_hook(lambda _, args: widths.append(args[0].shape[1]))
        one = decode(model, prompt[3:4], 30, n_gram, n_draft)[1]
        hook.remove()
        expect(len(widths) == int(one[0]), f"{case}: one row says {int(one[0])} forwards and ran "
                                           f"the model {len(widths)} times")
        widest = max(widths[1:], default=0)
        expect(widest <= 1 + n_draft, f"{case}: a forward after the first fed {widest} tokens")
    assert saved > 30  # else the grader's texts would not repeat


# --- 7: a noise schedule ------------------------------------------------------------------------

@grader
def test_schedule():
    noise, B, M = work("diffusion", "power_noise"), 4, 30000
    block = torch.zeros(2, M, dtype=torch.long)
    for power in (1.0, 1.5, 2.0):
        masked, weight = noise(block, B, power, gen(3))
        expect(masked.shape == weight.shape == (2, M, B) and masked.dtype == torch.bool,
               "masked must be bool, (N, M, B), and weight of the same shape")
        expect(not masked[..., 0].any() and (weight[..., 0] == 1).all(),
               "slot 0 is shown, and has weight 1")
        weight, masked = weight[..., 1:].flatten(0, 1).double(), masked[..., 1:].flatten(0, 1)
        expect((weight[~masked] == 0).all(), "a slot that is shown has weight 0")
        top = weight.amax(1, keepdim=True)
        expect(torch.equal(weight[masked], top.expand_as(weight)[masked]),
               "the masked slots of a segment have one weight: t is drawn for each segment")
        near(masked.double().mean(), 1 / (power + 1), 0.01,
             f"power {power}: share of masked slots, the mean of u ** power")
        for state in itertools.product([False, True], repeat=B - 1):
            k = sum(state)
            if k:
                each = top[:, 0] * (masked == torch.tensor(state)).all(1)
                wanted = math.factorial(k - 1) * math.factorial(B - 1 - k) / math.factorial(B - 1)
                near(each.mean(), wanted, 5 * each.std().item() / len(each) ** 0.5,
                     f"power {power}: expected weight of the state that masks {k} of {B - 1} "
                     "slots (docs/bound.md)")


# --- 8: a better trade-off ----------------------------------------------------------------------

@grader
def test_frontier():
    before, after = (chosen("runs", "mine", when) for when in ("before", "after"))
    seeds = before["seeds"]
    expect(len(seeds) >= 3 and after["seeds"] == seeds,
           f"seeds {seeds} before, {after['seeds']} after: take three or more, the same")
    expect(after["n_users"] == before["n_users"], "before and after are of other users")
    expect(after["forwards"] <= before["forwards"],
           f"{after['forwards']:.2f} forwards a response, before {before['forwards']:.2f}")
    expect(after["valid"] >= before["valid"] + 0.05,
           f"{after['valid']:.1%} valid, before {before['valid']:.1%}: 5 points more are asked")
    expect(after["served"]["ndcg@10"] >= before["served"]["ndcg@10"] - 0.01,
           "the rankings as served have become worse")
