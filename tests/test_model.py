"""Invariants of model.py: the forward against one in numpy, masks, positions, AR decoding.

Where two computations must agree they run in float64."""
import math

import numpy as np
import torch
import torch.nn.functional as F

from conftest import LENGTHS, VOCAB, close, gen, left_padded, naive_hidden, tiny_gpt, words
from data import EOS, MASK, PAD
from model import GPT, Sampling, ar_decode, causal_hidden, sample


# --- The forward ------------------------------------------------------------------------------

def numpy_gpt(model, tokens, positions, mask):
    """One row: tokens and positions (T,), mask (T, T) -> hidden states (T, d), token by token and
    head by head. A plane of a head is a complex number that its position turns."""
    W = {name: p.detach().numpy() for name, p in model.named_parameters()}
    H = model.layers[0].n_head
    erf = np.vectorize(math.erf)

    def norm(x, gain):
        return gain * x / np.sqrt((x ** 2).mean())

    def turned(x, position):  # (hd,) -> (hd / 2,) complex
        half = len(x) // 2
        speed = 10000.0 ** (-np.arange(half) / half)
        return (x[:half] + 1j * x[half:]) * np.exp(1j * position * speed)

    x = [W["embed.weight"][t] for t in tokens]
    for i in range(len(model.layers)):
        w = {name: W[f"layers.{i}.{name}.weight"]
             for name in ("norm1", "norm2", "qkv", "out", "up", "down")}
        q, k, v = zip(*(np.split(w["qkv"] @ norm(row, w["norm1"]), 3) for row in x))
        read = []
        for t in range(len(x)):
            heads = []
            for h in range(H):
                def of_head(y):
                    return np.split(y, H)[h]
                query = turned(of_head(q[t]), positions[t])
                seen = np.flatnonzero(mask[t])
                score = [(query * turned(of_head(k[s]), positions[s]).conj()).sum().real
                         for s in seen]
                p = np.exp(np.array(score) / np.sqrt(len(query) * 2))
                heads.append(sum(a * of_head(v[s]) for a, s in zip(p / p.sum(), seen)))
            read.append(np.concatenate(heads))
        x = [row + w["out"] @ y for row, y in zip(x, read)]
        for t, row in enumerate(x):
            wide = w["up"] @ norm(row, w["norm2"])
            x[t] = row + w["down"] @ (wide * (1 + erf(wide / np.sqrt(2))) / 2)
    return np.array([norm(row, W["norm.weight"]) for row in x])


@torch.no_grad()
def test_the_forward_is_that_of_numpy():
    model, tokens = tiny_gpt(), words(3, 7)
    mask = (torch.rand(3, 7, 7, generator=gen()) < 0.5) | torch.eye(7).bool()
    positions = torch.randint(9, (3, 7), generator=gen(1))
    hidden = model(tokens, positions, mask[:, None])
    for n in range(3):
        exact = numpy_gpt(model, tokens[n].tolist(), positions[n].tolist(), mask[n].numpy())
        close(hidden[n], torch.from_numpy(exact), 1e-5)  # the table of angles is float32
    assert torch.allclose(model.logits(hidden)[..., EOS:],
                          (hidden @ model.embed.weight.T)[..., EOS:])  # tied


def test_weights_begin_with_the_size_that_keeps_activations_alive():
    d, n = 96, 3
    for name, p in GPT(50, n, 2, d).named_parameters():
        if p.dim() == 1:
            assert (p == 1).all()
            continue
        writes = name.endswith(("out.weight", "down.weight"))
        std = p.shape[1] ** -0.5 / (math.sqrt(2 * n) if writes else 1)
        assert abs(p.std().item() / std - 1) < 0.05, name


def test_padding_and_mask_are_never_written_and_logits_are_float32_at_least():
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        logits = tiny_gpt(dtype=dtype).logits(torch.randn(50, 16, dtype=dtype))
        assert (logits.softmax(-1)[:, [PAD, MASK]] == 0).all() and (logits[:, EOS:] > -1e3).all()
        assert logits.dtype == max(dtype, torch.float32, key=lambda d: torch.finfo(d).bits)


# --- From the left ----------------------------------------------------------------------------

@torch.no_grad()
def test_a_response_is_read_as_row_by_row_and_token_by_token_without_padding():
    model, prompt, response = tiny_gpt(), left_padded(LENGTHS), words(len(LENGTHS), 7, seed=1)
    hidden = causal_hidden(model, prompt, response)
    for n, length in enumerate(LENGTHS):
        for i in range(7):
            alone = naive_hidden(model, prompt[n, -length:], response[n, :i], response[n, i:i + 1])
            close(hidden[n, i], alone[0])


@torch.no_grad()
def test_ar_decode_repeats_the_best_token_of_an_uncached_forward():
    for temperature in (0.0, 1.0, 0.7):
        model, prompt, ends = tiny_gpt(), left_padded(LENGTHS), []
        tokens, logp, forwards = ar_decode(model, prompt, 10, Sampling(temperature, gen()))
        for n, length in enumerate(LENGTHS):
            text, end = tokens[n][tokens[n] != PAD], 0
            for i, token in enumerate(text.tolist()):
                hidden = naive_hidden(model, prompt[n, -length:], text[:i], text[i:i + 1])
                p = F.log_softmax(model.logits(hidden[0]) / (temperature or 1.0), -1)
                close(logp[n, i], p[token])
                assert temperature or token == p.argmax()
                end += token == EOS
            assert (tokens[n, len(text):] == PAD).all() and (logp[n, len(text):] == 0).all()
            assert end == (len(text) < 10) or end == 1 and text[-1] == EOS
            ends.append(len(text))
        assert forwards.tolist() == ends and len(set(ends)) > 2  # rows of several lengths


def test_tokens_are_drawn_as_often_as_their_tempered_probabilities_say():
    logits = torch.randn(1, VOCAB, generator=gen(), dtype=torch.float64).expand(20000, -1)
    for temperature in (1.0, 0.5):
        token, of_token, logp = sample(logits, Sampling(temperature, gen()))
        p = (logits[0] / temperature).softmax(-1)
        close(logp[0].exp(), p)
        close(of_token, logp[0][token])
        share = torch.bincount(token, minlength=VOCAB) / 20000
        assert ((share - p).abs() < 5 * (p * (1 - p) / 20000).sqrt()).all()
