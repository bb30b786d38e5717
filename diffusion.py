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

from model import EOS, MASK, PAD, KVCache, pad_left, recorded, sample

NEVER = 10 ** 6  # commit step of a slot that was never committed
SPLIT = 16  # rows from which those that have finished a block wait for the others


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
    shown = masked | all_masked
    if kind == "complementary":
        other = ~masked & ~first & ~all_masked
        return torch.stack((shown, other), dim=1), torch.stack(((shown | first).float(), other.float()), dim=1)
    weight = torch.where(first, 1.0, shown / torch.where(all_masked, 1.0, t[:, None]))
    return shown[:, None], weight[:, None]


def diffusion_loss(model, prompt, response, block_size, kind="uniform", first_step=0.0, generator=None, weight=None,
                   extra=None, source=None, rows=slice(None)):
    """Masked-diffusion loss with the token shift, a scalar in nats per token.

    -log p(y) <= sum over blocks of  -log p(first token | clean past)
                                     + E_t [ 1/t sum over masked i of -log p(y_i | y_t^block, clean past) ]
    (BD3-LM, arXiv 2503.09573, eq. 8, whose first term is absent there: it has no shift). With kind="uniform" and
    first_step=0 the value is an unbiased estimate of the bound; at block size 1 it is the AR loss.

    prompt (N, P) left-padded; response (N, R) right-padded with [PAD] after [EOS]; weight (N, R) loss weight of each token
    (default 1), the normaliser being the sum of the weights; extra (N, E) blocks that are noised once more for every time
    they are named: more states of the same block in one forward, whose mean takes the place of the single draw;
    source (N, R) the slot whose token each slot shows (a permutation; default: its own): then y is still what the model must
    say, but what it sees differs, and masked slots must become what is left (what_is_left); rows: the part of the batch whose
    loss is summed, the draws and the normaliser being those of the whole.
    """
    weight = torch.ones(response.shape, device=response.device) if weight is None else weight
    weight = torch.where(response == PAD, 1.0, weight)  # the fill behind [EOS] weighs 1, however wide the batch came
    R = response.shape[1]
    response, real = fill_last_block(response, block_size)
    slot = torch.arange(response.shape[1], device=response.device).expand(len(response), -1)
    source = slot if source is None else torch.cat((source, slot[:, R:]), dim=1)
    shown = response.gather(1, source)
    weight = F.pad(weight, (0, response.shape[1] - weight.shape[1]), value=1.0) * real
    block = every_block(response, block_size)  # (N, blocks)
    if extra is not None:
        block = torch.cat((block, extra), dim=1)
    (N, M), B = block.shape, block_size
    times = (block[:, :, None] == block[:, None]).sum(2)  # (N, M) how often the same block is there
    masks, share = (x.view(N, M, -1, B) for x in draw_noise(N * M, B, kind, first_step, generator, response.device))
    S = masks.shape[2]
    block, times = block.repeat_interleave(S, 1), times.repeat_interleave(S, 1)  # (N, M S)
    of_block = lambda x: take_blocks(x, block, B)  # (N, R) -> (N, M S, B)
    share = share.flatten(1, 2) * of_block(weight) / times[..., None]
    masked = masks.flatten(1, 2) & of_block(real)
    noised = torch.where(masked, MASK, of_block(shown))
    target = response.gather(1, what_is_left(source, block, masked).flatten(1)).view(noised.shape)
    prompt, shown, noised, block, share, target = (x[rows] for x in (prompt, shown, noised, block, share, target))
    needed = share.flatten().nonzero()[:, 0]  # found before the forward: looking for them waits for the GPU
    hidden = segment_hidden(model, prompt, shown, noised, block)
    nats = F.cross_entropy(full_precision(model.logits(hidden.flatten(0, 2)[needed])), target.flatten()[needed], reduction="none")
    return (nats * share.flatten()[needed]).sum() / weight.sum()


def what_is_left(source, block, masked):
    """What the masked slots of segments must become: the tokens that the segment and the clean text before it do not show, in the
    order of the response. source (N, R), block (N, M), masked (N, M, B) -> slots of the response (N, M, B); slot 0 is
    predicted from the clean text alone, whether it is masked or not. If source is the identity, so is this.
    """
    B, R = masked.shape[-1], source.shape[1]
    start = block[..., None] * B
    slot = torch.arange(R, device=source.device)
    open_ = (slot >= start).scatter(2, start + slot[:B], masked)  # (N, M, R): masked, or behind the block
    left = torch.where(open_, source[:, None], R).sort(-1).values
    left = left.gather(2, (masked.cumsum(-1) - 1).clamp(min=0)).clamp(max=R - 1)  # R: nothing is left, and no slot asks
    first = torch.where(slot >= start, source[:, None], R).amin(-1, keepdim=True)
    return torch.cat((first, left[..., 1:]), dim=-1)


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


def choose(logp, open_, forced, rule, tau, clash=0.4):
    """Which open slots to commit now: logp (N, B, V) log-probabilities, open_, forced (N, B) -> bool (N, B).

    threshold: every slot with confidence max p > tau. independent: the same, and where no slot is that sure, every slot that is
    surer than all those that want the same token, or with which it would collide with probability sum_v p_i(v) p_j(v) > clash;
    drawn apart, such slots are what duplicates come from, and slots that want different tokens may as well go together. factor: the
    n most confident, n the largest with (n+1)(1 - c_(n)) < tau (Fast-dLLM, arXiv 2505.22618, sec. 3.3). steps: the ceil(B / tau) most confident, so that a block takes about tau steps whatever the
    confidence. Slots in `forced` are committed whatever the rule; a row with none commits at least its best, so that every step
    makes progress. The choice depends on the distributions only, not on the tokens drawn from them: given the state it is no
    random event.
    """
    confidence = torch.where(open_, logp.amax(-1).exp(), -1.0)
    B, place = logp.shape[1], torch.arange(logp.shape[1], device=logp.device)
    if rule in ("threshold", "independent"):
        chosen = open_ & (confidence > tau)
    else:
        ranked, order = confidence.sort(dim=1, descending=True, stable=True)
        n = place + 1
        if rule == "factor":
            n_commit = (((n + 1) * (1 - ranked) < tau) & (ranked >= 0)).mul(n).amax(1, keepdim=True)
        else:
            n_commit = math.ceil(B / tau)
        chosen = torch.zeros_like(open_).scatter(1, order, (n <= n_commit).expand_as(order)) & open_
    surest = F.one_hot(confidence.argmax(1), B).bool() & open_
    if rule == "independent":
        p = logp.exp() * open_[..., None]
        surer = confidence[:, None] > confidence[..., None]  # (N, i, j): j is surer than i, of equals the first
        surer |= (confidence[:, None] == confidence[..., None]) & (place < place[:, None])
        best = logp.argmax(-1)
        rivals = (p @ p.transpose(1, 2) > clash) | (best[:, :, None] == best[:, None])  # (N, B, B)
        surest = open_ & ~(rivals & surer).any(-1)
        return torch.where((chosen | forced).any(1, keepdim=True), chosen | forced, surest)
    return chosen | forced | (surest & ~forced.any(1, keepdim=True))


class BlockState:
    """A batch of responses being decoded: n rows, each at its own pace. All methods are without host syncs."""

    def __init__(self, model, prompt, n_tokens, block_size, prefix=None):
        """prompt (n, P) left-padded, n_tokens a multiple of B, prefix (n, L), whole blocks, the given beginning."""
        B, (n, P) = block_size, prompt.shape
        self.model, self.B, self.R = model, B, n_tokens
        self.P = max(B, P)                                       # the window before the first block must exist
        dev = prompt.device
        zeros = lambda *size: torch.zeros(*size, dtype=torch.long, device=dev)
        self.seq = zeros(n, self.P + n_tokens)                   # prompt and response, [MASK] where nothing is committed
        self.step = zeros(n, n_tokens)
        self.logp = model.embed.weight.new_zeros(n, n_tokens)
        self.pad, self.block, self.in_block, self.forwards = zeros(n), zeros(n), zeros(n), zeros(n)
        self.running = zeros(n).bool()
        self.cache = KVCache(model, n, self.P + n_tokens)
        self.rows, self.slot, self.lane = (torch.arange(size, device=dev) for size in (n, self.P + n_tokens, B))
        response = (self.slot - self.P) // B * B + B - 1         # last slot that a query of the response sees
        self.visible_to = torch.where(self.slot < self.P, self.slot, self.P + response)
        self.start(prompt, prefix)

    def start(self, prompt, prefix=None):
        """Begin anew with other prompts (n, P), in the same memory."""
        self.given = 0 if prefix is None else prefix.shape[1]
        self.seq[:, :self.P] = F.pad(prompt, (self.P - prompt.shape[1], 0), value=PAD)
        self.seq[:, self.P:] = MASK
        if self.given:
            self.seq[:, self.P:self.P + self.given] = prefix
        self.pad.copy_(pad_left(self.seq[:, :self.P]))
        self.block.fill_(self.given // self.B)                   # the block being denoised
        self.step.fill_(NEVER)
        self.in_block.zero_()                                    # steps done in it; 0: the block before is not stored yet
        self.logp.zero_(), self.forwards.zero_(), self.running.fill_(True)

    def forward(self, some, n_clean, width, n_keys):
        """Run the window that starts n_clean slots before the block, of the rows `some` -> hidden (m, width, d)."""
        at = (self.P + self.block[some, None] * self.B) - n_clean + self.slot[:width]  # (m, width)
        pad = self.pad[some, None]
        slot = self.slot[:n_keys]
        mask = (slot <= self.visible_to[at][..., None]) & (slot >= pad[..., None])
        mask |= slot == at[..., None]  # padding sees itself: no empty softmax
        cache = self.cache if isinstance(some, slice) else self.cache.of(some)
        return self.model(self.seq[some].gather(1, at), (at - pad).clamp(min=0), mask[:, None], cache, at, n_keys, last=min(width, self.B + 1))

    def predict(self, some, n_clean, n_keys):
        """One forward over n_clean clean slots and the block -> hidden (m, B, d) that predict the block. Slot i is predicted at
        i - 1, slot 0 by the clean part; without one it is committed already, and what it gets is unused."""
        hidden = self.forward(some, n_clean, n_clean + self.B, n_keys)
        return hidden[:, :-1] if n_clean else torch.cat((hidden[:, :1], hidden[:, :-1]), dim=1)

    def commit(self, some, hidden, rule, tau, clash, temperature=0.0, generator=None, constrain=None):
        """Draw tokens from what predicts the block of the rows `some` (m,), hidden (m, B, d), commit those that the rule chooses, and
        go on to the next block where this one is finished."""
        rows, block, step, running = (x[some] for x in (self.rows, self.block, self.in_block, self.running))  # (m,)
        row, at = rows[:, None], block[:, None] * self.B + self.lane  # (m, B) slots of the response
        tokens = self.seq[row, self.P + at]
        eos = (tokens == EOS).cumsum(1) > 0                      # at or behind the first committed [EOS]
        open_ = (tokens == MASK) & ~eos
        logits = self.model.logits(hidden)                       # (m, B, V)
        if constrain is not None:
            logits = constrain(logits, self.seq[some, self.P:], at, rows)
        drawn, logp, every = sample(logits, temperature, generator)
        forced = (step == 0)[:, None] & (self.lane == 0)
        chosen = choose(every, open_, forced, rule, tau, clash) & running[:, None]
        tokens = torch.where(chosen, drawn, tokens)
        self.seq[row, self.P + at] = tokens
        self.step[row, at] = torch.where(chosen, step[:, None], self.step[row, at])
        self.logp[row, at] = torch.where(chosen, logp, self.logp[row, at])
        self.forwards[some] += running
        # A block is finished when nothing is open before its first [EOS]; with an [EOS] the row is finished too.
        is_eos = tokens == EOS
        full = ~((tokens == MASK) & (is_eos.cumsum(1) == 0)).any(1)
        done = full & (is_eos.any(1) | (block == self.R // self.B - 1))
        full &= ~done
        self.running[some] = running & ~done
        self.block[some] = block + full
        self.in_block[some] = torch.where(full, 0, step + 1)

    def result(self):
        """-> Decoded"""
        filled = self.seq[:, self.P:].clone()
        behind = ((filled == EOS).cumsum(1) - (filled == EOS).long()) > 0
        tokens = torch.where(behind | (filled == MASK), PAD, filled)
        return Decoded(tokens, filled, self.step.clone(), torch.where(tokens == PAD, 0.0, self.logp), self.forwards.clone())


@torch.no_grad()
def block_decode(model, prompt, max_len, block_size, rule="threshold", tau=0.9, temperature=0.0, generator=None,
                 fuse=True, constrain=None, prefix=None, clash=0.4):
    """Block-diffusion decoding with a KV cache: a batch of rows, each at its own pace.

    Every forward feeds one window of the sequence: the block being denoised, preceded, where a row has just finished a
    block, by that block in its final, clean state. So storing a finished block costs no forward of its own: it rides
    along with the next block's first step ("fused"), and its last token predicts the next block's first. Keys of the block
    being denoised are written to the cache too and overwritten by the next forward. A small batch goes on together, rows inside
    a block storing the one before again, unchanged; in a large one, where width costs, rows wait until all open their next.

    prompt (N, P) left-padded; max_len tokens at most (rounded up to whole blocks); rule, tau, clash: see `choose`;
    fuse=False spends a forward of its own on the store (a reference, same tokens); constrain, optional, is a function
    (logits (n, B, V), response (n, R), slots (n, B), rows (n,)) -> logits, for a constrained decoder; prefix (N, L), whole
    blocks, is a response's given beginning. Returns Decoded. A row's result does not depend on the other rows of its batch,
    up to float round-off.
    """
    B, N = block_size, len(prompt)
    R = math.ceil(max_len / B) * B
    if prompt.is_cuda and fuse and constrain is None and prefix is None:
        return replay_block_decode(model, prompt, R, B, rule, tau, temperature, generator, clash)
    s = BlockState(model, prompt, R, B, prefix)
    first = True
    while s.running.any():
        go = s.running
        if N >= SPLIT and (inside := go & (s.in_block > 0)).any():
            go = inside
        some = slice(None) if go.all() else go.nonzero()[:, 0]
        fresh = s.in_block[some] == 0
        n_keys = s.P + int(s.block[some].max()) * B + B
        n_clean = s.P + s.given if first else B if fresh.any() else 0  # the first forward reads the prompts
        if fresh.any() and not fuse:
            stored = s.forward(some, n_clean, n_clean, n_keys)[:, -1:]
            s.forwards[some] += fresh
            hidden = torch.cat((stored, s.forward(some, 0, B, n_keys)[:, :-1]), dim=1)
        else:
            hidden = s.predict(some, n_clean, n_keys)          # who is inside a block stores the one before again, unchanged
        s.commit(some, hidden, rule, tau, clash, temperature, generator, constrain)
        first = False
    return s.result()


def replay_block_decode(model, prompt, n_tokens, block_size, rule, tau, temperature=0.0, generator=None, clash=0.4):
    """block_decode for GPUs, where a small model's time is the time to launch its kernels: all shapes are fixed (the window
    is always two blocks wide, finished rows stay), so that a step can be recorded once and replayed (model.recorded)."""
    prompt = F.pad(prompt, (-prompt.shape[1] % 32, 0), value=PAD)  # few shapes
    s, step = recorded(model, ("block", *prompt.shape, n_tokens, block_size, rule, tau, clash, temperature),
                       lambda: BlockState(model, prompt, n_tokens, block_size), generator)
    n_keys, everyone = s.P + n_tokens, slice(None)
    s.start(prompt)
    step("read", lambda: s.commit(everyone, s.predict(everyone, s.P, n_keys), rule, tau, clash, temperature, s.generator))
    while s.running.any():
        step("step", lambda: s.commit(everyone, s.predict(everyone, block_size, n_keys), rule, tau, clash, temperature, s.generator))
    return s.result()


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
