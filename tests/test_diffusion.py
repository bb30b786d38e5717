"""Invariants of diffusion.py (masks, blocks, noise, replay) and of the CFT loss that stands on it.

Where two computations must agree they run in float64."""
import itertools
import math

import torch
import torch.nn.functional as F

from config import Config
from conftest import LENGTHS, VOCAB, close, gen, left_padded, naive_hidden, tiny_gpt, words
from data import ANSWER, EOS, MASK, PAD
from diffusion import block_mask, draw_noise, every_block, read_blocks, replay_logp
from model import Sampling, causal_hidden
from ours.commit import Apart
from sampler import Threshold, block_decode
from train_ar import ar_loss
from train_cft import cft_loss


def cft_settings(**changes):
    return Config(**{"bfloat16": False, "cft_first_steps": 0.0, "cft_ar_weight": 0.0, **changes})


# --- One forward over the prompt, the clean text and segments ---------------------------------

def test_who_sees_whom_equals_the_loops_of_its_definition():
    for P, R, B, blocks in (
            (3, 6, 2, [[0, 1, 2], [2, 2, 0]]), (1, 4, 1, [[3, 0]]), (2, 6, 3, [[], []]),
            (4, 8, 4, [[1], [0], [1]]), (2, 4, 2, [[1, 1, 1, 1, 0]])):
        mask = block_mask(P, R, B, torch.tensor(blocks, dtype=torch.long).view(len(blocks), -1))
        for n, of_row in enumerate(blocks):
            # Of every column: its block, and its segment (None in the prompt and the clean text).
            columns = [(-1, None)] * P + [(r // B, None) for r in range(R)]
            columns += [(b, m) for m, b in enumerate(of_row) for _ in range(B)]
            assert mask[n].shape == (len(columns), len(columns))
            for (q, (bq, mq)), (k, (bk, mk)) in itertools.product(enumerate(columns), repeat=2):
                if mq is None:
                    sees = mk is None and k <= q
                else:
                    sees = mk == mq or mk is None and bk < bq
                assert mask[n, q, k] == sees, (q, k)


@torch.no_grad()
def test_every_segment_is_seen_as_if_it_stood_alone_and_the_clean_text_as_ar_sees_it():
    for B in (1, 2, 3, 4):
        model, prompt = tiny_gpt(), left_padded(LENGTHS)
        clean = words(len(LENGTHS), 12, seed=1)
        block = torch.randint(12 // B, (len(LENGTHS), 5), generator=gen())  # in any order
        masked = torch.rand(*block.shape, B, generator=gen(1)) < 0.5
        noised = torch.where(masked, MASK, words(*block.shape, B, seed=2))
        from_left, hidden = read_blocks(model, prompt, clean, noised, block)
        close(from_left, causal_hidden(model, prompt, clean), 1e-12)
        for n, m in itertools.product(range(len(LENGTHS)), range(5)):
            before = clean[n, :block[n, m] * B]
            close(hidden[n, m], naive_hidden(model, prompt[n, -LENGTHS[n]:], before, noised[n, m]))


# --- Noise ------------------------------------------------------------------------------------

def test_one_t_a_segment_one_in_every_stratum_dealt_out_at_random():
    n, B = 20, 4000  # so many slots that the masked share of a segment tells its t
    ranks = []
    for seed in range(40):
        masked, weight = draw_noise(torch.zeros(4, 5).long(), B, 0.0, gen(seed))
        masked, weight = masked.view(n, B), weight.view(n, B)
        assert not masked[:, 0].any() and (weight[:, 0] == 1).all()   # slot 0 is shown, and counts
        t = masked[:, 1:].double().mean(1)
        low = torch.arange(n) / n
        assert ((t.sort().values > low - 0.04) & (t.sort().values < low + 1 / n + 0.04)).all()
        # What is masked weighs 1 / t, the rest nothing.
        assert torch.equal(weight[:, 1:] > 0, masked[:, 1:])
        for row, its_t in zip(weight[:, 1:], t):
            of_masked, = row[row > 0].unique()
            assert abs(1 / of_masked - its_t) < 0.04
        ranks.append(t.argsort())
    # No segment has a stratum of its own.
    assert all(len(set(place.tolist())) > 8 for place in torch.stack(ranks, 1))


def test_some_segments_are_first_steps():
    for share in (0.0, 0.3, 1.0):
        masked, weight = draw_noise(torch.zeros(40, 500).long(), 5, share, gen())
        first = masked[..., 0]                                    # it shows [MASK] in slot 0 too
        assert abs(first.double().mean() - share) < 0.02
        assert masked[first].all() and (weight[first] == 1).all()


# --- The CFT loss -----------------------------------------------------------------------------

def subset_weight(m, n):
    """E over t of (probability that exactly these m of n slots are masked) x (weight of their
    losses): the integral over (0, 1] of t^m (1 - t)^(n - m) / t, which is Beta(m, n - m + 1)."""
    return math.factorial(m - 1) * math.factorial(n - m) / math.factorial(n)


def enumerated_loss(model, prompt, response, weight, B, first_steps):
    """Expected weighted nats of one unpadded row of whole blocks, over all states of its blocks.

    Slot 0 counts once. The others: all m masked of n = B - 1, each set with its weight; or, in
    the share first_steps, the whole block with weight 1."""
    total = 0.0
    for begin in range(0, len(response), B):
        block, w = response[begin:begin + B], weight[begin:begin + B]

        def nats(masked):
            state = [MASK if j in masked else word for j, word in enumerate(block.tolist())]
            hidden = naive_hidden(model, prompt, response[:begin], torch.tensor(state))
            return w * F.cross_entropy(model.logits(hidden), block, reduction="none")

        everything = nats(range(B))
        total += everything[0] + first_steps * everything[1:].sum()
        for m in range(1, B):
            for masked in itertools.combinations(range(1, B), m):
                of_set = nats(masked)[list(masked)].sum()
                total += (1 - first_steps) * subset_weight(m, B - 1) * of_set
    return total


@torch.no_grad()
def test_the_mean_of_the_loss_over_its_draws_is_the_enumerated_bound():
    A, E = ANSWER, EOS
    response = torch.tensor([[4, A, 5, 8, 6, 3, E], [A, 9, E, PAD, PAD, PAD, PAD]])
    whole = torch.tensor([[4, A, 5, 8, 6, 3, E, 9], [A, 9, 4, E, PAD, PAD, PAD, PAD]])
    for text, B, share, answer_weight in ((response, 3, 0.0, 1.0), (response, 4, 0.4, 2.5),
                                          (whole, 4, 0.3, 3.0)):
        model, prompt = tiny_gpt(), left_padded([2, 4])
        model.embed.weight *= 0.5  # less peaked: the mean of fewer draws is near
        exact = count = 0.0
        for n, length in enumerate([2, 4]):
            row = text[n][text[n] != PAD].tolist()
            weights = [answer_weight if A in row[:i] else 1.0 for i in range(len(row))]
            n_fill = -len(row) % B      # an [EOS] that only fills the block weighs 1
            filled = torch.tensor(row + [EOS] * n_fill)
            weight = torch.tensor(weights + [1.0] * n_fill, dtype=torch.float64)
            exact += enumerated_loss(model, prompt[n, -length:], filled, weight, B, share)
            count += weight.sum()
        cfg = cft_settings(block_size=B, cft_first_steps=share, answer_weight=answer_weight)
        many = prompt.repeat(150, 1), text.repeat(150, 1)
        draws = torch.stack([cft_loss(cfg, model, *many, gen(seed)) for seed in range(30)])
        error = draws.std() / 30 ** 0.5
        assert error < 0.03 * exact / count
        assert (draws.mean() - exact / count).abs() < 4 * error, (B, share)


@torch.no_grad()
def test_the_loss_is_divided_by_the_number_of_tokens_and_not_by_the_weights_drawn():
    model, prompt, response = tiny_gpt(), left_padded(LENGTHS), words(len(LENGTHS), 9, seed=1)
    response[response == ANSWER] = 8
    model.embed.weight.zero_()  # every token costs log(V - 2)
    weight = draw_noise(every_block(response, 3), 3, 0.0, gen(1))[1]
    mean = weight.double().sum() / response.numel()
    close(cft_loss(cft_settings(block_size=3), model, prompt, response, gen(1)),
          math.log(VOCAB - 2) * mean, 1e-5)
    assert (mean - 1).abs() > 0.01


@torch.no_grad()
def test_ar_is_block_size_one_and_the_part_of_the_mix_that_reads_from_the_left():
    model, prompt, response = tiny_gpt(), left_padded(LENGTHS), words(len(LENGTHS), 7, seed=1)
    response[:, 2] = ANSWER
    response[0, 3:], response[3, 1:] = PAD, PAD
    for answer_weight in (1.0, 4.0):
        cfg = cft_settings(block_size=1, answer_weight=answer_weight)
        hidden = causal_hidden(model, prompt, response)
        nats = F.cross_entropy(model.logits(hidden).transpose(1, 2), response, reduction="none")
        after = (response == ANSWER).cumsum(1) - (response == ANSWER).long() > 0
        weight = torch.where(after, answer_weight, 1.0) * (response != PAD)
        exact = (nats * weight).sum() / weight.sum()
        close(ar_loss(cfg, model, prompt, response), exact, 1e-6)
        for share in (0.0, 0.5):
            one = cft_settings(block_size=1, answer_weight=answer_weight, cft_first_steps=share)
            close(cft_loss(one, model, prompt, response, gen()), exact, 1e-6)
        for B in (3, 4, 64):  # a block is no wider than the response
            without, mixed = (
                cft_loss(cft_settings(block_size=B, answer_weight=answer_weight, cft_ar_weight=w),
                         model, prompt, response, gen()) for w in (0.0, 2.0))
            close(mixed - without, 2.0 * exact, 1e-6)


# --- Replay -----------------------------------------------------------------------------------

def test_replayed_log_probabilities_are_the_recorded_ones():
    committed_after_end = never = 0
    for B, (rule, temperature) in itertools.product((1, 2, 4), (
            (Threshold(0.6), 0.0), (Threshold(0.4), 1.0), (Apart(0.4, range(3, VOCAB)), 1.3))):
        for seed in (0, 3):
            model, prompt = tiny_gpt(seed), left_padded(LENGTHS, seed)
            decoded = block_decode(model, prompt, 12, B, rule, Sampling(temperature, gen(seed)))
            assert len(set((decoded.tokens != PAD).sum(1).tolist())) > 1
            logp = replay_logp(model, prompt, decoded, temperature)
            close(logp, decoded.logp)
            rows = torch.tensor([4, 1])
            part = replay_logp(model, prompt[rows], decoded.take(rows), temperature)
            close(part, decoded.logp[rows])
            committed_after_end += ((decoded.tokens == PAD) & (decoded.filled != MASK)).sum()
            never += ((decoded.tokens == PAD) & (decoded.filled == MASK)).sum()
    assert committed_after_end and never  # it has blocks that an early [EOS] ended
    assert (replay_logp(model, prompt, decoded, 2.0) - decoded.logp).abs().max() > 0.01


def test_the_gradient_of_a_replay_is_that_of_its_states_one_by_one():
    """Log-probabilities, weighed at random; every token alone in the state of its step."""
    for B in (1, 4):
        model, prompt = tiny_gpt(3), left_padded(LENGTHS, 3)
        decoded = block_decode(model, prompt, 8, B, Threshold(0.5), Sampling(1.0, gen()))
        weight = torch.rand(decoded.tokens.shape, generator=gen(1), dtype=torch.float64)
        together = (replay_logp(model, prompt, decoded, 1.0) * weight).sum()
        alone = 0.0
        for n, i in (decoded.tokens != PAD).nonzero().tolist():
            begin = i // B * B
            slots, steps = slice(begin, begin + B), decoded.commit_step[n]
            state = torch.where(steps[slots] >= steps[i], MASK, decoded.filled[n, slots])
            before = decoded.filled[n, :begin]
            hidden = naive_hidden(model, prompt[n, -LENGTHS[n]:], before, state)[i - begin]
            logp = F.log_softmax(model.logits(hidden), -1)
            alone = alone + weight[n, i] * logp[decoded.tokens[n, i]]
        close(together, alone)
        parameters = list(model.parameters())
        for a, b in zip(*(torch.autograd.grad(x, parameters) for x in (together, alone))):
            close(a, b)
            assert a.abs().max() > 0
