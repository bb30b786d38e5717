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
DRAWN_CLASH = 0.1  # choose's clash in roll-outs: drawn tokens collide more often. (They pass no labels: mistakes teach.)


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


def choose(logp, open_, forced, rule, tau, clash=0.4, labels=None):
    """Which open slots to commit now: logp (N, B, V) log-probabilities, open_, forced (N, B) -> bool (N, B).

        threshold    every slot with confidence c = max p > tau
        independent  the same, but of those that want the same label only the surest (labels: the range of words that stand once in a
                     ranking; None: no such words). Where no slot is that sure, every slot that is surer than all those that want the
                     same token, or with which it would collide with probability sum_v p_i(v) p_j(v) > clash: drawn apart, such slots
                     are what duplicates come from, and slots that want different tokens may as well go together
        factor       the n most confident, n the largest with (n+1)(1 - c_(n)) < tau (Fast-dLLM, arXiv 2505.22618, sec. 3.3)
        steps        the ceil(B / tau) most confident: a block takes about tau steps whatever the confidence
    Slots in `forced` are committed whatever the rule; a row with none commits at least its best, so that every step makes progress. The
    choice depends on the distributions only, not on the tokens drawn from them: given the state it is no random event.
    """
    confidence, best = logp.max(-1)
    confidence = torch.where(open_, confidence.exp(), -1.0)
    B, place = logp.shape[1], torch.arange(logp.shape[1], device=logp.device)
    if rule == "independent":
        chosen = (confidence > tau) | forced
        rank = torch.where(forced, 2.0, confidence)  # forced slots go first
        surer = rank[:, None] > rank[..., None]  # (N, i, j): j is surer than i, of equals the first
        surer |= (rank[:, None] == rank[..., None]) & (place < place[:, None])
        same = best[:, :, None] == best[:, None]
        if labels is not None:
            label = chosen & (best >= labels.start) & (best < labels.stop)
            chosen &= ~(same & surer & label[:, None] & label[..., None]).any(-1)
        some = chosen.any(1, keepdim=True)
        if not logp.is_cuda and some.all():  # looking costs nothing on a CPU, what follows a tenth of a step
            return chosen
        p = logp.exp() * open_[..., None]
        rivals = (p @ p.transpose(1, 2) > clash) | same  # (N, B, B)
        return torch.where(some, chosen, open_ & ~(rivals & surer).any(-1))
    if rule == "threshold":
        chosen = confidence > tau
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


def unfinished(tokens):
    """Which slots of blocks (m, B) are still open: [MASK], and not behind an [EOS] -> bool (m, B)."""
    return (tokens == MASK) & ((tokens == EOS).cumsum(1) == 0)


class BlockState:
    """A batch of n responses being decoded. On a GPU no method waits for it."""

    def __init__(self, model, prompt, n_tokens, block_size, prefix=None):
        """prompt (n, P) left-padded, n_tokens a multiple of B, prefix (n, L), whole blocks, the given beginning."""
        B, (n, P) = block_size, prompt.shape
        self.model, self.B, self.R = model, B, n_tokens
        self.P = max(B, P)                                       # the window before the first block must exist
        dev = prompt.device
        zeros = lambda *size: torch.zeros(*size, dtype=torch.long, device=dev)
        self.seq = zeros(n, self.P + n_tokens)                   # prompt and response, [MASK] where nothing is committed
        self.response = self.seq[:, self.P:]                     # a view
        self.step = zeros(n, n_tokens)
        self.logp = model.embed.weight.new_zeros(n, n_tokens)
        self.pad, self.forwards, self.running = zeros(n, 1), zeros(n), zeros(n).bool()
        self.block, self.in_block = zeros(n, 1), zeros(n, 1)     # for graph_block_decode: the block a row is at, and steps done in it
        self.cache = KVCache(model, n, self.P + n_tokens)
        self.rows, self.slot, self.lane = (torch.arange(size, device=dev) for size in (n, self.P + n_tokens, B))
        response = (self.slot - self.P) // B * B + B - 1         # last slot that a query of the response sees
        self.visible_to = torch.where(self.slot < self.P, self.slot, self.P + response)
        self.start(prompt, prefix)

    def start(self, prompt, prefix=None):
        """Begin anew with other prompts (n, P), in the same memory."""
        self.given = 0 if prefix is None else prefix.shape[1]
        self.seq[:, :self.P] = F.pad(prompt, (self.P - prompt.shape[1], 0), value=PAD)
        self.response.fill_(MASK)
        if self.given:
            self.response[:, :self.given] = prefix
        self.pad.copy_(pad_left(self.seq[:, :self.P])[:, None])
        self.step.fill_(NEVER)
        self.logp.zero_(), self.forwards.zero_(), self.block.zero_(), self.in_block.zero_(), self.running.fill_(True)

    def view(self, at, n_keys):
        """What queries at the slots `at`, (n, W) or (1, W), are told beside their tokens: positions (n, W), and which of the first
        n_keys slots they see, (n, 1, W, n_keys)."""
        slot = self.slot[:n_keys]
        mask = (slot <= self.visible_to[at][..., None]) & (slot >= self.pad[..., None])
        mask |= slot == at[..., None]  # padding sees itself: no empty softmax
        return (at - self.pad).clamp(min=0), mask[:, None]

    def forward(self, some, slots, positions, mask):
        """Run the rows `some`, all of them or indices (m,), over `slots`, W of them that end with the block: a slice, the same for all,
        whose keys are stored by a plain copy (5 to 9 % faster), or (n, W). positions, mask: see `view`. -> the last min(W, B + 1)
        hidden states (m, ., d). The state at i - 1 predicts slot i."""
        tokens = self.seq[some, slots] if isinstance(slots, slice) else self.seq.gather(1, slots)
        cache = self.cache if isinstance(some, slice) else self.cache.of(some)
        return self.model(tokens, positions[some], mask[some], cache, slots, mask.shape[-1], last=min(tokens.shape[1], self.B + 1))

    def commit(self, at, hidden, open_, step, rule, tau, clash, labels=None, temperature=0.0, generator=None, constrain=None):
        """Draw tokens for m blocks from what predicts them, hidden (m, B, d), and commit those that the rule chooses. at: an index of
        these blocks in (n, R) tensors; open_ (m, B): their open slots; step: how many they have done, a number or (m, 1).
        -> the blocks' tokens (m, B)"""
        logits = self.model.logits(hidden)                       # (m, B, V)
        if constrain is not None:
            logits = constrain(logits)
        drawn, logp, every = sample(logits, temperature, generator)
        forced = ((self.lane == 0) & (step == 0)).expand_as(open_)
        chosen = choose(every, open_, forced, rule, tau, clash, labels)
        tokens = torch.where(chosen, drawn, self.response[at])
        self.response[at] = tokens
        self.step[at] = torch.where(chosen, step, self.step[at])
        self.logp[at] = torch.where(chosen, logp, self.logp[at])
        return tokens

    def result(self):
        """-> Decoded"""
        filled = self.response.clone()
        behind = ((filled == EOS).cumsum(1) - (filled == EOS).long()) > 0
        tokens = torch.where(behind | (filled == MASK), PAD, filled)
        return Decoded(tokens, filled, self.step.clone(), torch.where(tokens == PAD, 0.0, self.logp), self.forwards.clone())


@torch.no_grad()
def block_decode(model, prompt, max_len, block_size, rule="threshold", tau=0.9, temperature=0.0, generator=None,
                 constrain=None, prefix=None, clash=0.4, labels=None):
    """Block-diffusion decoding with a KV cache.

    Every forward feeds one window of the sequence: the block being denoised, preceded, in its first step, by the block before
    it in its final, clean state. So storing a finished block costs no forward of its own: it rides along with the next
    block's first step ("fused"), and its last token predicts the next block's first. Keys of the block being denoised are
    written to the cache too and overwritten by the next forward. Rows that have finished a block wait until all
    have, then open the next together: no row's forward is wider than it needs, which at batches 4 and 8 is 5 and 10 % faster than
    going on at once, and at 64 far more.

    prompt (N, P) left-padded; max_len tokens at most (rounded up to whole blocks); rule, tau, clash, labels: see `choose`;
    constrain, optional, is a function (logits (n, B, V), response (n, R), slots (n, B), rows (n,)) -> logits, for a constrained
    decoder; prefix (N, L), whole blocks, is a response's given beginning. Returns Decoded. A greedy row does not depend on the other
    rows of its batch, up to float round-off.
    """
    B = block_size
    R = math.ceil(max_len / B) * B
    if prompt.is_cuda and constrain is None and prefix is None:
        return graph_block_decode(model, prompt, R, B, rule, tau, temperature, generator, clash, labels)
    s = BlockState(model, prompt, R, B, prefix)
    n_clean = s.P + s.given  # the first forward reads the prompts
    for begin in range(s.given, R, B):
        left, step, end = s.rows[s.running], 0, s.P + begin + B  # left: rows whose block is not finished
        if not len(left):
            break
        start, open_ = end - B - n_clean, torch.ones(len(left), B, dtype=torch.bool, device=prompt.device)
        positions, mask = s.view(s.slot[None, start:end], end)
        while len(left):
            some = slice(None) if len(left) == len(s.rows) else left
            if step == 0:
                hidden = s.forward(some, slice(start, end), positions, mask)[:, :-1]
            else:
                hidden = s.forward(some, slice(end - B, end), positions[:, -B:], mask[:, :, -B:])
                hidden = torch.cat((hidden[:, :1], hidden[:, :-1]), dim=1)  # slot 0 is committed: what it gets is unused
            bound = constrain and (lambda logits: constrain(logits, s.response[some], (begin + s.lane).expand(len(left), B), left))
            tokens = s.commit((some, slice(begin, begin + B)), hidden, open_, step, rule, tau, clash, labels, temperature, generator,
                              bound)
            s.forwards[some] += 1
            open_ = unfinished(tokens)
            still = open_.any(1)
            if not still.all():
                left, open_ = left[still], open_[still]
            step += 1
        s.running &= (s.response[:, begin:begin + B] != EOS).all(1)
        n_clean = B
    return s.result()


def graph_block_decode(model, prompt, n_tokens, block_size, rule, tau, temperature=0.0, generator=None, clash=0.4, labels=None):
    """block_decode for GPUs, where a small model's time is the time to launch its kernels: all shapes are fixed (rows do not wait
    for each other, the window is always two blocks wide, finished rows stay), so that a step can be recorded once and
    replayed (model.recorded)."""
    prompt = F.pad(prompt, (-prompt.shape[1] % 32, 0), value=PAD)  # few shapes
    s, step = recorded(model, ("block", *prompt.shape, n_tokens, block_size, rule, tau, clash, labels, temperature),
                       lambda: BlockState(model, prompt, n_tokens, block_size), generator)
    B = block_size

    def forward(n_clean):
        """A step of every row, at its own block. What it reads and writes is kept in s: a recorded step finds it there again."""
        slots = s.P + s.block * B - n_clean + s.slot[:n_clean + B]  # (n, n_clean + B)
        hidden = s.forward(slice(None), slots, *s.view(slots, s.P + s.R))[:, :-1]
        at = s.rows[:, None], s.block * B + s.lane
        tokens = s.commit(at, hidden, unfinished(s.response[at]), s.in_block, rule, tau, clash, labels, temperature, s.generator)
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
