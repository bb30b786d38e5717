"""The block-diffusion sampler: which masked slots are committed in a forward, and the decode with its KV cache.

Block after block from the left; a block starts as B [MASK] tokens, every forward commits some of them, and at least one. The
finished block goes to the cache. See diffusion.py for what a block sees and where its tokens are predicted.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from model import EOS, MASK, PAD, KVCache, pad_left, recorded, sample

NEVER = 10 ** 6  # commit step of a slot that was never committed
DRAWN_CLASH = 0.1  # choose's clash where tokens are drawn, not the best: they collide more often


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

        threshold    every slot with confidence c = max p > tau
        independent  the same; and where no slot is that sure, every slot that is surer than all those that want the same token, or
                     with which it would collide with probability sum_v p_i(v) p_j(v) > clash: drawn apart, such slots are what
                     duplicates come from, and slots that want different tokens may as well go together
        factor       the n most confident, n the largest with (n+1)(1 - c_(n)) < tau (Fast-dLLM, arXiv 2505.22618, sec. 3.3)
        steps        the ceil(B / tau) most confident: a block takes about tau steps whatever the confidence
    Slots in `forced` are committed whatever the rule; a row with none commits at least its best, so that every step makes progress. The
    choice depends on the distributions only, not on the tokens drawn from them: given the state it is no random event.
    """
    best_logp, best = logp.max(-1)
    confidence = torch.where(open_, best_logp.exp(), -1.0)
    B, place = logp.shape[1], torch.arange(logp.shape[1], device=logp.device)
    if rule == "independent":
        chosen = open_ & (confidence > tau) | forced
        some = chosen.any(1, keepdim=True)
        if not logp.is_cuda and some.all():  # looking costs nothing on a CPU, what follows a tenth of a step
            return chosen
        p = logp.exp() * open_[..., None]
        surer = confidence[:, None] > confidence[..., None]  # (N, i, j): j is surer than i, of equals the first
        surer |= (confidence[:, None] == confidence[..., None]) & (place < place[:, None])
        rivals = (p @ p.transpose(1, 2) > clash) | (best[:, :, None] == best[:, None])  # (N, B, B)
        return torch.where(some, chosen, open_ & ~(rivals & surer).any(-1))
    if rule == "threshold":
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
    return chosen | forced | (surest & ~forced.any(1, keepdim=True))


class BlockState:
    """A batch of responses being decoded: n rows, each at its own pace. On a GPU no method waits for it."""

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
        slots = at
        if not at.is_cuda and (at[:, 0] == at[0, 0]).all():  # all at the same block: a plain copy stores the keys, 5 to 9 % faster
            slots = slice(int(at[0, 0]), int(at[0, 0]) + width)
        return self.model(self.seq[some].gather(1, at), (at - pad).clamp(min=0), mask[:, None], cache, slots, n_keys, last=min(width, self.B + 1))

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
        slots = self.P + at
        tokens = self.seq[row, slots]
        open_ = (tokens == MASK) & ((tokens == EOS).cumsum(1) == 0)  # not behind a committed [EOS]
        logits = self.model.logits(hidden)                       # (m, B, V)
        if constrain is not None:
            logits = constrain(logits, self.seq[some, self.P:], at, rows)
        drawn, logp, every = sample(logits, temperature, generator)
        forced = (step == 0)[:, None] & (self.lane == 0)
        chosen = choose(every, open_, forced, rule, tau, clash) & running[:, None]
        tokens = torch.where(chosen, drawn, tokens)
        self.seq[row, slots] = tokens
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
    """Block-diffusion decoding with a KV cache.

    Every forward feeds one window of the sequence: the block being denoised, preceded, where a row has just finished a
    block, by that block in its final, clean state. So storing a finished block costs no forward of its own: it rides
    along with the next block's first step ("fused"), and its last token predicts the next block's first. Keys of the block
    being denoised are written to the cache too and overwritten by the next forward. Rows that have finished a block wait until all
    have, then open the next together: no row's forward is wider than it needs, which at batches 4 and 8 is 5 and 10 % faster than
    going on at once, and at 64 far more.

    prompt (N, P) left-padded; max_len tokens at most (rounded up to whole blocks); rule, tau, clash: see `choose`;
    fuse=False spends a forward of its own on the store (a reference, same tokens); constrain, optional, is a function
    (logits (n, B, V), response (n, R), slots (n, B), rows (n,)) -> logits, for a constrained decoder; prefix (N, L), whole
    blocks, is a response's given beginning. Returns Decoded. A row's result does not depend on the other rows of its batch,
    up to float round-off.
    """
    B = block_size
    R = math.ceil(max_len / B) * B
    if prompt.is_cuda and fuse and constrain is None and prefix is None:
        return replay_block_decode(model, prompt, R, B, rule, tau, temperature, generator, clash)
    s = BlockState(model, prompt, R, B, prefix)
    first = True
    while s.running.any():
        inside = s.running & (s.in_block > 0)
        opening = not inside.any()
        go = s.running if opening else inside
        some = slice(None) if go.all() else go.nonzero()[:, 0]
        n_keys = s.P + int(s.block[some].max()) * B + B
        n_clean = s.P + s.given if first else B if opening else 0  # the first forward reads the prompts
        if opening and not fuse:
            stored = s.forward(some, n_clean, n_clean, n_keys)[:, -1:]
            s.forwards[some] += 1
            hidden = torch.cat((stored, s.forward(some, 0, B, n_keys)[:, :-1]), dim=1)
        else:
            hidden = s.predict(some, n_clean, n_keys)
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
