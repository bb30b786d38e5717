"""Ours, --commit apart: slots that want the same label are not committed together.

Slots are drawn independently of each other. So two of them may take the same label, and another
label never comes. The paper's rule (sampler.Threshold) does not look. With tau = .9, here are the
confidence and the label of each slot:

    0: .95 L4    1: .92 L4    2: .97 L1     commits 0 and 2; slot 1 then sees L4 and decides anew
"""
from dataclasses import dataclass

import torch

from sampler import Threshold


@dataclass(frozen=True)
class Apart:
    """Commits what Threshold commits, with one exception: if several of these slots want the same
    label, only the forced one is committed, or else the surest.

    labels: the tokens that may stand only once in an answer, a range. The rule looks at the
    likeliest token of a slot; at temperature 1 another token may be drawn."""
    tau: float
    labels: range

    def choose(self, logp, open_, forced):
        """As sampler.Threshold.choose: logp (N, B, V), open_ and forced (N, B) -> (N, B)."""
        chosen = Threshold(self.tau).choose(logp, open_, forced)  # (N, B)
        best_logp, best = logp.max(-1)                            # (N, B)
        is_label = (best >= self.labels.start) & (best < self.labels.stop)
        wants = chosen & is_label

        # rivals[n, i, j]: slots i and j of row n are both chosen, with the same label as their
        # likeliest token.
        rivals = best[:, :, None] == best[:, None, :]             # (N, B, B)
        rivals &= wants[:, :, None] & wants[:, None, :]

        # surer[n, i, j]: slot j goes before slot i. A forced slot goes first; of two that are
        # equally sure, the left one does.
        best_logp = torch.where(forced, 1.0, best_logp)         # above all log-probabilities
        slot = torch.arange(logp.shape[1], device=logp.device)    # (B,)
        ahead = best_logp[:, None, :] > best_logp[:, :, None]     # (N, B, B)
        alike = best_logp[:, None, :] == best_logp[:, :, None]
        surer = ahead | (alike & (slot < slot[:, None]))
        return chosen & ~(rivals & surer).any(-1)
