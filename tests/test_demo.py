"""evaluate.py --show: what is wrong is marked; frames on a terminal, plain text elsewhere."""
import dataclasses
import io
import os
import re
from types import SimpleNamespace

import numpy as np
import pytest

import evaluate
import scripts
import train_ar
import train_cft
from config import Config
from data import ANSWER, EOS, LABEL, NONE, parse_answers
from ours.wording import reword
from report import denoise
from report import show as terminal
from report.denoise import Written, checked, forward_of, printable, user_of, wrong_labels
from report.show import Piece, cells_of, drawn, picture, show_verdict, word, wrapped
from sampler import NEVER
from toy.world import toy_world

COLOUR = re.compile(r"\033\[[\d;]+m")
ESCAPE = re.compile(r"\033\[\??[\d;]*[A-Za-z]")


def tiny_world(**settings):
    return toy_world(Config(n_train=8, n_val=8, n_test=6, **settings))


def written(tokens, step=None, block_size=16):
    """A student's response whose every forward takes a millisecond."""
    tokens = np.asarray(tokens, int)
    step = np.zeros(len(tokens), int) if step is None else step
    forward = forward_of(step, block_size)
    ends = 1.0 + np.arange(forward.max() + 1)
    return Written("cft", tokens, step, forward, ends, block_size, len(tokens))


def pictured(user, *columns, width=200):
    return "\n".join(drawn(line, 1e9) for line in picture(user, columns, width))


# --- What is wrong ----------------------------------------------------------------------------

@pytest.mark.parametrize("world_name", ["toy", "toy_random_labels"])
def test_a_picture_marks_what_is_wrong(world_name):
    world = tiny_world(world=world_name)
    user, tokens = user_of(world, 0), world.test.response[0].astype(int)

    def shown(tokens, step=None):
        return pictured(user, written(tokens, step))

    label = world.words[LABEL + user.incoming[2]]
    assert "✗" not in shown(tokens)
    assert shown(tokens).replace("★", " ").split().count(label) == 3  # prompt, trace, answer
    assert shown(tokens).count("★") == 2  # the target in the prompt and in the answer
    false = tokens.copy()
    first = world.words.index("x0:0")
    false[5] = next(v for v in range(first, len(world.words)) if v != tokens[5])
    assert shown(false).count("✗") == 1  # evidence of the first candidate
    assert f"✗ right: {world.words[tokens[5]]}\n" in shown(false) + "\n"
    answer = int((tokens == ANSWER).argmax())
    twice = tokens.copy()
    twice[answer + 2] = twice[answer + 1]
    assert shown(twice).count("✗") == 1
    foreign = tokens.copy()
    foreign[answer + 1] = LABEL + next(
        label for label in range(world.n_labels) if label not in user.incoming)
    assert shown(foreign).count("✗") == 1
    assert "✗ no answer" in shown(tokens[:answer])
    without = np.concatenate((tokens[:4], tokens[answer:]))
    assert shown(without).count("✗ nothing about") == 8
    # Every token is marked with its own step.
    steps = np.arange(len(tokens))
    assert f"{world.words[tokens[answer + 1]]}({answer + 2})" in shown(tokens, steps)
    assert f"{world.words[tokens[5]]}(6)" in shown(tokens, steps)


def test_statements_are_checked_one_by_one():
    world = tiny_world()
    user, tokens = user_of(world, 0), world.test.response[0].astype(int)
    assert [places for places, _ in checked(user, tokens)] == [
        list(range(i, i + 4)) for i in range(0, 36, 4)]
    odd = [tokens[5], *tokens[4:8], NONE, *tokens[4:8], ANSWER]
    assert checked(user, np.array(odd)) == [
        ([0], "no such statement"), ([1, 2, 3, 4], None), ([6, 7, 8, 9], "L1 again")]
    short = [*tokens[:2], *tokens[4:8]]
    whole = " ".join(world.words[token] for token in tokens[:4])
    assert checked(user, np.array(short))[0] == ([0, 1], f"right: {whole}")


def test_synonyms_are_no_mistakes():
    plain = tiny_world()
    world = reword(plain, "token")
    tokens = world.test.response[1].astype(int)
    assert (tokens != plain.test.response[1]).any()
    assert all(fault is None for _, fault in checked(user_of(world, 1), tokens))


def test_labels_that_make_an_answer_invalid():
    user = user_of(tiny_world(), 0)
    L1, L2, L9 = LABEL, LABEL + 1, LABEL + 8
    assert wrong_labels(user, np.array([L1, L1, ANSWER, L2, L1, L2, L9, EOS])) == {5: 3, 6: None}
    assert wrong_labels(user, np.array([L1, L1])) == {}


# --- When it was written ----------------------------------------------------------------------

def test_forwards_are_counted_over_blocks():
    step = np.array([0, 1, 0, 0, 0, NEVER])
    assert forward_of(step, 3).tolist() == [0, 1, 0, 2, 2, -1]


def test_a_token_appears_when_its_forward_is_done():
    world = tiny_world()
    user, tokens = user_of(world, 0), world.test.response[0].astype(int)
    step = np.zeros(len(tokens), int)
    step[5] = 1
    lines = picture(user, [written(tokens, step)], 200)
    frames = ["\n".join(drawn(line, now) for line in lines) for now in (0.0, 1.0, 2.0, 9.0)]
    masks = [frame.count("░") for frame in frames]
    hidden = f"{world.words[tokens[5]]}(2)"
    assert masks[1] == masks[0] - sum(cells_of(world.words[token]) for i, token in enumerate(tokens)
                                      if i < 16 and i != 5)
    assert hidden not in frames[1] and hidden in frames[2]
    assert "1 of 4 forwards, 1.0 ms" in frames[1] and "4 of 4 forwards, 4.0 ms" in frames[3]
    assert masks[3] == 0 and len({frame.count("\n") for frame in frames}) == 1


def test_words_of_the_data_do_not_steer_the_terminal():
    assert printable("a\033[31mb\n日") == "a?[31mb?日"


@pytest.mark.parametrize("names", ["x", "日本", "a > b"])
@pytest.mark.parametrize("width", [20, 33, 60, 79, 95, 200])
def test_no_line_is_wider_than_the_terminal(width, names):
    world = tiny_world()
    world.words = [names * (1 + token % 9) for token in range(len(world.words))]
    user, tokens = user_of(world, 0), world.test.response[0].astype(int)
    tokens[4:9] = tokens[8]
    two = [written(tokens, np.arange(len(tokens)) % 5) for _ in range(2)]
    for columns in (two, two[:1]):
        for line in pictured(user, *columns, width=width).split("\n"):
            assert cells_of(line) <= width


def test_words_are_wrapped():
    words = [word(Piece(text)) for text in ("aa", "bb", "cccccc", "d")]
    lines = [[pieces[0].text for pieces in line] for line in wrapped(words, 5)]
    assert lines == [["aa", "bb"], ["cccc…"], ["d"]]


# --- On a terminal, and elsewhere -------------------------------------------------------------

@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """A folder with a teacher and a student of the toy world."""
    folder = tmp_path_factory.mktemp("student")
    with pytest.MonkeyPatch.context() as monkeypatch:
        for module in (train_ar, train_cft):
            scripts.run(module, monkeypatch, folder)
    return folder


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def show(student, monkeypatch):
    """show(out, *options): what evaluate.py --show 2 writes into a file, with a millisecond for
    each forward; `show.clock.now` is the time that the animation takes."""
    clock = SimpleNamespace(now=0.0)

    def sleep(seconds):
        clock.now += seconds

    def timed(model, write):
        n, result = [], None
        hook = model.register_forward_pre_hook(lambda *_: n.append(1))
        result = write()
        hook.remove()
        return result, 1.0 + np.arange(len(n))

    monkeypatch.setattr(denoise, "timed", timed)
    monkeypatch.setattr(terminal, "time", SimpleNamespace(perf_counter=lambda: clock.now,
                                                         sleep=sleep))
    for name, value in (("COLUMNS", "120"), ("LINES", "50"), ("TERM", "xterm")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)

    def show(out, *options, n="2"):
        with monkeypatch.context() as inner:
            inner.setattr("sys.stdout", out)
            scripts.run(evaluate, monkeypatch, student, "--show", n, *options)
        return out.getvalue()
    show.clock = clock
    return show


def on_screen(text):
    """What is left of a text when \\033[nF goes up n lines, \\033[K and \\033[J wipe out."""
    lines, at = [""], 0
    for part in re.split(r"(\033\[\d*[FJK]|\n)", COLOUR.sub("", text).replace("\033[?25l", "")
                         .replace("\033[?25h", "")):
        if part.endswith("F") and part.startswith("\033"):
            at -= int(part[2:-1])
        elif part.endswith("J") and part.startswith("\033"):
            lines = lines[:at] + [""]
        elif part == "\n":
            at += 1
            lines += [""] * (at + 1 - len(lines))
        elif part and not part.startswith("\033"):
            lines[at] = part
    return "\n".join(lines)


def test_without_a_terminal_there_is_one_picture_in_plain_text(show):
    text = show(io.StringIO())
    assert "\033" not in text and "░" not in text
    assert text.count("forwards, ") == 2 * 4  # above the columns and in the verdict, of both
    assert text.count("true next item") == 2 and text.count("user 2: ") == 1
    assert show.clock.now == 0


def test_a_terminal_shows_frames_and_ends_with_the_same_picture(show, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("LINES", "400")  # room for whatever a student of a few steps writes
    text = show(Terminal())
    assert on_screen(text) == show(io.StringIO())
    assert not COLOUR.search(text) and text.count("\033[?25l") == text.count("\033[?25h") == 2
    frames = text.split("\033[?25l")[1].split("\033[?25h")[0].split("F")
    assert len(frames) > 10 and "░" in frames[2]
    assert 2 * terminal.SECONDS <= show.clock.now <= 2.5 * terminal.SECONDS


def test_a_terminal_has_colours_unless_they_are_not_wanted(show, monkeypatch):
    coloured = show(Terminal(), n="1")
    assert "\033[38;5;51m" in coloured and "(2)" not in coloured
    monkeypatch.setenv("NO_COLOR", "")  # an empty one does not count
    assert "\033[38;5;51m" in show(Terminal(), n="1")
    monkeypatch.setenv("TERM", "dumb")
    assert not ESCAPE.search(show(Terminal(), n="1"))


@pytest.mark.parametrize("lines, frames", [(50, "both"), (16, "student"), (12, "none")])
def test_of_a_picture_that_does_not_fit_less_is_animated(show, monkeypatch, lines, frames):
    for name, value in (("LINES", lines), ("COLUMNS", "60"), ("NO_COLOR", "1")):  # one a line
        monkeypatch.setenv(name, str(value))
    world = tiny_world()
    user, tokens = user_of(world, 0), world.test.response[0].astype(int)
    ar = dataclasses.replace(written(tokens, np.arange(len(tokens)), len(tokens)), name="ar")
    out = Terminal()
    with monkeypatch.context() as inner:
        inner.setattr("sys.stdout", out)
        terminal.play(user, [ar, written(tokens)])
    text = out.getvalue()
    drawn_frames = text.split("\033[?25h")[0].split("\033[?25l")[1:]
    assert bool(drawn_frames) == (frames != "none")
    if drawn_frames:
        assert ("L1 x" in drawn_frames[0].split("cft  0 of")[0]) == (frames == "both")
        assert "ar  46 of 46" in drawn_frames[0] and "cft  3 of 3" in drawn_frames[0]
    assert all(int(up) < lines for up in re.findall(r"\033\[(\d+)F", text))
    assert on_screen(text) == pictured(user, ar, written(tokens), width=59) + "\n"


def test_the_cursor_comes_back_when_somebody_stops_it(show, monkeypatch):
    def stop(seconds):
        raise KeyboardInterrupt
    monkeypatch.setattr(terminal.time, "sleep", stop)
    out = Terminal()
    with pytest.raises(SystemExit):
        show(out)
    assert out.getvalue().endswith("\033[J\033[?25h")


def test_a_student_is_shown_without_its_teacher(show, student):
    path = scripts.checkpoint(student, "ar")
    os.rename(path, f"{path}.away")
    try:
        text = show(io.StringIO(), "--fast", "false")
    finally:
        os.rename(f"{path}.away", path)
    assert "by cft" in text and "by ar" not in text and text.count("forwards, ") == 2 * 2


def test_every_forward_is_timed(student, monkeypatch):
    """By the hook on the model, for the plain and the quick decoders alike."""
    seen = []
    real = denoise.timed

    def timed(model, write):
        seen.append(real(model, write))
        return seen[-1]
    monkeypatch.setattr(denoise, "timed", timed)
    for fast in ("true", "false"):
        scripts.run(evaluate, monkeypatch, student, "--show", "1", "--fast", fast)
    (ar, ar_ends), (block, ends), *plain = seen
    assert len(ar_ends) == int(ar.forwards) and len(ends) == int(block.forwards)
    assert (np.diff(ar_ends) > 0).all() and (np.diff(ends) > 0).all() and ends[0] > 0
    assert [len(taken) for _, taken in plain] == [len(ar_ends), len(ends)]


def test_the_reference_is_valid_and_true_in_the_verdict(capsys):
    world = tiny_world()
    user, tokens = user_of(world, 0), world.test.response[0].astype(int)
    show_verdict(user, [written(tokens)])
    out = capsys.readouterr().out
    order = parse_answers(tokens[None], user.incoming[None]).order[0].tolist()
    assert f"{len(tokens)} tokens in 3 forwards, 3.0 ms: valid, 100% of the statements" in out
    assert f"{order.index(user.target) + 1} by cft" in out
    nobody = dataclasses.replace(user, target=-1)
    show_verdict(nobody, [written(tokens[:-3])])
    out = capsys.readouterr().out
    assert "✗ invalid" in out and "true next item" not in out
