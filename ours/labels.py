"""Ours: labels that are taken. Three additions teach a model that a label can stand only once.

1. Misplaced labels (--cft_misplace, --ar_misplace). Training text never shows a label in a wrong
place, so a model places labels by their evidence and hardly learns that one is taken. So in a
share of the answers labels have moved:

    reference order   L4 L1 L7 L2
    shown             L7 L4 L1 L2      L7 has moved to the front
    asked             L4 L4 L1 L2      at each place the best label not shown further left

2. A price on labels that are taken (--cft_penalty). Cross-entropy asks the same whether the rest
of the mass is on a worse label or on one that the answer shows already. Only the second makes the
answer invalid. With L2 as the target, and L4 and L7 shown:

    P(L2) = .8, P(L1) = .2     costs  -log .8
    P(L2) = .8, P(L4) = .2     costs  -log .8 - penalty * log(1 - .2)

3. Exclusions in OPD (--opd_exclude). The teacher reads from the left, and gives a slot labels that
the student has committed further right:

    the student's state       L7 [MASK] L4 [MASK]
    the teacher for slot 1    L4 .6  L1 .4
    the target                L4 0   L1 1
"""
import torch
import torch.nn.functional as F

from data import PAD, answer_labels
from diffusion import take_blocks
from model import NO_TOKEN


# --- Misplaced labels ---------------------------------------------------------------------------

MOVED = 0.62  # share of jittered lists whose order really changes (measured, 8 to 10 labels)


def misplaced(response, share, rng):
    """Positions shown_from (N, R): position i of a response (N, R) shows token shown_from[i].

    A permutation. In a share of the rows, at most MOVED, a label has moved, mostly by a place or
    two; elsewhere it is 0, 1, 2, ..."""
    slot = torch.arange(response.shape[1], device=response.device).expand(len(response), -1)
    if not share:
        return slot
    N, R = response.shape

    def rand(*size):
        return torch.rand(*size, generator=rng).to(response.device)

    # Jitter: how far labels go, one draw an answer. About a place, now and then anywhere.
    reach = 10 * rand(N, 1) ** 3 * (rand(N, 1) < share / MOVED)
    wanted = slot + reach * torch.randn(N, R, generator=rng).to(response.device)
    label = answer_labels(response)
    start, n_labels = label.int().argmax(1, keepdim=True), label.sum(1, keepdim=True)
    wanted = wanted.clamp(min=start, max=start + n_labels - 1)    # stays within the answer
    return torch.where(label, wanted, slot).argsort(dim=1, stable=True)


def extend(shown_from, length):
    """Appends positions that show their own token: (N, R) -> (N, length)."""
    rest = torch.arange(shown_from.shape[1], length, device=shown_from.device)
    rest = rest.expand(len(shown_from), -1)
    return torch.cat((shown_from, rest), dim=1)


def best_left(shown_from):
    """AR's targets: the first slot whose token is not shown further left, (N, R) -> (N, R).

    The smallest number from here to the right: [2 0 1 3] -> [0 0 1 3]. What is not shown to the
    left of a place is shown from there on, and the best of it has the smallest number."""
    return shown_from.flip(1).cummin(1).values.flip(1)


def still_open(block, masked, R):
    """Slots of a response that segments do not show: masked, or after their block.

    block (N, M), masked (N, M, B) -> bool (N, M, R)."""
    B, dev = masked.shape[-1], block.device
    start = block[..., None] * B                                  # (N, M, 1)
    after = torch.arange(R, device=dev) >= start                  # (N, M, R) the block included
    return after.scatter(2, start + torch.arange(B, device=dev), masked)


def what_is_left(shown_from, block, masked):
    """CFT's targets: what the masked slots of segments must become. In words of one segment:

        taken = shown_from[before the block] + [shown_from[j] of the block if not masked[j]]
        rest  = sorted(every position that is not taken)
        k-th masked slot -> rest[k];    slot 0 -> the best that is not before the block

    For the block [2 0 1 3] with slots 1 and 3 masked: taken 2 1, rest 0 3; slot 1 -> 0, 3 -> 3.
    shown_from (N, R), block (N, M), masked (N, M, B) -> positions of the response (N, M, B);
    slots that are not masked get anything, and weigh 0."""
    R = shown_from.shape[1]
    open_ = still_open(block, masked, R)  # (N, M, R). A permutation: not shown = shown in the open
    rest = torch.where(open_, shown_from[:, None], R).sort(-1).values  # R: taken
    k = (masked.cumsum(-1) - 1).clamp(min=0)                      # (N, M, B)
    left = rest.gather(2, k).clamp(max=R - 1)
    from_block_on = still_open(block, torch.ones_like(masked), R)
    first = torch.where(from_block_on, shown_from[:, None], R).amin(-1, keepdim=True)
    return torch.cat((first, left[..., 1:]), dim=-1)


# --- A price on labels that are taken -----------------------------------------------------------

def tokens_shown(response, where, block, masked, n_words):
    """Words that segments, and the clean text before them, show in the slots `where`.

    response, where (N, R), block (N, M), masked (N, M, B) -> bool (N, M, n_words)."""
    shown = where[:, None] & ~still_open(block, masked, response.shape[1])  # (N, M, R)
    words = torch.where(shown, response[:, None], PAD)
    out = torch.zeros(*block.shape, n_words, dtype=torch.bool, device=block.device)
    out.scatter_(2, words, True)
    out[..., PAD] = False
    return out


def taken_nats(logits, taken):
    """-log(1 - P(tokens that are taken)): logits (n, V), taken (n, V) bool -> (n,).

    Unlikelihood training (arXiv 1908.04319, sec. 5), of the whole set at once."""
    p = (logits.softmax(-1) * taken).sum(-1)
    return -torch.log1p(-p.clamp(max=1 - 1e-6))


def price_of_taken(response, shown, block, masked, asked, logits):
    """-log(1 - P(labels that the answer shows already)) where a label is masked, else 0: (n,).

    response (N, R), shown (N, R') whole blocks, block (N, M), masked (N, M, B); logits (n, V) are
    those of the slots asked (N, M, B)."""
    B = masked.shape[-1]
    more = shown.shape[1] - response.shape[1]
    ranking = F.pad(answer_labels(response), (0, more))           # (N, R')
    taken = tokens_shown(shown, ranking, block, masked, logits.shape[1])  # (N, M, V)
    taken = taken[:, :, None].expand(-1, -1, B, -1)[asked]        # (n, V)
    counted = masked & take_blocks(ranking, block, B)             # (N, M, B)
    return counted[asked] * taken_nats(logits, taken)


# --- Exclusions in OPD --------------------------------------------------------------------------

def exclude_shown(target, decoded, block, open_, scored):
    """Takes labels that a state shows out of the targets of its open slots.

    target (n, V) logits of the slots scored (N, M, B); open_ (N, M, B) -> (n, V). Not for a slot
    0 that is committed: it is predicted from the clean text, and there its own label is right."""
    ranking = answer_labels(decoded.tokens)                       # (N, R)
    shown = tokens_shown(decoded.clean, ranking, block, open_, target.shape[1])  # (N, M, V)
    asks = open_ & take_blocks(ranking, block, open_.shape[-1])   # (N, M, B)
    shown = (shown[:, :, None] & asks[..., None])[scored]         # (n, V)
    return target.masked_fill(shown, NO_TOKEN)
