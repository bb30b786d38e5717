"""Ours, --commit independent: which slots to commit together.

Slots are drawn independently, so two may take one label, and another label never comes. The
paper's rule (sampler.Threshold) does not look. With tau = .9, confidence and label of each slot:

    0: .95 L4    1: .92 L4    2: .97 L1     commits 0 and 2; slot 1 sees L4 and decides anew
    0: .60 L4    1: .50 L4    2: .55 L1     none is sure: commits 0 and 2, which hardly collide
"""
from dataclasses import dataclass

import torch

from data import LABEL


@dataclass(frozen=True)
class Apart:
    """Commits slots that are surer than tau, but of those that want one label only the surest.

    Where no slot is that sure: every slot that is surer than all its rivals. Rivals want the same
    token, or would draw the same one with a probability above clash. labels: the range of tokens
    that may stand only once, or None to let sure slots collide."""
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
            return sure  # the rest is a tenth of a step; a GPU would wait for the answer
        p = logp.exp()
        collide = p @ p.transpose(1, 2) > self.clash              # sum over tokens of p_i p_j
        rivals = collide | same
        return torch.where(some, sure, open_ & ~(rivals & surer).any(-1))


def label_range(n_labels):
    """The label tokens, as Apart wants them."""
    return range(LABEL, LABEL + n_labels)
