"""The same GPT, quicker: the twins of model.py's and diffusion.py's forwards, tested equal.

What is saved: attention between segments, which never see each other; outputs that nobody asks
for (`last`); a rotation in two products; on a CPU in bfloat16, PyTorch's own attention; in a
decoder, much of what surrounds the arithmetic of a forward (`FastGPT.read`).
"""
import torch
import torch.nn.functional as F

from data import PAD
from diffusion import decode_states, predict_blocks, replay_logp, take_blocks
from model import GPT, Layer, causal_hidden, causal_mask, pad_left


def rotate(x, cos, sin):
    """model.rotate with the sign of (a, b) -> (a cos - b sin, b cos + a sin) held by sin.

    Two products over the whole width instead of four over halves: a tenth of a CFT step."""
    a, b = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat((b, a), dim=-1), sin)


def attend(q, k, v, mask):
    """Attention: q (N, H, T, hd), k, v (N, H, S, hd), mask (N, H, T, S) -> (N, H, T, hd).

    On a CPU in bfloat16 it is written out: forward and backward take 12 ms where PyTorch's fused
    kernel takes 36 (batch 32, 154 tokens, 2 heads of 64; the ratio is 10 at 4 heads of 32)."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        return scores.masked_fill(~mask, -1e4).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def attend_segments(q, k, v, mask, segment):
    """Attention over [shared ; segments]: every slot sees shared slots as the mask says, a slot
    of a segment also its whole segment.

    k, v (N, H, S + M segment, hd); q (N, H, A + M segment, hd): the last A shared slots and all
    segments; mask bool (N, 1, A + M segment, S) over the shared keys -> like q."""
    S = mask.shape[-1]
    if q.is_cuda:
        # There the fused kernel is quicker all the same (CFT step of `full`: 113 ms against 166).
        number = torch.arange(k.shape[2] - S, device=q.device) // segment
        own = number[:, None] == number
        own = F.pad(own, (0, 0, q.shape[2] - len(number), 0)).expand(len(mask), 1, -1, -1)
        return attend(q, k, v, torch.cat((mask, own), dim=-1))
    A = mask.shape[2] - (k.shape[2] - S)
    shared = attend(q[:, :, :A], k[:, :, :S], v[:, :, :S], mask[:, :, :A])
    q = q[:, :, A:] * q.shape[-1] ** -0.5
    q = q.unflatten(2, (-1, segment))                             # (N, H, M, B, hd)
    own_k = k[:, :, S:].unflatten(2, (-1, segment))
    own_v = v[:, :, S:].unflatten(2, (-1, segment))
    to_shared = q.flatten(2, 3) @ k[:, :, :S].transpose(-1, -2)   # (N, H, M B, S)
    to_shared = to_shared.masked_fill(~mask[:, :, A:], -1e4)
    to_own = (q @ own_k.transpose(-1, -2)).flatten(2, 3)          # (N, H, M B, B)
    p = torch.cat((to_shared, to_own), dim=-1).softmax(-1)
    of_own = (p[..., S:].unflatten(2, (-1, segment)) @ own_v).flatten(2, 3)
    y = p[..., :S] @ v[:, :, :S] + of_own
    return torch.cat((shared, y), dim=2)


def attend_one(q, k, v, mask):
    """Attention of one query a row: q (N, H, 1, hd), k, v (N, H, S, hd), mask (N or 1, 1, 1, S),
    which is added to scores, or None -> (N, H, 1, hd).

    For many rows on a CPU: PyTorch's kernel goes from row to row and head to head. An AR decode
    at batch 64 takes a tenth less."""
    scores = (q * q.shape[-1] ** -0.5 * k).sum(-1)                # (N, H, S)
    if mask is not None:
        scores += mask[:, :, 0]
    p = scores.softmax(-1)
    return (p[..., None] * v).sum(2, keepdim=True)


def rms_norm(x, gain, least):
    """RMSNorm of x (..., d). gain (d,): sqrt(d) times its weight; least (): sqrt(d eps).

    PyTorch's takes 10 us for one token on a CPU, this takes 5. On a GPU one kernel does it all:
    there gain is the weight itself, and least is not used."""
    if x.is_cuda:
        return F.rms_norm(x, gain.shape, gain)
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)    # sqrt(sum of squares)
    return x / torch.hypot(length, least) * gain


class SlotCache:
    """Keys and values (n_layer, N, H, S, hd) at slots that the caller names; and the weights of
    the model, at hand."""

    def __init__(self, model, n_rows, n_slots):
        weight, n_head = model.embed.weight, model.layers[0].n_head
        shape = (len(model.layers), n_rows, n_head, n_slots, weight.shape[1] // n_head)
        self.k = weight.new_zeros(shape)  # zeros: unwritten slots are masked, but 0 * NaN is NaN
        self.v = weight.new_zeros(shape)
        self.look_up(model)

    def look_up(self, model):
        """Collects the weights as plain tensors, once a decode: in a forward of one token, asking
        modules for them takes a tenth of the time."""
        weight, layers = model.embed.weight, model.layers
        gains = [norm.weight for layer in layers for norm in (layer.norm1, layer.norm2)]
        gains.append(model.norm.weight)
        self.least = None
        if not weight.is_cuda:  # see rms_norm
            d, eps = weight.shape[1], torch.finfo(weight.dtype).eps
            gains = (torch.stack(gains) * d ** 0.5).unbind(0)
            self.least = torch.tensor((d * eps) ** 0.5, dtype=weight.dtype)
        self.last_gain = gains[-1]
        self.layers = []
        for n, layer in enumerate(layers):
            matrices = (layer.qkv, layer.out, layer.up, layer.down)
            turned = (matrix.weight.t() for matrix in matrices)   # as torch.mm wants them
            self.layers.append((*gains[2 * n:2 * n + 2], *turned))

    def of(self, rows, n_slots):
        """A copy of the first slots, of some rows (M,) only. The weights are shared."""
        part = object.__new__(SlotCache)
        part.__dict__.update(self.__dict__)
        part.k, part.v = (x[..., :n_slots, :].index_select(1, rows) for x in (self.k, self.v))
        return part

    def put(self, rows, part, slots):
        """Takes over what `part`, a copy for the rows (M,), has at slots, a slice."""
        self.k[:, rows, :, slots] = part.k[..., slots, :]
        self.v[:, rows, :, slots] = part.v[..., slots, :]

    def at(self, slots):
        """[(keys, values)] of every layer at slots, a slice: views (N, H, T, hd)."""
        return list(zip(self.k[..., slots, :].unbind(), self.v[..., slots, :].unbind()))

    def write(self, layer, k, v, slots):
        """Stores k, v (N, H, T, hd) at slots (N, T): every row has its own."""
        row = torch.arange(len(slots), device=slots.device)[:, None]
        self.k[layer][row, :, slots] = k.transpose(1, 2)          # (N, T, H, hd)
        self.v[layer][row, :, slots] = v.transpose(1, 2)


class FastLayer(Layer):
    def forward(self, x, mask, cos, sin, segment=0, last=0):
        """x (N, T, d) -> (N, T, d), or (N, last, d) of the last slots: the others are keys only.

        segment: see attend_segments."""
        N, T, d = x.shape
        qkv = self.qkv(self.norm1(x)).view(N, T, 3, self.n_head, d // self.n_head)
        cos, sin = cos.to(qkv.dtype), sin.to(qkv.dtype)  # autocast may have made it bfloat16
        q, k = rotate(qkv[:, :, :2], cos, sin).unbind(2)
        v = qkv[:, :, 2]
        x, q, mask = x[:, -last:], q[:, -last:], mask[:, :, -last:]  # last = 0: all
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        y = attend_segments(q, k, v, mask, segment) if segment else attend(q, k, v, mask)
        x = x + self.out(y.transpose(1, 2).reshape(x.shape))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class FastGPT(GPT):
    """A GPT with the same weights, names and first draws, and a quicker forward."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for layer in self.layers:
            layer.__class__ = FastLayer
        cos, sin = self.cos[:, None], self.sin[:, None]           # (max_positions, 1, 1, hd / 2)
        self.register_buffer("wide_cos", torch.cat((cos, cos), dim=-1), persistent=False)
        self.register_buffer("signed_sin", torch.cat((-sin, sin), dim=-1), persistent=False)

    def forward(self, tokens, positions, mask, cache=None, slots=None, n_keys=None,
                segment=0, last=0):
        """tokens, positions (N, T); mask bool, broadcastable to (N, H, T, keys) -> hidden
        (N, T, d), or (N, last, d) of the last slots.

        segment > 0: the slots after the mask's keys are segments of that length. With a cache:
        see read."""
        if cache is not None:
            return self.read(tokens, positions, mask, cache, slots, n_keys, last)
        x = self.embed(tokens)
        cos = self.wide_cos[positions].to(x.dtype)
        sin = self.signed_sin[positions].to(x.dtype)
        for number, layer in enumerate(self.layers):
            # The last layer's output is needed for the last slots only.
            asked = last if number == len(self.layers) - 1 else 0
            x = layer(x, mask, cos, sin, segment=segment, last=asked)
        return self.norm(x)

    def read(self, tokens, positions, mask, cache, slots, n_keys, last):
        """The forward of a decoder, without gradients: stores the keys of tokens (N, T) at slots
        of the cache, then looks at the first n_keys.

        positions (N, T), or a slice: the same for all rows; mask (N or 1, 1, T, n_keys), or None:
        all is seen; slots (N, T), or a slice, which is cheap."""
        (N, T), d = tokens.shape, self.embed.weight.shape[1]
        x = F.embedding(tokens.flatten(), self.embed.weight)      # (N T, d), as torch.mm wants it
        cos, sin = self.wide_cos[positions], self.signed_sin[positions]
        if mask is not None and not x.is_cuda:  # PyTorch would do this in every layer
            mask = torch.zeros_like(mask, dtype=x.dtype).masked_fill_(~mask, -torch.inf)
        seen = cache.at(slice(0, n_keys))
        places = cache.at(slots) if isinstance(slots, slice) else None
        for number, (gain1, gain2, qkv, out, up, down) in enumerate(cache.layers):
            new = torch.mm(rms_norm(x, gain1, cache.least), qkv)
            new = new.view(N, T, 3, -1, cos.shape[-1])            # (N, T, 3, H, hd)
            q, k = rotate(new[:, :, :2], cos, sin).transpose(1, 3).unbind(2)  # (N, H, T, hd)
            v = new[:, :, 2].transpose(1, 2)
            if places:
                places[number][0].copy_(k)
                places[number][1].copy_(v)
            else:
                cache.write(number, k, v, slots)
            if last and number == len(cache.layers) - 1:
                x, q = x.view(N, T, d)[:, -last:].reshape(-1, d), q[:, :, -last:]
                mask = None if mask is None else mask[:, :, -last:]
            one_each = N > 1 and q.shape[2] == 1 and not q.is_cuda
            y = (attend_one if one_each else attend)(q, *seen[number], mask)
            x = x + torch.mm(y.transpose(1, 2).reshape(x.shape), out)
            wide = F.gelu(torch.mm(rms_norm(x, gain2, cache.least), up))
            x = x + torch.mm(wide, down)
        return rms_norm(x, cache.last_gain, cache.least).view(N, -1, d)


# --- Twins ------------------------------------------------------------------------------------

@causal_hidden.register
def fast_causal_hidden(model: FastGPT, prompt, response):
    """model.causal_hidden, whose last layer answers for the response only."""
    tokens = torch.cat((prompt, response[:, :-1]), dim=1)         # (N, P + R - 1)
    pad, T = pad_left(prompt), tokens.shape[1]
    positions = torch.arange(T, device=tokens.device) - pad
    mask = causal_mask(pad, 0, T)
    return model(tokens, positions.clamp(min=0), mask, last=response.shape[1])


def shared_mask(prompt_len, response_len, block_size, block):
    """Which keys of prompt and clean response are seen: bool (N, P + R + M B, P + R). That a
    segment sees itself needs no mask (attend_segments)."""
    P, R, B, N = prompt_len, response_len, block_size, len(block)
    prompt = torch.arange(-P, 0, device=block.device)
    clean = torch.cat((prompt, torch.arange(R, device=block.device) // B))  # (P + R,)
    noised = block.repeat_interleave(B, 1)[..., None] > clean     # (N, M B, P + R)
    return torch.cat(((clean[:, None] >= clean).expand(N, -1, -1), noised), dim=1)


@predict_blocks.register
def fast_predict_blocks(model: FastGPT, prompt, clean, noised, block):
    """diffusion.predict_blocks without attention between segments, and without the clean copy of
    the last block, which nobody looks at."""
    (N, P), R, (M, B) = prompt.shape, clean.shape[1], noised.shape[1:]
    if B == 1:  # every token is a first token: the clean stream predicts them all
        noised, M = noised[:, :0], 0
    else:
        clean, R = clean[:, :-B], R - B
    pad, dev = pad_left(prompt), prompt.device
    lane = torch.arange(B, device=dev)
    start = P + block * B                                         # (N, M)
    shared = torch.arange(P + R, device=dev).expand(N, -1)
    slot = torch.cat((shared, (start[:, :M, None] + lane).flatten(1)), dim=1)  # (N, T)
    mask = shared_mask(P, R, B, block[:, :M])
    mask[:, :, :P] &= (torch.arange(P, device=dev) >= pad)[:, None]
    mask.diagonal(dim1=1, dim2=2).fill_(True)                     # padding sees itself
    tokens = torch.cat((prompt, clean, noised.flatten(1)), dim=1)
    hidden = model(tokens, (slot - pad).clamp(min=0), mask[:, None], segment=B if M else 0,
                   last=1 + R + M * B)                            # from P - 1 on
    before = 1 + R + torch.arange(M, device=dev)[:, None] * B + lane - 1  # (M, B)
    source = torch.where(lane == 0, block[..., None] * B, before if M else 0)  # (N, M, B)
    index = source.flatten(1)[..., None].expand(-1, -1, hidden.shape[-1])
    return hidden.gather(1, index).view(*source.shape, -1)


@replay_logp.register
def fast_replay_logp(model: FastGPT, prompt, decoded, block_size, temperature=0.0,
                     max_segments=16):
    """diffusion.replay_logp, max_segments of every row at a time: first those of all rows, then
    those of the rows that took more steps."""
    N, R, B = *decoded.tokens.shape, block_size
    step = torch.where(decoded.tokens != PAD, decoded.commit_step, -1).view(N, R // B, B)
    n_steps = step.amax(-1) + 1                                   # (N, blocks)
    ends = n_steps.cumsum(1)
    number = torch.arange(int(ends[:, -1].max()), device=prompt.device).expand(N, -1).contiguous()
    block = torch.searchsorted(ends, number, right=True)          # (N, M): the segments' blocks
    used = block < R // B
    block = block.clamp(max=R // B - 1)
    at = number - (ends - n_steps).gather(1, block)               # (N, M): their steps
    logp = torch.zeros_like(decoded.logp).view(N, R // B, B)
    max_segments = R if B == 1 else max_segments  # at B = 1 segments cost nothing
    for m in range(0, number.shape[1], max_segments):
        rows = used[:, m].nonzero()[:, 0]
        b, s = block[rows, m:m + max_segments], at[rows, m:m + max_segments]  # (n, M')
        part = decoded.take(rows)
        noised, _ = decode_states(part, b, s, B)
        hidden = predict_blocks(model, prompt[rows], part.clean, noised, b)
        here = take_blocks(step[rows].flatten(1), b, B) == s[..., None]  # committed at that step
        logits = model.logits(hidden[here]) / (temperature or 1.0)
        token = take_blocks(part.clean, b, B)[here]
        token_logp = F.log_softmax(logits, dim=-1).gather(-1, token[:, None])[:, 0]
        n, i, j = here.nonzero(as_tuple=True)
        logp = logp.index_put((rows[n], b[n, i], j), token_logp.to(logp.dtype))
    return logp.view(N, R)

