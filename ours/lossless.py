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
import torch

from data import EOS, MASK, PAD, in_answer
from model import KVCache, causal_mask, pad_left
from sampler import NEVER, Decoded, block_decode


def ar_tokens(model, cache, prompt, draft):
    """What AR would write at every place of a draft (n, R) after prompts (n, P), given the draft
    before it: tokens (n, R). The cache holds the prompts."""
    cache.length = prompt.shape[1] - 1  # the last token of a prompt is read again: it predicts
    tokens = torch.cat((prompt[:, -1:], draft[:, :-1]), dim=1)    # (n, R) place 0
    pad = pad_left(prompt)                                        # (n, 1)
    end = cache.length + tokens.shape[1]
    positions = torch.arange(cache.length, end, device=pad.device) - pad
    mask = causal_mask(pad, cache.length, end)
    hidden = model(tokens, positions.clamp(min=0), mask, cache)   # (n, R, d)
    return model.logits(hidden).argmax(-1)


def amend(draft, best):
    """Puts AR's token at the first place where a draft (n, R) differs from best (n, R) -> the new
    draft (n, R), and how many of its tokens are AR's (n, 1)."""
    n_right = (draft == best).long().cumprod(1).sum(1, keepdim=True)  # (n, 1)
    place = n_right.clamp(max=draft.shape[1] - 1)
    old, new = draft.gather(1, place), best.gather(1, place)      # (n, 1) each
    slot = torch.arange(draft.shape[1], device=draft.device)      # (R,)
    swapped = (slot > place) & in_answer(draft) & (draft == new)  # the label that AR writes now
    draft = torch.where(swapped, old, draft)
    draft = torch.where(slot == place, new, draft)
    return draft, n_right + 1


@torch.no_grad()
def lossless_decode(model, prompt, max_len, block_size, rule):
    """The greedy text of model.ar_decode, in fewer forwards: prompt (N, P) -> Decoded.

    rule: which slots of a draft are committed together, a value with `choose`."""
    N, P = prompt.shape
    cache = KVCache(model, N, P + max_len + block_size)
    drafted = block_decode(model, prompt, max_len, block_size, rule, cache=cache)
    text = drafted.clean[:, :max_len]                             # (N, max_len)
    forwards = drafted.forwards
    rows = torch.arange(N, device=prompt.device)                  # those that are not finished, (n,)
    while len(rows):
        best = ar_tokens(model, cache, prompt[rows], text[rows])  # (n, max_len)
        draft, n_accepted = amend(text[rows], best)
        text[rows] = draft
        forwards[rows] += 1
        slot = torch.arange(max_len, device=prompt.device)
        accepted = slot < n_accepted                              # (n, max_len)
        finished = ((draft == EOS) & accepted).any(1) | accepted.all(1)   # (n,)
        rows, cache = rows[~finished], cache.take(~finished)

    is_end = text == EOS
    after = is_end.cumsum(1) - is_end.long() > 0
    tokens = text.masked_fill(after, PAD)
    filled = text.masked_fill(after, MASK)
    step = torch.where(after, NEVER, 0)
    return Decoded(tokens, filled, step, torch.zeros_like(tokens, dtype=torch.float), forwards, 1)
