"""Users in the terminal, while models write: python evaluate.py --config toy --show 3

                     ar  11 of 46 forwards, 9.1 ms    cft  2 of 4 forwards, 8.8 ms
                     <profile> x2 y2 z3               <profile> x2 y2 z3
    L1 x3 y4 z4      L1 x3:1 y4:0 z4:0                L1 x3:1 y4:0 z4:0
    L2 x4 y1 z2      L2 x4:0 y1:1                     L2 x4:0 ░░░░ z2:0
    L3 x3 y1 z4                                       L3 ░░░░ ░░░░ ░░░░
    L4 x2 y4 z3 ★                                     │ ░░ ░░░░ ░░░░ ░░░░

A row is a statement: what the prompt shows of the candidate, then what each model says of it. The
real milliseconds are slowed down to a few seconds a user. Where there is no terminal, the last
picture is all that is printed.
"""
import dataclasses
import itertools
import os
import shutil
import sys
import textwrap
import time
import unicodedata
from typing import NamedTuple

from data import ANSWER, CANDIDATES, LABEL, PAD, faithfulness, parse_answers, tensors
from plumbing.checkpoint import device_of, last_student, load_stage, read_checkpoint
from report.decisive import decisive
from report.denoise import (Written, answer_start, ar_writes, checked, student_writes, unsaid,
                            user_of, wrong_labels)

SECONDS = 4.0  # an animation takes so long
COLUMN = 32    # narrower columns are not put beside each other

# Of the 256 colours of a terminal, by step: from cold to warm.
COLOURS = (51, 45, 39, 33, 63, 99, 135, 171, 207, 205, 203, 209, 215, 221, 227, 191)
DIM, BOLD, RED, STAR = "2", "1", "31", "1;33"


def show(cfg, world, n_users):
    """Shows the first test users: what the prompt shows, what the teacher and the last finished
    stage write, as it is written, and what is wrong with it. Raises UserError if nothing but the
    teacher has finished."""
    if device_of(cfg).type == "cuda":  # its twins replay graphs, in which no forward can be timed
        cfg = dataclasses.replace(cfg, fast=False)
    stage, student = last_student(cfg, world)
    state = read_checkpoint(cfg, "ar", world)  # a student may have come without its teacher
    teacher = load_stage(cfg, "ar", world, state)[0] if state else None

    steps = "(2), (3), ...; the first is not marked"
    if coloured():
        steps = " ".join(paint(str(i + 1), f"38;5;{c}") for i, c in enumerate(COLOURS))
    print(f"{stage} of {cfg.config}; steps of a block: {steps}\n"
          "★ what the user took next, │ a block begins, ✗ wrong")
    for n in range(min(n_users, len(world.test))):
        prompt, _ = tensors(world.test, range(n, n + 1), device_of(cfg))
        written = []
        if teacher:
            written.append(ar_writes(cfg, teacher, prompt, world.max_response))
        written.append(student_writes(cfg, stage, student, prompt, world.max_response, cfg.tau))
        user = user_of(world, n)
        print(f"\n{'═' * line_width()}\nuser {n + 1}: {world.test.list_length[n]} candidates\n")
        show_prompt(user.words, user.prompt)
        print()
        play(user, written)
        print()
        show_verdict(user, written)
        if cfg.trace == "bound":
            tokens = written[-1].tokens
            found = decisive(cfg, world, (stage, student), tokens, user.incoming)
            print(decided(user.words, found))


def decided(words, found):
    """What `decisive` found, as a line."""
    if not found:
        return "  decisive        no statement by itself"
    said = (f"{words[about]} (without it {words[new]} is first)" for about, new in found.items())
    line = "  decisive        what is said of " + ", ".join(said)
    return textwrap.fill(line, line_width(), subsequent_indent=18 * " ")


def line_width():
    return max(20, min(80, shutil.get_terminal_size()[0] - 1))


def show_prompt(words, prompt):
    """The history of a prompt (P,)."""
    prompt = [int(token) for token in prompt if token != PAD]
    history = " ".join(words[token] for token in prompt[:prompt.index(CANDIDATES)])
    print(textwrap.fill(history, line_width(), initial_indent="  ", subsequent_indent="    "))


def show_verdict(user, columns):
    """What the responses [Written] of a user cost and are worth, and where the target went."""
    places = {}
    for written in columns:
        tokens = written.tokens[None]
        answers = parse_answers(tokens, user.incoming[None])
        true = faithfulness(user.plain(tokens), user.trace[None], user.n_labels)[0]
        verdict = "valid" if answers.valid[0] else paint("✗", RED) + " invalid"
        n_tokens = int((tokens != PAD).sum())
        print(f"  {written.name:<5}{n_tokens} tokens in {len(written.ends)} forwards, "
              f"{written.ends[-1]:.1f} ms: {verdict}, {100 * true:.0f}% of the statements true")
        if user.target >= 0:
            places[written.name] = answers.order[0].tolist().index(user.target) + 1
    if places:
        before = user.incoming.tolist().index(user.target) + 1
        now = ", ".join(f"{place} by {name}" for name, place in places.items())
        print(f"  true next item  {user.words[LABEL + user.target]}: place {before} in the "
              f"incoming list, {now}")


# --- Text of a terminal ------------------------------------------------------------------------

def animated():
    return sys.stdout.isatty() and os.environ.get("TERM") != "dumb"


def coloured():
    return animated() and not os.environ.get("NO_COLOR")


def paint(text, style):
    return f"\033[{style}m{text}\033[0m" if style and coloured() else text


def cells_of(text):
    """How many cells of a terminal a text takes."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(unicodedata.combining(c) > 0 for c in text)


class Piece(NamedTuple):
    """A part of a word. Before `at` a terminal shows `mask` instead, as wide."""
    text: str
    style: str = ""
    at: float = 0.0  # milliseconds
    mask: str = " "


def word(*pieces):
    return pieces


def width_of(words):
    """Cells that words, tuples of pieces, take on one line."""
    if not words:
        return 0
    return sum(cells_of(piece.text) for pieces in words for piece in pieces) + len(words) - 1


def wrapped(words, width):
    """Words -> lines of words, each at most so wide; a word that is wider alone is cut."""
    lines = [[]]
    for pieces in words:
        while width_of([pieces]) > width:
            pieces = (pieces[0]._replace(text=pieces[0].text[:-2] + "…"), *pieces[1:])
        if lines[-1] and width_of([*lines[-1], pieces]) > width:
            lines.append([])
        lines[-1].append(pieces)
    return lines


def rendered(words, now):
    """A line of words as it stands at a time."""
    def drawn(piece):
        if piece.at <= now:
            return paint(piece.text, piece.style)
        return paint(piece.mask * cells_of(piece.text), DIM)
    return " ".join("".join(map(drawn, pieces)) for pieces in words)


# --- The picture ------------------------------------------------------------------------------

def token_word(user, written, place, *marks):
    """A token in the colour of its step; without colours, the step in brackets, but for the
    first. marks: pieces that follow it."""
    text, step = user.words[written.tokens[place]], int(written.step[place])
    style = COLOURS[min(step, len(COLOURS) - 1)]
    if step and not coloured():
        text += f"({step + 1})"
    style, mask = (f"38;5;{style}", "░") if written.block_size else ("", " ")
    return word(Piece(text, style, written.at[place], mask), *marks)


def run_of(user, written, places, marks):
    """The tokens at some places as words, with a bar where a block begins, and the pieces that
    follow them, marks {place: [Piece]}."""
    words = []
    for place in places:
        if written.block_size and place and place % written.block_size == 0:
            words.append(word(Piece("│", DIM)))
        words.append(token_word(user, written, place, *marks.get(place, ())))
    return words


def column_of(user, written):
    """What a response says, {about: [words of a paragraph]}: statement by statement, each wrong
    one with the rule's below it; the answer under None."""
    at, end = written.at, written.ends[-1]
    said = {about: [] for about in user.required}
    for places, fault in checked(user, written.tokens):
        about = int(written.tokens[places[0]])
        paragraphs = said.setdefault(about, [])
        paragraphs.append(run_of(user, written, places, {}))
        if fault:
            seen = max(at[places])
            mark = word(Piece("✗", RED, seen))
            paragraphs.append([mark, *(word(Piece(w, DIM, seen)) for w in fault.split(" "))])
    for about in unsaid(user, written.tokens):
        text = f"nothing about {user.words[about]}"
        said[about].append([word(Piece("✗", RED, end)), word(Piece(text, DIM, end))])
    said[None] = [answer_words(user, written)]
    return said


def answer_words(user, written):
    """The answer, with a star at the target and a mark at labels that stand twice or are not in
    the list."""
    at, start, marks = written.at, answer_start(written.tokens), {}
    for place in range(start, len(at)):
        if written.tokens[place] == user.taken:
            marks[place] = [Piece("★", STAR, at[place])]
    for place, other in wrong_labels(user, written.tokens).items():
        seen = max(at[place], at[place if other is None else other])
        marks.setdefault(place, []).append(Piece("✗", RED, seen))
    words = run_of(user, written, range(start, len(at)), marks)
    if ANSWER not in written.tokens:
        end = written.ends[-1]
        words += [word(Piece("✗", RED, end)), word(Piece("no answer", DIM, end))]
    return words


def heading(written, now):
    """A response's clock and counter at a time."""
    done = int((written.ends <= now).sum())
    spent = min(now, written.ends[-1])
    return f"{written.name}  {done} of {len(written.ends)} forwards, {spent:.1f} ms"


def candidate_words(user, about):
    """What the prompt shows of a candidate, with a star at the target."""
    words = [word(Piece(user.words[token], DIM)) for token in user.candidates.get(about, ())]
    if words and about == user.taken:
        words.append(word(Piece("★", STAR)))
    return words


def picture(user, columns, width, candidates=True):
    """The lines of a picture of responses [Written], at most so wide. A line is a list of cells,
    (words, its width); the words of a heading are the Written itself, as it tells the time.

    Columns stand beside each other where there is room; so do the candidates, or above."""
    if len(columns) > 1 and width < len(columns) * COLUMN:
        lines = []
        for written in columns:
            lines += picture(user, [written], width, candidates) + [[]]
        return lines[:-1]
    said = [column_of(user, written) for written in columns]
    rows = dict.fromkeys(about for column in said for about in column)
    rows[None] = rows.pop(None)                                   # the answer comes last
    shown = {about: candidate_words(user, about) if candidates else [] for about in rows}
    beside, widths = layout(shown, said, width)

    lines = [list(zip([[], *columns], widths))]
    for about in rows:
        if shown[about] and not beside:
            lines += [[(line, width)] for line in wrapped(shown[about], width)]
        cells = [[shown[about]] if beside else []]
        for column in said:
            cells.append([line for words in column.get(about, ())
                          for line in wrapped(words, widths[1] - 2)])
        for words in itertools.zip_longest(*cells, fillvalue=[]):
            lines.append(list(zip(words, widths)))
    return lines


def layout(shown, said, width):
    """Whether candidates {about: words} fit beside columns [{about: paragraphs}], and the widths
    of all. Answers may be wrapped for that, statements not."""
    left = max(map(width_of, shown.values()))
    paragraphs = [(about, width_of(words)) for column in said for about in column
                  for words in column[about]]
    longest = max((n for about, n in paragraphs if about is not None), default=0)
    beside = left > 0 and left + 2 + len(said) * (max(longest, COLUMN - 8) + 2) <= width
    indent = left + 2 if beside else 2 * (left > 0)               # candidates beside or above
    most = max(COLUMN, *(n for _, n in paragraphs)) + 4           # no column needs more
    return beside, [indent] + len(said) * [min((width - indent) // len(said), most)]


def drawn(line, now):
    """A line of a picture as text, at a time."""
    out = ""
    for words, wide in line:
        if isinstance(words, Written):
            words = wrapped([word(Piece(heading(words, now), BOLD))], wide)[0]
        out += rendered(words, now) + " " * (wide - width_of(words))
    return out.rstrip()


# --- The animation ----------------------------------------------------------------------------

def play(user, columns):
    """Shows responses [Written] to one user as they are written, then the whole picture."""
    width, height = shutil.get_terminal_size((96, 40))
    width = max(20, width - 1)  # a full line would break by itself in some terminals
    whole = picture(user, columns, width)
    if animated():
        student = columns[-1]
        clocks = [[(written, width)] for written in columns[:-1]]
        for lines in (whole, clocks + picture(user, [student], width, candidates=False)):
            if len(lines) < height:  # what has left the screen cannot be drawn again
                animate(lines, columns)
                break
    end = max(written.ends[-1] for written in columns)
    print("\n".join(drawn(line, end) for line in whole), flush=True)


def animate(lines, columns):
    """Draws lines in place, once for each forward of the responses, and wipes them out."""
    moments = sorted({0.0, *(end for written in columns for end in written.ends)})
    back = f"\033[{len(lines)}F"  # to the start of the first line
    begin = time.perf_counter()
    sys.stdout.write("\033[?25l" + "\n" * len(lines))  # no cursor
    try:
        for now in moments:
            wait = SECONDS * now / moments[-1] - (time.perf_counter() - begin)
            time.sleep(max(0.0, wait))
            frame = "".join(f"{drawn(line, now)}\033[K\n" for line in lines)
            sys.stdout.write(back + frame)
            sys.stdout.flush()
        time.sleep(SECONDS / 8)
    finally:
        sys.stdout.write(f"{back}\033[J\033[?25h")
        sys.stdout.flush()
