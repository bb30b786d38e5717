"""fast/ computes what the lesson computes: every quick twin against its plain function.

In float64, on the CPU, with the same weights. What the decoders of a GPU record and replay runs
here as it is. (tests/test_diffusion.py and tests/test_sampler.py hold both against loops.)"""
import math

import pytest
import torch
import torch.nn.functional as F

from config import Config
from conftest import LENGTHS, VOCAB, close, gen, left_padded, same_decode, tiny_gpt, words
from data import ANSWER, EOS, MASK, PAD
from diffusion import block_mask, every_block, predict_blocks, replay_logp
from fast.decode import graph_ar_decode, graph_block_decode, widened
from fast.gpt import (FastGPT, SlotCache, fast_replay_logp, rms_norm,
                      shared_mask)
from fast.graphs import KEPT, RECORDED
from model import GPT, Sampling, ar_decode, causal_hidden, causal_mask
from ours.commit import Apart
from rules import Factor, Steps
from sampler import Decoded, Threshold, block_decode, plain_decode
from train_cft import cft_loss

LABELS = range(3, VOCAB)
RULES = [Threshold(0.3), Threshold(0.6), Threshold(1.5), Apart(0.6, 0.4), Apart(1.5, 0.4),
         Apart(0.5, 0.1), Apart(0.3, 0.4, LABELS), Factor(1.2), Steps(2)]
TEMPERATURES = [0.0, 1.0, 0.7]


def both(seed=0, **more):
    """The plain and the quick model of the same weights."""
    return tiny_gpt(seed, **more), tiny_gpt(seed, kind=FastGPT, **more)


def same_gradients(a, b, models):
    """That two scalars and their gradients in the two models are the same."""
    close(a, b)
    gradients = [torch.autograd.grad(x, list(m.parameters())) for x, m in zip((a, b), models)]
    for x, y in zip(*gradients):
        close(x, y)


def weighted(x):
    """A sum of all numbers of x, weighed at random."""
    return (x * torch.randn(x.shape, generator=gen(9), dtype=x.dtype)).sum()


# --- Weights ----------------------------------------------------------------------------------

def test_a_fast_model_has_the_same_weights_and_first_draws():
    models = []
    for kind in (GPT, FastGPT):
        torch.manual_seed(5)
        models.append(kind(VOCAB, n_layer=3, n_head=2, d_model=16))
    plain, quick = (model.state_dict() for model in models)
    assert list(plain) == list(quick) and all(torch.equal(plain[k], quick[k]) for k in plain)


@pytest.mark.parametrize("function", [causal_hidden, predict_blocks, replay_logp, ar_decode,
                                      block_decode], ids=lambda f: f.__name__)
def test_a_fast_model_is_given_to_the_quick_twin(function):
    assert function.dispatch(FastGPT).__module__.startswith("fast.")
    assert not function.dispatch(GPT).__module__.startswith("fast.")


# --- Forwards ---------------------------------------------------------------------------------

@pytest.mark.parametrize("last", [0, 1, 4])
def test_the_forward_is_the_same_and_gives_the_last_slots(last):
    models, tokens = both(), words(3, 9)
    pad = torch.tensor([[0], [2], [5]])
    positions = (torch.arange(9) - pad).clamp(min=0)
    mask = causal_mask(pad, 0, 9)
    plain = models[0](tokens, positions, mask)[:, -last:]
    quick = models[1](tokens, positions, mask, last=last)
    same_gradients(weighted(plain), weighted(quick), models)


def test_hidden_states_that_predict_a_response_are_the_same():
    models, prompt = both(), left_padded(LENGTHS)
    plain, quick = (causal_hidden(m, prompt, words(len(LENGTHS), 7, seed=1)) for m in models)
    close(plain, quick)
    same_gradients(weighted(plain), weighted(quick), models)


@pytest.mark.parametrize("B", [1, 2, 3, 4, 6, 12])
@pytest.mark.parametrize("n_segments", [1, 5])
def test_hidden_states_that_predict_segments_are_the_same(B, n_segments):
    models, prompt, N = both(), left_padded(LENGTHS), len(LENGTHS)
    clean = words(N, 12, seed=1)
    clean[2, 5:] = EOS
    block = torch.randint(12 // B, (N, n_segments), generator=gen())
    masked = torch.rand(N, n_segments, B, generator=gen(1)) < 0.5
    noised = torch.where(masked, MASK, words(N, n_segments, B, seed=2))
    plain, quick = (predict_blocks(m, prompt, clean, noised, block) for m in models)
    assert quick.shape == (N, n_segments, B, 16)
    close(plain, quick)
    same_gradients(weighted(plain), weighted(quick), models)


@pytest.mark.parametrize("B", [1, 3, 4])
@pytest.mark.parametrize("settings", [
    dict(cft_first_step=0.0, answer_states=0, cft_misplace=0.0),
    dict(cft_misplace=0.6, cft_penalty=5.0)], ids=["paper", "ours"])
def test_the_cft_loss_is_the_same(B, settings):
    cfg = Config(bfloat16=False, block_size=B, **settings)
    models, prompt = both(), left_padded(LENGTHS)
    response = words(len(LENGTHS), 10, seed=1)
    response[:, 3] = ANSWER
    response[1, 7:], response[4, 5:] = PAD, PAD
    plain, quick = (cft_loss(cfg, m, prompt, response, gen()) for m in models)
    same_gradients(plain, quick, models)


@pytest.mark.parametrize("P, R, B, blocks", [
    (3, 6, 2, [[0, 1, 2], [2, 2, 0]]), (1, 4, 1, [[3, 0]]), (2, 6, 3, [[], []]),
    (4, 8, 4, [[1], [0], [1]])])
def test_the_shared_mask_is_block_mask_over_prompt_and_clean_text(P, R, B, blocks):
    block = torch.tensor(blocks, dtype=torch.long).view(len(blocks), -1)
    whole = block_mask(P, R, B, block)
    assert torch.equal(shared_mask(P, R, B, block), whole[:, :, :P + R])
    # Of the rest each segment sees itself, and no one else sees it.
    n = block.shape[1] * B
    segment = torch.arange(n) // B
    own = (segment[:, None] == segment).expand(len(block), n, n)
    assert torch.equal(whole[:, P + R:, P + R:], own) and not whole[:, :P + R, P + R:].any()


@pytest.mark.parametrize("B", [1, 4])
def test_in_bfloat16_both_are_near_what_they_are_in_float32(B):
    models, prompt = both(dtype=torch.float32), left_padded(LENGTHS)
    clean = words(len(LENGTHS), 12, seed=1)
    masked = torch.rand(len(LENGTHS), 12 // B, B, generator=gen()) < 0.5
    noised = torch.where(masked, MASK, clean.view(len(LENGTHS), -1, B))

    def logits(model):
        blocks = predict_blocks(model, prompt, clean, noised, every_block(clean, B))
        return (model.logits(causal_hidden(model, prompt, clean)), model.logits(blocks))

    exact = logits(models[0])
    for model in models:
        with torch.autocast("cpu", torch.bfloat16):
            rounded = logits(model)
        for a, b in zip(rounded, exact):
            assert a.dtype == torch.float32
            off = (a[..., EOS:] - b[..., EOS:]).abs()
            assert 0 < off.mean() < 0.05 * b[..., EOS:].std()


def test_a_cache_that_is_written_at_slots_or_at_indices_is_the_same():
    model = tiny_gpt(kind=FastGPT)                                # 2 layers, 2 heads of 8
    a, b = SlotCache(model, 3, 8), SlotCache(model, 3, 8)
    k, v = torch.randn(2, 3, 2, 2, 8, generator=gen(), dtype=torch.float64)
    for place, new in zip(a.at(slice(4, 6))[1], (k, v)):
        place.copy_(new)
    b.write(1, k, v, torch.tensor([[4, 5]]).expand(3, 2))
    assert torch.equal(a.k, b.k) and torch.equal(a.v, b.v)
    got_k, got_v = a.at(slice(0, 6))[1]
    assert torch.equal(got_k[:, :, 4:], k) and torch.equal(got_v[:, :, 4:], v)
    assert not a.k[0].any() and not a.k[1, :, :, :4].any()
    b.write(1, k, v, torch.tensor([[7, 2], [0, 1], [1, 0]]))      # any order
    assert torch.equal(b.k[1, 0, :, [7, 2]], k[0]) and torch.equal(b.v[1, 2, :, [1, 0]], v[2])


def test_a_cache_of_some_rows_is_a_copy_and_can_be_put_back():
    model = tiny_gpt(kind=FastGPT)
    cache = SlotCache(model, 3, 8)
    cache.k.normal_(generator=gen())
    before, rows = cache.k.clone(), torch.tensor([2, 0])
    part = cache.of(rows, 6)
    assert torch.equal(part.k, before[:, rows, :, :6])
    k, v = torch.randn(2, 2, 2, 3, 8, generator=gen(1), dtype=torch.float64)
    part.write(1, k, v, torch.arange(3, 6).expand(2, -1))
    assert torch.equal(cache.k, before)
    cache.put(rows, part, slice(3, 5))
    assert torch.equal(cache.k[1, rows, :, 3:5], k[:, :, :2])
    assert torch.equal(cache.v[1, rows, :, 3:5], v[:, :, :2])
    cache.k[1, rows, :, 3:5] = before[1, rows, :, 3:5]
    assert torch.equal(cache.k, before)                           # nothing else has changed


@pytest.mark.parametrize("N, T", [(1, 1), (3, 1), (3, 4)])
@torch.no_grad()
def test_a_forward_without_a_mask_is_one_that_sees_everything(N, T):
    models, tokens = both(), words(N, 9)
    slot = torch.arange(9).expand(N, -1)
    seen = torch.ones(N, 1, 9, 9, dtype=torch.bool)
    seen[:, :, :9 - T] = torch.ones(9 - T, 9).tril().bool()
    plain = models[0](tokens, slot, seen)[:, -T:]
    for mask in (seen[:, :, -T:], None):
        cache, first = SlotCache(models[1], N, 12), slice(0, 9 - T)
        models[1](tokens[:, first], slot[:, first], seen[:, :, first, first], cache, first, 9 - T)
        rest = slice(9 - T, 9)
        for positions in (rest, slot[:, rest]):
            close(models[1](tokens[:, rest], positions, mask, cache, rest, 9), plain)


@torch.no_grad()
def test_both_norms_are_the_same_however_small_the_numbers():
    model = tiny_gpt(kind=FastGPT, dtype=torch.float32)
    cache = SlotCache(model, 1, 1)
    for scale in (0.0, 1e-5, 1e-3, 1.0, 1e3):
        x = scale * torch.randn(5, 16, generator=gen())
        quick = rms_norm(x, cache.last_gain, cache.least)
        close(quick, model.norm(x), 1e-5)


# --- Replay -----------------------------------------------------------------------------------

@pytest.mark.parametrize("B", [1, 2, 3, 4])
@pytest.mark.parametrize("rule, temperature", [
    (Threshold(0.6), 0.0), (Threshold(0.4), 1.0), (Threshold(1.5), 0.7),
    (Apart(0.5, 0.1, LABELS), 1.0), (Factor(1.2), 1.0)], ids=str)
def test_what_one_model_wrote_the_other_replays(B, rule, temperature):
    for seed in (0, 3):
        models, prompt = both(seed), left_padded(LENGTHS, seed)
        for writer in models:
            sampling = Sampling(temperature, gen(seed))
            decoded = block_decode(writer, prompt, 12, B, rule, sampling)
            for reader in models:
                close(replay_logp(reader, prompt, decoded, B, temperature), decoded.logp)
            for max_segments in (1, 5):
                parts = fast_replay_logp(models[1], prompt, decoded, B, temperature, max_segments)
                close(parts, decoded.logp)


@pytest.mark.parametrize("B", [1, 4])
def test_replays_have_the_same_gradient_however_many_segments_go_together(B):
    models, prompt = both(3), left_padded(LENGTHS, 3)
    decoded = block_decode(models[0], prompt, 12, B, Threshold(0.9), Sampling(1.0, gen()))
    for max_segments in (1, 3, 16):
        plain = replay_logp(models[0], prompt, decoded, B, 1.0)
        quick = fast_replay_logp(models[1], prompt, decoded, B, 1.0, max_segments)
        same_gradients(weighted(plain), weighted(quick), models)


class Counted:
    """Counts the rows of every forward of a model."""

    def __init__(self, model):
        self.rows, self.forward = [], model.forward
        model.forward = self

    def __call__(self, tokens, *args, **more):
        self.rows.append(len(tokens))
        return self.forward(tokens, *args, **more)


def test_rows_that_took_fewer_steps_leave_the_replay():
    model, prompt = tiny_gpt(3, kind=FastGPT), left_padded(LENGTHS, 3)
    decoded = block_decode(model, prompt, 12, 4, Threshold(0.9))
    seen = Counted(model)
    fast_replay_logp(model, prompt, decoded, 4, max_segments=1)
    steps = torch.where(decoded.tokens == PAD, -1, decoded.commit_step).view(-1, 3, 4)
    assert sum(seen.rows) == (steps.amax(-1) + 1).sum() and len(set(seen.rows)) > 1


def test_states_of_a_model_that_changed_since_replay_alike():
    models, prompt = both(0), left_padded(LENGTHS)
    decoded = block_decode(tiny_gpt(3), prompt, 12, 4, Threshold(0.5), Sampling(1.0, gen()))
    plain, quick = (replay_logp(m, prompt, decoded, 4, 1.0) for m in models)
    close(plain, quick)
    assert (plain - decoded.logp).abs().max() > 0.1


# --- Decoders ---------------------------------------------------------------------------------

@pytest.mark.parametrize("seed", [0, 3, 4, 5])
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_ar_writes_and_draws_the_same(seed, temperature):
    models, prompt = both(seed), left_padded(LENGTHS, seed)
    plain, quick = (ar_decode(m, prompt, 12, Sampling(temperature, gen(seed))) for m in models)
    assert torch.equal(plain[0], quick[0]) and torch.equal(plain[2], quick[2])
    close(plain[1], quick[1])


@pytest.mark.parametrize("B", [1, 2, 3, 4, 16])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_blocks_are_written_the_same(B, rule):
    for seed in (0, 3, 5):
        models, prompt = both(seed), left_padded(LENGTHS, seed)
        quick = block_decode(models[1], prompt, 11, B, rule)
        assert quick.tokens.shape[1] == math.ceil(11 / B) * B
        same_decode(plain_decode(models[0], prompt, 11, B, rule), quick)
        same_decode(block_decode(models[0], prompt, 11, B, rule), quick)


@pytest.mark.parametrize("B", [1, 2, 4])
@pytest.mark.parametrize("rule", [Threshold(0.5), Apart(0.5, 0.1), Apart(0.5, 0.4, LABELS)],
                         ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_one_row_draws_the_same_blocks(B, rule, temperature):
    """In a batch the draws come in another order: rows that wait draw nothing."""
    ends = set()
    for seed in (0, 3, 4, 5):
        models, prompt = both(seed), words(1, 4, seed=seed)
        plain, uncached, quick = (
            decode(m, prompt, 12, B, rule, Sampling(temperature, gen(seed)))
            for decode, m in ((block_decode, models[0]), (plain_decode, models[0]),
                              (block_decode, models[1])))
        same_decode(plain, quick)
        same_decode(uncached, quick)
        ends.add(int((quick.tokens != PAD).sum()))
    assert len(ends) > 1


def test_decoding_leaves_no_gradient(kind):
    model, prompt = tiny_gpt(kind=kind), left_padded(LENGTHS)
    for decode in (plain_decode, block_decode):
        assert not decode(model, prompt, 6, 3, Threshold(0.5)).logp.requires_grad
    assert not ar_decode(model, prompt, 6)[1].requires_grad


def test_rows_that_have_finished_a_block_leave_the_forward():
    model, prompt = tiny_gpt(kind=FastGPT), left_padded(LENGTHS)
    seen = Counted(model)
    decoded = block_decode(model, prompt, 12, 4, Threshold(0.6))
    assert sum(seen.rows) == decoded.forwards.sum() and len(set(seen.rows)) > 2


@pytest.mark.parametrize("B", [1, 2, 3])
def test_after_a_given_prefix_the_sampler_goes_on_as_if_it_had_written_it(B):
    model, prompt, rule = tiny_gpt(kind=FastGPT), left_padded(LENGTHS), Threshold(0.6)
    whole = block_decode(model, prompt, 12, B, rule)
    long = ((whole.tokens != PAD).sum(1) > B).nonzero()[:, 0]
    assert len(long) > 2
    prefix = whole.filled[long, :B]
    after = block_decode(model, prompt[long], 12, B, rule, prefix=prefix)
    assert torch.equal(after.tokens, whole.tokens[long])
    close(after.logp[:, B:], whole.logp[long, B:])
    other = torch.where(prefix == 3, 4, 3)
    forged = block_decode(model, prompt[long], 12, B, rule, prefix=other)
    assert torch.equal(forged.filled[:, :B], other)
    assert not torch.equal(forged.tokens, after.tokens)


def test_a_constraint_reaches_the_right_rows_and_slots_when_rows_have_left():
    lengths = torch.tensor([3, 9, 1, 6, 7, 5])  # of the responses that it dictates, with [EOS]

    def word(n, i):
        return torch.where(i == lengths[n] - 1, EOS, 3 + (2 * n + i) % (VOCAB - 3))

    def constrain(logits, response, slots, rows):
        want = word(rows[:, None], slots)
        written = word(rows[:, None], torch.arange(response.shape[1]))
        before = torch.arange(response.shape[1]) < lengths[rows][:, None]
        assert ((response == MASK) | (response == written) | ~before).all()
        return torch.full_like(logits, -1e4).scatter(-1, want[..., None], 0.0)

    model, prompt = tiny_gpt(kind=FastGPT), left_padded(LENGTHS)
    decoded = block_decode(model, prompt, 12, 4, Threshold(0.9), constrain=constrain)
    n, i = torch.arange(6)[:, None], torch.arange(12)[None]
    assert torch.equal(decoded.tokens, torch.where(i < lengths[:, None], word(n, i), PAD))


# --- Decoders of fixed shapes -----------------------------------------------------------------
# On a GPU their steps are recorded and replayed; here the same functions run as they are.

@pytest.mark.parametrize("B", [1, 2, 3, 4])
@pytest.mark.parametrize("rule", RULES, ids=str)
@torch.no_grad()
def test_blocks_of_fixed_shapes_are_written_the_same(B, rule):
    R = math.ceil(11 / B) * B
    for seed in (0, 3, 4):
        models, prompt = both(seed), left_padded(LENGTHS, seed)
        plain = block_decode(models[0], prompt, 11, B, rule)
        for _ in range(2):  # the second time in the memory of the first
            same_decode(plain, graph_block_decode(models[1], prompt, R, B, rule))
    assert len(RECORDED) <= KEPT


@pytest.mark.parametrize("seed", [0, 3, 4])
@torch.no_grad()
def test_ar_of_fixed_shapes_writes_the_same(seed):
    models = both(seed)
    for lengths in (LENGTHS, [6, 6, 1, 2, 3, 1]):  # other prompts in the same memory
        prompt = left_padded(lengths, seed)
        plain = ar_decode(models[0], prompt, 12)
        for _ in range(2):
            fixed = graph_ar_decode(models[1], prompt, 12)
            assert torch.equal(plain[0], fixed[0]) and torch.equal(plain[2], fixed[2])
            close(plain[1], fixed[1])
    assert len(RECORDED) <= KEPT


def test_prompts_are_widened_on_the_left_to_a_multiple_of_32():
    for width, wider in ((1, 32), (32, 32), (33, 64)):
        prompt = words(2, width)
        wide = widened(prompt)
        assert wide.shape == (2, wider) and torch.equal(wide[:, -width:], prompt)
        assert (wide[:, :-width] == PAD).all()


@torch.no_grad()
def test_results_stay_when_their_memory_is_used_again():
    model, rule = tiny_gpt(kind=FastGPT), Threshold(0.9)
    first = graph_block_decode(model, left_padded(LENGTHS), 12, 3, rule)
    kept = Decoded(*(x.clone() for x in vars(first).values()))
    graph_block_decode(model, left_padded(LENGTHS, 7), 12, 3, rule)
    same_decode(first, kept)


@torch.no_grad()
def test_nothing_of_a_longer_text_is_left_in_the_memory_of_a_shorter_one():
    model, prompt, rule = tiny_gpt(kind=FastGPT), words(40, 4), Threshold(0.9)
    texts = ar_decode(model, prompt, 24)
    blocks = block_decode(model, prompt, 24, 3, rule)
    for tokens in (texts[0], blocks.tokens):
        length = (tokens != PAD).sum(1)
        order = length.argsort()
        assert length[order[3]] < 8 and length[order[-4]] > 16
        for rows in (order[-4:], order[:4]):
            for whole, fixed in zip(texts, graph_ar_decode(model, prompt[rows], 24)):
                close(whole[rows], fixed)
            fixed = graph_block_decode(model, prompt[rows], 24, 3, rule)
            same_decode(blocks.take(rows), fixed)


@torch.no_grad()
def test_fixed_shapes_serve_weights_that_changed_in_place():
    model, prompt, rule = tiny_gpt(kind=FastGPT), left_padded(LENGTHS), Threshold(0.6)
    before = graph_block_decode(model, prompt, 12, 4, rule)
    for p, other in zip(model.parameters(), tiny_gpt(3).parameters()):
        p.copy_(other)
    after = graph_block_decode(model, prompt, 12, 4, rule)
    assert not torch.equal(before.tokens, after.tokens)
    same_decode(after, block_decode(tiny_gpt(3), prompt, 12, 4, rule))


@pytest.mark.parametrize("rule", [Threshold(0.5), Apart(0.5, 0.1), Apart(0.5, 0.4, LABELS)],
                         ids=str)
def test_fixed_shapes_draw_by_the_seed_and_replay_to_what_they_recorded(rule):
    models, prompt = both(), left_padded(LENGTHS)

    @torch.no_grad()
    def draw(seed, temperature=1.0):
        sampling = Sampling(temperature, gen(seed))
        return graph_block_decode(models[1], prompt, 12, 3, rule, sampling)

    a, b, c, cool = draw(1), draw(1), draw(2), draw(1, 0.7)
    same_decode(a, b)
    assert not torch.equal(a.tokens, c.tokens)
    for model in models:
        close(replay_logp(model, prompt, a, 3, 1.0), a.logp)
        close(replay_logp(model, prompt, cool, 3, 0.7), cool.logp)


def test_ar_of_fixed_shapes_draws_by_the_seed_and_records_its_log_probabilities():
    models, prompt = both(), left_padded(LENGTHS)

    @torch.no_grad()
    def draw(seed):
        return graph_ar_decode(models[1], prompt, 10, Sampling(0.7, gen(seed)))

    (tokens, logp, forwards), (again, _, _), (other, _, _) = draw(1), draw(1), draw(2)
    assert torch.equal(tokens, again) and not torch.equal(tokens, other)
    assert torch.equal(forwards, (tokens != PAD).sum(1))
    every = F.log_softmax(models[0].logits(causal_hidden(models[0], prompt, tokens)) / 0.7, -1)
    exact = every.gather(-1, tokens[..., None])[..., 0]
    close(logp, torch.where(tokens == PAD, 0.0, exact))


@torch.no_grad()
def test_the_states_of_a_few_decodes_are_kept_and_no_more():
    model, prompt = tiny_gpt(kind=FastGPT), left_padded(LENGTHS)
    RECORDED.clear()
    for n in range(KEPT + 2):
        graph_block_decode(model, prompt, 4, 4, Threshold(0.1 * (n + 1)))
        assert len(RECORDED) == min(n + 1, KEPT)
    taus = [key[-2].tau for key in RECORDED]
    newest = [0.1 * (n + 1) for n in range(KEPT + 2)][2:]
    assert taus == pytest.approx(newest)  # the oldest go first


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_on_a_gpu_recorded_steps_write_what_the_cpu_writes(temperature):
    for seed in (0, 3):
        models, prompt = both(seed), left_padded(LENGTHS, seed)
        quick = models[1].cuda()
        for rule in (Threshold(0.6), Apart(0.5, 0.1, LABELS)):
            for _ in range(3):  # as it is, recorded, replayed
                sampling = Sampling(temperature, gen(seed))
                there = block_decode(quick, prompt.cuda(), 12, 4, rule, sampling)
                there = Decoded(*(getattr(there, name).cpu() for name in vars(there)))
                close(replay_logp(models[0], prompt, there, 4, temperature), there.logp)
                if not temperature:
                    same_decode(there, block_decode(models[0], prompt, 12, 4, rule))
        for _ in range(3):
            tokens, logp, _ = ar_decode(quick, prompt.cuda(), 12, Sampling(temperature, gen()))
            if not temperature:
                assert torch.equal(tokens.cpu(), ar_decode(models[0], prompt, 12)[0])
