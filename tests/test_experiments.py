"""experiments/: commit rules of others, variants of OPD, ablations, analysis."""
import importlib
import json
import os
import subprocess
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import ablations
import analyse
import opd_variants
import scripts
import train_ar
import train_cft
import train_opd
import validity
from config import Config
from conftest import close, left_padded, tiny_gpt, words
from data import ANSWER, EOS, LABEL, MASK, PAD, responses, tensors
from diffusion import replay_logp
from model import Sampling, causal_hidden
from plumbing import script
from plumbing.arguments import parse_args
from plumbing.checkpoint import load_tensors
from rules import Factor, Steps
from sampler import NEVER, block_decode
from test_exercises import alone, bound_by_orders
from toy.world import toy_world
from trainer import roll_out

CFG = Config(trace="free", n_train=60, n_val=10, n_test=10, bfloat16=False)
FREE = ("--trace", "free")


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def run(module, monkeypatch, run_dir, *options):
    few = ("--opd_prompts", "16", "--every", "3")
    scripts.run(module, monkeypatch, run_dir, *few, *options)


def refused(*args):
    return scripts.refused(*args, run=run)


def weights(run_dir, stage):
    return load_tensors(os.path.join(run_dir, "toy", "seed0", stage, "checkpoint.pt"))["model"]


# --- Commit rules -----------------------------------------------------------------------------

def flat_but_one(confidence, word, vocab=1000):
    """Log-probabilities (N, B, vocab) that give each slot's word (N, B) the probability
    confidence (N, B), and the others the rest."""
    rest = ((1 - confidence) / (vocab - 1))[..., None].expand(-1, -1, vocab)
    return rest.scatter(2, word[..., None], confidence[..., None]).log()


def said(confidence):
    return flat_but_one(confidence, torch.arange(confidence.shape[1]).expand(confidence.shape))


def mirrored(x):
    return torch.cat((x.flip(1), x))


@pytest.mark.parametrize("rule, confidence, open_, chosen", [
    # 2 x .05, 3 x .1, 4 x .2 = .8 < 1; 5 x .3 is not
    (Factor(1.0), [.8, .9, .7, .95], [1, 1, 1, 1], [1, 1, 0, 1]),
    (Factor(1.0), [.8, .9, .7, .95], [1, 0, 1, 1], [1, 0, 0, 1]),  # 2 x .05, 3 x .2; 4 x .3 = 1.2
    (Factor(1.3), [.8, .9, .7, .95], [1, 0, 1, 1], [1, 0, 1, 1]),
    (Factor(0.05), [.8, .9, .7, .95], [1, 1, 1, 1], [0, 0, 0, 1]),  # at least the best
    (Factor(9.0), [.8, .9, .7, .95], [1, 0, 1, 0], [1, 0, 1, 0]),
    (Factor(9.0), [.8, .9, .7, .95], [0, 0, 0, 0], [0, 0, 0, 0]),
    (Steps(2), [.8, .9, .7, .95], [1, 1, 1, 1], [0, 1, 0, 1]),  # 4 slots in 2 steps: 2 a step
    (Steps(3), [.8, .9, .7, .95], [1, 0, 1, 1], [1, 0, 0, 1]),  # rounded up: 2 a step
    (Steps(4), [.8, .9, .7, .95], [1, 0, 1, 0], [1, 0, 0, 0]),
    (Steps(1), [.1, .2, .7, .95], [1, 0, 1, 1], [1, 0, 1, 1])])
def test_choose_by_hand(rule, confidence, open_, chosen):
    confidence, open_ = torch.tensor([confidence]), torch.tensor([open_]).bool()
    none = torch.zeros_like(open_)
    assert rule.choose(said(confidence), open_, none).int().tolist() == [chosen]
    closed_high = torch.where(open_, confidence, 0.999)  # what closed slots show must not matter
    assert rule.choose(said(closed_high), open_, none).int().tolist() == [chosen]
    both = rule.choose(said(mirrored(confidence)), mirrored(open_), mirrored(none))
    assert both.int().tolist() == [chosen[::-1], chosen]


def test_a_forced_slot_is_committed_and_stands_for_the_best():
    logp, open_ = said(torch.tensor([[.1, .6, .5]])), torch.ones(1, 3, dtype=torch.bool)
    forced = torch.tensor([[True, False, False]])
    assert Factor(0.01).choose(logp, open_, forced).tolist() == [[True, False, False]]
    assert Factor(0.9).choose(logp, open_, forced).tolist() == [[True, True, False]]
    assert Steps(3).choose(logp, open_, forced).tolist() == [[True, True, False]]


@pytest.mark.parametrize("steps, most", [(1, 1), (2, 2), (4, 4)])
def test_a_block_takes_about_so_many_steps(steps, most):
    decoded = block_decode(tiny_gpt(3), left_padded([4, 1, 6]), 12, 4, Steps(steps))
    taken = decoded.commit_step[decoded.commit_step != NEVER]
    assert taken.max() <= most  # slot 0 is forced in the first step, beside those that are chosen


# --- Variants of OPD --------------------------------------------------------------------------

def variant(**switches):
    return opd_variants.Options(**switches)


def test_without_switches_the_variant_is_opd_itself():
    student, teacher, prompt = tiny_gpt(3), tiny_gpt(0), left_padded([4, 1, 6, 3])
    for cfg in (replace(CFG, block_size=4),
                replace(CFG, block_size=4, answer_states=0, opd_exclude=False,
                        commit="threshold")):
        (_, _, decoded), = roll_out(cfg, student, prompt, 12, cfg.opd_tau, Sampling(0.0, gen()))
        loss = train_opd.opd_loss(cfg, student, teacher, prompt, decoded, gen(1))
        other = opd_variants.variant_loss(cfg, variant(), student, teacher, prompt, decoded, gen(1))
        assert torch.equal(loss, other)
        for switches in (dict(states="committed"), dict(states="next"), dict(cut=True),
                         dict(teacher_temperature=2.0), dict(target="later")):
            other = opd_variants.variant_loss(cfg, variant(**switches), student, teacher, prompt,
                                              decoded, gen(1))
            same = switches in (dict(cut=True), dict(target="later"))  # no answer is written here
            assert other.isfinite() and (other == loss) <= same


@torch.no_grad()
def test_later_states_are_those_in_which_the_tokens_were_committed():
    student, prompt = tiny_gpt(3), left_padded([4, 1, 6, 3])
    (_, _, decoded), = roll_out(CFG, student, prompt, 12, 0.6, Sampling(0.0, gen()))
    later = opd_variants.later_logits(student, prompt, decoded, CFG.block_size)  # (N, R, V)
    logp = later.log_softmax(-1).gather(-1, decoded.clean[..., None])[..., 0]
    wanted = replay_logp(student, prompt, decoded, CFG.block_size)
    close(torch.where(decoded.tokens != PAD, logp, 0.0), wanted)
    assert not later[decoded.tokens == PAD].any()


def test_which_slots_of_a_state_are_scored():
    B = 4
    decoded = block_decode(tiny_gpt(3), words(1, 3, seed=7), 8, B, Steps(4))
    commit_step = torch.tensor([[0, 2, 1, 1, 0, 1, NEVER, NEVER]])
    decoded = replace(decoded, commit_step=commit_step)
    block, step = torch.tensor([[0, 1]]), torch.tensor([[1, 0]])
    open_ = torch.tensor([[[False, True, True, True], [True, True, True, True]]])
    for states, wanted in (("masked", [[1, 1, 1, 1], [1, 1, 1, 1]]),
                           ("committed", [[1, 0, 1, 1], [1, 0, 0, 0]]),
                           ("next", [[1, 1, 0, 0], [1, 0, 0, 0]])):
        found = opd_variants.scored_slots(variant(states=states), decoded, block, step, open_)
        assert found.int().tolist() == [wanted], states


def test_what_comes_after_a_repeated_label():
    L, A = LABEL, ANSWER  # labels in a trace repeat freely
    tokens = torch.tensor([[L, L, A, L, L + 1, L, L + 2, EOS],
                           [L, L, A, L, L + 1, L + 2, EOS, PAD]])
    found = opd_variants.after_a_repeated_label(tokens, 4)
    assert found.int().tolist() == [[0, 0, 0, 0, 0, 0, 1, 1], [0] * 8]


def test_a_text_as_if_it_had_been_decoded_a_slot_a_step():
    _, response = tensors(toy_world(CFG).train, range(8), "cpu")
    decoded = opd_variants.as_decoded(response, 16, gen())
    assert torch.equal(decoded.tokens[:, :response.shape[1]], response)
    assert not decoded.tokens[:, response.shape[1]:].any()  # [PAD] is 0
    steps, filled = decoded.commit_step.view(8, -1, 16), decoded.filled.view(8, -1, 16)
    used = (decoded.tokens.view(8, -1, 16) != PAD).any(2)
    for taken in steps[used].tolist():
        assert sorted(taken) == list(range(16)) and taken[0] == 0
    assert (steps[~used] == NEVER).all() and (filled[~used] == MASK).all()
    assert len({tuple(taken) for taken in steps[used].tolist()}) > 8


def test_the_teachers_text_is_its_own_whatever_cft_gold_says(monkeypatch, tmp_path):
    for module in (train_ar, train_cft, train_opd):
        run(module, monkeypatch, tmp_path, *FREE, "--cft_gold", "true")
    start = [*FREE, "--cft_gold", "true", "--opd_anchor", "0", "--teacher",
             str(tmp_path / "toy/seed0/ar/checkpoint.pt"), "--init",
             str(tmp_path / "toy/seed0/cft/checkpoint.pt")]
    asked = []
    own = opd_variants.teacher_responses
    monkeypatch.setattr(opd_variants, "teacher_responses",
                        lambda *args: asked.append(args[2]) or own(*args))
    run(opd_variants, monkeypatch, tmp_path / "own", *start, "--source", "teacher")
    assert asked == [16]
    seen = []
    monkeypatch.setattr(opd_variants, "as_decoded",
                        lambda response, *rest: seen.append(response) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(opd_variants, monkeypatch, tmp_path / "more", *start, "--source", "teacher")
    written = load_tensors(tmp_path / "toy/seed0/ar/outputs.pt")["tokens"]
    assert all((row == written).all(1).any() for row in seen[0])


def test_a_run_without_switches_trains_the_weights_of_opd(monkeypatch, capsys, tmp_path):
    for module in (train_ar, train_cft, train_opd):
        run(module, monkeypatch, tmp_path)
    start = ["--teacher", str(tmp_path / "toy/seed0/ar/checkpoint.pt"), "--init",
             str(tmp_path / "toy/seed0/cft/checkpoint.pt")]
    run(opd_variants, monkeypatch, tmp_path / "same", *start)
    run(opd_variants, monkeypatch, tmp_path / "cut", *start, "--states", "next")
    run(opd_variants, monkeypatch, tmp_path / "drawn", *start, "--rollout_temperature", "1")
    plain, same = weights(tmp_path, "opd"), weights(tmp_path / "same", "opd")
    assert all(torch.equal(plain[name], same[name]) for name in plain)
    for folder in ("cut", "drawn"):
        other = weights(tmp_path / folder, "opd")
        assert any(not torch.equal(plain[name], other[name]) for name in plain)
    # A checkpoint belongs to its switches.
    message = refused(opd_variants, monkeypatch, capsys, tmp_path / "cut", *start, "--cut", "true")
    assert "opd_variant" in message


# --- Ablations --------------------------------------------------------------------------------

def test_ablations_run_each_line_once_and_compare_at_equal_forwards(monkeypatch, capsys, tmp_path):
    lines = {"cft": {"as it is": {}, "half as long": dict(cft_steps=0.5),
                     "factor rule": dict(factor=True)},
             "opd": {"CFT for the same FLOPs": dict(control=True), "as it is": {},
                     "the leftmost masked token": dict(states="next")}}
    commands = {"cft": ["`train_cft.py`", "`train_cft.py --cft_steps 3`", "in ablations.py"],
                "opd": ["`train_cft.py --cft_steps 8 --cft_lr 5e-05`", "`train_opd.py`",
                        "`experiments/opd_variants.py --states next`"]}
    monkeypatch.setattr(ablations, "LINES", lines)
    for module in (train_ar, train_cft):
        run(module, monkeypatch, tmp_path)
    calls = []

    def in_this_process(command):
        calls.append(command)
        monkeypatch.setattr("sys.argv", command[1:])
        module = importlib.import_module(os.path.basename(command[1]).removesuffix(".py"))
        script.script(module.main, module.__doc__, also=getattr(module, "Options", None))
        return SimpleNamespace(returncode=0)
    monkeypatch.setattr(subprocess, "run", in_this_process)
    for ablate, trained in (("cft", 3), ("opd", 3)):
        for again in (False, True):  # the second time everything is there
            run(ablations, monkeypatch, tmp_path, "--ablate", ablate, "--seeds", "0")
            assert len(calls) == (0 if again else trained)
            calls.clear()
        table = (tmp_path / "toy" / f"ablations_{ablate}.md").read_text()
        for name, command in zip(lines[ablate], commands[ablate]):
            assert f"| {name} | {command} |" in table
    assert "first run `python train_ar.py" in refused(
        ablations, monkeypatch, capsys, tmp_path / "empty")
    assert "no line is called nonsense; there are: CFT" in refused(
        ablations, monkeypatch, capsys, tmp_path, "--lines", "nonsense", "--ablate", "opd")
    assert "--seeds must be" in refused(ablations, monkeypatch, capsys, tmp_path, "--seeds", "a")


def test_every_line_is_a_command_that_its_script_understands():
    for ablate, lines in ablations.LINES.items():
        for name in lines:
            stage, path, options = ablations.command_of(Config(), ablate, name)
            also = opd_variants.Options if path.startswith("experiments/") else None
            parsed = parse_args("", ablations.arguments(options), also)
            cfg, own = parsed if also else (parsed, None)
            for option, value in options.items():
                assert getattr(cfg if hasattr(cfg, option) else own, option) == value, name
            assert os.path.exists(os.path.join(ablations.ROOT, path)) and stage in path


@pytest.mark.parametrize("points, goal, forwards", [
    # both rise to what is asked half-way from 4 to 5
    ([[2, .5, .6], [4, .98, .6], [5, 1., .7]], .65, 4.5),
    ([[2, .5, .6], [4, .98, .7], [5, 1., .7]], .65, 4.5),  # N@10 is there before
    ([[2, .5, .6], [4, .995, .64], [5, .995, .68]], .67, 4.75),
    ([[2, .995, .7]], .65, 2), ([[2, .5, .7]], .65, float("nan"))])
def test_forwards_needed_for_valid_answers_as_good_as_asked(points, goal, forwards):
    found = ablations.forwards_needed(np.array(points), goal)
    assert found == pytest.approx(forwards, nan_ok=True)


def test_the_best_within_a_number_of_forwards():
    points = np.array([[3.0, .9, .7], [4.0, .99, .8], [5.0, .98, .9]])
    assert ablations.best_within(points, 4.5, 1) == .99
    assert ablations.best_within(points, 9.0, 2) == .9
    assert np.isnan(ablations.best_within(points, 2.0, 1))


# --- Analysis ---------------------------------------------------------------------------------

@pytest.mark.parametrize("B, draws", [(1, 1), (2, 300), (3, 300)])
def test_the_bound_is_reported_in_nats_a_real_token(B, draws):
    model, prompt = tiny_gpt(B), left_padded([4, 1, 6], seed=B)
    response = words(3, 7, seed=B + 10)
    for row, length in zip(response, (4, 7, 1)):  # 12 tokens, in 14 slots at B = 2, in 18 at 3
        row[length - 1], row[length:] = EOS, PAD
    exact = sum(bound_by_orders(model, p, r, B) for p, r in alone(prompt, response)) / 12
    found = analyse.bound(CFG, model, prompt, response, B, draws)
    assert found == pytest.approx(exact, rel=1e-6 if B == 1 else 0.03)
    if B == 1:
        logits = model.logits(causal_hidden(model, prompt, response))
        logp = logits.log_softmax(-1).gather(-1, response[..., None])[..., 0]
        assert found == pytest.approx(-logp[response != PAD].mean().item())


def test_two_statements_exchange_all_but_their_labels():
    tokens = torch.tensor([[1, 20, 2, 3, 21, 4, 5, 22, 6, 7]])  # labels 20, 21, 22
    forged = analyse.exchange(tokens, np.array([[7, 1]]), 3)
    assert forged.tolist() == [[1, 20, 6, 7, 21, 4, 5, 22, 2, 3]]


def perfect(cfg, world, model, split, prefix=None, rule=None):
    """In the place of analyse.decode: writes the reference; after a forged trace, whose beginning
    differs, the reversed ranking."""
    out = responses(split.trace, split.order)
    if prefix is not None:
        forged = (out[:, :prefix.shape[1]] != prefix.numpy()).any(1)
        out[forged] = responses(split.trace, split.order[:, ::-1])[forged]
    return torch.from_numpy(out.astype(np.int64))


def test_analysis_of_perfect_models_finds_no_failure_and_of_random_ones_says_so(
        monkeypatch, capsys, tmp_path):
    for module in (train_ar, train_cft):
        run(module, monkeypatch, tmp_path, *FREE)
    assert "train for longer" in refused(analyse, monkeypatch, capsys, tmp_path, *FREE)
    for options, said in ((["--trace", "none"], "needs --trace free"),
                          (["--trace", "bound"], "needs --trace free"),
                          (["--world", "toy_random_labels"], "not --world toy_random_labels"),
                          (["--fast", "false"], "leave out --fast false")):
        assert said in refused(analyse, monkeypatch, capsys, tmp_path, *FREE, *options)

    monkeypatch.setattr(analyse, "decode", perfect)
    run(analyse, monkeypatch, tmp_path, *FREE, "--eval_curve_users", "8")
    found = json.loads((tmp_path / "toy" / "analysis.json").read_text())
    assert found.keys() == {"ar", "cft", "naive"}
    assert (tmp_path / "toy" / "analysis.md").stat().st_size > 500
    for stage in ("ar", "cft"):
        failures, forged = found[stage]["failures"], found[stage]["falsified"]
        for name in ("duplicate_by_slot", "dropped_by_position", "no_label_by_slot"):
            assert not any(failures[name])
        assert forged["answers"] > 4 and forged["changed_without_forgery"] == 0
        assert forged["ranking_changed"] == 1
        assert forged["rank_of_best_forged"] > forged["rank_of_best_same"]
    assert all(row["valid"] == 1 for row in found["cft"]["answer_steps"])
    assert found["ar"]["bound"]["1"] > 0


# --- Validity ---------------------------------------------------------------------------------

def test_lists_on_which_validity_is_counted_are_full_and_nobody_has_seen_them(monkeypatch):
    monkeypatch.setattr(validity, "TOY_LISTS", 40)
    world, split = toy_world(CFG), validity.many_lists(CFG, None)
    assert len(split) == 40 and (split.list_length == CFG.n_candidates).all()
    known = {tuple(row) for row in np.concatenate((world.val.prompt, world.test.prompt))}
    assert not known & {tuple(row) for row in split.prompt}
