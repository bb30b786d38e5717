"""One GPT for both decoders: the autoregressive teacher (causal mask) and the block-diffusion student (block mask).

The attention mask is an argument, so the same weights serve both; there is no time embedding, because the number of
[MASK] tokens in a block already says how far denoising has come. Rotary positions (arXiv 2104.09864), RMSNorm, tied
embeddings, no biases.
"""
import copy

import torch
import torch.nn as nn
import torch.nn.functional as F

PAD, MASK, EOS = 0, 1, 2  # the three tokens that decoders must know; data.py names the others


class KVCache:
    """Keys and values of every layer, allocated once: k, v are (n_layer, N, S, d_model)."""

    def __init__(self, model, n_rows, n_slots):
        ref = model.embed.weight
        shape = (len(model.blocks), n_rows, n_slots, ref.shape[1])
        self.k, self.v = ref.new_zeros(shape), ref.new_zeros(shape)  # zeros: unwritten slots are masked, but 0 * NaN is NaN
        self.rows = slice(None)

    def of(self, rows):
        """The same cache for a forward over some of its rows (M,) only."""
        view = copy.copy(self)
        view.rows = rows
        return view

    def write(self, layer, k, v, slots):
        """Store k, v (N, T, d) at `slots`: a slice, the same for all rows (cheap), or, in a forward over all rows, (N, T) indices."""
        if isinstance(slots, slice):
            self.k[layer][self.rows, slots], self.v[layer][self.rows, slots] = k, v
        else:
            rows = torch.arange(len(slots), device=slots.device)
            flat = (slots + rows[:, None] * self.k.shape[2]).flatten()
            self.k[layer].view(-1, k.shape[-1]).index_copy_(0, flat, k.flatten(0, 1))
            self.v[layer].view(-1, v.shape[-1]).index_copy_(0, flat, v.flatten(0, 1))

    def read(self, layer, n_keys):
        """Keys and values (N, n_keys, d) of the first slots: a view, or a copy where the forward has some of the rows only."""
        return self.k[layer][self.rows, :n_keys], self.v[layer][self.rows, :n_keys]


def rotate(x, cos, sin):
    """Rotary embedding (RoFormer, eq. 34): x (..., hd) rotated in hd/2 planes (i, i + hd/2), cos and sin broadcastable to x.

        (a, b) -> (a cos - b sin, b cos + a sin)
    sin holds the minus (GPT.__init__): two products over the whole width instead of four over halves save a tenth of a CFT step.
    """
    a, b = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat((b, a), dim=-1), sin)


def attend(q, k, v, mask):
    """Attention: q (N, H, T, hd), k, v (N, H, S, hd), mask bool broadcastable to (N, H, T, S) -> (N, H, T, hd).

    On a CPU in bfloat16 it is written out: forward and backward take 12 ms where PyTorch's fused kernel takes 36 (batch
    32, 154 tokens, 2 heads of 64; the ratio is 10 at 4 heads of 32).
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        return scores.masked_fill(~mask, -1e4).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def attend_segments(q, k, v, mask, segment):
    """Attention over [shared ; segments]: every slot sees shared slots, a slot of a segment also its whole segment.

    k, v (N, H, S + M segment, hd); q (N, H, A + M segment, hd) for the last A shared slots and all segments; mask bool
    (N, 1, A + M segment, S) over the shared keys -> like q. Compared with one dense mask over everything, it leaves out
    segment x segment, most of the work: segments never see each other.
    """
    S = mask.shape[-1]
    if q.is_cuda:  # there the fused kernel is faster all the same (CFT step of `full` on an H100: 113 ms, written out 166)
        number = torch.arange(k.shape[2] - S, device=q.device) // segment
        own = F.pad(number[:, None] == number, (0, 0, q.shape[2] - len(number), 0)).expand(len(mask), 1, -1, -1)
        return attend(q, k, v, torch.cat((mask, own), dim=-1))
    A = mask.shape[2] - (k.shape[2] - S)  # shared slots that ask
    shared = attend(q[:, :, :A], k[:, :, :S], v[:, :, :S], mask[:, :, :A])
    q, own_k, own_v = q[:, :, A:] * q.shape[-1] ** -0.5, k[:, :, S:], v[:, :, S:]
    q, own_k, own_v = (x.unflatten(2, (-1, segment)) for x in (q, own_k, own_v))  # (N, H, M, B, hd)
    to_shared = (q.flatten(2, 3) @ k[:, :, :S].transpose(-1, -2)).masked_fill(~mask[:, :, A:], -1e4)  # (N, H, M B, S)
    to_own = (q @ own_k.transpose(-1, -2)).flatten(2, 3)  # (N, H, M B, B)
    p = torch.cat((to_shared, to_own), dim=-1).softmax(-1)
    y = p[..., :S] @ v[:, :, :S] + (p[..., S:].unflatten(2, (-1, segment)) @ own_v).flatten(2, 3)
    return torch.cat((shared, y), dim=2)


class Block(nn.Module):
    """Pre-norm transformer block: attention, then a 4x GELU MLP."""

    def __init__(self, d_model, n_head):
        super().__init__()
        self.n_head = n_head
        self.norm1, self.norm2 = nn.RMSNorm(d_model), nn.RMSNorm(d_model)
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)
        self.up = nn.Linear(d_model, 4 * d_model, bias=False)
        self.down = nn.Linear(4 * d_model, d_model, bias=False)

    def forward(self, x, mask, cos, sin, cache=None, layer=None, slots=None, n_keys=None, segment=0, last=0):
        """x (N, T, d) -> (N, T, d), or (N, last, d): of the last slots only, the others being keys and values. With a cache, keys
        and values are written to `slots` first and the queries see slots [0, n_keys); mask is (N, 1, T, n_keys), without a
        cache (N, 1, T, T), with segments see attend_segments."""
        N, T, d = x.shape
        qkv = self.qkv(self.norm1(x)).view(N, T, 3, self.n_head, d // self.n_head)
        cos, sin = cos.to(qkv.dtype), sin.to(qkv.dtype)  # autocast may have made it bfloat16
        (q, k), v = rotate(qkv[:, :, :2], cos, sin).unbind(2), qkv[:, :, 2]
        if cache is not None:
            cache.write(layer, k.reshape(N, T, d), v.reshape(N, T, d), slots)
            k, v = (x.view(N, n_keys, self.n_head, -1) for x in cache.read(layer, n_keys))
        x, q, mask = x[:, -last:], q[:, -last:], mask[:, :, -last:]  # last = 0: all
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        y = attend_segments(q, k, v, mask, segment) if segment else attend(q, k, v, mask)
        x = x + self.out(y.transpose(1, 2).reshape(x.shape))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """tokens -> hidden states (`forward`) -> logits of the next token (`logits`), computed only where they are needed."""

    def __init__(self, vocab_size, n_layer, n_head, d_model, max_positions=1024):
        super().__init__()
        self.embed = nn.Embedding(vocab_size, d_model)
        self.blocks = nn.ModuleList(Block(d_model, n_head) for _ in range(n_layer))
        self.run_block = Block.forward  # or its compiled form, where a whole forward is trained (train_ar.py)
        self.norm = nn.RMSNorm(d_model)
        half = d_model // n_head // 2
        angles = torch.arange(max_positions)[:, None] * 10000.0 ** (-torch.arange(half) / half)
        cos, sin = angles.cos(), angles.sin()
        self.register_buffer("cos", torch.cat((cos, cos), dim=1)[:, None, None], persistent=False)  # (max_positions, 1, 1, hd)
        self.register_buffer("sin", torch.cat((-sin, sin), dim=1)[:, None, None], persistent=False)
        for name, p in self.named_parameters():
            if p.dim() == 2:  # 1/sqrt(fan-in); GPT-2's fixed .02 is far too small at this width: attention starts flat
                shrink = (2 * n_layer) ** 0.5 if name.endswith(("out.weight", "down.weight")) else 1.0
                nn.init.normal_(p, std=p.shape[1] ** -0.5 / shrink)

    def forward(self, tokens, positions, mask, cache=None, slots=None, n_keys=None, segment=0, last=0):
        """tokens, positions (N, T) int; mask bool, True = may attend, broadcastable to (N, H, T, keys); segment > 0: the slots
        behind the mask's keys are segments of that length, each of which sees itself too (attend_segments).
        Returns the normalised hidden states (N, T, d_model), or (N, last, d_model), of the last slots only."""
        x = self.embed(tokens)
        cos, sin = self.cos[positions].to(x.dtype), self.sin[positions].to(x.dtype)
        for layer, block in enumerate(self.blocks):
            asked = last if layer == len(self.blocks) - 1 else 0  # the last layer's output is needed for these only
            if cache is None:
                x = self.run_block(block, x, mask, cos, sin, segment=segment, last=asked)
            else:
                x = block(x, mask, cos, sin, cache, layer, slots, n_keys, last=asked)
        return self.norm(x)

    def logits(self, hidden):
        """(..., d_model) -> (..., vocab). [PAD] and [MASK] are inputs only: no decoder may ever emit them, so they get
        no probability (a large finite number, not -inf: 0 * inf would spoil the KL of OPD)."""
        out = F.linear(hidden, self.embed.weight)
        out[..., :EOS] = -1e4
        return out


def pad_left(prompt):
    """Number of [PAD] tokens before each prompt: (N, P) -> (N,)."""
    return (prompt == PAD).sum(1)


def causal_hidden(model, prompt, response):
    """Hidden states that predict each response token autoregressively, in one forward.

    prompt (N, P) left-padded, response (N, R) -> (N, R, d_model); row i of a response is predicted from the tokens before
    it (the token shift: the output at slot P-1+i predicts response token i).
    """
    tokens = torch.cat((prompt, response[:, :-1]), dim=1)  # (N, P+R-1)
    slot = torch.arange(tokens.shape[1], device=tokens.device)
    pad = pad_left(prompt)[:, None]  # (N, 1)
    mask = (slot[None] <= slot[:, None])[None] & (slot[None, None] >= pad[:, None])  # causal, no padding as key
    mask |= torch.eye(len(slot), dtype=torch.bool, device=tokens.device)  # padding sees itself: no empty softmax
    return model(tokens, (slot[None] - pad).clamp(min=0), mask[:, None], last=response.shape[1])


@torch.no_grad()
def ar_decode(model, prompt, max_len, temperature=0.0, generator=None):
    """Plain autoregressive decoding with a KV cache: one forward a token, the baseline of every speed-up.

    prompt (N, P) left-padded -> tokens (N, max_len), [PAD] after the first [EOS]; log-probabilities (N, max_len) under
    the tempered distribution (0 after [EOS]); forwards (N,): the one that reads the prompt yields the first token.
    """
    if prompt.is_cuda:
        return graph_ar_decode(model, prompt, max_len, temperature, generator)
    s = ARState(model, prompt, max_len)
    for i in range(max_len):
        n_keys = s.P + i
        s.draw(s.read() if i == 0 else s.forward(slice(n_keys - 1, n_keys), n_keys), temperature, generator)
        if not s.running.any():
            break
    return s.result()


class ARState:
    """A batch of responses being decoded, all at token `i`."""

    def __init__(self, model, prompt, max_len):
        (N, self.P), dev = prompt.shape, prompt.device
        self.model, self.cache = model, KVCache(model, N, self.P + max_len)
        self.slot = torch.arange(self.P + max_len, device=dev)
        self.prompt, self.tokens = prompt.clone(), prompt.new_zeros(N, max_len)
        self.last, self.pad = prompt.new_zeros(N, 1), prompt.new_zeros(N, 1)
        self.logp = model.embed.weight.new_zeros(N, max_len)
        self.i = torch.zeros(1, dtype=torch.long, device=dev)
        self.running = torch.ones(N, dtype=torch.bool, device=dev)
        self.start(prompt)

    def start(self, prompt):
        """Begin anew with other prompts (N, P), in the same memory."""
        self.prompt.copy_(prompt), self.pad.copy_(pad_left(prompt)[:, None])
        self.tokens.zero_(), self.logp.zero_(), self.i.zero_(), self.running.fill_(True)

    def read(self):
        """The forward over the prompts -> hidden (N, d) that predict the first token."""
        slot = self.slot[:self.P]
        mask = (slot <= slot[:, None]) & (slot >= self.pad[..., None])  # (N, P, P): causal, no padding as key
        mask |= torch.eye(self.P, dtype=torch.bool, device=mask.device)
        return self.model(self.prompt, (slot - self.pad).clamp(min=0), mask[:, None], self.cache, slice(0, self.P), self.P, last=1)[:, 0]

    def forward(self, slots, n_keys):
        """The forward over the last token -> hidden (N, d) that predict the next. slots: where it is stored, as KVCache.write wants
        it; n_keys: keys to look at, at least those stored."""
        slot = self.slot[:n_keys]
        here = self.P + self.i - 1
        mask = (slot >= self.pad) & (slot <= here)  # (N, n_keys)
        return self.model(self.last, here - self.pad, mask[:, None, None], self.cache, slots, n_keys)[:, 0]

    def draw(self, hidden, temperature, generator):
        """Draw the next token of every row from what predicts it, hidden (N, d); rows that have ended write [PAD]."""
        token, logp, _ = sample(self.model.logits(hidden), temperature, generator)
        self.tokens.index_copy_(1, self.i, (token * self.running)[:, None])
        self.logp.index_copy_(1, self.i, (logp * self.running)[:, None])
        self.last.copy_(token[:, None])
        self.running &= token != EOS
        self.i += 1

    def result(self):
        """-> tokens (N, max_len), log-probabilities (N, max_len), forwards (N,)"""
        return self.tokens.clone(), self.logp.clone(), (self.tokens != PAD).sum(1)


def graph_ar_decode(model, prompt, max_len, temperature=0.0, generator=None):
    """ar_decode for GPUs: the step looks at all slots, has the same shapes for every token, and is replayed (recorded)."""
    prompt = F.pad(prompt, (-prompt.shape[1] % 32, 0), value=PAD)  # few shapes
    s, step = recorded(model, ("ar", *prompt.shape, max_len, temperature), lambda: ARState(model, prompt, max_len), generator)
    here = lambda: (s.P + s.i - 1).expand(len(prompt), 1)
    s.start(prompt)
    step("read", lambda: s.draw(s.read(), temperature, s.generator))
    for i in range(1, max_len):
        if i % 8 == 0 and not s.running.any():  # looking waits for the GPU
            break
        step("step", lambda: s.draw(s.forward(here(), s.P + max_len), temperature, s.generator))
    return s.result()


RECORDED = {}  # the states that `recorded` keeps


def recorded(model, key, make, generator):
    """The state of a decode with fixed shapes, kept from call to call, and step(name, function), which runs a function of that
    state: the first time as it is, then, on a GPU, recorded as a CUDA graph, afterwards replayed. Saves the launches of
    some 200 kernels a forward. The weights may change in between, in place; random draws come from a generator of the state's own,
    seeded from the given one. The last four states are kept, no more: each holds a KV cache.
    """
    key = (id(model), *key)
    if key not in RECORDED:
        while len(RECORDED) >= 4:
            del RECORDED[next(iter(RECORDED))]
        s = make()
        s.generator, s.graphs = torch.Generator(s.cache.k.device), {}
        RECORDED[key] = s
    s = RECORDED[key]
    if generator is not None:
        s.generator.manual_seed(int(torch.randint(2 ** 62, (1,), generator=generator, device=generator.device)))

    def step(name, function):
        if name not in s.graphs or not s.cache.k.is_cuda:
            s.graphs[name] = None
            return function()
        if s.graphs[name] is None:
            s.graphs[name] = torch.cuda.CUDAGraph()
            s.graphs[name].register_generator_state(s.generator)
            with torch.cuda.graph(s.graphs[name]):
                function()
        s.graphs[name].replay()
    return s, step


def sample(logits, temperature, generator=None):
    """Greedy (temperature 0) or sampled tokens from logits (..., V): the tokens (...,), their log-probabilities (...,), and
    all log-probabilities (..., V)."""
    logp = F.log_softmax(logits / temperature if temperature else logits, dim=-1)
    best, token = logp.max(-1)
    if temperature == 0:
        return token, best, logp
    token = torch.multinomial(logp.exp().flatten(0, -2), 1, generator=generator).view(logp.shape[:-1])
    return token, logp.gather(-1, token[..., None])[..., 0], logp
