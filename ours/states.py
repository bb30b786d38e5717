"""Ours: more states of the blocks, and better ones. A state is a copy of a block with its masks.

    uniform noise           L4 [MASK] L7 L2                    the paper: one a block, weight 1 / t
    a first step            [MASK] [MASK] [MASK] [MASK]        --cft_first_step: decoding starts so
    more of the answer      the answer's blocks again          --answer_states

The answer is the hard part of a response, and a small part of its blocks.
"""
import torch

from data import ANSWER, PAD


def answer_blocks(response, block_size, times):
    """The blocks with the answers of responses (N, R), named `times` times each: (N, E)."""
    is_answer = response == ANSWER
    if not is_answer.any():  # the first part of ours/bound.py
        return torch.zeros(len(response), 0, dtype=torch.long, device=response.device)
    first = (is_answer.int().argmax(1) + 1) // block_size         # (N,)
    last = ((response != PAD).sum(1) - 1) // block_size
    # A row with fewer blocks names its last one again: share_weight makes up for it.
    span = torch.arange(int((last - first).max()) + 1, device=response.device)
    return torch.minimum(first[:, None] + span, last[:, None]).repeat(1, times)


def share_weight(block, weight):
    """States of one block share its weight: block (N, M), weight (N, M, B) -> (N, M, B)."""
    times = (block[:, :, None] == block[:, None]).sum(2)          # (N, M) how often it is there
    return weight / times[..., None]


def first_steps(masked, weight, share, rng):
    """Makes a share of the states the sampler's first: all [MASK], slot 0 too, with weight 1."""
    n = masked.shape[0] * masked.shape[1]
    first = torch.rand(n, 1, generator=rng).to(masked.device) < share
    first = first.view(*masked.shape[:2], 1)                      # (N, M, 1)
    return masked | first, torch.where(first, 1.0, weight)


def state_weights(block, scored, real):
    """Weights of the slots of states: (N, M, 1). A state with two open slots weighs as much as
    one with ten: collisions happen late, where few are open. States of a block share its weight.

    block (N, M); scored, real (N, M, B): the slots that count, and the block's tokens."""
    n_scored = scored.sum(-1, keepdim=True).clamp(min=1)
    weight = real.sum(-1, keepdim=True) / n_scored
    return share_weight(block, weight)
