"""Invariants of sampler.py. Where two computations must agree they run in float64.

Tests with `kind` run for the plain model and for its quick twin (fast/)."""
import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from conftest import (LENGTHS, VOCAB, block_hidden, close, gen, left_padded, same_decode,
                      stream_hidden, tiny_gpt, words)
from data import EOS, MASK, PAD
from diffusion import predict_blocks, replay_logp
from model import Sampling, ar_decode
from ours.commit import Apart
from rules import Factor, Steps
from sampler import NEVER, Decoded, Threshold, block_decode, finished, plain_decode

RULES = [Apart(0.6, 0.4), Apart(1.5, 0.4), Apart(0.5, 0.1), Apart(0.4, 0.4, range(3, VOCAB)),
         Threshold(0.3), Threshold(0.6), Threshold(0.9), Threshold(1.5),
         Factor(0.5), Factor(1.2), Factor(3.0), Steps(2)]


# --- Which slots to commit --------------------------------------------------------------------

def said(confidence, vocab=1000):
    """Log-probabilities (N, B, vocab): slot j says word j with its confidence (N, B), and the
    others share the rest."""
    N, B = confidence.shape
    rest = ((1 - confidence) / (vocab - 1))[..., None].expand(-1, -1, vocab)
    word = torch.arange(B).expand(N, -1)[..., None]
    return rest.scatter(2, word, confidence[..., None]).log()


@pytest.mark.parametrize("tau, confidence, open_, chosen", [
    (0.5, [.6, .5, .9, .51], [1, 1, 1, 1], [1, 0, 1, 1]),  # above tau, not at it
    (0.5, [.6, .9, .4, .51], [0, 0, 1, 1], [0, 0, 0, 1]),
    (1.5, [.6, .9, .4, .51], [1, 1, 1, 1], [0, 1, 0, 0]),  # at least the best ...
    (1.5, [.6, .9, .4, .51], [1, 0, 1, 1], [1, 0, 0, 0]),  # ... of the open ones
    (0.1, [.6, .9, .4, .51], [0, 0, 0, 0], [0, 0, 0, 0])])
def test_choose_by_hand(tau, confidence, open_, chosen):
    confidence, open_ = torch.tensor([confidence]), torch.tensor([open_]).bool()
    none, rule = torch.zeros_like(open_), Threshold(tau)
    assert rule.choose(said(confidence), open_, none).int().tolist() == [chosen]
    closed_high = torch.where(open_, confidence, 0.999)  # what closed slots show does not matter
    assert rule.choose(said(closed_high), open_, none).int().tolist() == [chosen]
    flip = rule.choose(said(confidence.flip(1)), open_.flip(1), none)
    assert flip.int().tolist() == [chosen[::-1]]
    two, both_open = torch.cat((confidence.flip(1), confidence)), torch.cat((open_.flip(1), open_))
    both = rule.choose(said(two), both_open, torch.zeros_like(both_open))
    assert both.int().tolist() == [chosen[::-1], chosen]


def test_a_forced_slot_is_committed_and_stands_for_the_best():
    logp, open_ = said(torch.tensor([[.1, .6, .5]])), torch.ones(1, 3, dtype=torch.bool)
    forced = torch.tensor([[True, False, False]])
    assert Threshold(0.9).choose(logp, open_, forced).tolist() == [[True, False, False]]
    assert Threshold(0.55).choose(logp, open_, forced).tolist() == [[True, True, False]]


# --- The decoders -----------------------------------------------------------------------------

def chosen_slots(rule, p, ranked, step, B):
    """What a rule commits, by loops: p (B, V) probabilities, ranked: the open slots, surest
    first. At least one slot: slot 0 in the first step, then the surest."""
    conf, best = p.max(-1)
    conf, best = conf.tolist(), best.tolist()
    chosen = {0} if step == 0 else {ranked[0]}
    if isinstance(rule, Threshold):
        chosen |= {j for j in ranked if conf[j] > rule.tau}
    elif isinstance(rule, Steps):
        chosen |= set(ranked[:math.ceil(B / rule.steps)])
    elif isinstance(rule, Factor):
        for n in range(1, len(ranked) + 1):
            if (n + 1) * (1 - conf[ranked[n - 1]]) < rule.tau:
                chosen |= set(ranked[:n])
    else:
        first = [0] if step == 0 else []  # forced ones go first
        sure = first + [j for j in ranked if conf[j] > rule.tau and j not in first]
        labels = rule.labels or ()
        chosen = {j for n, j in enumerate(sure)
                  if best[j] not in labels or all(best[i] != best[j] for i in sure[:n])}
        if not sure:
            chosen = {j for n, j in enumerate(ranked)
                      if all(p[i] @ p[j] <= rule.clash and best[i] != best[j]
                             for i in ranked[:n])}
    return chosen


def open_of(block):
    """The open slots of a block, a list."""
    end = block.index(EOS) if EOS in block else len(block)
    return [j for j in range(end) if block[j] == MASK]


@torch.no_grad()
def reference_decode(model, prompt, max_len, B, rule):
    """One unpadded row by lists and loops, without a cache: every step reads [prompt; finished
    blocks; block] anew -> the fields of Decoded."""
    R = math.ceil(max_len / B) * B
    filled, steps, logps, forwards = [MASK] * R, [NEVER] * R, [0.0] * R, 0
    for begin in range(0, R, B):
        block, step = [MASK] * B, 0
        while open_of(block):
            hidden = block_hidden(model, prompt, torch.tensor(filled), torch.tensor(block), B,
                                  begin // B)
            logp = F.log_softmax(model.logits(hidden), -1)        # (B, V)
            highest = logp.amax(-1).tolist()
            ranked = sorted(open_of(block), key=lambda j: -highest[j])
            for j in chosen_slots(rule, logp.exp(), ranked, step, B):
                block[j] = filled[begin + j] = int(logp[j].argmax())
                steps[begin + j], logps[begin + j] = step, highest[j]
            step, forwards = step + 1, forwards + 1
        if EOS in block:
            break
    end = filled.index(EOS) + 1 if EOS in filled else R
    tokens = filled[:end] + [PAD] * (R - end)
    logps = logps[:end] + [0.0] * (R - end)
    return Decoded(*map(torch.tensor, (tokens, filled, steps)),
                   torch.tensor(logps, dtype=torch.float64), torch.tensor(forwards))


@pytest.mark.parametrize("B", [1, 2, 3, 4])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_with_and_without_a_cache_it_is_the_reference_of_loops(B, rule, kind):
    for seed in (0, 3):
        model, prompt = tiny_gpt(seed, kind=kind), left_padded(LENGTHS, seed)
        plain = plain_decode(model, prompt, 11, B, rule)          # 11: not whole blocks
        cached = block_decode(model, prompt, 11, B, rule)
        same_decode(plain, cached)
        for n, length in enumerate(LENGTHS):
            alone = reference_decode(model, prompt[n, -length:], 11, B, rule)
            same_decode(cached.take(n), alone)


@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("rule", [Threshold(0.4), Apart(0.5, 0.1)], ids=str)
def test_drawn_tokens_need_no_cache_either(rule, temperature):
    model, prompt = tiny_gpt(3), left_padded(LENGTHS, 3)
    for B in (1, 3, 4):
        a, b = (decode(model, prompt, 12, B, rule, Sampling(temperature, gen(B)))
                for decode in (plain_decode, block_decode))
        same_decode(a, b)
        assert (a.commit_step[:, 1:] > 0).any() or B == 1


@pytest.mark.parametrize("B", [1, 2, 3, 4])
@pytest.mark.parametrize("rule", [Threshold(0.6), Factor(1.2), Apart(0.6, 0.1)], ids=str)
def test_rows_decode_in_a_batch_as_alone(B, rule, kind):
    model, prompt = tiny_gpt(kind=kind), left_padded(LENGTHS)
    together = block_decode(model, prompt, 12, B, rule)
    assert len(set(together.forwards.tolist())) > 2  # rows end at different times
    for n, length in enumerate(LENGTHS):
        alone = block_decode(model, prompt[n:n + 1, -length:], 12, B, rule)
        same_decode(together.take(slice(n, n + 1)), alone)


@pytest.mark.parametrize("rule", [Threshold(0.3), Threshold(1.5), Factor(1.2), Apart(0.5, 0.4)],
                         ids=str)
def test_block_size_one_is_autoregressive_decoding(rule, kind):
    model, prompt = tiny_gpt(kind=kind), left_padded(LENGTHS)
    decoded = block_decode(model, prompt, 12, 1, rule)
    tokens, logp, forwards = ar_decode(model, prompt, 12)
    assert torch.equal(decoded.tokens, tokens) and torch.equal(decoded.forwards, forwards)
    close(decoded.logp, logp)


@pytest.mark.parametrize("B", [2, 3, 4])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nothing_is_committed_or_counted_after_a_committed_eos(B, temperature, kind):
    never = early = later = 0  # so that the test cannot pass for want of cases
    for seed in (0, 3, 4, 5):
        model, prompt = tiny_gpt(seed, kind=kind), left_padded(LENGTHS, seed)
        sampling = Sampling(temperature, gen(seed))
        decoded = block_decode(model, prompt, 12, B, Threshold(0.6), sampling)
        for n in range(len(LENGTHS)):
            row = decoded.take(n)
            tokens, filled, steps, logp = row.tokens, row.filled, row.commit_step, row.logp
            for e in (filled == EOS).nonzero()[:, 0].tolist():
                end = (e // B + 1) * B
                inside, after = steps[e + 1:end], steps[end:]
                assert ((inside <= steps[e]) | (inside == NEVER)).all() and (after == NEVER).all()
                never += (inside == NEVER).sum()
                early += (inside <= steps[e]).sum()
                later += len(after)
            end = filled.tolist().index(EOS) + 1 if EOS in filled else 12
            assert torch.equal(tokens[:end], filled[:end]) and (tokens[:end] > MASK).all()
            assert (tokens[end:] == PAD).all() and (logp[end:] == 0).all()
            assert (steps[:end] != NEVER).all() and (logp[:end] < 0).all()
            assert torch.equal(filled == MASK, steps == NEVER)
            per_block = torch.where(steps == NEVER, -1, steps).view(-1, B).amax(1) + 1
            assert row.forwards == per_block.sum()
            assert (steps.view(-1, B)[per_block > 0, 0] == 0).all()
    assert never and early and later


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_confidence_is_that_of_the_tempered_distribution(temperature, kind):
    model, prompt = tiny_gpt(kind=kind), left_padded(LENGTHS)
    decoded = block_decode(model, prompt, 4, 4, Threshold(0.7), Sampling(temperature, gen()))
    masks = torch.full((len(LENGTHS), 4), MASK)
    logits = model.logits(stream_hidden(model, prompt, masks, masks[:, None], 4)[:, 0])
    confidence = (logits / temperature).softmax(-1).amax(-1)
    slot0 = torch.arange(4) == 0
    assert torch.equal(decoded.commit_step == 0, (confidence > 0.7) | slot0)


@pytest.mark.parametrize("B, temperature", [(1, 1.0), (2, 1.0), (2, 0.7)])
def test_samples_are_as_frequent_as_their_log_probabilities_say(B, temperature, kind):
    model, n, rule = tiny_gpt(kind=kind), 4000, Threshold(0.5)
    sampling = Sampling(temperature, gen())
    decoded = block_decode(model, words(1, 3).expand(n, 3), 2, B, rule, sampling)
    outcomes, row, count = decoded.tokens.unique(dim=0, return_inverse=True, return_counts=True)
    each = decoded.logp.sum(1).exp()
    p = torch.zeros(len(outcomes), dtype=torch.float64).scatter(0, row, each)
    assert len(outcomes) > 5 and 0.95 < p.sum() < 1 + 1e-9
    assert ((count / n - p).abs() < 4.5 * (p * (1 - p) / n).sqrt() + 1 / n).all()


# --- All trajectories of a block --------------------------------------------------------------

@torch.no_grad()
def trajectories(model, prompt, B, rule, temperature):
    """Every way in which a response of one block can come out -> Decoded of all of them, with the
    log-probability of every commit, those after [EOS] too. prompt (1, P) without padding."""
    going, done, step = [([MASK] * B, [NEVER] * B, [0.0] * B)], [], 0
    while going:
        states, N = torch.tensor([filled for filled, _, _ in going]), len(going)
        block = torch.zeros(N, 1, dtype=torch.long)
        wide = prompt.expand(N, -1)
        hidden = predict_blocks(model, wide, states, states[:, None], block)[:, 0]
        logp = F.log_softmax(model.logits(hidden) / temperature, -1)  # (N, B, V)
        forced = torch.zeros(N, B, dtype=torch.bool)
        forced[:, 0] = step == 0
        open_ = torch.zeros(N, B, dtype=torch.bool)
        for n, (filled, _, _) in enumerate(going):
            open_[n, open_of(filled)] = True
        chosen = rule.choose(logp, open_, forced)
        after = []
        for n, trajectory in enumerate(going):
            slots = chosen[n].nonzero()[:, 0].tolist()
            for drawn in itertools.product(range(EOS, VOCAB), repeat=len(slots)):
                filled, steps, logps = map(list, trajectory)
                for j, token in zip(slots, drawn):
                    filled[j], steps[j], logps[j] = token, step, logp[n, j, token].item()
                (after if open_of(filled) else done).append((filled, steps, logps))
        going, step = after, step + 1
    filled, steps, logps = map(list, zip(*done))
    filled, steps = torch.tensor(filled), torch.tensor(steps)
    every = torch.tensor(logps, dtype=torch.float64)
    forwards = torch.where(steps == NEVER, -1, steps).amax(1) + 1
    return Decoded(None, filled, steps, every, forwards)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("rule", [Steps(2), Threshold(0.5), Apart(0.5, 0.2),
                                  Apart(0.5, 0.2, range(3, VOCAB))], ids=str)
def test_what_is_exact_about_the_likelihood_of_a_decode(rule, temperature, kind):
    """All ways of a block of three, with and without what was committed after an early [EOS]."""
    B, excess = 3, 0.0
    for seed in (0, 3, 4):
        model, prompt = tiny_gpt(seed, kind=kind), words(1, 4, seed=seed)
        decoded = trajectories(model, prompt, B, rule, temperature)
        commits = decoded.logp.clone()                            # (n, 3) 0 where never committed
        n = len(commits)
        # Every commit is a draw of its own: together they are the likelihood of a trajectory.
        close(commits.sum(1).exp().sum().item(), 1.0)

        # Recorded and replayed are the commits up to [EOS], each in the state of its step; what
        # was committed after [EOS] was seen there.
        decoded = finished(decoded)
        is_end = decoded.filled == EOS
        after = is_end.cumsum(1) - is_end.long() > 0
        close(decoded.logp, torch.where(after, 0.0, commits))
        with torch.no_grad():
            again = replay_logp(model, prompt.expand(n, -1), decoded, B, temperature)
        close(again, decoded.logp)
        # These are no distribution over trajectories ...
        excess += decoded.logp.sum(1).exp().sum() - 1

        # ... but one of the first slots, given what the last ones are committed to.
        for cut in (1, 2, 3):
            first = commits[:, :cut].sum(1).exp()
            for tail in itertools.product(range(EOS, VOCAB), repeat=B - cut):
                written = decoded.filled[:, cut:]
                fits = ((written == torch.tensor(tail)) | (written == MASK)).all(1)
                close(first[fits].sum().item(), 1.0)
    assert excess > 0.1  # the test has cases


@pytest.mark.parametrize("rule", [Steps(2), Apart(0.5, 0.2)], ids=str)
def test_what_is_drawn_is_among_all_trajectories_as_often_as_they_are_likely(rule, kind):
    model, prompt, B, n = tiny_gpt(3, kind=kind), words(1, 4, seed=3), 3, 4000
    every = trajectories(model, prompt, B, rule, 1.0)
    p, likely = every.logp.sum(1).exp(), {}
    for i, key in enumerate(zip(every.filled.tolist(), every.commit_step.tolist())):
        likely[str(key)] = i
    assert len(likely) == len(p)
    every = finished(every)
    drawn = block_decode(model, prompt.expand(n, -1), B, B, rule, Sampling(1.0, gen()))
    keys = zip(drawn.filled.tolist(), drawn.commit_step.tolist())
    found = torch.tensor([likely[str(key)] for key in keys])
    same_decode(drawn, every.take(found))
    share = torch.bincount(found, minlength=len(p)) / n
    often = p > 0.01
    assert often.sum() > 5
    assert ((share - p).abs() < 4.5 * (p * (1 - p) / n).sqrt())[often].all()
