"""Ours: lossless decoding. The student drafts, the teacher verifies; the text is AR's.

One forward of the teacher over a draft says at every place what AR would write there. The draft is
accepted up to the first difference, where the teacher's token comes:

    draft      L4  L1  L3  L2  [EOS]
    teacher    L4  L1  L2                   accepted: L4 L1 L2
    amended    L4  L1  L2  L3  [EOS]        accepted: all, after two forwards of the teacher

The rest of a draft is kept, since greedily any draft will do. In an answer the teacher's label
changes places with the one that it replaces: a ranking stays a ranking.

At a temperature the rest is drafted anew. A token x that was drawn from q is accepted with
probability min(1, p(x) / q(x)), p the teacher's; if it is refused, another comes from
max(p - q, 0) (speculative sampling, arXiv 2211.17192). That is a draw from p if q is what x was
drawn from *given the text left of it*. But where a slot saw a token y to its right, accepting it
says something about y: given that, y no longer comes from its q. So such a slot is never accepted
(`in_order`), and a draft ends there.
"""
import functools
import math

import torch
import torch.nn.functional as F

from data import EOS, MASK, PAD, in_answer
from diffusion import predict_blocks
from model import GREEDY, causal_hidden
from sampler import commit, nothing_yet, open_slots


def distribution(logits, temperature):
    """What tokens are drawn from: logits (..., V) -> probabilities (..., V)."""
    p = F.softmax(logits / (temperature or 1.0), dim=-1)
    return p if temperature else F.one_hot(p.argmax(-1), p.shape[-1]).to(p.dtype)


def in_order(step, block_size):
    """Slots that saw nothing to their right, from the steps of their commits: (N, R) -> bool."""
    of_block = step.view(len(step), -1, block_size)
    first = of_block.flip(-1).cummin(-1).values.flip(-1)  # step of a slot, or of one to its right
    return (of_block == first).view_as(step)


def up_to_end(text):
    """Text (N, R) with [MASK] after its first [EOS]."""
    is_end = text == EOS
    return text.masked_fill(is_end.cumsum(1) - is_end.long() > 0, MASK)


def draft(student, prompt, text, block_size, rule, sampling):
    """sampler.plain_decode with a given beginning, text (N, R), then [MASK] -> Decoded, and the
    distributions (N, R, V) of its tokens, 0 where none can be accepted."""
    N, R = text.shape
    decoded = nothing_yet(student, prompt, R, block_size)
    decoded.filled = text.clone()
    q = decoded.logp.new_zeros(N, R, len(student.embed.weight))
    for number, begin in enumerate(range(0, R, block_size)):
        span = slice(begin, begin + block_size)
        block = prompt.new_full((N, 1), number)                   # (N, 1) one segment a row
        step = 0
        while open_slots(decoded, span).any():
            state = decoded.filled[:, None, span]                # (N, 1, B)
            hidden = predict_blocks(student, prompt, decoded.clean, state, block)
            logits = student.logits(hidden[:, 0])                 # (N, B, V)
            commit(decoded, span, step, logits, rule, sampling)
            if sampling.temperature:
                now = decoded.commit_step[:, span] == step        # (N, B)
                q[:, span][now] = distribution(logits, sampling.temperature)[now]
            step += 1
    if sampling.temperature:
        step = decoded.commit_step.masked_fill(text != MASK, -1)
        q[~in_order(step, block_size)] = 0
    else:  # greedily a token may be anyone's
        q = F.one_hot(decoded.filled, q.shape[-1]).to(q.dtype)
    return decoded, q


def verify(teacher, prompt, text, drafted, q, sampling):
    """What is accepted of a draft (N, R) that began with text (N, R), and was drawn from
    q (N, R, V) -> text with at least one token more."""
    p = distribution(teacher.logits(causal_hidden(teacher, prompt, drafted)), sampling.temperature)
    p_x, q_x = (x.gather(-1, drafted[..., None])[..., 0] for x in (p, q))     # (N, R)
    u = torch.rand(p_x.shape, generator=sampling.generator, device=p.device)
    accepted = (text != MASK) | ((q_x > 0) & (u * q_x < p_x))
    n = accepted.long().cumprod(1).sum(1, keepdim=True)           # (N, 1) how many from the left

    # The token at place n: of what q lacks there.
    place = n.clamp(max=text.shape[1] - 1)[..., None].expand(-1, -1, p.shape[-1])
    p, q = p.gather(1, place)[:, 0], q.gather(1, place)[:, 0]     # (N, V)
    rest = torch.maximum(p - q, 1e-9 * p)  # not 0 everywhere, whatever the round-off
    token = torch.multinomial(rest, 1, generator=sampling.generator)          # (N, 1)
    slot = torch.arange(text.shape[1], device=text.device)
    text = torch.where(slot < n, drafted, torch.where(slot == n, token, MASK))
    return up_to_end(text)


def amended(drafted, text):
    """The next draft, greedily: the accepted text (N, R), then the rest of the last one, drafted
    (N, R). What is [MASK] there the student drafts."""
    last = (text != MASK).sum(1, keepdim=True) - 1                # (N, 1) the teacher's token
    new, old = text.gather(1, last), drafted.gather(1, last)
    slot = torch.arange(text.shape[1], device=text.device)
    text = torch.where(slot > last, drafted, text)
    text = torch.where((slot > last) & in_answer(text) & (text == new), old, text)
    return up_to_end(text)


@functools.singledispatch
@torch.no_grad()
def lossless_decode(teacher, student, prompt, max_len, block_size, rule, sampling=GREEDY):
    """model.ar_decode of the teacher, in fewer forwards: prompt (N, P) -> its tokens (N, max_len),
    drawn from its distribution; forwards (N,) of the student; forwards (N,) of the teacher.

    rule: which slots the student commits together, a value with `choose`."""
    N, R = len(prompt), math.ceil(max_len / block_size) * block_size
    text = prompt.new_full((N, R), MASK)                          # what is accepted, then [MASK]
    begun = text.clone()                                          # what a draft goes on from
    drafts, verifies = prompt.new_zeros(N), prompt.new_zeros(N)
    left = torch.arange(N, device=prompt.device)                  # rows that are not finished
    while len(left):
        decoded, q = draft(student, prompt[left], begun[left], block_size, rule, sampling)
        text[left] = verify(teacher, prompt[left], text[left], decoded.filled, q, sampling)
        greedily = not sampling.temperature
        begun[left] = amended(decoded.filled, text[left]) if greedily else text[left]
        drafts[left] += decoded.forwards
        verifies[left] += 1
        finished = (text == EOS).any(1) | (text[:, max_len - 1] != MASK)
        left = (~finished).nonzero()[:, 0]
    tokens = text[:, :max_len]
    return torch.where(tokens == MASK, PAD, tokens), drafts, verifies
