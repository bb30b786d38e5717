"""Invariants of sampler.py: the cached decoder against one without a cache, written as loops.

All computations run in float64."""
import math

import torch
import torch.nn.functional as F

from conftest import (LENGTHS, VOCAB, close, gen, left_padded, naive_hidden, same_decode, tiny_gpt,
                      words)
from data import EOS, MASK, PAD
from model import GREEDY, Sampling, ar_decode, sample
from ours.commit import Apart
from sampler import NEVER, Decoded, Threshold, block_decode

RULES = [Threshold(0.6), Threshold(0.3), Threshold(1.0), Apart(0.5, range(3, VOCAB))]


def open_of(block):
    """The open slots of a block, a list: [MASK], and not after an [EOS]."""
    end = block.index(EOS) if EOS in block else len(block)
    return [j for j in range(end) if block[j] == MASK]


@torch.no_grad()
def plain_decode(model, prompt, max_len, B, rule, sampling=GREEDY):
    """One unpadded row (P,), by lists and loops: every step reads [prompt; finished blocks; block]
    anew -> Decoded of the row."""
    B = min(B, max_len)
    R = math.ceil(max_len / B) * B
    filled, steps, logps, forwards = [MASK] * R, [NEVER] * R, [0.0] * R, 0
    for begin in range(0, R, B):
        block, step = [MASK] * B, 0
        while open_of(block):
            text, state = torch.tensor(filled[:begin]).long(), torch.tensor(block)
            logits = model.logits(naive_hidden(model, prompt, text, state))
            logp = F.log_softmax(logits / (sampling.temperature or 1.0), -1)  # (B, V)
            token, _, _ = sample(logits[None], sampling)
            open_ = torch.tensor([j in open_of(block) for j in range(B)])
            forced = torch.tensor([j == step == 0 for j in range(B)])
            chosen = rule.choose(logp[None], open_[None], forced[None])[0]
            for j in chosen.nonzero()[:, 0].tolist():
                block[j] = filled[begin + j] = int(token[0, j])
                steps[begin + j], logps[begin + j] = step, float(logp[j, block[j]])
            step, forwards = step + 1, forwards + 1
        if EOS in block:
            break
    end = filled.index(EOS) + 1 if EOS in filled else R
    tokens, logps = filled[:end] + [PAD] * (R - end), logps[:end] + [0.0] * (R - end)
    return Decoded(torch.tensor(tokens), torch.tensor(filled), torch.tensor(steps),
                   torch.tensor(logps, dtype=torch.float64), torch.tensor(forwards), B)


# --- The rule of the paper --------------------------------------------------------------------

def test_choices_by_threshold_equal_loops():
    """More than tau, or forced; else the surest; among open slots only, and at least one."""
    logp = F.log_softmax(3 * torch.randn(200, 5, 6, generator=gen(), dtype=torch.float64), -1)
    open_ = torch.rand(200, 5, generator=gen(1)) < 0.7
    forced = torch.zeros_like(open_)
    forced[:, 0] = open_[:, 0] & (torch.rand(200, generator=gen(2)) < 0.3)
    at_least_one = 0
    for tau in (0.0, 0.5, 0.9, 1.0):
        chosen = Threshold(tau).choose(logp, open_, forced)
        for n in range(200):
            slots = [j for j in range(5) if open_[n, j]]
            confidence = [logp[n, j].max().exp().item() for j in range(5)]
            expected = {j for j in slots if confidence[j] > tau or forced[n, j]}
            if slots and not expected:
                expected, at_least_one = {max(slots, key=lambda j: confidence[j])}, at_least_one + 1
            assert set(chosen[n].nonzero()[:, 0].tolist()) == expected
    assert at_least_one > 100


def test_exactly_tau_is_not_enough():
    p = torch.tensor([[[0.5, 0.5], [0.25, 0.75]]], dtype=torch.float64)
    two = torch.ones(1, 2).bool()
    assert Threshold(0.5).choose(p.log(), two, ~two).tolist() == [[False, True]]


# --- The decoder ------------------------------------------------------------------------------

def test_with_a_cache_it_is_the_reference_of_loops_whatever_the_batch():
    """Each row alone, without padding: tokens, steps, log-probabilities and its own forwards."""
    forwards, after_end = set(), 0
    for seed, B, rule in [(s, B, rule) for s in (0, 3) for B in (1, 2, 4, 16) for rule in RULES]:
        model, prompt = tiny_gpt(seed), left_padded(LENGTHS, seed)
        decoded = block_decode(model, prompt, 11, B, rule)        # 11: not whole blocks
        for n, length in enumerate(LENGTHS):
            alone = plain_decode(model, prompt[n, -length:], 11, B, rule)
            same_decode(decoded.take(n), alone)
        forwards |= set(decoded.forwards.tolist())
        after_end += int(((decoded.tokens == PAD) & (decoded.filled != MASK)).sum())
    assert len(forwards) > 8 and after_end  # the test has cases


def test_drawn_tokens_are_those_of_the_reference():
    several = 0
    for seed, B, temperature in [(s, B, t) for s in (3, 9) for B in (1, 3, 4) for t in (0.7, 1.0)]:
        model = tiny_gpt(seed)
        for rule in RULES:
            row = words(1, 4, seed=B)
            decoded = block_decode(model, row, 12, B, rule, Sampling(temperature, gen(B)))
            alone = plain_decode(model, row[0], 12, B, rule, Sampling(temperature, gen(B)))
            same_decode(decoded.take(0), alone)
            several += int((decoded.commit_step[:, 1:] > 0).sum())
    assert several


def test_block_size_one_is_autoregressive_decoding():
    for rule in RULES:
        model, prompt = tiny_gpt(), left_padded(LENGTHS)
        decoded = block_decode(model, prompt, 12, 1, rule)
        tokens, logp, forwards = ar_decode(model, prompt, 12)
        assert torch.equal(decoded.tokens, tokens) and torch.equal(decoded.forwards, forwards)
        close(decoded.logp, logp)
