"""Block diffusion: who sees whom in training, the noise, and the replay of a decode.

A response is cut into blocks of B tokens, counted from its start. A block sees the prompt, the
finished blocks before it, and itself in both directions; where a token is not known yet it shows
[MASK]. A *state* of a block is the block with some of its tokens masked. In training, one forward
reads the prompt, the clean response, and *segments*, each of which holds one state of a block; a
block may have several.

The token shift of the AR model stays: the output at a token predicts the next one. So the first
token of a block is predicted by the last *clean* token before it, as in AR decoding. In the
example of data.py, with B = 4:

    the third block                L2      x4:0     y1:1     z2:0
    a segment, 1 and 3 masked      L2     [MASK]    y1:1    [MASK]
    predicted by the output at    z4:0     L2      [MASK]    y1:1
                                  clean    of the segment itself

At B = 1 nothing but first tokens is left: block diffusion is AR.
"""
import functools
import math

import torch
import torch.nn.functional as F

from data import EOS, MASK, PAD
from model import pad_left


# --- One forward over [prompt ; clean response ; segments] ------------------------------------

def block_mask(prompt_len, response_len, block_size, block):
    """Who sees whom: bool (N, T, T), True = may see, T = P + R + M B.

    Segment m of row n is a copy of block[n, m], block (N, M). A row of two blocks, a copy of each:

        may see      prompt  block 0  block 1  copy of 0  copy of 1
        prompt       causal
        block 0        x        x
        block 1        x        x        x
        copy of 0      x                           x
        copy of 1      x        x                             x

    These are the three masks of BD3-LM (arXiv 2503.09573, sec. 3.2 and app. B.6)."""
    P, R, B = prompt_len, response_len, block_size
    N, M = block.shape
    device = block.device

    # The block of every column. A prompt token is a block of its own: -P, ..., -1.
    prompt = torch.arange(-P, 0, device=device)                   # (P,)
    clean = torch.arange(R, device=device) // B                   # (R,)
    shared = torch.cat((prompt, clean)).expand(N, -1)             # (N, P + R)
    copies = block.repeat_interleave(B, dim=1)                    # (N, M B)
    number = torch.cat((shared, copies), dim=1)                   # (N, T)
    # The segment of every column: -1 for prompt and clean response, then 0 to M - 1.
    segment = torch.arange(M, device=device).repeat_interleave(B)
    none = segment.new_full((P + R,), -1)
    segment = torch.cat((none, segment))                          # (T,)

    query = number[:, :, None]                                    # (N, T, 1)
    key = number[:, None]                                         # (N, 1, T)
    noised = segment[:, None] >= 0                                # (T, 1) the query is in a segment
    clean = segment < 0                                           # (T,) the key is in none
    # A block sees itself, in both directions.
    block_diagonal = (query == key) & (segment[:, None] == segment)
    # A noised block sees the finished blocks before it, clean.
    offset_block_causal = (query > key) & noised & clean
    # The clean text sees the clean text up to the end of its block.
    block_causal = (query >= key) & ~noised & clean
    return block_diagonal | offset_block_causal | block_causal


@functools.singledispatch
def predict_blocks(model, prompt, clean, noised, block):
    """Hidden states that predict the tokens of every segment, in one forward.

    prompt (N, P) padded on the left; clean (N, R) the response, whole blocks; noised (N, M, B)
    the segments, of the blocks numbered block (N, M) -> (N, M, B, d)."""
    N, P = prompt.shape
    R = clean.shape[1]
    M, B = noised.shape[1:]
    device = prompt.device

    # Lay out one row: prompt, clean response, segments. A segment stands where its block does.
    tokens = torch.cat((prompt, clean, noised.flatten(1)), dim=1)  # (N, T)
    slot = torch.arange(B, device=device)                         # place within a block
    start = P + block[..., None] * B                              # (N, M, 1)
    shared = torch.arange(P + R, device=device).expand(N, -1)     # (N, P + R)
    copies = (start + slot).flatten(1)                            # (N, M B)
    column = torch.cat((shared, copies), dim=1)                   # (N, T)
    pad = pad_left(prompt)                                        # (N, 1)
    positions = (column - pad).clamp(min=0)                       # from the first real token

    mask = block_mask(P, R, B, block)                             # (N, T, T)
    real = shared[:, None, :P] >= pad[..., None]                  # (N, 1, P)
    mask[:, :, :P] &= real                                        # nobody sees padding ...
    mask.diagonal(dim1=1, dim2=2).fill_(True)                     # ... but itself
    hidden = model(tokens, positions, mask[:, None])              # (N, T, d)

    # The token shift. Slot 0 is predicted by the clean token before its block, slot j by slot
    # j - 1 of the segment.
    segment = torch.arange(M, device=device)[:, None]             # (M, 1)
    before = P + R + segment * B + slot - 1                       # (M, B)
    asked = torch.where(slot == 0, start - 1, before)             # (N, M, B) columns
    row = torch.arange(N, device=device)[:, None, None]
    return hidden[row, asked]


# --- Blocks -----------------------------------------------------------------------------------

def every_block(response, block_size):
    """One segment a block: response (N, R) -> block numbers (N, R / B)."""
    n_blocks = response.shape[1] // block_size
    number = torch.arange(n_blocks, device=response.device)
    return number.expand(len(response), -1)


def take_blocks(x, block, block_size):
    """Cuts x (N, R, ...) into blocks and takes those numbered block (N, M): (N, M, B, ...)."""
    of_row = x.view(len(x), -1, block_size, *x.shape[2:])         # (N, R / B, B, ...)
    row = torch.arange(len(x), device=x.device)[:, None]
    return of_row[row, block]


def fill_last_block(response, block_size):
    """Extends responses (N, R), padded on the right, to whole blocks: (N, R').

    The sampler starts every block as B masks and cannot know where the response ends. So the
    slots after [EOS] are part of what it sees: they are filled with [EOS], and trained. Returns
    also which slots belong to a row's blocks, bool (N, R'); the others stay [PAD]."""
    B = block_size
    R = math.ceil(response.shape[1] / B) * B
    response = F.pad(response, (0, R - response.shape[1]), value=PAD)
    length = (response != PAD).sum(1, keepdim=True)               # (N, 1)
    end = (length + B - 1) // B * B                               # of the last block
    in_block = torch.arange(R, device=response.device) < end      # (N, R')
    filled = torch.where(in_block & (response == PAD), EOS, response)
    return filled, in_block


def draw_noise(block, block_size, rng):
    """Masks for segments of the blocks numbered block (N, M): masked (N, M, B) bool, and the loss
    weight of each slot, (N, M, B).

    A slot is masked with probability t, one t ~ U(0, 1] a segment, and then weighs 1 / t, which
    makes up for how rarely it is masked (MDLM, arXiv 2406.07524, eq. 10). Slot 0 is predicted
    from the clean text: it is shown, and always weighs 1."""
    N, M = block.shape
    n, B = N * M, block_size
    # Stratified: one t in each of n equal parts of (0, 1]. The same distribution, less variance.
    part = torch.randperm(n, generator=rng)
    t = 1 - (part + torch.rand(n, generator=rng)) / n             # (n,) rand is < 1, so t > 0 ...
    t = t.clamp(min=1e-7)                                         # ... but for rounding
    masked = torch.rand(n, B, generator=rng) < t[:, None]         # (n, B)
    masked[:, 0] = False
    weight = masked / t[:, None]
    weight[:, 0] = 1.0
    masked = masked.view(N, M, B).to(block.device)
    return masked, weight.view(N, M, B).to(block.device)


# --- Replay, to be read after sampler.py: exact log-probabilities of what it wrote ------------

def decode_states(decoded, block, step, block_size):
    """Blocks as the sampler saw them in a step: block, step (N, M) -> noised (N, M, B) and which
    slots were still masked, bool (N, M, B). What was committed in an earlier step is shown."""
    committed = take_blocks(decoded.commit_step, block, block_size)   # (N, M, B)
    filled = take_blocks(decoded.filled, block, block_size)
    open_ = committed >= step[..., None]
    return torch.where(open_, MASK, filled), open_


@functools.singledispatch
def replay_logp(model, prompt, decoded, block_size, temperature=0.0):
    """Log-probabilities (N, R) of the decoded tokens, each in the state in which it was
    committed; 0 outside the response. Differentiable. Equals decoded.logp for the model that
    decoded.

    A block depends on the clean blocks before it only, so all states of all blocks are segments
    of one forward (TraceRL, arXiv 2509.06949). Choosing the slots adds no factor: it follows from
    the distributions, not from the drawn tokens. So the product of these probabilities is the
    likelihood of what was drawn, with one exception. Tokens committed after an early [EOS], in
    its block, are left out: later steps saw them, but they are no part of the response."""
    B = block_size
    N, R = decoded.tokens.shape
    n_blocks = R // B
    step = torch.where(decoded.tokens != PAD, decoded.commit_step, -1)   # (N, R)
    n_steps = int(step.max()) + 1                                 # of the slowest block

    # One segment for each block and step; blocks that took fewer steps leave some unused.
    block = every_block(decoded.tokens, B).repeat_interleave(n_steps, 1)  # (N, M)
    shown_step = torch.arange(n_steps, device=prompt.device).repeat(n_blocks)  # (M,)
    shown_step = shown_step.expand(N, -1)
    noised, _ = decode_states(decoded, block, shown_step, B)      # (N, M, B)
    hidden = predict_blocks(model, prompt, decoded.clean, noised, block)  # (N, M, B, d)

    # Every token is scored in one of them, in the step that committed it.
    scored = take_blocks(step, block, B) == shown_step[..., None]  # (N, M, B)
    logits = model.logits(hidden[scored]) / (temperature or 1.0)  # (n, V)
    token = take_blocks(decoded.clean, block, B)[scored]          # (n,)
    all_logp = F.log_softmax(logits, dim=-1)
    logp = all_logp.gather(-1, token[:, None])[:, 0]              # (n,)
    row, segment, slot = scored.nonzero(as_tuple=True)
    position = block[row, segment] * B + slot                     # in the response
    out = torch.zeros_like(decoded.logp)
    return out.index_put((row, position), logp.to(out.dtype))
