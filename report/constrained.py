"""Constrained decoding, for a reference row only: an answer can be nothing but a permutation.

What the paper's model does not need, and what it would cost or gain. The response has the layout
of the rule: its trace length, <answer>, the labels of the list, [EOS]; with --trace bound this is
asked of the second request only. Labels are assigned to the answer's open slots greedily, the
surest first; a label that is used or assigned is closed to all other slots.
"""
import dataclasses

import numpy as np
import torch

from data import ANSWER, EOS, LABEL, PAD
from fast.decode import fast_block_decode
from fast.gpt import FastGPT
from ours.bound import joined, write
from plumbing.checkpoint import new_model
from trainer import rule_of

CLOSED = -1e4  # logit of what may not be written


class Permutations:
    """constrain(logits, response, slots, rows) -> logits, for the decoder of fast/decode.py.

    split: the users of the batch. A response of theirs has its answer in slots start, ...,
    start + length - 1. trace_tokens (N,) stand before <answer>."""

    def __init__(self, world, split, trace_tokens, device):
        self.start = torch.from_numpy(trace_tokens + 1).to(device)[:, None]        # (N, 1)
        self.length = torch.from_numpy(split.list_length).to(device)[:, None]      # (N, 1)
        self.words = torch.arange(len(world.words), device=device)
        self.labels = slice(LABEL, LABEL + world.n_labels)
        labels = np.arange(world.n_labels)
        listed = (split.incoming[..., None] == labels).any(1)                      # (N, n_labels)
        self.listed = torch.from_numpy(listed).to(device)

    def __call__(self, logits, response, slots, rows):
        """logits (n, B, V) of the slots (n, B) of responses (n, R), for the users rows (n,)."""
        start, length = self.start[rows], self.length[rows]
        for token, at in ((ANSWER, start - 1), (EOS, start + length)):
            elsewhere = (slots == at)[..., None] != (self.words == token)          # (n, B, V)
            logits = logits.masked_fill(elsewhere, CLOSED)
        open_ = self.open_labels(response, slots, rows)
        p = logits[..., self.labels].masked_fill(~open_, CLOSED).softmax(-1) * open_
        forced = torch.zeros_like(logits, dtype=torch.bool)
        forced[..., self.labels] = assigned(p, int(length.max()))
        return torch.where(forced.any(-1, keepdim=True) & ~forced, CLOSED, logits)

    def open_labels(self, response, slots, rows):
        """Which labels each slot may take: bool (n, B, n_labels)."""
        start, length = self.start[rows], self.length[rows]

        def in_answer(slot):
            return (slot >= start) & (slot < start + length)

        every = torch.arange(response.shape[1], device=response.device)
        answer = torch.where(in_answer(every), response, PAD)                      # (n, R)
        labels = self.words[self.labels]
        used = (answer[..., None] == labels).any(1)                                # (n, n_labels)
        still_open = response.gather(1, slots) < EOS                               # [MASK]
        free = in_answer(slots) & still_open                                       # (n, B)
        return free[..., None] & (self.listed[rows] & ~used)[:, None]


def no_answer(logits, *_):
    """A constraint for the trace of a bound ranking: nothing in it is taken for the answer."""
    logits[..., ANSWER] = CLOSED
    return logits


def assigned(p, n):
    """n times the surest pair of a slot and a label that are both free: p (n_rows, B, n_labels)
    -> bool, as p."""
    taken = torch.zeros_like(p, dtype=torch.bool)
    n_labels = p.shape[-1]
    for _ in range(n):
        best, at = p.flatten(1).max(1)
        row = (best > 0).nonzero()[:, 0]
        slot, label = at[row] // n_labels, at[row] % n_labels
        taken[row, slot, label] = True
        p[row, slot] = 0
        p[row, :, label] = 0
    return taken


def constrained_decode(cfg, world, model, prompt, rows):
    """Decodes the test users rows, whose prompts (N, P) are given -> Decoded."""
    if not isinstance(model, FastGPT):  # the plain decoder takes no constraint
        twin = new_model(dataclasses.replace(cfg, fast=True), world)
        twin.load_state_dict(model.state_dict())
        model = twin.eval()
    split = world.test.take(rows)
    bound = cfg.trace == "bound"
    trace_tokens = np.zeros(len(split), int) if bound else (split.trace != PAD).sum(1)
    only = Permutations(world, split, trace_tokens, prompt.device)

    def decoder(own, read, max_len, _):
        constrain = no_answer if bound and read is prompt else only
        return fast_block_decode(model, read, max_len, own.block_size, rule_of(own),
                                 constrain=constrain)
    return joined(write(cfg, decoder, prompt, world.max_response))
