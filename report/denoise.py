"""A response to one user: what was written, in which forward, and what is wrong with it.

Every forward of a decode is timed. So the terminal (show.py) and the page (html.py) can show the
AR teacher and a student side by side: a token appears when its forward is done.
"""
import time
from dataclasses import dataclass

import numpy as np

from data import (ANSWER, CANDIDATES, EOS, LABEL, NONE, PAD, World, examples_of, joined,
                  parse_answers, statements, tensors)
from plumbing.processes import device_of
from sampler import NEVER
from trainer import respond

ROUNDS = 3  # every decode is timed so often


# --- A user -----------------------------------------------------------------------------------

@dataclass
class User:
    """What the prompt and the reference say of one test user."""
    world: World
    words: list           # token -> word, printable
    prompt: list          # tokens, without padding
    trace: np.ndarray     # (T,) what the rule writes, synonyms as their words
    incoming: np.ndarray  # (K,) labels
    target: int | None    # the label token of what the user took next; None: it is not in the list

    def text(self, tokens):
        return " ".join(self.words[token] for token in tokens)

    @property
    def history(self):
        """Tokens of the prompt before the candidates."""
        return self.prompt[:self.prompt.index(CANDIDATES)]

    @property
    def candidates(self):
        """{label token: what the prompt shows of it, tokens that begin with the label}"""
        listed = self.prompt[self.prompt.index(CANDIDATES) + 1:]
        return {part[0]: part for part in statements(listed, self.world.n_labels)}

    @property
    def required(self):
        """{label token or <profile>: the rule's statement about it, tokens}"""
        return {part[0]: part for part in statements(self.trace, self.world.n_labels)}


def printable(word):
    """A word of the data; what would steer a terminal is shown as ?."""
    return "".join(c if c.isprintable() else "?" for c in word)


def user_of(world, n):
    """Test user n of a world."""
    split = world.test
    target = LABEL + int(split.target[n]) if split.target[n] >= 0 else None
    return User(world, [printable(word) for word in world.words],
                [int(token) for token in split.prompt[n] if token != PAD],
                world.plain(split.trace[n]), split.incoming[n], target)


# --- What was written, and when ---------------------------------------------------------------

@dataclass
class Written:
    """A whole response slot by slot, of all blocks that were opened. A slot whose token does not
    stay (it comes after the response's end) has [PAD]."""
    name: str
    tokens: np.ndarray       # (R,)
    block: np.ndarray        # (R,) the number of the slot's block
    forward: np.ndarray      # (R,) the number of the forward that committed it; -1: none did
    probability: np.ndarray  # (R,) that the token had then
    ends: np.ndarray         # (F,) milliseconds until each forward was done


def write(cfg, world, name, model, decoder, n):
    """What a decoder writes to test user n -> Written. model: the one that it calls."""
    prompt, _ = tensors(examples_of(world.test, cfg.trace)[0], range(n, n + 1), device_of(cfg))
    parts, ends = timed(model, lambda: respond(cfg, world, decoder, prompt))
    tokens = joined([part.tokens.cpu().numpy() for part in parts])[0]
    probability = np.concatenate([part.logp[0].exp().cpu().numpy() for part in parts])
    block, forward = numbered(parts)
    if parts[0].block_size == 1:  # token by token: a slot is opened if it is written
        kept = tokens != PAD
    else:
        kept = np.isin(block, block[forward >= 0])
    return Written(name, tokens[kept], block[kept], forward[kept], probability[kept], ends)


def timed(model, write):
    """Calls write() several times -> what it returns, and the milliseconds (F,) until each forward
    of the model was done, medians. A forward lasts until the next one begins."""
    taken = []
    for _ in range(ROUNDS):
        starts = []
        hook = model.register_forward_pre_hook(lambda *_: starts.append(time.perf_counter()))
        begin = time.perf_counter()
        result = write()
        end = time.perf_counter()
        hook.remove()
        taken.append(np.diff([begin, *starts[1:], end]))
    return result, 1000 * np.median(taken, axis=0).cumsum()


def numbered(parts):
    """The number of each slot's block, and of the forward that committed it, counted through all
    parts of a response to one prompt: two arrays (R,). -1: no forward did.

    Every forward commits a slot. So the different pairs of block and step are the forwards."""
    blocks, forwards = [], []
    n_blocks, n_forwards = 0, 0
    for part in parts:
        step = part.commit_step[0].cpu().numpy()
        block = np.arange(len(step)) // part.block_size
        committed = step != NEVER
        _, number = np.unique((block * NEVER + step)[committed], return_inverse=True)
        forward = np.full(len(step), -1)
        forward[committed] = n_forwards + number
        blocks.append(n_blocks + block)
        forwards.append(forward)
        n_blocks += block[-1] + 1
        n_forwards += int(part.forwards[0])
    return np.concatenate(blocks), np.concatenate(forwards)


# --- What is wrong with it --------------------------------------------------------------------

def checked(user, written):
    """The statements of a response: [(slots, fault)]. fault: what is wrong, in words; None if the
    statement is true."""
    n_labels = user.world.n_labels
    plain = user.world.plain(written.tokens)
    # Statements leave <none> out, and there is no [PAD] in a trace but at its end.
    slots = iter(np.flatnonzero(plain != NONE).tolist())
    seen, found = set(), []
    for part in statements(plain, n_labels):
        about = part[0]
        fault = None
        if about not in user.required:
            fault = "there should be no such statement"
        elif about in seen:
            fault = f"{user.words[about]} comes again"
        elif user.required[about] != part:
            fault = f"true is: {user.text(user.required[about])}"
        seen.add(about)
        found.append(([next(slots) for _ in part], fault))
    return found


def missing(user, written):
    """What a response makes no statement about: a list of tokens."""
    said = {part[0] for part in statements(written.tokens, user.world.n_labels)}
    return [about for about in user.required if about not in said]


def answer_slots(written):
    """The slots from <answer> on that have a token; none if there is no <answer>."""
    tokens = written.tokens.tolist()
    if ANSWER not in tokens:
        return []
    return [slot for slot in range(tokens.index(ANSWER), len(tokens)) if tokens[slot] != PAD]


def wrong_labels(user, written):
    """What makes an answer invalid: {slot: why, in words}. Of a label that stands twice the later
    slot is wrong."""
    listed = [LABEL + label for label in user.incoming if label >= 0]
    seen, found = set(), {}
    for slot in answer_slots(written):
        token = int(written.tokens[slot])
        if token in seen:
            found[slot] = "stands twice"
        elif token not in listed and token not in (ANSWER, EOS):
            found[slot] = "no label of the list"
        seen.add(token)
    return found


def verdict(user, written):
    """Whether the answer is valid, and the ranking as served: label tokens, best first."""
    answers = parse_answers(written.tokens[None], user.incoming[None])
    order = answers.order[0]
    return bool(answers.valid[0]), (order[order >= 0] + LABEL).tolist()


def truth(user, written):
    """(true statements, statements that count): data.faithfulness is their ratio."""
    found = checked(user, written)
    return sum(fault is None for _, fault in found), max(len(user.required), len(found))
