"""The decoders, quicker: twins of model.ar_decode and sampler.block_decode, tested equal.

What is saved: rows that have finished a block leave the forward; the cache is written in place;
on a GPU all shapes are fixed, so that a step is recorded once and replayed (graphs.py).
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
    s = ARState(model, prompt, max_len)
    for i in range(max_len):
        n_keys = s.P + i
        s.draw(s.read() if i == 0 else s.forward(slice(n_keys - 1, n_keys), n_keys), sampling)
        if not s.running.any():
            break
    return s.result()


class ARState:
    """A batch of responses being written, all at token i. `i` is a tensor and the memory stays in
    place for CUDA graphs."""

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

    def forward(self, slots, n_keys):
        """The forward over the last token -> hidden (N, d) that predict the next. slots: where it
        is stored; n_keys: keys to look at, at least those stored."""
        slot = self.slot[:n_keys]
        here = self.P + self.i - 1
        mask = (slot >= self.pad) & (slot <= here)                # (N, n_keys)
        return self.model(self.last, here - self.pad, mask[:, None, None], self.cache, slots,
                          n_keys)[:, 0]

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
    """For GPUs: the step looks at all slots and has the same shapes for every token."""
    prompt = widened(prompt)
    key = ("ar", *prompt.shape, max_len, sampling.temperature)
    s, step = recorded(model, key, lambda: ARState(model, prompt, max_len), sampling.generator)
    own = Sampling(sampling.temperature, s.generator)
    n_keys = s.P + max_len

    def here():
        return (s.P + s.i - 1).expand(len(prompt), 1)
    s.start(prompt)
    step("read", lambda: s.draw(s.read(), own))
    for i in range(1, max_len):
        if i % 8 == 0 and not s.running.any():  # looking waits for the GPU
            break
        step("step", lambda: s.draw(s.forward(here(), n_keys), own))
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
        self.block, self.in_block = zeros(n, 1), zeros(n, 1)      # for fixed shapes: where a row is
        self.cache = SlotCache(model, n, self.P + n_tokens)
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

    def view(self, at, n_keys):
        """What queries at the slots `at`, (n, W) or (1, W), are told beside their tokens:
        positions (n, W), and which of the first n_keys slots they see, (n, 1, W, n_keys)."""
        slot = self.slot[:n_keys]
        mask = (slot <= self.visible_to[at][..., None]) & (slot >= self.pad[..., None])
        mask |= slot == at[..., None]                             # padding sees itself
        return (at - self.pad).clamp(min=0), mask[:, None]

    def forward(self, some, slots, positions, mask):
        """Runs the rows `some`, all or indices (m,), over `slots`, which end with the block: a
        slice, whose keys are stored by a plain copy (5 to 9 % quicker), or (n, W). -> the last
        min(W, B + 1) hidden states (m, ., d). That at i - 1 predicts slot i."""
        sliced = isinstance(slots, slice)
        tokens = self.seq[some, slots] if sliced else self.seq.gather(1, slots)
        cache = self.cache if isinstance(some, slice) else self.cache.of(some)
        last = min(tokens.shape[1], self.B + 1)
        return self.model(tokens, positions[some], mask[some], cache, slots, mask.shape[-1],
                          last=last)

    def commit(self, at, logits, open_, step, rule, sampling):
        """Draws tokens of m blocks from logits (m, B, V) and commits those that the rule chooses.

        at: an index of these blocks in (n, R) tensors; open_ (m, B); step: how many they have
        done, a number or (m, 1) -> the blocks' tokens (m, B)."""
        drawn, logp, every = sample(logits, sampling)
        forced = ((self.lane == 0) & (step == 0)).expand_as(open_)
        chosen = rule.choose(every, open_, forced)
        tokens = torch.where(chosen, drawn, self.response[at])
        self.response[at] = tokens
        self.step[at] = torch.where(chosen, step, self.step[at])
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
    s = BlockState(model, prompt, R, block_size, prefix)
    n_clean = s.P + s.given                                       # the first forward reads all
    for begin in range(s.given, R, block_size):
        left = s.rows[s.running]
        if not len(left):
            break
        decode_block(s, begin, n_clean, left, rule, sampling, constrain)
        s.running &= (s.response[:, begin:begin + block_size] != EOS).all(1)
        n_clean = block_size
    return s.result()


def decode_block(s, begin, n_clean, left, rule, sampling, constrain):
    """Decodes one block of the rows `left` (m,); the n_clean slots before it are not stored yet."""
    B, step, end = s.B, 0, s.P + begin + s.B
    start = end - B - n_clean
    open_ = torch.ones(len(left), B, dtype=torch.bool, device=left.device)
    positions, mask = s.view(s.slot[None, start:end], end)
    while len(left):
        some = slice(None) if len(left) == len(s.rows) else left
        if step == 0:
            hidden = s.forward(some, slice(start, end), positions, mask)[:, :-1]
        else:
            hidden = s.forward(some, slice(end - B, end), positions[:, -B:], mask[:, :, -B:])
            hidden = torch.cat((hidden[:, :1], hidden[:, :-1]), dim=1)  # slot 0 is committed
        logits = s.model.logits(hidden)                           # (m, B, V)
        if constrain is not None:
            slots = (begin + s.lane).expand(len(left), B)
            logits = constrain(logits, s.response[some], slots, left)
        at = (some, slice(begin, begin + B))
        tokens = s.commit(at, logits, open_, step, rule, sampling)
        s.forwards[some] += 1
        open_ = unfinished(tokens)
        still = open_.any(1)
        if not still.all():
            left, open_ = left[still], open_[still]
        step += 1


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
        hidden = s.forward(slice(None), slots, *s.view(slots, s.P + s.R))[:, :-1]
        at = s.rows[:, None], s.block * B + s.lane
        open_ = unfinished(s.response[at])
        tokens = s.commit(at, s.model.logits(hidden), open_, s.in_block, rule, own)
        s.forwards += s.running
        full = ~unfinished(tokens).any(1)
        done = full & ((tokens == EOS).any(1) | (s.block[:, 0] == s.R // B - 1))
        onward = (full & ~done)[:, None]
        s.running &= ~done
        s.block += onward
        s.in_block.add_(1).masked_fill_(onward, 0)

    s.start(prompt)
    step("read", lambda: forward(s.P))
    while s.running.any():
        step("step", lambda: forward(B))
    return s.result()
