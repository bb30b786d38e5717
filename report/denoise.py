"""A response to one user: what was written, when each token stood there, and what is wrong with it.

Every forward of a decode is measured. So the terminal (show.py) and the page (html.py) can play
the AR teacher and a student beside it on one clock: a token appears when its forward was done.
"""
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from data import ANSWER, CANDIDATES, EOS, LABEL, NONE, PAD, statements
from sampler import NEVER
from trainer import ar_write, decode

ROUNDS = 3  # every decode is timed so often


# --- What was written, and when ---------------------------------------------------------------

@dataclass
class User:
    """What a prompt and its reference say, for one user."""
    words: list           # token -> word
    n_labels: int
    prompt: np.ndarray    # (P,) tokens
    trace: np.ndarray     # (T,) tokens: what the rule writes, synonyms as their words
    incoming: np.ndarray  # (K,) labels
    target: int           # label, -1 if it is not in the list
    plain: Callable       # World.plain

    def text(self, part):
        return " ".join(self.words[token] for token in part)

    @property
    def taken(self):
        """The target's token, or None."""
        return LABEL + self.target if self.target >= 0 else None

    @property
    def candidates(self):
        """{label token: what the prompt shows of it, as tokens}"""
        start = self.prompt.tolist().index(CANDIDATES) + 1
        return {part[0]: part for part in statements(self.prompt[start:], self.n_labels)}

    @property
    def required(self):
        """{label token or <profile>: the rule's statement about it}"""
        return {part[0]: part for part in statements(self.trace, self.n_labels)}


@dataclass
class Written:
    """One response, and when each of its tokens stood there.

    With --trace bound a student's has [PAD] where the trace's last block is not used."""
    name: str
    tokens: np.ndarray   # (R,) up to its [EOS]
    step: np.ndarray     # (R,) the step of its block that committed it; 0 for AR
    forward: np.ndarray  # (R,) the forward that wrote it, -1 where none did
    ends: np.ndarray     # (F,) milliseconds until each forward was done
    block_size: int      # 0 for AR
    slots: int           # of its blocks: R or more

    @property
    def at(self):
        """(R,) milliseconds until each token stood there."""
        return self.ends[self.forward]


def printable(word):
    """A word from the data: whatever would steer a terminal is shown as ?."""
    return "".join(c if c.isprintable() else "?" for c in word)


def user_of(world, n):
    """Test user n of a world."""
    split = world.test
    words = [printable(word) for word in world.words]
    return User(words, world.n_labels, split.prompt[n], world.plain(split.trace[n]),
                split.incoming[n], int(split.target[n]), world.plain)


def timed(model, write):
    """write() -> what it returns, and the milliseconds (F,) until each forward of the model was
    done: medians over rounds. A forward lasts until the next one begins."""
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


def ar_writes(cfg, model, prompt, max_len):
    """A teacher's response to one prompt (1, P) -> Written."""
    decoded, ends = timed(model, lambda: ar_write(cfg, model, prompt, max_len))
    tokens, step = opened(decoded, 1)
    written = tokens != PAD  # with --trace bound all but the [EOS] of the trace
    tokens, forward = tokens[written], forward_of(step, 1)[written]
    return Written("ar", tokens, step[written], forward, ends, 0, len(tokens))


def student_writes(cfg, name, model, prompt, max_len, tau):
    """A student's response to one prompt (1, P), at a threshold -> Written."""
    decoded, ends = timed(model, lambda: decode(cfg, model, prompt, max_len, tau))
    tokens, step = opened(decoded, cfg.block_size)
    forward = forward_of(step, cfg.block_size)
    step = np.where(tokens == PAD, 0, step)
    length = int(np.flatnonzero(tokens != PAD)[-1]) + 1
    return Written(name, tokens[:length], step[:length], forward[:length], ends, cfg.block_size,
                   len(tokens))


def opened(decoded, block_size):
    """Tokens and commit steps (R,) of the one response of a Decoded, without blocks that no
    forward has opened: with --trace bound the answer's may come after some."""
    tokens, step = (x[0].cpu().numpy() for x in (decoded.tokens, decoded.commit_step))
    block = np.arange(len(step)) // block_size  # the last block may be narrower
    there = np.isin(block, block[step != NEVER])
    return tokens[there], step[there]


def forward_of(step, block_size):
    """Commit steps (R,) within blocks -> the forward of the whole decode, -1 for slots that were
    never committed. Every forward commits a slot, so the pairs of block and step count them."""
    when = np.arange(len(step)) // block_size * NEVER + step
    committed = step != NEVER
    out = np.full(len(step), -1)
    out[committed] = np.unique(when[committed], return_inverse=True)[1]
    return out


# --- What is wrong with it --------------------------------------------------------------------

def placed(tokens, n_labels):
    """The places of each statement of a response (R,): [[place]]. Empty places are in none."""
    place = iter(np.flatnonzero(tokens != NONE).tolist())
    return [[next(place) for _ in part] for part in statements(tokens, n_labels)]


def checked(user, tokens):
    """The statements of a response (R,): [(places, fault)]; fault: what is wrong, in words, or
    None."""
    required, seen, out = user.required, set(), []
    plain = user.plain(tokens)
    for places in placed(plain, user.n_labels):
        part = tuple(plain[places].tolist())
        about = part[0]
        fault = None
        if about not in required:
            fault = "no such statement"
        elif about in seen:
            fault = f"{user.words[about]} again"
        elif required[about] != part:
            fault = f"right: {user.text(corrected(part, required[about]))}"
        seen.add(about)
        out.append((places, fault))
    return out


def corrected(part, rule):
    """The words of the rule's statement where another differs; all of it if lengths do."""
    if len(part) != len(rule):
        return rule
    return [right for token, right in zip(part, rule) if token != right]


def unsaid(user, tokens):
    """What a response (R,) makes no statement about: [token]."""
    said = {part[0] for part in statements(tokens, user.n_labels)}
    return [about for about in user.required if about not in said]


def answer_start(tokens):
    """The place of <answer> in a response (R,); if there is none, of what follows the trace."""
    for end in (ANSWER, EOS):
        if end in tokens:
            return tokens.tolist().index(end)
    return len(tokens)


def wrong_labels(user, tokens):
    """Places of an answer that make it invalid: {place: the earlier place of the same label, or
    None where the token is no label of the list}."""
    listed = [LABEL + label for label in user.incoming if label >= 0]
    first, out = {}, {}
    for place in range(answer_start(tokens), len(tokens)):
        token = int(tokens[place])
        if token not in listed and token not in (ANSWER, EOS):
            out[place] = None
        elif token in first:
            out[place] = first[token]
        first.setdefault(token, place)
    return out
