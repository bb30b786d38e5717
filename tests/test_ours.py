"""Invariants of what we add to the paper's recipe (the folder ours/); and that without it the
paper is left.

Where two computations must agree they run in float64.
"""
import inspect
import itertools
import math
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import train_ar
import trainer
from config import PAPER, PRESETS, Config
from conftest import VOCAB, close, left_padded, same_decode, tiny_gpt, words
from data import ANSWER, EOS, LABEL, MASK, PAD, answer_labels, in_answer, tensors
from diffusion import draw_noise, every_block, replay_logp
from fast.gpt import FastGPT
from model import GPT, Sampling, causal_hidden
from ours.commit import Apart, label_range
from ours.labels import (best_left, exclude_shown, misplaced, taken_nats, tokens_shown,
                         what_is_left)
from ours.states import answer_blocks, first_steps, share_weight, state_weights
from plumbing.arguments import parse_args
from sampler import NEVER, Decoded, Threshold, block_decode, plain_decode
from test_stages import SGD, block_hidden, gen, plain_divergence, start
from toy.world import toy_split, toy_world
from train_ar import ar_loss
from train_cft import cft_loss
from train_opd import opd_loss

LENGTHS = [4, 1, 6, 3, 5, 2]  # of the prompts: shorter and longer than a block
CFG = Config(trace="free", bfloat16=False)


# --- 1. Which slots to commit together ---------------------------------------------------------

def flat_but_one(confidence, word, vocab=1000):
    """Log-probabilities (N, B, vocab): each slot's word (N, B) has the probability `confidence`
    (N, B), the others share the rest."""
    rest = ((1 - confidence) / (vocab - 1))[..., None].expand(-1, -1, vocab)
    return rest.scatter(2, word[..., None], confidence[..., None]).log()


@pytest.mark.parametrize("word, open_, tau, chosen", [
    # None is sure, but no two want the same: all of them.
    ([0, 1, 2, 3], [1, 1, 1, 1], 0.9, [1, 1, 1, 1]),
    # .7 x .6 = .42 and .5 x .8 = .4 would collide: the surer of each two.
    ([0, 0, 1, 1], [1, 1, 1, 1], 0.9, [1, 0, 0, 1]),
    # A slot that is not the surest of its kind waits.
    ([0, 0, 0, 1], [1, 1, 1, 1], 0.9, [1, 0, 0, 1]),
    # Committed slots collide with none.
    ([0, 0, 1, 1], [0, 1, 1, 0], 0.9, [0, 1, 1, 0]),
    # One is sure: the unsure wait for what it tells them.
    ([0, 0, 1, 1], [1, 1, 1, 1], 0.75, [0, 0, 0, 1]),
    # The sure ones go together whatever they say.
    ([0, 0, 1, 1], [1, 1, 1, 1], 0.55, [1, 1, 0, 1])])
def test_independent_slots_go_together_and_rivals_wait(word, open_, tau, chosen):
    logp = flat_but_one(torch.tensor([[.7, .6, .5, .8]]), torch.tensor([word]))
    open_, none = torch.tensor([open_]).bool(), torch.zeros(1, 4, dtype=torch.bool)
    rule = Apart(tau, 0.4)
    assert rule.choose(logp, open_, none).int().tolist() == [chosen]
    assert Apart(tau, 1.0).choose(logp, open_, none).sum() >= sum(chosen)
    forced = torch.tensor([[True, False, False, False]])
    sure = (logp.amax(-1).exp() > tau) & open_
    assert torch.equal(rule.choose(logp, open_, forced), sure | forced)


@pytest.mark.parametrize("clash, chosen", [(0.4, [[1, 0], [1, 0]]), (0.44, [[1, 1], [1, 0]])])
def test_slots_that_would_draw_the_same_token_too_often_are_rivals(clash, chosen):
    # They collide in .43 and in .35 of draws. Of two that want the same one waits in any case.
    p = torch.tensor([[[.5, .45, .05], [.4, .5, .1]], [[.5, .25, .25], [.4, .3, .3]]])
    two = torch.ones(2, 2, dtype=torch.bool)
    assert Apart(0.9, clash).choose(p.log(), two, ~two).int().tolist() == chosen


@pytest.mark.parametrize("word, open_, forced, chosen", [
    # All are sure: the surest of each label.
    ([5, 5, 6, 6], [1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 0, 1]),
    # What is committed already competes with none.
    ([5, 5, 5, 5], [1, 1, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0]),
    # Other words may stand in many slots.
    ([2, 2, 9, 9], [1, 1, 1, 1], [0, 0, 0, 0], [1, 1, 1, 1]),
    # A forced slot goes first, however unsure.
    ([5, 5, 6, 5], [1, 1, 1, 1], [0, 1, 0, 0], [0, 1, 1, 0]),
    ([5, 6, 7, 8], [1, 1, 1, 1], [0, 0, 0, 0], [1, 1, 1, 1])])
def test_of_sure_slots_that_want_the_same_label_only_the_surest_is_committed(
        word, open_, forced, chosen):
    logp = flat_but_one(torch.tensor([[.95, .93, .92, .96]]), torch.tensor([word]))
    open_, forced = torch.tensor([open_]).bool(), torch.tensor([forced]).bool()
    rule = Apart(0.9, 0.4, range(5, 9))
    assert rule.choose(logp, open_, forced).int().tolist() == [chosen]
    # Without labels: all that are sure.
    assert Apart(0.9, 0.4).choose(logp, open_, forced).tolist() == open_.tolist()


def plain_choice(p, open_, forced, rule):
    """Apart.choose for one row, by loops: p (B, V) lists -> the slots."""
    best = [row.index(max(row)) for row in p]
    slots = [j for j in range(len(p)) if open_[j]]
    slots.sort(key=lambda j: (not forced[j], -max(p[j]), j))  # forced, then the surest first
    sure = [j for j in slots if forced[j] or max(p[j]) > rule.tau]
    chosen = set()
    for n, j in enumerate(sure):
        want_it_too = [i for i in sure[:n] if best[i] == best[j]]
        if not (want_it_too and rule.labels and best[j] in rule.labels):
            chosen.add(j)
    if sure:
        return chosen
    for n, j in enumerate(slots):
        rivals = 0
        for i in slots[:n]:
            collide = sum(a * b for a, b in zip(p[i], p[j])) > rule.clash
            rivals += collide or best[i] == best[j]
        if not rivals:
            chosen.add(j)
    return chosen


@pytest.mark.parametrize("labels", [None, range(2, 5), range(0, 6)])
@pytest.mark.parametrize("tau, clash", [(0.5, 0.4), (0.7, 0.1), (0.9, 0.25), (1.0, 1.0)])
def test_choices_equal_loops_for_random_distributions(labels, tau, clash):
    rule, N, B, V = Apart(tau, clash, labels), 200, 5, 6
    logits = 3 * torch.randn(N, B, V, generator=gen(1), dtype=torch.float64)
    logp = F.log_softmax(logits, -1)
    open_ = torch.rand(N, B, generator=gen(2)) < 0.7
    forced = torch.zeros_like(open_)
    forced[:, 0] = open_[:, 0] & (torch.rand(N, generator=gen(3)) < 0.3)
    chosen = rule.choose(logp, open_, forced)
    for n in range(N):
        want = plain_choice(logp[n].exp().tolist(), open_[n].tolist(), forced[n].tolist(), rule)
        assert set(chosen[n].nonzero()[:, 0].tolist()) == want
    assert torch.equal(chosen.any(1), open_.any(1))  # every step makes progress
    # Closed slots do not matter; and rows do not matter to each other.
    other = torch.where(open_[..., None], logp, F.log_softmax(logits.flip(0), -1))
    assert torch.equal(rule.choose(other, open_, forced), chosen)
    alone = [rule.choose(logp[n:n + 1], open_[n:n + 1], forced[n:n + 1]) for n in range(N)]
    assert torch.equal(torch.cat(alone), chosen)


def twice(decoded, B):
    """How often a step commits one word in two slots."""
    out = 0
    for filled, steps in zip(decoded.filled.tolist(), decoded.commit_step.tolist()):
        for begin in range(0, len(filled), B):
            for i, j in itertools.combinations(range(begin, begin + B), 2):
                together = steps[i] == steps[j] != NEVER
                out += together and filled[i] == filled[j] >= 3
    return out


@pytest.mark.parametrize("B", [2, 3, 4])
def test_no_label_is_committed_twice_in_a_step(B):
    avoided = 0
    for seed in range(6):
        model, prompt = tiny_gpt(seed), left_padded(LENGTHS, seed)
        apart = block_decode(model, prompt, 12, B, Apart(0.3, 0.4, range(3, VOCAB)))
        assert not twice(apart, B)
        avoided += twice(block_decode(model, prompt, 12, B, Apart(0.3, 0.4)), B)
    assert avoided  # the test has cases


@pytest.mark.parametrize("B", [2, 4])
@pytest.mark.parametrize("labels", [None, range(3, VOCAB)])
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_what_is_written_with_our_rule_replays_and_needs_no_cache(B, labels, temperature):
    several = 0
    for seed in (0, 3):
        model, prompt = tiny_gpt(seed), left_padded(LENGTHS, seed)
        rule = Apart(0.5, 0.3, labels)
        decoded = block_decode(model, prompt, 12, B, rule, Sampling(temperature, gen(seed)))
        close(replay_logp(model, prompt, decoded, B, temperature), decoded.logp)
        several += int(((decoded.commit_step > 0) & (decoded.commit_step < NEVER)).sum())
        if not temperature:
            plain = plain_decode(model, prompt, 12, B, rule)
            for name in ("tokens", "filled", "commit_step", "forwards"):
                assert torch.equal(getattr(decoded, name), getattr(plain, name)), name
    assert several  # blocks take several steps


def test_the_labels_are_the_first_words_after_the_special_ones():
    world = toy_world(replace(CFG, n_train=1, n_val=1, n_test=1))
    named = [world.words[token] for token in label_range(world.n_labels)]
    assert named == [f"L{i + 1}" for i in range(world.n_labels)]


@pytest.mark.parametrize("commit", ["independent", "threshold"])
def test_roll_outs_decode_as_serving_does(monkeypatch, commit):
    cfg, used = replace(CFG, commit=commit), []

    def decode(model, prompt, max_len, block_size, rule, sampling=None):
        used.append((block_size, rule, sampling.temperature if sampling else 0.0))
        return Decoded(*[torch.zeros(1, 1)] * 5)

    monkeypatch.setattr(trainer, "block_decode", decode)
    trainer.decode(cfg, None, words(1, 3), 8)
    trainer.decode(cfg, None, words(1, 3), 8, tau=0.8)
    trainer.roll_out(cfg, None, words(1, 3), 8, 0.8, Sampling(0.0, gen()))
    trainer.roll_out(cfg, None, words(1, 3), 8, 0.7, Sampling(1.0, gen()))

    def rule(tau):
        if commit == "threshold":
            return Threshold(tau)
        return Apart(tau, cfg.clash, range(LABEL, LABEL + cfg.n_labels))

    expected = [(cfg.tau, 0.0), (0.8, 0.0), (0.8, 0.0), (0.7, 1.0)]
    assert used == [(cfg.block_size, rule(tau), heat) for tau, heat in expected]


@pytest.mark.parametrize("commit", ["independent", "threshold"])
def test_a_roll_out_at_temperature_0_is_what_is_served_and_others_are_drawn(commit):
    cfg = replace(CFG, commit=commit, block_size=4)
    model, prompt = tiny_gpt(3), left_padded(LENGTHS)

    def roll_out(temperature, seed, tau=0.7):
        how = Sampling(temperature, gen(seed))
        (own, read, decoded), = trainer.roll_out(cfg, model, prompt, 12, tau, how)
        assert own is cfg and torch.equal(read, prompt)
        return decoded

    same_decode(roll_out(0.0, 1), trainer.decode(cfg, model, prompt, 12, tau=0.7))
    assert not torch.equal(roll_out(0.0, 1).commit_step, roll_out(0.0, 1, tau=0.1).commit_step)
    same_decode(roll_out(1.0, 1), roll_out(1.0, 1))
    for other in (roll_out(1.0, 2), roll_out(0.0, 1)):
        assert not torch.equal(roll_out(1.0, 1).tokens, other.tokens)


# --- 2. Misplaced labels -----------------------------------------------------------------------

def test_misplaced_labels_stay_in_the_answer_and_what_should_follow_is_the_best_that_is_left():
    response = torch.tensor([[20, 21, ANSWER, 8, 9, 10, 11, 12, EOS, PAD],
                             [20, ANSWER, 9, 8, 12, EOS, PAD, PAD, PAD, PAD],
                             [20, 21, 22, EOS, PAD, PAD, PAD, PAD, PAD, PAD]]).repeat(200, 1)
    own = torch.arange(10).expand(600, -1)
    assert torch.equal(misplaced(response, 0.0, gen()), own)
    shown_from = misplaced(response, 0.6, gen())
    assert torch.equal(shown_from.sort(1).values, own)
    shown = response.gather(1, shown_from)
    target = response.gather(1, best_left(shown_from))
    label = in_answer(response) & (response > EOS)
    assert torch.equal(shown[~label], response[~label])
    assert 0.2 < (shown != response)[label].float().mean() < 0.6
    for y, z, t in zip(response.tolist(), shown.tolist(), target.tolist()):
        for i in range(10):
            left = list(y)
            for token in z[:i]:
                left.remove(token)
            assert t[i] == left[0]


def share_moved(response, share):
    """The share of answers in which a label moves."""
    shown_from = misplaced(response, share, gen(round(1000 * share)))
    own = torch.arange(response.shape[1])
    return (shown_from != own).any(1).double().mean().item()


@pytest.mark.parametrize("K", [8, 9, 10])
def test_the_share_of_misplaced_answers_is_what_the_setting_says(K):
    row = [60, 61, 62, ANSWER, *range(LABEL, LABEL + K), EOS]
    response = torch.tensor([row]).repeat(20000, 1)
    for share in (0.05, 0.1, 0.2, 0.31, 0.4, 0.5, 0.558, 0.6):
        assert abs(share_moved(response, share) - share) < 0.02, share
    assert share_moved(response, 0.0) == 0


def test_the_share_of_misplaced_answers_is_so_on_the_toys_own_lists():
    split = toy_split(20000, 0, CFG)
    assert len(set(split.list_length)) > 1
    response = tensors(split, slice(None), "cpu")[1]
    for share in {CFG.ar_misplace, CFG.cft_misplace}:
        assert abs(share_moved(response, share) - share) < 0.02


def test_labels_move_by_a_place_or_two_mostly_and_now_and_then_anywhere():
    row = [ANSWER, *range(LABEL, LABEL + 10), EOS]
    shown_from = misplaced(torch.tensor([row]).repeat(5000, 1), 0.6, gen())
    far = (shown_from - torch.arange(12)).abs()
    far = far[far > 0].double()
    assert 0.5 < (far <= 2).double().mean() < 0.95 and far.max() == 9
    assert (far == 1).sum() > (far == 2).sum() > (far == 3).sum()


def test_the_share_of_misplaced_labels_grows_from_none_while_the_teacher_learns(monkeypatch):
    world = toy_world(replace(CFG, n_train=20, n_val=4, n_test=4))
    shares, run = [], SGD(tiny_gpt(vocab=len(world.words)), 0.0, n_steps=4)

    def record(response, share, rng):
        shares.append(share)
        return misplaced(response, share, rng)

    monkeypatch.setattr(train_ar, "misplaced", record)
    start(monkeypatch, train_ar, world, run)
    train_ar.main(replace(CFG, ar_misplace=0.4, batch_size=2))
    assert shares == pytest.approx([0.0, 0.1, 0.2, 0.3]) and len(run.losses) == 4


# --- What is left, what is shown ---------------------------------------------------------------

@pytest.mark.parametrize("B", [1, 3, 4])
def test_masked_slots_must_become_what_their_segment_does_not_show(B):
    torch.manual_seed(0)
    N, R, M = 4, 12, 6
    shown_from = torch.stack([torch.randperm(R) for _ in range(N)])
    block, masked = torch.randint(R // B, (N, M)), torch.rand(N, M, B) < 0.5
    left = what_is_left(shown_from, block, masked)
    for n, m in itertools.product(range(N), range(M)):
        begin = int(block[n, m]) * B
        shown = shown_from[n, :begin].tolist()
        assert left[n, m, 0] == min(set(range(R)) - set(shown))
        shown += [int(shown_from[n, begin + j]) for j in range(B) if not masked[n, m, j]]
        rest = sorted(set(range(R)) - set(shown))
        want = dict(zip([j for j in range(B) if masked[n, m, j]], rest))
        assert all(left[n, m, j] == want[j] for j in want if j)
    # If all stand in their places, so does what is asked.
    own = torch.arange(R).expand(N, -1)
    at = block[..., None] * B + torch.arange(B)
    assert torch.equal(what_is_left(own, block, masked)[masked], at[masked])


@pytest.mark.parametrize("B", [1, 4])
def test_tokens_shown_are_those_of_the_clean_past_and_the_unmasked_slots(B):
    torch.manual_seed(0)
    N, R, M = 4, 12, 5
    response, where = words(N, R), torch.rand(N, R) < 0.5
    block, masked = torch.randint(R // B, (N, M)), torch.rand(N, M, B) < 0.5
    shown = tokens_shown(response, where, block, masked, VOCAB)
    for n, m in itertools.product(range(N), range(M)):
        begin = int(block[n, m]) * B
        slots = [*range(begin), *(begin + j for j in range(B) if not masked[n, m, j])]
        want = {int(response[n, r]) for r in slots if where[n, r]}
        assert set(shown[n, m].nonzero()[:, 0].tolist()) == want


def test_taken_nats_by_hand():
    logits = torch.tensor([[.5, .3, .2], [.5, .3, .2], [.5, .3, .2], [1e-9, 1 - 2e-9, 1e-9]],
                          dtype=torch.float64).log().requires_grad_()
    taken = torch.tensor([[0, 0, 0], [0, 1, 0], [1, 0, 1], [0, 1, 0]]).bool()
    got = taken_nats(logits, taken)
    close(got[:3], -torch.tensor([1.0, 0.7, 0.3], dtype=torch.float64).log())
    assert 10 < got[3] < 20 and torch.autograd.grad(got.sum(), logits)[0].isfinite().all()


# --- 4. States ---------------------------------------------------------------------------------

def test_answer_blocks_by_hand():
    A = ANSWER
    response = torch.tensor([[9, 9, A, 8, 9, EOS, PAD, PAD, PAD],
                             [A, 8, EOS, PAD, PAD, PAD, PAD, PAD, PAD],
                             [9, 9, 9, 9, A, 8, 9, 10, EOS],
                             [9, 9, 9, EOS, PAD, PAD, PAD, PAD, PAD],  # no answer
                             [9, 9, 9, A, 8, 9, EOS, PAD, PAD]])       # it ends a block
    assert answer_blocks(response, 4, 1).tolist() == [[0, 1], [0, 0], [1, 2], [0, 0], [1, 1]]
    assert answer_blocks(response, 2, 2).tolist() == [
        [1, 2, 2, 1, 2, 2], [0, 1, 1, 0, 1, 1], [2, 3, 4, 2, 3, 4], [0, 1, 1, 0, 1, 1],
        [2, 3, 3, 2, 3, 3]]
    assert answer_blocks(response, 16, 0).shape == (5, 0)


def test_states_of_a_block_share_its_weight():
    block = torch.tensor([[0, 1, 2, 1, 1], [0, 1, 2, 0, 2]])
    weight = torch.rand(2, 5, 3, generator=gen())
    times = torch.tensor([[1, 3, 1, 3, 3], [2, 1, 2, 2, 2]])
    close(share_weight(block, weight), weight / times[..., None])


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_first_steps_are_all_masked_with_weight_one_and_leave_the_others(share):
    block = torch.zeros(20, 30, dtype=torch.long)
    masked, weight = draw_noise(block, 4, gen())
    new_masked, new_weight = first_steps(masked, weight, share, gen(1))
    first = new_masked[..., 0]  # noise never masks slot 0
    assert abs(first.double().mean() - share) < 0.06
    assert new_masked[first].all() and (new_weight[first] == 1).all()
    assert torch.equal(new_masked[~first], masked[~first])
    assert torch.equal(new_weight[~first], weight[~first])


# --- 5. OPD ------------------------------------------------------------------------------------

def test_exclude_shown_by_hand():
    V = 14
    # 13 is in the trace only; all after <answer> but [EOS] are labels.
    tokens = torch.tensor([[10, 13, ANSWER, 9, 10, 11, 12, EOS]])
    decoded = Decoded(tokens, tokens, torch.zeros_like(tokens), torch.zeros(1, 8), None)
    block = torch.tensor([[0, 1, 1]])
    open_ = torch.tensor([[[1, 1, 1, 1], [1, 1, 0, 1], [0, 1, 1, 0]]]).bool()
    scored = torch.tensor([[[1, 1, 0, 1], [1, 1, 0, 1], [1, 1, 0, 0]]]).bool()
    target = torch.randn(int(scored.sum()), V, generator=gen())
    got = exclude_shown(target, decoded, block, open_, scored)
    # Of the first block, slot 3 is a label, and sees no other. Of the second block's first state,
    # slots 4 and 5 see 9 and 12, slot 7 is [EOS]; of its second, slot 4 is committed, and 5 sees
    # 9 and 10.
    shown = [[], [], [], [9, 12], [9, 12], [], [], [9, 10]]
    for row, (new, old) in enumerate(zip(got, target)):
        out = torch.zeros(V, dtype=torch.bool)
        out[shown[row]] = True
        assert (new[out] == -1e4).all() and torch.equal(new[~out], old[~out]), row


def test_states_weigh_their_blocks_tokens_however_many_slots_are_open():
    block = torch.tensor([[0, 1, 1, 2]])
    real = torch.tensor([[[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 0], [0, 0, 0, 0]]]).bool()
    scored = torch.tensor([[[1, 0, 1, 0], [1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]]]).bool()
    weight = state_weights(block, scored, real)
    # 4 tokens on 2 slots; 3 tokens in two states, on 3 slots and on one; nothing.
    assert weight[0, :, 0].tolist() == [2, 0.5, 1.5, 0]


# --- The CFT loss with all of it, by loops -----------------------------------------------------

def texts():
    """Prompts (6, 6) and responses (6, 11): a trace, <answer>, labels that differ, [EOS]."""
    prompt, response = left_padded(LENGTHS), torch.full((6, 11), PAD)
    labels = [3, 4, 5, 6, 8, 9]
    for n, (n_trace, n_labels) in enumerate([(2, 6), (3, 4), (0, 5), (4, 5), (1, 3), (2, 6)]):
        own = torch.randperm(6, generator=gen(n))[:n_labels].tolist()
        row = words(n_trace, seed=n).tolist() + [ANSWER] + [labels[i] for i in own] + [EOS]
        response[n, :len(row)] = torch.tensor(row)
    return prompt, response


def whole_blocks(row, B, answer_weight):
    """One response without padding -> the tokens of its blocks, their weights, lists."""
    seen, weights = False, []
    for token in row:
        weights.append(answer_weight if seen else 1.0)
        seen = seen or token == ANSWER
    more = -len(row) % B
    return row + [EOS] * more, weights + [1.0] * more


def state_nats(cfg, model, prompt, filled, shown_from, ranking, b, masked):
    """Nats of the slots of one state of one row: [float]. filled: its tokens, a list; ranking:
    the slots of its labels."""
    B, slots = len(masked), set(range(len(filled)))
    shown = [filled[slot] for slot in shown_from]
    state = [MASK if m else shown[b * B + j] for j, m in enumerate(masked)]
    hidden = block_hidden(model, prompt, torch.tensor(shown), torch.tensor(state), b)
    logp = F.log_softmax(model.logits(hidden), -1)
    seen = [*range(b * B), *(b * B + j for j in range(B) if not masked[j])]
    rest = sorted(slots - {shown_from[i] for i in seen})
    taken = sorted({shown[i] for i in seen if i in ranking})
    out = []
    for j in range(B):
        if j == 0:  # predicted from the clean text
            target = min(slots - set(shown_from[:b * B]))
        elif masked[j]:
            target = rest[sum(masked[:j])]
        else:
            target = b * B + j  # weighs nothing
        nats = -logp[j, filled[target]]
        if cfg.cft_penalty and masked[j] and b * B + j in ranking and taken:
            nats = nats - cfg.cft_penalty * torch.log(1 - logp[j, taken].exp().sum())
        out.append(nats)
    return out


def plain_cft_loss(cfg, model, prompt, response, rng):
    """cft_loss, with the same draws."""
    B, total, norm = cfg.block_size, 0.0, 0.0
    shown_from = misplaced(response, cfg.cft_misplace, rng)
    wide = F.pad(response, (0, -response.shape[1] % B))
    extra = answer_blocks(response, B, cfg.answer_states)
    block = torch.cat((every_block(wide, B), extra), dim=1)
    masked, weight = first_steps(*draw_noise(block, B, rng), cfg.cft_first_step, rng)
    for n, row in enumerate(response):
        real = prompt[n][prompt[n] != PAD]
        filled, weights = whole_blocks(row[row != PAD].tolist(), B, cfg.answer_weight)
        norm += sum(weights)
        order = shown_from[n].tolist()[:len(filled)]
        order += range(len(order), len(filled))
        ranking = set(answer_labels(response)[n].nonzero()[:, 0].tolist())
        for m, b in enumerate(block[n].tolist()):
            if b * B >= len(filled):
                continue
            share = 1 / block[n].tolist().count(b)
            nats = state_nats(cfg, model, real, filled, order, ranking, b, masked[n, m].tolist())
            for j in range(B):
                total = total + share * weight[n, m, j] * weights[b * B + j] * nats[j]
    return total / norm


OFF = dict(answer_states=0, cft_first_step=0.0, cft_misplace=0.0, cft_penalty=0.0)
ALL = dict(answer_states=1, cft_first_step=0.3, cft_misplace=0.6, cft_penalty=5.0)
RECIPES = {
    "none": OFF, "answer states": {**OFF, "answer_states": 2},
    "first step": {**OFF, "cft_first_step": 0.4},
    "misplace": {**OFF, "cft_misplace": 0.6}, "penalty": {**OFF, "cft_penalty": 10.0},
    "all": ALL, "toy": {}, "small": PRESETS["small"]}


@pytest.mark.parametrize("B", [1, 3, 4])
@pytest.mark.parametrize("recipe", RECIPES)
@torch.no_grad()
def test_the_cft_loss_is_the_sum_written_out_whatever_is_switched_on(B, recipe):
    model, (prompt, response) = tiny_gpt(), texts()
    cfg = replace(CFG, **{**RECIPES[recipe], "block_size": B})
    exact = plain_cft_loss(cfg, model, prompt, response, gen(B))
    close(cft_loss(cfg, model, prompt, response, gen(B)), exact, atol=1e-5)


@torch.no_grad()
def test_the_penalty_is_on_labels_that_a_state_shows_already():
    """It is proportional to its setting, and nothing without an answer."""
    model, (prompt, response) = tiny_gpt(), texts()
    cfg = replace(CFG, block_size=3)

    def loss(penalty, response):
        return cft_loss(replace(cfg, cft_penalty=penalty), model, prompt, response, gen())

    price = loss(1.0, response) - loss(0.0, response)
    assert price > 0.01
    close(loss(5.0, response) - loss(0.0, response), 5 * price, atol=1e-6)
    no_answer = torch.where(response == ANSWER, 3, response)
    close(loss(5.0, no_answer), loss(0.0, no_answer), atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("share", [0.0, 0.6])
def test_at_block_size_one_misplaced_labels_are_seen_and_asked_as_in_the_ar_loss(share):
    model, (prompt, response) = tiny_gpt(), texts()
    cfg = replace(CFG, block_size=1, **{**OFF, "cft_misplace": share})
    shown_from = misplaced(response, share, gen())
    own = torch.arange(response.shape[1]).expand_as(shown_from)
    assert torch.equal(shown_from, own) == (share == 0)
    there, nats = ar_loss(cfg, model, prompt, response, shown_from)
    close(cft_loss(cfg, model, prompt, response, gen()), there, atol=1e-6)
    # And that is the loss of the first label that is not shown further left.
    shown = response.gather(1, shown_from)
    logp = F.log_softmax(model.logits(causal_hidden(model, prompt, shown)), -1)
    for n, i in (response != PAD).nonzero().tolist():
        left = sorted(set(range(response.shape[1])) - set(shown_from[n, :i].tolist()))
        close(nats[n, i], -logp[n, i, response[n, left[0]]])


# --- With every switch off: the paper ----------------------------------------------------------

def switches():
    """PAPER as a command line."""
    return [x for name, value in PAPER.items() for x in (f"--{name}", str(value).lower())]


def test_the_settings_of_the_paper_are_all_that_are_marked_as_ours_at_their_values_for_off():
    marked = re.findall(r"^    (\w+): .*# ours \[(\S+)\]", inspect.getsource(Config), re.M)
    off = parse_args("", [x for name, value in marked for x in (f"--{name}", value)])
    assert PAPER == {name: getattr(off, name) for name, _ in marked}


@pytest.mark.parametrize("preset", PRESETS)
def test_no_preset_keeps_anything_of_ours_with_every_switch_off(preset):
    cfg = parse_args("", ["--config", preset, *switches()])
    on = {name: value for name, value in OFF.items() if getattr(cfg, name) != value}
    assert not on and trainer.rule_of(cfg) == Threshold(cfg.tau)
    assert cfg.ar_misplace == cfg.opd_anchor == cfg.rl_anchor == cfg.answer_states == 0
    assert not cfg.opd_exclude


def paper(B):
    cfg = parse_args("", switches())
    return replace(cfg, bfloat16=False, block_size=B)


def plain_bd3lm(model, prompt, response, B, answer_weight, rng):
    """The loss of BD3-LM with the token shift, draws and all, by loops.

    A block draws t, one in every n-th part of (0, 1]; its tokens are masked with probability t,
    and weigh 1 / t; but the first is predicted from the clean text, and weighs 1."""
    N, M = len(response), -(-response.shape[1] // B)
    n = N * M
    part = torch.randperm(n, generator=rng)
    t = 1 - (part + torch.rand(n, generator=rng)) / n
    hidden_away = torch.rand(n, B, generator=rng) < t[:, None]
    total = norm = 0.0
    for row in range(N):
        real = prompt[row][prompt[row] != PAD]
        text = response[row][response[row] != PAD].tolist()
        filled, weights = whole_blocks(text, B, answer_weight)
        norm += sum(weights)
        for b in range(len(filled) // B):
            block, at = filled[b * B:(b + 1) * B], row * M + b
            masked = [j for j in range(1, B) if hidden_away[at, j]]
            state = [MASK if j in masked else word for j, word in enumerate(block)]
            hidden = block_hidden(model, real, torch.tensor(filled), torch.tensor(state), b)
            logp = F.log_softmax(model.logits(hidden), -1)
            total = total - weights[b * B] * logp[0, block[0]]
            for j in masked:
                total = total - weights[b * B + j] * logp[j, block[j]] / t[at]
    return total / norm


@pytest.mark.parametrize("B", [1, 2, 3, 4, 16])
@pytest.mark.parametrize("kind", [GPT, FastGPT])
@torch.no_grad()
def test_without_ours_cft_is_the_block_diffusion_loss_of_the_paper(B, kind):
    model, (prompt, response) = tiny_gpt(kind=kind), texts()
    for seed in range(3):
        exact = plain_bd3lm(model, prompt, response, B, 4.0, gen(seed))
        close(cft_loss(paper(B), model, prompt, response, gen(seed)), exact, atol=1e-5)


@torch.no_grad()
def test_without_ours_the_teachers_loss_is_the_cross_entropy_of_the_text():
    model, (prompt, response) = tiny_gpt(), texts()
    cfg = paper(4)
    shown_from = misplaced(response, cfg.ar_misplace, gen())
    total = norm = 0.0
    for n, row in enumerate(response):
        real, text = prompt[n][prompt[n] != PAD], row[row != PAD]
        _, weights = whole_blocks(text.tolist(), 1, cfg.answer_weight)
        for i, token in enumerate(text):
            # The token shift: the last token read predicts this one.
            hidden = block_hidden(model, real, text, text[i:i + 1], i)
            total -= weights[i] * F.log_softmax(model.logits(hidden), -1)[0, token]
        norm += sum(weights)
    close(ar_loss(cfg, model, prompt, response, shown_from)[0], total / norm, atol=1e-6)


@torch.no_grad()
def test_without_ours_opd_is_the_plain_mean_divergence_over_masked_tokens():
    student, teacher, prompt, B = tiny_gpt(3), tiny_gpt(0), left_padded(LENGTHS), 4
    cfg = paper(B)
    decoded = block_decode(student, prompt, 12, B, Threshold(0.9))
    drawn, total, norm = torch.rand(len(LENGTHS), 3, generator=gen()), 0.0, 0.0
    for n, steps in enumerate(decoded.commit_step):
        real = prompt[n][prompt[n] != PAD]
        text = decoded.tokens[n][decoded.tokens[n] != PAD]
        _, weights = whole_blocks(text.tolist(), 1, cfg.answer_weight)
        for b in range(-(-len(text) // B)):
            taken = [s for s in steps[b * B:(b + 1) * B].tolist() if s != NEVER]
            step = int(drawn[n, b] * (1 + max(taken)))
            slots = range(b * B, (b + 1) * B)
            state = [decoded.filled[n, i] if steps[i] < step else MASK for i in slots]
            hidden = block_hidden(student, real, decoded.filled[n], torch.tensor(state), b)
            for j, i in enumerate(slots):
                if i < len(text) and (j == 0 or state[j] == MASK):
                    S = student.logits(hidden[j:j + 1]).softmax(-1)
                    T = teacher.logits(block_hidden(teacher, real, text, text[i:i + 1], i))
                    nats = plain_divergence(S, T.softmax(-1), cfg.opd_divergence)
                    total, norm = total + weights[i] * nats.item(), norm + weights[i]
    got = opd_loss(cfg, student, teacher, prompt, decoded, gen()).item()
    assert got == pytest.approx(total / norm, abs=1e-6) and math.isfinite(got)
