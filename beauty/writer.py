"""The writer is a learned scorer. It orders the candidates of the training examples.

It is also a reference row in the tables, and never part of serving. It sees what a trace states,
so its ranking is a function of the trace. It scores one candidate at a time, so it can order any
part of any list.

A writer that has learned a user's target would write it into the ranking. So the users are dealt
into 5 groups, and each of 15 small networks never learns from one of them: network m not from
group m % 5. A training list is scored by the 3 networks that never saw its user's group,

    user     0  1  2  3  4  5  6 ...                  network       0  1  2  3  4  5 ... 14
    group    0  1  2  3  4  0  1 ...                  never sees    0  1  2  3  4  0 ...  4

and a list of validation or test by all 15.
"""
import numpy as np
import torch
import torch.nn.functional as F

from beauty.evidence import FIELDS
from plumbing.settings import UserError

GROUPS, SEEDS = 5, 3          # groups of users, networks a group
MEMBERS = GROUPS * SEEDS
EPOCHS, BATCH = 10, 256
RATE, DECAY = 3e-3, 0.5
WIDTH = 32
AT_ONCE = 4000                # about so many lists are scored at a time


def one_hot(evidence, rows):
    """The evidence of some lists as numbers 0 and 1: (N, K, D), D the sum of FIELDS."""
    columns = []
    for field, size in FIELDS.items():
        values = torch.from_numpy(evidence[field][rows]).long()         # (N, K)
        columns.append(F.one_hot(values, size))                         # (N, K, size)
    return torch.cat(columns, -1).float()


class Networks:
    """15 MLPs of three layers, side by side.

    Each matrix has a first axis for the network, so one batched product is the same layer of all
    of them. They share nothing but the batches."""

    def __init__(self, n_inputs, gen):
        half = WIDTH // 2
        shapes = [(n_inputs, WIDTH), (WIDTH, half), (half, 1)]
        stds = [0.3, WIDTH ** -0.5, half ** -0.5]
        self.W, self.b = [], []
        for (n_in, n_out), std in zip(shapes, stds):
            W = std * torch.randn(MEMBERS, n_in, n_out, generator=gen)
            self.W.append(W.requires_grad_())
        for _, n_out in shapes[:2]:  # a bias of the score would change no ranking
            self.b.append(torch.zeros(MEMBERS, 1, n_out, requires_grad=True))

    def score(self, x):
        """The scores (networks, N, K) of candidates x (N, K, D)."""
        h = x.flatten(0, 1)                                # (N K, D), the same for all networks
        h = F.gelu(h @ self.W[0] + self.b[0])              # (networks, N K, 32)
        h = F.gelu(h @ self.W[1] + self.b[1])              # (networks, N K, 16)
        return (h @ self.W[2]).view(MEMBERS, *x.shape[:2])


def learning_weights(user):
    """How much each network learns from each example of the users (N,): (networks, N)."""
    times = np.bincount(user)[user]                        # (N,) the user's examples
    weight = torch.from_numpy(times ** -0.5).float()       # (N,) so long histories count less
    group = torch.from_numpy(user)[None] % GROUPS          # (1, N)
    never_seen = torch.arange(MEMBERS)[:, None] % GROUPS   # (networks, 1)
    return weight * (group != never_seen)


def fit_writer(train, seed=0):
    """The networks, fitted to put the target first: by cross-entropy over the K candidates."""
    gen = torch.Generator().manual_seed(seed)
    rows = np.flatnonzero(train.target >= 0)
    user = train.user[rows]                                             # (N,)
    if len(set((user % GROUPS).tolist())) < 2:
        raise UserError("the data is too small to learn from: hardly any training example has its "
                        "target among the candidates: pass --data_dir with larger data")
    x = one_hot(train.evidence, rows)                                   # (N, K, D)
    target = torch.from_numpy(train.target[rows])                       # (N,)
    weight = learning_weights(user)                                     # (networks, N)
    networks = Networks(x.shape[-1], gen)
    optimizer = torch.optim.AdamW(networks.W + networks.b, RATE, weight_decay=DECAY)
    batch = min(BATCH, len(x))
    per_epoch = len(x) // batch
    n_steps = max(EPOCHS * per_epoch, 20)                               # 20: no phase may be empty
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, n_steps, pct_start=0.1)
    for _ in range(EPOCHS):
        order = torch.randperm(len(x), generator=gen)
        for step in range(per_epoch):
            at = order[step * batch:(step + 1) * batch]                 # (n,)
            scores = networks.score(x[at]).flatten(0, 1)                # (networks n, K)
            nats = F.cross_entropy(scores, target[at].repeat(MEMBERS), reduction="none")
            weighted = nats.view(MEMBERS, -1) * weight[:, at]           # (networks, n)
            # A network may have nothing to learn in a small batch: 0 / 0.
            loss = weighted.sum(1) / weight[:, at].sum(1).clamp(min=1e-9)  # (networks,)
            optimizer.zero_grad()
            loss.sum().backward()
            optimizer.step()
            schedule.step()
    return networks


def write_scores(train, *others):
    """This sets the scores of lists: those of train by the networks that never saw the user's
    group, those of the others by all networks."""
    networks = fit_writer(train)
    for lists in (train, *others):
        lists.score = np.empty(lists.cands.shape, np.float32)
        for group in range(GROUPS):
            members = slice(group, None, GROUPS) if lists is train else slice(None)
            rows_of_group = np.flatnonzero(lists.user % GROUPS == group)
            for rows in np.array_split(rows_of_group, 1 + len(rows_of_group) // AT_ONCE):
                with torch.no_grad():
                    scores = networks.score(one_hot(lists.evidence, rows))  # (networks, n, K)
                lists.score[rows] = scores[members].mean(0)


def points(evidence):
    """The scores (N, K) of an expert: points for strong links, the same brand and category."""
    names = ("link", "brand", "depth")
    total = sum(evidence[name].astype(np.float32) for name in names)    # (N, K)
    place = evidence["pos"].astype(np.float32)                          # (N, K)
    return total - place / 100  # of candidates that are alike, the first of the list
