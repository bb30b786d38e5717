"""What a student wrote, user by user, in the terminal: python evaluate.py --config toy --show 3"""
import sys
import textwrap

from common import device_of, last_student, serve
from data import ANSWER, CANDIDATES, LABEL, parse_answers, statements, tensors
from model import EOS, PAD

COLOURS = (51, 45, 39, 33, 63, 99, 135, 171, 207, 205, 203, 209, 215, 221, 227, 191)  # of the 256 of a terminal, by step: cold to warm
MARK = "\033[31m✗\033[0m" if sys.stdout.isatty() else "✗"


def show(cfg, world):
    """Prints the first cfg.show test users: what the prompt shows, what the last finished stage wrote, and what is wrong with it.
    UserError if nothing but the teacher has finished."""
    (stage, model), split = last_student(cfg, world), world.test.take(slice(0, cfg.show))
    prompt, _ = tensors(split, range(len(split)), device_of(cfg))
    decoded = serve(cfg, model, prompt, world.max_response)
    tokens, step = decoded.tokens.cpu().numpy(), decoded.commit_step.cpu().numpy()
    answers = parse_answers(tokens, split.incoming)
    print(f"{stage} of {cfg.config}; steps of a block: " +
          (" ".join(paint(str(i + 1), i) for i in range(len(COLOURS))) if sys.stdout.isatty() else "(2), (3), ...; the first is not marked"))
    for n in range(len(split)):
        verdict = "valid" if answers.valid[n] else f"{MARK} invalid"
        print(f"\n{'═' * 80}\nuser {n + 1}: {int((tokens[n] != PAD).sum())} tokens in {decoded.forwards[n].item()} forwards, {verdict}\n")
        show_user(world, split.prompt[n], split.trace[n], tokens[n], step[n], int(split.k[n]))
        rank = lambda order: order.tolist().index(split.target[n]) + 1
        truth = split.target[n]
        print(f"\n  true next item  {world.words[LABEL + truth]}: place {rank(split.incoming[n])} in the incoming list, {rank(answers.order[n])} now")


def paint(word, step):
    """A word in the colour of its step; the step in brackets, the first left out, where the output has no colours."""
    if sys.stdout.isatty():
        return f"\033[38;5;{COLOURS[min(int(step), len(COLOURS) - 1)]}m{word}\033[0m"
    return f"{word}({step + 1})" if step else word


def show_user(world, prompt, trace, tokens, step, k):
    """prompt (P,), trace (T,) as the rule writes it, tokens and step (R,) of the response, k candidates."""
    words, prompt = world.words, [int(t) for t in prompt if t != PAD]
    name = lambda part: " ".join(words[t] for t in part)
    at = prompt.index(CANDIDATES)
    print(textwrap.fill(name(prompt[:at]), 78, initial_indent="  ", subsequent_indent="    "))
    shown = {part[0]: part for part in statements(prompt[at + 1:], world.n_labels)}
    required = {part[0]: part for part in statements(trace, world.n_labels)}
    place, seen = 0, set()
    for part in statements(tokens, world.n_labels):
        text = " ".join(paint(words[t], step[place + i]) for i, t in enumerate(part))
        place += len(part)
        wrong = required.get(part[0]) != part or part[0] in seen
        seen.add(part[0])
        print(f"\n  {name(shown.get(part[0], ()))}".rstrip() + f"\n    {text}" + (f"\n    {MARK} {name(required.get(part[0], ()))}".rstrip() if wrong else ""))
    for missing in required.keys() - seen:
        print(f"\n    {MARK} nothing about {words[missing]}")
    answer, before = [], set()
    for i in range(place, int((tokens != PAD).sum())):
        t = int(tokens[i])
        bad = t not in (ANSWER, EOS) and (t in before or not LABEL <= t < LABEL + k)
        before.add(t)
        answer.append(paint(words[t], step[i]) + (MARK if bad else ""))
    print("\n  " + " ".join(answer))
