"""Block diffusion: the training mask, the noise, the loss, and the replay of what the sampler (sampler.py) did.

A response is cut into blocks of B tokens, counted from its start; the same grid serves training, sampling and replay.
A block sees the prompt and the finished blocks before it, and itself in both directions. Inside a block, the noised
state shows [MASK] where a token is not committed yet. The token shift of the AR model is kept: the output at slot i-1
predicts token i. Hence a block's first token is predicted by the last *clean* token before the block, exactly as in AR
decoding, and at B = 1 nothing else is left: block diffusion is AR.
"""
import math

import torch
import torch.nn.functional as F

from model import EOS, MASK, PAD, pad_left


def full_precision(logits):
    """Logits that autocast made in bfloat16 as float32, others as they are: softmax needs the digits."""
    return logits.float() if logits.dtype == torch.bfloat16 else logits


# --- Training: one forward over [prompt ; clean x_0 ; noised copies of blocks of x_0] ------------------------------------

def segment_mask(prompt_len, response_len, block_size, block):
    """Which keys of the prompt and the clean response a query may see: bool (N, T, P + R), T = P + R + M B.

    BD3-LM (arXiv 2503.09573, sec. 3.2 and app. B.6), whose noised half x_t is one copy of every block. Here it is M
    segments, each a noised copy of the block that `block` (N, M) names: the same block may be there in several states,
    and all of them share one prompt and one clean stream. blk() is the prompt position (negative: every prompt token is
    its own block, so the prompt is causal), r // B in the clean response, block[n, m] in segment m. A query sees a key iff
        M_BD : same segment (or both clean) and same block           (a block sees itself in both directions)
        M_OBC: query noised, key clean, blk(query) > blk(key)        (a noised block sees finished blocks, clean)
        M_BC : both clean, blk(query) >= blk(key)                    (the clean stream is block-causal)
    The clean stream never sees a segment, and segments never see each other; that a segment sees itself needs no mask
    (model.attend_segments).
    """
    P, R, B, N = prompt_len, response_len, block_size, len(block)
    clean = torch.cat((torch.arange(-P, 0, device=block.device), torch.arange(R, device=block.device) // B))  # (P+R,)
    noised = block.repeat_interleave(B, 1)[..., None] > clean  # (N, M B, P+R)
    return torch.cat(((clean[:, None] >= clean).expand(N, -1, -1), noised), dim=1)


def segment_hidden(model, prompt, clean, noised, block):
    """Hidden states that predict the tokens of every noised segment, in one forward.

    prompt (N, P) left-padded; clean (N, R) the response x_0, whole blocks; noised (N, M, B) copies of its blocks
    `block` (N, M), in any order and number -> (N, M, B, d). Entry (n, m, j) predicts slot j of segment m: from slot j-1 of
    the segment, or, for the first, from the last clean token before the block (for block 0 the prompt's last).
    """
    (N, P), R, (M, B) = prompt.shape, clean.shape[1], noised.shape[1:]
    dev = prompt.device
    if B == 1:  # every token is a first token: the clean stream predicts them all, and block diffusion is AR
        noised, M = noised[:, :0], 0
    else:
        clean, R = clean[:, :-B], R - B  # no block looks at the last block's clean copy
    pad = pad_left(prompt)[:, None]  # (N, 1)
    lane = torch.arange(B, device=dev)
    start = P + block * B  # (N, M) slot of each block's first token in the clean stream
    slot = torch.cat((torch.arange(P + R, device=dev).expand(N, -1), (start[:, :M, None] + lane).flatten(1)), dim=1)  # (N, T)
    mask = segment_mask(P, R, B, block[:, :M])
    mask[:, :, :P] &= (torch.arange(P, device=dev) >= pad)[:, None]
    mask.diagonal(dim1=1, dim2=2).fill_(True)  # padding sees itself: no empty softmax
    tokens = torch.cat((prompt, clean, noised.flatten(1)), dim=1)
    hidden = model(tokens, (slot - pad).clamp(min=0), mask[:, None], segment=B if M else 0, last=1 + R + M * B)  # from P-1 on
    before = 1 + R + torch.arange(M, device=dev)[:, None] * B + lane - 1  # (M, B) slot j-1 of the segment
    source = torch.where(lane == 0, block[..., None] * B, before if M else 0)  # (N, M, B)
    return hidden.gather(1, source.flatten(1)[..., None].expand(-1, -1, hidden.shape[-1])).view(*source.shape, -1)


def every_block(response, block_size):
    """The plain case of one segment a block: response (N, R) -> its block numbers (N, R / B)."""
    return torch.arange(response.shape[1] // block_size, device=response.device).expand(len(response), -1)


def take_blocks(x, block, block_size):
    """The blocks `block` (N, M) of x (N, R) -> (N, M, B)."""
    return x.view(len(x), -1, block_size).gather(1, block[..., None].expand(-1, -1, block_size))


def fill_last_block(response, block_size):
    """Extend a right-padded response (N, R) to whole blocks and fill each row's last block with [EOS].

    The sampler starts every block as B masks and cannot know where the response ends, so the slots behind the first
    [EOS] are part of the state it sees. They are trained (to [EOS]), and nothing behind the first [EOS] is ever counted.
    Returns the response (N, R') and `real` (N, R'), True up to the end of each row's last block.
    """
    R = math.ceil(response.shape[1] / block_size) * block_size
    response = F.pad(response, (0, R - response.shape[1]), value=PAD)
    blocks = ((response != PAD).sum(1) + block_size - 1) // block_size  # (N,)
    real = torch.arange(R, device=response.device)[None] < blocks[:, None] * block_size
    return torch.where(real & (response == PAD), EOS, response), real


def draw_noise(n_segments, block_size, kind, first_step, generator, device=None):
    """Noise for blocks: masks (n_segments, S, B), True = [MASK], and loss weights of masked slots, the same shape.

    Slots 1..B-1 of a block are masked with probability t, one t a block, stratified over the blocks of the batch
    (the k-th of n strata of (0, 1]); slot 0 is known from the clean stream and is shown clean.
        uniform        S = 1, t ~ U(0, 1],   weight 1/t: the exact bound (MDLM, arXiv 2406.07524, eq. 10)
        clipped        S = 1, t ~ U[.3, .8], weight 1/t: lower variance, biased (BD3-LM, sec. 5.2)
        complementary  S = 2, the second masks what the first shows: every token is masked exactly once a pair,
                       weight 1 (as in Fast-dLLM v2, arXiv 2509.26328)
    A share `first_step` of the blocks shows the sampler's first step instead: all [MASK], slot 0 included. In a
    complementary pair the second then masks nothing, so the weights stay right. The weight of slot 0, which the clean
    stream predicts, is 1 in the first of a pair and 0 in the second.
    """
    n, B = n_segments, block_size
    rand = lambda *size: torch.rand(*size, generator=generator).to(device)
    strata = torch.randperm(n, generator=generator).to(device)
    t = 1 - (strata + rand(n)) / n  # (0, 1]
    if kind == "clipped":
        t = 0.3 + 0.5 * t
    masked = rand(n, B) < t[:, None]
    masked[:, 0] = False
    all_masked = rand(n, 1) < first_step
    first = torch.arange(B, device=device) == 0
    masked |= all_masked
    if kind == "complementary":
        other = ~masked & ~first
        return torch.stack((masked, other), dim=1), torch.stack(((masked | first).float(), other.float()), dim=1)
    weight = torch.where(first, 1.0, masked / torch.where(all_masked, 1.0, t[:, None]))
    return masked[:, None], weight[:, None]


def draw_states(response, block_size, kind, first_step, generator, extra=None):
    """The states in which a training forward shows the blocks of responses (N, R): every block once, those named in `extra`
    (N, E) once more for each time, all twice where kind is "complementary" (draw_noise).

    Returns block (N, M), which block a segment shows; masked (N, M, B); share (N, M, B), the weight of a slot's loss: states of the
    same block share its weight, so that their mean takes the place of a single draw.
    """
    block = every_block(response, block_size)
    block = block if extra is None else torch.cat((block, extra), dim=1)
    (N, M), B = block.shape, block_size
    masks, share = (x.view(N, M, -1, B) for x in draw_noise(N * M, B, kind, first_step, generator, response.device))
    share = share / (block[:, :, None] == block[:, None]).sum(2)[..., None, None]  # how often the same block is there
    return block.repeat_interleave(masks.shape[2], 1), masks.flatten(1, 2), share.flatten(1, 2)


def diffusion_loss(model, prompt, response, block_size, kind="uniform", first_step=0.0, generator=None, weight=None,
                   extra=None, source=None, once=None, rows=slice(None)):
    """Masked-diffusion loss with the token shift, a scalar in nats per token.

    -log p(y) <= sum over blocks of  -log p(first token | clean past)
                                     + E_t [ 1/t sum over masked i of -log p(y_i | y_t^block, clean past) ]
    (BD3-LM, arXiv 2503.09573, eq. 8, whose first term is absent there: it has no shift). With kind="uniform" and
    first_step=0 the value is an unbiased estimate of the bound; at block size 1 it is the AR loss.

    prompt (N, P) left-padded; response (N, R) right-padded with [PAD] after [EOS]; kind, first_step: the noise, see draw_noise;
    weight (N, R): loss weight of each token (default 1), the normaliser being the sum of the weights
    extra (N, E): more states of some blocks, see draw_states
    source (N, R): the slot whose token each slot shows (a permutation; default: its own). Then y is still what the model must say,
        but what it sees differs, and masked slots must become what is left (what_is_left)
    once (N, R): in a ranking, whose tokens must differ, the weight of the penalty taken_nats where they are masked; elsewhere 0
    rows: the part of the batch whose loss is summed; draws and normaliser are those of the whole
    """
    B, R = block_size, response.shape[1]
    weight = torch.where(response == PAD, 1.0, 1.0 if weight is None else weight)  # the fill behind [EOS] weighs 1
    response, real = fill_last_block(response, B)
    wide = lambda x, value: F.pad(x, (0, response.shape[1] - R), value=value)
    weight = wide(weight, 1.0) * real
    once = torch.zeros_like(weight) if once is None else wide(once, 0.0)
    slot = torch.arange(response.shape[1], device=response.device).expand(len(response), -1)
    source = slot if source is None else torch.where(slot < R, wide(source, 0), slot)
    shown = response.gather(1, source)

    block, masked, share = draw_states(shown, B, kind, first_step, generator, extra)
    of_block = lambda x: take_blocks(x, block, B)  # (N, R) -> (N, M, B)
    share = share * of_block(weight)
    masked = masked & of_block(real)
    noised = torch.where(masked, MASK, of_block(shown))
    target = response.gather(1, what_is_left(source, block, masked).flatten(1)).view(noised.shape)
    penalty = of_block(once) * masked

    prompt, shown, block, noised, masked, share, target, penalty, once = (
        x[rows] for x in (prompt, shown, block, noised, masked, share, target, penalty, once))
    share, penalty = share.flatten(), penalty.flatten()
    needed = share.nonzero()[:, 0]  # found before the forward: looking for them waits for the GPU
    hidden = segment_hidden(model, prompt, shown, noised, block)  # (n, M, B, d)
    logits = full_precision(model.logits(hidden.flatten(0, 2)[needed]))  # (needed, V)
    nats = F.cross_entropy(logits, target.flatten()[needed], reduction="none")
    at = penalty[needed].nonzero()[:, 0]
    if len(at):
        taken = tokens_shown(shown, once > 0, block, masked, logits.shape[1]).flatten(0, 1)[needed[at] // B]  # (at, V)
        nats = nats.index_add(0, at, penalty[needed[at]] * taken_nats(logits[at], taken))
    return (nats * share[needed]).sum() / weight.sum()


def taken_nats(logits, taken):
    """-log(1 - P(tokens that are taken)): logits (n, V), taken (n, V) bool -> (n,).

    Unlikelihood training (arXiv 1908.04319, sec. 5) with the probability of the whole set. Cross-entropy asks the same whether the
    rest of the mass is on a worse label or on one that the answer shows already; only the second makes the answer invalid.
    """
    return -torch.log1p(-(logits.softmax(-1) * taken).sum(-1).clamp(max=1 - 1e-6))


def still_open(block, masked, R):
    """The slots of a response that segments do not show, masked or behind their block: block (N, M), masked (N, M, B)
    -> bool (N, M, R)."""
    start, slot = block[..., None] * masked.shape[-1], torch.arange(R, device=block.device)
    return (slot >= start).scatter(2, start + slot[:masked.shape[-1]], masked)


def tokens_shown(response, where, block, masked, n_words):
    """The words that segments and the clean text before them show in the slots `where`: response, where (N, R), block (N, M),
    masked (N, M, B) -> bool (N, M, n_words)."""
    words = torch.where(where[:, None] & ~still_open(block, masked, response.shape[1]), response[:, None], PAD)  # (N, M, R)
    shown = torch.zeros(*block.shape, n_words, dtype=torch.bool, device=block.device).scatter(2, words, True)
    shown[..., PAD] = False
    return shown


def what_is_left(source, block, masked):
    """What the masked slots of segments must become: the tokens that the segment and the clean text before it do not show, in the
    order of the response. source (N, R), block (N, M), masked (N, M, B) -> slots of the response (N, M, B); slot 0 is
    predicted from the clean text alone, whether it is masked or not. If source is the identity, so is this.
    """
    B, R = masked.shape[-1], source.shape[1]
    left = torch.where(still_open(block, masked, R), source[:, None], R).sort(-1).values
    left = left.gather(2, (masked.cumsum(-1) - 1).clamp(min=0)).clamp(max=R - 1)  # R: nothing is left, and no slot asks
    behind = torch.arange(R, device=source.device) >= block[..., None] * B  # (N, M, R) in the block or behind it
    first = torch.where(behind, source[:, None], R).amin(-1, keepdim=True)
    return torch.cat((first, left[..., 1:]), dim=-1)


# --- Replay: what the sampler saw, and exact log-probabilities of what it did ------------------------------------------

def decode_states(decoded, block, steps, block_size):
    """Blocks as the sampler saw them: block, steps (N, M) -> noised (N, M, B) and which slots are still masked there.

    Tokens committed before step steps[n, m] of block[n, m] are shown, everything else is [MASK] (the block's first slot
    included, at step 0).
    """
    open_ = take_blocks(decoded.commit_step, block, block_size) >= steps[..., None]
    return torch.where(open_, MASK, take_blocks(decoded.filled, block, block_size)), open_


def replay_logp(model, prompt, decoded, block_size, temperature=0.0, max_segments=16):
    """Log-probabilities (N, R) of the decoded tokens, each in the state in which it was committed; 0 outside the
    response. Differentiable; equal to decoded.logp for the model that decoded.

    Blocks depend on clean earlier blocks only, so all states of all blocks are segments of one forward (TraceRL, arXiv
    2509.06949). The first `max_segments` of every row go together, then those of the rows that took more steps. Since
    `choose` looks at distributions and not at the drawn tokens, the product of these probabilities is the exact likelihood
    of the trajectory under the sampling policy; under an updated policy the choice of positions is held fixed, here as
    everywhere else.
    """
    N, R, B = *decoded.tokens.shape, block_size
    step = torch.where(decoded.tokens != PAD, decoded.commit_step, -1).view(N, R // B, B)
    n_steps = step.amax(-1) + 1  # (N, blocks)
    ends = n_steps.cumsum(1)
    number = torch.arange(int(ends[:, -1].max()), device=prompt.device).expand(N, -1).contiguous()  # segments of a row
    block = torch.searchsorted(ends, number, right=True)  # (N, M): the block whose step a segment shows
    used = block < R // B
    block = block.clamp(max=R // B - 1)
    at = number - (ends - n_steps).gather(1, block)  # (N, M) step within the block
    logp = torch.zeros_like(decoded.logp).view(N, R // B, B)
    max_segments = R if B == 1 else max_segments  # at B = 1 segments cost nothing
    for m in range(0, number.shape[1], max_segments):
        rows = used[:, m].nonzero()[:, 0]
        b, s = (x[rows, m:m + max_segments] for x in (block, at))  # (n, M')
        part = decoded.take(rows)
        noised, _ = decode_states(part, b, s, B)
        hidden = segment_hidden(model, prompt[rows], part.clean, noised, b)  # (n, M', B, d)
        here = (take_blocks(step[rows], b, B) == s[..., None]) & used[rows, m:m + max_segments, None]  # committed at that step
        logits = full_precision(model.logits(hidden[here])) / (temperature or 1.0)
        token = take_blocks(part.clean, b, B)[here]
        token_logp = F.log_softmax(logits, dim=-1).gather(-1, token[:, None])[:, 0]
        n, i, j = here.nonzero(as_tuple=True)
        logp = logp.index_put((rows[n], b[n, i], j), token_logp.to(logp.dtype))
    return logp.view(N, R)
