"""Test users in the terminal: python evaluate.py --config toy --show 3

For each user: what the prompt shows, what the AR teacher wrote, and what the student wrote. A small
number at each of the student's tokens says in which forward it was committed.

    L2  x4 y1 z2 ★
      ar    ✓ L2 x4:0 y1:1 z2:0
      cft   ✓ L2₁ x4:0₂ y1:1₁ z2:0₃
"""
import shutil
import textwrap

from data import LABEL, PROFILE
from plumbing.checkpoint import finished_stages
from plumbing.settings import UserError
from report.denoise import (answer_slots, checked, missing, truth, user_of, verdict, write,
                            wrong_labels)
from trainer import ar_decoder, block_decoder

SUBSCRIPTS = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")
MARKS = {True: "✓", False: "✗"}


def show(cfg, world, n_users):
    """Prints the first test users with what the teacher and the last finished student write."""
    stages = finished_stages(cfg, world)
    last = list(stages)[-1]
    if last == "ar":
        raise UserError("--show compares the teacher with a student, and none has finished: first "
                        f"run `python train_cft.py --config {cfg.config}`")
    teacher, student = stages["ar"][0], stages[last][0]
    print(f"{cfg.config}: the teacher, ar, writes a token a forward; {last} writes blocks of "
          f"{cfg.block_size}.\nx3:1₂ was written in forward 2. ★ is what the user took next, "
          "✓ true, ✗ wrong.")
    for n in range(min(n_users, len(world.test))):
        responses = [
            write(cfg, world, "ar", teacher, ar_decoder(teacher), n),
            write(cfg, world, last, student, block_decoder(cfg, student), n)]
        print("\n".join(lines_of(user_of(world, n), n + 1, responses)), flush=True)


def lines_of(user, number, responses):
    """All lines about a user and the responses, a list of denoise.Written."""
    lines = ["", f"--- user {number}: {len(user.candidates)} candidates ---"]
    lines += wrapped(user.text(user.history), "")
    said = [written.tokens[slots[0]]
            for written in responses for slots, _ in checked(user, written)]
    for about in dict.fromkeys([PROFILE, *user.candidates, *said]):
        shown = user.text(user.candidates.get(about, [about]))
        lines += ["", shown + star(user, about)]
        for written in responses:
            lines += statements_about(user, written, about)
    lines += ["", "answer"]
    for written in responses:
        lines += answer_lines(user, written)
    return lines + [""] + [line for written in responses for line in summary_of(user, written)]


def statements_about(user, written, about):
    """The lines of a response about a label, <profile> or another token that a statement begins
    with."""
    lines = []
    for slots, fault in checked(user, written):
        if written.tokens[slots[0]] == about:
            text = " ".join(token_text(user, written, slot) for slot in slots)
            if fault:
                text += f"   ({fault})"
            lines += wrapped(text, f"  {written.name:5} {MARKS[not fault]} ")
    if about in missing(user, written):
        lines.append(f"  {written.name:5} ✗ nothing")
    return lines


def answer_lines(user, written):
    """The answer of a response, with a star at the target and what is wrong in brackets."""
    valid, _ = verdict(user, written)
    wrong = wrong_labels(user, written)
    words = []
    for slot in answer_slots(written):
        text = token_text(user, written, slot) + star(user, written.tokens[slot])
        if slot in wrong:
            text += f" ({wrong[slot]})"
        words.append(text)
    text = " ".join(words) or "(no answer)"
    return wrapped(text, f"  {written.name:5} {MARKS[valid]} ")


def summary_of(user, written):
    """What a response cost and is worth, and where it put the target."""
    valid, order = verdict(user, written)
    n_true, n_statements = truth(user, written)
    text = (f"{written.name}: {len(written.ends)} forwards, {written.ends[-1]:.1f} ms; "
            f"{n_true} of {n_statements} statements true; the answer is "
            f"{'valid' if valid else 'invalid'}")
    if user.target is not None:
        before = user.incoming.tolist().index(user.target - LABEL) + 1
        text += (f"; {user.words[user.target]} from place {before} to "
                 f"{order.index(user.target) + 1}")
    return wrapped(text, "")


def token_text(user, written, slot):
    """A token; in a response written in blocks, with the number of its forward, 1 = the first."""
    text = user.words[written.tokens[slot]]
    if written.name == "ar":
        return text
    return text + str(written.forward[slot] + 1).translate(SUBSCRIPTS)


def star(user, token):
    return " ★" if token == user.target else ""


def wrapped(text, start):
    """Lines of a text no wider than the terminal. The first begins with `start`, the others are
    indented as far."""
    width = max(40, min(100, shutil.get_terminal_size()[0] - 1))
    return textwrap.wrap(text, width, initial_indent=start, subsequent_indent=" " * len(start),
                         break_long_words=False)
