"""Ours, --trace bound: the ranking is a function of its trace.

A response is written in two requests to the same model, and the second never sees the prompt:

    request   reads                                 writes
    1         <history> x1 y2 ... x2 y4 z3          <profile> x2 y2 z3  L1 x3:1 ... z3:3 [EOS]
    2         <profile> x2 y2 z3  L1 x3:1 ... z3:3  <answer> L4 L1 L2 L3 [EOS]

So whoever edits the prompt and keeps the trace changes no ranking, to the last bit: what decides
is what the trace says. Each request is a prompt and a response like any other, and goes through
the same losses and decoders. The answer is one block of its own.

Everywhere else a list of *parts* stands for the requests, [(settings, prompt, what is written)]:
two with --trace bound, otherwise one.
"""
import dataclasses

import torch
import torch.nn.functional as F

from data import ANSWER, EOS, PAD, token_weights
from sampler import Decoded


def answer_length(cfg):
    """Tokens of an answer at most: <answer>, the labels, [EOS]."""
    return cfg.n_candidates + 2


def trace_length(cfg, max_len):
    """Tokens of a trace at most, with its [EOS]; max_len: of a whole response."""
    return max_len - answer_length(cfg) + 1


def for_answer(cfg):
    """Settings of the second request: no block is wider than an answer."""
    return dataclasses.replace(cfg, block_size=min(cfg.block_size, answer_length(cfg)))


def packed(tokens, left):
    """data.pack for tensors: moves the [PAD] of each row (N, T) to one side."""
    is_pad = tokens == PAD
    order = (~is_pad if left else is_pad).int().argsort(dim=1, stable=True)
    tokens = tokens.gather(1, order)
    used = max(1, int((~is_pad).sum(1).max()))
    return tokens[:, -used:] if left else tokens[:, :used]


# --- Training text ------------------------------------------------------------------------------

def requests(cfg, prompt, response):
    """Training text as parts: prompt (N, P), response (N, R)."""
    if cfg.trace != "bound":
        return [(cfg, prompt, response)]
    in_second = (response == ANSWER).cumsum(1) > 0                # (N, R)
    trace = torch.where(in_second | (response == EOS), PAD, response)
    trace = packed(trace, left=False)
    length = (trace != PAD).sum(1, keepdim=True)                  # (N, 1)
    ended = F.pad(trace, (0, 1), value=PAD).scatter(1, length, EOS)
    answer = packed(torch.where(in_second, response, PAD), left=False)
    return [(cfg, prompt, ended), (for_answer(cfg), packed(trace, left=True), answer)]


def mean_loss(parts, losses):
    """The losses of the parts as one: each is a mean over its tokens, by their weights."""
    if len(parts) == 1:
        return losses[0]
    weights = []
    for cfg, _, written in parts:
        tokens = written.tokens if isinstance(written, Decoded) else written
        weights.append(token_weights(tokens, cfg.answer_weight).sum())
    return sum(w * loss for w, loss in zip(weights, losses)) / sum(weights)


# --- Decoding -----------------------------------------------------------------------------------

def what_is_read(trace):
    """Traces (N, T) as they were written -> what the second request reads (N, P)."""
    return packed(torch.where(trace == EOS, PAD, trace), left=True)


def write(cfg, decoder, prompt, max_len, group=1):
    """A group of responses to each prompt (N, P), of max_len tokens at most, as parts. The rows of
    a group are adjacent. A group shares its trace, written greedily: only answers are drawn.

    decoder(settings, prompt, max_len, greedily) -> Decoded."""
    if cfg.trace != "bound":
        prompt = prompt.repeat_interleave(group, dim=0)
        return [(cfg, prompt, decoder(cfg, prompt, max_len, False))]
    trace = decoder(cfg, prompt, trace_length(cfg, max_len), group > 1)
    read = what_is_read(trace.tokens).repeat_interleave(group, dim=0)
    own = for_answer(cfg)
    return [(cfg, prompt, trace), (own, read, decoder(own, read, answer_length(cfg), False))]


def joined(parts):
    """Parts as one Decoded, in whole blocks: the trace, with [PAD] for its [EOS], then the
    answer. So [PAD] may stand before <answer> too."""
    if len(parts) == 1:
        return parts[0][-1]
    trace, answer = (written for _, _, written in parts)
    without_end = torch.where(trace.tokens == EOS, PAD, trace.tokens)

    def both(name):
        return torch.cat((getattr(trace, name), getattr(answer, name)), dim=1)

    return Decoded(torch.cat((without_end, answer.tokens), dim=1), both("filled"),
                   both("commit_step"), both("logp"), trace.forwards + answer.forwards)
