"""What goes in and what comes out: prompts, reasoning traces, answers, and examples made of them.

A prompt shows a user's history and K candidates, in the order of a cheap pre-ranker. A response
is a reasoning trace (a profile of the user, then the evidence of every candidate, never a rank),
then the answer: the candidates' labels, best first. A user of the toy world (toy/world.py), 4
candidates:

    prompt   <history> x1 y2 z3  x3 y2 z3  x2 y2 z3  x2 y1 z3  x2 y2 z3  x2 y2 z3
             <candidates> L1 x3 y4 z4  L2 x4 y1 z2  L3 x3 y1 z4  L4 x2 y4 z3
    trace    <profile> x2 y2 z3
             L1 x3:1 y4:0 z4:0  L2 x4:0 y1:1 z2:0  L3 x3:1 y1:1 z4:0  L4 x2:3 y4:0 z3:3
    answer   <answer> L4 L1 L2 L3 [EOS]

x3:1 says that the history has x3 once; 3 stands for three times or more. Every statement follows
from the prompt, so a rule can check a trace. *target* is the label of the item that the user took
next, *incoming* the order of the list, *order* the ranking to learn.

If a list is shorter than K, its last places are filled with <none>. So the distance between a
statement and the prompt token that it copies is the same in all lists.
"""
import dataclasses
import functools
from dataclasses import dataclass

import numpy as np
import torch

SPECIAL = ["[PAD]", "[MASK]", "[EOS]", "<history>", "<last>", "<candidates>", "<profile>",
           "<answer>", "<none>"]
PAD, MASK, EOS, HISTORY, LAST, CANDIDATES, PROFILE, ANSWER, NONE = range(len(SPECIAL))
# <last> is Beauty's only: it stands before the latest item of the history.
LABEL = len(SPECIAL)  # label i (from 0) is token LABEL + i and the word L<i + 1>


@dataclass
class Split:
    """Users as arrays, one row each. Empty places at the end of a list are -1."""
    prompt: np.ndarray    # (N, P) int16 tokens, padded on the left
    trace: np.ndarray     # (N, T) int16 tokens, padded on the right: what the rule writes
    order: np.ndarray     # (N, K) int8 labels, best first, by the toy's oracle, or Beauty's writer
    target: np.ndarray    # (N,)   int8 label of the true next item, -1 if it is not in the list
    incoming: np.ndarray  # (N, K) int8 labels in pre-ranked order: 0, 1, ...

    def __len__(self):
        return len(self.prompt)

    @functools.cached_property
    def list_length(self):
        """(N,) how many candidates each list has."""
        return (self.incoming >= 0).sum(1)

    @functools.cached_property
    def response(self):
        """(N, R) int16 tokens, padded on the right: trace, <answer>, labels, [EOS]."""
        return responses(self.trace, self.order)

    def take(self, rows):
        return Split(*(getattr(self, f.name)[rows] for f in dataclasses.fields(self)))


@dataclass
class World:
    words: list        # token -> word
    n_labels: int      # label words; more than K, so that an answer can name one that is not listed
    train: Split
    val: Split
    test: Split
    source: str        # where the data came from, for the report
    notes: dict        # measured facts about the data, for the report
    references: dict = dataclasses.field(default_factory=dict)  # name -> (N, K) other test orders
    nearest: dict = dataclasses.field(default_factory=dict)     # Beauty: how evidence is rounded
    checksum: str = ""  # of the data behind the splits: a checkpoint belongs to one world
    canonical: np.ndarray = None  # (V,) synonym -> its word (ours/wording.py); None: no synonyms

    @functools.cached_property
    def longest(self):
        """For each --trace, a list: how long responses of each kind (examples_of) may be, with the
        [EOS]. Cached, because every decode asks for it."""
        return {mode: [examples.response.shape[1] for examples in examples_of(self.train, mode)]
                for mode in ("free", "bound")}

    def plain(self, tokens):
        """Tokens, an array, with every synonym as its word: what is said, however it is worded."""
        return tokens if self.canonical is None else self.canonical[tokens]


# --- Tokens -----------------------------------------------------------------------------------

def pack(tokens, left):
    """Moves the [PAD] of each row (N, T) to one side, and cuts columns that are [PAD] in all rows.
    The other tokens keep their order."""
    is_pad = tokens == PAD
    # A stable sort by the question "is it padding?".
    order = np.argsort(~is_pad if left else is_pad, axis=1, kind="stable")
    tokens = np.take_along_axis(tokens, order, axis=1)
    used = int((~is_pad).sum(1).max())
    return tokens[:, -used:] if left else tokens[:, :used]


def responses(trace, order):
    """trace (N, T), order (N, K) of labels, -1 = none -> responses (N, R), R at most T + K + 2."""
    n = len(trace)
    answer = np.full((n, 1), ANSWER, np.int16)
    labels = np.where(order >= 0, order + LABEL, PAD).astype(np.int16)
    end = np.full((n, 1), EOS, np.int16)
    return pack(np.concatenate((trace, answer, labels, end), axis=1), left=False)


def draw_list_lengths(n, cfg, rng):
    """Lengths (n,) of training lists: K, or with probability vary_lists uniform in [min_list, K].

    Without this the answer's length could be learned by heart."""
    varied = rng.random(n) < cfg.vary_lists
    length = rng.integers(cfg.min_list, cfg.n_candidates + 1, n)
    return np.where(varied, length, cfg.n_candidates)


# --- Examples: what a model reads and what it writes -------------------------------------------

@dataclass
class Examples:
    """Examples of one kind, a row each: what is read, and what is to be written."""
    prompt: np.ndarray    # (N, P) int16 tokens, padded on the left
    response: np.ndarray  # (N, R) int16 tokens, padded on the right; each ends with [EOS]

    def __len__(self):
        return len(self.prompt)

    def take(self, rows):
        return Examples(self.prompt[rows], self.response[rows])


def examples_of(split, mode):
    """The examples that users give, row n of each kind from user n: a list of Examples.

    mode is the setting --trace. With "free", as in the paper, there is one kind:

        <history> x1 y2 ... x2 y4 z3   ->  <profile> x2 y2 z3  L1 x3:1 ...  <answer> L4 ... [EOS]

    With "bound" (ours) there are two. The answer is written from the trace alone, so only
    what the trace says can decide the ranking:

        <history> x1 y2 ... x2 y4 z3   ->  <profile> x2 y2 z3  L1 x3:1 ... z3:3 [EOS]
        <profile> x2 y2 z3  L1 x3:1 ...  ->  <answer> L4 L1 L2 L3 [EOS]
    """
    if mode == "free":
        return [Examples(split.prompt, split.response)]
    end = np.full((len(split), 1), EOS, np.int16)
    ended = pack(np.concatenate((split.trace, end), axis=1), left=False)
    answer = responses(split.trace[:, :0], split.order)
    return [Examples(split.prompt, ended), Examples(pack(split.trace, left=True), answer)]


def as_prompt(trace):
    """Traces as they were written (N, R) -> as they are read: without [EOS], padded on the left."""
    text = np.where(trace == EOS, PAD, trace)
    text[(text == PAD).all(1), -1] = EOS  # a prompt needs a token: an empty trace is read as [EOS]
    return pack(text, left=True)


def joined(written):
    """Whole responses (N, R) from what was written of each kind, arrays (N, R_kind). Between a
    trace and its answer there may be [PAD]."""
    *traces, answer = written
    texts = [np.where(trace == EOS, PAD, trace) for trace in traces]
    return np.concatenate((*texts, answer), axis=1)


def tensors(examples, rows, device):
    """Prompts (n, P) and responses (n, R) of some rows, int64. Columns of padding are left out of
    the prompts. Responses are as wide as the longest of all these examples, whatever the rows; OPD
    and RL decode up to this width."""
    prompt = examples.prompt[rows]
    prompt = prompt[:, (prompt != PAD).any(0)]
    response = examples.response[rows]
    return (torch.from_numpy(prompt).to(device).long(),
            torch.from_numpy(response).to(device).long())


def draw_rows(n, size, rng):
    """Row numbers (size,) below n, drawn with replacement."""
    return torch.randint(n, (size,), generator=rng).numpy()


def draw_examples(kinds, size, answer_share, rng):
    """A batch for one step, all of one kind: the Examples drawn from, and row numbers (size,).

    Answers are the harder part, so they come with probability answer_share. With trace "free"
    there is one kind, and answer_share changes nothing."""
    is_answer = torch.rand((), generator=rng) < answer_share
    examples = kinds[-1] if is_answer else kinds[0]
    return examples, draw_rows(len(examples), size, rng)


# --- The parts of a response -------------------------------------------------------------------

def after_first(tokens, token):
    """Which tokens (N, R) come after the first `token` of their row: bool (N, R)."""
    found = tokens == token
    to_the_left = found.cumsum(1) - found.long()                  # how many there are
    return to_the_left > 0


def in_answer(tokens):
    """Which tokens (N, R) come after <answer>: bool (N, R)."""
    return after_first(tokens, ANSWER)


def is_answer_label(tokens):
    """Which tokens (N, R) are the ranking itself, without [EOS] and padding: bool (N, R)."""
    return in_answer(tokens) & (tokens != EOS) & (tokens != PAD)


def token_weights(response, answer_weight):
    """Loss weight of each token (N, R): answer_weight after <answer>, 1 up to it, 0 for padding."""
    weight = torch.where(in_answer(response), answer_weight, 1.0)
    return weight * (response != PAD)


# --- Reading what a model wrote ---------------------------------------------------------------

@dataclass
class Answers:
    """The parsed answers of N responses, as arrays."""
    order: np.ndarray         # (N, K) the ranking *as served*: repaired if invalid, -1 at the end
    valid: np.ndarray         # (N,) bool: each label of the list once, then [EOS]
    duplicated: np.ndarray    # (N,) bool: a label twice
    dropped: np.ndarray       # (N,) bool: a label of the list missing
    out_of_set: np.ndarray    # (N,) bool: a token that is no label of the list
    identity: np.ndarray      # (N,) bool: the ranking as served is the incoming order
    trace_tokens: np.ndarray  # (N,) tokens before <answer>


def parse_answer(tokens, incoming):
    """One response and its list's labels, both lists of int -> the fields of Answers."""
    ended = EOS in tokens
    written = tokens[:tokens.index(EOS)] if ended else tokens
    written = [token for token in written if token != PAD]
    start = written.index(ANSWER) if ANSWER in written else len(written)
    answer = [token - LABEL for token in written[start + 1:]]

    # Repair, as a server would: first mentions stay, missing labels follow in incoming order.
    listed = [label for label in incoming if label >= 0]
    named = [label for label in dict.fromkeys(answer) if label in listed]
    missing = [label for label in listed if label not in named]
    order = named + missing + [-1] * (len(incoming) - len(listed))

    duplicated = any(answer.count(label) > 1 for label in named)
    out_of_set = any(label not in listed for label in answer)
    valid = ended and not (duplicated or missing or out_of_set)
    return order, valid, duplicated, bool(missing), out_of_set, order == incoming, start


def parse_answers(tokens, incoming):
    """Reads the answers of responses (N, R) to lists with the labels incoming (N, K)."""
    rows = zip(np.asarray(tokens).tolist(), incoming.tolist())
    fields = zip(*(parse_answer(*row) for row in rows))
    return Answers(*(np.array(field) for field in fields))


def statements(tokens, n_labels):
    """Splits a trace into statements, tuples of tokens that start at <profile> or at a label.

    What comes before the first start is a statement too: it matches nothing. Empty places say
    nothing."""
    parts = []
    for token in tokens:
        if token in (PAD, ANSWER, EOS):
            break
        if token == NONE:
            continue
        if not parts or token == PROFILE or LABEL <= token < LABEL + n_labels:
            parts.append([])
        parts[-1].append(int(token))
    return [tuple(part) for part in parts]


def faithfulness(tokens, trace, n_labels):
    """Share of true statements in the traces of responses (N, R) -> (N,) in [0, 1].

        correct statements / max(statements required, statements made)
    trace (N, T) is what the rule writes: a profile and one statement per candidate are required.
    A statement that is missing, repeated, unreadable or about no candidate counts as wrong."""
    score = np.zeros(len(tokens))
    for n, (row, rule) in enumerate(zip(tokens, trace)):
        made = statements(row, n_labels)
        required = set(statements(rule, n_labels))
        correct = required.intersection(made)
        score[n] = len(correct) / max(len(required), len(made), 1)
    return score
