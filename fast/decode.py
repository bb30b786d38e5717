"""The decoders, quicker: twins of model.ar_decode and sampler.block_decode, tested equal.

On a CPU: a mask only where somebody may not see something; log-probabilities of AR all at once
at the end; rows that have finished a block leave the forward; no tensor remembers how it was made
(inference_mode). On a GPU all shapes are fixed, so that a step is recorded once and replayed
(graphs.py).
"""
import math

import torch
import torch.nn.functional as F

from data import EOS, MASK, PAD
from fast.gpt import FastGPT, SlotCache
from fast.graphs import recorded
from model import GREEDY, Sampling, ar_decode, causal_mask, pad_left, sample
from sampler import NEVER, Decoded, block_decode, unfinished


def widened(prompt):
    """A prompt with a width that is a multiple of 32, so that few shapes occur."""
    return F.pad(prompt, (-prompt.shape[1] % 32, 0), value=PAD)


# --- AR ---------------------------------------------------------------------------------------

@ar_decode.register
@torch.no_grad()
def fast_ar_decode(model: FastGPT, prompt, max_len, sampling=GREEDY):
    """model.ar_decode."""
    if prompt.is_cuda:
        return graph_ar_decode(model, prompt, max_len, sampling)
    with torch.inference_mode():
        drawn, logits = ar_draw(model, prompt, max_len, sampling)
    # What is made out here may take part in training.
    logp = F.log_softmax(logits / (sampling.temperature or 1.0), dim=-1)
    logp = logp.gather(-1, drawn[..., None])[..., 0]              # (N, n)
    is_end = drawn == EOS
    after = is_end.cumsum(1) - is_end.long() > 0
    unwritten = (0, max_len - drawn.shape[1])
    tokens = F.pad(drawn.masked_fill(after, PAD), unwritten, value=PAD)
    return tokens, F.pad(logp.masked_fill(after, 0.0), unwritten), (tokens != PAD).sum(1)


def ar_draw(model, prompt, max_len, sampling):
    """Draws tokens until every row has its [EOS], n at most max_len -> tokens (N, n), of rows that
    have ended too, and the logits (N, n, V) that they were drawn from."""
    (N, P), dev = prompt.shape, prompt.device
    cache = SlotCache(model, N, P + max_len)
    pad = pad_left(prompt)                                        # (N, 1)
    padded = bool(pad.any())
    slot = torch.arange(P + max_len, device=dev)
    real = (slot >= pad)[:, None, None] if padded else None       # (N, 1, 1, P + max_len)
    running = torch.ones(N, dtype=torch.bool, device=dev)
    unread, mask = prompt, causal_mask(pad if padded else pad[:1], 0, P)
    tokens, every = [], []
    for end in range(P, P + max_len):                             # the cache has end tokens now
        slots = slice(end - unread.shape[1], end)
        positions = (slot[slots] - pad).clamp(min=0) if padded else slots
        hidden = model(unread, positions, mask, cache, slots, end, last=1)
        logits = model.logits(hidden[:, 0])                       # (N, V)
        token = sample(logits, sampling)[0] if sampling.temperature else logits.argmax(-1)
        tokens.append(token)
        every.append(logits)
        running &= token != EOS
        if not running.any():
            break
        unread, mask = token[:, None], real[..., :end + 1] if padded else None
    return torch.stack(tokens, dim=1), torch.stack(every, dim=1)


class ARState:
    """For GPUs: a batch of responses being written, all at token i. `i` is a tensor and the memory
    stays in place for CUDA graphs."""

    def __init__(self, model, prompt, max_len):
        (N, self.P), dev = prompt.shape, prompt.device
        self.model = model
        self.cache = SlotCache(model, N, self.P + max_len)
        self.slot = torch.arange(self.P + max_len, device=dev)
        self.prompt = prompt.clone()
        self.tokens = prompt.new_zeros(N, max_len)
        self.last = prompt.new_zeros(N, 1)
        self.pad = prompt.new_zeros(N, 1)
        self.logp = model.embed.weight.new_zeros(N, max_len)
        self.i = torch.zeros(1, dtype=torch.long, device=dev)
        self.running = torch.ones(N, dtype=torch.bool, device=dev)
        self.start(prompt)

    def start(self, prompt):
        """Begins anew with other prompts (N, P), in the same memory."""
        self.prompt.copy_(prompt)
        self.pad.copy_(pad_left(prompt))
        self.tokens.zero_()
        self.logp.zero_()
        self.i.zero_()
        self.running.fill_(True)

    def read(self):
        """The forward over the prompts -> hidden (N, d) that predict the first token."""
        mask = causal_mask(self.pad, 0, self.P)
        positions = (self.slot[:self.P] - self.pad).clamp(min=0)
        slots = slice(0, self.P)
        return self.model(self.prompt, positions, mask, self.cache, slots, self.P, last=1)[:, 0]

    def forward(self):
        """The forward over the last token -> hidden (N, d) that predict the next. It looks at all
        slots and has the same shapes for every token."""
        here = self.P + self.i - 1
        mask = (self.slot >= self.pad) & (self.slot <= here)      # (N, P + max_len)
        slots = here.expand(len(self.prompt), 1)
        return self.model(self.last, here - self.pad, mask[:, None, None], self.cache, slots,
                          len(self.slot))[:, 0]

    def draw(self, hidden, sampling):
        """Draws every row's next token from hidden (N, d); rows that have ended write [PAD]."""
        token, logp, _ = sample(self.model.logits(hidden), sampling)
        self.tokens.index_copy_(1, self.i, (token * self.running)[:, None])
        self.logp.index_copy_(1, self.i, (logp * self.running)[:, None])
        self.last.copy_(token[:, None])
        self.running &= token != EOS
        self.i += 1

    def result(self):
        return self.tokens.clone(), self.logp.clone(), (self.tokens != PAD).sum(1)


def graph_ar_decode(model, prompt, max_len, sampling=GREEDY):
    """For GPUs: read, then replay one step for every token."""
    prompt = widened(prompt)
    key = ("ar", *prompt.shape, max_len, sampling.temperature)
    s, step = recorded(model, key, lambda: ARState(model, prompt, max_len), sampling.generator)
    own = Sampling(sampling.temperature, s.generator)
    s.cache.look_up(model)  # its weights may have changed
    s.start(prompt)
    step("read", lambda: s.draw(s.read(), own))
    for i in range(1, max_len):
        if i % 8 == 0 and not s.running.any():  # looking waits for the GPU
            break
        step("step", lambda: s.draw(s.forward(), own))
    return s.result()


# --- Block diffusion --------------------------------------------------------------------------

class BlockState:
    """A batch of n responses being decoded. On a GPU no method waits for it."""

    def __init__(self, model, prompt, n_tokens, block_size, prefix=None):
        """prompt (n, P) padded on the left, n_tokens a multiple of B, prefix (n, L) whole blocks,
        the given beginning of the responses, or None."""
        B, (n, P), dev = block_size, prompt.shape, prompt.device
        self.model, self.B, self.R = model, B, n_tokens
        self.P = max(B, P)                                        # there is a window before block 0

        def zeros(*size):
            return torch.zeros(*size, dtype=torch.long, device=dev)

        self.seq = zeros(n, self.P + n_tokens)                    # prompt and response
        self.response = self.seq[:, self.P:]                      # a view; [MASK] where open
        self.step = zeros(n, n_tokens)
        self.logp = model.embed.weight.new_zeros(n, n_tokens)
        self.pad, self.forwards = zeros(n, 1), zeros(n)
        self.running = zeros(n).bool()
        self.cache = SlotCache(model, n, self.P + n_tokens)
        self.block, self.in_block = zeros(n, 1), zeros(n, 1)      # for fixed shapes: where a row is
        self.rows = torch.arange(n, device=dev)
        self.slot = torch.arange(self.P + n_tokens, device=dev)
        self.lane = torch.arange(B, device=dev)
        block_end = (self.slot - self.P) // B * B + B - 1         # what a query of a block sees
        self.visible_to = torch.where(self.slot < self.P, self.slot, self.P + block_end)
        self.start(prompt, prefix)

    def start(self, prompt, prefix=None):
        """Begins anew with other prompts (n, P), in the same memory."""
        self.given = 0 if prefix is None else prefix.shape[1]
        wider = (self.P - prompt.shape[1], 0)
        self.seq[:, :self.P] = F.pad(prompt, wider, value=PAD)
        self.response.fill_(MASK)
        if self.given:
            self.response[:, :self.given] = prefix
        self.pad.copy_(pad_left(self.seq[:, :self.P]))
        self.step.fill_(NEVER)
        for counter in (self.logp, self.forwards, self.block, self.in_block):
            counter.zero_()
        self.running.fill_(True)

    def forward(self, slots):
        """For fixed shapes: the forward over slots (n, W), which end with a block -> the last
        min(W, B + 1) hidden states (n, ., d). That at i - 1 predicts slot i."""
        mask = self.slot <= self.visible_to[slots][..., None]     # (n, W, P + R)
        mask &= self.slot >= self.pad[..., None]
        mask |= self.slot == slots[..., None]                     # padding sees itself
        positions = (slots - self.pad).clamp(min=0)
        return self.model(self.seq.gather(1, slots), positions, mask[:, None], self.cache, slots,
                          len(self.slot), last=min(slots.shape[1], self.B + 1))

    def commit(self, at, logits, open_, rule, sampling):
        """For fixed shapes: draws tokens of every row's block from logits (n, B, V) and commits
        those that the rule chooses. at: an index of these blocks in (n, R) tensors; open_ (n, B)
        -> the blocks' tokens (n, B)."""
        drawn, logp, every = sample(logits, sampling)
        forced = ((self.lane == 0) & (self.in_block == 0)).expand_as(open_)
        chosen = rule.choose(every, open_, forced)
        tokens = torch.where(chosen, drawn, self.response[at])
        self.response[at] = tokens
        self.step[at] = torch.where(chosen, self.in_block, self.step[at])
        self.logp[at] = torch.where(chosen, logp, self.logp[at])
        return tokens

    def result(self):
        filled = self.response.clone()
        after = ((filled == EOS).cumsum(1) - (filled == EOS).long()) > 0
        tokens = torch.where(after | (filled == MASK), PAD, filled)
        logp = torch.where(tokens == PAD, 0.0, self.logp)
        return Decoded(tokens, filled, self.step.clone(), logp, self.forwards.clone())


@block_decode.register
@torch.no_grad()
def fast_block_decode(model: FastGPT, prompt, max_len, block_size, rule, sampling=GREEDY,
                      constrain=None, prefix=None):
    """sampler.block_decode. Rows that have finished a block wait until all have, then open the
    next together: no row's forward is wider than it needs, which at batches 4 and 8 is 5 and 10 %
    quicker than going on at once, and at 64 far more.

    constrain: a function (logits (m, B, V), response (m, R), slots (m, B), rows (m,)) -> logits,
    for a constrained decoder; prefix (N, L), whole blocks: the given beginning of responses."""
    R = math.ceil(max_len / block_size) * block_size
    if prompt.is_cuda and constrain is None and prefix is None:
        return graph_block_decode(model, prompt, R, block_size, rule, sampling)
    with torch.inference_mode():
        s = BlockState(model, prompt, R, block_size, prefix)
        s.padded = bool(s.pad.any())
        n_clean = s.P + s.given                                   # the first forward reads all
        for begin in range(s.given, R, block_size):
            rows = s.rows[s.running]
            if not len(rows):
                break
            decode_block(s, rows, begin, n_clean, rule, sampling, constrain)
            s.running &= (s.response[:, begin:begin + block_size] != EOS).all(1)
            n_clean = block_size
    return s.result()  # made out here, it may take part in training


def decode_block(s, rows, begin, n_clean, rule, sampling, constrain=None):
    """Decodes one block of the rows (m,); the n_clean slots before it are not stored yet. Slots
    that are filled already stay; n_clean may be 0 only if the first is."""
    B, end = s.B, s.P + begin + s.B
    start, span = end - B - n_clean, slice(begin, begin + B)
    every_row = len(rows) == len(s.rows)
    at = slice(None) if every_row else rows                       # quicker than indices
    cache = s.cache if every_row else s.cache.of(rows, end)
    tokens, when, logp = s.response[at, span], s.step[at, span], s.logp[at, span]  # (m, B) each
    open_ = unfinished(tokens)
    forced = (s.lane == 0) & open_
    step = counted = 0
    while True:
        if step == 0 and n_clean:
            window = s.seq[at, start:end]                         # (m, n_clean + B)
            hidden = read_window(s, window, rows, cache, start)[:, :-1]
            if not every_row:
                s.cache.put(rows, cache, slice(start, end - B))   # the open block is not kept
        else:
            hidden = read_window(s, tokens, rows, cache, end - B)
            hidden = torch.cat((hidden[:, :1], hidden[:, :-1]), dim=1)  # slot 0 is committed
        logits = s.model.logits(hidden)                           # (m, B, V)
        if constrain is not None:
            s.response[at, span] = tokens
            slots = (begin + s.lane).expand(len(rows), B)
            logits = constrain(logits, s.response[at], slots, rows)
        drawn, drawn_logp, all_logp = sample(logits, sampling)
        chosen = rule.choose(all_logp, open_, forced)
        tokens = torch.where(chosen, drawn, tokens)
        when = torch.where(chosen, step, when)
        logp = torch.where(chosen, drawn_logp, logp)
        step += 1
        open_ = unfinished(tokens)
        forced = torch.zeros_like(open_)
        still = open_.any(1)
        if still.all():
            continue
        s.response[at, span], s.step[at, span], s.logp[at, span] = tokens, when, logp
        s.forwards[at] += step - counted
        left = still.nonzero()[:, 0]
        if not len(left):
            return
        counted = step
        at = rows = rows[left]
        cache = cache.of(left, end)
        tokens, when, logp, open_, forced = (x[left] for x in (tokens, when, logp, open_, forced))


def read_window(s, tokens, rows, cache, start):
    """The forward over tokens (m, W), which stand from slot `start` to the end of a block ->
    the last min(W, B + 1) hidden states (m, ., d). That at i - 1 predicts slot i."""
    W = tokens.shape[1]
    end = start + W
    asked, key = s.slot[start:end], s.slot[:end]
    positions, mask = slice(start, end), None
    if W > s.B:
        mask = (key <= s.visible_to[start:end, None])[None, None]  # (1, 1, W, end)
    if s.padded:
        pad = s.pad[rows]                                         # (m, 1)
        positions = (asked - pad).clamp(min=0)                    # (m, W)
        real = (key >= pad)[:, None, None]                        # (m, 1, 1, end)
        itself = key == asked[:, None]                            # padding sees itself
        mask = real if mask is None else mask & real | itself
    return s.model(tokens, positions, mask, cache, slice(start, end), end, last=min(W, s.B + 1))


def graph_block_decode(model, prompt, n_tokens, block_size, rule, sampling=GREEDY):
    """For GPUs: rows do not wait for each other, the window is always two blocks wide, finished
    rows stay."""
    prompt = widened(prompt)
    key = ("block", *prompt.shape, n_tokens, block_size, rule, sampling.temperature)
    s, step = recorded(model, key, lambda: BlockState(model, prompt, n_tokens, block_size),
                       sampling.generator)
    own, B = Sampling(sampling.temperature, s.generator), block_size

    def forward(n_clean):
        """A step of every row, at its own block. What it reads and writes stays in s."""
        slots = s.P + s.block * B - n_clean + s.slot[:n_clean + B]  # (n, n_clean + B)
        hidden = s.forward(slots)[:, :-1]
        at = s.rows[:, None], s.block * B + s.lane
        open_ = unfinished(s.response[at])
        tokens = s.commit(at, s.model.logits(hidden), open_, rule, own)
        s.forwards += s.running
        full = ~unfinished(tokens).any(1)
        done = full & ((tokens == EOS).any(1) | (s.block[:, 0] == s.R // B - 1))
        onward = (full & ~done)[:, None]
        s.running &= ~done
        s.block += onward
        s.in_block.add_(1).masked_fill_(onward, 0)

    s.cache.look_up(model)  # its weights may have changed
    s.start(prompt)
    step("read", lambda: forward(s.P))
    while s.running.any():
        step("step", lambda: forward(B))
    return s.result()
