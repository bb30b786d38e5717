"""Worlds, prompts, traces and answers: everything between a file on disk and token ids.

An example is a prompt (history and K candidates in pre-ranked order), a trace (a profile, then the evidence of every
candidate, in the prompt's order; never a rank or a winner) and an answer (the K labels, best first). Every statement of
a trace is computed from what the prompt shows, so a written trace can be checked by rule.

    response = <profile> ... L1 e e e L2 e e e ... <answer> L4 L1 ... [EOS]

A list shorter than K leaves its last places empty (<none>), in prompt and trace, so that everything stands where it stands with
K: what a statement looks up in the prompt is always equally far away, and the answer begins at the same place of a block.
(Without it, a model whose lists mostly have K candidates writes wrong traces for all others: toy AR, four candidates, 40 % of
the statements are true; with it 99.7.)

Two worlds share this format: the toy world (synthetic, with a Bayes oracle) and Amazon Beauty.
"""
import dataclasses
import functools
from dataclasses import dataclass

import numpy as np
import torch

from model import EOS, PAD

SPECIAL = ["[PAD]", "[MASK]", "[EOS]", "<history>", "<last>", "<candidates>", "<profile>", "<answer>", "<none>"]
HISTORY, LAST, CANDIDATES, PROFILE, ANSWER, NONE, LABEL = 3, 4, 5, 6, 7, 8, 9  # label i is token LABEL + i


@dataclass
class Split:
    """Examples as arrays, one row each: everything a stage or the evaluation may look at."""
    prompt: np.ndarray  # (N, P) int16, left-padded
    trace: np.ndarray   # (N, T) int16, right-padded: the trace as the rule writes it from the prompt
    order: np.ndarray   # (N, K) int8, labels best first by oracle or writer, -1 behind the list's end
    target: np.ndarray  # (N,) int8, label of the true next item, -1 if it is not in the list
    incoming: np.ndarray  # (N, K) int8, labels of the candidates in pre-ranked order (0, 1, ... unless labels are random)

    def __len__(self):
        return len(self.prompt)

    @functools.cached_property  # rerank.py asks for it row by row
    def k(self):
        """(N,) lengths of the lists."""
        return (self.incoming >= 0).sum(1)

    @functools.cached_property
    def response(self):
        """(N, R) int16, right-padded: trace, <answer>, labels, [EOS]."""
        return responses(self.trace, self.order)

    def take(self, rows):
        return Split(*(getattr(self, f)[rows] for f in self.__dataclass_fields__))


@dataclass
class World:
    words: list         # token id -> word
    n_labels: int
    train: Split
    val: Split
    test: Split
    source: str         # where the data came from, for the report
    notes: dict         # measured facts about the data: counts, pre-ranker figures
    references: dict = dataclasses.field(default_factory=dict)  # name -> (N, K) order of the test candidates, a row beside ours
    nearest: dict = dataclasses.field(default_factory=dict)     # beauty: how evidence is rounded, see beauty.rare

    @property
    def max_response(self):
        """Longest response of the world, in training lists too: trace, <answer>, labels, [EOS]."""
        return self.train.trace.shape[1] + 1 + self.train.order.shape[1] + 1


def tensors(split, rows, device):
    """The rows' prompts and reference responses as int64 tensors: (n, P), (n, R), no column all padding."""
    prompt, response = split.prompt[rows], split.response[rows]
    prompt, response = prompt[:, (prompt != PAD).any(0)], response[:, (response != PAD).any(0)]
    return torch.from_numpy(prompt).to(device).long(), torch.from_numpy(response).to(device).long()


def responses(trace, order):
    """trace (N, T), order (N, K) labels, -1 = none -> responses (N, T + K + 2), right-padded."""
    N = len(trace)
    column = lambda token: np.full((N, 1), token, np.int16)
    labels = np.where(order >= 0, order + LABEL, PAD).astype(np.int16)
    return pack(np.concatenate((trace, column(ANSWER), labels, column(EOS)), axis=1), left=False)


def pack(tokens, left):
    """Move the [PAD] tokens of each row to one side, the other tokens keeping their order: (N, T) -> (N, T)."""
    is_pad = tokens == PAD
    order = np.argsort(~is_pad if left else is_pad, axis=1, kind="stable")
    tokens = np.take_along_axis(tokens, order, axis=1)
    used = int((tokens != PAD).sum(1).max())
    return tokens[:, -used:] if left else tokens[:, :used]


# --- Reading what a model wrote ----------------------------------------------------------------------------------------

@dataclass
class Answers:
    """Parsed answers of N responses, arrays over rows."""
    order: np.ndarray         # (N, K) the ranking as served: invalid answers repaired; -1 behind the list's end
    valid: np.ndarray         # (N,) bool: exactly the k labels of the list, each once, then [EOS]
    duplicated: np.ndarray    # (N,) bool: a label twice
    dropped: np.ndarray       # (N,) bool: a label of the list missing
    out_of_set: np.ndarray    # (N,) bool: a token that is no label of the list
    identity: np.ndarray      # (N,) bool: the ranking as served is the incoming order
    trace_tokens: np.ndarray  # (N,) tokens before <answer>


def parse_answers(tokens, incoming):
    """Read the answers of responses (N, R), right-padded, to lists with the labels incoming (N, K), -1 behind their end.

    Repair, as a server would: first occurrences are kept, missing labels follow in pre-ranked order.
    """
    tokens, width = np.asarray(tokens), incoming.shape[1]
    R, k = tokens.shape[1], (incoming >= 0).sum(1)
    place = np.argsort(np.where(incoming >= 0, incoming, np.arange(width)), axis=1)  # (N, K) of each label in the incoming order
    at, ended = np.arange(R), tokens == EOS
    first_of = lambda hit: np.where(hit.any(1), hit.argmax(1), (tokens != PAD).sum(1))
    start, end = first_of(tokens == ANSWER), first_of(ended)
    inside = (at > start[:, None]) & (at < end[:, None])
    position = tokens - LABEL
    is_label = inside & (position >= 0) & (position < k[:, None])
    hit = is_label[:, :, None] & (position[:, :, None] == np.arange(width))  # (N, R, K)
    times = hit.sum(1)  # (N, K)
    listed = np.arange(width) < k[:, None]
    first = np.where(times > 0, hit.argmax(1), R + place)  # missing labels sort behind, in pre-ranked order
    order = np.where(listed, np.argsort(first, axis=1, kind="stable"), -1)
    duplicated, dropped = (times > 1).any(1), ((times == 0) & listed).any(1)
    out_of_set = (inside & ~is_label).any(1)
    valid = ended.any(1) & ~duplicated & ~dropped & ~out_of_set
    identity = (order == incoming).all(1)
    return Answers(order, valid, duplicated, dropped, out_of_set, identity, np.minimum(start, end))


def statements(tokens, n_labels):
    """Split one trace (a sequence of ids) into statements: each starts at <profile> or at a label. What stands before
    the first start is a statement too (and matches nothing). Empty places say nothing."""
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

    Correct statements / max(required, made). `trace` (N, T) holds what the rule writes from the prompt: one profile and
    one statement a candidate are required; missing, repeated, unparsable or about a non-candidate counts as wrong.
    """
    score = np.zeros(len(tokens))
    for n, (row, reference) in enumerate(zip(tokens, trace)):
        made, required = statements(row, n_labels), set(statements(reference, n_labels))
        score[n] = len(required.intersection(made)) / max(len(required), len(made), 1)
    return score


# --- The toy world ------------------------------------------------------------------------------------------------------
# An item has 3 attributes of 5 values. A user has one favourite value an attribute, never shown; each attribute of an item
# that the user takes is the favourite with probability q, else uniform. Other candidates are uniform. The pre-ranker
# knows nothing but a position prior for the target. So the best ranking given the prompt has a closed form.

TOY_ATTRIBUTES, TOY_VALUES, TOY_HISTORY, TOY_Q, TOY_PRIOR = 3, 5, 6, 0.6, 0.25
TOY_MOST = 3  # evidence counts stop here: 3 means 3 or more


def toy_words(n_labels):
    return (SPECIAL + [f"L{i + 1}" for i in range(n_labels)] + [f"{a}{v}" for a in "xyz" for v in range(TOY_VALUES)] +
            [f"{a}{v}:{c}" for a in "xyz" for v in range(TOY_VALUES) for c in range(TOY_MOST + 1)])


def toy_oracle(counts, items, k):
    """Bayes score of each candidate: log P(target = c | prompt) + const, (N, K); -inf behind the list's end.

    counts (N, A, V) of the history, items (N, K, A), k (N,). The favourite's posterior is f_v ~ rho^count_v with
    rho = (q + (1-q)/V) / ((1-q)/V); an item taken by the user has value v with probability p_v = q f_v + (1-q)/V, any
    other item with 1/V. Hence score = log prior(position) + sum over attributes of log(V p_v).
    """
    other = (1 - TOY_Q) / TOY_VALUES
    f = ((TOY_Q + other) / other) ** counts.astype(np.float64)
    p = TOY_Q * f / f.sum(-1, keepdims=True) + other  # (N, A, V)
    rows, attributes = np.arange(len(items))[:, None, None], np.arange(TOY_ATTRIBUTES)
    score = np.log(TOY_VALUES * p[rows, attributes, items]).sum(-1) - TOY_PRIOR * np.arange(items.shape[1])
    return np.where(np.arange(items.shape[1]) < k[:, None], score, -np.inf)


def toy_split(n, k, cfg, rng):
    """n examples with lists of length k (n,), in K columns."""
    A, V, H, K = TOY_ATTRIBUTES, TOY_VALUES, TOY_HISTORY, cfg.n_candidates
    favourite = rng.integers(V, size=(n, 1, A))
    taken = lambda m: np.where(rng.random((n, m, A)) < TOY_Q, favourite, rng.integers(V, size=(n, m, A)))
    history, items = taken(H), rng.integers(V, size=(n, K, A))
    listed = np.arange(K) < k[:, None]  # (n, K)
    prior = np.where(listed, np.exp(-TOY_PRIOR * np.arange(K)), 0)
    target = (rng.random((n, 1)) * prior.sum(1, keepdims=True) > prior.cumsum(1)).sum(1)
    items[np.arange(n), target] = taken(1)[:, 0]
    incoming = np.where(listed, np.arange(K), -1)
    if cfg.random_labels:  # of the list's own k labels
        incoming = np.where(listed, np.argsort(np.where(listed, rng.random((n, K)), 2), axis=1), -1)
    return toy_examples(history, items, incoming, incoming[np.arange(n), target], cfg.n_labels)


def toy_examples(history, items, incoming, target, n_labels):
    """The Split of histories (n, TOY_HISTORY, A) and candidates (n, K, A), values 0 .. V - 1, with the labels incoming (n, K), -1
    behind a list's end; target (n,): the label of the true next item."""
    A, V, n, words, listed = TOY_ATTRIBUTES, TOY_VALUES, len(items), toy_words(n_labels), incoming >= 0
    counts = (history[..., None] == np.arange(V)).sum(1)  # (n, A, V)
    score = toy_oracle(counts, items, listed.sum(1))
    order = np.where(listed, np.take_along_axis(incoming, np.argsort(-score, axis=1, kind="stable"), 1), -1)
    attribute = words.index("x0") + np.arange(A) * V
    column = lambda token: np.full((n, 1), token, np.int16)
    labels = LABEL + incoming[..., None]
    shown = np.where(listed[..., None], np.concatenate((labels, items + attribute), axis=2), NONE).reshape(n, -1)
    prompt = np.concatenate((column(HISTORY), (history + attribute).reshape(n, -1), column(CANDIDATES), shown), 1)
    # Profile: the most frequent value of each attribute (ties: the smallest). Evidence: each of the candidate's three
    # values with how often the history has it, up to 3: x2:3. (A bare count is learned several times more slowly: the
    # value in the token is what teaches the model to look the candidate up.)
    times = counts[np.arange(n)[:, None, None], np.arange(A), items].clip(max=TOY_MOST)
    seen = words.index("x0:0") + (np.arange(A) * V + items) * (TOY_MOST + 1) + times
    evidence = np.where(listed[..., None], np.concatenate((labels, seen), axis=2), NONE).reshape(n, -1)
    trace = np.concatenate((column(PROFILE), counts.argmax(2) + attribute, evidence), 1)
    return Split(prompt.astype(np.int16), trace.astype(np.int16), order.astype(np.int8), target.astype(np.int8), incoming.astype(np.int8))


def list_lengths(n, cfg, rng):
    """Training list lengths (n,): K, or, for a share vary_lists, uniform in [min_list, K]. Without variation
    the answer's length could be learned by heart, and a label out of the list could never appear."""
    return np.where(rng.random(n) < cfg.vary_lists, rng.integers(cfg.min_list, cfg.n_candidates + 1, n), cfg.n_candidates)


def toy_world(cfg):
    rng = np.random.default_rng([7])  # one world for all seeds of the training
    fixed = lambda n: np.full(n, cfg.n_candidates)
    train = toy_split(cfg.n_train, list_lengths(cfg.n_train, cfg, rng), cfg, rng)
    val, test = toy_split(cfg.n_val, fixed(cfg.n_val), cfg, rng), toy_split(cfg.n_test, fixed(cfg.n_test), cfg, rng)
    return World(toy_words(cfg.n_labels), cfg.n_labels, train, val, test, "synthetic", {})


# --- One entry for every script -------------------------------------------------------------------------------------------

def load_world(cfg):
    """The world that the settings name."""
    if cfg.world == "toy":
        world = toy_world(cfg)
    else:
        from beauty import beauty_world  # it imports this file
        world = beauty_world(cfg)
    if not cfg.trace:
        for split in (world.train, world.val, world.test):
            split.trace = split.trace[:, :0]
    return world
