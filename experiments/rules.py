"""Commit rules of others, to be held against those of the sampler: values with `choose`, as
sampler.Threshold."""
import math
from dataclasses import dataclass

import torch


def most_confident(logp, open_):
    """Confidences (N, B), the surest slot first and closed slots last as -1; and the place (N, B)
    that each slot has in this order, 0 for the surest. Of two alike, the left one goes first.

    logp (N, B, V), open_ (N, B)."""
    confidence = torch.where(open_, logp.amax(-1).exp(), -1.0)    # (N, B)
    ranked, order = confidence.sort(dim=1, descending=True, stable=True)
    return ranked, order.argsort(dim=1)


@dataclass(frozen=True)
class Factor:
    """Commits the n surest slots, n the largest with (n + 1) (1 - c_n) < tau, where c_n is the
    confidence of the n-th; one at least (Fast-dLLM, arXiv 2505.22618, sec. 3.3)."""
    tau: float

    def choose(self, logp, open_, forced):
        """As sampler.Threshold.choose: logp (N, B, V), open_ and forced (N, B) -> (N, B)."""
        ranked, place = most_confident(logp, open_)
        n = torch.arange(1, logp.shape[1] + 1, device=logp.device)  # (B,)
        allowed = ((n + 1) * (1 - ranked) < self.tau) & (ranked >= 0)
        most = (allowed * n).amax(1, keepdim=True)                # (N, 1)
        needed = ~forced.any(1, keepdim=True)                     # nothing else is certain
        return open_ & ((place < most) | (needed & (place == 0))) | forced


@dataclass(frozen=True)
class Steps:
    """Commits so many slots a step that a block takes about `steps` steps, however sure they
    are: the ceil(B / steps) surest."""
    steps: int

    def choose(self, logp, open_, forced):
        """As sampler.Threshold.choose: logp (N, B, V), open_ and forced (N, B) -> (N, B)."""
        _, place = most_confident(logp, open_)
        return open_ & (place < math.ceil(logp.shape[1] / self.steps)) | forced
