"""What we add to the paper's recipe, apart from it: strike this file out and the paper is left.

Every addition is a marked line in a stage script and has a switch. With all of them off
(`--cft_answer_states 0 --cft_first_step 0 --cft_pairs false --cft_misplace 0 --cft_penalty 0
--ar_misplace 0 --commit threshold --opd_answer_states 0 --opd_exclude false
--opd_anchor 0 --rl_anchor 0`) the stages are the paper's. The *anchors* of OPD and RL have no
code here: they add the CFT loss to the stage's own, so that it does not forget.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from data import ANSWER, LABEL, PAD, answer_labels
from diffusion import take_blocks


# --- 1. Which slots to commit together: --commit independent -----------------------------------
# Slots are drawn independently, so two may take one label. tau = .9, slot: confidence, label:
#     1: .95 L4    2: .92 L4    3: .97 L1     commits 1 and 3; slot 2 sees L4 and decides anew
#     1: .60 L4    2: .50 L4    3: .55 L1     none is sure: commits 1 and 3, which cannot collide

@dataclass(frozen=True)
class Apart:
    """Commits slots that are surer than tau, but of those that want one label only the surest.

    Where no slot is that sure: every slot that is surer than all its rivals. Rivals want the same
    token, or would draw the same one with a probability above clash. labels: tokens that may
    stand once in an answer, a range; None: no token is such."""
    tau: float
    clash: float
    labels: range | None = None

    def choose(self, logp, open_, forced):
        """As sampler.Threshold.choose: logp (N, B, V), open_ and forced (N, B) -> (N, B)."""
        confidence, best = logp.max(-1)                           # (N, B)
        confidence = torch.where(open_, confidence.exp(), -1.0)
        sure = (confidence > self.tau) | forced

        # surer[n, i, j]: slot j goes before slot i. Of two alike, the left one; forced ones first.
        rank = torch.where(forced, 2.0, confidence)
        place = torch.arange(logp.shape[1], device=logp.device)
        alike = rank[:, None] == rank[..., None]
        surer = (rank[:, None] > rank[..., None]) | (alike & (place < place[:, None]))
        same = best[:, :, None] == best[:, None]                  # (N, B, B) want one token

        if self.labels is not None:
            label = sure & (best >= self.labels.start) & (best < self.labels.stop)
            both = label[:, None] & label[..., None]
            sure &= ~(same & surer & both).any(-1)
        some = sure.any(1, keepdim=True)
        if not logp.is_cuda and some.all():
            return sure  # what follows is a tenth of a step; on a GPU, looking costs more
        p = logp.exp() * open_[..., None]
        collide = p @ p.transpose(1, 2) > self.clash              # sum over tokens of p_i p_j
        rivals = collide | same
        return torch.where(some, sure, open_ & ~(rivals & surer).any(-1))


# --- 2. Misplaced labels: --cft_misplace, --ar_misplace ----------------------------------------
# Training text never shows a label in a wrong place, so a model places labels by their evidence
# and hardly learns that one is taken. So in a share of the answers labels have moved:
#     reference order   L4 L1 L7 L2
#     shown             L7 L4 L1 L2      L7 has moved to the front
#     asked             L4 L4 L1 L2      at each place the best label not shown further left

MOVED = 0.62  # of full lists whose labels are given a reach, so many really change (8 to 10 labels)


def misplaced(response, share, rng):
    """Which slot's token each slot of responses (N, R) shows: (N, R), a permutation of slots.

    In a share of the rows, at most MOVED, a label has moved, mostly by a place or two."""
    slot = torch.arange(response.shape[1], device=response.device).expand(len(response), -1)
    if not share:
        return slot
    N, R = response.shape

    def rand(*size):
        return torch.rand(*size, generator=rng).to(response.device)

    # How far labels go, one draw an answer: about a place, now and then anywhere.
    reach = 10 * rand(N, 1) ** 3 * (rand(N, 1) < share / MOVED)
    wanted = slot + reach * torch.randn(N, R, generator=rng).to(response.device)
    label = answer_labels(response)
    start, n_labels = label.int().argmax(1, keepdim=True), label.sum(1, keepdim=True)
    wanted = wanted.clamp(min=start, max=start + n_labels - 1)    # stays within the answer
    return torch.where(label, wanted, slot).argsort(dim=1, stable=True)


def extend(shown_slot, more):
    """Appends slots that show their own token: (N, R) -> (N, R + more)."""
    R = shown_slot.shape[1]
    rest = torch.arange(R, R + more, device=shown_slot.device).expand(len(shown_slot), -1)
    return torch.cat((shown_slot, rest), dim=1)


def best_left(shown_slot):
    """AR's targets: the first slot whose token is not shown further left, (N, R) -> (N, R).

    What is not shown to the left of a slot is shown from there on, and the best of it has the
    smallest slot number: a minimum over the rest of the row."""
    return shown_slot.flip(1).cummin(1).values.flip(1)


def still_open(block, masked, R):
    """Slots of a response that segments do not show: masked, or after their block.

    block (N, M), masked (N, M, B) -> bool (N, M, R)."""
    B, dev = masked.shape[-1], block.device
    start = block[..., None] * B                                  # (N, M, 1)
    after = torch.arange(R, device=dev) >= start                  # (N, M, R) the block included
    return after.scatter(2, start + torch.arange(B, device=dev), masked)


def what_is_left(shown_slot, block, masked):
    """CFT's targets: what the masked slots of segments must become. In words of one segment:

        taken = shown_slot[before the block] + [shown_slot[j] of the block if not masked[j]]
        rest  = sorted(every slot that is not taken)
        k-th masked slot -> rest[k];    slot 0 -> the best that is not before the block

    shown_slot (N, R), block (N, M), masked (N, M, B) -> slots of the response (N, M, B)."""
    R = shown_slot.shape[1]
    open_ = still_open(block, masked, R)                          # (N, M, R)
    rest = torch.where(open_, shown_slot[:, None], R).sort(-1).values  # R: taken, sorts last
    k = (masked.cumsum(-1) - 1).clamp(min=0)                      # (N, M, B)
    left = rest.gather(2, k).clamp(max=R - 1)
    from_block_on = still_open(block, torch.ones_like(masked), R)
    first = torch.where(from_block_on, shown_slot[:, None], R).amin(-1, keepdim=True)
    return torch.cat((first, left[..., 1:]), dim=-1)


# --- 3. A price on labels that are taken: --cft_penalty ----------------------------------------
# Cross-entropy asks the same whether the rest of the mass is on a worse label or on one that the
# answer shows already. Only the second makes the answer invalid:
#     target L2, shown L4 L7     P(L2) = .8, P(L1) = .2     costs  -log .8
#                                P(L2) = .8, P(L4) = .2     costs  -log .8 - penalty * log(1 - .2)

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


# --- 4. More states, and the sampler's first one: --cft_answer_states, --cft_first_step, --cft_pairs
# B = 4, a block of the answer:
#     uniform noise        L4 [MASK] L7 L2                      one state, weight 1 / t
#     a first step         [MASK] [MASK] [MASK] [MASK]          what the sampler starts from
#     a complementary pair L4 [MASK] L7 L2,  L4 L1 [MASK] [MASK]    each token is masked once

def answer_blocks(response, block_size, times):
    """The blocks with the answers of responses (N, R), named `times` times each: (N, E)."""
    first = ((response == ANSWER).int().argmax(1) + 1) // block_size   # (N,)
    last = ((response != PAD).sum(1) - 1) // block_size
    span = torch.arange(int((last - first).max()) + 1, device=response.device)
    return torch.minimum(first[:, None] + span, last[:, None]).repeat(1, times)


def share_weight(block, weight):
    """States of one block share its weight: block (N, M), weight (N, M, B) -> (N, M, B)."""
    times = (block[:, :, None] == block[:, None]).sum(2)          # (N, M) how often it is there
    return weight / times[..., None]


def first_steps(masked, weight, share, rng):
    """Makes a share of the states the sampler's first: all [MASK], slot 0 too, with weight 1."""
    n = masked.shape[0] * masked.shape[1]
    first = torch.rand(n, 1, generator=rng).to(masked.device) < share
    first = first.view(*masked.shape[:2], 1)                      # (N, M, 1)
    return masked | first, torch.where(first, 1.0, weight)


def complementary_pairs(block, masked, weight):
    """Follows every state by one that masks what it shows (Fast-dLLM v2, arXiv 2509.26328).

    Each token is then masked exactly once a pair, so none needs 1 / t. Slot 0, whose weight is
    that of the state, counts in the first of the pair. (N, M, ...) -> (N, 2 M, ...)."""
    slot0 = torch.arange(masked.shape[-1], device=masked.device) == 0
    other = ~masked & ~slot0
    masks = torch.stack((masked, other), dim=2)                   # (N, M, 2, B)
    counted = torch.stack((masked | slot0, other), dim=2)
    weights = counted * weight[:, :, None, :1]
    return block.repeat_interleave(2, 1), masks.flatten(1, 2), weights.flatten(1, 2)


# --- 5. OPD: what the teacher cannot see, and states that weigh alike --------------------------
#     the student's state    [MASK] L4 [MASK] L2     the AR teacher, reading from the left, gives
#     the teacher's target   L4 .6  L1 .4            slot 0 a label that stands further right
#     with --opd_exclude     L4 0   L1 1

def exclude_shown(target, decoded, block, open_, scored):
    """Takes labels that a state shows out of the targets of its open slots.

    target (n, V) logits of the slots scored (N, M, B); open_ (N, M, B) -> (n, V). Not for a slot
    0 that is committed: it is predicted from the clean text, and there its own label is right."""
    ranking = answer_labels(decoded.tokens)                       # (N, R)
    shown = tokens_shown(decoded.clean, ranking, block, open_, target.shape[1])  # (N, M, V)
    asks = open_ & take_blocks(ranking, block, open_.shape[-1])   # (N, M, B)
    shown = (shown[:, :, None] & asks[..., None])[scored]         # (n, V)
    return target.masked_fill(shown, -1e4)


def state_weights(block, scored, real):
    """Weights of the slots of states: (N, M, 1). A state with two open slots weighs as much as
    one with ten, since collisions happen there; states of one block share its weight.

    block (N, M); scored, real (N, M, B): the slots that count, and the block's tokens."""
    n_scored = scored.sum(-1, keepdim=True).clamp(min=1)
    weight = real.sum(-1, keepdim=True) / n_scored
    return share_weight(block, weight)


def label_range(n_labels):
    """The label tokens, as Apart wants them."""
    return range(LABEL, LABEL + n_labels)
