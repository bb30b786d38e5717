"""Lossless decoding: AR's text or AR's distribution, whatever the draft; each forward counted once.

All computations run in float64."""
import itertools

import torch

from conftest import LENGTHS, gen, left_padded, tiny_gpt
from data import ANSWER, EOS, LABEL, PAD
from model import Sampling, ar_decode, causal_hidden
from ours.commit import Apart
from ours.lossless import lossless_decode, lossless_sample
from sampler import Threshold, block_decode

SMALL = LABEL + 4  # a vocabulary with four labels


def writer(seed):
    """A random model that writes answers often."""
    model = tiny_gpt(seed, SMALL)
    model.embed.weight.data[ANSWER] *= 1.5
    return model


@torch.no_grad()
def plain_lossless(model, prompt, max_len, B, rule):
    """One unpadded row (1, P), without a cache and by lists -> tokens up to [EOS], forwards."""
    draft = block_decode(model, prompt, max_len, B, rule)
    text, forwards = draft.clean[0, :max_len].tolist(), int(draft.forwards)
    while True:
        hidden = causal_hidden(model, prompt, torch.tensor([text]))
        best, forwards = model.logits(hidden)[0].argmax(-1).tolist(), forwards + 1
        wrong = next((i for i in range(max_len) if text[i] != best[i]), None)
        right = max_len if wrong is None else wrong + 1
        if wrong is not None:
            old, new = text[wrong], best[wrong]
            answer = text.index(ANSWER) if ANSWER in text else max_len
            for i in range(max(answer, wrong) + 1, max_len):
                text[i] = old if text[i] == new else text[i]
            text[wrong] = new
        if EOS in text[:right]:
            return text[:text.index(EOS) + 1], forwards
        if right == max_len:
            return text, forwards


def test_the_text_is_that_of_ar_and_each_row_counts_its_own_forwards():
    saved, kinds = 0, set()
    for seed in (0, 2, 3, 5):
        model, prompt = writer(seed), left_padded(LENGTHS, seed)
        tokens, _, ar_forwards = ar_decode(model, prompt, 11)
        for B in (1, 3, 16):
            for rule in (Threshold(0.0), Threshold(0.6), Apart(0.3, range(LABEL, SMALL))):
                decoded = lossless_decode(model, prompt, 11, B, rule)
                assert torch.equal(decoded.tokens, tokens)
                for n, length in enumerate(LENGTHS):
                    text, forwards = plain_lossless(model, prompt[n:n + 1, -length:], 11, B, rule)
                    assert tokens[n][tokens[n] != PAD].tolist() == text
                    assert decoded.forwards[n] == forwards
                if B == 1:  # the draft is AR's own
                    assert torch.equal(decoded.forwards, ar_forwards + 1)
                saved += int((decoded.forwards < ar_forwards).sum())
                kinds |= set((decoded.forwards - ar_forwards).tolist())
    assert saved and len(kinds) > 4  # the test has cases


# --- At a temperature -------------------------------------------------------------------------

@torch.no_grad()
def test_at_a_temperature_texts_have_the_distribution_of_ar():
    n, temperature, tokens = 2500, 1.3, (EOS, 3, 4)
    model = tiny_gpt(0, 5)
    model.embed.weight *= 0.4
    prompt = torch.tensor([[PAD, 3, 4, 4], [4, 3, 3, 4]])
    texts = torch.tensor(list(itertools.product(tokens, repeat=4)))    # (81, 4)
    for row, B in ((0, 2), (1, 4), (0, 16)):
        hidden = causal_hidden(model, prompt[row].expand(81, -1), texts)
        p = (model.logits(hidden) / temperature).softmax(-1).gather(-1, texts[..., None])[..., 0]
        after = (texts == EOS).cumsum(1) - (texts == EOS).long() > 0
        exact = {}  # [PAD] after the first [EOS]
        for text, its_p in zip(texts.masked_fill(after, PAD), p.masked_fill(after, 1.0).prod(1)):
            exact[tuple(text.tolist())] = float(its_p)
        assert abs(sum(exact.values()) - 1) < 1e-9 and max(exact.values()) < 0.5

        many = prompt[row].expand(n, -1)
        counts = dict.fromkeys(exact, 0)
        for text in lossless_sample(model, many, 4, B, Sampling(temperature, gen(row))).tolist():
            counts[tuple(text)] += 1
        often = [text for text in exact if exact[text] * n > 5]
        chi2 = sum((counts[text] - n * exact[text]) ** 2 / (n * exact[text]) for text in often)
        assert len(often) > 10 and abs(chi2 - len(often)) < 4 * (2 * len(often)) ** 0.5
