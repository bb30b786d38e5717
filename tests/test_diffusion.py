"""Invariants of model.py, diffusion.py and sampler.py. Where two computations must agree they run in float64."""
import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from conftest import VOCAB, close, left_padded, stream_hidden, tiny_gpt, words
from diffusion import decode_states, diffusion_loss, draw_noise, fill_last_block, replay_logp, segment_hidden, segment_mask, tokens_shown, what_is_left
from model import EOS, MASK, PAD, RECORDED, ar_decode, causal_hidden, graph_ar_decode
from sampler import NEVER, block_decode, choose, graph_block_decode

LENGTHS = [4, 1, 6, 3, 5, 2]  # of the prompts: shorter and longer than a block
RULES = [("independent", 0.6), ("independent", 1.5), ("threshold", 0.3), ("threshold", 0.6), ("threshold", 0.9), ("threshold", 1.5),
         ("factor", 0.5), ("factor", 1.2), ("factor", 3.0), ("steps", 2)]


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def plain_hidden(model, prompt, response, B):
    """One unpadded row through [prompt; response] under a block-causal mask written as loops: (R, d), entry i predicts
    response token i."""
    blk = list(range(-len(prompt), 0)) + [r // B for r in range(len(response))]
    mask = torch.tensor([[blk[q] >= blk[k] for k in range(len(blk))] for q in range(len(blk))])
    hidden = model(torch.cat((prompt, response))[None], torch.arange(len(blk))[None], mask[None, None])[0]
    return hidden[len(prompt) - 1:-1]


def block_hidden(model, prompt, clean, state, B, b):
    """Plain hidden states that predict block b, its own slots showing `state`: [prompt; clean blocks before b; state]."""
    return plain_hidden(model, prompt, torch.cat((clean[:b * B], state)), B)[b * B:]


# --- The mask and the forward over noised segments ---------------------------------------------------------------------

@pytest.mark.parametrize("P, R, B, blocks", [(3, 6, 2, [[0, 1, 2], [2, 2, 0]]), (1, 4, 1, [[3, 0]]), (2, 6, 3, [[], []]),
                                             (4, 8, 4, [[1], [0], [1]]), (2, 4, 2, [[1, 1, 1, 1, 0]])])
def test_segment_mask_equals_the_loops_of_its_definition(P, R, B, blocks):
    mask = segment_mask(P, R, B, torch.tensor(blocks, dtype=torch.long).view(len(blocks), -1))
    for row, of_row in zip(mask, blocks):
        shared = [i - P for i in range(P)] + [r // B for r in range(R)]  # the block of every key
        queries = [(False, b) for b in shared] + [(True, b) for b in of_row for _ in range(B)]  # (noised, block)
        assert row.shape == (len(queries), len(shared))
        for (q, (noised, bq)), (k, bk) in itertools.product(enumerate(queries), enumerate(shared)):
            assert row[q, k] == (bq > bk if noised else bq >= bk), (q, k)


@pytest.mark.parametrize("B", [1, 2, 3, 4])
def test_clean_noised_stream_is_the_plain_block_causal_model(B):
    model, prompt, response = tiny_gpt(), left_padded(LENGTHS), words(len(LENGTHS), 12, seed=1)
    hidden = stream_hidden(model, prompt, response, response[:, None], B)
    for n, length in enumerate(LENGTHS):
        close(hidden[n, 0], plain_hidden(model, prompt[n, -length:], response[n], B))


@pytest.mark.parametrize("B, S", [(1, 1), (2, 2), (3, 1), (4, 3)])
def test_every_state_is_seen_as_if_it_stood_alone_behind_clean_blocks(B, S):
    model, prompt, clean = tiny_gpt(), left_padded(LENGTHS), words(len(LENGTHS), 12, seed=1)
    noised = torch.where(torch.rand(len(LENGTHS), S, 12, generator=gen()) < 0.5, MASK, clean[:, None])
    hidden = stream_hidden(model, prompt, clean, noised, B)
    for n, s, b in itertools.product(range(len(LENGTHS)), range(S), range(12 // B)):
        alone = block_hidden(model, prompt[n, -LENGTHS[n]:], clean[n], noised[n, s, b * B:(b + 1) * B], B, b)
        close(hidden[n, s, b * B:(b + 1) * B], alone)


@pytest.mark.parametrize("B", [1, 2, 3, 4])
def test_segments_may_come_in_any_order_and_number_each_row_its_own(B):
    model, prompt, clean = tiny_gpt(), left_padded(LENGTHS), words(len(LENGTHS), 12, seed=1)
    block = torch.randint(12 // B, (len(LENGTHS), 5), generator=gen())
    noised = torch.where(torch.rand(*block.shape, B, generator=gen(1)) < 0.5, MASK, words(*block.shape, B, seed=2))
    hidden = segment_hidden(model, prompt, clean, noised, block)
    for n, m in itertools.product(range(len(LENGTHS)), range(5)):
        close(hidden[n, m], block_hidden(model, prompt[n, -LENGTHS[n]:], clean[n], noised[n, m], B, int(block[n, m])))


@pytest.mark.parametrize("B", [2, 3, 4])
def test_later_blocks_never_change_earlier_logits_and_noise_never_reaches_the_clean_stream(B):
    model, prompt, clean = tiny_gpt(), left_padded(LENGTHS), words(len(LENGTHS), 12, seed=1)
    noised = torch.full((len(LENGTHS), 2, 12), MASK)
    before = stream_hidden(model, prompt, clean, noised, B)
    cut = 12 // B // 2 * B  # everything from here on is changed
    clean2, noised2 = clean.clone(), noised.clone()
    clean2[:, cut:], noised2[:, 0, cut:] = words(len(LENGTHS), 12 - cut, seed=2), words(len(LENGTHS), 12 - cut, seed=3)
    after = stream_hidden(model, prompt, clean2, noised2, B)
    close(after[:, :, :cut + 1], before[:, :, :cut + 1])  # the first token of the next block included
    assert not torch.allclose(after[:, 0, cut + 1], before[:, 0, cut + 1])
    assert not torch.allclose(after[:, 1, cut + B:], before[:, 1, cut + B:])  # clean blocks do reach later ones
    only_noise = stream_hidden(model, prompt, clean, noised2, B)
    close(only_noise[:, 1], before[:, 1])             # streams do not see each other
    close(only_noise[:, :, ::B], before[:, :, ::B])   # first tokens come from the clean stream


def test_left_padding_changes_nothing():
    model, response = tiny_gpt(), words(1, 6, seed=1)
    prompt = words(1, 4)
    padded = F.pad(prompt, (3, 0), value=PAD)
    noised = torch.full((1, 1, 6), MASK)
    close(stream_hidden(model, padded, response, noised, 3), stream_hidden(model, prompt, response, noised, 3))
    close(causal_hidden(model, padded, response), causal_hidden(model, prompt, response))
    for a, b in zip(ar_decode(model, padded, 8), ar_decode(model, prompt, 8)):
        close(a, b)


def test_padding_and_mask_are_never_predicted():
    assert (tiny_gpt().logits(torch.randn(50, 16, dtype=torch.float64)).softmax(-1)[:, [PAD, MASK]] == 0).all()


# --- The AR decoder -----------------------------------------------------------------------------------------------------

def test_ar_decode_repeats_the_argmax_of_an_uncached_forward():
    model, prompt = tiny_gpt(), left_padded(LENGTHS)
    tokens, logp, forwards = ar_decode(model, prompt, 10)
    ends = []
    for n, length in enumerate(LENGTHS):
        row, lp = prompt[n:n + 1, -length:], []
        while len(lp) < 10 and row[0, -1] != EOS:
            logits = model.logits(causal_hidden(model, row, row[:, :1])[:, 0])  # any one token: only its place counts
            best = F.log_softmax(logits, -1).max(-1)
            row, lp = torch.cat((row, best.indices[None]), 1), lp + [best.values]
        ends.append(len(lp))
        assert tokens[n].tolist() == row[0, length:].tolist() + [PAD] * (10 - len(lp))
        close(logp[n], F.pad(torch.cat(lp), (0, 10 - len(lp))))
    assert forwards.tolist() == ends and len(set(ends)) > 2  # the test has rows of several lengths


@pytest.mark.parametrize("temperature", [0.0, 1.0, 0.7])
def test_ar_log_probabilities_are_those_of_the_tempered_model(temperature):
    model, prompt = tiny_gpt(), left_padded(LENGTHS)
    tokens, logp, _ = ar_decode(model, prompt, 10, temperature, gen())
    logits = model.logits(causal_hidden(model, prompt, tokens)) / (temperature or 1.0)
    exact = F.log_softmax(logits, -1).gather(-1, tokens[..., None])[..., 0]
    close(logp, torch.where(tokens == PAD, 0.0, exact))


@pytest.mark.parametrize("B", [1, 3, 4])
def test_masked_slots_must_become_what_their_segment_does_not_show(B):
    torch.manual_seed(0)
    N, R, M = 4, 12, 6
    source = torch.stack([torch.randperm(R) for _ in range(N)])
    block, masked = torch.randint(R // B, (N, M)), torch.rand(N, M, B) < 0.5
    left = what_is_left(source, block, masked)
    for n, m in itertools.product(range(N), range(M)):
        start = int(block[n, m]) * B
        shown = source[n, :start].tolist()
        assert left[n, m, 0] == min(set(range(R)) - set(shown))
        shown += [int(source[n, start + j]) for j in range(B) if not masked[n, m, j]]
        rest = sorted(set(range(R)) - set(shown))
        want = dict(zip([j for j in range(B) if masked[n, m, j]], rest))
        assert all(left[n, m, j] == want[j] for j in want if j)
    own = torch.arange(R).expand(N, -1)
    at = block[..., None] * B + torch.arange(B)
    assert torch.equal(what_is_left(own, block, masked)[masked], at[masked])


@pytest.mark.parametrize("B", [1, 4])
def test_tokens_shown_are_those_of_the_clean_past_and_the_unmasked_slots(B):
    torch.manual_seed(0)
    N, R, M = 4, 12, 5
    response, where = words(N, R), torch.rand(N, R) < 0.5
    block, masked = torch.randint(R // B, (N, M)), torch.rand(N, M, B) < 0.5
    shown = tokens_shown(response, where, block, masked, VOCAB)
    for n, m in itertools.product(range(N), range(M)):
        start = int(block[n, m]) * B
        slots = [*range(start), *(start + j for j in range(B) if not masked[n, m, j])]
        assert set(shown[n, m].nonzero()[:, 0].tolist()) == {int(response[n, r]) for r in slots if where[n, r]}


@torch.no_grad()
@pytest.mark.parametrize("kind", ["uniform", "complementary"])
def test_the_penalty_is_on_tokens_of_the_set_that_a_state_shows_already(kind):
    """The loss with the penalty less the loss without, against a loop over segments and their masked slots."""
    model, prompt, response, B = tiny_gpt(), left_padded(LENGTHS), words(6, 9, seed=1), 3
    once = torch.zeros(6, 9).double()
    once[:, 2:8] = 5.0
    source = torch.arange(9).expand(6, -1).clone()
    source[:, [2, 3, 5]] = torch.tensor([5, 2, 3])
    shown = response.gather(1, source)
    loss = lambda once, rows=slice(None): diffusion_loss(model, prompt, response, B, kind, 0.3, gen(), source=source, once=once, rows=rows)
    masks, share = draw_noise(18, B, kind, 0.3, gen())
    exact = counted = 0
    for n, b, s in itertools.product(range(6), range(3), range(masks.shape[1])):
        masked = masks[3 * n + b, s]
        state = torch.where(masked, MASK, shown[n, 3 * b:3 * b + 3])
        p = model.logits(block_hidden(model, prompt[n, 6 - LENGTHS[n]:], shown[n], state, B, b)).softmax(-1)  # (B, V)
        there = {int(shown[n, r]) for r in range(3 * b + 3) if once[n, r] and (r < 3 * b or not masked[r - 3 * b])}
        for j in range(B):
            if masked[j] and once[n, 3 * b + j] and there:
                exact -= 5.0 * share[3 * n + b, s, j].double() * math.log(1 - p[j, sorted(there)].sum())
                counted += 1
    assert counted > 10 and exact > 1
    close(loss(once) - loss(None), exact / 54, atol=1e-6)
    close(loss(once, slice(0, 2)) + loss(once, slice(2, 6)), loss(once), atol=1e-12)
    close(loss(0 * once), loss(None), atol=1e-12)


def test_misplaced_labels_change_what_is_seen_and_asked_and_at_block_size_1_it_is_the_ar_loss():
    model, prompt, response = tiny_gpt(), left_padded(LENGTHS), words(6, 7, seed=1)
    response[:, 6] = EOS
    source = torch.arange(7).expand(6, -1).clone()
    close(diffusion_loss(model, prompt, response, 3, "complementary", 0.3, gen(), source=source),
          diffusion_loss(model, prompt, response, 3, "complementary", 0.3, gen()), atol=1e-12)
    source[:, [2, 3, 5]] = torch.tensor([5, 2, 3])
    logits = model.logits(causal_hidden(model, prompt, response.gather(1, source)))
    target = response.gather(1, torch.tensor([[0, 1, 2, 2, 3, 3, 6]]).expand(6, -1))  # the first that is not shown further left
    close(diffusion_loss(model, prompt, response, 1, "uniform", 0.3, gen(), source=source),
          F.cross_entropy(logits.transpose(1, 2), target), atol=1e-12)


# --- The sampler --------------------------------------------------------------------------------------------------------

def flat_but_one(confidence, word, vocab=1000):
    """Log-probabilities (N, B, vocab) that give each slot's word (N, B) the probability `confidence` (N, B), and the others the rest."""
    rest = ((1 - confidence) / (vocab - 1))[..., None].expand(-1, -1, vocab)
    return rest.scatter(2, word[..., None], confidence[..., None]).log()


@pytest.mark.parametrize("rule, tau, confidence, open_, chosen", [
    ("threshold", 0.5, [.6, .5, .9, .51], [1, 1, 1, 1], [1, 0, 1, 1]),  # above tau, not at it
    ("threshold", 0.5, [.6, .9, .4, .51], [0, 0, 1, 1], [0, 0, 0, 1]),
    ("threshold", 1.5, [.6, .9, .4, .51], [1, 1, 1, 1], [0, 1, 0, 0]),  # at least the best ...
    ("threshold", 1.5, [.6, .9, .4, .51], [1, 0, 1, 1], [1, 0, 0, 0]),  # ... of the open ones
    ("threshold", 0.1, [.6, .9, .4, .51], [0, 0, 0, 0], [0, 0, 0, 0]),
    ("factor", 1.0, [.8, .9, .7, .95], [1, 1, 1, 1], [1, 1, 0, 1]),     # 2 x .05, 3 x .1, 4 x .2 = .8 < 1; 5 x .3 is not
    ("factor", 1.0, [.8, .9, .7, .95], [1, 0, 1, 1], [1, 0, 0, 1]),     # 2 x .05, 3 x .2; 4 x .3 = 1.2
    ("factor", 1.3, [.8, .9, .7, .95], [1, 0, 1, 1], [1, 0, 1, 1]),
    ("factor", 0.05, [.8, .9, .7, .95], [1, 1, 1, 1], [0, 0, 0, 1]),
    ("factor", 9.0, [.8, .9, .7, .95], [1, 0, 1, 0], [1, 0, 1, 0]),
    ("steps", 2, [.8, .9, .7, .95], [1, 1, 1, 1], [0, 1, 0, 1]),        # 4 slots in 2 steps: 2 a step
    ("steps", 3, [.8, .9, .7, .95], [1, 0, 1, 1], [1, 0, 0, 1]),        # rounded up: 2 a step
    ("steps", 4, [.8, .9, .7, .95], [1, 0, 1, 0], [1, 0, 0, 0]),
    ("steps", 1, [.1, .2, .7, .95], [1, 0, 1, 1], [1, 0, 1, 1])])
def test_choose_by_hand(rule, tau, confidence, open_, chosen):
    confidence, open_ = torch.tensor([confidence]), torch.tensor([open_]).bool()
    none = torch.zeros_like(open_)
    said = lambda confidence: flat_but_one(confidence, torch.arange(4).expand(confidence.shape))
    assert choose(said(confidence), open_, none, rule, tau).int().tolist() == [chosen]
    closed_high = torch.where(open_, confidence, 0.999)  # what closed slots show must not matter
    assert choose(said(closed_high), open_, none, rule, tau).int().tolist() == [chosen]
    flip = choose(said(confidence.flip(1)), open_.flip(1), none, rule, tau).flip(1)
    pair = lambda x: torch.cat((x.flip(1), x))
    both = choose(said(pair(confidence)), pair(open_), pair(none), rule, tau)
    assert flip.int().tolist() == [chosen] and both.int().tolist() == [chosen[::-1], chosen]


@pytest.mark.parametrize("rule", ["threshold", "factor"])
def test_a_forced_slot_is_committed_and_stands_for_the_best(rule):
    confidence, open_ = torch.tensor([[.1, .6, .5]]), torch.ones(1, 3, dtype=torch.bool)
    forced = torch.tensor([[True, False, False]])
    logp = flat_but_one(confidence, torch.arange(3)[None])
    assert choose(logp, open_, forced, rule, 0.01 if rule == "factor" else 0.9).tolist() == [[True, False, False]]
    assert choose(logp, open_, forced, rule, 0.9 if rule == "factor" else 0.55).tolist() == [[True, True, False]]


@pytest.mark.parametrize("word, open_, tau, chosen", [
    ([0, 1, 2, 3], [1, 1, 1, 1], 0.9, [1, 1, 1, 1]),  # none is sure, but no two want the same: all of them
    ([0, 0, 1, 1], [1, 1, 1, 1], 0.9, [1, 0, 0, 1]),  # .7 x .6 = .42 and .5 x .8 = .4 would collide: the surer of each two
    ([0, 0, 0, 1], [1, 1, 1, 1], 0.9, [1, 0, 0, 1]),  # a slot that is not the surest of its kind waits
    ([0, 0, 1, 1], [0, 1, 1, 0], 0.9, [0, 1, 1, 0]),  # committed slots collide with none
    ([0, 0, 1, 1], [1, 1, 1, 1], 0.75, [0, 0, 0, 1]),  # one is sure: the unsure wait for what it tells them
    ([0, 0, 1, 1], [1, 1, 1, 1], 0.55, [1, 1, 0, 1])])  # the sure ones go together whatever they say
def test_independent_slots_go_together_and_rivals_wait(word, open_, tau, chosen):
    logp = flat_but_one(torch.tensor([[.7, .6, .5, .8]]), torch.tensor([word]))
    open_, none = torch.tensor([open_]).bool(), torch.zeros(1, 4, dtype=torch.bool)
    assert choose(logp, open_, none, "independent", tau).int().tolist() == [chosen]
    assert choose(logp, open_, none, "independent", tau, clash=1.0).sum() >= sum(chosen)
    rivals = torch.tensor([[[.5, .45, .05], [.4, .5, .1]], [[.5, .25, .25], [.4, .3, .3]]]).log()  # collide in .43 and .35 of draws
    two = torch.ones(2, 2, dtype=torch.bool)
    for clash, want in ((0.4, [[1, 0], [1, 0]]), (0.44, [[1, 1], [1, 0]])):  # of two that want the same one waits in any case
        assert choose(rivals, two, ~two, "independent", 0.9, clash).int().tolist() == want
    forced = torch.tensor([[True, False, False, False]])
    sure = (logp.amax(-1).exp() > tau) & open_
    assert torch.equal(choose(logp, open_, forced, "independent", tau), sure | forced)


@pytest.mark.parametrize("word, open_, forced, chosen", [
    ([5, 5, 6, 6], [1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 0, 1]),  # all are sure: the surest of each label
    ([5, 5, 5, 5], [1, 1, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0]),  # what is committed already competes with none
    ([2, 2, 9, 9], [1, 1, 1, 1], [0, 0, 0, 0], [1, 1, 1, 1]),  # other words may stand in many slots
    ([5, 5, 6, 5], [1, 1, 1, 1], [0, 1, 0, 0], [0, 1, 1, 0]),  # a forced slot goes first, however unsure
    ([5, 6, 7, 8], [1, 1, 1, 1], [0, 0, 0, 0], [1, 1, 1, 1])])
def test_of_sure_slots_that_want_the_same_label_only_the_surest_is_committed(word, open_, forced, chosen):
    logp = flat_but_one(torch.tensor([[.95, .93, .92, .96]]), torch.tensor([word]))
    open_, forced = torch.tensor([open_]).bool(), torch.tensor([forced]).bool()
    assert choose(logp, open_, forced, "independent", 0.9, labels=range(5, 9)).int().tolist() == [chosen]
    assert choose(logp, open_, forced, "independent", 0.9).tolist() == open_.tolist()  # without labels: all that are sure


@pytest.mark.parametrize("B", [2, 3, 4])
def test_no_label_is_committed_twice_in_a_step_and_the_fixed_shapes_agree(B):
    avoided = 0
    for seed in range(6):
        model, prompt, labels = tiny_gpt(seed), left_padded(LENGTHS, seed), range(3, VOCAB)
        with torch.no_grad():
            decoded, fixed = (f(model, prompt, 12, B, "independent", 0.3, labels=labels) for f in (block_decode, graph_block_decode))
            free = block_decode(model, prompt, 12, B, "independent", 0.3)
        for name in ("tokens", "filled", "commit_step", "forwards"):
            assert torch.equal(getattr(decoded, name), getattr(fixed, name))
        twice = lambda d: sum(d.filled[n, i] == d.filled[n, j] >= 3 and d.commit_step[n, i] == d.commit_step[n, j] != NEVER
                              for n in range(len(LENGTHS)) for b in range(0, 12, B) for i, j in itertools.combinations(range(b, b + B), 2))
        assert not twice(decoded)
        avoided += twice(free)
    assert avoided  # the test has cases


@pytest.mark.parametrize("B", [1, 3, 4])
def test_the_decoders_of_fixed_shape_write_what_the_plain_ones_write(B):
    # On a GPU their steps are recorded and replayed; here the same functions run as they are. Twice: the second call reuses the state.
    for seed in (0, 3, 4):
        model, prompt = tiny_gpt(seed), left_padded(LENGTHS, seed)
        for rule, tau in RULES[:3] + [("independent", 0.6)]:
            plain = block_decode(model, prompt, 12, B, rule, tau)
            for _ in range(2):
                with torch.no_grad():
                    fixed = graph_block_decode(model, prompt, -(-12 // B) * B, B, rule, tau)
                for name in ("tokens", "filled", "commit_step", "forwards"):
                    assert torch.equal(getattr(plain, name), getattr(fixed, name)), (seed, rule, name)
                close(plain.logp, fixed.logp)
        plain = ar_decode(model, prompt, 12)
        with torch.no_grad():
            fixed = [graph_ar_decode(model, prompt, 12) for _ in range(2)][1]
        assert torch.equal(plain[0], fixed[0]) and torch.equal(plain[2], fixed[2])
        close(plain[1], fixed[1])
    assert len(RECORDED) <= 4


def test_fixed_shapes_draw_by_the_seed_and_replay_to_what_they_recorded():
    model, prompt = tiny_gpt(), left_padded(LENGTHS)
    draw = lambda seed: graph_block_decode(model, prompt, 12, 3, "independent", 0.5, 1.0, gen(seed))
    with torch.no_grad():
        a, b, c = draw(1), draw(1), draw(2)
    assert torch.equal(a.tokens, b.tokens) and not torch.equal(a.tokens, c.tokens)
    close(replay_logp(model, prompt, a, 3, 1.0), a.logp)


def reference_decode(model, prompt, max_len, B, rule, tau):
    """One unpadded row, no cache: every step is a training forward, and the commit rules are written out."""
    R = -(-max_len // B) * B
    filled, steps, logps, forwards = [MASK] * R, [NEVER] * R, [0.0] * R, 0
    for b in range(R // B):
        clean = torch.tensor([filled[:b * B] + [MASK] * (R - b * B)])
        for step in itertools.count():
            hidden = stream_hidden(model, prompt[None], clean, torch.tensor([[filled]]), B)[0, 0, b * B:(b + 1) * B]
            forwards += 1
            best = F.log_softmax(model.logits(hidden), -1).max(-1)
            conf = best.values.exp().tolist()
            block = filled[b * B:(b + 1) * B]
            end = block.index(EOS) if EOS in block else B
            ranked = sorted((j for j in range(end) if block[j] == MASK), key=lambda j: -conf[j])
            if rule in ("threshold", "independent"):
                chosen = {j for j in ranked if conf[j] > tau}
                p = F.softmax(model.logits(hidden), -1).detach()
                if rule == "independent" and not chosen and step:
                    chosen = {j for n, j in enumerate(ranked) if all(float(p[i] @ p[j]) <= 0.4 and best.indices[i] != best.indices[j] for i in ranked[:n])}
            elif rule == "steps":
                chosen = set(ranked[:math.ceil(B / tau)])
            else:
                chosen = set()
                for n in range(1, len(ranked) + 1):
                    if (n + 1) * (1 - conf[ranked[n - 1]]) < tau:
                        chosen = set(ranked[:n])
            chosen |= {0} if step == 0 else {ranked[0]}
            for j in chosen:
                filled[b * B + j], steps[b * B + j] = best.indices[j].item(), step
                logps[b * B + j] = best.values[j].item()
            block = filled[b * B:(b + 1) * B]
            end = block.index(EOS) if EOS in block else B
            if MASK not in block[:end]:
                break
        if EOS in block:
            break
    end = filled.index(EOS) + 1 if EOS in filled else R
    return filled[:end] + [PAD] * (R - end), filled, steps, logps[:end] + [0.0] * (R - end), forwards


@pytest.mark.parametrize("B", [1, 2, 3, 4])
@pytest.mark.parametrize("rule, tau", RULES)
def test_cached_batched_fused_sampler_equals_the_uncached_reference(B, rule, tau):
    for seed in (0, 3):
        model, prompt = tiny_gpt(seed), left_padded(LENGTHS, seed)
        decoded = block_decode(model, prompt, 11, B, rule, tau)  # 11: not whole blocks
        for n, length in enumerate(LENGTHS):
            tokens, filled, steps, logps, forwards = reference_decode(model, prompt[n, -length:], 11, B, rule, tau)
            assert decoded.tokens[n].tolist() == tokens
            assert decoded.filled[n].tolist() == filled
            assert decoded.commit_step[n].tolist() == steps
            close(decoded.logp[n], torch.tensor(logps, dtype=torch.float64))
            assert decoded.forwards[n] == forwards


def same_decode(a, b):
    for name in ("tokens", "filled", "commit_step", "forwards"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    close(a.logp, b.logp)


@pytest.mark.parametrize("B", [1, 2, 3, 4])
@pytest.mark.parametrize("rule, tau", [("threshold", 0.6), ("factor", 1.2)])
def test_rows_decode_in_a_batch_as_alone(B, rule, tau):
    model, prompt = tiny_gpt(), left_padded(LENGTHS)
    together = block_decode(model, prompt, 12, B, rule, tau)
    assert len(set(together.forwards.tolist())) > 2  # rows leave the batch at different times
    for n, length in enumerate(LENGTHS):
        alone = block_decode(model, prompt[n:n + 1, -length:], 12, B, rule, tau)
        same_decode(together.take(slice(n, n + 1)), alone)


@pytest.mark.parametrize("rule, tau", [("threshold", 0.3), ("threshold", 1.5), ("factor", 1.2)])
def test_block_size_one_is_autoregressive_decoding(rule, tau):
    model, prompt = tiny_gpt(), left_padded(LENGTHS)
    decoded = block_decode(model, prompt, 12, 1, rule, tau)
    tokens, logp, forwards = ar_decode(model, prompt, 12)
    assert torch.equal(decoded.tokens, tokens) and torch.equal(decoded.forwards, forwards)
    close(decoded.logp, logp)


@pytest.mark.parametrize("B", [2, 3, 4])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nothing_is_committed_or_counted_behind_a_committed_eos(B, temperature):
    never, early, later = 0, 0, 0  # so that the test cannot pass for want of cases
    for seed in (0, 3, 4, 5):
        decoded = block_decode(tiny_gpt(seed), left_padded(LENGTHS, seed), 12, B, "threshold", 0.6, temperature, gen(seed))
        for n in range(len(LENGTHS)):
            row = decoded.take(n)
            tokens, filled, steps, logp = row.tokens, row.filled, row.commit_step, row.logp
            for e in (filled == EOS).nonzero()[:, 0].tolist():
                end = (e // B + 1) * B
                inside, behind = steps[e + 1:end], steps[end:]
                assert ((inside <= steps[e]) | (inside == NEVER)).all() and (behind == NEVER).all()
                never, early = never + (inside == NEVER).sum(), early + (inside <= steps[e]).sum()
                later += len(behind)
            end = filled.tolist().index(EOS) + 1 if EOS in filled else 12
            assert torch.equal(tokens[:end], filled[:end]) and (tokens[end:] == PAD).all() and (logp[end:] == 0).all()
            assert (steps[:end] != NEVER).all() and (tokens[:end] > MASK).all() and (logp[:end] < 0).all()
            assert torch.equal(filled == MASK, steps == NEVER)
            per_block = torch.where(steps == NEVER, -1, steps).view(-1, B).amax(1) + 1
            assert row.forwards == per_block.sum() and (steps.view(-1, B)[per_block > 0, 0] == 0).all()
    assert never and early and later


@pytest.mark.parametrize("B", [1, 2, 3])
def test_behind_a_given_prefix_the_sampler_goes_on_as_if_it_had_written_it(B):
    model, prompt = tiny_gpt(), left_padded(LENGTHS)
    whole = block_decode(model, prompt, 12, B, "threshold", 0.6)
    long = ((whole.tokens != PAD).sum(1) > B).nonzero()[:, 0]
    assert len(long) > 2
    prefix = whole.filled[long, :B]
    behind = block_decode(model, prompt[long], 12, B, "threshold", 0.6, prefix=prefix)
    assert torch.equal(behind.tokens, whole.tokens[long])
    close(behind.logp[:, B:], whole.logp[long, B:])
    other = torch.where(prefix == 3, 4, 3)
    forged = block_decode(model, prompt[long], 12, B, "threshold", 0.6, prefix=other)
    assert torch.equal(forged.filled[:, :B], other) and not torch.equal(forged.tokens, behind.tokens)


def test_constraint_reaches_the_right_rows_and_slots_when_rows_have_left():
    lengths = torch.tensor([3, 9, 1, 6, 7, 5])  # of the responses that the constraint dictates, [EOS] included
    word = lambda n, i: torch.where(i == lengths[n] - 1, EOS, 3 + (2 * n + i) % (VOCAB - 3))

    def constrain(logits, response, slots, rows):
        want = word(rows[:, None], slots)
        written = word(rows[:, None], torch.arange(response.shape[1]))
        before = torch.arange(response.shape[1]) < lengths[rows][:, None]
        assert ((response == MASK) | (response == written) | ~before).all()
        return torch.full_like(logits, -1e4).scatter(-1, want[..., None], 0.0)

    decoded = block_decode(tiny_gpt(), left_padded(LENGTHS), 12, 4, constrain=constrain)
    n, i = torch.arange(6)[:, None], torch.arange(12)[None]
    assert torch.equal(decoded.tokens, torch.where(i < lengths[:, None], word(n, i), PAD))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_confidence_is_that_of_the_tempered_distribution(temperature):
    model, prompt = tiny_gpt(), left_padded(LENGTHS)
    decoded = block_decode(model, prompt, 4, 4, "threshold", 0.7, temperature, gen())
    masks = torch.full((len(LENGTHS), 4), MASK)
    confidence = (model.logits(stream_hidden(model, prompt, masks, masks[:, None], 4)[:, 0]) / temperature).softmax(-1).amax(-1)
    assert torch.equal(decoded.commit_step == 0, (confidence > 0.7) | (torch.arange(4) == 0))


@pytest.mark.parametrize("B, temperature", [(1, 1.0), (2, 1.0), (2, 0.7)])
def test_samples_are_as_frequent_as_their_log_probabilities_say(B, temperature):
    model, n = tiny_gpt(), 4000
    decoded = block_decode(model, words(1, 3).expand(n, 3), 2, B, "threshold", 0.5, temperature, gen())
    outcomes, row, count = decoded.tokens.unique(dim=0, return_inverse=True, return_counts=True)
    p = torch.zeros(len(outcomes), dtype=torch.float64).scatter(0, row, decoded.logp.sum(1).exp())
    assert len(outcomes) > 5 and 0.95 < p.sum() < 1 + 1e-9
    assert ((count / n - p).abs() < 4.5 * (p * (1 - p) / n).sqrt() + 1 / n).all()


# --- Replay -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("B", [1, 2, 3, 4])
@pytest.mark.parametrize("rule, tau, temperature", [("threshold", 0.6, 0.0), ("threshold", 0.4, 1.0),
                                                    ("threshold", 1.5, 0.7), ("factor", 1.2, 1.0)])
def test_replayed_log_probabilities_are_the_recorded_ones(B, rule, tau, temperature):
    for seed in (0, 3):
        model, prompt = tiny_gpt(seed), left_padded(LENGTHS, seed)
        decoded = block_decode(model, prompt, 12, B, rule, tau, temperature, gen(seed))
        assert len(set((decoded.tokens != PAD).sum(1).tolist())) > 1
        for max_segments in (1, 5, 16):
            logp = replay_logp(model, prompt, decoded, B, temperature, max_segments)
            close(logp, decoded.logp)
        assert logp.requires_grad
        rows = torch.tensor([4, 1])
        close(replay_logp(model, prompt[rows], decoded.take(rows), B, temperature), decoded.logp[rows])


def test_decode_states_show_what_was_committed_before():
    class D:
        filled, commit_step = torch.tensor([[5, 6, 7, EOS, 8, MASK]]), torch.tensor([[0, 2, 0, 1, 0, NEVER]])
    noised, masked = decode_states(D, torch.tensor([[0, 0, 1, 1, 0]]), torch.tensor([[0, 1, 1, 2, 3]]), 3)
    assert noised.tolist() == [[[1, 1, 1], [5, 1, 7], [1, 8, 1], [EOS, 8, 1], [5, 6, 7]]]
    assert torch.equal(masked, noised == MASK)


# --- Noise and loss -----------------------------------------------------------------------------------------------------

def test_fill_last_block_by_hand():
    response = torch.tensor([[5, 6, 7, EOS, PAD], [5, EOS, PAD, PAD, PAD], [5, 6, 7, 8, EOS]])
    for B, filled, real in [
            (1, [[5, 6, 7, EOS, 0], [5, EOS, 0, 0, 0], [5, 6, 7, 8, EOS]], [4, 2, 5]),
            (2, [[5, 6, 7, EOS, 0, 0], [5, EOS, 0, 0, 0, 0], [5, 6, 7, 8, EOS, EOS]], [4, 2, 6]),
            (3, [[5, 6, 7, EOS, EOS, EOS], [5, EOS, EOS, 0, 0, 0], [5, 6, 7, 8, EOS, EOS]], [6, 3, 6]),
            (4, [[5, 6, 7, EOS, 0, 0, 0, 0], [5, EOS, EOS, EOS, 0, 0, 0, 0], [5, 6, 7, 8, EOS, EOS, EOS, EOS]], [4, 4, 8])]:
        a, b = fill_last_block(response, B)
        assert a.tolist() == filled
        assert b.int().tolist() == [[1] * n + [0] * (len(filled[0]) - n) for n in real]


@pytest.mark.parametrize("kind", ["uniform", "clipped"])
@pytest.mark.parametrize("B", [2, 4])
def test_one_t_a_block_one_in_every_stratum_and_masks_as_frequent_as_t(kind, B):
    masks, weights = draw_noise(4000, B, kind, 0.0, gen())
    assert masks.shape == weights.shape == (4000, 1, B)
    masks, weights = masks[:, 0], weights[:, 0].double()
    assert not masks[:, 0].any() and (weights[:, 0] == 1).all() and torch.equal(masks[:, 1:], weights[:, 1:] > 0)
    some = masks.any(1)
    t = 1 / weights[:, 1:].amax(1)  # known where something is masked
    assert ((weights[:, 1:] == 0) | (weights[:, 1:] == weights[:, 1:].amax(1, keepdim=True))).all()
    low, high = {"uniform": (0, 1), "clipped": (0.3, 0.8)}[kind]
    assert (t[some] > low).all() and (t[some] <= high + 1e-6).all()
    if B == 4 and kind == "clipped":  # strata: the share of masked slots is far less noisy than with t drawn one by one
        assert abs(masks[:, 1:].float().mean() - 0.55) < 0.012
    for lo, hi in itertools.pairwise([low + (high - low) * i / 4 for i in range(5)]):
        # of n/4 blocks a stratum, those with something masked: the mean of 1 - (1-t)^(B-1)
        expected = sum(1 - (1 - (lo + (hi - lo) * (i + 0.5) / 100)) ** (B - 1) for i in range(100)) / 100
        assert abs(((t > lo) & (t <= hi) & some).float().mean() * 4 - expected) < 0.06
    first, second = t[::2], t[1::2]
    both = some[::2] & some[1::2]
    assert torch.corrcoef(torch.stack((first[both], second[both])))[0, 1].abs() < 0.1  # dealt out at random, not in rows


@pytest.mark.parametrize("first_step", [0.0, 0.4, 1.0])
def test_complementary_pairs_mask_every_token_once_and_first_steps_leave_the_second_clean(first_step):
    masks, weights = draw_noise(600, 4, "complementary", first_step, gen())
    assert weights.shape == masks.shape == (600, 2, 4)
    a, b = masks.unbind(1)
    assert torch.equal(weights[:, :, 1:], masks[:, :, 1:].float())
    assert (weights[:, 0, 0] == 1).all() and (weights[:, 1, 0] == 0).all()
    assert (a[:, 1:] ^ b[:, 1:]).all() and not b[:, 0].any()
    first = a[:, 0]
    assert a[first].all() and not b[first].any()
    assert abs(first.float().mean() - first_step) < 0.1
    assert first_step == 1 or 0.4 < a[~first, 1:].float().mean() < 0.6


@pytest.mark.parametrize("kind", ["uniform", "clipped"])
def test_first_step_blocks_are_all_masked_with_weight_one(kind):
    masks, weights = (x[:, 0] for x in draw_noise(600, 4, kind, 0.5, gen()))
    first = masks[:, 0]
    assert 0.4 < first.float().mean() < 0.6 and masks[first].all() and (weights[first] == 1).all()
    rest = weights[~first][:, 1:]
    assert (rest[rest > 0] > 1).all() and (weights[:, 0] == 1).all()


def subset_weight(kind, m, n):
    """E over t of (probability that exactly these m of n slots are masked) x (weight of their losses)."""
    if kind == "uniform":        # integral over (0, 1] of t^m (1-t)^(n-m) / t = Beta(m, n-m+1)
        return math.factorial(m - 1) * math.factorial(n - m) / math.factorial(n)
    if kind == "complementary":  # these m, or exactly the others, so that the second stream masks these; Beta(m+1, n-m+1)
        return 2 * math.factorial(m) * math.factorial(n - m) / math.factorial(n + 1)
    ts = [0.3 + 0.5 * (i + 0.5) / 1000 for i in range(1000)]
    return sum(t ** (m - 1) * (1 - t) ** (n - m) for t in ts) / 1000


def enumerated_loss(model, prompt, response, weight, B, kind, first_step):
    """Expected weighted nats of one unpadded row of whole blocks, over all states of every block."""
    total = 0.0
    for b in range(len(response) // B):
        block, w = response[b * B:(b + 1) * B], weight[b * B:(b + 1) * B]

        def nats(masked):
            state = torch.tensor([MASK if j in masked else block[j].item() for j in range(B)])
            hidden = block_hidden(model, prompt, response, state, B, b)
            return w * F.cross_entropy(model.logits(hidden), block, reduction="none")

        total += nats(range(B))[0] + first_step * nats(range(B))[1:].sum()
        for m in range(1, B):
            for masked in itertools.combinations(range(1, B), m):
                total += (1 - first_step) * subset_weight(kind, m, B - 1) * nats(masked)[list(masked)].sum()
    return total


@pytest.mark.parametrize("B, kind, first_step, weighted, extra", [
    (3, "uniform", 0.0, False, []), (4, "uniform", 0.0, True, [0, 0, 0]), (3, "uniform", 0.4, True, []),
    (4, "clipped", 0.0, False, []), (3, "complementary", 0.0, True, [0]), (4, "complementary", 0.4, False, []),
    (3, "complementary", 0.3, False, [0, 0])])
@torch.no_grad()
def test_monte_carlo_mean_of_the_loss_is_the_enumerated_bound(B, kind, first_step, weighted, extra):
    model, prompt, filled = tiny_gpt(), left_padded([2, 4]), words(2, 2 * B, seed=1)
    if weighted:  # rows of two blocks and one
        filled[1, B:], response = PAD, filled
        weight = torch.rand(2, 2 * B, generator=gen()) + 0.5
    else:         # last blocks that must be filled
        filled[0, -2:], filled[1, 1:] = EOS, EOS
        response, weight = filled[:, :-1].clone(), torch.ones(2, 2 * B)
        response[1, 2:] = PAD
    exact = (enumerated_loss(model, prompt[0, 2:], filled[0], weight[0], B, kind, first_step) +
             enumerated_loss(model, prompt[1], filled[1, :B], weight[1], B, kind, first_step))
    exact /= weight[0].sum() + weight[1, :B].sum()
    many = lambda x: x.repeat(150, 1)
    draws = torch.stack([diffusion_loss(model, many(prompt), many(response), B, kind, first_step, gen(seed),
                                        many(weight) if weighted else None,
                                        torch.tensor(extra).expand(300, -1) if extra else None) for seed in range(30)])
    error = draws.std() / 30 ** 0.5
    assert error < 0.02 * exact
    assert (draws.mean() - exact).abs() < 4 * error


@torch.no_grad()
def test_the_loss_is_divided_by_the_number_of_tokens_and_not_by_the_weights_drawn():
    model, prompt, response = tiny_gpt(), left_padded(LENGTHS), words(len(LENGTHS), 9, seed=1)
    model.embed.weight.zero_()  # every token costs log(V - 2)
    count = draw_noise(len(LENGTHS) * 3, 3, "uniform", 0.3, gen(1))[1].sum()
    loss = diffusion_loss(model, prompt, response, 3, "uniform", 0.3, gen(1))
    close(loss, math.log(VOCAB - 2) * count.double() / response.numel(), atol=1e-5)
    assert (count / response.numel() - 1).abs() > 0.01


@pytest.mark.parametrize("kind", ["uniform", "clipped", "complementary"])
@pytest.mark.parametrize("first_step", [0.0, 0.5])
def test_at_block_size_one_the_loss_is_the_autoregressive_one(kind, first_step):
    model, prompt, response = tiny_gpt(), left_padded(LENGTHS), words(len(LENGTHS), 7, seed=1)
    response[0, 3:], response[3, 1:] = PAD, PAD
    weight = torch.rand(response.shape, generator=gen()) + 0.5
    logits = model.logits(causal_hidden(model, prompt, response))
    nats = F.cross_entropy(logits.transpose(1, 2), response, reduction="none")
    for w in (None, weight):
        counted = (torch.ones_like(weight) if w is None else w) * (response != PAD)
        loss = diffusion_loss(model, prompt, response, 1, kind, first_step, gen(), w)
        close(loss, (nats * counted).sum() / counted.sum(), atol=1e-6)


@torch.no_grad()
def test_the_losses_of_parts_of_a_batch_add_up_to_its_own():
    """What several processes do."""
    model, prompt, response = tiny_gpt(), left_padded(LENGTHS), words(len(LENGTHS), 9, seed=1)
    extra = torch.tensor([[1, 2, 2]]).expand(len(LENGTHS), -1)
    loss = lambda rows=slice(None): diffusion_loss(model, prompt, response, 4, "complementary", 0.3, gen(), extra=extra, rows=rows)
    close(loss(), loss(slice(0, 2)) + loss(slice(2, None)), atol=1e-9)
