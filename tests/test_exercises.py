"""Graders of the assignments in docs/exercises.md.

    pytest tests/test_exercises.py -k power                   # fails until assignment 1 is done
    RUN=runs/toy pytest tests/test_exercises.py -k opd_run    # RUN: the run that a grader reads
    UNTOUCHED=1 pytest tests/test_exercises.py                # ours: passes exactly if every
                                                # grader fails on the code as it is given

Each grader computes what it asks for a second time, plainly, on random inputs. A grader fails by
an assertion and nothing else, so that with UNTOUCHED one that breaks for a reason of its own is
seen.
"""
import importlib
import itertools
import json
import math
import os

import numpy as np
import pytest
import torch

import train_rl
from conftest import ROOT, left_padded, tiny_gpt, words
from config import Config
from data import EOS, MASK, PAD
from diffusion import fill_last_block, predict_blocks
from model import ar_decode
from plumbing.arguments import parse_args
from plumbing.checkpoint import load_tensors
from plumbing.settings import UserError
from sampler import NEVER, block_decode
from train_cft import cft_loss
from trainer import load_world, rule_of

UNTOUCHED = bool(os.environ.get("UNTOUCHED"))
pytestmark = pytest.mark.xfail(
    UNTOUCHED, reason="not solved in the code as it is given", strict=True, raises=AssertionError)
# 97.5 % quantile of Student's t for so many seeds (one degree of freedom less).
T95 = {3: 4.303, 4: 3.182, 5: 2.776}


def expect(true, message):
    """An assertion whose failure shows the message and nothing else."""
    __tracebackhide__ = True
    if not true:
        raise AssertionError(message)


def student_work(module, name, what="function"):
    """The student's function or class."""
    module = importlib.import_module(module)
    found = getattr(module, name, None)
    expect(found, f"{os.path.relpath(module.__file__, ROOT)} has no {what} {name} yet: "
                  "docs/exercises.md says what it takes")
    return found


def read(todo, *parts, base=None):
    """A JSON file, or a file of tensors, of the run that RUN names (or of the folder base).

    todo: what a student runs to have it."""
    folder = ("" if UNTOUCHED else os.environ.get("RUN", "")) if base is None else base
    expect(os.path.isdir(folder),
           f"RUN must name the folder of your run, not {folder!r}: {todo}")
    path = os.path.join(folder, *parts)
    expect(os.path.exists(path), f"{path} is missing: {todo}")
    if path.endswith(".pt"):
        return load_tensors(path)
    with open(path) as file:
        if path.endswith(".jsonl"):
            return [json.loads(line) for line in file]
        return json.load(file)


def near(found, wanted, tolerance, message):
    """Asserts that two arrays agree; a shape that differs is said too."""
    __tracebackhide__ = True
    found, wanted = np.asarray(found, dtype=float), np.asarray(wanted, dtype=float)
    expect(found.shape == wanted.shape,
           f"{message}: the shape is {found.shape}, it should be {wanted.shape}")
    expect(np.all(abs(found - wanted) <= tolerance),
           f"{message}: found {found.round(6).tolist()}, expected {wanted.round(6).tolist()}")


def t_interval(differences):
    """Mean and 95 % interval over seeds: (n,) -> mean, low, high."""
    n, mean = len(differences), np.mean(differences)
    variance = sum((d - mean) ** 2 for d in differences) / (n - 1)
    half = T95[n] * math.sqrt(variance / n)
    return mean, mean - half, mean + half


def check_verdict(found, wanted, words_of, name):
    """difference, low, high as recomputed here, and the word for low > 0, high < 0, neither."""
    mean, low, high = wanted
    for key, value in zip(("difference", "low", "high"), wanted):
        near(found.get(key, math.nan), value, 2e-4, f'{name}, "{key}", recomputed from the run')
    word = words_of[0] if low > 0 else words_of[1] if high < 0 else words_of[2]
    expect(found.get("verdict") == word,
           f"{name}: the interval [{low:.4f}, {high:.4f}] says {word!r}, "
           f"not {found.get('verdict')!r}")


# --- 1: power ---------------------------------------------------------------------------------

def plain_power(n, sd, difference, level):
    """P(|Z| > z) for Z ~ N(difference sqrt(n) / sd, 1), from erfc and a table."""
    def above(x):
        return 0.5 * math.erfc(x / math.sqrt(2))

    z = {0.01: 2.5758293, 0.05: 1.9599640, 0.1: 1.6448536}[level]
    shift = difference * math.sqrt(n) / sd
    return above(z - shift) + above(z + shift)


def test_power():
    sd_of_flips, power_of, users_needed = (
        student_work("evaluate", name) for name in ("sd_of_flips", "power_of", "users_needed"))
    rng = np.random.default_rng(0)
    for _ in range(40):
        gained, lost = rng.integers(0, 300, 2)
        flips = np.repeat([1, -1, 0], [gained, lost, 1000 - gained - lost])
        near(sd_of_flips(gained / 1000, lost / 1000), flips.std(), 1e-9,
             f"sd_of_flips({gained / 1000}, {lost / 1000})")
        sd, level = rng.uniform(0.02, 2), rng.choice([0.01, 0.05, 0.1])
        power = rng.choice([0.3, 0.5, 0.8, 0.9])
        difference = sd * rng.uniform(0.01, 0.4) * rng.choice([-1, 1])
        n = int(rng.integers(2, 20000))
        case = f"sd {sd:.4f}, difference {difference:.5f}, level {level}"
        near(power_of(n, sd, difference, level), plain_power(n, sd, difference, level), 1e-6,
             f"power_of of {n} users, {case}")
        found = users_needed(sd, difference, level, power)
        enough, fewer = (plain_power(m, sd, difference, level) for m in (found, found - 1))
        expect(enough > power - 1e-6 and fewer < power + 1e-6,
               f"users_needed gives {found} for power {power}, {case}: they have {enough:.6f}, "
               f"one fewer {fewer:.6f}")
    near(power_of(500, 0.3, 0.0, 0.05), 0.05, 1e-6, "power_of without a difference is the level")


def sd_of_opd(report):
    """sd a user of OPD - CFT in Recall@1 on one seed: the mean variance over the seeds.

    A user's difference is 1, -1 or 0: its mean square is the share of users that differ."""
    variances = []
    for row in report["rows"]:
        if row["stage"] == "opd" and row["reported"] and row["seed"] != "mean":
            _, mean, _ = row["diff_to_cft"]["recall@1"]
            share = row["differ_from_cft"]["recall@1"] / row["n_users"]
            variances.append(share - mean ** 2)
    return math.sqrt(np.mean(variances))


def test_power_answer():
    answer = read("write it as docs/exercises.md, 1 says", "answers.json", base=ROOT)
    expect(isinstance(answer.get("power"), dict),
           'answers.json needs an entry "power": docs/exercises.md, 1 has its fields')
    report = read("it is part of the repository", "results", "small", "report.json", base=ROOT)
    sd = sd_of_opd(report)
    wanted = {"sd": sd, "power_opd": plain_power(1615, sd, 0.0014, 0.05)}
    for name, difference in (("users_opd", 0.0014), ("users_rl", 0.0007)):
        wanted[name] = next(n for n in itertools.count(1000, 50)
                            if plain_power(n, sd, difference, 0.05) > 0.8)
    wanted["least"] = next(difference for difference in np.arange(1e-4, 1, 1e-5)
                           if plain_power(1615, sd, difference, 0.05) > 0.8)
    for name, value in wanted.items():
        near(answer["power"].get(name, math.nan), value, 0.03 * value,
             f'answers.json, "power", "{name}" (3 % is near enough)')


# --- 2: a sign-flip test ----------------------------------------------------------------------

def test_signflip():
    p_of, rng = student_work("evaluate", "sign_flip_test"), np.random.default_rng(1)
    for case in range(12):
        n = int(rng.integers(3, 11))
        b = rng.random(n)
        a = b + (rng.integers(-1, 2, n) if case % 2 else rng.normal(0.4, 1, n))
        d = a - b
        sums = np.array(list(itertools.product([-1, 1], repeat=n))) @ d
        exact = (abs(sums) > abs(d.sum()) - 1e-9).mean()
        for x, y in ((a, b), (b, a)):
            near(p_of(x, y, n_draws=20000), exact, 0.018,
                 f"p of the differences {d.round(2).tolist()}")
    zero = rng.random(30)
    near(p_of(zero, zero), 1.0, 1e-12, "p of two equal score vectors")
    near(p_of(zero + 1, zero, n_draws=999), 1 / 1000, 1e-12,
         "p of a difference that no draw reaches: the observed signs count as one draw")
    a = zero + rng.normal(0.1, 0.3, 30)
    expect(p_of(a, zero, n_draws=50, seed=3) == p_of(a, zero, n_draws=50, seed=3),
           "the same seed must give the same p")
    expect(len({p_of(a, zero, n_draws=50, seed=s) for s in range(20)}) > 1,
           "another seed must give other draws")
    null = [p_of(x, y, n_draws=400) for x, y in rng.normal(size=(400, 2, 25))]
    for level in (0.05, 0.2, 0.5):
        near(np.mean(np.array(null) <= level), level, 0.09 if level > 0.1 else 0.04,
             f"share of p <= {level} where there is no difference")


# --- 3: a commit rule by margin ---------------------------------------------------------------

def plain_margins(logp, open_):
    """{slot: p(1st) - p(2nd)} of the open slots of a row: logp (B, V), open_ (B,)."""
    margin = {}
    for i in range(len(logp)):
        if open_[i]:
            second, first = sorted(logp[i].exp().tolist())[-2:]
            margin[i] = first - second
    return margin


def test_margin():
    margin_rule = student_work("sampler", "Margin", "class")
    try:
        cfg = parse_args("", ["--commit", "margin", "--tau", "0.3"])
    except UserError as error:
        raise AssertionError(f"the command line does not know the rule: {error}")
    expect(rule_of(cfg) == margin_rule(0.3),
           f"trainer.rule_of gives {rule_of(cfg)} for --commit margin --tau 0.3: it should be "
           "Margin(0.3), and equal to any other Margin(0.3) (a frozen dataclass is)")
    gen, several = torch.Generator().manual_seed(0), 0
    N, B, V = 8, 6, 5
    for case in range(30):
        tau = [0.1, 0.4, 0.8, 1.0][case % 4]
        logp = torch.log_softmax(4 * torch.rand(N, B, V, generator=gen), dim=-1)
        open_ = torch.rand(N, B, generator=gen) < 0.7
        forced = open_ & (torch.rand(N, B, generator=gen) < 0.1)
        chosen = margin_rule(tau).choose(logp, open_, forced)
        for n in range(N):
            margin = plain_margins(logp[n], open_[n])
            wanted = {i for i in margin if margin[i] > tau or forced[n, i]}
            if margin and not wanted:
                wanted = {max(margin, key=margin.get)}
            several += len(wanted) > 1
            found = set(chosen[n].nonzero()[:, 0].tolist())
            shown = {i: round(m, 3) for i, m in margin.items()}
            expect(found == wanted,
                   f"margins of the open slots {shown}, forced "
                   f"{forced[n].nonzero()[:, 0].tolist()}, tau {tau}: chosen {sorted(found)}, "
                   f"should be {sorted(wanted)}")
    assert several > 20
    model, prompt = tiny_gpt(3), left_padded([4, 1, 6])
    # The slow end and the fast end of the sampler.
    for tau, step in ((1.0, [0, 1, 2, 3]), (-1.0, [0, 0, 0, 0])):
        decoded = block_decode(model, prompt, 12, 4, margin_rule(tau))
        for block in decoded.commit_step.view(-1, 4).tolist():
            taken = sorted(s for s in block if s != NEVER)
            expect(taken == step[:len(taken)],
                   f"block_decode at tau {tau}: steps {taken} in a block, should be "
                   f"{step[:len(taken)]}")


# --- 4: the likelihood bound, exact -----------------------------------------------------------

@torch.no_grad()
def bound_by_orders(model, prompt, response, B):
    """The bound as a mean over orders: each shows the slots after the first one by one, and -log p
    is summed along the way. Masks need not be weighted here: each is met as often as its weight
    says. prompt (1, P), response (1, R), one row without padding -> nats."""
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
        hidden = predict_blocks(model, prompt, text, torch.stack(states)[None], block)[0]
        every = range(len(asked))
        logp = torch.log_softmax(model.logits(hidden[every, asked]), dim=-1)
        total -= logp[every, here[asked]].sum().item() / len(orders)
    return total


def alone(prompt, response):
    """The rows of a batch without their padding: [(1, P), (1, R)]."""
    return [(p[p != PAD][None], r[r != PAD][None]) for p, r in zip(prompt, response)]


def test_bound():
    exact = student_work("diffusion", "exact_bound")
    for B, lengths in ((1, [3, 5, 2]), (2, [4, 7, 1]), (3, [6, 2, 4]), (4, [4, 8, 5])):
        model, prompt = tiny_gpt(B), left_padded([4, 1, 6], seed=B)
        response = words(3, max(lengths), seed=B + 10)
        for row, length in zip(response, lengths):
            row[length - 1], row[length:] = EOS, PAD
        with torch.no_grad():
            found = exact(model, prompt, response, B)
        rows = alone(prompt, response)
        near(found, [bound_by_orders(model, p, r, B) for p, r in rows], 1e-6,
             f"B = {B}: nats a row against the mean over all orders of a block (at B = 1, AR's "
             "own)")
    # The last case is enough: what is estimated differs in no other.
    p, r = (x.repeat(200, 1) for x in rows[1])
    tokens = fill_last_block(r, B)[1][0].sum().item()
    cfg = Config(block_size=B, answer_weight=1.0, cft_first_step=0.0, answer_states=0,
                 cft_misplace=0.0, bfloat16=False)
    with torch.no_grad():
        draws = [cft_loss(cfg, model, p, r, torch.Generator().manual_seed(seed)).item() * tokens
                 for seed in range(16)]
    near(found[1], np.mean(draws), 5 * np.std(draws, ddof=1) / 4,
         f"B = {B}: nats against the mean of cft_loss")


# --- 5: does an unconditional format reward pay for copying? ----------------------------------

def plain_effect(before, after, k, valid, alpha):
    """For each group: how many times as far apart the bonus puts two valid answers (1: not)."""
    without, paid = (
        train_rl.advantages(torch.from_numpy(
            train_rl.reward(before, after, k, valid, a, False)))[0].numpy() for a in (0.0, alpha))
    out = []
    for g in range(len(before)):
        ranks = after[g][valid[g]]
        if len(set(ranks.tolist())) > 1:
            i, j = np.flatnonzero(valid[g])[[ranks.argmin(), ranks.argmax()]]
            out.append((paid[g, i] - paid[g, j]) / (without[g, i] - without[g, j]))
        else:
            out.append(1.0)
            near(paid[g], without[g], 1e-3, "the grader's own claim")
    return out


def test_bonus_exact():
    effect, rng = student_work("train_rl", "bonus_effect"), np.random.default_rng(2)
    G, seen = 12, []
    for case in range(60):
        n = int(rng.integers(2, 9))
        k = np.repeat(rng.integers(2, 11, (G, 1)), n, axis=1)
        before = np.repeat(rng.integers(0, k[:, :1]), n, axis=1)
        stays = rng.random((G, n)) < rng.random((G, 1))
        after = np.where(stays, before, rng.integers(0, k))
        valid = rng.random((G, n)) < rng.choice([0.2, 0.7, 1.0], (G, 1))
        alpha = float(rng.choice([0.05, 0.1, 0.5, 2.0]))
        found = np.asarray(effect(before, after, k, valid, alpha))
        expect(found.shape == (G,), f"bonus_effect gives the shape {found.shape}, should be one "
                                    f"number a group, ({G},)")
        wanted = plain_effect(before, after, k, valid, alpha)
        for g in range(G):
            near(found[g], wanted[g], 1e-3,
                 f"alpha {alpha}, list of {k[g, 0]}, target at {before[g, 0]}, answers put it at "
                 f"{after[g].tolist()}, valid {valid[g].tolist()}")
        seen += wanted
    assert min(seen) < 0.9 and max(seen) < 1.001
    assert 0.2 < np.mean(np.array(seen) > 0.999) < 0.9


def test_bonus_run():
    todo = "run the commands of docs/exercises.md, 5"
    verdict, differences, kept = read(todo, "hack.json"), [], []
    for seed in (0, 1, 2):
        share = {}
        for conditional in (True, False):
            where = str(conditional).lower(), "toy", f"seed{seed}", "rl"
            state = read(todo, *where, "checkpoint.pt")
            lines = read(todo, *where, "metrics.jsonl")
            settings = dict(state["settings"])
            right = (settings.pop("rl_conditional") is conditional
                     and settings.pop("seed") == seed)
            expect(state["finished"] and len(lines) >= 30 and right,
                   f"{'/'.join(where)} is not a finished run of 30 steps or more with "
                   f"rl_conditional {conditional} and seed {seed}: {todo}")
            kept.append(settings)
            expect("copied" in lines[-1], f"{'/'.join(where)} does not log \"copied\", the share "
                                          "of answers that are valid and the identity")
            last = [line["copied"] for line in lines[-(len(lines) // 3):]]
            share[conditional] = sum(last) / len(last)
        differences.append(share[False] - share[True])
    expect(all(settings == kept[0] for settings in kept),
           "the six runs must differ in rl_conditional and seed only")
    check_verdict(verdict, t_interval(differences),
                  ("copies more", "copies less", "unresolved"), "hack.json")


# --- 6: lossless drafts for the AR teacher ----------------------------------------------------

def plain_lookups(prompt, tokens, n_gram, n_draft):
    """Forwards that lookup needs to write tokens after a prompt, both lists, from the texts
    alone."""
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


def without_padding(tokens):
    return [t for t in tokens.tolist() if t != PAD]


def widths_fed(monkeypatch, model, decode):
    """How many tokens each forward of decode() feeds to the model, and what decode() returns."""
    calls, plain = [], type(model).forward

    def counted(self, tokens, *args, **other):
        calls.append(tokens.shape[1])
        return plain(self, tokens, *args, **other)
    monkeypatch.setattr(type(model), "forward", counted)
    out = decode()
    monkeypatch.undo()
    return calls, out


def test_lookup(monkeypatch):
    decode, saved = student_work("model", "lookup_decode"), 0
    for seed, n_gram, n_draft in itertools.product((0, 4), (1, 2), (2, 8)):
        model, prompt = tiny_gpt(seed), left_padded([4, 1, 6, 9, 5], seed=seed)
        case = f"seed {seed}, n_gram {n_gram}, n_draft {n_draft}"
        truth, _, ar_forwards = ar_decode(model, prompt, 30)
        tokens, forwards = decode(model, prompt, 30, n_gram, n_draft)
        expect(tokens.shape == truth.shape and torch.equal(tokens, truth),
               f"{case}: the tokens are not those of ar_decode")
        wanted = [plain_lookups(without_padding(p), without_padding(r), n_gram, n_draft)
                  for p, r in zip(prompt, truth)]
        near(forwards, wanted, 0, f"{case}: forwards a row, counted from the texts")
        saved += int((ar_forwards - forwards).sum())
        calls, (_, one) = widths_fed(
            monkeypatch, model, lambda: decode(model, prompt[3:4], 30, n_gram, n_draft))
        expect(len(calls) == int(one[0]),
               f"{case}: one row says {int(one[0])} forwards and ran the model {len(calls)} times")
        widest = max(calls[1:], default=0)
        expect(widest <= 1 + n_draft, f"{case}: forwards after the first may feed {1 + n_draft} "
                                      f"tokens, one fed {widest}")
    assert saved > 30  # else the grader's texts would not repeat


# --- 7: does OPD pay, against CFT for the same FLOPs? -----------------------------------------

def plain_verdict(ours, control, at, column):
    """Differences at matched forwards by a loop over the points of the curves -> matched,
    (mean, low, high)."""
    def meet(curve, x):
        within = [p[column] for p in curve if p[0] <= 1.02 * x]
        return max(within) if within else min(curve, key=lambda p: p[0])[column]

    matched = sum(c[at][0] for c in control) / len(control)
    pairs = [(meet(o, matched), meet(c, matched)) for o, c in zip(ours, control)]
    return matched, t_interval([o - c for o, c in pairs])


def random_curves(rng, case):
    """Two lists of curves (points, 3), of as many seeds."""
    n, points = int(rng.integers(3, 6)), 6
    shift, noise = rng.choice([-0.05, 0, 0.05]), rng.choice([0.002, 0.05])
    x = np.sort(rng.uniform(4, 12, (2, n, points)))
    curves = np.stack((x, 1 - np.exp(-x / 2), 0.8 - np.exp(-x)), axis=-1)
    curves += rng.normal(0, noise, (2, n, 1, 3)) * [0, 1, 1]
    curves[0, ..., 1:] += shift
    if case % 3 == 0:
        curves[0, ..., 0] += 9  # never so few forwards: its fastest point counts
    return list(curves[0]), list(curves[1])


def test_opd_verdict():
    verdict, rng = student_work("ablations", "verdict"), np.random.default_rng(3)
    words_seen = set()
    for case in range(60):
        (ours, control), at = random_curves(rng, case), int(rng.integers(6))
        column = int(rng.integers(1, 3))
        found = verdict(ours, control, at, column)
        matched, wanted = plain_verdict(ours, control, at, column)
        near(found["matched"], matched, 1e-9, "forwards at which the lines are compared: the "
                                              "control's at its point `at`, mean over seeds")
        near([found[k] for k in ("difference", "low", "high")], wanted, 1e-6,
             "difference, low, high over paired seeds")
        check_verdict(found, wanted, ("pays", "harms", "unresolved"), "verdict()")
        words_seen.add(found["verdict"])
    assert words_seen == {"pays", "harms", "unresolved"}
    for a, b in ((2, 2), (3, 4)):
        try:
            verdict(ours[:1] * a, control[:1] * b, 0)
        except ValueError:
            continue
        raise AssertionError(f"{a} seeds against {b} must raise ValueError: an interval takes "
                             "three pairs or more")


def test_opd_run():
    todo = "run the commands of docs/exercises.md, 7"
    lines = {}
    for name, stage in (("as_it_is", "opd"), ("CFT_for_the_same_FLOPs", "cft")):
        where = "ablations", "opd", name, "toy"
        lines[stage] = [np.array(read(todo, *where, f"seed{s}", stage, "curve_independent.json"))
                        for s in (0, 1, 2)]
        expect(all(c.shape == (5, 3) for c in lines[stage]),
               f"{name}: a curve has five points of three figures")
        expect(len({c.tobytes() for c in lines[stage]}) == 3,
               f"{name}: two seeds have the same curve")
    for metric, column in (("valid", 1), ("ndcg@10", 2)):
        wanted = plain_verdict(lines["opd"], lines["cft"], 1, column)[1]
        found = read(todo, "verdict_opd.json").get(metric, {})
        check_verdict(found, wanted, ("pays", "harms", "unresolved"),
                      f"verdict_opd.json, {metric}")


# --- 8: a better trade-off --------------------------------------------------------------------

def check_reports(test, val):
    """Two reports of one point on the same three seeds or more."""
    seeds, point = test["seeds"], test["operating_point"]
    splits = [(report["config"], report["split"]) for report in (test, val)]
    expect(splits == [("toy", "test"), ("toy", "val")],
           f"the reports are of {splits}: they must be of the toy world's two splits")
    expect(seeds == val["seeds"] and len(set(seeds)) >= 3,
           f"seeds {seeds} on test, {val['seeds']} on validation: take three, the same")
    expect(point == val["operating_point"],
           f"decoded at {point} on test, {val['operating_point']} on validation: it must be one "
           "point")


def check_threshold(val, stage, tau):
    """The threshold is the fastest with 99 % valid answers on validation users."""
    curve = {row["tau"]: row for row in val["rows"]
             if row["stage"] == stage and row["seed"] == "mean" and not row["reported"]}
    good = [t for t, row in curve.items() if row["valid"] >= 0.99]
    expect(len(curve) >= 3 and good, "the validation curve needs three thresholds or more, one "
                                     "of them 99 % valid: see --eval_taus")
    fastest = min(good, key=lambda t: curve[t]["forwards"])
    expect(tau == fastest, "the rule was the fastest threshold that is 99 % valid on validation, "
                           f"{fastest}, not {tau}")


def test_frontier():
    todo = "run evaluate.py --config toy, with --eval_split val and without, on three seeds"
    test, val, users = (read(todo, name)
                        for name in ("report.json", "report_val.json", "report_users.pt"))
    theirs = read("it is part of the repository", "results", "toy", "report.json", base=ROOT)
    check_reports(test, val)
    stage = [s for s in ("cft", "opd", "rl") if s in users][-1]
    rows = {row["seed"]: row for row in test["rows"]
            if row["stage"] == stage and row["reported"]}
    expect(set(rows) == {"mean", *test["seeds"]}, f"{stage} has rows for {list(rows)}: the last "
                                                  "stage must have finished for every seed")
    check_threshold(val, stage, test["operating_point"]["tau"])
    expect(np.array_equal(users["target"].numpy(), load_world(Config()).test.target),
           "report_users.pt is of other users than ours: keep the test split")
    ours, ar = (users[s]["strict ndcg@10"].numpy() for s in (stage, "ar"))
    mean = rows["mean"]
    forwards, valid = (users[stage][name].numpy().mean() for name in ("forwards", "valid"))
    near([mean["strict"]["ndcg@10"], mean["forwards"], mean["valid"]],
         [ours.mean(), forwards, valid], 1e-6, "report.json against report_users.pt")
    low = (ours - ar).mean() - 1.96 * (ours - ar).std() / len(ours) ** 0.5
    reported = mean["diff_to_ar"]["ndcg@10"][0]  # with the spread of the seeds in it
    if reported is not None:                     # it is where few users differ
        expect(reported < low + 0.001, "the interval of N@10 - AR in report.json is narrower than "
                                       "that of the users alone")
        low = min(low, reported)
    expect(low > -0.01, f"N@10 - AR may be as low as {low:.4f}: the margin is -.01")
    expect(mean["valid"] >= 0.99,
           f"{100 * mean['valid']:.1f} % of the answers are valid: 99 are asked")
    goal = next(row for row in theirs["rows"]
                if row["stage"] == "constrained" and row["seed"] == "mean")["forwards"]
    expect(mean["forwards"] <= goal,
           f"{mean['forwards']:.2f} forwards a response: {goal:.2f} or fewer are asked")
