"""Invariants of trainer.py and of the four stages: updates, divergences, rewards, roll-outs; a kill
changes nothing."""
import gc
import itertools
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train_ar
import train_cft
import train_opd
import train_rl
import trainer
from config import Config
from conftest import close, gen, left_padded, naive_hidden, same_decode, tiny_gpt, words
from data import (ANSWER, EOS, LABEL, MASK, PAD, Examples, as_prompt, draw_examples, examples_of,
                  tensors)
from model import Sampling, causal_hidden
from ours.commit import Apart
from plumbing.checkpoint import checksum
from plumbing.settings import UserError
from sampler import NEVER, Decoded, Threshold, block_decode
from scripts import run
from toy.world import toy_world
from train_opd import divergence, opd_loss
from train_rl import policy_loss, reward
from trainer import Run, ar_decoder, block_decoder, decode_split, respond, rng_for, validate

LENGTHS = [4, 1, 6, 3]
CFG = Config(n_train=60, n_val=10, n_test=1, vary_lists=0.6, batch_size=4, rl_prompts=6, rl_group=3,
             bfloat16=False, block_size=16)
KINDS = ["forward", "reverse", "jsd"]


@pytest.fixture(scope="module")
def world():
    return toy_world(CFG)


class Steps:
    """Stands in for trainer.Run: plain gradient steps; keeps losses and logs."""

    def __init__(self, model, lr=0.0, n_steps=1):
        self.model, self.lr, self.n_steps = model, lr, n_steps
        self.losses, self.logs = [], []

    def steps(self):
        return iter(range(self.n_steps))

    def update(self, loss):
        self.losses.append(loss.item())
        parameters = list(self.model.parameters())
        for p, g in zip(parameters, torch.autograd.grad(loss, parameters, materialize_grads=True)):
            p.data -= self.lr * g
        return {"loss": loss.item()}

    def log(self, **values):
        self.logs.append(values)

    def time_to_validate(self):
        return False


def start(monkeypatch, module, world, run, teacher=None):
    """Makes the main function of a stage's module use this world, this run and this teacher."""
    monkeypatch.setattr(module, "load_world", lambda cfg: world)
    monkeypatch.setattr(module, "start_from", lambda cfg, world, stage: run.model)
    monkeypatch.setattr(module, "Run", lambda cfg, stage, model, world: run)
    monkeypatch.setattr(module, "load_stage", lambda *_: (teacher, None), raising=False)


class Copier:
    """A decoder that writes given texts, whatever it reads: one array (N, R) a kind."""

    def __init__(self, texts):
        self.texts = texts
        self.calls = 0

    def __call__(self, prompt, max_len):
        kind, self.calls = self.calls % len(self.texts), self.calls + 1
        tokens = torch.from_numpy(self.texts[kind]).long()[:len(prompt)]
        return Decoded(tokens, tokens, 0 * tokens, 0.0 * tokens, torch.full((len(prompt),), 5), 1)


# --- The loop ---------------------------------------------------------------------------------

def test_the_rate_rises_over_a_tenth_at_most_then_falls_to_zero():
    for n_steps, warmup, rise in ((800, 50, 50), (30, 50, 4), (5, 50, 1), (1000, 400, 101)):
        run = SimpleNamespace(cfg=Config(warmup=warmup), n_steps=n_steps, peak_lr=2.0)
        for step in range(n_steps):
            fall = 1 + math.cos(math.pi * step / n_steps)
            assert Run.lr_at(run, step) == pytest.approx(fall * min(1, (step + 1) / rise))


def a_run(folder, world, **changes):
    run = Run(replace(CFG, run_dir=str(folder), **changes), "ar",
              tiny_gpt(0, len(world.words), torch.float32), world)
    run.step = 2
    return run


def linear(model, scale=1.0):
    """A loss and its gradients, random ones."""
    torch.manual_seed(0)
    gradients = [scale * torch.randn_like(p) for p in model.parameters()]
    return sum((p * g).sum() for p, g in zip(model.parameters(), gradients)), gradients


def orthogonal(g, steps=5):
    """Newton-Schulz, as Muon has it (Jordan et al. 2024): all singular values to about 1."""
    x = g.double() if g.shape[0] <= g.shape[1] else g.double().T
    x = x / x.norm()
    for _ in range(steps):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x if g.shape[0] <= g.shape[1] else x.T


def test_an_update_is_muon_for_matrices_of_layers_and_adamw_for_the_rest(tmp_path, world):
    run = a_run(tmp_path, world)
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    loss, gradients = linear(run.model)
    run.update(loss)
    lr = run.lr_at(2)
    assert 0 < lr < CFG.ar_lr / 2  # it is warming up
    for g, (name, p) in zip(gradients, run.model.named_parameters()):
        if p.dim() == 2 and name != "embed.weight":
            decayed = (1 - 0.05 * lr) * before[name].double()
            exact = -lr * 0.2 * math.sqrt(max(p.shape)) * orthogonal(g)
            off = (p.detach() - decayed - exact).norm() / exact.norm()
            assert off < 0.05, name  # it is computed in bfloat16
        else:
            close(p.detach(), before[name] - lr * g.sign(), 1e-5)
    # A second gradient, opposite and short, tells how fast AdamW's moments decay.
    twice = a_run(tmp_path, world, ar_lr=1.0)
    twice.update(linear(twice.model, 1e-2)[0])
    p = twice.model.embed.weight
    old = p.detach().clone()
    twice.update(linear(twice.model, -1e-3)[0])
    mean, square = (0.9 * 0.1 - 0.1 / 10) / (1 - 0.9 ** 2), 0.99 * 0.02 / (1 - 0.98 ** 2)
    close(p.detach(), old - twice.lr_at(2) * mean / square ** 0.5 * gradients[0].sign(), 1e-4)
    # Without a gradient what is left is the decay.
    still = a_run(tmp_path, world)
    still.update(sum(0 * p.sum() for p in still.model.parameters()))
    for name, p in still.model.named_parameters():
        decay = 0.05 * lr if p.dim() == 2 and name != "embed.weight" else 0.0
        close(p.detach(), (1 - decay) * before[name], 1e-7)


def test_a_gradient_is_shortened_to_its_limit_and_taken_at_the_rate_of_its_step(tmp_path, world):
    for limit, step in ((0.5, 0), (0.5, 300), (1e6, 40)):
        run = a_run(tmp_path, world, grad_clip=limit, ar_lr=1.0)
        run.step = step
        run.optimizers = [torch.optim.SGD(run.model.parameters(), lr=1.0)]
        before = [p.detach().clone() for p in run.model.parameters()]
        loss, gradients = linear(run.model)
        log = run.update(loss)
        norm = math.sqrt(sum(float((g ** 2).sum()) for g in gradients))
        assert log == pytest.approx({"loss": loss.item(), "grad_norm": norm})
        size = run.lr_at(step) * min(1, limit / norm)
        for p, old, g in zip(run.model.parameters(), before, gradients):
            close(p.detach(), old - size * g, 1e-5 * size + 1e-6)
    with pytest.raises(UserError, match="at step 40: try a lower --ar_lr"):
        run.update(linear(run.model, float("nan"))[0])


def test_random_numbers_depend_on_seed_name_step_and_process(monkeypatch):
    def draw(cfg, name, step):
        return torch.rand((), generator=rng_for(cfg, name, step)).item()

    def draws():
        return [draw(replace(CFG, seed=seed), name, step) for seed, name, step in
                itertools.product((0, 1), ("ar", "cft"), (0, 1, 2))]

    first = draws()
    assert first == draws() and len(set(first)) == 12
    monkeypatch.setattr(trainer, "RANK", 1)
    assert len(set(first + draws())) == 24


def test_the_rule_of_the_settings(world):
    assert trainer.rule_of(replace(CFG, commit="threshold")) == Threshold(CFG.tau)
    rule = trainer.rule_of(CFG, 0.25)
    assert rule == Apart(0.25, range(LABEL, LABEL + 16))
    assert [world.words[t] for t in rule.labels] == [f"L{i + 1}" for i in range(16)]


# --- Decoding ---------------------------------------------------------------------------------

@torch.no_grad()
def test_who_edits_the_prompt_and_keeps_the_trace_changes_no_ranking(world):
    model = tiny_gpt(1, len(world.words), torch.float32)
    prompt, edited = (tensors(x, range(10), "cpu")[0]
                      for x in (examples_of(world.train, "bound")[0], world.val))
    for writer in (ar_decoder(model), block_decoder(CFG, model)):
        (trace, answer), other = (respond(CFG, world, writer, p) for p in (prompt, edited))
        read = []

        def keeping(prompt, max_len):
            read.append(prompt)
            return trace if len(read) == 1 else writer(prompt, max_len)

        _, again = respond(CFG, world, keeping, edited)
        assert read[0] is edited
        same_decode(again, answer)
        assert torch.equal(again.logp, answer.logp)  # to the last bit
        assert not torch.equal(other[1].tokens, answer.tokens)
        for row, text in zip(read[1], trace.tokens):
            assert row[row != PAD].tolist() == text[(text != PAD) & (text != EOS)].tolist()


def test_a_split_is_decoded_in_batches_and_measured(monkeypatch, world):
    writer = block_decoder(CFG, tiny_gpt(1, len(world.words)))
    whole, forwards = decode_split(CFG, world, world.val, writer)
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "BATCH", 3)
        parts, again = decode_split(CFG, world, world.val, writer)
    assert np.array_equal(forwards, again) and len(parts) == 2
    assert all(np.array_equal(a, b) for a, b in zip(whole, parts))

    texts = [kind.response.copy() for kind in examples_of(world.val, "bound")]
    n_tokens = (world.val.response != PAD).sum()  # without the [EOS] of the traces
    measured = validate(CFG, world, Copier(texts))
    assert measured == pytest.approx(
        {"valid": 1.0, "match": 1.0, "tokens_per_forward": n_tokens / (10 * 5 * 2)})
    texts[0][0, 1] += 1
    texts[1][1, -2] = texts[1][1, -3]  # a label twice
    measured = validate(CFG, world, Copier(texts))
    assert measured["valid"] == 0.9
    assert measured["match"] == pytest.approx(1 - 2 / n_tokens)
    assert validate(CFG, world, Copier(texts), n=1)["valid"] == 1


# --- AR and CFT -------------------------------------------------------------------------------

def test_every_step_draws_its_batch(monkeypatch, world):
    for stage, module in (("ar", train_ar), ("cft", train_cft)):
        seen = []

        def loss(cfg, model, *batch):
            seen.append(batch)
            return 0 * model.embed.weight.sum()

        monkeypatch.setattr(module, f"{stage}_loss", loss)
        start(monkeypatch, module, world, Steps(tiny_gpt(), n_steps=20))
        module.main(replace(CFG, cft_prompts=30))
        kinds = examples_of(world.train.take(slice(30 if stage == "cft" else 60)), "bound")
        for step, (prompt, response, *_) in enumerate(seen):
            drawn = draw_examples(kinds, 4, CFG.answer_share, rng_for(CFG, stage, step))
            for a, b in zip((prompt, response), tensors(*drawn, "cpu")):
                assert torch.equal(a, b)
        assert 0 < sum((response[:, 0] == ANSWER).all() for _, response, *_ in seen) < 20


def test_cft_may_be_trained_on_what_the_teacher_wrote_where_its_answer_is_valid(monkeypatch, world):
    for trace in ("free", "bound"):
        cfg = replace(CFG, trace=trace, cft_prompts=30, cft_gold=False)
        first = world.train.take(slice(30))
        texts = [kind.response.copy() for kind in examples_of(first, trace)]
        texts[0][:, 1] += 1                # the traces are the teacher's own, right or wrong
        for n in range(0, 30, 3):          # a label twice
            last = (texts[-1][n] != PAD).sum() - 2
            texts[-1][n, last] = texts[-1][n, last - 1]
        monkeypatch.setattr(train_cft, "load_stage", lambda cfg, stage, world: (stage, None))
        monkeypatch.setattr(train_cft, "ar_decoder", lambda model: {"ar": Copier(texts)}[model])
        kept = np.arange(30) % 3 > 0
        prompts = [first.prompt, as_prompt(texts[0])]
        got = train_cft.training_text(cfg, world)
        assert len(got) == len(texts)
        for examples, prompt, text in zip(got, prompts, texts):
            assert isinstance(examples, Examples)
            assert np.array_equal(examples.prompt, prompt[kept])
            assert np.array_equal(examples.response, text[kept])


# --- OPD --------------------------------------------------------------------------------------

def plain_divergence(S, T, kind):
    """The definition, on probabilities (n, V)."""
    def kl(p, q):
        return torch.where(p > 0, p * (p / q).log(), 0.0).sum(-1)

    M = (S + T) / 2
    return {"forward": lambda: kl(T, S), "reverse": lambda: kl(S, T),
            "jsd": lambda: kl(T, M) / 2 + kl(S, M) / 2}[kind]()


def test_a_token_that_the_target_excludes_costs_nothing_in_reverse_and_nothing_is_infinite():
    student = torch.randn(4, 9, generator=gen(1), dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(4, 9, generator=gen(2), dtype=torch.float64)
    teacher[:, 6:] = -1e4
    got = divergence(student, teacher, "reverse")
    S, T = student.detach()[:, :6].softmax(-1), teacher[:, :6].softmax(-1)  # among the others
    close(got.detach(), plain_divergence(S, T, "reverse"))
    assert (torch.autograd.grad(got.sum(), student)[0][:, 6:] == 0).all()
    for kind in KINDS:
        impossible = torch.where(torch.arange(9) < 2, -1e4, student)  # as [PAD] and [MASK] have it
        loss = divergence(impossible.float(), teacher.roll(2, 1).float(), kind).sum()
        assert loss.isfinite() and torch.autograd.grad(loss, student)[0].isfinite().all()


@torch.no_grad()
def test_opd_loss_is_the_weighted_divergence_in_a_state_of_each_block(monkeypatch):
    """Of what was open there, and of slot 0, up to the first [EOS]."""
    B, student, teacher, cases = 4, tiny_gpt(5), tiny_gpt(0), set()
    for kind, exclude, row in itertools.product(KINDS, (True, False), (3, 17)):
        cfg = replace(CFG, answer_weight=3.0, opd_divergence=kind, opd_exclude=exclude)
        prompt = words(60, 3, seed=5)[row:row + 1]
        decoded = block_decode(student, prompt, 2 * B, B, Threshold(0.9))
        tokens, filled, steps = decoded.tokens[0], decoded.filled[0], decoded.commit_step[0]
        end, text = int((tokens != PAD).sum()), tokens.tolist()
        n_steps = [1 + max(int(s) for s in its if s != NEVER) for its in steps.view(2, B)]
        # The answer begins before the second block and ends inside it; what is behind its end is
        # still open, or was committed before.
        assert ANSWER in text[:5] and end == 7 and min(n_steps) > 2
        assert (filled[-1] == MASK) == (row == 3)
        target = teacher.logits(causal_hidden(teacher, prompt, decoded.tokens))[0].softmax(-1)
        in_answer = [ANSWER in text[:i] and text[i] != EOS for i in range(2 * B)]

        def of_state(begin, step):
            """(sum of weighted divergences, sum of weights) of a block in a state."""
            shown = [i for i in range(begin, begin + B) if steps[i] < step]
            slots = [begin + j for j in range(B) if begin + j < end
                     and (j == 0 or begin + j not in shown)]
            state = torch.tensor([filled[i] if i in shown else MASK
                                  for i in range(begin, begin + B)])
            hidden = naive_hidden(student, prompt[0], filled[:begin], state)
            S, T = student.logits(hidden).softmax(-1), target[begin:begin + B].clone()
            for i in slots:
                out = [text[j] for j in shown if j < end and in_answer[j]]
                if exclude and in_answer[i] and i not in shown and out:
                    cases.add(kind)
                    for p in (T, S) if kind == "reverse" else (T,):
                        p[i - begin, out] = 0
                        p[i - begin] /= p[i - begin].sum()
            nats = plain_divergence(S, T, kind)
            weight = [3.0 if ANSWER in text[:i] else 1.0 for i in slots]
            return sum(w * float(nats[i - begin]) for w, i in zip(weight, slots)), sum(weight)

        for pair in itertools.product(*map(range, n_steps)):
            total, weight = map(sum, zip(*(of_state(b * B, pair[b]) for b in range(2))))
            monkeypatch.setattr(train_opd, "draw_steps", lambda *_: torch.tensor([pair]))
            loss = opd_loss(cfg, student, teacher, prompt, decoded, None)
            close(loss.item(), total / weight, 1e-6)
    assert cases == set(KINDS)  # labels were excluded


def test_a_state_is_any_of_those_that_occurred():
    steps = torch.tensor([[0, 2, 1, NEVER, 0, 0, 0, 0, NEVER, NEVER, NEVER, NEVER]])
    decoded = SimpleNamespace(commit_step=steps, block_size=4)
    block = torch.tensor([[0, 1, 2]])
    draws = torch.cat([train_opd.draw_steps(decoded, block, gen(seed)) for seed in range(600)])
    assert (draws[:, 1:] == 0).all()
    assert np.abs(np.bincount(draws[:, 0]) / 600 - 1 / 3).max() < 0.07


def test_an_opd_step_decodes_as_served_or_draws_a_group(monkeypatch, world):
    teacher, written = tiny_gpt(0, len(world.words)), []
    before = [p.clone() for p in teacher.parameters()]

    def decode(*args):
        written.append((args, block_decode(*args)))
        return written[-1][1]

    monkeypatch.setattr(train_opd, "block_decode", decode)
    for group in (1, 3):
        student = tiny_gpt(3, len(world.words))
        run = Steps(student, lr=5e-3)
        start(monkeypatch, train_opd, world, run, teacher)
        cfg = replace(CFG, opd_group=group, opd_prompts=20, opd_tau=0.9, tau=0.1)
        rng = rng_for(cfg, "opd", 0)
        kinds = examples_of(world.train.take(slice(20)), "bound")
        prompt, response = tensors(*draw_examples(kinds, 4, cfg.answer_share, rng), "cpu")
        old = tiny_gpt(3, len(world.words))
        train_opd.main(cfg)
        (_, read, max_len, block_size, rule, sampling), decoded = written[-1]
        assert torch.equal(read, prompt.repeat_interleave(group, 0))
        assert (max_len, block_size, rule.tau) == (response.shape[1], 16, 0.9)
        assert sampling.temperature == (group > 1)
        if group > 1:
            assert any(len(rows.unique(dim=0)) > 1 for rows in decoded.tokens.view(4, 3, -1))
        # The student moves towards the teacher, which stays.
        now, then = (np.mean([opd_loss(cfg, model, teacher, read, decoded, gen(s)).item()
                              for s in range(4)]) for model in (student, old))
        assert now < then
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, teacher.parameters()))


# --- RL ---------------------------------------------------------------------------------------

def test_rewards_by_hand():
    for before, after, k, valid, conditional, expected in (
            (3, 1, 4, True, True, 0.5 + 0.1),    # promoted
            (1, 3, 4, True, True, -0.5),         # demoted
            (2, 2, 4, True, True, 0.0),          # same place, not the first: no bonus
            (0, 0, 4, True, True, 0.1),          # first and stays first
            (3, 1, 4, False, True, -1.0),        # invalid, whatever the repaired rank
            (0, 0, 4, False, False, -1.0),
            (3, 1, 4, True, False, 0.5 + 0.1),
            (1, 3, 4, True, False, -0.5 + 0.1),  # paid for format alone
            (2, 2, 4, True, False, 0.1)):
        got = reward(np.array([before, 2]), np.array([after, 0]), np.array([k, 10]),
                     np.array([valid, True]), 0.1, conditional)
        assert got == pytest.approx([expected, 0.2 + 0.1])
    # An invalid answer earns less than the worst valid one.
    assert reward(0, 11, 12, np.array([True]), 0.1, True) > -1


def naive_policy(logp, old, advantage, is_token, low, high):
    """The clipped surrogate token by token, its gradient, and how many ratios are off the clip."""
    total, gradient, beyond = 0.0, torch.zeros_like(logp), 0
    for n, i in is_token.nonzero().tolist():
        r, A = math.exp(logp[n, i] - old[n, i]), float(advantage[n])
        total -= min(r * A, min(max(r, 1 - low), 1 + high) * A)
        pushed_out = r > 1 + high and A > 0 or r < 1 - low and A < 0
        gradient[n, i] = 0.0 if pushed_out else -r * A
        beyond += r > 1 + high or r < 1 - low
    n = is_token.double().sum()
    return total / n, gradient / n, beyond / int(n)


def test_the_policy_loss_is_the_clipped_mean_over_tokens():
    logp = torch.randn(6, 9, generator=gen(), dtype=torch.float64).requires_grad_()
    old = logp.detach() + 0.3 * torch.randn(6, 9, generator=gen(1), dtype=torch.float64)
    advantage = torch.tensor([1.3, -0.7, 0.4, -1.0, 0.0, 2.0]).double()
    is_token = torch.arange(9) < torch.tensor([[9], [2], [5], [9], [7], [1]])
    loss, ratio = policy_loss(logp, old, advantage, is_token, 0.2, 0.28)
    exact, gradient, _ = naive_policy(logp.detach(), old, advantage, is_token, 0.2, 0.28)
    close(loss.item(), float(exact))
    close(torch.autograd.grad(loss, logp)[0], gradient)
    close(ratio, (logp - old).exp())
    inside = (gradient != 0) & is_token
    assert 0 < (is_token & ~inside).sum() < inside.sum()


def test_several_updates_on_one_roll_out_and_the_clip_acts_from_the_second_on():
    for B in (1, 4):
        model, prompt = tiny_gpt(), left_padded(LENGTHS)
        decoded = block_decode(model, prompt, 8, B, Threshold(0.6), Sampling(1.0, gen(7)))
        advantage = torch.tensor([1.3, -0.7, 0.4, -1.0]).double()
        is_token = decoded.tokens != PAD

        def update(epochs, lr):
            run = Steps(model, lr)
            cfg = replace(CFG, rl_epochs=epochs)
            return run, train_rl.update_policy(cfg, run, prompt, decoded, advantage)

        run, log = update(1, 0.0)
        mean = (advantage[:, None] * is_token).sum() / is_token.sum()
        assert run.losses == pytest.approx([-mean.item()])        # all ratios are 1
        assert log["replay_off"] < 1e-9 and log["ratio_off"] == log["clipped"] == 0
        assert log["sampled_nats"] == pytest.approx((-decoded.logp[is_token]).mean().item())
        logps = []
        replay = train_rl.replay_logp
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train_rl, "replay_logp",
                          lambda *args: logps.append(replay(*args)) or logps[-1])
            run, log = update(3, 0.03)
        for logp, loss in zip(logps, run.losses):
            exact, _, beyond = naive_policy(logp.detach(), logps[0].detach(), advantage, is_token,
                                            0.2, 0.28)
            assert loss == pytest.approx(exact.item())
        assert log["clipped"] == pytest.approx(float(beyond)) and beyond > 0
        assert log["ratio_off"] == pytest.approx(
            ((logp - logps[0]).exp() - 1)[is_token].abs().mean().item())
        up = (logp - logps[0]).sum(1).detach()
        assert up[0] > 0 > up[3]                                  # better ones rise, worse fall


class RandomWriter:
    """Stands in for block_decode: answers at random; of every four one lacks its last label, and
    one is the list as it came."""

    def __init__(self, train, kinds):
        self.train, self.kinds, self.rng = train, kinds, np.random.default_rng(0)
        self.rows, self.rewards = [], []

    def __call__(self, model, prompt, max_len, block_size, rule, sampling):
        self.prompt, self.asked = prompt, (max_len, block_size, rule.tau, sampling.temperature)
        tokens = torch.zeros(len(prompt), max_len, dtype=torch.long)
        known = self.kinds[-1].prompt[:, -prompt.shape[1]:]
        for n, p in enumerate(prompt):
            row = int((known == p.numpy()).all(1).argmax())
            k, target = int(self.train.list_length[row]), int(self.train.target[row])
            order = self.rng.permutation(k).tolist() if n % 4 != 1 else list(range(k))
            order = order[:None if n % 4 else -1]
            tokens[n, :len(order) + 2] = torch.tensor([ANSWER, *(LABEL + i for i in order), EOS])
            rise = (target - order.index(target)) / k if len(order) == k else None
            bonus = 0.1 if rise and rise > 0 or rise == target == 0 else 0.0
            self.rows.append(row)
            self.rewards.append(-1.0 if rise is None else rise + bonus)
        self.tokens, zeros = tokens, torch.zeros_like(tokens)
        return Decoded(tokens, tokens, zeros, zeros.double(), zeros[:, 0] + 1, block_size)


def test_an_rl_step_samples_groups_of_lists_with_a_target_and_updates_on_those_that_differ(
        monkeypatch, world):
    target = np.where(np.arange(60) % 2, world.train.target, -1)  # every other list has none
    some = replace(world, train=replace(world.train, target=target))
    for trace in ("bound", "free"):
        cfg = replace(CFG, trace=trace, rl_tau=0.8)
        kinds, updates = examples_of(some.train, trace), []
        writer = RandomWriter(some.train, kinds)
        monkeypatch.setattr(train_rl, "block_decode", writer)
        monkeypatch.setattr(train_rl, "update_policy", lambda *args: updates.append(args) or {})
        run = Steps(tiny_gpt())
        start(monkeypatch, train_rl, some, run)
        train_rl.main(cfg)
        assert writer.asked == (kinds[-1].response.shape[1], 16, 0.8, 1.0)
        groups = torch.tensor(writer.rewards).view(6, 3)
        assert (np.array(writer.rows).reshape(6, 3) == np.array(writer.rows[::3])[:, None]).all()
        assert len(set(writer.rows)) > 3 and all(row % 2 for row in writer.rows)
        assert run.logs[0]["reward"] == pytest.approx(np.mean(writer.rewards))
        assert run.logs[0]["sampled_valid"] == pytest.approx(13 / 18)
        assert run.logs[0]["copied"] == pytest.approx(5 / 18)

        # An update gets the groups whose rewards differ, with their advantages.
        differ = (groups != groups[:, :1]).any(1)
        kept = differ.repeat_interleave(3)
        (_, _, prompt, decoded, advantage), = updates
        assert torch.equal(prompt, writer.prompt[kept])
        assert torch.equal(decoded.tokens, writer.tokens[kept])
        exact = (groups - groups.mean(1, keepdim=True)) / groups.std(1, keepdim=True)
        close(advantage, exact[differ].flatten(), atol=1e-4)
        assert run.logs[0]["signal"] == pytest.approx(differ.double().mean().item())

    # One group has a signal; if none has one, the loss is 0.
    for rewards, kept in (([0.5] * 9 + [1.0, 1.0, 0.0] + [-1.0] * 6, slice(9, 12)),
                          ([0.5] * 9 + [-1.0] * 9, slice(None))):
        updates.clear()
        monkeypatch.setattr(train_rl, "score_answers", lambda *_: (np.array(rewards), {}))
        train_rl.main(cfg)
        (_, _, _, decoded, advantage), = updates
        assert torch.equal(decoded.tokens, writer.tokens[kept])
        assert (advantage != 0).any() == (kept != slice(None))


# --- Whole runs -------------------------------------------------------------------------------

def test_a_stage_that_is_killed_goes_on_to_the_same_weights_and_log(monkeypatch, tmp_path):
    log = Run.log

    def until_killed(self, **values):
        log(self, **values)
        if self.step == 3:  # after the last checkpoint
            raise KeyboardInterrupt

    for stage, module in (("ar", train_ar), ("cft", train_cft), ("opd", train_opd),
                          ("rl", train_rl)):
        run(module, monkeypatch, tmp_path / "whole")
        monkeypatch.setattr(Run, "log", until_killed)
        with pytest.raises(SystemExit):
            run(module, monkeypatch, tmp_path / "killed")
        gc.collect()  # lets go of the lock, as the end of a process does
        monkeypatch.setattr(Run, "log", log)
        run(module, monkeypatch, tmp_path / "killed")
        run(module, monkeypatch, tmp_path / "killed")  # it has finished: nothing happens
        whole, killed = ({"log": [], "saved": torch.load(path / "checkpoint.pt"), "path": path}
                         for path in (tmp_path / name / "toy" / "seed0" / stage
                                      for name in ("whole", "killed")))
        for each in (whole, killed):
            for line in (each["path"] / "metrics.jsonl").read_text().splitlines():
                each["log"].append({**json.loads(line), "seconds": 0})
        assert whole["log"] == killed["log"] and len(whole["log"]) > 3
        assert whole["saved"]["finished"] and killed["saved"]["finished"]
        for part in ("model", "optimizers"):
            assert checksum(whole["saved"][part]) == checksum(killed["saved"][part])
