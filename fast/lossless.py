"""Lossless decoding, quicker: the twin of ours/lossless.py, tested equal.

Both models have a cache. The student's keeps blocks that were accepted whole: a draft begins inside
a block, whose accepted slots are filled already. The teacher's keeps all accepted tokens.
"""
import math

import torch

from data import EOS, MASK, PAD
from fast.decode import BlockState, decode_block
from fast.gpt import FastGPT, SlotCache
from model import GREEDY, causal_mask
from ours.lossless import lossless_decode
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
        while len(left):
            draft(s, left, int(n[left].min()), rule)
            n[left] = verify(s, teacher, cache, left, n[left])
            verifies[left] += 1
            finished = (s.response == EOS).any(1) | (n >= max_len)
            left = s.rows[~finished]
    tokens = s.response[:, :max_len]
    return torch.where(tokens == MASK, PAD, tokens), s.forwards.clone(), verifies.clone()


def draft(s, rows, n, rule):
    """The student fills the rest of the rows (m,), of which each has n tokens at least."""
    B = s.B
    for begin in range(n // B * B, s.R, B):
        running = (s.response[rows, :begin] != EOS).all(1)
        open_ = unfinished(s.response[rows, begin:begin + B]) & running[:, None]  # (m, B)
        here = open_.any(1)
        if not here.any():
            continue
        n_clean = B  # the block before was drafted just now, or ends with the teacher's token
        if not open_[:, 0].any():
            n_clean = 0                                           # it has been read as it is
        elif begin == 0:
            n_clean = s.P
        decode_block(s, rows[here], begin, n_clean, rule, GREEDY)


def verify(s, teacher, cache, rows, n):
    """The teacher reads the drafts of the rows (m,), n (m,) tokens of which are accepted already;
    what it does not accept is [MASK] again -> n (m,)."""
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
    drafted[:, known:end] = torch.where(slot[known:end] == n, best, drafted[:, known:end])
    drafted[slot > n] = MASK
    is_end = drafted == EOS
    s.response[rows] = drafted.masked_fill(is_end.cumsum(1) - is_end.long() > 0, MASK)
    return (s.response[rows] != MASK).sum(1)
