"""Invariants of model.py and diffusion.py (masks, blocks, noise, replay), and of the CFT loss.

Where two computations must agree they run in float64. Tests with `kind` run for the plain model
and for its quick twin (fast/).
"""
import itertools
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from config import Config
from conftest import (LENGTHS, VOCAB, block_hidden, close, gen, left_padded, plain_hidden,
                      same_decode, stream_hidden, tiny_gpt, words)
from data import ANSWER, EOS, MASK, PAD
from diffusion import (block_mask, decode_states, draw_noise, every_block, fill_last_block,
                       predict_blocks, replay_logp, take_blocks)
from fast.gpt import FastGPT, shared_mask
from model import Sampling, ar_decode, causal_hidden
from ours.commit import Apart
from rules import Factor
from sampler import NEVER, Decoded, Threshold, block_decode
from train_cft import cft_loss

PLAIN = replace(Config(), bfloat16=False, cft_first_step=0.0, answer_states=0, cft_misplace=0.0,
                cft_penalty=0.0)


def half_masked(tokens, *shape, seed=0):
    """tokens, broadcast to shape, half of them [MASK]."""
    return torch.where(torch.rand(*shape, generator=gen(seed)) < 0.5, MASK, tokens)


# --- The mask and the forward over segments ----------------------------------------------------

@pytest.mark.parametrize("P, R, B, blocks", [
    (3, 6, 2, [[0, 1, 2], [2, 2, 0]]), (1, 4, 1, [[3, 0]]), (2, 6, 3, [[], []]),
    (4, 8, 4, [[1], [0], [1]]), (2, 4, 2, [[1, 1, 1, 1, 0]])])
def test_who_sees_whom_equals_the_loops_of_its_definition(P, R, B, blocks):
    block = torch.tensor(blocks, dtype=torch.long).view(len(blocks), -1)
    mask, of_shared = block_mask(P, R, B, block), shared_mask(P, R, B, block)
    for n, of_row in enumerate(blocks):
        # Every slot: (its block, its segment; None in the prompt and the clean response).
        slots = [(i, None) for i in range(-P, 0)] + [(r // B, None) for r in range(R)]
        slots += [(b, m) for m, b in enumerate(of_row) for _ in range(B)]
        assert mask[n].shape == (len(slots), len(slots))
        assert of_shared[n].shape == (len(slots), P + R)
        for (q, (bq, mq)), (k, (bk, mk)) in itertools.product(enumerate(slots), repeat=2):
            if mk is not None:
                sees = mq == mk  # the whole segment, and nobody else does
            else:
                sees = bq >= bk if mq is None else bq > bk
            assert mask[n, q, k] == sees, (q, k)
            assert k >= P + R or of_shared[n, q, k] == sees, (q, k)


@pytest.mark.parametrize("B", [1, 2, 3, 4])
def test_segments_that_show_the_clean_text_are_the_plain_block_causal_model(B, kind):
    model, prompt = tiny_gpt(kind=kind), left_padded(LENGTHS)
    response = words(len(LENGTHS), 12, seed=1)
    hidden = stream_hidden(model, prompt, response, response[:, None], B)
    for n, length in enumerate(LENGTHS):
        close(hidden[n, 0], plain_hidden(model, prompt[n, -length:], response[n], B))


@pytest.mark.parametrize("B, S", [(1, 1), (2, 2), (3, 1), (4, 3)])
def test_every_state_is_seen_as_if_it_stood_alone_after_clean_blocks(B, S, kind):
    model, prompt = tiny_gpt(kind=kind), left_padded(LENGTHS)
    clean = words(len(LENGTHS), 12, seed=1)
    noised = half_masked(clean[:, None], len(LENGTHS), S, 12)
    hidden = stream_hidden(model, prompt, clean, noised, B)
    for n, s, b in itertools.product(range(len(LENGTHS)), range(S), range(12 // B)):
        slots = slice(b * B, (b + 1) * B)
        real = prompt[n, -LENGTHS[n]:]
        alone = block_hidden(model, real, clean[n], noised[n, s, slots], B, b)
        close(hidden[n, s, slots], alone)


@pytest.mark.parametrize("B", [1, 2, 3, 4])
def test_segments_may_come_in_any_order_and_number_each_row_its_own(B, kind):
    model, prompt = tiny_gpt(kind=kind), left_padded(LENGTHS)
    clean = words(len(LENGTHS), 12, seed=1)
    block = torch.randint(12 // B, (len(LENGTHS), 5), generator=gen())
    noised = half_masked(words(*block.shape, B, seed=2), *block.shape, B, seed=1)
    hidden = predict_blocks(model, prompt, clean, noised, block)
    for n, m in itertools.product(range(len(LENGTHS)), range(5)):
        real, b = prompt[n, -LENGTHS[n]:], int(block[n, m])
        close(hidden[n, m], block_hidden(model, real, clean[n], noised[n, m], B, b))


@pytest.mark.parametrize("B", [2, 3, 4])
def test_later_blocks_change_nothing_earlier_and_noise_never_reaches_the_clean_text(B, kind):
    model, prompt = tiny_gpt(kind=kind), left_padded(LENGTHS)
    N, clean = len(LENGTHS), words(len(LENGTHS), 12, seed=1)
    noised = torch.full((N, 2, 12), MASK)
    before = stream_hidden(model, prompt, clean, noised, B)
    cut = 12 // B // 2 * B  # everything from here on is changed
    clean2, noised2 = clean.clone(), noised.clone()
    clean2[:, cut:] = words(N, 12 - cut, seed=2)
    noised2[:, 0, cut:] = words(N, 12 - cut, seed=3)
    after = stream_hidden(model, prompt, clean2, noised2, B)
    # The first token of the next block does not change either.
    close(after[:, :, :cut + 1], before[:, :, :cut + 1])
    assert not torch.allclose(after[:, 0, cut + 1], before[:, 0, cut + 1])
    # Clean blocks do reach later ones.
    assert not torch.allclose(after[:, 1, cut + B:], before[:, 1, cut + B:])
    only_noise = stream_hidden(model, prompt, clean, noised2, B)
    close(only_noise[:, 1], before[:, 1])            # segments do not see each other
    close(only_noise[:, :, ::B], before[:, :, ::B])  # first tokens come from the clean text


def test_left_padding_changes_nothing(kind):
    model, response = tiny_gpt(kind=kind), words(1, 6, seed=1)
    prompt = words(1, 4)
    padded = F.pad(prompt, (3, 0), value=PAD)
    noised = torch.full((1, 1, 6), MASK)
    close(stream_hidden(model, padded, response, noised, 3),
          stream_hidden(model, prompt, response, noised, 3))
    close(causal_hidden(model, padded, response), causal_hidden(model, prompt, response))
    for a, b in zip(ar_decode(model, padded, 8), ar_decode(model, prompt, 8)):
        close(a, b)
    for rule in (Threshold(0.6), Apart(0.6, 0.4)):
        a, b = (block_decode(model, p, 8, 3, rule) for p in (padded, prompt))
        same_decode(a, b)
        close(replay_logp(model, padded, a, 3), replay_logp(model, prompt, b, 3))


def test_a_response_read_from_the_left_is_a_block_causal_one_of_block_size_one(kind):
    model, prompt = tiny_gpt(kind=kind), left_padded(LENGTHS)
    response = words(len(LENGTHS), 7, seed=1)
    hidden = causal_hidden(model, prompt, response)
    for n, length in enumerate(LENGTHS):
        close(hidden[n], plain_hidden(model, prompt[n, -length:], response[n], 1))


def test_padding_and_mask_are_never_predicted():
    logits = tiny_gpt().logits(torch.randn(50, 16, dtype=torch.float64))
    assert (logits.softmax(-1)[:, [PAD, MASK]] == 0).all()


@pytest.mark.parametrize("dtype, out", [
    (torch.bfloat16, torch.float32), (torch.float32, torch.float32),
    (torch.float64, torch.float64)])
def test_logits_are_float32_at_least(dtype, out, kind):
    model = tiny_gpt(kind=kind, dtype=dtype)
    assert model.logits(torch.randn(4, 16, dtype=dtype)).dtype == out


# --- Writing from the left ---------------------------------------------------------------------

def test_ar_decode_repeats_the_argmax_of_an_uncached_forward(kind):
    model, prompt = tiny_gpt(kind=kind), left_padded(LENGTHS)
    tokens, logp, forwards = ar_decode(model, prompt, 10)
    ends = []
    for n, length in enumerate(LENGTHS):
        row, lp = prompt[n:n + 1, -length:], []
        while len(lp) < 10 and row[0, -1] != EOS:
            any_token = row[:, :1]  # it is not seen: only its place counts
            logits = model.logits(causal_hidden(model, row, any_token)[:, 0])
            best = F.log_softmax(logits, -1).max(-1)
            row, lp = torch.cat((row, best.indices[None]), 1), lp + [best.values]
        ends.append(len(lp))
        assert tokens[n].tolist() == row[0, length:].tolist() + [PAD] * (10 - len(lp))
        close(logp[n], F.pad(torch.cat(lp), (0, 10 - len(lp))))
    assert forwards.tolist() == ends and len(set(ends)) > 2  # rows of several lengths


@pytest.mark.parametrize("temperature", [0.0, 1.0, 0.7])
def test_ar_log_probabilities_are_those_of_the_tempered_model(temperature, kind):
    model, prompt = tiny_gpt(kind=kind), left_padded(LENGTHS)
    tokens, logp, _ = ar_decode(model, prompt, 10, Sampling(temperature, gen()))
    logits = model.logits(causal_hidden(model, prompt, tokens)) / (temperature or 1.0)
    exact = F.log_softmax(logits, -1).gather(-1, tokens[..., None])[..., 0]
    close(logp, torch.where(tokens == PAD, 0.0, exact))
    again, _, _ = ar_decode(model, prompt, 10, Sampling(temperature, gen()))
    other, _, _ = ar_decode(model, prompt, 10, Sampling(temperature, gen(1)))
    assert torch.equal(tokens, again) and torch.equal(tokens, other) == (temperature == 0)


# --- Blocks ------------------------------------------------------------------------------------

def test_every_block_and_take_blocks_by_hand():
    x = torch.arange(12).view(2, 6)
    assert every_block(x, 2).tolist() == [[0, 1, 2], [0, 1, 2]]
    block = torch.tensor([[2, 0], [1, 1]])
    assert take_blocks(x, block, 2).tolist() == [[[4, 5], [0, 1]], [[8, 9], [8, 9]]]
    more = torch.stack((x, -x), -1)  # (2, 6, 2)
    assert torch.equal(take_blocks(more, block, 2)[..., 1], -take_blocks(x, block, 2))


@pytest.mark.parametrize("B, filled, real", [
    (1, [[5, 6, 7, EOS, 0], [5, EOS, 0, 0, 0], [5, 6, 7, 8, EOS]], [4, 2, 5]),
    (2, [[5, 6, 7, EOS, 0, 0], [5, EOS, 0, 0, 0, 0], [5, 6, 7, 8, EOS, EOS]], [4, 2, 6]),
    (3, [[5, 6, 7, EOS, EOS, EOS], [5, EOS, EOS, 0, 0, 0], [5, 6, 7, 8, EOS, EOS]], [6, 3, 6]),
    (4, [[5, 6, 7, EOS, 0, 0, 0, 0], [5, EOS, EOS, EOS, 0, 0, 0, 0],
         [5, 6, 7, 8, EOS, EOS, EOS, EOS]], [4, 4, 8])])
def test_fill_last_block_by_hand(B, filled, real):
    response = torch.tensor([[5, 6, 7, EOS, PAD], [5, EOS, PAD, PAD, PAD], [5, 6, 7, 8, EOS]])
    tokens, in_block = fill_last_block(response, B)
    assert tokens.tolist() == filled
    assert in_block.int().tolist() == [[1] * n + [0] * (len(filled[0]) - n) for n in real]


# --- Noise -------------------------------------------------------------------------------------

@pytest.mark.parametrize("B", [2, 4])
def test_one_t_a_segment_one_in_every_stratum_and_masks_as_frequent_as_t(B):
    masked, weight = draw_noise(torch.zeros(400, 10, dtype=torch.long), B, gen())
    assert masked.shape == weight.shape == (400, 10, B)
    masked, weight = masked.view(4000, B), weight.view(4000, B).double()
    # Slot 0 is shown and weighs 1; of the others those weigh that are masked.
    assert not masked[:, 0].any() and (weight[:, 0] == 1).all()
    assert torch.equal(masked[:, 1:], weight[:, 1:] > 0)
    # All that is masked in a segment weighs 1 / t.
    largest = weight[:, 1:].amax(1, keepdim=True)
    assert ((weight[:, 1:] == 0) | (weight[:, 1:] == largest)).all()
    some = masked.any(1)
    t = 1 / largest[:, 0]  # known where something is masked
    assert (t[some] > 0).all() and (t[some] <= 1).all()
    # Strata: the share of masked slots is far less noisy than with t drawn one by one.
    if B == 4:
        assert abs(masked[:, 1:].double().mean() - 0.5) < 0.012
    for low in (0, 0.25, 0.5, 0.75):
        # Of the quarter of the segments with such a t, those with something masked: the mean of
        # 1 - (1 - t)^(B - 1).
        ts = [low + 0.25 * (i + 0.5) / 100 for i in range(100)]
        expected = sum(1 - (1 - t) ** (B - 1) for t in ts) / 100
        here = (t > low) & (t <= low + 0.25) & some
        assert abs(here.double().mean() * 4 - expected) < 0.06
    # Dealt out at random, not in rows.
    first, second = t[::2], t[1::2]
    pairs = some[::2] & some[1::2]
    assert torch.corrcoef(torch.stack((first[pairs], second[pairs])))[0, 1].abs() < 0.1


def test_of_n_segments_one_has_its_t_in_every_nth_part():
    n, B = 20, 4000  # so many slots that their share tells t
    for seed in range(5):
        masked, _ = draw_noise(torch.zeros(4, 5, dtype=torch.long), B, gen(seed))
        share = masked.view(n, B)[:, 1:].double().mean(1).sort().values
        low = torch.arange(n) / n
        assert (share > low - 0.04).all() and (share < low + 1 / n + 0.04).all()
        # 1 / t makes up for it: the mean weight of a slot is 1.
    weight = torch.stack([draw_noise(torch.zeros(40, 50).long(), 5, gen(seed))[1]
                          for seed in range(20)])
    assert abs(weight[..., 1:].double().mean() - 1) < 0.02


# --- Replay ------------------------------------------------------------------------------------

def test_decode_states_show_what_was_committed_before():
    filled = torch.tensor([[5, 6, 7, EOS, 8, MASK]])
    steps = torch.tensor([[0, 2, 0, 1, 0, NEVER]])
    decoded = Decoded(filled, filled, steps, None, None)
    block, step = torch.tensor([[0, 0, 1, 1, 0]]), torch.tensor([[0, 1, 1, 2, 3]])
    noised, open_ = decode_states(decoded, block, step, 3)
    assert noised.tolist() == [[[1, 1, 1], [5, 1, 7], [1, 8, 1], [EOS, 8, 1], [5, 6, 7]]]
    assert torch.equal(open_, noised == MASK)


@pytest.mark.parametrize("B", [1, 2, 3, 4])
@pytest.mark.parametrize("rule, temperature", [
    (Threshold(0.6), 0.0), (Threshold(0.4), 1.0), (Threshold(1.5), 0.7), (Factor(1.2), 1.0),
    (Apart(0.5, 0.3), 0.7), (Apart(0.4, 0.3, range(3, VOCAB)), 1.3)])
def test_replayed_log_probabilities_are_the_recorded_ones(B, rule, temperature, kind):
    for seed in (0, 3):
        model, prompt = tiny_gpt(seed, kind=kind), left_padded(LENGTHS, seed)
        decoded = block_decode(model, prompt, 12, B, rule, Sampling(temperature, gen(seed)))
        assert len(set((decoded.tokens != PAD).sum(1).tolist())) > 1
        logp = replay_logp(model, prompt, decoded, B, temperature)
        close(logp, decoded.logp)
        assert logp.requires_grad
        rows = torch.tensor([4, 1])
        part = replay_logp(model, prompt[rows], decoded.take(rows), B, temperature)
        close(part, decoded.logp[rows])
    # It looks at the temperature.
    other = replay_logp(model, prompt, decoded, B, 2.0)
    assert (other - decoded.logp).abs().max() > 0.01


@pytest.mark.parametrize("B", [1, 2, 4])
def test_the_gradient_of_a_replay_is_that_of_its_states_one_by_one(B, kind):
    """Log-probabilities, weighed at random; every token alone in the state of its step."""
    model, prompt = tiny_gpt(3, kind=kind), left_padded(LENGTHS, 3)
    decoded = block_decode(model, prompt, 8, B, Apart(0.5, 0.1), Sampling(1.0, gen()))
    weight = torch.rand(decoded.tokens.shape, generator=gen(1), dtype=torch.float64)
    together = (replay_logp(model, prompt, decoded, B, 1.0) * weight).sum()
    alone = 0.0
    for n, i in (decoded.tokens != PAD).nonzero().tolist():
        begin = i // B * B
        slots, steps = slice(begin, begin + B), decoded.commit_step[n]
        state = torch.where(steps[slots] >= steps[i], MASK, decoded.filled[n, slots])
        real = prompt[n, -LENGTHS[n]:]
        hidden = block_hidden(model, real, decoded.filled[n], state, B, i // B)[i - begin]
        logp = F.log_softmax(model.logits(hidden), -1)
        alone = alone + weight[n, i] * logp[decoded.tokens[n, i]]
    close(together, alone)
    parameters = list(model.parameters())
    gradients = (torch.autograd.grad(x, parameters) for x in (together, alone))
    for a, b in zip(*gradients):
        close(a, b)


# --- The CFT loss ------------------------------------------------------------------------------

def subset_weight(m, n):
    """E over t of (probability that exactly these m of n slots are masked) x (weight of their
    losses): the integral over (0, 1] of t^m (1 - t)^(n - m) / t, which is Beta(m, n - m + 1)."""
    return math.factorial(m - 1) * math.factorial(n - m) / math.factorial(n)


def enumerated_loss(model, prompt, response, weight, B, first_step):
    """Expected weighted nats of one unpadded row of whole blocks, over all states of its blocks.

    Slot 0 counts once. The others: all m masked of n = B - 1, each set with its weight; or, in
    the share first_step, the whole block with weight 1."""
    total = 0.0
    for b in range(len(response) // B):
        block, w = response[b * B:(b + 1) * B], weight[b * B:(b + 1) * B]

        def nats(masked):
            state = [MASK if j in masked else word for j, word in enumerate(block.tolist())]
            hidden = block_hidden(model, prompt, response, torch.tensor(state), B, b)
            return w * F.cross_entropy(model.logits(hidden), block, reduction="none")

        everything = nats(range(B))
        total += everything[0] + first_step * everything[1:].sum()
        for m in range(1, B):
            for masked in itertools.combinations(range(1, B), m):
                of_set = nats(masked)[list(masked)].sum()
                total += (1 - first_step) * subset_weight(m, B - 1) * of_set
    return total


def two_responses(B, whole):
    """Filled responses (2, 2 B) of two blocks and one, and the responses; with an answer. If not
    whole, the last blocks must be filled."""
    filled = words(2, 2 * B, seed=1)
    filled[filled == ANSWER] = 8
    filled[0, 1], filled[1, 0] = ANSWER, ANSWER
    filled[1, B:] = PAD
    if whole:
        return filled, filled
    filled[0, -2:], filled[1, 1:B] = EOS, EOS
    response = filled[:, :-1].clone()
    response[1, 2:] = PAD
    return filled, response


@pytest.mark.parametrize("B, first_step, whole, states, answer_weight", [
    (3, 0.0, False, 0, 1.0), (4, 0.0, True, 3, 2.5), (3, 0.4, True, 0, 2.5),
    (3, 0.0, True, 1, 0.5), (4, 0.4, False, 0, 1.0), (3, 0.3, False, 2, 3.0)])
@torch.no_grad()
def test_monte_carlo_mean_of_the_loss_is_the_enumerated_bound(
        B, first_step, whole, states, answer_weight):
    model, prompt = tiny_gpt(kind=FastGPT), left_padded([2, 4])  # the loss of a GPT is the same
    filled, response = two_responses(B, whole)
    weight = torch.ones(2, 2 * B, dtype=torch.float64)
    for n, i in itertools.product(range(2), range(2 * B)):
        # An [EOS] that only fills the block weighs as a trace token does.
        real = i < response.shape[1] and response[n, i] != PAD
        if real and ANSWER in filled[n, :i]:
            weight[n, i] = answer_weight
    exact = (enumerated_loss(model, prompt[0, 2:], filled[0], weight[0], B, first_step) +
             enumerated_loss(model, prompt[1], filled[1, :B], weight[1, :B], B, first_step))
    exact /= weight[0].sum() + weight[1, :B].sum()
    cfg = replace(PLAIN, block_size=B, cft_first_step=first_step, answer_states=states,
                  answer_weight=answer_weight)
    many = prompt.repeat(200, 1), response.repeat(200, 1)
    draws = torch.stack([cft_loss(cfg, model, *many, gen(seed)) for seed in range(30)])
    error = draws.std() / 30 ** 0.5
    assert error < 0.02 * exact
    assert (draws.mean() - exact).abs() < 4 * error


@torch.no_grad()
def test_the_loss_is_divided_by_the_number_of_tokens_and_not_by_the_weights_drawn():
    model, prompt = tiny_gpt(), left_padded(LENGTHS)
    response = words(len(LENGTHS), 9, seed=1)
    model.embed.weight.zero_()  # every token costs log(V - 2)
    cfg = replace(PLAIN, block_size=3, answer_weight=1.0)
    count = draw_noise(every_block(response, 3), 3, gen(1))[1].double().sum()
    loss = cft_loss(cfg, model, prompt, response, gen(1))
    close(loss, math.log(VOCAB - 2) * count / response.numel(), atol=1e-5)
    assert (count / response.numel() - 1).abs() > 0.01


@pytest.mark.parametrize("first_step, states", [(0.0, 0), (0.5, 2)])
@pytest.mark.parametrize("answer_weight", [1.0, 4.0])
def test_at_block_size_one_the_loss_is_the_autoregressive_one(
        first_step, states, answer_weight, kind):
    model, prompt = tiny_gpt(kind=kind), left_padded(LENGTHS)
    response = words(len(LENGTHS), 7, seed=1)
    response[:, 2] = ANSWER
    response[0, 3:], response[3, 1:] = PAD, PAD
    logits = model.logits(causal_hidden(model, prompt, response))
    nats = F.cross_entropy(logits.transpose(1, 2), response, reduction="none")
    after = (response == ANSWER).cumsum(1) - (response == ANSWER).long() > 0
    weight = torch.where(after, answer_weight, 1.0) * (response != PAD)
    cfg = replace(PLAIN, block_size=1, cft_first_step=first_step, answer_states=states,
                  answer_weight=answer_weight)
    loss = cft_loss(cfg, model, prompt, response, gen())
    close(loss, (nats * weight).sum() / weight.sum(), atol=1e-6)
