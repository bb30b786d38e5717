"""The block-diffusion sampler: how a student writes many tokens in a forward pass.

It writes block after block from the left. A block starts as B [MASK] tokens; each forward predicts
all of them at once, and the tokens that the model is sure of are *committed*; at least one, so
every step makes progress. A committed token is never taken back.

    step 0   [MASK] [MASK] [MASK] [MASK]      commits L2 and y1:1
    step 1   L2     [MASK] y1:1   [MASK]      commits x4:0; unsure of the last slot
    step 2   L2     x4:0   y1:1   [MASK]      commits z2:0: three forwards for four tokens
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from data import EOS, MASK, PAD, after_first
from model import GREEDY, KVCache, pad_left, sample

NEVER = 10 ** 6  # commit step of a slot that was never committed


@dataclass
class Decoded:
    """All that is needed to score a decode and to replay it. R is a multiple of the block size B.
    Example of a last block:

        filled  L4 [EOS] L1    [MASK]     L1 was committed before [EOS] was
        tokens  L4 [EOS] [PAD] [PAD]
        clean   L4 [EOS] L1    [EOS]
    """
    tokens: torch.Tensor       # (N, R) the response up to its first [EOS], then [PAD]
    filled: torch.Tensor       # (N, R) all that was committed, after [EOS] too; else [MASK]
    commit_step: torch.Tensor  # (N, R) step of its block in which a slot was committed, or NEVER
    logp: torch.Tensor         # (N, R) log-probability of each token then, 0 outside the response
    forwards: torch.Tensor     # (N,) forwards that a row took part in
    block_size: int            # B

    @property
    def clean(self):
        """(N, R) filled, with [EOS] in slots that were never committed: the clean text of a replay.
        No prediction of a written token sees those: they are in the row's last block or after it,
        and a block is predicted from the clean text before it and from its own state."""
        return torch.where(self.filled == MASK, EOS, self.filled)

    def take(self, rows):
        return Decoded(self.tokens[rows], self.filled[rows], self.commit_step[rows],
                       self.logp[rows], self.forwards[rows], self.block_size)


def nothing_yet(model, prompt, max_len, block_size):
    """A Decoded in which all slots of max_len tokens, in whole blocks, are still open."""
    N = len(prompt)
    R = math.ceil(max_len / block_size) * block_size
    return Decoded(
        tokens=prompt.new_full((N, R), PAD),
        filled=prompt.new_full((N, R), MASK),
        commit_step=prompt.new_full((N, R), NEVER),
        logp=model.embed.weight.new_zeros(N, R),
        forwards=prompt.new_zeros(N),
        block_size=block_size)


@dataclass(frozen=True)
class Threshold:
    """The paper's commit rule. Commits every slot whose confidence, its highest probability,
    exceeds tau, and every forced slot; if there is neither, the surest slot."""
    tau: float

    def choose(self, logp, open_, forced):
        """logp (N, B, V); open_ (N, B) bool, as from open_slots; forced (N, B), those that must be
        committed: slot 0 in step 0 of a block, none later (see commit) -> slots to commit now
        (N, B). Never looks at drawn tokens."""
        confidence = logp.amax(-1).exp()                          # (N, B)
        confidence = torch.where(open_, confidence, -1.0)
        sure = confidence > self.tau
        # At least one slot, so that every step makes progress: a forced one, or the surest.
        best = F.one_hot(confidence.argmax(1), logp.shape[1]).bool()
        none_forced = ~forced.any(1, keepdim=True)                # (N, 1)
        return sure | forced | (best & none_forced)


def open_slots(tokens):
    """Which slots of blocks, tokens (N, B), are open: [MASK] and not after an [EOS]. bool (N, B)"""
    return (tokens == MASK) & ~after_first(tokens, EOS)


def decode_mask(pad, length, n_clean, n_block):
    """Who sees whom in a step of the decoder, which reads n_clean tokens of clean text and a
    block of n_block after the `length` tokens of its cache.

    The text is causal, and the block sees everything before it and itself: as the clean rows and
    the segment rows of diffusion.block_mask.
    pad (N, 1): padding at the start of each row -> bool (N, 1, n_clean + n_block, S)."""
    S = length + n_clean + n_block
    key = torch.arange(S, device=pad.device)                      # (S,)
    query = key[length:, None]                                    # (T, 1)
    in_block = query >= length + n_clean
    real = key >= pad[..., None]                                  # (N, 1, S)
    sees = ((key <= query) | in_block) & real                     # (N, T, S)
    return (sees | (key == query))[:, None]  # padding sees itself: no empty softmax


def read_step(model, cache, pad, unread, open_block):
    """One forward pass of the decoder, over unread text (n, U) and an open block (n, B), after the
    text in the cache. pad (n, 1): padding before each prompt -> hidden states (n, B, d) that
    predict the slots of the block."""
    U, B = unread.shape[1], open_block.shape[1]
    tokens = torch.cat((unread, open_block), dim=1)               # (n, U + B)
    column = torch.arange(cache.length, cache.length + U + B, device=pad.device)
    positions = (column - pad).clamp(min=0)                       # from the first real token
    # A block sees everything before it. So only unread text and padding need a mask.
    mask = decode_mask(pad, cache.length, U, B) if U > 0 or pad.any() else None
    hidden = model(tokens, positions, mask, cache)                # (n, U + B, d)

    # The token shift: slot j is predicted by slot j - 1, and slot 0 by the last unread token.
    if U > 0:
        return hidden[:, U - 1:-1]
    # Without unread text slot 0 is committed already, so whatever predicts it is not used.
    return torch.cat((hidden[:, :1], hidden[:, :-1]), dim=1)


@torch.no_grad()
def block_decode(model, prompt, max_len, block_size, rule, sampling=GREEDY, cache=None):
    """Writes responses block by block: prompt (N, P), padded on the left -> Decoded.

    max_len: tokens at most, rounded up to whole blocks; a block is never wider than that.
    rule: an object with a method choose, such as Threshold.
    cache: an empty KVCache, if the caller needs the keys of the prompts afterwards.

    A block sees clean text and itself. The keys of that text stay in a cache. The step that opens
    a block also reads what the cache lacks: the prompt, or the block before. So storing a finished
    block costs no forward of its own. The open block is fed anew in every step."""
    N, P = prompt.shape
    B = min(block_size, max_len)
    decoded = nothing_yet(model, prompt, max_len, B)
    R = decoded.filled.shape[1]
    cache = cache or KVCache(model, N, P + R)
    pad = pad_left(prompt)                                        # (N, 1)
    running = torch.arange(N, device=prompt.device)               # rows that have not ended, (r,)
    unread = prompt                                               # (r, P), then (r, B)

    for begin in range(0, R, B):
        span = slice(begin, begin + B)
        rows, open_cache = running, cache                         # rows whose block is open, (n,)
        step = 0
        while len(rows):
            open_block = decoded.filled[rows, span]               # (n, B)
            text = unread if step == 0 else open_block[:, :0]
            hidden = read_step(model, open_cache, pad[rows], text, open_block)  # (n, B, d)
            # The text stays in the cache, the open block does not. In step 0 open_cache is
            # still cache itself, so this moves its length; afterwards text is empty.
            open_cache.length += text.shape[1]
            commit(decoded, rows, span, step, model.logits(hidden), rule, sampling)
            step += 1
            # Rows whose block is full wait for the others, outside the batch.
            is_open = open_slots(decoded.filled[rows, span]).any(1)   # (n,)
            rows, open_cache = rows[is_open], open_cache.take(is_open)

        ended = (decoded.filled[running, span] == EOS).any(1)     # (r,)
        if ended.all():
            break
        running, cache = running[~ended], cache.take(~ended)
        unread = decoded.filled[running, span]                    # (r, B)
    return cut_after_end(decoded)


def commit(decoded, rows, span, step, logits, rule, sampling):
    """One step of the block at span, a slice, of some rows (n,): draws its tokens from logits
    (n, B, V), and commits those that the rule chooses."""
    filled = decoded.filled[rows, span]                           # (n, B)
    open_ = open_slots(filled)
    drawn, token_logp, all_logp = sample(logits, sampling)        # (n, B), (n, B), (n, B, V)
    # Slot 0 is predicted from the clean text alone, so no later step would know it better.
    forced = torch.zeros_like(open_)
    forced[:, 0] = open_[:, 0]
    chosen = rule.choose(all_logp, open_, forced)                 # (n, B)

    decoded.filled[rows, span] = torch.where(chosen, drawn, filled)
    decoded.logp[rows, span] = torch.where(chosen, token_logp, decoded.logp[rows, span])
    decoded.commit_step[rows, span] = decoded.commit_step[rows, span].masked_fill(chosen, step)
    decoded.forwards[rows] += 1


def cut_after_end(decoded):
    """Sets tokens and logp: what was committed up to the first [EOS], then [PAD] and 0."""
    unwritten = after_first(decoded.filled, EOS) | (decoded.filled == MASK)  # (N, R)
    decoded.tokens = torch.where(unwritten, PAD, decoded.filled)
    decoded.logp = torch.where(unwritten, 0.0, decoded.logp)
    return decoded
