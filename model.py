"""One GPT for both decoders: autoregressive (AR), a token at a time, and block diffusion.

What a token may see is an argument, the attention mask, so the same weights serve both. No input
says how much of a block is masked; the model can count its [MASK] tokens. Rotary positions
(RoFormer, arXiv 2104.09864), RMSNorm, tied embeddings, no biases.

The output at a token predicts the *next* token. This is the *token shift* of AR:

    tokens read     <candidates> ... z3   <profile>   x2     y2 ...
    output predicts               <profile>  x2       y2     z3 ...
"""
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from data import EOS, PAD

# The score of what may not be seen, or written: softmax makes it 0. (With -inf a KL would be nan.)
FORBIDDEN = -1e4


def attend(q, k, v, mask):
    """Attention: queries (N, H, T, hd), keys and values (N, H, S, hd) -> (N, H, T, hd).

        softmax(q k' / sqrt(hd)) v
    mask: bool, broadcastable to (N, 1, T, S), True = may see; None: everything is seen.
    Written out, it trains faster in bfloat16 on a CPU than PyTorch's fused function."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)      # (N, H, T, S)
    if mask is not None:
        scores = scores.masked_fill(~mask, FORBIDDEN)
    return scores.softmax(-1) @ v


def rotate(x, cos, sin):
    """Rotary positions (RoFormer, eq. 34): x (..., N, H, T, hd), cos, sin (N or 1, 1, T, hd / 2).

    Each plane (i, i + hd / 2) turns by its position's angle, so a dot product of two rotated
    vectors depends on the distance between their positions only."""
    a, b = x.chunk(2, dim=-1)
    turned_a = a * cos - b * sin
    turned_b = b * cos + a * sin
    return torch.cat((turned_a, turned_b), dim=-1)


class KVCache:
    """Keys and values of the tokens read so far, in every layer.

    A forward pass writes after the first `length` tokens. What it wrote stays only if the caller
    raises `length` afterwards, so an unfinished block can be fed again and again."""

    def __init__(self, model, n_rows, n_tokens):
        weight = model.embed.weight
        n_head = model.layers[0].n_head
        hd = weight.shape[1] // n_head
        shape = (len(model.layers), n_rows, n_head, n_tokens, hd)
        self.k = weight.new_empty(shape)
        self.v = weight.new_empty(shape)
        self.length = 0

    def append(self, layer, k, v):
        """k, v (N, H, T, hd) of new tokens -> those of all tokens, (N, H, length + T, hd)."""
        end = self.length + k.shape[2]
        self.k[layer, :, :, self.length:end] = k
        self.v[layer, :, :, self.length:end] = v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]

    def take(self, kept):
        """The cache of the rows that are kept, bool (N,): itself if these are all."""
        if kept.all():
            return self
        part = object.__new__(KVCache)  # without __init__, which would allocate
        part.k = self.k[:, kept]
        part.v = self.v[:, kept]
        part.length = self.length
        return part


class Layer(nn.Module):
    """A pre-norm transformer layer: attention, then a GELU MLP four times as wide."""

    def __init__(self, d_model, n_head):
        super().__init__()
        self.n_head = n_head
        self.norm1 = nn.RMSNorm(d_model)
        self.norm2 = nn.RMSNorm(d_model)
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)
        self.up = nn.Linear(d_model, 4 * d_model, bias=False)
        self.down = nn.Linear(4 * d_model, d_model, bias=False)

    def forward(self, x, mask, cos, sin, cache=None, number=0):
        """x (N, T, d) -> (N, T, d); number: of this layer, for the cache."""
        N, T, d = x.shape
        qkv = self.qkv(self.norm1(x))                             # (N, T, 3 d)
        qkv = qkv.view(N, T, 3, self.n_head, d // self.n_head)
        qkv = qkv.permute(2, 0, 3, 1, 4)                          # (3, N, H, T, hd)
        q, k = rotate(qkv[:2], cos, sin)                          # (N, H, T, hd) each
        v = qkv[2]
        if cache is not None:
            k, v = cache.append(number, k, v)                     # (N, H, S, hd)
        y = attend(q, k, v, mask)                                 # (N, H, T, hd)
        y = y.transpose(1, 2).reshape(N, T, d)                    # heads side by side
        x = x + self.out(y)
        wide = F.gelu(self.up(self.norm2(x)))                     # (N, T, 4 d)
        return x + self.down(wide)


class GPT(nn.Module):
    """tokens -> hidden states (`forward`) -> logits (`logits`), computed only where needed."""

    def __init__(self, vocab_size, n_layer, n_head, d_model, max_positions=1024):
        super().__init__()
        self.embed = nn.Embedding(vocab_size, d_model)
        self.layers = nn.ModuleList(Layer(d_model, n_head) for _ in range(n_layer))
        self.norm = nn.RMSNorm(d_model)
        half = d_model // n_head // 2
        speed = 10000.0 ** (-torch.arange(half) / half)           # of each plane's rotation
        angle = torch.arange(max_positions)[:, None] * speed      # (max_positions, hd / 2)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)
        # Weights have a standard deviation of 1 / sqrt(fan-in). GPT-2's fixed .02 is far too small
        # at this width: attention would start flat. The two matrices of a layer that write to the
        # residual stream are divided by sqrt(2 n_layer), as in GPT-2.
        for name, p in self.named_parameters():
            if p.dim() == 2:
                writes = name.endswith(("out.weight", "down.weight"))
                shrink = (2 * n_layer) ** 0.5 if writes else 1.0
                nn.init.normal_(p, std=p.shape[1] ** -0.5 / shrink)

    def forward(self, tokens, positions, mask, cache=None):
        """tokens (N, T), positions (N or 1, T) -> hidden states (N, T, d).

        mask: bool (N or 1, 1, T, S), True = may see, or None; S counts the cache's tokens too."""
        x = self.embed(tokens)                                    # (N, T, d)
        cos = self.cos[positions][:, None].to(x.dtype)            # (N or 1, 1, T, hd / 2)
        sin = self.sin[positions][:, None].to(x.dtype)
        for number, layer in enumerate(self.layers):
            x = layer(x, mask, cos, sin, cache, number)
        return self.norm(x)

    def logits(self, hidden):
        """hidden (..., d) -> logits (..., V), float32 or better.

        [PAD] and [MASK] are only ever read: no decoder may write them."""
        out = F.linear(hidden, self.embed.weight)
        out[..., :EOS] = FORBIDDEN  # [PAD] and [MASK]; indexing by a list would copy it to a GPU
        return out.float() if out.dtype == torch.bfloat16 else out


# --- AR: reading and decoding from the left ---------------------------------------------------

def pad_left(prompt):
    """Number of [PAD] before each prompt: (N, P) -> (N, 1)."""
    return (prompt == PAD).sum(1, keepdim=True)


def causal_mask(pad, first, end):
    """Who sees whom from the left: tokens first..end-1 ask, tokens 0..end-1 are seen.

    pad (N, 1): padding at the start of each row -> bool (N, 1, end - first, end)."""
    key = torch.arange(end, device=pad.device)
    query = key[first:, None]                                     # (T, 1)
    before = key <= query                                         # (T, S)
    real = key >= pad[..., None]                                  # (N, 1, S)
    itself = key == query  # so that padding sees something: no empty softmax
    return (before & real | itself)[:, None]


def causal_hidden(model, prompt, response):
    """Hidden states that predict each response token from the tokens before it, in one forward.

    prompt (N, P) padded on the left, response (N, R) -> (N, R, d)."""
    P = prompt.shape[1]
    tokens = torch.cat((prompt, response[:, :-1]), dim=1)         # (N, P + R - 1)
    T = tokens.shape[1]
    pad = pad_left(prompt)                                        # (N, 1)
    positions = torch.arange(T, device=tokens.device) - pad       # from the first real token
    hidden = model(tokens, positions.clamp(min=0), causal_mask(pad, 0, T))
    return hidden[:, P - 1:]                                      # the token shift


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: at temperature 0 the most likely one."""
    temperature: float = 0.0
    generator: torch.Generator | None = None


GREEDY = Sampling()


def sample(logits, sampling):
    """Draws tokens from logits (..., V) -> tokens (...,), their log-probabilities (...,), and
    all log-probabilities (..., V), of the tempered distribution.

    At temperature 0 the log-probabilities are those of temperature 1."""
    tempered = logits / (sampling.temperature or 1.0)
    logp = F.log_softmax(tempered, dim=-1)
    if sampling.temperature == 0:
        best, token = logp.max(-1)
        return token, best, logp
    p = logp.exp().flatten(0, -2)                                 # (rows, V)
    token = torch.multinomial(p, 1, generator=sampling.generator)
    token = token.view(logp.shape[:-1])
    of_token = logp.gather(-1, token[..., None])[..., 0]
    return token, of_token, logp


@torch.no_grad()
def ar_decode(model, prompt, max_len, sampling=GREEDY):
    """Writes responses token by token, one forward each: the baseline of every speed-up.

    prompt (N, P) padded on the left -> tokens (N, max_len), [PAD] after the first [EOS]; their
    log-probabilities (N, max_len), 0 after it; forwards (N,), the prompt's included."""
    N, P = prompt.shape
    pad = pad_left(prompt)                                        # (N, 1)
    padded = bool(pad.any())
    cache = KVCache(model, N, P + max_len)
    tokens = prompt.new_full((N, max_len), PAD)
    logp = model.embed.weight.new_zeros(N, max_len)
    running = torch.ones(N, dtype=torch.bool, device=prompt.device)
    column = torch.arange(P + max_len, device=prompt.device)
    positions = (column - pad).clamp(min=0)                       # (N, P + max_len)
    unread = prompt                                               # (N, P), then (N, 1)
    for i in range(max_len):
        first = cache.length
        end = first + unread.shape[1]
        # A single token sees all before it, so only padding needs a mask then.
        mask = causal_mask(pad, first, end) if padded or i == 0 else None
        hidden = model(unread, positions[:, first:end], mask, cache)  # (N, T, d)
        cache.length = end
        logits = model.logits(hidden[:, -1])                      # (N, V)
        token, token_logp, _ = sample(logits, sampling)           # (N,)
        tokens[:, i] = torch.where(running, token, PAD)
        logp[:, i] = torch.where(running, token_logp, 0.0)
        running &= token != EOS
        if not running.any():
            break
        unread = token[:, None]
    forwards = (tokens != PAD).sum(1)  # one a token: the prompt's forward writes the first
    return tokens, logp, forwards
