"""The toy world: synthetic users whose best ranking is known exactly.

An item has 3 attributes of 5 values. A user has a favourite value of each attribute, which no
prompt shows. Each attribute of an item that the user takes is the favourite with probability q,
else uniform; other candidates are uniform. The pre-ranker is no model here: the target's place in
the list is drawn, and early places are likelier. So the best ranking, given the prompt, has a
closed form: the *oracle*.
"""
import numpy as np

from data import (CANDIDATES, HISTORY, LABEL, NONE, PROFILE, SPECIAL, Split, World,
                  draw_list_lengths)

TOY_ATTRIBUTES, TOY_VALUES, TOY_HISTORY = 3, 5, 6
TOY_Q = 0.6        # q
TOY_PRIOR = 0.25   # the target's place c has probability ~ exp(-TOY_PRIOR * c)
TOY_EXPERT = 4     # the expert's error: places weigh so many times as much (toy_expert, toy_target)
TOY_MOST = 3       # evidence counts stop here: 3 means three or more
TOY_DRAWN = 40000  # users are drawn in chunks of this size, so a smaller n has the first of them


def toy_words(n_labels):
    labels = [f"L{i + 1}" for i in range(n_labels)]
    values = [f"{a}{v}" for a in "xyz" for v in range(TOY_VALUES)]
    evidence = [f"{value}:{count}" for value in values for count in range(TOY_MOST + 1)]
    return SPECIAL + labels + values + evidence


def toy_oracle(counts, items, list_length, slope=TOY_PRIOR):
    """Bayes score of each candidate, log P(target = c | prompt) + const: (N, K).

    counts (N, A, V): how often the history has each value; items (N, K, A); list_length (N,).
    A history item has value v with probability q + u if v is the favourite, else u, where
    u = (1 - q) / V. So the favourite's posterior is f_v ~ rho^count_v, rho = (q + u) / u. An item
    that the user takes has value v with probability p_v = q f_v + u, another item with 1 / V. The
    likelihood of a list has a factor 1 / V for each attribute of each candidate; those of the
    target are p_v instead. So, but for a constant,
        score = -slope place + sum over attributes of log(V p_v)"""
    u = (1 - TOY_Q) / TOY_VALUES
    rho = (TOY_Q + u) / u
    f = rho ** counts.astype(np.float64)
    p = TOY_Q * f / f.sum(-1, keepdims=True) + u                  # (N, A, V)
    user = np.arange(len(items))[:, None, None]
    # p of each item's own values: indices (N, 1, 1), (A,) and (N, K, A) -> (N, K, A).
    log_ratio = np.log(TOY_VALUES * p[user, np.arange(TOY_ATTRIBUTES), items])
    place = np.arange(items.shape[1])
    score = log_ratio.sum(-1) - slope * place
    return np.where(place < list_length[:, None], score, -np.inf)


def toy_users(list_length, K, rng):
    """Draws users with lists of list_length (n,) in K places -> history (n, H, A), items
    (n, K, A), incoming (n, K) labels, target (n,) label."""
    n = len(list_length)
    favourite = rng.integers(TOY_VALUES, size=(n, 1, TOY_ATTRIBUTES))

    def taken(m):
        """m items that each user takes: (n, m, A)."""
        liked = rng.random((n, m, TOY_ATTRIBUTES)) < TOY_Q
        return np.where(liked, favourite, rng.integers(TOY_VALUES, size=liked.shape))

    history = taken(TOY_HISTORY)
    items = rng.integers(TOY_VALUES, size=(n, K, TOY_ATTRIBUTES))
    listed = np.arange(K) < list_length[:, None]                  # (n, K)
    # The target's place, by inverting the cumulative distribution of its prior.
    weight = np.where(listed, np.exp(-TOY_PRIOR * np.arange(K)), 0)
    drawn = rng.random((n, 1)) * weight.sum(1, keepdims=True)
    place = (drawn > weight.cumsum(1)).sum(1)
    items[np.arange(n), place] = taken(1)[:, 0]
    incoming = np.where(listed, np.arange(K), -1)  # label L3 is the third of the list
    return history, items, incoming, place


def written_as_tokens(history, items, incoming, target, n_labels, slope=TOY_PRIOR, told=False):
    """Writes users (toy_users) as a Split of tokens. The order is that of toy_oracle with this
    slope; with told=True the target is put first."""
    n = len(items)
    words = {word: token for token, word in enumerate(toy_words(n_labels))}
    first_value = words["x0"] + TOY_VALUES * np.arange(TOY_ATTRIBUTES)  # token of x0, y0, z0
    listed = incoming >= 0                                        # (n, K)
    label = LABEL + incoming[..., None]                           # (n, K, 1)
    counts = (history[..., None] == np.arange(TOY_VALUES)).sum(1)  # (n, A, V)

    def column(token):
        return np.full((n, 1), token)

    def places(tokens):
        """A label and tokens (n, K, A) for every candidate, <none> in empty places."""
        shown = np.concatenate((label, tokens), axis=2)
        return np.where(listed[..., None], shown, NONE).reshape(n, -1)

    prompt = np.concatenate((column(HISTORY), (history + first_value).reshape(n, -1),
                             column(CANDIDATES), places(items + first_value)), axis=1)
    # The profile: the most frequent value of each attribute, the smallest of several.
    profile = counts.argmax(2) + first_value                      # (n, A)
    # The evidence names the value beside its count (x2:3). A bare count is learned several times
    # more slowly: the value is what teaches the model to look the candidate up.
    user = np.arange(n)[:, None, None]
    times = counts[user, np.arange(TOY_ATTRIBUTES), items].clip(max=TOY_MOST)  # (n, K, A)
    value = TOY_VALUES * np.arange(TOY_ATTRIBUTES) + items
    evidence = words["x0:0"] + (TOY_MOST + 1) * value + times
    trace = np.concatenate((column(PROFILE), profile, places(evidence)), axis=1)

    score = toy_oracle(counts, items, listed.sum(1), slope)
    if told:
        score[incoming == target[:, None]] = np.inf
    best_first = np.argsort(-score, axis=1, kind="stable")  # equal candidates stay as they came
    order = np.where(listed, np.take_along_axis(incoming, best_first, 1), -1)
    return Split(prompt.astype(np.int16), trace.astype(np.int16), order.astype(np.int8),
                 target.astype(np.int8), incoming.astype(np.int8))


def toy_split(n, number, cfg):
    """The first n users of a split: number 0 (training), 1 (validation) or 2 (test).

    Each split has random streams of its own, so no setting of one changes another, and the same
    users come first whatever n is. All training seeds share one world."""
    K, parts = cfg.n_candidates, []
    told = cfg.world == "toy_target"
    slope = TOY_PRIOR * (TOY_EXPERT if told or cfg.world == "toy_expert" else 1)
    for chunk in range(-(-n // TOY_DRAWN)):
        rng = np.random.default_rng([7, number, chunk])
        full = np.full(TOY_DRAWN, K)
        length = draw_list_lengths(TOY_DRAWN, cfg, rng) if number == 0 else full
        parts.append(toy_users(length, K, rng))
    users = [np.concatenate(field)[:n] for field in zip(*parts)]
    return written_as_tokens(*users, cfg.n_labels, slope, told)


def toy_world(cfg):
    train = toy_split(cfg.n_train, 0, cfg)
    val, test = toy_split(cfg.n_val, 1, cfg), toy_split(cfg.n_test, 2, cfg)
    words = toy_words(cfg.n_labels)
    return World(words, cfg.n_labels, train, val, test, "synthetic", {}, checksum="toy")
