"""Block diffusion: who sees whom in training, the noise, and the replay of a decode.

A response is cut into blocks of B tokens, counted from its start. A *state* of a block is the
block with some of its tokens shown as [MASK]. A model sees a state in both directions, and before
it the prompt and the finished (*clean*) text. In training, one forward pass reads the prompt, the
clean response and *segments*; each segment is a state of one block, and a block may have several.

The token shift of the AR model stays: the output at a token predicts the next one. So the first
token of a block is predicted by the last clean token before it, as in AR decoding. In the
example of data.py, with B = 4:

    the third block                L2      x4:0     y1:1     z2:0
    a segment, 1 and 3 masked      L2     [MASK]    y1:1    [MASK]
    predicted by the output at    z4:0     L2      [MASK]    y1:1
                                  clean    of the segment itself

At B = 1 nothing but first tokens is left: block diffusion is AR.
"""
import math

import torch
import torch.nn.functional as F

from data import EOS, MASK, PAD
from model import pad_left


# --- One forward over [prompt ; clean response ; segments] ------------------------------------

def block_mask(prompt_len, response_len, block_size, block):
    """Who sees whom: bool (N, T, T), True = may see, T = P + R + M B.

    Segment m of row n is a state of block[n, m], block (N, M). A row of two blocks, a state each:

        may see      prompt  block 0  block 1  state of 0  state of 1
        prompt       causal
        block 0        x      causal
        block 1        x        x      causal
        state of 0     x                           x
        state of 1     x        x                              x

    The clean text is read from the left, so its outputs are those of the AR model and its keys
    serve both decoders. (BD3-LM, arXiv 2503.09573, sec. 3.2, lets a clean block see itself in both
    directions. Everything else in this table is as there.)"""
    P, R, B = prompt_len, response_len, block_size
    N, M = block.shape
    device = block.device

    # Prompt and clean response: every token sees what is before it.
    column = torch.arange(P + R, device=device)                   # (P + R,)
    causal = column <= column[:, None]                            # (P + R, P + R)

    # A segment sees the clean text before its block ...
    start = P + block.repeat_interleave(B, dim=1) * B             # (N, M B) first column of it
    past = column < start[..., None]                              # (N, M B, P + R)
    # ... and itself, in both directions.
    segment = torch.arange(M, device=device).repeat_interleave(B)
    itself = segment[:, None] == segment                          # (M B, M B)

    unseen = causal.new_zeros(P + R, M * B)  # the clean text sees no segment
    clean_rows = torch.cat((causal, unseen), dim=1).expand(N, -1, -1)   # (N, P + R, T)
    segment_rows = torch.cat((past, itself.expand(N, -1, -1)), dim=2)   # (N, M B, T)
    return torch.cat((clean_rows, segment_rows), dim=1)


def read_blocks(model, prompt, clean, noised, block):
    """Both kinds of predictions in one forward: hidden states (N, R, d) that predict the clean
    tokens from the left, as in AR, and hidden states (N, M, B, d) that predict the tokens of
    every segment.

    prompt (N, P) padded on the left; clean (N, R) the response, whole blocks; noised (N, M, B)
    the tokens of the segments, states of the blocks numbered block (N, M)."""
    N, P = prompt.shape
    R = clean.shape[1]
    M, B = noised.shape[1:]
    device = prompt.device

    # Lay out one row: prompt, clean response, segments. A segment has the positions of its block.
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

    # The token shift. A clean token is predicted by the one before it. So is slot 0 of a block;
    # slot j is predicted by slot j - 1 of the segment.
    from_left = hidden[:, P - 1:P + R - 1]                        # (N, R, d)
    first = take_blocks(from_left, block, B)[:, :, :1]            # (N, M, 1, d)
    segments = hidden[:, P + R:].view(N, M, B, -1)                # (N, M, B, d)
    shifted = torch.cat((first, segments[:, :, :-1]), dim=2)      # (N, M, B, d)
    return from_left, shifted


# --- Blocks -----------------------------------------------------------------------------------

def every_block(response, block_size):
    """One segment a block: response (N, R) -> block numbers (N, R / B)."""
    n_blocks = response.shape[1] // block_size
    number = torch.arange(n_blocks, device=response.device)
    return number.expand(len(response), -1)


def take_blocks(x, block, block_size):
    """Cuts x (N, R, ...) into blocks and takes those numbered block (N, M): (N, M, B, ...)."""
    of_row = x.unflatten(1, (-1, block_size))                     # (N, R / B, B, ...)
    row = torch.arange(len(x), device=x.device)[:, None]
    return of_row[row, block]


def fill_last_block(response, block_size):
    """Extends responses (N, R), padded on the right, to whole blocks -> (N, R'), and which slots
    were filled, bool (N, R').

    The sampler starts every block as B masks and cannot know where the response ends. So in the
    last block the model meets slots after the end. In training they are filled with [EOS], and
    the model learns to write that. Blocks after the last stay [PAD]."""
    B = block_size
    R = math.ceil(response.shape[1] / B) * B
    response = F.pad(response, (0, R - response.shape[1]), value=PAD)
    length = (response != PAD).sum(1, keepdim=True)               # (N, 1)
    end = (length + B - 1) // B * B                               # of the last block
    in_block = torch.arange(R, device=response.device) < end      # (N, R')
    is_fill = in_block & (response == PAD)
    return response.masked_fill(is_fill, EOS), is_fill


def draw_noise(block, block_size, first_steps, rng):
    """Masks for segments of the blocks numbered block (N, M): masked (N, M, B) bool, and the loss
    weight of each slot, (N, M, B).

    For each segment t is drawn from U(0, 1]. A slot is masked with probability t; a masked slot
    has weight 1 / t, which makes up for how rarely it is masked (MDLM, arXiv 2406.07524, eq. 10).
    Slot 0 is predicted from the clean text, so it always has weight 1. It is shown, except in the
    first steps.

    Ours: a share `first_steps` of the segments has t = 1 and shows [MASK] in slot 0 too, as every
    block does when its decoding begins. The paper has 0."""
    N, M = block.shape
    n, B = N * M, block_size
    # Stratified: each of n equal parts of (0, 1] gets one t, in random order. The distribution of a
    # single t is the same, and the mean over a batch varies less.
    part = torch.randperm(n, generator=rng)
    t = 1 - (part + torch.rand(n, generator=rng)) / n             # (n,) rand is < 1, so t > 0 ...
    t = t.clamp(min=1e-7)                                         # ... but for rounding
    is_first = torch.rand(n, generator=rng) < first_steps         # ours
    t = torch.where(is_first, 1.0, t)                             # ours
    masked = torch.rand(n, B, generator=rng) < t[:, None]         # (n, B)
    masked[:, 0] = is_first  # a first step shows [MASK] in slot 0 too
    weight = masked / t[:, None]
    weight[:, 0] = 1.0
    masked = masked.view(N, M, B).to(block.device)
    return masked, weight.view(N, M, B).to(block.device)


# --- Replay, to be read after sampler.py: exact log-probabilities of what it wrote ------------

def decode_states(decoded, block, step):
    """Blocks as the sampler saw them in a step: block, step (N, M) -> noised (N, M, B) and which
    slots were still masked, bool (N, M, B). What was committed in an earlier step is shown."""
    B = decoded.block_size
    committed = take_blocks(decoded.commit_step, block, B)        # (N, M, B)
    filled = take_blocks(decoded.filled, block, B)
    masked = committed >= step[..., None]
    return torch.where(masked, MASK, filled), masked


def replay_logp(model, prompt, decoded, temperature=0.0):
    """Log-probabilities (N, R) of the decoded tokens, each in the state in which it was
    committed; 0 outside the response. Differentiable. For the model that decoded, they are
    decoded.logp, but for rounding.

    A block depends on the clean text before it only, so all states of all blocks are segments of
    one forward (TraceRL, arXiv 2509.06949). Which slots are committed follows from the state; only
    the tokens are random. So the likelihood of a decode is the product of their probabilities.
    There is one exception: tokens to the right of an early [EOS] in its block influenced later
    steps, but are not counted."""
    B = decoded.block_size
    N, R = decoded.tokens.shape
    n_blocks = R // B
    step = torch.where(decoded.tokens != PAD, decoded.commit_step, -1)   # (N, R)
    n_steps = int(step.max()) + 1                                 # of the slowest block

    # One segment for each block and step; blocks that took fewer steps leave some unused. Two
    # blocks and three steps: block 0 0 0 1 1 1, shown_step 0 1 2 0 1 2.
    block = every_block(decoded.tokens, B).repeat_interleave(n_steps, 1)  # (N, M)
    shown_step = torch.arange(n_steps, device=prompt.device).repeat(n_blocks)  # (M,)
    shown_step = shown_step.expand(N, -1)
    noised, _ = decode_states(decoded, block, shown_step)         # (N, M, B)
    _, hidden = read_blocks(model, prompt, decoded.clean, noised, block)  # (N, M, B, d)

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
