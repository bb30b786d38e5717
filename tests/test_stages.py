"""Invariants of the stages' own parts: loss weights, divergences, rewards, the clipped update."""
import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import plumbing.teacher
import train_cft
import train_opd
import train_rl
import trainer
from config import Config
from conftest import close, left_padded, same_decode, stream_hidden, tiny_gpt, words
from data import (ANSWER, EOS, LABEL, MASK, PAD, answer_labels, draw_batch, in_answer, tensors,
                  token_weights)
from diffusion import replay_logp
from fast.gpt import FastGPT
from model import GPT, Sampling, causal_hidden
from ours.states import answer_blocks
from sampler import NEVER, Decoded, Threshold, block_decode
from toy.world import toy_world
from train_cft import cft_loss
from train_opd import divergence, opd_loss
from train_rl import advantages, policy_loss, reward

LENGTHS = [4, 1, 6, 3]
CFG = Config(trace="free", n_train=60, n_val=10, n_test=10, rl_prompts=6, rl_group=3,
             bfloat16=False)
KINDS = ["forward", "reverse", "jsd"]


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def world():
    return toy_world(CFG)


class SGD:
    """Stands in for trainer.Run: plain gradient steps; keeps losses and logs."""

    def __init__(self, model, lr=1e-3, n_steps=1):
        self.model, self.lr, self.n_steps = model, lr, n_steps
        self.losses, self.logs = [], []

    def steps(self):
        return iter(range(self.n_steps))

    def update(self, loss):
        self.losses.append(loss.item())
        parameters = list(self.model.parameters())
        for p, g in zip(parameters, torch.autograd.grad(loss, parameters)):
            p.data -= self.lr * g
        return {}

    def log(self, **values):
        self.logs.append(values)

    def time_to_validate(self):
        return False


def start(monkeypatch, stage, world, run):
    """Makes the main function of a stage's module use this world and this run."""
    monkeypatch.setattr(stage, "load_world", lambda cfg: world)
    monkeypatch.setattr(stage, "start_from", lambda cfg, world, before: run.model)
    monkeypatch.setattr(stage, "Run", lambda cfg, name, model, world: run)


def seven(cfg, model, *rest):
    """Stands in for the CFT loss."""
    return 0 * model.embed.weight.sum() + 7.0


def recorded(monkeypatch, stage):
    """The roll-outs of a stage's module, as they are made: [(prompt, Decoded)]."""
    written = []

    def roll_out(*args):
        parts = trainer.roll_out(*args)
        (_, prompt, decoded), = parts
        written.append((prompt, decoded))
        return parts

    monkeypatch.setattr(stage, "roll_out", roll_out)
    return written


def taught_by(monkeypatch, stage, teacher):
    """Makes the main function of a stage's module take this teacher."""
    def load_stage(cfg, name, world):
        assert name == "ar"
        return teacher, None

    monkeypatch.setattr(stage, "load_stage", load_stage)


def block_hidden(model, prompt, clean, state, b):
    """One unpadded row through [prompt; clean blocks before b; state (B,)] under a mask written
    as loops -> (B, d) hidden states that predict the slots of block b."""
    B = len(state)
    row = torch.cat((prompt, clean[:b * B], state))
    number = list(range(-len(prompt), 0)) + [slot // B for slot in range((b + 1) * B)]
    mask = torch.tensor([[q >= k for k in number] for q in number])
    hidden = model(row[None], torch.arange(len(row))[None], mask[None, None])[0]
    return hidden[-B - 1:-1]


def test_every_row_of_a_batch_is_as_likely():
    batches = [draw_batch(8, 5, gen(seed)) for seed in range(2000)]
    assert all(len(rows) == 5 for rows in batches)
    share = np.bincount(np.concatenate(batches), minlength=8) / 10000
    assert np.abs(share - 1 / 8).max() < 0.03


# --- AR and CFT -------------------------------------------------------------------------------

def test_token_weights_by_hand():
    response = torch.tensor([[6, 9, ANSWER, LABEL, EOS, PAD],
                             [ANSWER, LABEL + 1, LABEL, LABEL + 2, EOS, PAD],
                             [6, 9, 9, 9, 9, EOS],                    # no answer
                             [6, ANSWER, ANSWER, EOS, PAD, PAD]])     # two starts
    assert token_weights(response, 4.0).tolist() == [
        [1, 1, 1, 4, 4, 0], [1, 4, 4, 4, 4, 0], [1] * 6, [1, 1, 4, 4, 0, 0]]


def test_the_ranking_is_what_stands_behind_answer_without_its_end():
    L, A = LABEL, ANSWER
    tokens = torch.tensor([[L, A, L, EOS, PAD], [L, L, L, EOS, PAD]])
    assert in_answer(tokens).tolist() == [[False, False, True, True, True], [False] * 5]
    assert answer_labels(tokens).tolist() == [[False, False, True, False, False], [False] * 5]


@pytest.mark.parametrize("B", [1, 2, 4])
@pytest.mark.parametrize("answer", [False, True])
def test_how_much_padding_a_batch_has_changes_no_loss(B, answer):
    # The teacher's responses are max_response wide, reference ones as wide as the longest.
    model, prompt, response = tiny_gpt(), left_padded(LENGTHS), words(4, 7, seed=1)
    response[:, 6], response[1, 4], response[1, 5:] = EOS, EOS, PAD
    if answer:
        response[:, 1] = ANSWER
    cfg = replace(CFG, block_size=B, cft_misplace=0.0, cft_penalty=2.0)
    wider = torch.cat((response, torch.full((4, -7 % B), PAD)), 1)
    close(cft_loss(cfg, model, prompt, response, gen()),
          cft_loss(cfg, model, prompt, wider, gen()), atol=1e-6)


def test_cft_trains_every_response_behind_its_own_prompt(world):
    responses = words(40, 9)  # to the first 40 training prompts
    responses[:, 6:] = PAD    # wider than the longest
    responses[::2, 5] = PAD
    seen = []
    for seed in range(20):
        prompt, response = train_cft.cft_batch(CFG, world, responses, gen(seed))
        assert response.shape == (CFG.batch_size, 6)
        rows = [int((responses[:, :6] == r).all(1).nonzero()[0]) for r in response]
        assert torch.equal(prompt, tensors(world.train, rows, "cpu")[0])
        seen.extend(rows)
    assert len(set(seen)) > 20


def test_cft_is_trained_on_the_references_or_on_what_the_teacher_wrote(world, monkeypatch):
    cfg, asked = replace(CFG, cft_prompts=30), []

    def teacher_responses(cfg, world, n):
        asked.append(n)
        return words(n, 6)

    monkeypatch.setattr(train_cft, "teacher_responses", teacher_responses)
    reference = tensors(world.train, range(30), "cpu")[1]
    assert torch.equal(train_cft.training_responses(cfg, world), reference) and not asked
    own = train_cft.training_responses(replace(cfg, cft_gold=False), world)
    assert torch.equal(own, words(30, 6)) and asked == [30]
    train_cft.training_responses(replace(cfg, cft_gold=False, cft_prompts=1000), world)
    assert asked == [30, 60]  # there are no more


class Teacher:
    """Stands in for load_stage and ar_decode: writes what it is told, and counts."""

    def __init__(self, world, said):
        self.world, self.said, self.model, self.decoded = world, said, tiny_gpt(), 0

    def load_stage(self, cfg, stage, world):
        assert stage == "ar"
        return self.model, None

    def ar_decode(self, model, prompt, max_len):
        train = self.world.train.prompt[:, -prompt.shape[1]:]
        rows = [int((train == row.numpy()).all(1).argmax()) for row in prompt]
        self.decoded += len(rows)
        return self.said[rows], None, torch.ones(len(rows))


def test_the_reference_stands_in_for_invalid_teacher_answers(world, monkeypatch, tmp_path):
    cfg = replace(CFG, run_dir=str(tmp_path), cft_prompts=30, cft_gold=False)
    reference = torch.from_numpy(world.train.response.astype(np.int64))
    said = reference.clone()
    said[:, 5] = 20  # the traces are the teacher's own
    last = (said[::3] != PAD).sum(1) - 2
    some = torch.arange(0, len(said), 3)
    said[some, last] = said[some, last - 1]  # a label twice
    teacher = Teacher(world, said)
    monkeypatch.setattr(plumbing.teacher, "load_stage", teacher.load_stage)
    monkeypatch.setattr(trainer, "ar_decode", teacher.ar_decode)
    invalid = torch.arange(len(said)) % 3 == 0
    expected = torch.where(invalid[:, None], reference, said)

    def written(cfg):
        return train_cft.training_responses(cfg, world)

    assert torch.equal(written(cfg), expected[:30]) and teacher.decoded == 30
    # They are kept: for as many prompts or fewer, for this teacher only.
    assert torch.equal(written(replace(cfg, cft_prompts=12)), expected[:12])
    assert teacher.decoded == 30
    assert torch.equal(written(replace(cfg, cft_prompts=50)), expected[:50])
    assert teacher.decoded == 80
    teacher.model = tiny_gpt(3)
    assert torch.equal(written(cfg), expected[:30]) and teacher.decoded == 110


# --- OPD: divergences -------------------------------------------------------------------------

def plain_kl(p, q):
    """KL(P || Q) of rows of probabilities (n, V), where P is not 0."""
    out = []
    for x, y in zip(p.tolist(), q.tolist()):
        out.append(sum(a * math.log(a / b) for a, b in zip(x, y) if a > 0))
    return torch.tensor(out, dtype=torch.float64)


def plain_divergence(S, T, kind, beta=0.5):
    """The definition, on probabilities (n, V)."""
    if kind == "forward":
        return plain_kl(T, S)
    if kind == "reverse":
        return plain_kl(S, T)
    M = beta * T + (1 - beta) * S
    return beta * plain_kl(T, M) + (1 - beta) * plain_kl(S, M)


def test_divergences_equal_their_sums_written_out():
    student = 2 * torch.randn(3, 5, generator=gen(1), dtype=torch.float64)
    teacher = 2 * torch.randn(3, 5, generator=gen(2), dtype=torch.float64)
    S, T = student.softmax(-1), teacher.softmax(-1)
    for kind in KINDS:
        close(divergence(student, teacher, kind), plain_divergence(S, T, kind))
    for beta in (0.1, 0.5, 0.8):
        close(divergence(student, teacher, "jsd", beta), plain_divergence(S, T, "jsd", beta))
    there = divergence(student, teacher, "jsd", 0.5)
    close(there, divergence(teacher, student, "jsd", 0.5))
    there = divergence(student, teacher, "jsd", 0.2)
    assert not torch.allclose(there, divergence(teacher, student, "jsd", 0.2))


@pytest.mark.parametrize("kind", KINDS)
def test_divergence_stays_finite_where_a_token_is_impossible(kind):
    logits = torch.randn(2, 6, requires_grad=True)
    impossible = torch.randn(2, 6)
    impossible[:, :2] = -1e4  # as [PAD] and [MASK] have it
    masked = torch.cat((torch.full((2, 2), -1e4), logits[:, 2:]), 1)
    loss = divergence(masked, impossible, kind).sum()
    assert loss.isfinite() and torch.autograd.grad(loss, logits)[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mass", [1e-12, 1e-3, 0.5, 0.999])
def test_reverse_kl_compares_the_choice_among_tokens_that_the_target_allows(dtype, mass):
    """P(excluded) = mass of the student costs nothing, least of all 10^4 nats a unit."""
    allowed = torch.randn(4, 6, generator=gen(1), dtype=torch.float64)
    wanted = torch.randn(4, 6, generator=gen(2), dtype=torch.float64)
    # Three more tokens: excluded ones, which share `mass` in the student.
    others = math.log(mass / (1 - mass) / 3) + allowed.logsumexp(-1, keepdim=True)
    student = torch.cat((allowed, others.expand(-1, 3)), 1).to(dtype).requires_grad_()
    assert student.softmax(-1)[:, 6:].sum(-1).tolist() == pytest.approx([mass] * 4)
    teacher = torch.cat((wanted, torch.full((4, 3), -1e4)), 1).to(dtype)
    got = divergence(student, teacher, "reverse")
    exact = plain_divergence(allowed.softmax(-1), wanted.softmax(-1), "reverse")
    close(got.detach().double(), exact, atol=1e-5 if dtype == torch.float32 else 1e-9)
    gradient = torch.autograd.grad(got.sum(), student)[0]
    assert gradient.isfinite().all() and (gradient[:, 6:] == 0).all()
    # The same choice among the allowed ones: no distance.
    equal = torch.cat((allowed, torch.full((4, 3), -1e4)), 1).to(dtype)
    assert divergence(student, equal, "reverse").abs().max() < 1e-5


# --- OPD: the loss ----------------------------------------------------------------------------

@pytest.mark.parametrize("kind", KINDS)
def test_opd_loss_vanishes_for_the_teacher_itself_at_block_size_one_and_only_there(kind):
    teacher, prompt = tiny_gpt(), left_padded(LENGTHS)

    def loss(student, B):
        cfg = replace(CFG, block_size=B, opd_divergence=kind, opd_exclude=False)
        decoded = block_decode(student, prompt, 8, B, Threshold(0.9))
        return opd_loss(cfg, student, teacher, prompt, decoded, gen())

    assert abs(loss(teacher, 1)) < 1e-6
    assert loss(tiny_gpt(3), 1) > 1e-2
    assert loss(teacher, 4) > 1e-2  # its denoising states are no AR states


def found(possible, loss, share=1.0):
    """Whether loss(seed) takes that share of the possible values, and nothing else."""
    seen = set()
    for seed in range(40 * len(possible)):
        got = loss(seed)
        nearest = min(range(len(possible)), key=lambda n: abs(possible[n] - got))
        assert abs(possible[nearest] - got) < 1e-6
        seen.add(nearest)
        if len(seen) >= share * len(possible):
            return True
    return False


def state_nats(student, decoded, target, prompt, B, b, step, kind):
    """Divergences of the tokens of block b that are scored in a state: (n,), one row."""
    steps, filled = decoded.commit_step[0], decoded.filled[0]
    slots = range(b * B, (b + 1) * B)
    state = torch.tensor([filled[i] if steps[i] < step else MASK for i in slots])
    scored = []
    for i in slots:
        if decoded.tokens[0, i] != PAD and (i == b * B or state[i - b * B] == MASK):
            scored.append(i)
    S = student.logits(block_hidden(student, prompt[0], filled, state, b)).softmax(-1)
    return plain_divergence(S[[i - b * B for i in scored]], target[scored].softmax(-1), kind)


@torch.no_grad()
@pytest.mark.parametrize("more", [0, 1])
@pytest.mark.parametrize("seed, prompt_seed, behind", [(3, 7, "open"), (5, 10, "committed")])
def test_opd_loss_is_the_mean_divergence_over_what_is_masked_in_states_of_its_blocks(
        seed, prompt_seed, behind, more):
    student, teacher, B = tiny_gpt(seed), tiny_gpt(0), 4
    prompt = words(1, 3, seed=prompt_seed)
    cfg = replace(CFG, block_size=B, answer_states=more, answer_weight=1.0,
                  opd_exclude=False)
    decoded = block_decode(student, prompt, 2 * B, B, Threshold(0.9))
    end = int((decoded.tokens[0] != PAD).sum())
    n_steps = []
    for row in decoded.commit_step[0].view(2, B).tolist():
        n_steps.append(1 + max(s for s in row if s != NEVER))
    assert end == 2 * B - 1 and min(n_steps) > 1  # the response ends inside its second block
    assert (decoded.filled[0, -1] == MASK) == (behind == "open")
    target = teacher.logits(causal_hidden(teacher, prompt, decoded.tokens))[0]

    # The states of each block, as many together as are drawn of it.
    extra = answer_blocks(decoded.tokens, B, more)[0].tolist()
    draws = []
    for b in range(2):
        nats = [state_nats(student, decoded, target, prompt, B, b, step, cfg.opd_divergence)
                for step in range(n_steps[b])]
        times = 1 + extra.count(b)
        draws.append(list(itertools.combinations_with_replacement(nats, times)))
    possible = []
    for first, second in itertools.product(*draws):
        if more:  # a state weighs its block's tokens, however many of them are masked
            each = [sum(x.mean() for x in drawn) / len(drawn) for drawn in (first, second)]
            possible.append((each[0] * B + each[1] * (end - B)).item() / end)
        else:
            possible.append(torch.cat(first + second).mean().item())
    possible = sorted({round(p, 9) for p in possible})  # some states score the same tokens

    def loss(seed):
        return opd_loss(cfg, student, teacher, prompt, decoded, gen(seed)).item()

    assert found(possible, loss, share=0.5 if more else 1.0)


@torch.no_grad()
def test_more_states_of_the_answer_weigh_as_one_and_answer_tokens_by_their_weight():
    student, teacher, A = tiny_gpt(3), tiny_gpt(0), ANSWER
    tokens = torch.tensor([[3, 4, 5, 6, 4, A, 8, 9]])  # the answer is in the second block
    # One step a block: one state.
    decoded = Decoded(tokens, tokens, torch.zeros_like(tokens), torch.zeros(1, 8), None)
    target = teacher.logits(causal_hidden(teacher, words(1, 3), tokens))[0]
    masks = torch.full((1, 1, 8), MASK)
    logits = student.logits(stream_hidden(student, words(1, 3), tokens, masks, 4)[0, 0])
    weight = torch.tensor([1.0, 1, 1, 1, 1, 1, 5, 5])
    expected = (divergence(logits, target, CFG.opd_divergence) * weight).sum() / weight.sum()
    for n in (0, 3):
        cfg = replace(CFG, block_size=4, answer_weight=5.0, answer_states=n,
                      opd_exclude=False)
        got = opd_loss(cfg, student, teacher, words(1, 3), decoded, gen())
        close(got, expected, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_labels_that_a_state_shows_are_no_target_of_its_masked_slots(kind):
    student, teacher, prompt, B = tiny_gpt(3), tiny_gpt(0), words(1, 3), 4
    # All after <answer> are labels, but for [EOS].
    tokens = torch.tensor([[ANSWER, 3, 4, 5, 6, 8, 9, EOS]])
    steps = torch.tensor([[0, 0, 0, 0, 0, 1, 0, 1]])
    decoded = Decoded(tokens, tokens, steps, torch.zeros(1, 8), None)
    cfg = replace(CFG, block_size=B, answer_states=0, answer_weight=1.0, opd_divergence=kind)
    target = teacher.logits(causal_hidden(teacher, prompt, tokens))[0]
    # The two states of the second block: what it shows, the slots scored, those of them without
    # the labels shown, these labels. Slot 4 is predicted from the clean text alone: once it
    # stands there its own label is still its target.
    states = [([MASK] * 4, [4, 5, 6, 7], [4, 5, 6], [3, 4, 5]),
              ([6, MASK, 9, MASK], [4, 5, 7], [5], [3, 4, 5, 6, 9])]
    possible = []
    for state, scored, masked, shown in states:
        noised = torch.tensor([MASK] * 4 + state)[None, None]
        S = student.logits(stream_hidden(student, prompt, tokens, noised, B)[0, 0]).softmax(-1)
        T = target.softmax(-1)
        for slot in masked:
            T[slot, shown] = 0
            T[slot] /= T[slot].sum()
            if kind == "reverse":  # the choice among the others
                S[slot, shown] = 0
                S[slot] /= S[slot].sum()
        nats = plain_divergence(S, T, kind)
        possible.append(torch.cat((nats[:4], nats[scored])).mean().item())
    assert abs(possible[0] - possible[1]) > 1e-3 and max(possible) < 30  # not 10^4

    def loss(seed):
        return opd_loss(cfg, student, teacher, prompt, decoded, gen(seed)).item()

    assert found(possible, loss)


def test_an_opd_step_mixes_divergence_and_anchor_and_moves_the_student_only(monkeypatch, world):
    teacher = tiny_gpt(0, len(world.words))
    before = [p.clone() for p in teacher.parameters()]
    taught_by(monkeypatch, train_opd, teacher)
    monkeypatch.setattr(train_cft, "cft_loss", seven)
    written = recorded(monkeypatch, train_opd)

    def distance(cfg, student):
        losses = [opd_loss(cfg, student, teacher, *written[-1], gen(seed)) for seed in range(5)]
        return sum(losses).item() / 5

    for anchor in (0.0, 2.0):
        run = SGD(tiny_gpt(3, len(world.words)), 5e-3)
        old = tiny_gpt(3, len(world.words))
        start(monkeypatch, train_opd, world, run)
        cfg = replace(CFG, opd_anchor=anchor, batch_size=4, opd_prompts=3)
        train_opd.main(cfg)
        prompt = written[-1][0]
        first = tensors(world.train, range(3), "cpu")[0][:, -prompt.shape[1]:].tolist()
        assert all(row in first for row in prompt.tolist())
        log = run.logs[0]
        assert run.losses == pytest.approx([log["divergence"] + 7.0 * anchor])
        assert distance(cfg, run.model) < distance(cfg, old)
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, teacher.parameters()))


@pytest.mark.parametrize("group", [1, 3])
def test_opd_decodes_one_response_a_prompt_as_it_is_served_and_draws_several(
        monkeypatch, world, group):
    model = tiny_gpt(3, len(world.words))
    run, written = SGD(model, 0.0), recorded(monkeypatch, train_opd)
    start(monkeypatch, train_opd, world, run)
    taught_by(monkeypatch, train_opd, tiny_gpt(0, len(world.words)))
    cfg = replace(CFG, batch_size=5, opd_group=group, opd_tau=0.9, tau=0.1, opd_anchor=0.0)
    train_opd.main(cfg)
    (prompt, decoded), = written
    served, elsewhere = (trainer.decode(cfg, model, prompt, world.max_response, tau)
                         for tau in (0.9, 0.1))
    assert not torch.equal(served.commit_step, elsewhere.commit_step)  # opd_tau matters
    rows = draw_batch(len(world.train), 5, trainer.rng_for(cfg, "opd", 0)).repeat(group)
    assert torch.equal(prompt, tensors(world.train, rows, "cpu")[0]) and len(rows) == 5 * group
    valid = trainer.valid_rate(decoded.tokens, world.train, rows)
    assert run.logs[0]["rollout_valid"] == valid
    if group == 1:
        same_decode(decoded, served)
    else:  # they differ, and from the greedy one
        for drawn, best in zip(decoded.tokens.view(5, group, -1), served.tokens[::group]):
            assert len(torch.cat((drawn, best[None])).unique(dim=0)) == group + 1


# --- RL ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("before, after, k, valid, conditional, expected", [
    (3, 1, 4, True, True, 0.5 + 0.1),    # promoted
    (3, 1, 8, True, True, 0.25 + 0.1),
    (1, 3, 4, True, True, -0.5),         # demoted
    (2, 2, 4, True, True, 0.0),          # same place, not the first: no bonus
    (0, 0, 4, True, True, 0.1),          # first and stays first
    (0, 3, 4, True, True, -0.75),
    (3, 1, 4, False, True, -1.0),        # invalid, whatever the repaired rank
    (0, 0, 4, False, False, -1.0),
    (3, 1, 4, True, False, 0.5 + 0.1),
    (1, 3, 4, True, False, -0.5 + 0.1),  # paid for format alone
    (2, 2, 4, True, False, 0.1)])
def test_reward_by_hand(before, after, k, valid, conditional, expected):
    got = reward(np.array([before, 2]), np.array([after, 0]), np.array([k, 10]),
                 np.array([valid, True]), 0.1, conditional)
    assert got == pytest.approx([expected, 0.2 + 0.1])


@pytest.mark.parametrize("k", [2, 8, 12])
@pytest.mark.parametrize("conditional", [True, False])
def test_an_invalid_answer_earns_less_than_the_worst_valid_one(k, conditional):
    before, after = (x.flatten() for x in np.meshgrid(np.arange(k), np.arange(k)))
    lengths, yes = np.full(k * k, k), np.ones(k * k, bool)
    valid = reward(before, after, lengths, yes, 0.1, conditional)
    assert (reward(before, after, lengths, ~yes, 0.1, conditional) < valid.min()).all()


def test_advantages_are_normalised_within_a_group_and_equal_groups_carry_no_signal():
    rewards = torch.tensor([[1.0, 0.0, -1.0], [0.5, 0.5, 0.5], [-1.0, -1.0, 0.5]])
    advantage, signal = advantages(rewards)
    assert signal.tolist() == [True, False, True]
    for row, r in zip(advantage[signal], rewards[signal].tolist()):
        exact = [(x - np.mean(r)) / np.std(r, ddof=1) for x in r]
        close(row, torch.tensor(exact, dtype=torch.float32), atol=1e-4)
    assert (advantage[1] == 0).all()


@pytest.mark.parametrize("ratio, advantage, gradient", [
    # A good token is not pushed above the range, a bad one not below; the way back is open.
    (1.0, 1, True), (1.27, 1, True), (1.3, 1, False), (0.7, 1, True),
    (1.0, -1, True), (0.81, -1, True), (0.79, -1, False), (1.3, -1, True)])
def test_clip_stops_the_gradient_only_in_its_direction(ratio, advantage, gradient):
    logp = torch.tensor([[math.log(ratio), 0.0]], requires_grad=True)
    loss, r = policy_loss(logp, torch.zeros(1, 2), torch.tensor([float(advantage)]),
                          torch.ones(1, 2), 0.2, 0.28)
    grad = torch.autograd.grad(loss, logp)[0][0]
    close(r.detach()[0], torch.tensor([ratio, 1.0]), atol=1e-6)
    pushed = -ratio * advantage / 2 if gradient else 0.0
    close(grad, torch.tensor([pushed, -advantage / 2]), atol=1e-6)
    clipped = max(min(ratio, 1.28), 0.8)
    exact = -(min(ratio * advantage, clipped * advantage) + advantage) / 2
    close(loss.detach(), torch.tensor(exact), atol=1e-6)


def test_policy_loss_is_a_mean_over_the_tokens_of_the_batch_not_over_responses():
    logp, mask = torch.zeros(2, 4), torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]])
    loss, _ = policy_loss(logp, logp, torch.tensor([1.0, -2.0]), mask, 0.2, 0.28)
    close(loss, torch.tensor(-(4 * 1.0 - 2.0) / 5), atol=1e-6)


def sampled(model, prompt, B, temperature=1.0, seed=0):
    """Responses of up to 8 tokens, drawn."""
    return block_decode(model, prompt, 8, B, Threshold(0.6), Sampling(temperature, gen(seed)))


def rl_update(cfg, run, prompt, decoded, advantage, anchor=None):
    """train_rl.update, its advantages given as a list."""
    A = torch.tensor(advantage, dtype=torch.float64)
    return train_rl.update(cfg, run, prompt, decoded, A, anchor)


@pytest.mark.parametrize("B", [1, 2, 4])
def test_importance_ratio_is_one_before_the_first_update_and_not_after_it(B):
    model, prompt = tiny_gpt(), left_padded(LENGTHS)
    decoded, signs = sampled(model, prompt, B), [1.0, -1.0, -1.0, 1.0]
    cfg = replace(CFG, block_size=B, rl_epochs=1, rl_anchor=0.0)
    first = rl_update(cfg, SGD(model, 0.1), prompt, decoded, signs)
    assert first["replay_off"] < 1e-9 and first["ratio_off"] == 0 == first["clipped"]
    second = rl_update(cfg, SGD(model), prompt, decoded, signs)
    assert second["replay_off"] > 1e-3
    log = rl_update(replace(cfg, rl_epochs=2), SGD(model), prompt, decoded, signs)
    assert log["ratio_off"] > 1e-3 and 0 <= log["clipped"] < 1


@pytest.mark.parametrize("B", [1, 2, 4])
@pytest.mark.parametrize("better", [0, 1])
def test_an_update_raises_the_better_of_two_samples_and_lowers_the_worse(B, better):
    model, prompt = tiny_gpt(5), words(1, 4).expand(2, 4)
    decoded = sampled(model, prompt, B)
    assert not torch.equal(decoded.tokens[0], decoded.tokens[1])
    rewards = torch.tensor([[0.5, -1.0]] if better == 0 else [[-1.0, 0.5]])
    advantage = advantages(rewards)[0].flatten()
    cfg = replace(CFG, block_size=B, rl_anchor=0.0)
    train_rl.update(cfg, SGD(model), prompt, decoded, advantage, None)
    change = (replay_logp(model, prompt, decoded, B, 1.0) - decoded.logp).sum(1)
    assert change[better] > 1e-4 and change[1 - better] < -1e-4


def test_rl_adds_the_anchor_to_the_policy_loss():
    model, prompt = tiny_gpt(), left_padded(LENGTHS)
    decoded = sampled(model, prompt, 2)
    run, cfg = SGD(model, 0.0), replace(CFG, block_size=2, rl_epochs=1)

    def anchor():
        return seven(cfg, model)

    for weight in (0.0, 2.0):
        signs = [1.0, -1.0, -1.0, 1.0]
        rl_update(replace(cfg, rl_anchor=weight), run, prompt, decoded, signs, anchor)
    assert run.losses[1] == pytest.approx(run.losses[0] + 14.0)


# --- RL: the gradient of an update ------------------------------------------------------------

def replayed(model, prompt, decoded, B):
    """Log-probabilities of the decoded tokens, by loops: {(row, slot): a scalar}. A state shows
    what was committed in an earlier step; each row goes without padding, each state alone."""
    out = {}
    for n, row in enumerate(prompt):
        steps, filled = decoded.commit_step[n], decoded.filled[n]
        real = row[row != PAD]
        for i in (decoded.tokens[n] != PAD).nonzero()[:, 0].tolist():
            b = i // B
            slots = range(b * B, (b + 1) * B)
            state = torch.tensor([filled[j] if steps[j] < steps[i] else MASK for j in slots])
            hidden = block_hidden(model, real, filled, state, b)[i % B]
            out[n, i] = F.log_softmax(model.logits(hidden), -1)[filled[i]]
    return out


def surrogate(logp, old, advantage, low, high):
    """The clipped surrogate of DAPO, token by token."""
    total = 0.0
    for (n, i), new in logp.items():
        ratio, A = math.exp(new - old[n, i]), advantage[n]
        total -= min(ratio * A, min(max(ratio, 1 - low), 1 + high) * A)
    return total / len(logp)


class SecondEpoch(SGD):
    """Moves the weights far in the first update, and keeps the gradient of the second."""

    def update(self, loss):
        self.losses.append(loss.item())
        self.gradient = torch.autograd.grad(loss, list(self.model.parameters()))
        if len(self.losses) == 1:
            torch.manual_seed(0)
            for p in self.model.parameters():
                p.data += 0.1 * torch.randn_like(p)
        return {}


def directions(parameters):
    """Directions for derivatives: random ones, and single weights of every tensor."""
    torch.manual_seed(1)
    out = [[torch.randn_like(p) for p in parameters] for _ in range(3)]
    for at, p in enumerate(parameters):
        one = [torch.zeros_like(q) for q in parameters]
        one[at].view(-1)[torch.randint(p.numel(), ())] = 1.0
        out.append(one)
    return out


@torch.no_grad()
def derivative(f, parameters, direction, eps=1e-6):
    """By a central difference."""
    values = []
    for sign in (1, -2):
        for p, d in zip(parameters, direction):
            p += sign * eps * d
        values.append(f())
    for p, d in zip(parameters, direction):
        p += eps * d
    return (values[0] - values[1]) / (2 * eps)


def cases_of(logp, old, advantage, low, high):
    """How many tokens are in each case of the clip."""
    out = {"inside": 0, "clipped above": 0, "clipped below": 0, "open above": 0, "open below": 0}
    for (n, i), new in logp.items():
        ratio = math.exp(new - old[n, i])
        if 1 - low < ratio < 1 + high:
            out["inside"] += 1
        else:
            above = ratio > 1
            clipped = above == (advantage[n] > 0)
            out[f"{'clipped' if clipped else 'open'} {'above' if above else 'below'}"] += 1
    return out


@pytest.mark.parametrize("B", [1, 2, 4])
@pytest.mark.parametrize("kind", [GPT, FastGPT])
def test_the_gradient_of_the_second_epoch_is_the_numerical_one(B, kind):
    model, prompt = tiny_gpt(kind=kind), left_padded(LENGTHS)
    decoded = sampled(model, prompt, B, seed=7)
    advantage, low, high = [1.3, -0.7, 0.4, -1.0], 0.2, 0.28
    old = {at: value.item() for at, value in replayed(model, prompt, decoded, B).items()}
    tokens = decoded.tokens != PAD
    assert len(old) == tokens.sum()
    close(torch.tensor([old[n, i] for n, i in tokens.nonzero().tolist()], dtype=torch.float64),
          decoded.logp[tokens])

    run = SecondEpoch(model)
    cfg = replace(CFG, block_size=B, rl_epochs=2, rl_anchor=0.0)
    log = rl_update(cfg, run, prompt, decoded, advantage)
    parameters = list(model.parameters())

    def loss():
        return surrogate(replayed(model, prompt, decoded, B), old, advantage, low, high)

    with torch.no_grad():
        assert run.losses[1] == pytest.approx(float(loss()))
        cases = cases_of(replayed(model, prompt, decoded, B), old, advantage, low, high)
    assert min(cases.values()) > 0, cases  # the test has all cases
    assert log["clipped"] == pytest.approx(1 - cases["inside"] / len(old))
    for direction in directions(parameters):
        exact = sum((g * d).sum() for g, d in zip(run.gradient, direction)).item()
        numerical = derivative(loss, parameters, direction)
        assert exact == pytest.approx(numerical, rel=1e-5, abs=1e-7)


# --- RL: a step -------------------------------------------------------------------------------

def with_rewards(monkeypatch, rewards):
    """Gives the rewards (groups) to whatever is sampled next."""
    flat = np.array(rewards).flatten()
    monkeypatch.setattr(train_rl, "score_answers", lambda cfg, world, rows, decoded: (flat, {}))


def test_groups_with_equal_rewards_make_no_update_and_do_not_dilute_others(monkeypatch, world):
    model = tiny_gpt(vocab=len(world.words))
    cfg = replace(CFG, rl_group=2, rl_prompts=2, rl_epochs=1, rl_anchor=0.0)
    run, written = SGD(model, 0.0), recorded(monkeypatch, train_rl)
    start(monkeypatch, train_rl, world, run)
    with_rewards(monkeypatch, [[-1.0, -1.0], [0.5, 0.5]])
    train_rl.main(cfg)
    assert not run.losses and run.logs[-1]["signal"] == 0
    with_rewards(monkeypatch, [[-1.0, -1.0], [0.5, 0.0]])
    train_rl.main(cfg)
    assert run.logs[-1]["signal"] == 0.5
    prompt, decoded = written[-1]
    better = advantages(torch.tensor([[0.5, 0.0]]))[0].flatten()
    train_rl.update(cfg, run, prompt[2:], decoded.take(slice(2, 4)), better, None)
    assert len(run.losses) == 2 and run.losses[0] == pytest.approx(run.losses[1])


class RandomWriter:
    """Stands in for block_decode: answers at random, every fourth one without its last label."""

    def __init__(self, world):
        self.world, self.rng, self.written, self.prompts = world, np.random.default_rng(0), [], []

    def decode(self, model, prompt, max_len, block_size, rule, sampling):
        assert sampling.temperature == 1.0
        train = self.world.train
        tokens = torch.zeros(len(prompt), max_len, dtype=torch.long)
        for n, p in enumerate(prompt):
            row = int((train.prompt[:, -prompt.shape[1]:] == p.numpy()).all(1).argmax())
            order = self.rng.permutation(int(train.list_length[row]))[:None if n % 4 else -1]
            tokens[n, :len(order) + 2] = torch.tensor([ANSWER, *(LABEL + order), EOS])
            self.written.append((row, order))
        self.prompts.append(prompt)
        zeros = torch.zeros_like(tokens)
        return Decoded(tokens, tokens, zeros, zeros.double(), torch.ones(len(prompt)))


def plain_reward(train, row, order):
    """Of an answer without repeated labels."""
    target, k = int(train.target[row]), int(train.list_length[row])
    if len(order) < k:
        return -1.0
    rise = target - order.tolist().index(target)
    return rise / k + 0.1 * (rise > 0 or target == rise == 0)


def test_a_roll_out_groups_samples_of_a_prompt_and_rewards_the_rise_of_its_target(monkeypatch):
    cfg = replace(CFG, vary_lists=1.0)
    world = toy_world(cfg)
    writer, updates = RandomWriter(world), []
    monkeypatch.setattr(trainer, "block_decode", writer.decode)
    monkeypatch.setattr(train_rl, "update", lambda *args: updates.append(args) or {})
    run = SGD(tiny_gpt(vocab=len(world.words)))
    start(monkeypatch, train_rl, world, run)
    taught_by(monkeypatch, train_rl, None)
    train_rl.main(cfg)

    prompt, log = writer.prompts[0], run.logs[0]
    assert (prompt.view(6, 3, -1) == prompt.view(6, 3, -1)[:, :1]).all()
    assert len(prompt.unique(dim=0)) > 3
    rewards = torch.tensor([plain_reward(world.train, *each) for each in writer.written])
    assert log["reward"] == pytest.approx(rewards.mean().item())
    assert log["sampled_valid"] == pytest.approx(13 / 18)

    # An update gets the groups whose rewards differ, with their advantages.
    groups = rewards.view(6, 3)
    differ = (groups != groups[:, :1]).any(1)
    kept = differ.repeat_interleave(3)
    _, _, its_prompt, its_decoded, advantage, _ = updates[0]
    assert torch.equal(its_prompt, prompt[kept])
    assert len(its_decoded.tokens) == kept.sum()
    exact = (groups - groups.mean(1, keepdim=True)) / groups.std(1, keepdim=True)
    close(advantage, exact[differ].flatten(), atol=1e-4)
    assert log["signal"] == pytest.approx(differ.double().mean().item())


def test_the_anchor_of_rl_is_the_divergence_on_its_roll_outs_drawn_anew_in_every_update(
        monkeypatch, world):
    teacher, anchors = tiny_gpt(0, len(world.words)), []
    run, written = SGD(tiny_gpt(3, len(world.words)), 0.0), recorded(monkeypatch, train_rl)

    def loss(cfg, student, its_teacher, prompt, decoded, rng):
        assert student is run.model and its_teacher is teacher
        assert rng.initial_seed() == trainer.rng_for(cfg, "rl", 0).initial_seed()
        anchors.append((prompt, decoded, opd_loss(cfg, student, teacher, prompt, decoded, rng)))
        return anchors[-1][2]

    monkeypatch.setattr(train_rl, "opd_loss", loss)
    start(monkeypatch, train_rl, world, run)
    taught_by(monkeypatch, train_rl, teacher)
    with_rewards(monkeypatch, [[0.5, 0.5], [1.0, 0.0]])
    train_rl.main(replace(CFG, rl_group=2, rl_prompts=2, rl_epochs=2, rl_anchor=2.0))
    (prompt, decoded), = written
    for its_prompt, its_decoded, _ in anchors:  # of the group that is trained on
        assert torch.equal(its_prompt, prompt[2:])
        same_decode(its_decoded, decoded.take(slice(2, 4)))
    first, second = (anchor.item() for _, _, anchor in anchors)
    assert first > 0.01 and abs(first - second) > 1e-6
    policy = run.logs[0]["policy_loss"]  # the weights stay: of both updates
    assert run.losses == pytest.approx([policy + 2 * first, policy + 2 * second])
    assert all(p.grad is None for p in teacher.parameters())
