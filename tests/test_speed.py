"""experiments/speed.py, peers.py, training.py: what they count; that peers write our text."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import peers
import speed
import training
from conftest import close, left_padded, tiny_gpt, words
from data import ANSWER, EOS, LABEL, PAD, PROFILE
from fast.gpt import FastGPT
from model import ar_decode, causal_hidden
from plumbing.arguments import parse_args
from sampler import Threshold, block_decode
from trainer import load_world

LABELS = 4
E = LABEL + LABELS  # the first token that is neither a template word nor a label


def unless(reason):
    return pytest.mark.skipif(reason is not None, reason=str(reason))


def needs(package):
    return unless(peers.missing(package))


def tiny_fast(seed=0, dtype=torch.float64):
    """conftest.tiny_gpt as a FastGPT."""
    plain = tiny_gpt(seed, dtype=dtype)
    model = FastGPT(plain.embed.num_embeddings, n_layer=2, n_head=2, d_model=16).to(dtype)
    model.load_state_dict(plain.state_dict())
    return model.eval()


# --- Prompt lookup ----------------------------------------------------------------------------

def test_looking_up_takes_the_latest_place_of_the_longest_end():
    assert peers.look_up([3, 4, 5, 6, 3, 4, 7, 8, 3, 4], 2) == [7, 8]
    assert peers.look_up([3, 4, 5, 9, 4], 3) == [5, 9, 4]
    assert peers.look_up([3, 4, 5], 2) == []


@pytest.mark.parametrize("seed", [0, 3, 4, 5])
@pytest.mark.parametrize("n_guess", [1, 4])
def test_prompt_lookup_writes_what_ar_writes(seed, n_guess):
    model, saved = tiny_fast(seed), 0
    # Each prompt is said twice, so that there is something to look up.
    for prompt in words(4, 7, seed=seed).repeat(1, 2):
        text, _, forwards = ar_decode(model, prompt[None], 24)
        looked, n = peers.lookup_decode(model, prompt[None], 24, n_guess)
        assert torch.equal(looked, text) and n <= forwards[0]
        saved += int(forwards[0]) - n
    assert saved > 0


# --- What is counted --------------------------------------------------------------------------

def test_evidence_is_what_stands_in_the_trace_beside_labels_and_template():
    tokens = np.array([
        [PROFILE, E, E + 1, LABEL, E, LABEL + 1, E, ANSWER, LABEL + 1, LABEL, EOS, PAD],
        [PROFILE, E, EOS] + [PAD] * 9,           # no answer
        [ANSWER, LABEL, E, EOS] + [PAD] * 8])    # no trace; a stray word in the answer
    assert speed.evidence_tokens(tokens, LABELS).tolist() == [4, 1, 0]


def test_the_cost_model_is_fitted_and_crosses_where_it_should():
    grid = [(w, n) for w in (1, 8, 16) for n in (1, 64)]
    points = [(w, n, 2e-3 + 1e-6 * w * n) for w, n in grid]
    assert speed.fit(points) == pytest.approx([2e-3, 1e-6])
    points = [(w, n, 2e-3 + 1e-6 * w * n + 5e-6 * n) for w, n in grid]
    assert speed.fit(points, rows=True) == pytest.approx([2e-3, 1e-6, 5e-6])
    figures = speed.model_figures([2e-3, 1e-6, 5e-6], points)
    assert figures == pytest.approx({"a_ms": 2, "b_us": 1, "c_us": 5, "median_error": 0})
    # Width is free: tokens a forward. Then width alone counts.
    assert speed.predicted([1.0, 0.0], 16, 50, 1, 64, 8) == pytest.approx(8)
    widths = 16 + 3 * 32 + 12 * 16
    assert speed.predicted([0.0, 1.0], 16, 0, 1, 64, 4) == pytest.approx(63 / widths)
    assert speed.crossover([(1, 2.0), (4, 2.0), (16, 0.5)]) == pytest.approx(8)
    assert speed.crossover([(1, 2.0), (4, 1.5)]) is None


def test_ratios_are_medians_of_rounds_of_time_a_token():
    taken = {"a": np.array([[1.0, 10], [2.0, 10], [9.0, 10]]),
             "b": np.array([[1.0, 5], [1.0, 5], [1.0, 5]])}
    assert speed.ratio(taken, "a", "b") == pytest.approx(1.0)
    calls = []

    def job(name):
        def run(i):
            calls.append((i, name))
            return torch.tensor([[i + 3, PAD]])
        return run
    taken, texts = speed.in_turn({name: job(name) for name in "ab"}, 0.0)
    assert calls == [(0, "a"), (0, "b"), (1, "b"), (1, "a")]
    assert taken["a"].shape == (1, 2) and taken["a"][0, 1] == 1
    assert texts["b"][0].tolist() == [[4, PAD]]


class Prompts(SimpleNamespace):
    def __len__(self):
        return len(self.prompt)


def test_the_curves_never_end_and_take_the_number_of_forwards_asked_for():
    cfg = parse_args("", "--d_model 16 --n_layer 1 --device cpu --block_size 8".split())
    prompts = left_padded([3, 5]).numpy().astype(np.int16)
    world = SimpleNamespace(words=["w"] * 10, test=Prompts(prompt=prompts, response=prompts))
    model = speed.endless(cfg, world, 32)
    assert (ar_decode(model, words(2, 5), 32)[0] != PAD).all()
    point = speed.scaled(cfg, world, 2, 32, per_forward=3.2, seconds=0)
    assert point["steps"] == [2, 3] and point["forwards"] == [8, 12] and point["speedup"] > 0


# --- Peers ------------------------------------------------------------------------------------

def measured(prompt):
    """What speed.clock gives, on one prompt."""
    def measure(jobs, batch):
        def job(decoder):
            return lambda i: decoder(prompt[:batch])
        taken, texts = speed.in_turn({name: job(f) for name, f in jobs.items()}, 0.0)
        return taken, texts | {"prompt": [prompt[:batch]]}
    return measure


def test_absent_packages_are_named_and_leave_null(monkeypatch, capsys):
    assert "no_such_package" in peers.missing("no_such_package")
    assert peers.missing("json") is None
    monkeypatch.setattr(peers, "missing", lambda package: f"{package} cannot be imported")
    model = tiny_fast(dtype=torch.float32)
    out = peers.compare(parse_args("", []), 16, (model, model), measured(words(2, 8)),
                        speed.ratio)
    assert out["ar_vs_transformers"] is None and out["sampler_vs_peers"] is None
    assert len(out["missing"]) == 3
    assert {name.split(",")[0] for name in out["vs_prompt_lookup"]["of"]} == {"own"}
    assert "transformers cannot be imported" in capsys.readouterr().out


def test_a_difference_is_measured_where_two_texts_part():
    model, prompt = tiny_fast(), words(2, 6)
    text = ar_decode(model, prompt, 8)[0]
    other = text.clone()
    other[1, 2] = 3 if text[1, 2] != 3 else 4
    found = peers.gaps(model, prompt, text, other)
    assert len(found) == 1 and found[0] > 0
    assert peers.gaps(model, prompt, text, text) == []


@needs("transformers")
@pytest.mark.parametrize("seed", [0, 3])
def test_transformers_writes_the_same_tokens_with_our_weights(seed):
    model, prompt = tiny_fast(seed, torch.float32), left_padded([4, 9, 6])
    hf, text = peers.arcee(model), ar_decode(model, prompt, 16)[0]
    whole = torch.cat((prompt, text), dim=1)[1:2, :-1]
    with torch.no_grad():
        ours = model.logits(causal_hidden(model, prompt[1:2], text[1:2]))
        close(hf(whole).logits[:, -16:, EOS:], ours[..., EOS:], atol=1e-4)
    for cache in (None, "static"):
        assert torch.equal(peers.generate(hf, prompt, 16, cache), text)
    assert torch.equal(peers.generate(hf, prompt[1:2], 16, guess=4), text[1:2])


SAMPLERS = [
    pytest.param(peers.llada2, marks=needs("diffusers"), id="diffusers"),
    pytest.param(peers.dual_cache, marks=unless(peers.fast_dllm()), id="Fast-dLLM")]


@pytest.mark.parametrize("peer", SAMPLERS)
@pytest.mark.parametrize("seed", [0, 3, 4])
@pytest.mark.parametrize("length", [3, 8])
def test_other_samplers_write_the_same_tokens_under_the_same_rule(peer, seed, length):
    model = tiny_fast(seed, torch.float32)
    theirs, net = peer(model, 4, 0.6)
    for prompt in words(3, length, seed=seed):
        ours = block_decode(model, prompt[None], 16, 4, Threshold(0.6))
        net.forwards = 0
        assert torch.equal(theirs(prompt[None], 16), ours.tokens)
        assert net.forwards >= ours.forwards[0]


# The packages may be absent. That our network answers as their samplers expect needs none of them.

@pytest.mark.parametrize("seed", [0, 3, 4])
def test_the_network_that_other_samplers_call_writes_what_ours_writes(seed):
    model, B = tiny_fast(seed), 4
    net, tau = peers.Uncached(model, B), 0.6
    for prompt in words(3, 8, seed=seed)[:, None]:
        ours = block_decode(model, prompt, 16, B, Threshold(tau))
        net.P, text = prompt.shape[1], prompt
        for begin in range(0, 16, B):
            block = torch.full((1, B), 1)                         # [MASK]
            open_ = block == 1
            while open_.any() and EOS not in text[:, net.P:]:
                logits = net(torch.cat((text, block), dim=1), None, None).logits
                p, best = logits.softmax(-1).max(-1)
                p = torch.where(open_, p, -1.0)
                chosen = (p > tau) | (p == p.max())
                block = torch.where(chosen & open_, best, block)
                after = (block == EOS).cumsum(1) > 0
                open_ = (block == 1) & ~after
            text = torch.cat((text, block), dim=1)
        assert torch.equal(peers.to_end(text[:, net.P:]).masked_fill(
            ours.tokens == PAD, PAD), ours.tokens)


# --- Training steps ---------------------------------------------------------------------------

def test_the_costs_of_a_step_are_measured_on_the_script_itself_and_leave_nothing(tmp_path):
    tiny = "--n_train 64 --n_val 8 --n_test 8 --d_model 16 --n_layer 1 --batch_size 4 --threads 1"
    cfg = parse_args("", [*tiny.split(), "--run_dir", str(tmp_path)])
    before = training.train_ar.causal_hidden
    found = training.costs(cfg, load_world(cfg), "ar")
    parts = list(found["parts"].values())
    assert parts == sorted(parts, reverse=True)
    assert min(found["parts"][name] for name in ("forward", "backward", "Muon", "AdamW")) > 0
    assert sum(parts) <= 1.05 * found["step"]  # medians, each of its own
    assert training.train_ar.causal_hidden is before and not list(tmp_path.iterdir())


def test_every_timed_part_is_there():
    for stage, parts in training.PARTS.items():
        assert hasattr(training.SCRIPTS[stage], "main")
        for where, name in parts.values():
            assert callable(getattr(where, name))
