"""What was written and when (report/denoise.py), and how the terminal shows it, on texts that are
made by hand and on a tiny model."""
from types import SimpleNamespace

import numpy as np
import torch

import evaluate
import scripts
from config import Config
from conftest import tiny_gpt
from data import (ANSWER, CANDIDATES, EOS, HISTORY, LABEL, PAD, PROFILE, SPECIAL, World,
                  examples_of, joined, tensors)
from report.denoise import (User, Written, checked, missing, numbered, printable, truth, user_of,
                            verdict, write, wrong_labels)
from report.show import lines_of
from sampler import NEVER
from test_report import make_run
from trainer import ar_decoder, block_decoder, load_world, respond

L1, L2, L3, L4 = range(LABEL, LABEL + 4)
A, B = LABEL + 4, LABEL + 5
WORDS = [*SPECIAL, "L1", "L2", "L3", "L4", "a", "b"]


def user_by_hand():
    """Two candidates, L2 was taken; the rule says: profile a, L1 a b, L2 b b."""
    world = World(WORDS, 4, None, None, None, "test", {})
    return User(world, WORDS, [HISTORY, A, B, CANDIDATES, L1, A, L2, B],
                np.array([PROFILE, A, L1, A, B, L2, B, B]), np.array([0, 1]), L2)


def written_by_hand(tokens, forward=None, name="cft"):
    n = len(tokens)
    forward = np.zeros(n, int) if forward is None else np.array(forward)
    return Written(name, np.array(tokens), np.zeros(n, int), forward, np.ones(n),
                   np.arange(1.0, 2 + forward.max()))


def test_faults_of_statements_and_answers():
    user = user_by_hand()
    right = [PROFILE, A, L1, A, B, L2, B, B]
    end = [PAD, ANSWER, L2, L1, EOS]
    cases = [
        (right, {}, [], 3),
        ([PROFILE, B, L1, A, B, L2, B, B], {0: "true is: <profile> a"}, [], 2),
        ([PROFILE, A, L1, A, L2, B, B], {2: "true is: L1 a b"}, [], 2),
        ([PROFILE, A, L1, A, B, L1, A, B], {5: "L1 comes again"}, [L2], 2),
        ([PROFILE, A, L1, A, B, L4, B], {5: "there should be no such statement"}, [L2], 2)]
    for trace, faults, unsaid, n_true in cases:
        written = written_by_hand(trace + end)
        found = {slots[0]: fault for slots, fault in checked(user, written) if fault}
        assert found == faults and missing(user, written) == unsaid, trace
        assert truth(user, written)[0] == n_true
        assert verdict(user, written) == (True, [L2, L1])

    n = len(right)
    cases = [
        ([ANSWER, L2, L2, EOS], {n + 2: "stands twice"}, [L2, L1]),
        ([ANSWER, L3, L1, EOS], {n + 1: "no label of the list"}, [L1, L2]),
        ([ANSWER, L2, EOS], {}, [L2, L1]),
        ([EOS], {}, [L1, L2])]
    for answer, faults, order in cases:
        written = written_by_hand(right + answer)
        assert wrong_labels(user, written) == faults, answer
        assert verdict(user, written) == (False, order)


def test_the_text_of_one_user():
    user = user_by_hand()
    ar = written_by_hand([PROFILE, A, L1, A, B, L2, B, B, ANSWER, L2, L1, EOS],
                         range(12), name="ar")
    cft = written_by_hand([PROFILE, B, L1, A, B, L4, B, PAD, ANSWER, L2, L2, EOS],
                          [0, 0, 0, 1, 0, 1, 1, -1, 2, 2, 11, 2])
    assert [line.rstrip() for line in lines_of(user, 7, [ar, cft])] == """
--- user 7: 2 candidates ---
<history> a b

<profile>
  ar    ✓ <profile> a
  cft   ✗ <profile>₁ b₁   (true is: <profile> a)

L1 a
  ar    ✓ L1 a b
  cft   ✓ L1₁ a₂ b₁

L2 b ★
  ar    ✓ L2 b b
  cft   ✗ nothing

L4
  cft   ✗ L4₂ b₂   (there should be no such statement)

answer
  ar    ✓ <answer> L2 ★ L1 [EOS]
  cft   ✗ <answer>₃ L2₃ ★ L2₁₂ ★ (stands twice) [EOS]₃

ar: 12 forwards, 12.0 ms; 3 of 3 statements true; the answer is valid; L2 from
place 2 to 1
cft: 12 forwards, 12.0 ms; 1 of 3 statements true; the answer is invalid; L2
from place 2 to 1""".split("\n")


def test_forwards_are_counted_through_all_blocks_and_parts():
    first = SimpleNamespace(commit_step=torch.tensor([[0, 1, NEVER, 0, 0, 2]]), block_size=3,
                            forwards=torch.tensor([4]))
    second = SimpleNamespace(commit_step=torch.tensor([[1, 0]]), block_size=2,
                             forwards=torch.tensor([2]))
    block, forward = numbered([first, second])
    assert block.tolist() == [0, 0, 0, 1, 1, 1, 2, 2]
    assert forward.tolist() == [0, 1, -1, 2, 2, 3, 5, 4]


def test_what_a_tiny_model_writes_is_all_there_with_the_time_of_every_forward():
    for trace in ("bound", "free"):
        cfg = Config(trace=trace, n_train=64, n_val=8, n_test=8, block_size=5, tau=0.2)
        world = load_world(cfg)
        model = tiny_gpt(0, len(world.words), torch.float32)
        for name, decoder in (("ar", ar_decoder(model)), ("cft", block_decoder(cfg, model))):
            written = write(cfg, world, name, model, decoder, 3)
            prompt, _ = tensors(examples_of(world.test, trace)[0], range(3, 4), "cpu")
            parts = respond(cfg, world, decoder, prompt)
            n_forwards = sum(int(part.forwards) for part in parts)
            tokens = joined([part.tokens.numpy() for part in parts])[0]
            assert written.tokens[written.tokens != PAD].tolist() == tokens[tokens != PAD].tolist()
            assert len(written.ends) == n_forwards and (np.diff(written.ends) > 0).all()
            assert written.forward.max() < n_forwards and (np.diff(written.block) >= 0).all()
            assert (written.forward[written.tokens != PAD] >= 0).all()
            if name == "ar":
                assert (written.tokens != PAD).all() and (np.diff(written.forward) > 0).all()
            lines = lines_of(user_of(world, 3), 4, [written])
            assert any(f"{name}: {n_forwards} forwards" in line for line in lines)


def test_show_prints_users_and_nothing_that_steers_a_terminal(tmp_path, monkeypatch, capsys):
    make_run(tmp_path, {0: ("ar", "cft")})
    scripts.run(evaluate, monkeypatch, tmp_path, "--show", "2")
    out = capsys.readouterr().out
    assert "--- user 1: 8 candidates ---" in out and "--- user 2:" in out
    assert "--- user 3:" not in out and "\033" not in out
    assert out.count("\ncft: ") == out.count("\nar: ") == 2
    assert not (tmp_path / "toy" / "report.json").exists()
    monkeypatch.setattr(evaluate, "RANK", 1)  # the second of several processes
    scripts.run(evaluate, monkeypatch, tmp_path, "--show", "2")
    assert not capsys.readouterr().out
    assert printable("a\033[2Jb\n") == "a?[2Jb?"
