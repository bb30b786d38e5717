"""The block-diffusion sampler: how a student writes many tokens in a forward.

Block after block from the left. A block starts as B [MASK] tokens; each forward predicts all of
them at once, and those that the model is sure of are *committed*; at least one, so every step
makes progress. A committed token is never taken back.

    step 0   [MASK] [MASK] [MASK] [MASK]      commits L2 and y1:1
    step 1   L2     [MASK] y1:1   [MASK]      commits x4:0; unsure of the last slot
    step 2   L2     x4:0   y1:1   [MASK]      commits z2:0: three forwards for four tokens

`plain_decode` is the algorithm; `block_decode` is the same with a cache.
"""
import dataclasses
import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from data import EOS, MASK, PAD
from diffusion import predict_blocks
from model import GREEDY, KVCache, pad_left, sample

NEVER = 10 ** 6  # commit step of a slot that was never committed


@dataclass
class Decoded:
    """What a decode leaves: enough to score it and to replay it. R: whole blocks. The last one:

        filled  L4 [EOS] L1    [MASK]     L1 was committed before [EOS] was
        tokens  L4 [EOS] [PAD] [PAD]
        clean   L4 [EOS] L1    [EOS]
    """
    tokens: torch.Tensor       # (N, R) the response up to its first [EOS], then [PAD]
    filled: torch.Tensor       # (N, R) all that was committed, after [EOS] too; else [MASK]
    commit_step: torch.Tensor  # (N, R) step of its block in which a slot was committed, or NEVER
    logp: torch.Tensor         # (N, R) log-probability of each token then, 0 outside the response
    forwards: torch.Tensor     # (N,) forwards that a row took part in

    @property
    def clean(self):
        """(N, R) filled, with [EOS] where nothing was committed: no scored token sees those."""
        return torch.where(self.filled == MASK, EOS, self.filled)

    def take(self, rows):
        return Decoded(*(getattr(self, f.name)[rows] for f in dataclasses.fields(self)))


@dataclass(frozen=True)
class Threshold:
    """Commits the slots whose confidence, the highest probability, exceeds tau; or the surest."""
    tau: float

    def choose(self, logp, open_, forced):
        """logp (N, B, V); open_ (N, B) bool, slots that still show [MASK]; forced (N, B), those
        that must be committed -> slots to commit now (N, B). Never looks at drawn tokens."""
        confidence = logp.amax(-1).exp()                          # (N, B)
        confidence = torch.where(open_, confidence, -1.0)
        sure = confidence > self.tau
        # At least one slot, so that every step makes progress: a forced one, or the surest.
        best = F.one_hot(confidence.argmax(1), logp.shape[1]).bool()
        none_forced = ~forced.any(1, keepdim=True)                # (N, 1)
        return sure | forced | (best & open_ & none_forced)


def unfinished(tokens):
    """Slots of blocks (N, B) that are open: [MASK], and not after an [EOS] -> bool (N, B)."""
    ended = (tokens == EOS).cumsum(1) > 0
    return (tokens == MASK) & ~ended


def nothing_yet(model, prompt, max_len, block_size):
    """A Decoded in which all slots of max_len tokens, in whole blocks, are still open."""
    N = len(prompt)
    R = math.ceil(max_len / block_size) * block_size
    return Decoded(
        tokens=prompt.new_full((N, R), PAD),
        filled=prompt.new_full((N, R), MASK),
        commit_step=prompt.new_full((N, R), NEVER),
        logp=model.embed.weight.new_zeros(N, R),
        forwards=prompt.new_zeros(N))


def open_slots(decoded, span):
    """Open slots (N, B) of the block at span, a slice; none if the response ended before it."""
    running = (decoded.filled[:, :span.start] != EOS).all(1, keepdim=True)    # (N, 1)
    return unfinished(decoded.filled[:, span]) & running


def commit(decoded, span, step, logits, rule, sampling):
    """One step of the block at span, a slice: draws its tokens from logits (N, B, V), and commits
    those that the rule chooses."""
    open_ = open_slots(decoded, span)                            # (N, B)
    drawn, token_logp, all_logp = sample(logits, sampling)        # (N, B), (N, B), (N, B, V)
    # Slot 0 is predicted from the clean text alone, so no later step would know it better.
    forced = torch.zeros_like(open_)
    if step == 0:
        forced[:, 0] = open_[:, 0]
    chosen = rule.choose(all_logp, open_, forced)

    filled, logp = decoded.filled[:, span], decoded.logp[:, span]
    decoded.filled[:, span] = torch.where(chosen, drawn, filled)
    decoded.logp[:, span] = torch.where(chosen, token_logp, logp)
    decoded.commit_step[:, span].masked_fill_(chosen, step)
    decoded.forwards += open_.any(1)


def finished(decoded):
    """Sets tokens and logp: what was committed up to the first [EOS], then [PAD] and 0."""
    is_end = decoded.filled == EOS
    after = is_end.cumsum(1) - is_end.long() > 0
    unwritten = after | (decoded.filled == MASK)                  # (N, R)
    decoded.tokens = torch.where(unwritten, PAD, decoded.filled)
    decoded.logp = torch.where(unwritten, 0.0, decoded.logp)
    return decoded


@torch.no_grad()
def plain_decode(model, prompt, max_len, block_size, rule, sampling=GREEDY):
    """Block-diffusion decoding without a cache: every step is a training forward.

    prompt (N, P) padded on the left; max_len: tokens at most, rounded up to whole blocks;
    rule: a value with `choose`; sampling: how tokens are drawn -> Decoded."""
    B = block_size
    decoded = nothing_yet(model, prompt, max_len, B)
    for number, begin in enumerate(range(0, decoded.filled.shape[1], B)):
        span = slice(begin, begin + B)
        block = prompt.new_full((len(prompt), 1), number)         # (N, 1) one segment a row
        step = 0
        while open_slots(decoded, span).any():
            state = decoded.filled[:, None, span]                # (N, 1, B)
            # Of the clean text a block sees what is before it: that is finished.
            hidden = predict_blocks(model, prompt, decoded.clean, state, block)
            logits = model.logits(hidden[:, 0])                   # (N, B, V)
            commit(decoded, span, step, logits, rule, sampling)
            step += 1
    return finished(decoded)


# --- The same, with a cache -------------------------------------------------------------------

def block_causal_mask(pad, prompt_len, block_size, first, end):
    """Who sees whom while decoding: tokens first..end-1 ask, tokens 0..end-1 are seen.

    The prompt is causal, a token of the response sees its whole block.
    pad (N, 1): padding at the start of each row -> bool (N, 1, end - first, end)."""
    P, B = prompt_len, block_size
    key = torch.arange(end, device=pad.device)
    query = key[first:, None]                                     # (T, 1)
    block_end = P + (query - P) // B * B + B - 1
    last_seen = torch.where(query < P, query, block_end)          # (T, 1)
    before = key <= last_seen                                     # (T, S)
    real = key >= pad[..., None]                                  # (N, 1, S)
    itself = key == query  # so that padding sees something
    return (before & real | itself)[:, None]


@functools.singledispatch
@torch.no_grad()
def block_decode(model, prompt, max_len, block_size, rule, sampling=GREEDY):
    """plain_decode with a KV cache: the same tokens, steps and log-probabilities.

    A block sees finished blocks only, so their keys never change. The step that opens a block
    also reads the text before it that is not in the cache yet: the prompt, or the last block, in
    its final state. So storing a finished block costs no forward of its own, and its last token
    predicts the first of the next block. The open block is fed anew in every step."""
    N, P = prompt.shape
    B = block_size
    decoded = nothing_yet(model, prompt, max_len, B)
    R = decoded.filled.shape[1]
    cache = KVCache(model, N, P + R)
    pad = pad_left(prompt)                                        # (N, 1)
    unread = prompt                                               # (N, P), then (N, B)

    def forward(tokens):
        first = cache.length
        end = first + tokens.shape[1]
        positions = torch.arange(first, end, device=prompt.device) - pad
        mask = block_causal_mask(pad, P, B, first, end)
        return model(tokens, positions.clamp(min=0), mask, cache)  # (N, T, d)

    for begin in range(0, R, B):
        span = slice(begin, begin + B)
        step = 0
        while open_slots(decoded, span).any():
            block = decoded.filled[:, span]                      # (N, B)
            if step == 0:
                hidden = forward(torch.cat((unread, block), dim=1))
                hidden = hidden[:, -B - 1:-1]                     # the token shift
                cache.length += unread.shape[1]                   # the open block is not kept
            else:
                hidden = forward(block)
                # The shift again. Slot 0 is committed, so whatever predicts it is not used.
                hidden = torch.cat((hidden[:, :1], hidden[:, :-1]), dim=1)
            commit(decoded, span, step, model.logits(hidden), rule, sampling)
            step += 1
        unread = decoded.filled[:, span]
    return finished(decoded)
