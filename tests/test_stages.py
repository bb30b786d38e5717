"""Invariants of the four stages' own parts: loss weights, divergences, rewards, advantages, the clipped update."""
import itertools
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train_cft
import train_opd
import train_rl
from common import draw_batch
from config import Config
from conftest import close, left_padded, stream_hidden, tiny_gpt, words
from data import ANSWER, LABEL, tensors, toy_world
from diffusion import diffusion_loss, replay_logp
from model import EOS, MASK, PAD, causal_hidden
from sampler import NEVER, Decoded, block_decode
from train_ar import answer_labels, best_left, in_answer, misplaced, token_weights
from train_opd import divergence, opd_loss
from train_rl import advantages, policy_loss, reward

LENGTHS = [4, 1, 6, 3]
CFG = Config(n_train=60, n_val=10, n_test=10, rl_prompts=6, rl_group=3)


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


class SGD:
    """Stands in for common.Run: plain gradient steps; keeps the losses."""
    def __init__(self, model, lr=1e-3):
        self.model, self.lr, self.losses = model, lr, []

    def update(self, loss):
        self.losses.append(loss.item())
        for p, g in zip(self.model.parameters(), torch.autograd.grad(loss, list(self.model.parameters()))):
            p.data -= self.lr * g
        return {}


def test_every_row_of_a_batch_is_as_likely():
    batches = [draw_batch(8, 5, gen(seed)) for seed in range(2000)]
    assert all(len(rows) == 5 for rows in batches)
    assert np.abs(np.bincount(np.concatenate(batches), minlength=8) / 10000 - 1 / 8).max() < 0.03


# --- AR and CFT ----------------------------------------------------------------------------------------------------------

def test_token_weights_by_hand():
    response = torch.tensor([[6, 9, ANSWER, LABEL, EOS, PAD], [ANSWER, LABEL + 1, LABEL, LABEL + 2, EOS, PAD],
                             [6, 9, 9, 9, 9, EOS], [6, ANSWER, ANSWER, EOS, PAD, PAD]])  # no answer; two starts
    assert token_weights(response, 4.0).tolist() == [[1, 1, 1, 4, 4, 0], [1, 4, 4, 4, 4, 0], [1] * 6, [1, 1, 4, 4, 0, 0]]


@pytest.mark.parametrize("B", [1, 2, 4])
def test_how_much_padding_a_batch_has_changes_no_loss(B):
    # Teacher outputs are max_response wide, reference responses as wide as the longest of them.
    model, prompt, response = tiny_gpt(), left_padded(LENGTHS), words(4, 7, seed=1)
    response[:, 6], response[1, 4], response[1, 5:] = EOS, EOS, PAD
    loss = lambda r: diffusion_loss(model, prompt, r, B, "complementary", 0.3, gen(), token_weights(r, 4.0))
    close(loss(response), loss(torch.cat((response, torch.full((4, -7 % B), PAD)), 1)), atol=1e-6)


def test_cft_trains_every_teacher_output_behind_its_own_prompt(monkeypatch):
    world, seen = toy_world(CFG), []
    outputs = words(40, 6)  # of the first 40 training prompts

    def loss(model, prompt, response, block_size, kind, first_step, generator, weight, extra, source, once, rows):
        rows = [int((outputs == r).all(1).nonzero()[0]) for r in response]
        assert torch.equal(prompt, tensors(world.train, rows, "cpu")[0]) and torch.equal(weight, token_weights(response, 4.0))
        assert (block_size, kind, first_step) == (16, "complementary", 0.3)
        assert torch.equal(extra, train_cft.answer_blocks(response, 16, 2))
        assert torch.equal(once, 3.0 * answer_labels(response))
        assert torch.equal(source.sort(1).values, torch.arange(6).expand(len(rows), -1))
        seen.extend(rows)

    monkeypatch.setattr(train_cft, "diffusion_loss", loss)
    for seed in range(20):
        train_cft.cft_loss(replace(CFG, cft_penalty=3.0), world, None, outputs, gen(seed))
    assert len(set(seen)) > 20


def test_the_reference_stands_in_for_invalid_teacher_answers(monkeypatch, tmp_path):
    world, cfg = toy_world(CFG), replace(CFG, run_dir=str(tmp_path), cft_prompts=30, cft_gold=False)
    written = torch.from_numpy(world.train.response[:30].astype(np.int64))
    written[:, 5] = 20  # the traces are the teacher's own
    said, end = written.clone(), (written[::3] != PAD).sum(1) - 2
    said[torch.arange(0, 30, 3), end] = said[torch.arange(0, 30, 3), end - 1]  # a label twice
    here = lambda prompt: int((world.train.prompt[:30, -prompt.shape[1]:] == prompt[:1].numpy()).all(1).argmax())
    monkeypatch.setattr(train_cft, "ar_decode", lambda teacher, prompt, n: (said[here(prompt):here(prompt) + len(prompt)], None, torch.ones(len(prompt))))
    outputs = train_cft.teacher_outputs(cfg, world, tiny_gpt())
    invalid = torch.arange(30) % 3 == 0
    assert torch.equal(outputs[~invalid], said[~invalid])
    assert torch.equal(outputs[invalid], torch.from_numpy(world.train.response[:30].astype(np.int64))[invalid])


def test_misplaced_labels_stay_in_the_answer_and_what_should_follow_is_the_best_that_is_left():
    response = torch.tensor([[20, 21, ANSWER, 8, 9, 10, 11, 12, EOS, PAD], [20, ANSWER, 9, 8, 12, EOS, PAD, PAD, PAD, PAD],
                             [20, 21, 22, EOS, PAD, PAD, PAD, PAD, PAD, PAD]]).repeat(200, 1)
    assert torch.equal(misplaced(response, 0.0, gen()), torch.arange(10).expand(600, -1))
    source = misplaced(response, 1.0, gen())
    shown, target = response.gather(1, source), response.gather(1, best_left(source))
    assert torch.equal(source.sort(1).values, torch.arange(10).expand(600, -1))
    label = in_answer(response) & (response > EOS)
    assert torch.equal(shown[~label], response[~label]) and 0.2 < (shown != response)[label].float().mean() < 0.6
    for y, z, t in zip(response.tolist(), shown.tolist(), target.tolist()):
        for i in range(10):
            left = list(y)
            for token in z[:i]:
                left.remove(token)
            assert t[i] == left[0]
    half = (misplaced(response, 0.5, gen()) != torch.arange(10)).any(1)[:400].float().mean()
    assert 0.1 < half < 0.45  # a small reach may move nothing


def test_answer_blocks_by_hand():
    A = 7  # <answer>
    response = torch.tensor([[9, 9, A, 8, 9, EOS, PAD, PAD, PAD], [A, 8, EOS, PAD, PAD, PAD, PAD, PAD, PAD],
                             [9, 9, 9, 9, A, 8, 9, 10, EOS], [9, 9, 9, EOS, PAD, PAD, PAD, PAD, PAD]])  # the last has no answer
    assert train_cft.answer_blocks(response, 4, 1).tolist() == [[0, 1], [0, 0], [1, 2], [0, 0]]
    assert train_cft.answer_blocks(response, 2, 2).tolist() == [[1, 2, 2, 1, 2, 2], [0, 1, 1, 0, 1, 1], [2, 3, 4, 2, 3, 4], [0, 1, 1, 0, 1, 1]]
    assert train_cft.answer_blocks(response, 16, 0).shape == (4, 0)


# --- OPD -----------------------------------------------------------------------------------------------------------------

def test_divergences_equal_their_sums_written_out():
    student, teacher = (torch.randn(3, 5, generator=gen(s), dtype=torch.float64) * 2 for s in (1, 2))
    S, T = student.softmax(-1), teacher.softmax(-1)
    kl = lambda p, q: torch.stack([sum(a * math.log(a / b) for a, b in zip(x, y)) for x, y in zip(p, q)])
    close(divergence(student, teacher, "forward"), kl(T, S))
    close(divergence(student, teacher, "reverse"), kl(S, T))
    for beta in (0.1, 0.5, 0.8):
        M = beta * T + (1 - beta) * S
        close(divergence(student, teacher, "jsd", beta), beta * kl(T, M) + (1 - beta) * kl(S, M))
    close(divergence(student, teacher, "jsd", 0.5), divergence(teacher, student, "jsd", 0.5))
    assert not torch.allclose(divergence(student, teacher, "jsd", 0.2), divergence(teacher, student, "jsd", 0.2))


@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
def test_divergence_stays_finite_where_a_token_is_impossible(kind):
    logits = torch.randn(2, 6, requires_grad=True)
    impossible = torch.randn(2, 6)
    impossible[:, :2] = -1e4  # as [PAD] and [MASK] have it
    masked = torch.cat((torch.full((2, 2), -1e4), logits[:, 2:]), 1)
    loss = divergence(masked, impossible, kind).sum()
    assert loss.isfinite() and torch.autograd.grad(loss, logits)[0].isfinite().all()


@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
def test_opd_loss_vanishes_for_the_teacher_itself_at_block_size_one_and_only_there(kind):
    model, prompt = tiny_gpt(), left_padded(LENGTHS)
    cfg = replace(CFG, block_size=1, opd_divergence=kind, opd_exclude=False)
    loss = lambda student, cfg: opd_loss(cfg, student, model, prompt, block_decode(student, prompt, 8, cfg.block_size), gen())
    assert abs(loss(model, cfg)) < 1e-6
    assert loss(tiny_gpt(3), cfg) > 1e-2
    assert loss(model, replace(cfg, block_size=4)) > 1e-2  # its denoising states are no AR states


@pytest.mark.parametrize("states", ["masked", "committed", "next"])
@pytest.mark.parametrize("seed, behind", [(3, "open"), (5, "committed")])
def test_opd_loss_is_the_mean_divergence_over_what_is_masked_in_one_state_a_block(seed, behind, states):
    student, teacher, prompt, B = tiny_gpt(seed), tiny_gpt(0), words(1, 3, seed={3: 7, 5: 10}[seed]), 4
    cfg = replace(CFG, block_size=B, opd_answer_states=0, answer_weight=1.0, opd_states=states, opd_exclude=False)
    decoded = block_decode(student, prompt, 2 * B, B, "threshold", 0.9)
    tokens, steps = decoded.tokens[0], decoded.commit_step[0].view(2, B)
    end = int((tokens != PAD).sum())
    T = [1 + max(s for s in row.tolist() if s != NEVER) for row in steps]
    assert end == 2 * B - 1 and min(T) > 1  # the response ends inside its second block
    assert (decoded.filled[0, -1] == MASK) == (behind == "open")
    target = teacher.logits(causal_hidden(teacher, prompt, decoded.tokens))[0]
    possible = []
    for state in itertools.product(*map(range, T)):
        noised = torch.tensor([decoded.filled[0, b * B + j].item() if steps[b, j] < state[b] else MASK
                               for b in range(2) for j in range(B)])
        logits = student.logits(stream_hidden(student, prompt, decoded.filled, noised[None, None], B)[0, 0])
        scored = [i for i in range(end) if i % B == 0 or noised[i] == MASK]
        if states == "committed":
            scored = [i for i in range(end) if i % B == 0 or steps[i // B, i % B] == state[i // B]]
        elif states == "next":
            scored = [i for i in scored if i % B == 0 or MASK not in noised[i // B * B:i]]
        each = [[i for i in scored if i // B == b] for b in range(2)]  # a block weighs its tokens, however many are masked
        possible.append(sum(min(B, end - b * B) * divergence(logits[i], target[i], cfg.opd_divergence).mean().item() for b, i in enumerate(each)) / end)
    possible, seen = sorted({round(p, 9) for p in possible}), set()  # some states score the same tokens
    for seed in range(40 * len(possible)):
        loss = opd_loss(cfg, student, teacher, prompt, decoded, gen(seed)).item()
        nearest = min(range(len(possible)), key=lambda n: abs(possible[n] - loss))
        assert abs(possible[nearest] - loss) < 1e-6
        seen.add(nearest)
        if len(seen) == len(possible):
            break
    assert len(seen) == len(possible)


def test_more_states_of_the_answer_weigh_as_one_and_answer_tokens_by_their_weight():
    student, teacher, A = tiny_gpt(3), tiny_gpt(0), 7
    tokens = torch.tensor([[3, 4, 5, 6, 4, A, 8, 9]])  # the answer is in the second block
    decoded = Decoded(tokens, tokens, torch.zeros_like(tokens), torch.zeros(1, 8), None)  # one step a block: one state
    target = teacher.logits(causal_hidden(teacher, words(1, 3), tokens))[0]
    logits = student.logits(stream_hidden(student, words(1, 3), tokens, torch.full((1, 1, 8), MASK), 4)[0, 0])
    weight = torch.tensor([1.0, 1, 1, 1, 1, 1, 5, 5])
    expected = (divergence(logits, target, CFG.opd_divergence) * weight).sum() / weight.sum()
    for n in (0, 3):
        cfg = replace(CFG, block_size=4, answer_weight=5.0, opd_answer_states=n)
        close(opd_loss(cfg, student, teacher, words(1, 3), decoded, gen()), expected, atol=1e-6)


@torch.no_grad()
def test_labels_that_a_state_shows_are_no_target_of_its_masked_slots():
    student, teacher, prompt, B = tiny_gpt(3), tiny_gpt(0), words(1, 3), 4
    tokens = torch.tensor([[ANSWER, 3, 4, 5, 6, 8, 9, EOS]])  # all behind <answer> are labels, but for [EOS]
    decoded = Decoded(tokens, tokens, torch.tensor([[0, 0, 0, 0, 0, 1, 0, 1]]), torch.zeros(1, 8), None)
    cfg = replace(CFG, block_size=B, opd_answer_states=0, answer_weight=1.0)
    target = teacher.logits(causal_hidden(teacher, prompt, tokens))[0]
    possible = {}
    # by state of the second block: slots scored, slots without the labels that are shown, those labels. Slot 4 is predicted from the
    # clean text alone, whatever its block shows: once it stands there its own label is still its target.
    for state, (scored, masked, shown) in enumerate((([4, 5, 6, 7], [4, 5, 6], [3, 4, 5]), ([4, 5, 7], [5], [3, 4, 5, 6, 9]))):
        noised = torch.tensor([MASK] * 4 + ([MASK] * 4 if state == 0 else [6, MASK, 9, MASK]))
        logits = student.logits(stream_hidden(student, prompt, tokens, noised[None, None], B)[0, 0])
        left = target.clone()
        for slot in masked:
            left[slot, shown] = -1e4
        nats = divergence(logits, left, cfg.opd_divergence)
        possible[state] = (nats[:4].mean() + nats[scored].mean()) / 2
    losses = [opd_loss(cfg, student, teacher, prompt, decoded, gen(seed)) for seed in range(12)]
    distance = torch.stack([(torch.stack(losses) - possible[state]).abs() for state in (0, 1)])
    assert distance.amin(0).max() < 1e-6 and set(distance.argmin(0).tolist()) == {0, 1}


def test_the_ranking_is_what_stands_behind_answer_without_its_end():
    L, A = LABEL, ANSWER
    tokens = torch.tensor([[L, A, L, EOS, PAD], [L, L, L, EOS, PAD]])
    assert in_answer(tokens).tolist() == [[False, False, True, True, True], [False] * 5]
    assert answer_labels(tokens).tolist() == [[False, False, True, False, False], [False] * 5]


def test_what_stands_behind_a_repeated_label():
    L, A = LABEL, ANSWER
    tokens = torch.tensor([[L, L, A, L, L + 1, L, L + 2, EOS], [L, L, A, L, L + 1, L + 2, EOS, PAD]])  # labels in a trace repeat freely
    assert train_opd.behind_a_wrong_label(tokens, 4).int().tolist() == [[0, 0, 0, 0, 0, 0, 1, 1], [0] * 8]


def test_off_policy_rollouts_are_the_teachers_text_in_random_states():
    cfg, world = replace(CFG, opd_source="teacher", batch_size=8), toy_world(CFG)
    outputs = tensors(world.train, range(40), "cpu")[1]
    prompt, decoded, valid = train_opd.rollout(cfg, world, None, outputs, gen(), gen(1))
    assert valid == 1 and decoded.tokens.shape[1] % 16 == 0
    for n in range(8):
        row = next(r for r in range(40) if torch.equal(outputs[r][outputs[r] != PAD], decoded.tokens[n][decoded.tokens[n] != PAD]))
        assert prompt[n][prompt[n] != PAD].tolist() == [t for t in world.train.prompt[row].tolist() if t != PAD]
        used = (decoded.tokens[n].view(-1, 16) != PAD).any(1)
        assert all(sorted(s.tolist()) == list(range(16)) and s[0] == 0 for s in decoded.commit_step[n].view(-1, 16)[used])
    assert torch.isfinite(opd_loss(cfg, tiny_gpt(vocab=len(world.words)), tiny_gpt(3, len(world.words)), prompt, decoded, gen()))


def test_opd_update_mixes_divergence_and_anchor_and_moves_the_student_only(monkeypatch):
    student, teacher, prompt = tiny_gpt(3), tiny_gpt(0), left_padded(LENGTHS)
    before = [p.clone() for p in teacher.parameters()]
    monkeypatch.setattr(train_opd, "cft_loss", lambda cfg, world, model, outputs, gen: 0 * model.embed.weight.sum() + 7.0)
    decoded = block_decode(student, prompt, 8, 4)
    for anchor in (0.0, 2.0):
        cfg, run = replace(CFG, block_size=4, opd_anchor=anchor), SGD(student, 5e-3)
        log = train_opd.update(cfg, SimpleNamespace(n_labels=0), student, teacher, None, prompt, decoded, gen(), gen(1), run)
        assert run.losses == pytest.approx([log["divergence"] + 7.0 * anchor])
        assert opd_loss(cfg, student, teacher, prompt, decoded, gen()) < log["divergence"]
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, teacher.parameters()))


# --- RL ------------------------------------------------------------------------------------------------------------------

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
    got = reward(np.array([before, 2]), np.array([after, 0]), np.array([k, 10]), np.array([valid, True]), 0.1, conditional)
    assert got == pytest.approx([expected, 0.2 + 0.1])


@pytest.mark.parametrize("k", [2, 8, 12])
@pytest.mark.parametrize("conditional", [True, False])
def test_an_invalid_answer_earns_less_than_the_worst_valid_one(k, conditional):
    before, after = (x.flatten() for x in np.meshgrid(np.arange(k), np.arange(k)))
    valid = reward(before, after, np.full(k * k, k), np.ones(k * k, bool), 0.1, conditional)
    assert (reward(before, after, np.full(k * k, k), np.zeros(k * k, bool), 0.1, conditional) < valid.min()).all()


def test_advantages_are_normalised_within_a_group_and_equal_groups_carry_no_signal():
    rewards = torch.tensor([[1.0, 0.0, -1.0], [0.5, 0.5, 0.5], [-1.0, -1.0, 0.5]])
    advantage, signal = advantages(rewards)
    assert signal.tolist() == [True, False, True]
    for row, r in zip(advantage[signal], rewards[signal].tolist()):
        close(row, torch.tensor([(x - np.mean(r)) / np.std(r, ddof=1) for x in r], dtype=torch.float32), atol=1e-4)
    assert (advantage[1] == 0).all()


@pytest.mark.parametrize("ratio, advantage, gradient", [
    (1.0, 1, True), (1.27, 1, True), (1.3, 1, False), (0.7, 1, True),        # a good token is not pushed above the range,
    (1.0, -1, True), (0.81, -1, True), (0.79, -1, False), (1.3, -1, True)])  # a bad one not below; the way back is open
def test_clip_stops_the_gradient_only_in_its_direction(ratio, advantage, gradient):
    logp = torch.tensor([[math.log(ratio), 0.0]], requires_grad=True)
    loss, r = policy_loss(logp, torch.zeros(1, 2), torch.tensor([float(advantage)]), torch.ones(1, 2), 0.2, 0.28, 2)
    grad = torch.autograd.grad(loss, logp)[0][0]
    close(r.detach()[0], torch.tensor([ratio, 1.0]), atol=1e-6)
    close(grad, torch.tensor([-ratio * advantage / 2 if gradient else 0.0, -advantage / 2]), atol=1e-6)
    clipped = max(min(ratio, 1.28), 0.8)
    close(loss.detach(), torch.tensor(-(min(ratio * advantage, clipped * advantage) + advantage) / 2), atol=1e-6)


def test_policy_loss_is_a_mean_over_the_tokens_of_the_batch_not_over_responses():
    logp, mask = torch.zeros(2, 4), torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]])
    loss, _ = policy_loss(logp, logp, torch.tensor([1.0, -2.0]), mask, 0.2, 0.28, mask.sum())
    close(loss, torch.tensor(-(4 * 1.0 - 2.0) / 5), atol=1e-6)


@pytest.mark.parametrize("B", [1, 2, 4])
def test_importance_ratio_is_one_before_the_first_update_and_not_after_it(B):
    model, prompt = tiny_gpt(), left_padded(LENGTHS)
    decoded = block_decode(model, prompt, 8, B, "threshold", 0.6, 0.7, gen())
    rewards = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    cfg = replace(CFG, block_size=B, rl_prompts=2, rl_group=2, rl_epochs=1, rl_temperature=0.7, rl_anchor=0.0)
    assert train_rl.update(cfg, None, model, None, prompt, decoded, rewards, None, SGD(model, 0.1))["replay_off"] < 1e-9
    assert train_rl.update(cfg, None, model, None, prompt, decoded, rewards, None, SGD(model))["replay_off"] > 1e-3
    twice = replace(cfg, rl_epochs=2)
    log = train_rl.update(twice, None, model, None, prompt, decoded, rewards, None, SGD(model))
    assert log["ratio_off"] > 1e-3 and 0 <= log["clipped"] < 1


@pytest.mark.parametrize("B", [1, 2, 4])
@pytest.mark.parametrize("better", [0, 1])
def test_an_update_raises_the_better_of_two_samples_and_lowers_the_worse(B, better):
    model, prompt = tiny_gpt(5), words(1, 4).expand(2, 4)
    decoded = block_decode(model, prompt, 8, B, "threshold", 0.6, 1.0, gen())
    assert not torch.equal(decoded.tokens[0], decoded.tokens[1])
    rewards = torch.tensor([[0.5, -1.0]] if better == 0 else [[-1.0, 0.5]])
    cfg = replace(CFG, block_size=B, rl_group=2, rl_prompts=1, rl_anchor=0.0)
    train_rl.update(cfg, None, model, None, prompt, decoded, rewards, None, SGD(model))
    change = (replay_logp(model, prompt, decoded, B, 1.0) - decoded.logp).sum(1)
    assert change[better] > 1e-4 and change[1 - better] < -1e-4


def test_groups_with_equal_rewards_make_no_update_and_do_not_dilute_others():
    model, prompt = tiny_gpt(), left_padded(LENGTHS)
    decoded = block_decode(model, prompt, 8, 2, "threshold", 0.6, 1.0, gen())
    cfg = replace(CFG, block_size=2, rl_group=2, rl_prompts=2, rl_epochs=1, rl_anchor=0.0)
    run = SGD(model, 0.0)
    log = train_rl.update(cfg, None, model, None, prompt, decoded, torch.tensor([[-1.0, -1.0], [0.5, 0.5]]), None, run)
    assert not run.losses and log["signal"] == 0
    log = train_rl.update(cfg, None, model, None, prompt, decoded, torch.tensor([[-1.0, -1.0], [0.5, 0.0]]), None, run)
    assert log["signal"] == 0.5
    train_rl.update(cfg, None, model, None, prompt[2:], decoded.take(slice(2, 4)), torch.tensor([[0.5, 0.0]]), None, run)
    assert len(run.losses) == 2 and run.losses[0] == pytest.approx(run.losses[1])


def test_rl_adds_the_anchor_to_the_policy_loss(monkeypatch):
    model, prompt, rewards = tiny_gpt(), left_padded(LENGTHS), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    monkeypatch.setattr(train_rl, "cft_loss", lambda cfg, world, model, outputs, gen: 0 * model.embed.weight.sum() + 7.0)
    decoded = block_decode(model, prompt, 8, 2, "threshold", 0.6, 1.0, gen())
    run, cfg = SGD(model, 0.0), replace(CFG, block_size=2, rl_group=2, rl_prompts=2, rl_epochs=1)
    for anchor in (0.0, 2.0):
        train_rl.update(replace(cfg, rl_anchor=anchor), None, model, None, prompt, decoded, rewards, None, run)
    assert run.losses[1] == pytest.approx(run.losses[0] + 14.0)


def test_rollout_groups_samples_of_one_prompt_and_rewards_the_rise_of_its_target(monkeypatch):
    world, rng = toy_world(replace(CFG, vary_lists=1.0)), np.random.default_rng(0)
    written, prompts = [], []

    def decode(model, prompt, max_len, *args, **kwargs):  # answers at random, every fourth one without its last label
        rows = [int((world.train.prompt[:, -prompt.shape[1]:] == p.numpy()).all(1).argmax()) for p in prompt]
        tokens = torch.zeros(len(rows), max_len, dtype=torch.long)
        for n, row in enumerate(rows):
            order = rng.permutation(int(world.train.k[row]))[:None if n % 4 else -1]
            tokens[n, :len(order) + 2] = torch.tensor([ANSWER, *(LABEL + order), EOS])
            written.append((row, order))
        prompts.append(prompt)
        return Decoded(tokens, tokens, torch.zeros_like(tokens), torch.zeros(tokens.shape), torch.ones(len(rows)))

    monkeypatch.setattr(train_rl, "block_decode", decode)
    cfg = replace(CFG, vary_lists=1.0)
    prompt, decoded, rewards, log = train_rl.rollout(cfg, world, None, np.arange(len(world.train)), gen(), gen(1))
    assert rewards.shape == (6, 3) and torch.equal(prompt, prompts[0])
    assert (prompt.view(6, 3, -1) == prompt.view(6, 3, -1)[:, :1]).all() and len(prompt.unique(dim=0)) > 3
    for value, (row, order) in zip(rewards.flatten().tolist(), written):
        target, k = int(world.train.target[row]), int(world.train.k[row])
        if len(order) < k:
            assert value == -1
        else:
            rise = target - order.tolist().index(target)
            assert value == pytest.approx(rise / k + 0.1 * (rise > 0 or target == rise == 0))
    assert log["reward"] == pytest.approx(rewards.mean().item()) and log["sampled_valid"] == pytest.approx(13 / 18)
