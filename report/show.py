"""What a student wrote, user by user, in the terminal: python evaluate.py --config toy --show 3"""
import sys
import textwrap

from data import ANSWER, CANDIDATES, EOS, LABEL, NONE, PAD, parse_answers, statements, tensors
from plumbing.checkpoint import device_of, last_student
from trainer import decode

# Of the 256 colours of a terminal, by step: from cold to warm.
COLOURS = (51, 45, 39, 33, 63, 99, 135, 171, 207, 205, 203, 209, 215, 221, 227, 191)


def coloured():
    return sys.stdout.isatty()


def mark():
    return "\033[31m✗\033[0m" if coloured() else "✗"


def show(cfg, world, n_users):
    """Prints the first test users: what the prompt shows, what the last finished stage wrote,
    and what is wrong with it. Raises UserError if nothing but the teacher has finished."""
    stage, model = last_student(cfg, world)
    split = world.test.take(slice(0, n_users))
    prompt, _ = tensors(split, range(len(split)), device_of(cfg))
    decoded = decode(cfg, model, prompt, world.max_response)
    tokens = decoded.tokens.cpu().numpy()
    step = decoded.commit_step.cpu().numpy()
    answers = parse_answers(tokens, split.incoming)
    words = [printable(word) for word in world.words]

    steps = "(2), (3), ...; the first is not marked"
    if coloured():
        steps = " ".join(paint(str(i + 1), i) for i in range(len(COLOURS)))
    print(f"{stage} of {cfg.config}; steps of a block: {steps}")
    for n in range(len(split)):
        written = int((tokens[n] != PAD).sum())
        verdict = "valid" if answers.valid[n] else f"{mark()} invalid"
        print(f"\n{'═' * 80}\nuser {n + 1}: {written} tokens in {decoded.forwards[n].item()} "
              f"forwards, {verdict}\n")
        show_prompt(words, split.prompt[n])
        show_trace(words, world.n_labels, split.prompt[n], split.trace[n], tokens[n], step[n])
        show_answer(words, tokens[n], step[n], split.incoming[n])
        target = split.target[n]
        if target >= 0:
            before = split.incoming[n].tolist().index(target) + 1
            now = answers.order[n].tolist().index(target) + 1
            print(f"\n  true next item  {words[LABEL + target]}: place {before} in the incoming "
                  f"list, {now} now")


def printable(word):
    """A word from the data: whatever would steer a terminal is shown as ?."""
    return "".join(c if c.isprintable() else "?" for c in word)


def paint(word, step):
    """A word in the colour of its step; where the output has no colours, the step in brackets,
    but for the first."""
    if coloured():
        return f"\033[38;5;{COLOURS[min(int(step), len(COLOURS) - 1)]}m{word}\033[0m"
    return f"{word}({step + 1})" if step else word


def name(words, part):
    return " ".join(words[token] for token in part)


def show_prompt(words, prompt):
    """The history of a prompt (P,)."""
    prompt = [int(token) for token in prompt if token != PAD]
    history = name(words, prompt[:prompt.index(CANDIDATES)])
    print(textwrap.fill(history, 78, initial_indent="  ", subsequent_indent="    "))


def show_trace(words, n_labels, prompt, trace, tokens, step):
    """Every statement of tokens (R,), committed at step (R,): above it what the prompt (P,) shows
    of the candidate; where it is wrong, below it the rule's, from trace (T,)."""
    start = prompt.tolist().index(CANDIDATES) + 1
    shown = {part[0]: part for part in statements(prompt[start:], n_labels)}
    required = {part[0]: part for part in statements(trace, n_labels)}
    seen = set()
    steps = iter(step[tokens != NONE])  # empty places are in no statement
    for part in statements(tokens, n_labels):
        text = " ".join(paint(words[token], next(steps)) for token in part)
        about = part[0]
        print(f"\n  {name(words, shown.get(about, ()))}".rstrip())
        print(f"    {text}")
        if required.get(about) != part or about in seen:
            print(f"    {mark()} {name(words, required.get(about, ()))}".rstrip())
        seen.add(about)
    for missing in required.keys() - seen:
        print(f"\n    {mark()} nothing about {words[missing]}")


def show_answer(words, tokens, step, incoming):
    """The answer in tokens (R,), committed at step (R,), with a mark at labels that stand twice
    or are not in the list incoming (K,)."""
    written = [int(token) for token in tokens if token != PAD]
    start = written.index(ANSWER) if ANSWER in written else len(written)
    listed = [LABEL + label for label in incoming if label >= 0]
    answer = []
    before = set()
    for i in range(start, len(written)):
        token = written[i]
        wrong = token in before or (token not in listed and token not in (ANSWER, EOS))
        before.add(token)
        answer.append(paint(words[token], step[i]) + (mark() if wrong else ""))
    print("\n  " + " ".join(answer))
