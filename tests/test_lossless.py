"""Lossless decoding: the teacher's text, whatever the student drafts, and the forwards it took."""
import itertools
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

import fast.lossless  # noqa: F401  registers the quick twin
import ours.lossless
from config import Config
from conftest import LENGTHS, VOCAB, gen, left_padded, tiny_gpt, words
from data import EOS, MASK, PAD
from diffusion import predict_blocks
from fast.gpt import FastGPT
from model import GPT, Sampling, ar_decode, causal_hidden
from ours.commit import Apart
from ours.lossless import distribution, draft, in_order, lossless_decode, verify
from report.lossless import lossless_write
from sampler import Threshold, plain_decode
from trainer import ar_write

AT_ONCE = Threshold(0.0)  # commits a block in one step
RULES = [AT_ONCE, Threshold(0.6), Apart(0.5, 0.1)]


def near(model, std, seed=1):
    """A student: the same model with some noise on its weights."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(std * p.std() * torch.randn_like(p))
    return model


def pair(kind, seed=0, std=0.1, dtype=torch.float64):
    """A teacher and a student that is near it."""
    return (tiny_gpt(seed, kind=kind, dtype=dtype),
            near(tiny_gpt(seed, kind=kind, dtype=dtype), std))


# --- Greedily ---------------------------------------------------------------------------------

@pytest.mark.parametrize("trace", ["free", "bound"])
def test_the_row_of_the_table_is_ars_text(kind, trace):
    cfg = Config(trace=trace, block_size=4, n_candidates=4, bfloat16=False)
    for seed in (0, 3, 4):
        models, prompt = pair(kind, seed), left_padded(LENGTHS, seed)
        got, ar = lossless_write(cfg, models, prompt, 14), ar_write(cfg, models[0], prompt, 14)
        assert torch.equal(got.tokens, ar.tokens)
        assert (got.forwards >= 2).all()  # a draft and its verification at least

@pytest.mark.parametrize("B", [1, 3, 16])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_the_text_is_that_of_ar(kind, rule, B):
    for seed, std, dtype in ((0, 0.0, torch.float64), (3, 0.1, torch.float32),
                             (4, 0.1, torch.float64), (5, 3.0, torch.float32)):
        teacher, student = pair(kind, seed, std, dtype)
        prompt = left_padded(LENGTHS, seed)
        tokens, drafts, verifies = lossless_decode(teacher, student, prompt, 11, B, rule)
        assert torch.equal(tokens, ar_decode(tiny_gpt(seed, dtype=dtype), prompt, 11)[0])
        assert (drafts >= 1).all() and (verifies >= 1).all()
        assert (verifies <= (tokens != PAD).sum(1)).all()


@pytest.mark.parametrize("B", [1, 4, 16])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_the_quick_twin_takes_the_same_forwards(rule, B):
    seen = set()
    for seed, std in ((0, 0.03), (3, 0.1), (5, 0.3)):
        for prompt in (left_padded(LENGTHS, seed), words(3, 5, seed=seed)):
            plain, quick = (lossless_decode(*pair(kind, seed, std), prompt, 11, B, rule)
                            for kind in (GPT, FastGPT))
            for a, b in zip(plain, quick):
                assert torch.equal(a, b)
            seen |= set(plain[2].tolist())
    assert len(seen) > 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_text_is_that_of_ar_too():
    for seed in (0, 3):
        teacher, student = (model.cuda() for model in pair(FastGPT, seed))
        prompt = left_padded(LENGTHS, seed)
        tokens, _, _ = lossless_decode(teacher, student, prompt.cuda(), 11, 4, Threshold(0.6))
        assert torch.equal(tokens.cpu(), ar_decode(tiny_gpt(seed), prompt, 11)[0])


def test_a_quick_model_is_given_to_the_quick_twin():
    assert lossless_decode.dispatch(FastGPT).__module__ == "fast.lossless"
    assert lossless_decode.dispatch(GPT).__module__ == "ours.lossless"


def test_at_block_size_1_a_model_verifies_itself_in_one_forward(kind):
    model, prompt = tiny_gpt(kind=kind), left_padded(LENGTHS)
    tokens, drafts, verifies = lossless_decode(model, model, prompt, 12, 1, AT_ONCE)
    assert (verifies == 1).all() and torch.equal(drafts, (tokens != PAD).sum(1))


@torch.no_grad()
def test_a_draft_goes_on_from_its_beginning():
    student, prompt, rule = tiny_gpt(), left_padded(LENGTHS), Threshold(0.6)
    whole = plain_decode(student, prompt, 12, 4, rule)
    nothing = torch.full_like(whole.filled, MASK)
    decoded, _ = draft(student, prompt, nothing, 4, rule, Sampling())
    assert torch.equal(decoded.filled, whole.filled)
    given = torch.where(torch.arange(12) < 4, whole.filled, MASK)  # the first block
    decoded, _ = draft(student, prompt, given, 4, rule, Sampling())
    assert torch.equal(decoded.filled, whole.filled)
    other = torch.where(torch.arange(12) < 6, words(6, 12), MASK)  # half the second
    decoded, _ = draft(student, prompt, other, 4, rule, Sampling())
    assert torch.equal(decoded.filled[:, :6], other[:, :6])


@torch.no_grad()
def test_what_differs_is_replaced_and_what_follows_is_dropped():
    teacher, prompt = tiny_gpt(0), left_padded(LENGTHS)
    right = ar_decode(teacher, prompt, 12)[0]
    row = int((right != PAD).sum(1).argmax())
    prompt, right = prompt[row:row + 1], right[row:row + 1]
    length = int((right != PAD).sum())
    assert length > 5
    text = torch.full_like(right, MASK)
    for at in range(length):
        wrong = torch.where(right == PAD, MASK, right)
        wrong[0, at] = 3 if right[0, at] != 3 else 4
        q = F.one_hot(wrong, VOCAB).double() * (wrong != MASK)[..., None]
        accepted = verify(teacher, prompt, text, wrong, q, Sampling())
        assert torch.equal(accepted[0, :at + 1], right[0, :at + 1])
        assert (accepted[0, at + 1:] == MASK).all()


# --- At a temperature -------------------------------------------------------------------------

def test_slots_are_in_order_if_nothing_to_their_right_came_first():
    step = torch.tensor([[0, 0, 1, 1,  0, 2, 1, 3,  1, 0, 0, 0,  -1, -1, 2, 1]])
    expected = [1, 1, 1, 1,  1, 0, 1, 1,  0, 1, 1, 1,  1, 1, 0, 1]
    assert in_order(step, 4)[0].int().tolist() == expected


SMALL = EOS + 3  # a vocabulary of [EOS] and two words


class Copier:
    """A student whose slots like to repeat the token to their right, if it is there."""
    embed = torch.nn.Embedding(SMALL, 1).double()

    def logits(self, hidden):
        return hidden


@predict_blocks.register
def copier_blocks(model: Copier, prompt, clean, noised, block):
    right = F.pad(noised[..., 1:], (0, 1), value=MASK)            # (N, M, B)
    logits = 3 * F.one_hot(right, SMALL).double()
    logits[..., :EOS] = -1e4
    return logits


@dataclass(frozen=True)
class Backwards:
    """Commits the first slot, then from the right."""

    def choose(self, logp, open_, forced):
        last = open_ & (open_.flip(1).cumsum(1).flip(1) == 1)
        return torch.where(forced.any(1, keepdim=True), forced, last)


def exact(model, prompt, length, temperature):
    """AR's probability of every text of `length` tokens, [PAD] after [EOS]: {tokens: p}."""
    vocab = [t for t in range(len(model.embed.weight)) if t not in (PAD, MASK)]
    found = {}
    for text in itertools.product(vocab, repeat=length):
        tokens = torch.tensor([text])
        logits = model.logits(causal_hidden(model, prompt, tokens))
        p = distribution(logits, temperature).gather(-1, tokens[..., None])[0, :, 0]
        n = text.index(EOS) + 1 if EOS in text else length
        key = text[:n] + (PAD,) * (length - n)
        found[key] = found.get(key, 0) if key in found else float(p[:n].prod())
    return found


def surprise(teacher, student, B, rule, n=4000, temperature=1.3):
    """How far n texts of 4 tokens are from AR's distribution: chi-square, in standard deviations
    from what it is by chance."""
    prompt = words(1, 3, vocab=SMALL)
    p = exact(teacher, prompt, 4, temperature)
    assert abs(sum(p.values()) - 1) < 1e-9 and max(p.values()) < 0.5
    tokens, _, _ = lossless_decode(teacher, student, prompt.expand(n, -1), 4, B, rule,
                                   Sampling(temperature, gen()))
    counts = dict.fromkeys(p, 0)
    for row in tokens.tolist():
        counts[tuple(row)] += 1
    expected, observed = (torch.tensor([x[key] for key in p]).double() for x in (p, counts))
    expected *= n
    rare = expected < 5                                           # together they are one text
    expected, observed = (torch.cat((x[~rare], x[rare].sum()[None])) for x in (expected, observed))
    chi2 = ((observed - expected) ** 2 / expected.clamp(min=1)).sum()
    free = len(expected) - 1
    return float((chi2 - free) / (2 * free) ** 0.5)


def flat_teacher():
    teacher = tiny_gpt(0, SMALL)
    teacher.embed.weight.data *= 0.4
    return teacher


@pytest.mark.parametrize("B, rule", [
    (2, Threshold(0.6)), (2, Backwards()), (4, AT_ONCE), (4, Threshold(0.6))], ids=str)
@torch.no_grad()
def test_at_a_temperature_texts_have_ars_distribution(B, rule):
    for student in (tiny_gpt(3, SMALL), Copier()):
        assert surprise(flat_teacher(), student, B, rule) < 5


@torch.no_grad()
def test_they_would_not_if_slots_were_accepted_out_of_order(monkeypatch):
    monkeypatch.setattr(ours.lossless, "in_order", lambda step, B: torch.ones_like(step).bool())
    assert surprise(flat_teacher(), Copier(), 4, AT_ONCE) < 5
    assert surprise(flat_teacher(), Copier(), 4, Backwards()) > 20


@torch.no_grad()
def test_a_quick_model_draws_as_the_plain_one():
    prompt, texts = left_padded(LENGTHS), []
    for kind in (GPT, FastGPT):
        teacher, student = pair(kind)
        texts.append(lossless_decode(teacher, student, prompt, 11, 4, Threshold(0.6),
                                     Sampling(0.7, gen())))
    for a, b in zip(*texts):
        assert torch.equal(a, b)
