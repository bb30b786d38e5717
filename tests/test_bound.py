"""--trace bound (ours/bound.py): two requests, of which the second reads the trace alone.

Where two computations must agree they run in float64."""
import io
import itertools
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import evaluate
import gif
import opd_variants
import plumbing.teacher
import report.speed
import scripts
import speed
import train_ar
import train_cft
import train_opd
import train_rl
import trainer
from beauty import rerank
from config import Config
from conftest import LENGTHS, close, gen, left_padded, same_decode, tiny_gpt, words
from data import (ANSWER, CANDIDATES, EOS, LABEL, PAD, PROFILE, faithfulness, pack, parse_answers,
                  responses, tensors, token_weights)
from diffusion import replay_logp
from evaluate import score
from fast.gpt import FastGPT
from model import GPT, Sampling, ar_decode
from ours.bound import (answer_length, for_answer, joined, mean_loss, requests, trace_length,
                        what_is_read)
from report import html as page
from report.denoise import ar_writes, student_writes, user_of
from report.figures import denoising_figure, throughput_figure
from report.show import show_verdict
from report.speed import speed_jobs
from sampler import NEVER, Decoded, block_decode, plain_decode
from test_html import data_of, text_of
from test_stages import SGD, start, taught_by
from toy.world import toy_world

K, WORDS = 3, 15  # 6 label words, L1 is token 9: a random model writes labels often
MOST = 16         # tokens of a response: 12 of the trace with its [EOS], 5 of the answer
SEEDS = [0, 2, 3]  # of models that write traces of many lengths, empty ones among them
CFG = Config(n_candidates=K, trace="bound", block_size=16, commit="threshold", tau=0.5,
             bfloat16=False)
A, L1, L2, L3 = ANSWER, LABEL, LABEL + 1, LABEL + 2


def sized(B, **settings):
    return replace(CFG, block_size=B, **settings)


def parts_of(decoded, B):
    """The slots of the trace and of the answer in whole blocks."""
    R = -(-trace_length(CFG, MOST) // B) * B
    return slice(0, R), slice(R, decoded.tokens.shape[1])


# --- Training text ----------------------------------------------------------------------------

def test_requests_by_hand():
    prompt = torch.tensor([[PAD, PAD, 3, 12], [3, 12, 13, 14]])
    response = torch.tensor([[PROFILE, 13, 14, A, L2, L1, L3, EOS],
                             [PROFILE, A, L1, L2, EOS, PAD, PAD, PAD]])
    (cfg, read, trace), (own, told, answer) = requests(sized(16), prompt, response)
    assert cfg == sized(16) and own == sized(5)  # K labels, <answer> and [EOS]
    assert torch.equal(read, prompt)
    assert trace.tolist() == [[PROFILE, 13, 14, EOS], [PROFILE, EOS, PAD, PAD]]
    assert told.tolist() == [[PROFILE, 13, 14], [PAD, PAD, PROFILE]]
    assert answer.tolist() == [[A, L2, L1, L3, EOS], [A, L1, L2, EOS, PAD]]
    # No answer's block is wider than its setting says; without traces nothing is read.
    assert requests(sized(2), prompt, response)[1][0] == sized(2)
    (_, _, trace), (_, told, again) = requests(sized(16), prompt, answer)
    assert trace.tolist() == 2 * [[EOS, PAD]] and told.tolist() == [[PAD], [PAD]]
    assert torch.equal(again, answer)
    # Otherwise a response is one request.
    free = replace(CFG, trace="free")
    (cfg, read, whole), = requests(free, prompt, response)
    assert cfg is free and read is prompt and whole is response


@pytest.mark.parametrize("trace", ["free", "bound"])
def test_parts_that_are_joined_again_are_the_response(trace):
    cfg = Config(trace=trace, vary_lists=0.7, n_train=40, n_val=1, n_test=1)
    prompt, response = tensors(toy_world(cfg).train, range(40), "cpu")
    assert len(set((response != PAD).sum(1).tolist())) > 2
    parts = []
    for own, read, written in requests(cfg, prompt, response):
        parts.append((own, read, Decoded(*[written] * 4, torch.ones(len(written)))))
    whole = pack(joined(parts).tokens.numpy(), left=False)
    assert (whole == response.numpy()).all()
    assert joined(parts).forwards.tolist() == [float(len(parts))] * 40


def test_the_loss_of_the_parts_is_a_mean_over_their_tokens_by_their_weights():
    trace, answer = words(3, 6, vocab=WORDS), words(3, 5, vocab=WORDS)
    trace[trace == A], answer[:, 1:][answer[:, 1:] == A] = 10, 10
    trace[1, 4:], answer[:, 0], answer[2, 3:] = PAD, A, PAD
    cfg = replace(CFG, answer_weight=3.0)
    total = count = 0.0
    for loss, text in ((0.7, trace), (0.2, answer)):
        for row in text.tolist():
            for i, token in enumerate(row):
                weight = 3.0 if A in row[:i] else 1.0
                total += loss * weight * (token != PAD)
                count += weight * (token != PAD)
    losses = [torch.tensor(0.7), torch.tensor(0.2)]
    parts = [(cfg, None, trace), (for_answer(cfg), None, answer)]
    close(mean_loss(parts, losses), torch.tensor(total / count), atol=1e-6)
    of_decodes = [(own, read, Decoded(text, *[None] * 4)) for own, read, text in parts]
    assert mean_loss(of_decodes, losses) == mean_loss(parts, losses)
    assert mean_loss(parts[:1], losses[:1]) is losses[0]


@pytest.mark.parametrize("kind", [GPT, FastGPT])
def test_the_loss_of_ar_is_the_mean_over_both_requests(kind):
    """And what stands in the prompt does not matter to the answer's part."""
    cfg = replace(CFG, answer_weight=3.0)
    prompt, response = left_padded([4, 1, 6]), words(3, 9, vocab=WORDS)
    response[response == A] = 10
    response[:, 4], response[:, 8], response[1, 7], response[1, 8] = A, EOS, EOS, PAD
    model, seen = tiny_gpt(0, WORDS, kind=kind), []
    for n, read in enumerate((prompt, prompt.flip(1))):
        parts = requests(cfg, left_padded([4, 1, 6], n), response)
        losses, nats = zip(*(train_ar.ar_loss(own, model, *part, torch.arange(
            part[1].shape[1]).expand(3, -1)) for own, *part in parts))
        total = sum((x * token_weights(w, 3.0)).sum() for x, (_, _, w) in zip(nats, parts))
        weight = sum(token_weights(w, 3.0).sum() for _, _, w in parts)
        close(mean_loss(parts, losses), total / weight, atol=1e-6)
        seen.append(nats)
    assert torch.equal(seen[0][1], seen[1][1]) and not torch.equal(seen[0][0], seen[1][0])


# --- The ranking is a function of its trace ---------------------------------------------------

WAYS = {"AR": ("ar_decode", ar_decode, trainer.ar_write),
        "cached": ("block_decode", block_decode, trainer.decode),
        "uncached": ("block_decode", plain_decode, trainer.decode)}


def with_traces(monkeypatch, name, decoder, traces=()):
    """Makes `decoder` write all requests but the first ones, which get these results instead.
    Returns what it reads and writes: [(prompt, result)]."""
    given, seen = iter(traces), []

    def write(model, prompt, *rest):
        out = next(given, None)
        seen.append((prompt, decoder(model, prompt, *rest) if out is None else out))
        return seen[-1][1]

    monkeypatch.setattr(trainer, name, write)
    return seen


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("seed", SEEDS)
def test_who_edits_the_prompt_and_keeps_the_trace_changes_no_ranking(
        kind, way, seed, monkeypatch):
    name, decoder, write = WAYS[way]
    model = tiny_gpt(seed, WORDS, torch.float32, kind)
    prompt, edited = left_padded(LENGTHS, seed), left_padded(LENGTHS[::-1], seed + 1)
    for B in (4, 8):
        cfg = sized(B)
        seen = with_traces(monkeypatch, name, decoder)
        before, other = (write(cfg, model, p, MOST) for p in (prompt, edited))
        assert len(seen) == 4 and seen[0][0] is prompt
        again = with_traces(monkeypatch, name, decoder, [seen[0][1]])
        after = write(cfg, model, edited, MOST)
        assert again[0][0] is edited
        for field in ("tokens", "filled", "commit_step", "logp", "forwards"):
            assert torch.equal(getattr(after, field), getattr(before, field)), field
        # What the second request reads is the trace and nothing else. (Traces decide.)
        trace, answer = parts_of(before, 1 if way == "AR" else B)
        read = again[1][0]
        for row, text in zip(read, before.tokens[:, trace]):
            assert row[row != PAD].tolist() == text[text != PAD].tolist()
        assert not torch.equal(other.tokens[:, trace], before.tokens[:, trace])
        assert not torch.equal(other.tokens[:, answer], before.tokens[:, answer])


def test_a_ranking_that_sees_its_prompt_can_change_with_the_trace_kept():
    """What the test above would find: a free answer, after a trace that is given."""
    model, cfg = tiny_gpt(3, WORDS, kind=FastGPT), replace(CFG, trace="free", block_size=4)
    prefix = words(6, 8, vocab=WORDS)
    answers = [block_decode(model, p, MOST, 4, trainer.rule_of(cfg), prefix=prefix).tokens[:, 8:]
               for p in (left_padded(LENGTHS), left_padded(LENGTHS[::-1], 1))]
    assert not torch.equal(*answers)


@pytest.mark.parametrize("seed", SEEDS)
def test_blocks_of_one_token_are_ar(kind, seed):
    model, prompt = tiny_gpt(seed, WORDS, kind=kind), left_padded(LENGTHS, seed)
    same_decode(trainer.decode(sized(1), model, prompt, MOST),
                trainer.ar_write(sized(1), model, prompt, MOST))


@pytest.mark.parametrize("seed", SEEDS)
def test_both_kinds_of_model_write_the_same_and_so_does_a_row_alone(seed):
    models = [tiny_gpt(seed, WORDS, kind=kind) for kind in (GPT, FastGPT)]
    prompt = left_padded(LENGTHS, seed)
    for cfg in (sized(4), sized(8), sized(3, commit="independent", tau=0.7)):
        plain, quick = (trainer.decode(cfg, model, prompt, MOST) for model in models)
        same_decode(plain, quick)
        same_decode(*(trainer.ar_write(cfg, model, prompt, MOST) for model in models))
        alone = [trainer.decode(cfg, models[1], p[p != PAD][None], MOST).tokens for p in prompt]
        assert torch.equal(torch.cat(alone), plain.tokens)
    trace, _ = parts_of(plain, 3)
    assert len(set((plain.tokens[:, trace] != PAD).sum(1).tolist())) > 1


@pytest.mark.parametrize("B, width", [(1, 5), (4, 8), (5, 5), (8, 5), (16, 5)])
def test_an_answer_has_blocks_of_its_own_no_wider_than_it_is(B, width):
    cfg = sized(B)
    assert answer_length(cfg) == 5 and trace_length(cfg, MOST) == 12
    decoded = trainer.decode(cfg, tiny_gpt(3, WORDS), left_padded(LENGTHS), MOST)
    trace, answer = parts_of(decoded, B)
    assert answer.stop - answer.start == width and trace.stop % B == 0
    assert EOS not in decoded.tokens[:, trace] and (decoded.tokens[:, trace] == PAD).any()
    assert (decoded.tokens[:, answer.start] != PAD).all()  # the answer begins its block
    ends = (decoded.filled[:, trace] == EOS).any(1)
    written = (decoded.tokens[:, trace] != PAD).sum(1)
    assert torch.equal(ends, written < 12) or B > 1
    assert (decoded.forwards >= 2).all()


# --- OPD and RL -------------------------------------------------------------------------------

def rolled_out(cfg, model, prompt, group=1, heat=1.0, seed=0):
    return trainer.roll_out(cfg, model, prompt, MOST, 0.6, Sampling(heat, gen(seed)), group)


@pytest.mark.parametrize("B", [1, 4, 8])
def test_a_group_shares_its_trace_and_its_answers_are_drawn(kind, B):
    cfg, model, prompt = sized(B), tiny_gpt(3, WORDS, kind=kind), left_padded(LENGTHS)
    (_, first, trace), (own, read, answer) = rolled_out(cfg, model, prompt, group=4)
    assert own == sized(min(B, 5)) and first is prompt
    greedy = trainer.decode(cfg, model, prompt, MOST, tau=0.6)
    slots, _ = parts_of(greedy, B)
    assert torch.equal(trace.filled, greedy.filled[:, slots])
    assert torch.equal(read, what_is_read(trace.tokens).repeat_interleave(4, dim=0))
    drawn = answer.tokens.view(len(prompt), 4, -1)
    assert sum(len(rows.unique(dim=0)) > 1 for rows in drawn) > 3
    # One roll-out a prompt: at temperature 0 it is what is served; else the trace is drawn too.
    same_decode(joined(rolled_out(cfg, model, prompt, heat=0.0)), greedy)
    one = rolled_out(cfg, model, prompt)[0][-1]
    assert not torch.equal(one.tokens, trace.tokens)


@pytest.mark.parametrize("B", [1, 4, 8])
def test_what_was_drawn_is_replayed_exactly(kind, B):
    model, prompt = tiny_gpt(3, WORDS, kind=kind), left_padded(LENGTHS)
    for group, heats in ((3, (0.0, 1.0)), (1, (1.0, 1.0))):
        parts = rolled_out(sized(B), model, prompt, group)
        for (own, read, decoded), heat in zip(parts, heats):
            logp = replay_logp(model, read, decoded, own.block_size, heat)
            close(logp, decoded.logp)
            assert (decoded.logp < 0).any()


def learns(model, loss):
    """Whether every weight of a model gets a gradient."""
    found = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    return all(g.abs().max() > 0 for g in found)


def test_opd_and_cft_learn_from_both_requests(monkeypatch):
    cfg = replace(CFG, n_candidates=8, n_train=20, n_val=4, n_test=4, batch_size=3)
    world = toy_world(cfg)
    student, teacher = (tiny_gpt(seed, len(world.words)) for seed in (3, 0))
    run, seen = SGD(student, 0.0), []
    opd_loss, cft_loss = train_opd.opd_loss, train_cft.cft_loss

    def recorded(name, loss):
        def record(own, model, *rest):
            out = loss(own, model, *rest)
            assert learns(student, out)
            seen.append((name, own.block_size, rest[-2], out.item()))
            return out
        return record

    monkeypatch.setattr(train_opd, "opd_loss", recorded("opd", opd_loss))
    monkeypatch.setattr(train_cft, "cft_loss", recorded("cft", cft_loss))
    start(monkeypatch, train_opd, world, run)
    taught_by(monkeypatch, train_opd, teacher)
    train_opd.main(replace(cfg, opd_anchor=2.0))
    assert [(name, B) for name, B, *_ in seen] == [("opd", 16), ("opd", 10), ("cft", 16),
                                                   ("cft", 10)]
    total = 0.0
    for name, scale in (("opd", 1.0), ("cft", 2.0)):
        texts, losses = zip(*((text, loss) for of, _, text, loss in seen if of == name))
        total += scale * mean_loss([(cfg, None, text) for text in texts], losses)
    assert run.losses == pytest.approx([float(total)])


def test_rl_pushes_the_answers_and_its_anchor_holds_both_requests(monkeypatch):
    cfg = replace(CFG, n_candidates=8, n_train=20, n_val=4, n_test=4, rl_prompts=2, rl_group=3,
                  rl_epochs=1, rl_anchor=2.0)
    world, written, anchors, updates = toy_world(cfg), [], [], []
    run, teacher = SGD(tiny_gpt(3, len(world.words)), 0.0), tiny_gpt(0, len(world.words))
    update, opd_loss = train_rl.update, train_rl.opd_loss

    def roll_out(*args):
        written.extend(trainer.roll_out(*args))
        return list(written)

    def loss(own, *rest):
        anchors.append((own, *rest[-3:-1], opd_loss(own, *rest)))
        assert learns(run.model, anchors[-1][-1])
        return anchors[-1][-1]

    def its_update(*args):
        updates.append(args)
        return update(*args)

    monkeypatch.setattr(train_rl, "roll_out", roll_out)
    monkeypatch.setattr(train_rl, "opd_loss", loss)
    monkeypatch.setattr(train_rl, "update", its_update)
    rewards = np.array([0.5, 0.5, 0.5, 1.0, 0.0, -1.0])
    monkeypatch.setattr(train_rl, "score_answers", lambda cfg, world, rows, decoded: (rewards, {}))
    start(monkeypatch, train_rl, world, run)
    taught_by(monkeypatch, train_rl, teacher)
    train_rl.main(cfg)

    (_, prompt, trace), (own, read, answer) = written
    assert len(prompt) == 2 and len(read) == 6  # a group shares its trace
    (settings, _, its_read, its_answer, _, _), = updates
    assert settings == own == replace(cfg, block_size=10)
    assert torch.equal(its_read, read[3:])  # the group with a signal
    same_decode(its_answer, answer.take(slice(3, 6)))
    assert run.logs[0]["replay_off"] < 1e-9

    (of_trace, of_answer) = anchors
    assert of_trace[0] == cfg and of_trace[1] is prompt and of_trace[2] is trace
    assert of_answer[0] == own and torch.equal(of_answer[1], read[3:])
    both = mean_loss([anchor[:3] for anchor in anchors], [anchor[3] for anchor in anchors])
    assert run.losses == pytest.approx([run.logs[0]["policy_loss"] + 2 * both.item()])


@pytest.mark.parametrize("B", [4, 8])
def test_variants_of_opd_without_switches_are_opd(B):
    cfg, prompt = sized(B), left_padded(LENGTHS)
    student, teacher = tiny_gpt(3, WORDS), tiny_gpt(0, WORDS)
    for own, read, decoded in rolled_out(cfg, student, prompt, heat=0.0):
        what = student, teacher, read, decoded, gen(1)
        loss = train_opd.opd_loss(own, *what)
        what[-1].manual_seed(1)
        assert torch.equal(opd_variants.variant_loss(own, opd_variants.Options(), *what), loss)


# --- The teacher's own text -------------------------------------------------------------------

class Teacher:
    """Stands in for ar_decode: traces of its own, then the reference's answers, some of them
    with a label twice. Its second request sees a trace, and finds the user by it."""

    def __init__(self, world):
        self.train = world.train
        self.trace = np.array(world.train.trace, np.int64)
        self.trace[:, 1] = 20 + np.arange(len(self.trace)) % 5    # a word is its own
        self.trace[::4, 30:] = PAD                                # shorter than the rule's
        order = world.train.order.copy()
        order[::3, 1] = order[::3, 0]                             # a label twice
        none = np.zeros((len(order), 0), int)
        self.answer = responses(none, order).astype(np.int64)
        self.said = responses(self.trace, order).astype(np.int64)

    def ar_decode(self, model, prompt, max_len):
        of_prompt = (prompt == CANDIDATES).any()
        known = self.train.prompt if of_prompt else self.trace
        seen = [row[row != PAD].tolist() for row in known]
        rows = [seen.index(row[row != PAD].tolist()) for row in prompt]
        text = self.trace[rows] if of_prompt else self.answer[rows]
        end = np.full((len(rows), max_len), PAD)
        end[:, :text.shape[1]] = text
        if of_prompt:
            end[np.arange(len(rows)), (text != PAD).sum(1)] = EOS
        tokens = torch.from_numpy(end)
        return tokens, torch.zeros(tokens.shape), (tokens != PAD).sum(1)


def test_the_teachers_text_is_split_into_what_it_wrote(monkeypatch, tmp_path):
    cfg = Config(trace="bound", n_train=40, n_val=4, n_test=4, run_dir=str(tmp_path),
                 cft_gold=False, vary_lists=0.0)
    world = toy_world(cfg)
    teacher = Teacher(world)
    monkeypatch.setattr(plumbing.teacher, "load_stage", lambda *args: (tiny_gpt(), None))
    monkeypatch.setattr(trainer, "ar_decode", teacher.ar_decode)
    found = train_cft.training_responses(cfg, world)
    valid = np.arange(40) % 3 > 0
    wanted = np.where(valid[:, None], teacher.said, world.train.response)
    assert (found.numpy() == wanted).all()
    prompt, _ = tensors(world.train, range(40), "cpu")
    (_, _, trace), (_, read, answer) = requests(cfg, prompt, found)
    for n in np.flatnonzero(valid):
        own = teacher.trace[n][teacher.trace[n] != PAD].tolist()
        assert trace[n][trace[n] != PAD].tolist() == [*own, EOS]
        assert read[n][read[n] != PAD].tolist() == own
        assert answer[n].tolist() == teacher.answer[n].tolist()


# --- What is read off -------------------------------------------------------------------------

def test_a_hole_before_the_answer_changes_no_score():
    world = toy_world(Config(n_train=1, n_val=1, n_test=40))
    split, rng = world.test, np.random.default_rng(0)
    tokens = split.response.astype(np.int64)
    answer = int((tokens[0] == A).argmax())
    for row in tokens[::2]:                                       # traces with a mistake
        row[rng.integers(answer)] = rng.integers(LABEL, len(world.words))
    for row in tokens[::3]:                                       # answers with a label twice
        row[answer + 2] = row[answer + 1]
    tokens[5, answer] = 20                                        # no <answer>
    hole = np.full((40, 7), PAD)
    holed = np.concatenate((tokens[:, :answer], hole, tokens[:, answer:]), axis=1)
    plain, seen = (score(world, split, text, np.ones(40)) for text in (tokens, holed))
    assert plain.keys() == seen.keys() and plain["valid"].mean() < 0.7
    for name, values in plain.items():
        if name != "faithful":
            assert (values == seen[name]).all(), name
    # A trace ends where a hole begins, with or without <answer>.
    others = np.arange(40) != 5
    assert (plain["faithful"] == seen["faithful"])[others].all()
    assert (faithfulness(holed, split.trace, world.n_labels) < 1).any()
    assert (parse_answers(holed, split.incoming).trace_tokens[others] == answer).all()


def shown_world(B):
    """A toy world, settings, and a model that writes traces of many lengths."""
    cfg = Config(trace="bound", n_train=8, n_val=8, n_test=6, block_size=B, commit="threshold",
                 tau=0.3, device="cpu")
    world = toy_world(cfg)
    model = tiny_gpt(4, len(world.words), torch.float32, FastGPT)
    with torch.no_grad():
        model.embed.weight[EOS] *= 2
    return cfg, world, model


@pytest.mark.parametrize("B", [1, 4, 16])
def test_viewers_show_what_was_written_and_leave_the_slots_of_a_hole_empty(B):
    cfg, world, model = shown_world(B)
    lengths, holes = set(), 0
    for n in range(4):
        prompt, _ = tensors(world.test, range(n, n + 1), "cpu")
        written = student_writes(cfg, "cft", model, prompt, world.max_response, cfg.tau)
        decoded = trainer.decode(cfg, model, prompt, world.max_response)
        words_ = decoded.tokens[0][decoded.tokens[0] != PAD].tolist()
        assert written.tokens[written.tokens != PAD].tolist() == words_
        assert len(written.ends) == int(decoded.forwards) == 1 + written.forward.max()
        steps = decoded.commit_step[0][decoded.tokens[0] != PAD]
        assert written.step[written.tokens != PAD].tolist() == steps.tolist()
        # A block is B slots wide, but the answer's. Each has been opened, after those before it.
        block = np.arange(len(written.tokens)) // B
        own = min(B, cfg.n_candidates + 2)
        begin = written.slots - -(-(written.slots % B or B) // own) * own
        assert (written.slots - begin) % own == 0 and len(written.tokens) <= written.slots
        taken = [[f for f in written.forward[block == b] if f >= 0] for b in np.unique(block)]
        assert all(taken)
        for first, second in itertools.pairwise(taken):
            assert max(first) < min(second)
        lengths.add(len(written.tokens))
        holes += int((written.tokens == PAD).sum())

        ar = ar_writes(cfg, model, prompt, world.max_response)
        teacher = trainer.ar_write(cfg, model, prompt, world.max_response)
        assert ar.tokens.tolist() == teacher.tokens[0][teacher.tokens[0] != PAD].tolist()
        assert len(ar.ends) == int(teacher.forwards) and (np.diff(ar.forward) > 0).all()
        show_verdict(user_of(world, n), [ar, written])

        if n > 1:
            continue  # drawing takes long
        fig, _, order = denoising_figure(cfg, world, model, user=n)
        assert len(order) == int(decoded.forwards) and fig.axes[0].get_title().startswith(
            f"{len(words_)} of {len(words_)} tokens in {len(order)} forward")
    assert len(lengths) > 1 and holes


def test_thoughts_are_of_slots_that_were_open():
    cfg, world, model = shown_world(16)
    for n in range(6):
        prompt, _ = tensors(world.test, range(n, n + 1), "cpu")
        how = model, prompt, world.max_response, cfg.tau
        written, thought = student_writes(cfg, "cft", *how), page.thoughts(cfg, *how)
        assert len(thought) == len(written.ends)
        for slot in np.flatnonzero(written.tokens != PAD):
            number = written.forward[slot]
            assert thought[number][slot][0][0] == written.tokens[slot]  # greedily: the likeliest
        assert max(max(slots) for slots in thought) < written.slots


# --- From end to end --------------------------------------------------------------------------

BOUND = ("--trace", "bound", "--block_size", "16")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with all stages of the toy world."""
    folder = tmp_path_factory.mktemp("bound")
    with pytest.MonkeyPatch.context() as monkeypatch:
        for module in (train_ar, train_cft, train_opd, train_rl):
            scripts.run(module, monkeypatch, folder, *BOUND)
    return folder


def test_the_table_of_all_stages(made, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "draw_figures", lambda *args: None)
    monkeypatch.setattr(report.speed, "BATCHES", (1, 2))
    tables = []
    for fast in ("true", "false"):
        scripts.run(evaluate, monkeypatch, made, *BOUND, "--eval_taus", "1", "--fast", fast)
        monkeypatch.setattr(evaluate, "add_times", lambda *args: None)
        rows = json.loads((made / "toy" / "report.json").read_text())["rows"]
        reported = {row["stage"]: row for row in rows if row["reported"]}
        tables.append({stage: [row[name] for name in ("strict", "valid", "forwards", "faithful")]
                       for stage, row in reported.items()})
        assert reported["constrained"]["valid"] == 1
        assert fast == "false" or reported["ar"]["speedup_b1"] == 1
    stages = ["ar", "naive", "cft", "opd", "rl", "constrained"]
    assert [stage for stage in reported if stage in stages] == stages
    assert tables[0] == tables[1]
    message = scripts.refused(evaluate, monkeypatch, capsys, made, "--trace", "free")
    assert "trace=bound there, free now" in message


def test_the_gif_of_a_run(made, monkeypatch, tmp_path):
    scripts.run(gif, monkeypatch, made, *BOUND, "--out", str(tmp_path / "x.gif"), "--tau", "0.01")
    assert (tmp_path / "x.gif").stat().st_size > 500


def test_a_timed_response_is_both_requests_and_the_end_of_the_trace_is_no_token():
    cfg, world, model = shown_world(16)
    read = []
    hook = model.register_forward_pre_hook(lambda model, args: read.append(args[0].shape[1]))
    for name, job in speed_jobs(cfg, world, model, model, 2, world.max_response).items():
        read.clear()
        tokens = job(0)
        trace = (tokens[:, :-10] != PAD).sum(1).max().item()      # the answer has 10 slots
        first, second = (16, 10) if name == "block" else (0, 0)   # blocks are read with their text
        assert read[0] == world.test.prompt.shape[1] + first
        assert max(1, trace) + second in read[1:] and EOS not in tokens[:, :-10]
    hook.remove()


@pytest.mark.parametrize("B", [1, 4, 16])
def test_the_blocks_of_both_requests_are_counted(B):
    cfg, world, model = shown_world(B)
    for trace in ("bound", "free"):
        own = replace(cfg, trace=trace)
        prompt, _ = tensors(world.test, range(6), "cpu")
        decoded = trainer.decode(own, model, prompt, world.max_response)
        step = decoded.commit_step.numpy()
        step = np.pad(step, ((0, 0), (0, -step.shape[1] % B)), constant_values=NEVER)
        begun = (step.reshape(6, -1, B) != NEVER).any(2).sum(1)
        assert (speed.blocks_of(own, world, decoded.tokens.numpy()) == begun).all()
        assert B == 16 or len(set(begun.tolist())) > 1


@pytest.mark.parametrize("B", [4, 16])
def test_speed_is_measured_by_length_where_an_answer_fits(B):
    cfg, world, model = shown_world(B)
    options = evaluate.Options(eval_speed_seconds=0.0)
    fig = throughput_figure(cfg, options, world, {"ar": model, "cft": model})
    lengths = fig.axes[0].lines[0].get_xdata().tolist()
    assert lengths == [16, world.max_response] if B == 4 else [16, 32, world.max_response]


def test_users_in_the_terminal(made, monkeypatch, capsys):
    scripts.run(evaluate, monkeypatch, made, *BOUND, "--show", "2")
    out = capsys.readouterr().out
    assert out.count("true next item") == 2 and "rl of toy" in out and "by ar" in out


@pytest.fixture(scope="module")
def data(made):
    with pytest.MonkeyPatch.context() as monkeypatch:
        scripts.run(page, monkeypatch, made, *BOUND, "--users", "2", "--taus", "0.9")
    return data_of(text_of(made))


def test_the_page_holds_both_requests(data):
    for user in data["users"]:
        for response in (user["ar"], *user["students"]["rl"].values()):
            tokens = [data["words"][i] for i in response["tokens"]]
            forwards = [f for f, token in zip(response["forward"], tokens) if token != "[PAD]"]
            assert max(forwards) < len(response["ends"]) and min(forwards) >= 0
            assert max(response["step"]) < 100
            if response is not user["ar"]:
                assert len(response["top"]) == len(response["ends"])
                assert len(tokens) <= response["slots"]
                assert response["slots"] % 16 == 10  # the answer's block


def test_requests_of_ones_own(made, monkeypatch, capsys):
    items = [[0, 1, 2], [3, 3, 3], [4, 0, 1], [2, 2, 2]]
    lines = [json.dumps({"id": n, "history": [[0, 1, n % 5]] * 6, "candidates": items})
             for n in range(3)]
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO("\n".join(lines).encode())))
    with pytest.raises(SystemExit) as stop:
        scripts.run(rerank, monkeypatch, made, *BOUND, "--requests", "-")
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert stop.value.code == 0 and [line["id"] for line in found] == [0, 1, 2]
    for line in found:
        assert list(line) == ["id", "ranking", "valid", "faithful", "trace", "forwards", "tokens",
                              "stage", "decisive"]
        assert line["stage"] == "rl" and line["faithful"] is not None
        assert sorted(line["ranking"]) == sorted(items)


def test_variants_of_opd_and_the_teachers_text(made, monkeypatch, tmp_path):
    begin = ("--teacher", scripts.checkpoint(made, "ar"),
             "--init", scripts.checkpoint(made, "cft"))
    for n, switches in enumerate(((), ("--source", "teacher", "--states", "committed"))):
        scripts.run(opd_variants, monkeypatch, tmp_path / str(n), *BOUND, *begin, *switches)
    plain, same = (torch.load(scripts.checkpoint(folder, "opd"))["model"]
                   for folder in (made, tmp_path / "0"))
    assert all(torch.equal(plain[name], same[name]) for name in plain)
