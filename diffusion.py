"""Block diffusion: the training mask, the noise, the loss, the sampler, and the replay of what the sampler did.

A response is cut into blocks of B tokens, counted from its start; the same grid serves training, sampling and replay.
A block sees the prompt and the finished blocks before it, and itself in both directions. Inside a block, the noised
state shows [MASK] where a token is not committed yet. The token shift of the AR model is kept: the state at slot i-1
predicts token i. Hence a block's first token is predicted by the last *clean* token before the block, exactly as in AR
decoding, and at B = 1 nothing else is left: block diffusion is AR.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from model import EOS, MASK, PAD, KVCache, pad_left, sample

NEVER = 10 ** 6  # commit step of a slot that was never committed


def full_precision(logits):
    """Logits that autocast made in bfloat16 as float32, others as they are: softmax needs the digits."""
    return logits.float() if logits.dtype == torch.bfloat16 else logits


# --- Training: one forward over [prompt ; clean x_0 ; noised x_t^1 ; ... ; noised x_t^S] -------------------------------

def stream_mask(prompt_len, response_len, block_size, n_streams, device=None):
    """Who may attend to whom: bool (T, T), True = query row may see key column, T = P + (1 + S) R.

    BD3-LM (arXiv 2503.09573, sec. 3.2 and app. B.6), with several noised streams that share one prompt and one clean
    stream. blk() is the prompt position (negative: every prompt token is its own block, so the prompt is causal) or
    r // B in the response. A query sees a key iff
        M_BD : same stream and same block                            (a block sees itself in both directions)
        M_OBC: query noised, key clean, blk(query) > blk(key)        (a noised block sees finished blocks, clean)
        M_BC : both clean, blk(query) >= blk(key)                    (the clean stream is block-causal)
    The clean stream never sees a noised one, and noised streams never see each other.
    """
    P, R = prompt_len, response_len
    r = torch.arange(R, device=device)
    blk = torch.cat([torch.arange(-P, 0, device=device)] + [r // block_size] * (1 + n_streams))  # (T,)
    stream = torch.cat([torch.zeros(P + R, dtype=torch.long, device=device)] +
                       [torch.full_like(r, s) for s in range(1, n_streams + 1)])  # 0 = clean (prompt included)
    same = (stream[:, None] == stream[None]) & (blk[:, None] == blk[None])
    to_clean = (stream[:, None] > 0) & (stream[None] == 0) & (blk[:, None] > blk[None])
    clean = (stream[:, None] == 0) & (stream[None] == 0) & (blk[:, None] >= blk[None])
    return same | to_clean | clean


def stream_hidden(model, prompt, clean, noised, block_size):
    """Hidden states that predict each response token from each noised stream, in one forward.

    prompt (N, P) left-padded; clean (N, R) the response x_0; noised (N, S, R) its noised copies -> (N, max(S, 1), R, d).
    Entry (n, s, i) predicts token i: from slot i-1 of noised stream s, or, for the first token of a block, from slot
    i-1 of the clean stream (for i = 0 the prompt's last token).
    """
    N, P = prompt.shape
    S, R = noised.shape[1], clean.shape[1]
    pad = pad_left(prompt)[:, None]  # (N, 1)
    tokens = torch.cat((prompt, clean, noised.flatten(1)), dim=1)  # (N, P + (1+S) R)
    slot = torch.cat([torch.arange(P, device=prompt.device)] + [P + torch.arange(R, device=prompt.device)] * (1 + S))
    mask = stream_mask(P, R, block_size, S, prompt.device)[None]
    is_pad = F.pad(torch.arange(P, device=prompt.device)[None] < pad, (0, (1 + S) * R))  # (N, T)
    mask = mask & ~is_pad[:, None] | torch.eye(mask.shape[-1], dtype=torch.bool, device=prompt.device)
    hidden = model(tokens, (slot[None] - pad).clamp(min=0), mask[:, None])  # (N, T, d)
    i = torch.arange(R, device=prompt.device)
    source = torch.stack([torch.where(i % block_size == 0, P - 1 + i, P - 1 + i + (s + 1) * R) for s in range(max(S, 1))])
    if S == 0:
        assert block_size == 1, "without a noised stream only first tokens can be predicted: block size 1"
        source = P - 1 + i[None]
    return hidden[:, source]  # (N, S, R, d)


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


def draw_noise(shape, block_size, kind, first_step, generator, device=None):
    """Noise for a response of shape (N, R), R a multiple of B: masks (N, S, R), True = [MASK], and weights (N, S, R).

    Slots 1..B-1 of a block are masked with probability t, one t a block, stratified over the blocks of the batch
    (the k-th of n strata of (0, 1]); slot 0 is known from the clean stream and is shown clean.
        uniform        t ~ U(0, 1],   weight 1/t: the exact bound (MDLM, arXiv 2406.07524, eq. 10)
        clipped        t ~ U[.3, .8], weight 1/t: lower variance, biased (BD3-LM, sec. 5.2)
        complementary  two streams, the second masks what the first shows: every token is masked exactly once a pair,
                       weight 1 (as in Fast-dLLM v2, arXiv 2509.26328)
    A share `first_step` of the blocks shows the sampler's first step instead: all [MASK], slot 0 included. In a
    complementary pair their second stream masks nothing, so the weights stay right.
    """
    N, R = shape
    n_blocks = N * R // block_size
    rand = lambda *size: torch.rand(*size, generator=generator, device=device)
    strata = torch.randperm(n_blocks, generator=generator, device=device)
    t = 1 - (strata + rand(n_blocks)) / n_blocks  # (0, 1]
    if kind == "clipped":
        t = 0.3 + 0.5 * t
    t = t.view(N, R // block_size, 1)
    masked = rand(N, R // block_size, block_size) < t  # (N, blocks, B)
    masked[..., 0] = False
    all_masked = rand(N, R // block_size, 1) < first_step
    first = torch.arange(block_size, device=device) == 0
    if kind == "complementary":
        other = ~masked & ~first & ~all_masked
        masks = torch.stack((masked | all_masked, other), dim=1)
        return masks.flatten(2), torch.ones(N, 2, R, device=device)
    weights = torch.where(all_masked, torch.ones_like(t), 1 / t).expand(-1, -1, block_size)
    return (masked | all_masked)[:, None].flatten(2), weights[:, None].flatten(2)


def diffusion_loss(model, prompt, response, block_size, kind="uniform", first_step=0.0, generator=None, weight=None):
    """Masked-diffusion loss with the token shift, a scalar in nats per token.

    -log p(y) <= sum over blocks of  -log p(first token | clean past)
                                     + E_t [ 1/t sum over masked i of -log p(y_i | y_t^block, clean past) ]
    (BD3-LM, arXiv 2503.09573, eq. 8, whose first term is absent there: it has no shift). With kind="uniform" and
    first_step=0 the value is an unbiased estimate of the bound; at block size 1 it is the AR loss.

    prompt (N, P) left-padded; response (N, R) right-padded with [PAD] after [EOS]; weight (N, R) loss weight of each token
    (default 1), the normaliser being the sum of the weights.
    """
    weight = torch.ones(response.shape, device=response.device) if weight is None else weight
    weight = torch.where(response == PAD, 1.0, weight)  # the fill behind [EOS] weighs 1, however wide the batch came
    response, real = fill_last_block(response, block_size)
    N, R = response.shape
    w = F.pad(weight, (0, R - weight.shape[1]), value=1.0) * real
    masks, inverse_t = draw_noise((N, R), block_size, kind, first_step, generator, response.device)
    masks &= real[:, None]
    noised = torch.where(masks, MASK, response[:, None])  # (N, S, R)
    hidden = stream_hidden(model, prompt, response, noised, block_size)  # (N, S, R, d)
    # A first token is plain cross-entropy from the clean stream, counted once (in stream 0), whatever x_t shows.
    first = (torch.arange(R, device=response.device) % block_size == 0) & real  # (N, R)
    count = torch.where(first[:, None], 0.0, masks * inverse_t)  # (N, S, R)
    count[:, 0] += first.float()
    count = count * w[:, None]
    needed = count > 0
    target = response[:, None].expand_as(needed)[needed]
    logits = full_precision(model.logits(hidden[needed]))  # (M, V)
    nats = F.cross_entropy(logits, target, reduction="none")  # (M,)
    return (nats * count[needed]).sum() / w.sum()


# --- Sampling ---------------------------------------------------------------------------------------------------------

@dataclass
class Decoded:
    """What a decode leaves behind: enough to score it and to replay it."""
    tokens: torch.Tensor       # (N, R) response up to the first [EOS], then [PAD]
    filled: torch.Tensor       # (N, R) the slots as the model saw them: tokens behind [EOS] included, [MASK] where never committed
    commit_step: torch.Tensor  # (N, R) step within its block at which a token was committed, NEVER if it was not
    logp: torch.Tensor         # (N, R) log-probability of the token when it was committed, 0 outside the response
    forwards: torch.Tensor     # (N,) forwards in which the row took part; the one that reads the prompt is the first

    @property
    def clean(self):
        """(N, R) the clean stream of a forward over this decode: [EOS] where nothing was committed. Those slots lie behind
        the end, and no scored token sees them."""
        return torch.where(self.filled == MASK, EOS, self.filled)

    def take(self, rows):
        return Decoded(*(getattr(self, f)[rows] for f in self.__dataclass_fields__))


def choose(confidence, open_, forced, rule, tau):
    """Which open slots to commit now: confidence, open_, forced (N, B) -> bool (N, B).

    threshold: every slot with confidence > tau. factor: the n most confident, n the largest with
    (n+1)(1 - c_(n)) < tau (Fast-dLLM, arXiv 2505.22618, sec. 3.3). Slots in `forced` are committed whatever the rule;
    a row with none commits at least its best, so that every step makes progress. The choice depends on the distributions
    only, not on the tokens drawn from them: given the state it is no random event.
    """
    confidence = torch.where(open_, confidence, -1.0)
    if rule == "threshold":
        chosen = open_ & (confidence > tau)
    else:
        ranked, order = confidence.sort(dim=1, descending=True, stable=True)
        n = torch.arange(1, ranked.shape[1] + 1, device=ranked.device)
        ok = ((n + 1) * (1 - ranked) < tau) & (ranked >= 0)
        n_commit = (ok * n).amax(1, keepdim=True)
        chosen = torch.zeros_like(open_).scatter(1, order, n[None] <= n_commit) & open_
    best = F.one_hot(confidence.argmax(1), confidence.shape[1]).bool() & open_
    return chosen | forced | (best & ~forced.any(1, keepdim=True))


@torch.no_grad()
def block_decode(model, prompt, max_len, block_size, rule="threshold", tau=0.9, temperature=0.0, generator=None,
                 fuse=True, constrain=None):
    """Block-diffusion decoding with a KV cache: a batch of rows, each at its own pace.

    Every forward feeds one window of the sequence: the block being denoised, preceded, where a row has just finished a
    block, by that block in its final, clean state. So storing a finished block costs no forward of its own: it rides
    along with the next block's first step ("fused"), and its last token predicts the next block's first. Rows whose
    previous block is stored already merely store it again, unchanged. Keys of the block being denoised are written to
    the cache too and overwritten by the next forward.

    prompt (N, P) left-padded; max_len tokens at most (rounded up to whole blocks); rule, tau: see `choose`;
    fuse=False spends a forward of its own on the store (a reference, same tokens); constrain, optional, is a function
    (logits (n, B, V), response (n, R), slots (n, B), rows (n,)) -> logits, for a constrained decoder. Returns Decoded. A
    row's result does not depend on the other rows of its batch, up to float round-off.
    """
    B, (N, P0) = block_size, prompt.shape
    prompt = F.pad(prompt, (max(0, B - P0), 0), value=PAD)  # the window before the first block must exist
    P, R = prompt.shape[1], math.ceil(max_len / B) * B
    dev = prompt.device
    seq = F.pad(prompt, (0, R), value=MASK)  # (n, P+R), only rows still running
    step = torch.full((N, R), NEVER, device=dev)
    logp = model.embed.weight.new_zeros(N, R)
    out = Decoded(seq[:, P:].clone(), seq[:, P:].clone(), step.clone(), logp.clone(), torch.zeros(N, dtype=torch.long, device=dev))
    rows, pad = torch.arange(N, device=dev), pad_left(prompt)
    block = torch.zeros(N, dtype=torch.long, device=dev)     # index of the block being denoised
    in_block = torch.zeros_like(block)                       # steps done in it; 0 = the block before is not stored yet
    forwards = torch.zeros_like(block)
    cache = KVCache(model, N, P + R)
    slot = torch.arange(P + R, device=dev)
    visible_to = torch.where(slot < P, slot, P + (slot - P) // B * B + B - 1)  # (P+R,) last slot that a query sees
    lane = torch.arange(B, device=dev)

    def forward(start, width, n_keys):
        """Run the window [start, start + width) of every row; start (n,) -> hidden (n, width, d)."""
        at = start[:, None] + torch.arange(width, device=dev)  # (n, width)
        mask = (slot[:n_keys] <= visible_to[at][..., None]) & (slot[:n_keys] >= pad[:, None, None])
        mask |= slot[:n_keys] == at[..., None]  # padding sees itself: no empty softmax
        positions = (at - pad[:, None]).clamp(min=0)
        return model(seq.gather(1, at), positions, mask[:, None], cache, at, n_keys)

    while len(rows):
        fresh = in_block == 0
        here = P + block * B                                   # (n,) first slot of the block
        n_keys = int(here.max()) + B
        n_clean = 0 if not fresh.any() else P if forwards[0] == 0 else B  # all rows read their prompts in the first forward
        if n_clean and not fuse:
            clean = forward(here - n_clean, n_clean, n_keys)[:, -1:]
            forwards += fresh
            hidden = torch.cat((clean, forward(here, B, n_keys)[:, :-1]), dim=1)
        else:
            hidden = forward(here - n_clean, n_clean + B, n_keys)
            # Slot i is predicted at i - 1. Slot 0 comes from the clean part; without one it is committed already.
            hidden = hidden[:, n_clean - 1:-1] if n_clean else torch.cat((hidden[:, :1], hidden[:, :-1]), dim=1)
        forwards += 1
        at = here[:, None] + lane                              # (n, B)
        tokens = seq.gather(1, at)
        eos = (tokens == EOS).cumsum(1) > 0                    # at or behind the first committed [EOS]
        open_ = (tokens == MASK) & ~eos
        logits = model.logits(hidden)                          # (n, B, V)
        if constrain is not None:
            logits = constrain(logits, seq[:, P:], at - P, rows)
        drawn, lp, best = sample(logits, temperature, generator)
        chosen = choose(best.exp(), open_, fresh[:, None] & (lane == 0), rule, tau)
        tokens = torch.where(chosen, drawn, tokens)
        seq.scatter_(1, at, tokens)
        step.scatter_(1, at - P, torch.where(chosen, in_block[:, None], step.gather(1, at - P)))
        logp.scatter_(1, at - P, torch.where(chosen, lp, logp.gather(1, at - P)))
        # A block is finished when nothing is open before its first [EOS]; with an [EOS] the row is finished too.
        is_eos = tokens == EOS
        before_eos = (is_eos.cumsum(1) == 0)
        full = ~((tokens == MASK) & before_eos).any(1)
        done = full & (is_eos.any(1) | (block == R // B - 1))
        block = torch.where(full, block + 1, block)
        in_block = torch.where(full, 0, in_block + 1)
        if done.any():
            r = rows[done]
            out.filled[r], out.commit_step[r] = seq[done, P:], step[done]
            out.logp[r], out.forwards[r] = logp[done], forwards[done]
            go = (~done).nonzero()[:, 0]
            rows, seq, step, logp, pad, block, in_block, forwards = (
                x[go] for x in (rows, seq, step, logp, pad, block, in_block, forwards))
            cache.keep(go)
    behind = ((out.filled == EOS).cumsum(1) - (out.filled == EOS).long()) > 0
    out.tokens = torch.where(behind | (out.filled == MASK), PAD, out.filled)
    out.logp = torch.where(out.tokens == PAD, 0.0, out.logp)
    return out


# --- Replay: what the sampler saw, and exact log-probabilities of what it did ------------------------------------------

def decode_states(decoded, steps):
    """The noised response (N, S, R) as the sampler saw it at each step in `steps` (S,) or (N, S, R): tokens committed
    before that step are shown, everything else is [MASK] (a block's first slot included, at step 0)."""
    if steps.dim() == 1:
        steps = steps[None, :, None]
    return torch.where(decoded.commit_step[:, None] < steps, decoded.filled[:, None], MASK)


def replay_logp(model, prompt, decoded, block_size, temperature=0.0, max_streams=4):
    """Log-probabilities (N, R) of the decoded tokens, each in the state in which it was committed; 0 outside the
    response. Differentiable; equal to decoded.logp for the model that decoded.

    Blocks depend on clean earlier blocks only, so the r-th states of all blocks fit in one noised stream (TraceRL,
    arXiv 2509.06949), and several streams in one forward. Since `choose` looks at distributions and not at the drawn
    tokens, the product of these probabilities is the exact likelihood of the trajectory under the sampling policy; under
    an updated policy the choice of positions is held fixed, here as everywhere else.
    """
    step = torch.where(decoded.tokens != PAD, decoded.commit_step, -1)  # (N, R)
    clean = decoded.clean
    logp = torch.zeros_like(decoded.logp)
    for s in range(0, int(step.max()) + 1, max_streams):
        rows = (step.amax(1) >= s).nonzero()[:, 0]  # most rows are done after the first pass
        steps = torch.arange(s, min(s + max_streams, int(step.max()) + 1), device=prompt.device)
        noised = decode_states(decoded.take(rows), steps) if block_size > 1 else clean[rows, None][:, :0]
        hidden = stream_hidden(model, prompt[rows], clean[rows], noised, block_size)  # (n, S, R, d)
        here = step[rows, None] == steps[None, :, None]  # (n, S, R): committed at that step
        logits = full_precision(model.logits(hidden[here])) / (temperature or 1.0)
        token = clean[rows, None].expand_as(here)[here]
        token_logp = F.log_softmax(logits, dim=-1).gather(-1, token[:, None])[:, 0]
        found = torch.zeros(here.shape, dtype=token_logp.dtype, device=logp.device).masked_scatter(here, token_logp)
        logp = logp.index_add(0, rows, found.sum(1))
    return logp
