"""Graders of the assignments in exercises.md.

    pytest tests/test_exercises.py -k power                 # a student's view: fails until the assignment is done
    RUN=runs/toy pytest tests/test_exercises.py -k opd_run  # graders that read a run take its folder from RUN
    UNTOUCHED=1 pytest tests/test_exercises.py              # ours: passes exactly if every grader fails on the code as it is given

Each grader computes what it asks for a second time, plainly, on random inputs. A grader fails by an assertion and nothing else, so
that with UNTOUCHED one that breaks for a reason of its own is seen.
"""
import importlib
import itertools
import json
import math
import os

import numpy as np
import pytest
import torch

import sampler
import train_rl
from conftest import ROOT, left_padded, tiny_gpt, words
from common import load_tensors
from config import Config, UserError, parse_args
from data import load_world
from diffusion import diffusion_loss, fill_last_block, segment_hidden
from model import EOS, MASK, PAD, ar_decode
from sampler import NEVER, block_decode

UNTOUCHED = bool(os.environ.get("UNTOUCHED"))
pytestmark = pytest.mark.xfail(UNTOUCHED, reason="not solved in the code as it is given", strict=True, raises=AssertionError)
T95 = {3: 4.303, 4: 3.182, 5: 2.776}  # 97.5 % quantile of Student's t for so many seeds (one degree of freedom less)


def expect(true, message):
    """An assertion whose failure shows the message and nothing else."""
    __tracebackhide__ = True
    if not true:
        raise AssertionError(message)


def function(module, name):
    """The student's function."""
    found = getattr(importlib.import_module(module), name, None)
    expect(found, f"{module}.py has no function {name} yet: exercises.md has its signature")
    return found


def read(todo, *parts, base=None):
    """A JSON file of the run that RUN names (or of the folder base); todo: what a student runs to have it."""
    folder = ("" if UNTOUCHED else os.environ.get("RUN", "")) if base is None else base
    expect(os.path.isdir(folder), f"RUN must name the folder of your run, not {folder!r}: {todo}")
    path = os.path.join(folder, *parts)
    expect(os.path.exists(path), f"{path} is missing: {todo}")
    if path.endswith(".pt"):
        return load_tensors(path)
    with open(path) as file:
        return [json.loads(line) for line in file] if path.endswith(".jsonl") else json.load(file)


def near(found, wanted, tolerance, message):
    """Assert that two arrays agree; a shape that differs is said too."""
    __tracebackhide__ = True
    found, wanted = np.asarray(found, dtype=float), np.asarray(wanted, dtype=float)
    expect(found.shape == wanted.shape, f"{message}: the shape is {found.shape}, it should be {wanted.shape}")
    expect(np.all(abs(found - wanted) <= tolerance), f"{message}: found {found.round(6).tolist()}, expected {wanted.round(6).tolist()}")


def t_interval(differences):
    """Mean and 95 % interval over seeds: (n,) -> mean, low, high."""
    n = len(differences)
    half = T95[n] * math.sqrt(sum((d - np.mean(differences)) ** 2 for d in differences) / (n - 1) / n)
    return np.mean(differences), np.mean(differences) - half, np.mean(differences) + half


# --- 1: power -------------------------------------------------------------------------------------------------------------

def plain_power(n, sd, difference, level):
    """P(|Z| > z) for Z ~ N(difference sqrt(n) / sd, 1), from erfc and a table."""
    above = lambda x: 0.5 * math.erfc(x / math.sqrt(2))
    z, shift = {0.01: 2.5758293, 0.05: 1.9599640, 0.1: 1.6448536}[level], difference * math.sqrt(n) / sd
    return above(z - shift) + above(z + shift)


def test_power():
    sd_of_flips, power_of, users_needed = (function("evaluate", f) for f in ("sd_of_flips", "power_of", "users_needed"))
    rng = np.random.default_rng(0)
    for _ in range(40):
        gained, lost = rng.integers(0, 300, 2)
        flips = np.repeat([1, -1, 0], [gained, lost, 1000 - gained - lost])
        near(sd_of_flips(gained / 1000, lost / 1000), flips.std(), 1e-9, f"sd_of_flips({gained / 1000}, {lost / 1000})")
        sd, level, power = rng.uniform(0.02, 2), rng.choice([0.01, 0.05, 0.1]), rng.choice([0.3, 0.5, 0.8, 0.9])
        difference, n = sd * rng.uniform(0.01, 0.4) * rng.choice([-1, 1]), int(rng.integers(2, 20000))
        case = f"sd {sd:.4f}, difference {difference:.5f}, level {level}"
        near(power_of(n, sd, difference, level), plain_power(n, sd, difference, level), 1e-6, f"power_of of {n} users, {case}")
        found = users_needed(sd, difference, level, power)
        enough, fewer = (plain_power(m, sd, difference, level) for m in (found, found - 1))
        expect(enough > power - 1e-6 and fewer < power + 1e-6,
               f"users_needed gives {found} for power {power}, {case}: they have {enough:.6f}, one fewer {fewer:.6f}")
    near(power_of(500, 0.3, 0.0, 0.05), 0.05, 1e-6, "power_of without a difference is the level")


def test_power_answer():
    answer = read("write it as exercises.md, 1 says", "answers.json", base=ROOT)
    expect(isinstance(answer.get("power"), dict), 'answers.json needs an entry "power": exercises.md, 1 has its fields')
    rows = read("it is part of the repository", "results", "small", "report.json", base=ROOT)["rows"]
    intervals = [r["diff_to_cft"]["recall@1"] for r in rows if r["stage"] == "opd" and r["reported"] and r["seed"] != "mean"]
    sd = math.sqrt(np.mean([((high - low) / 2 / 1.96) ** 2 * 1905 for low, _, high in intervals]))
    need = {name: next(n for n in itertools.count(1000, 50) if plain_power(n, sd, d, 0.05) > 0.8)
            for name, d in (("users_opd", 0.0014), ("users_rl", 0.0007))}
    least = next(d for d in np.arange(1e-4, 1, 1e-5) if plain_power(1615, sd, d, 0.05) > 0.8)
    for name, wanted in {"sd": sd, **need, "power_opd": plain_power(1615, sd, 0.0014, 0.05), "least": least}.items():
        near(answer["power"].get(name, math.nan), wanted, 0.03 * wanted, f'answers.json, "power", "{name}" (3 % is near enough)')


# --- 2: a sign-flip test ---------------------------------------------------------------------------------------------------

def test_signflip():
    p_of, rng = function("evaluate", "sign_flip_test"), np.random.default_rng(1)
    for case in range(12):
        n = int(rng.integers(3, 11))
        b = rng.random(n)
        a = b + (rng.integers(-1, 2, n) if case % 2 else rng.normal(0.4, 1, n))
        d = a - b
        sums = np.array(list(itertools.product([-1, 1], repeat=n))) @ d
        exact = (abs(sums) > abs(d.sum()) - 1e-9).mean()
        for x, y in ((a, b), (b, a)):
            near(p_of(x, y, n_draws=20000), exact, 0.018, f"p of the differences {d.round(2).tolist()}")
    zero = rng.random(30)
    near(p_of(zero, zero), 1.0, 1e-12, "p of two equal score vectors")
    near(p_of(zero + 1, zero, n_draws=999), 1 / 1000, 1e-12, "p of a difference that no draw reaches: the observed signs count as one draw")
    a = zero + rng.normal(0.1, 0.3, 30)
    expect(p_of(a, zero, n_draws=50, seed=3) == p_of(a, zero, n_draws=50, seed=3), "the same seed must give the same p")
    expect(len({p_of(a, zero, n_draws=50, seed=s) for s in range(20)}) > 1, "another seed must give other draws")
    null = [p_of(x, y, n_draws=400) for x, y in rng.normal(size=(400, 2, 25))]
    for level in (0.05, 0.2, 0.5):
        near(np.mean(np.array(null) <= level), level, 0.09 if level > 0.1 else 0.04, f"share of p <= {level} where there is no difference")


# --- 3: a commit rule by margin -----------------------------------------------------------------------------------------------

def test_margin():
    try:
        parse_args("", ["--commit", "margin"])
    except UserError as error:
        raise AssertionError(f"the command line does not know the rule: {error}")
    gen, several = torch.Generator().manual_seed(0), 0
    rand = lambda *size: torch.rand(*size, generator=gen)
    for case in range(30):
        N, B, V, tau = 8, 6, 5, [0.1, 0.4, 0.8, 1.0][case % 4]
        logp = torch.log_softmax(4 * rand(N, B, V), dim=-1)
        open_ = rand(N, B) < 0.7
        forced = open_ & (rand(N, B) < 0.1)
        chosen = sampler.choose(logp, open_, forced, "margin", tau)
        for n in range(N):
            margin = {}
            for i in range(B):
                if open_[n, i]:
                    first, second = sorted(logp[n, i].exp().tolist())[:-3:-1]
                    margin[i] = first - second
            wanted = {i for i in margin if margin[i] > tau or forced[n, i]} or ({max(margin, key=margin.get)} if margin else set())
            several += len(wanted) > 1
            found = set(chosen[n].nonzero()[:, 0].tolist())
            expect(found == wanted, f"margins of the open slots { {i: round(m, 3) for i, m in margin.items()} }, forced "
                                    f"{forced[n].nonzero()[:, 0].tolist()}, tau {tau}: chosen {sorted(found)}, should be {sorted(wanted)}")
    assert several > 20
    model, prompt = tiny_gpt(3), left_padded([4, 1, 6])
    for tau, step in ((1.0, [0, 1, 2, 3]), (-1.0, [0, 0, 0, 0])):  # the slow end and the fast end of the sampler
        decoded = block_decode(model, prompt, 12, 4, "margin", tau)
        for block in decoded.commit_step.view(-1, 4).tolist():
            taken = sorted(s for s in block if s != NEVER)
            expect(taken == step[:len(taken)], f"block_decode at tau {tau}: steps {taken} in a block, should be {step[:len(taken)]}")


# --- 4: the likelihood bound, exact ---------------------------------------------------------------------------------------------

def bound_by_orders(model, prompt, response, B):
    """The bound as a mean over orders: each shows the slots behind the first one by one; -log p summed along the way. prompt (1, P),
    response (1, R), one row without padding. Masks need not be weighted here: each is met as often as its weight says."""
    text = fill_last_block(response, B)[0]
    orders, total = list(itertools.permutations(range(1, B))), 0.0
    for b in range(text.shape[1] // B):
        here, states, asked = text[0, b * B:(b + 1) * B], [], []
        for order in orders:
            for i, slot in enumerate((0, *order)):
                hidden_slots = torch.tensor([s in order[max(i - 1, 0):] for s in range(B)])
                states.append(torch.where(hidden_slots, MASK, here))
                asked.append(slot)
        hidden = segment_hidden(model, prompt, text, torch.stack(states)[None], torch.full((1, len(states)), b))[0]
        logp = torch.log_softmax(model.logits(hidden[range(len(asked)), asked]), dim=-1)
        total -= logp[range(len(asked)), here[asked]].sum().item() / len(orders)
    return total


def test_bound():
    exact = function("diffusion", "exact_bound")
    with torch.no_grad():
        for B, lengths in ((1, [3, 5, 2]), (2, [4, 7, 1]), (3, [6, 2, 4]), (4, [4, 8, 5])):
            model, prompt = tiny_gpt(B), left_padded([4, 1, 6], seed=B)
            response = words(3, max(lengths), seed=B + 10)
            for row, length in zip(response, lengths):
                row[length - 1], row[length:] = EOS, PAD
            found = exact(model, prompt, response, B)
            alone = [(p[p != PAD][None], r[r != PAD][None]) for p, r in zip(prompt, response)]
            plain = [bound_by_orders(model, p, r, B) for p, r in alone]
            near(found, plain, 1e-6, f"B = {B}: nats a row against the mean over all orders of a block (at B = 1, AR's own)")
        p, r = (x.repeat(200, 1) for x in alone[1])  # the last case is enough: what is estimated differs in no other
        tokens = fill_last_block(r, B)[1][0].sum().item()
        draws = [diffusion_loss(model, p, r, B, generator=torch.Generator().manual_seed(s)).item() * tokens for s in range(16)]
        near(found[1], np.mean(draws), 5 * np.std(draws, ddof=1) / 4, f"B = {B}: nats against the mean of diffusion_loss")


# --- 5: does an unconditional format reward pay for copying? ---------------------------------------------------------------------

def test_bonus_exact():
    effect, rng, seen = function("train_rl", "bonus_effect"), np.random.default_rng(2), []
    for case in range(60):
        G, n = 12, int(rng.integers(2, 9))
        k = np.repeat(rng.integers(2, 11, (G, 1)), n, axis=1)
        before = np.repeat(rng.integers(0, k[:, :1]), n, axis=1)
        after = np.where(rng.random((G, n)) < rng.random((G, 1)), before, rng.integers(0, k))
        valid, alpha = rng.random((G, n)) < rng.choice([0.2, 0.7, 1.0], (G, 1)), float(rng.choice([0.05, 0.1, 0.5, 2.0]))
        found = np.asarray(effect(before, after, k, valid, alpha))
        expect(found.shape == (G,), f"bonus_effect gives the shape {found.shape}, should be one number a group, ({G},)")
        rewards = (torch.from_numpy(train_rl.reward(before, after, k, valid, a, False)) for a in (0.0, alpha))
        without, paid = (train_rl.advantages(r)[0].numpy() for r in rewards)
        for g in range(G):
            ranks = after[g][valid[g]]
            if len(set(ranks.tolist())) > 1:
                i, j = np.flatnonzero(valid[g])[[ranks.argmin(), ranks.argmax()]]
                wanted = (paid[g, i] - paid[g, j]) / (without[g, i] - without[g, j])
            else:
                wanted = 1.0
                near(paid[g], without[g], 1e-3, "the grader's own claim")
            seen.append(wanted)
            near(found[g], wanted, 1e-3, f"alpha {alpha}, list of {k[g, 0]}, target at {before[g, 0]}, answers put it at "
                                         f"{after[g].tolist()}, valid {valid[g].tolist()}")
    assert min(seen) < 0.9 and max(seen) < 1.001 and 0.2 < np.mean(np.array(seen) > 0.999) < 0.9


def test_bonus_run():
    todo = "run the six commands of exercises.md, 5"
    verdict, differences, kept = read(todo, "hack.json"), [], []
    for seed in (0, 1, 2):
        share = {}
        for conditional in (True, False):
            where = str(conditional).lower(), "toy", f"seed{seed}", "rl"
            state, lines = read(todo, *where, "checkpoint.pt"), read(todo, *where, "metrics.jsonl")
            settings = dict(state["settings"])
            right = settings.pop("rl_conditional") is conditional and settings.pop("seed") == seed
            expect(state["finished"] and len(lines) >= 30 and right,
                   f"{'/'.join(where)} is not a finished run of 30 steps or more with rl_conditional {conditional} and seed {seed}: {todo}")
            kept.append(settings)
            expect("copied" in lines[-1], f"{'/'.join(where)} does not log \"copied\", the share of answers that are valid and the identity")
            last = [line["copied"] for line in lines[-(len(lines) // 3):]]
            share[conditional] = sum(last) / len(last)
        differences.append(share[False] - share[True])
    expect(all(s == kept[0] for s in kept), "the six runs must differ in rl_conditional and seed only")
    check_verdict(verdict, t_interval(differences), ("copies more", "copies less", "unresolved"), "hack.json")


def check_verdict(found, wanted, words_of, name):
    """difference, low, high and the word for low > 0, high < 0, neither, as recomputed here."""
    mean, low, high = wanted
    for key, value in zip(("difference", "low", "high"), wanted):
        near(found.get(key, math.nan), value, 2e-4, f'{name}, "{key}", recomputed from the run')
    word = words_of[0] if low > 0 else words_of[1] if high < 0 else words_of[2]
    expect(found.get("verdict") == word, f"{name}: the interval [{low:.4f}, {high:.4f}] says {word!r}, not {found.get('verdict')!r}")


# --- 6: lossless drafts for the AR teacher ------------------------------------------------------------------------------------------

def plain_lookups(prompt, tokens, n_gram, n_draft):
    """Forwards that lookup needs to write tokens (a list) behind a prompt, from the texts alone."""
    i, forwards = 0, 0
    while i < len(tokens):
        text, draft = prompt + tokens[:i], []
        for start in range(len(text) - n_gram) if i else ():  # the last one found stays: the most recent
            if text[start:start + n_gram] == text[-n_gram:]:
                draft = text[start + n_gram:start + n_gram + n_draft]
        accepted = 0
        while accepted < len(draft) and draft[accepted:accepted + 1] == tokens[i + accepted:i + accepted + 1]:
            accepted += 1
        i, forwards = i + accepted + 1, forwards + 1
    return forwards


def test_lookup(monkeypatch):
    decode, saved = function("model", "lookup_decode"), 0
    for seed, n_gram, n_draft in itertools.product((0, 4), (1, 2), (2, 8)):
        model, prompt, case = tiny_gpt(seed), left_padded([4, 1, 6, 9, 5], seed=seed), f"seed {seed}, n_gram {n_gram}, n_draft {n_draft}"
        truth, _, ar_forwards = ar_decode(model, prompt, 30)
        tokens, forwards = decode(model, prompt, 30, n_gram, n_draft)
        expect(tokens.shape == truth.shape and torch.equal(tokens, truth), f"{case}: the tokens are not those of ar_decode")
        rows = [([t for t in p.tolist() if t != PAD], [t for t in r.tolist() if t != PAD]) for p, r in zip(prompt, truth)]
        near(forwards, [plain_lookups(p, r, n_gram, n_draft) for p, r in rows], 0, f"{case}: forwards a row, counted from the texts")
        saved += int((ar_forwards - forwards).sum())
        calls, plain = [], type(model).forward
        monkeypatch.setattr(type(model), "forward", lambda self, x, *a, **kw: (calls.append(x.shape[1]), plain(self, x, *a, **kw))[1])
        _, one = decode(model, prompt[3:4], 30, n_gram, n_draft)
        monkeypatch.undo()
        expect(len(calls) == int(one[0]), f"{case}: one row says {int(one[0])} forwards and ran the model {len(calls)} times")
        widest = max(calls[1:], default=0)
        expect(widest <= 1 + n_draft, f"{case}: forwards behind the first may feed {1 + n_draft} tokens, one fed {widest}")
    assert saved > 30  # else the grader's texts would not repeat


# --- 7: does OPD pay, against CFT for the same FLOPs? -----------------------------------------------------------------------------

def plain_verdict(ours, control, at, column):
    """Differences at matched forwards by a loop over the points of the curves; -> (matched, (mean, low, high))."""
    def meet(curve, x):
        within = [p[column] for p in curve if p[0] <= 1.02 * x]
        return max(within) if within else min(curve, key=lambda p: p[0])[column]
    matched = sum(c[at][0] for c in control) / len(control)
    return matched, t_interval([meet(o, matched) - meet(c, matched) for o, c in zip(ours, control)])


def test_opd_verdict():
    verdict, rng, words_seen = function("ablations", "verdict"), np.random.default_rng(3), set()
    for case in range(60):
        n, points, at, column = int(rng.integers(3, 6)), 6, int(rng.integers(6)), int(rng.integers(1, 3))
        shift, noise, x = rng.choice([-0.05, 0, 0.05]), rng.choice([0.002, 0.05]), np.sort(rng.uniform(4, 12, (2, n, points)))
        curves = np.stack((x, 1 - np.exp(-x / 2), 0.8 - np.exp(-x)), axis=-1) + rng.normal(0, noise, (2, n, 1, 3)) * [0, 1, 1]
        curves[0, ..., 1:] += shift
        if case % 3 == 0:
            curves[0, ..., 0] += 9  # a line that never gets to so few forwards: its fastest point counts
        ours, control = list(curves[0]), list(curves[1])
        found, (matched, wanted) = verdict(ours, control, at, column), plain_verdict(ours, control, at, column)
        near(found["matched"], matched, 1e-9, "forwards at which the lines are compared: the control's at its point `at`, mean over seeds")
        near([found[k] for k in ("difference", "low", "high")], wanted, 1e-6, "difference, low, high over paired seeds")
        check_verdict(found, wanted, ("pays", "harms", "unresolved"), "verdict()")
        words_seen.add(found["verdict"])
    assert words_seen == {"pays", "harms", "unresolved"}
    for a, b in ((2, 2), (3, 4)):
        try:
            verdict(ours[:1] * a, control[:1] * b, 0)
        except ValueError:
            continue
        raise AssertionError(f"{a} seeds against {b} must raise ValueError: an interval takes three pairs or more")


def test_opd_run():
    todo = "run the commands of exercises.md, 7"
    lines = {}
    for name, stage in (("as_it_is", "opd"), ("CFT_for_the_same_FLOPs", "cft")):
        where = "ablations", "opd", name, "toy"
        lines[stage] = [np.array(read(todo, *where, f"seed{s}", stage, "curve_independent.json")) for s in (0, 1, 2)]
        expect(all(c.shape == (5, 3) for c in lines[stage]), f"{name}: a curve has five points of three figures")
        expect(len({c.tobytes() for c in lines[stage]}) == 3, f"{name}: two seeds have the same curve")
    for metric, column in (("valid", 1), ("ndcg@10", 2)):
        wanted = plain_verdict(lines["opd"], lines["cft"], 1, column)[1]
        found = read(todo, "verdict_opd.json").get(metric, {})
        check_verdict(found, wanted, ("pays", "harms", "unresolved"), f"verdict_opd.json, {metric}")


# --- 8: a better trade-off ----------------------------------------------------------------------------------------------------------

def test_frontier():
    todo = "run evaluate.py --config toy, with --eval_split val and without, on three seeds"
    test, val, users = (read(todo, f) for f in ("report.json", "report_val.json", "report_users.pt"))
    theirs = read("it is part of the repository", "results", "toy", "report.json", base=ROOT)
    seeds, point = test["seeds"], test["operating_point"]
    splits = [(r["config"], r["split"]) for r in (test, val)]
    expect(splits == [("toy", "test"), ("toy", "val")], f"the reports are of {splits}: they must be of the toy world's two splits")
    expect(seeds == val["seeds"] and len(set(seeds)) >= 3, f"seeds {seeds} on test, {val['seeds']} on validation: take three, the same")
    expect(point == val["operating_point"], f"decoded at {point} on test, {val['operating_point']} on validation: it must be one point")
    stage = [s for s in ("cft", "opd", "rl") if s in users][-1]
    row = {r["seed"]: r for r in test["rows"] if r["stage"] == stage and r["reported"]}
    expect(set(row) == {"mean", *seeds}, f"{stage} has rows for {list(row)}: the last stage must have finished for every seed")
    curve = {r["tau"]: r for r in val["rows"] if r["stage"] == stage and r["seed"] == "mean" and not r["reported"]}
    good = [t for t, r in curve.items() if r["valid"] >= 0.99]
    expect(len(curve) >= 3 and good, "the validation curve needs three thresholds or more, one of them 99 % valid: see --eval_taus")
    fastest = min(good, key=lambda t: curve[t]["forwards"])
    expect(point["tau"] == fastest, f"the rule was the fastest threshold that is 99 % valid on validation, {fastest}, not {point['tau']}")
    target = load_world(Config()).test.target
    expect(np.array_equal(users["target"].numpy(), target), "report_users.pt is of other users than ours: keep the test split")
    ours, ar = (users[s]["strict ndcg@10"].numpy() for s in (stage, "ar"))
    mean, scores = row["mean"], [users[stage][name].numpy().mean() for name in ("forwards", "valid")]
    near([mean["strict"]["ndcg@10"], mean["forwards"], mean["valid"]], [ours.mean(), *scores], 1e-6, "report.json against report_users.pt")
    low = (ours - ar).mean() - 1.96 * (ours - ar).std() / len(ours) ** 0.5
    near(mean["diff_to_ar"]["ndcg@10"][0], low, 0.001, "the lower end of N@10 - AR, against the normal approximation")
    expect(low > -0.01, f"N@10 - AR may be as low as {low:.4f}: the margin is -.01")
    expect(mean["valid"] >= 0.99, f"{100 * mean['valid']:.1f} % of the answers are valid: 99 are asked")
    goal = next(r for r in theirs["rows"] if r["stage"] == "constrained" and r["seed"] == "mean")["forwards"]
    expect(mean["forwards"] <= goal, f"{mean['forwards']:.2f} forwards a response: {goal:.2f} or fewer are asked")
