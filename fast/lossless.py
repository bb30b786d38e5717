"""Lossless decoding, quicker: the twin of ours/lossless.py, tested equal.

Both models have a cache. The teacher's keeps all accepted tokens. The student's serves the first
draft: where it must draft again, tokens have changed, and it reads all anew.
"""
import math

import torch

from data import EOS, MASK, PAD
from fast.decode import BlockState, decode_block
from fast.gpt import FastGPT, SlotCache
from model import GREEDY, causal_mask
from ours.lossless import amended, lossless_decode, up_to_end
from sampler import unfinished


@lossless_decode.register
@torch.no_grad()
def fast_lossless_decode(teacher: FastGPT, student, prompt, max_len, block_size, rule,
                         sampling=GREEDY):
    """ours.lossless.lossless_decode. At a temperature: that function itself."""
    if sampling.temperature:
        plain = lossless_decode.dispatch(object)
        return plain(teacher, student, prompt, max_len, block_size, rule, sampling)
    R = math.ceil(max_len / block_size) * block_size              # the student writes whole blocks
    with torch.inference_mode():
        s = BlockState(student, prompt, R, block_size)
        s.padded = bool(s.pad.any())
        cache = SlotCache(teacher, len(prompt), s.P + R)
        verifies = torch.zeros_like(s.forwards)
        n = torch.zeros_like(s.forwards)                          # (N,) accepted tokens
        left = s.rows                                             # rows that are not finished
        again = False
        while len(left):
            draft(s, left, rule, again)
            n[left] = verify(s, teacher, cache, left, n[left])
            verifies[left] += 1
            accepted = s.slot[:R] < n[:, None]                    # (N, R)
            finished = ((s.response == EOS) & accepted).any(1) | (n >= max_len)
            left, again = s.rows[~finished], True
    tokens = s.response[:, :max_len]
    return torch.where(tokens == MASK, PAD, tokens), s.forwards.clone(), verifies.clone()


def draft(s, rows, rule, again):
    """The student fills what is open in the rows (m,)."""
    B = s.B
    for begin in range(0, s.R, B):
        running = (s.response[rows, :begin] != EOS).all(1)
        open_ = unfinished(s.response[rows, begin:begin + B]) & running[:, None]  # (m, B)
        here = open_.any(1)
        if here.any():
            n_clean = s.P + begin if again or begin == 0 else B
            decode_block(s, rows[here], begin, n_clean, rule, GREEDY)


def verify(s, teacher, cache, rows, n):
    """The teacher reads the drafts of the rows (m,), n (m,) tokens of which are accepted already,
    and amends them -> n (m,)."""
    drafted = s.response[rows]                                    # (m, R)
    known = int(n.min())
    end = int((drafted != MASK).sum(1).max())                     # of the longest draft
    first = s.P + known - 1 if known else 0                       # what the cache does not have
    unread = slice(first, s.P + end - 1)                          # the last token says nothing
    every_row = len(rows) == len(s.rows)
    part = cache if every_row else cache.of(rows, unread.stop)

    pad = s.pad[rows]                                             # (m, 1)
    mask = causal_mask(pad if s.padded else pad[:1], first, unread.stop)
    positions = (s.slot[unread] - pad).clamp(min=0) if s.padded else unread
    hidden = teacher(s.seq[rows, unread], positions, mask, part, unread, unread.stop,
                     last=end - known)                            # (m, end - known, d)
    if not every_row:
        cache.put(rows, part, unread)
    best = teacher.logits(hidden).argmax(-1)                      # of tokens known, ..., end - 1

    slot = s.slot[:s.R]
    agree = (best == drafted[:, known:end]) | (slot[known:end] < n[:, None])
    n = known + agree.long().cumprod(1).sum(1, keepdim=True)      # (m, 1)
    text = drafted.clone()
    text[:, known:end] = torch.where(slot[known:end] == n, best, drafted[:, known:end])
    text[slot > n] = MASK
    text = up_to_end(text)
    s.response[rows] = amended(drafted, text)
    return (text != MASK).sum(1)
