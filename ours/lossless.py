"""Ours: lossless decoding. The model drafts in blocks and verifies as AR; the text is AR's.

The same weights decode both ways (--cft_ar_weight), and both ways read the prompt alike. So one
cache serves draft and verification. One causal forward over a draft says at every place what AR
would write there. The draft is accepted up to the first difference, where AR's token comes:

    draft      L4  L1  L3  L2  [EOS]
    AR         L4  L1  L2                   accepted: L4 L1 L2
    amended    L4  L1  L2  L3  [EOS]        accepted: all, after two verifications

The rest of a draft is kept, since any draft will do. In an answer AR's label changes places with
the label that it replaces, so a ranking stays a ranking.
"""
import math

import torch
import torch.nn.functional as F

from data import EOS, MASK, PAD, after_first, in_answer
from diffusion import read_blocks, take_blocks
from model import KVCache, causal_hidden, causal_mask, pad_left
from sampler import NEVER, Decoded, block_decode


def ar_tokens(model, cache, prompt, draft):
    """What AR would write at every place of a draft (n, R) after prompts (n, P), given the draft
    before it: tokens (n, R). The cache holds the prompts."""
    # The last token of a prompt is read again: its output predicts place 0 of the draft.
    cache.length = prompt.shape[1] - 1
    tokens = torch.cat((prompt[:, -1:], draft[:, :-1]), dim=1)    # (n, R)
    pad = pad_left(prompt)                                        # (n, 1)
    end = cache.length + tokens.shape[1]
    positions = torch.arange(cache.length, end, device=pad.device) - pad
    mask = causal_mask(pad, cache.length, end)
    hidden = model(tokens, positions.clamp(min=0), mask, cache)   # (n, R, d)
    return model.logits(hidden).argmax(-1)


def amend(draft, best):
    """Puts AR's token at the first place where a draft (n, R) differs from best (n, R) -> the new
    draft (n, R), and how many of its tokens are AR's (n, 1), R + 1 if there is no difference.

    In an answer, a place further right that has AR's label gets the old label instead."""
    n_right = (draft == best).long().cumprod(1).sum(1, keepdim=True)  # (n, 1)
    place = n_right.clamp(max=draft.shape[1] - 1)
    old, new = draft.gather(1, place), best.gather(1, place)      # (n, 1) each
    slot = torch.arange(draft.shape[1], device=draft.device)      # (R,)
    swapped = (slot > place) & in_answer(draft) & (draft == new)
    draft = torch.where(swapped, old, draft)
    draft = torch.where(slot == place, new, draft)
    return draft, n_right + 1


@torch.no_grad()
def lossless_decode(model, prompt, max_len, block_size, rule):
    """The greedy text of model.ar_decode, in fewer forwards: prompt (N, P) -> Decoded, in blocks
    of one token. Its logp is not computed and stays 0.

    rule: which slots of a draft are committed together, as for block_decode."""
    N, P = prompt.shape
    # It keeps the prompts of all rows: block_decode drops rows from copies only.
    cache = KVCache(model, N, P + max_len + block_size)
    drafted = block_decode(model, prompt, max_len, block_size, rule, cache=cache)
    text = drafted.clean[:, :max_len]                             # (N, max_len)
    forwards = drafted.forwards
    rows = torch.arange(N, device=prompt.device)                  # (n,) those that are not finished
    while len(rows):
        best = ar_tokens(model, cache, prompt[rows], text[rows])  # (n, max_len)
        draft, n_accepted = amend(text[rows], best)
        text[rows] = draft
        forwards[rows] += 1
        slot = torch.arange(max_len, device=prompt.device)
        accepted = slot < n_accepted                              # (n, max_len)
        finished = ((draft == EOS) & accepted).any(1) | accepted.all(1)   # (n,)
        rows, cache = rows[~finished], cache.take(~finished)

    filled = up_to_end(text)
    tokens = filled.masked_fill(filled == MASK, PAD)
    step = torch.where(filled == MASK, NEVER, 0)
    return Decoded(tokens, filled, step, torch.zeros_like(tokens, dtype=torch.float), forwards, 1)


# --- At a temperature ---------------------------------------------------------------------------

def accept(x, q, p, rng):
    """Accepts or rejects tokens x (N, B) from the left that were drawn from q (N, B, V), where AR
    has p (N, B, V): how many are accepted (N, 1), and AR's token at the first that is not (N, 1).

    x is accepted with probability min(1, p(x) / q(x)). If it is rejected, another token is drawn in
    proportion to what q lacks, max(p - q, 0). Together this is a draw from p: the accepted mass is
    min(p, q); the rejected mass is the sum of max(q - p, 0), which is that of max(p - q, 0), since
    p and q both sum to 1. It all goes to what q lacks, and min(p, q) + max(p - q, 0) = p
    (speculative sampling, arXiv 2211.17192)."""
    of_x = x[..., None]                                           # (N, B, 1)
    p_x, q_x = p.gather(-1, of_x)[..., 0], q.gather(-1, of_x)[..., 0]   # (N, B)
    u = torch.rand(p_x.shape, generator=rng, device=p.device)
    accepted = u * q_x < p_x
    n = accepted.long().cumprod(1).sum(1, keepdim=True)           # (N, 1)
    place = n.clamp(max=x.shape[1] - 1)[..., None].expand(-1, -1, p.shape[-1])
    p, q = p.gather(1, place)[:, 0], q.gather(1, place)[:, 0]     # (N, V)
    rest = torch.maximum(p - q, 1e-9 * p)  # never 0 everywhere, whatever the rounding
    return n, torch.multinomial(rest, 1, generator=rng)


@torch.no_grad()
def lossless_sample(model, prompt, max_len, block_size, sampling):
    """Draws responses from AR's distribution at a temperature, plainly, without a cache.

    prompt (N, P) -> tokens (N, max_len), [PAD] after the first [EOS].

    All tokens of a draft are drawn in one forward, for one block. So q of a slot does not depend
    on the draft's other tokens, and they may be accepted one after another. For study: no script
    calls it, and tests/test_lossless.py compares it with AR's exact distribution."""
    N, B = len(prompt), min(block_size, max_len)
    R = math.ceil(max_len / B) * B
    text = prompt.new_full((N, R), MASK)                          # what is accepted, then [MASK]
    slot = torch.arange(R, device=prompt.device)                  # (R,)
    while True:
        n = (text != MASK).sum(1, keepdim=True)                   # (N, 1) accepted tokens
        ended = (text == EOS).any(1, keepdim=True) | (n == R)
        if ended.all():
            break
        block = n.clamp(max=R - 1) // B                           # (N, 1) the block to draft
        state = take_blocks(text, block, B)                       # (N, 1, B)
        clean = text.masked_fill(text == MASK, EOS)               # no prediction sees the filling
        _, hidden = read_blocks(model, prompt, clean, state, block)
        q = tempered(model, hidden[:, 0], sampling)               # (N, B, V)
        known = state[:, 0]                                       # (N, B)
        q = torch.where((known == MASK)[..., None], q, one_hot(known, q))
        x = torch.multinomial(q.flatten(0, 1), 1, generator=sampling.generator).view(N, B)

        # AR's distributions over the draft; what is known already is accepted as it is.
        here = slot // B == block                                 # (N, R)
        draft = clean.masked_scatter(here, x)  # x goes into the drafted block of each row
        hidden = causal_hidden(model, prompt, draft)              # (N, R, d)
        p = tempered(model, take_blocks(hidden, block, B)[:, 0], sampling)
        p = torch.where((known == MASK)[..., None], p, one_hot(known, p))
        n_here, token = accept(x, q, p, sampling.generator)       # (N, 1) each
        n_new = block * B + n_here
        new = torch.where(slot < n_new, draft, MASK)
        new = torch.where((slot == n_new) & (n_here < B), token, new)
        text = torch.where(ended, text, up_to_end(new))
    text = text[:, :max_len]
    return text.masked_fill(text == MASK, PAD)


def tempered(model, hidden, sampling):
    """What tokens are drawn from: hidden (..., d) -> probabilities (..., V)."""
    return (model.logits(hidden) / sampling.temperature).softmax(-1)


def one_hot(token, like):
    """Probabilities like those given, (..., V), all on the tokens (...)."""
    return F.one_hot(token, like.shape[-1]).to(like.dtype)


def up_to_end(text):
    """Text (N, R) with [MASK] after its first [EOS]."""
    return text.masked_fill(after_first(text, EOS), MASK)
