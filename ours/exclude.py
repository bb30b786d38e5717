"""Ours, --opd_exclude: labels that a state shows leave the teacher's target.

The teacher reads from the left. So it may want, in a slot, a label that the student has committed
further right:

    the student's state       L7 [MASK] L4 [MASK]
    the teacher for slot 1    L4 .6  L1 .4
    the target                L4 0   L1 1
"""
import torch

from data import PAD, answer_labels
from diffusion import take_blocks
from model import NO_TOKEN


def exclude_shown(target, decoded, block, open_, scored):
    """Takes labels that a state shows in its answer out of the targets of its open slots.

    target (n, V): logits of the slots scored (N, M, B); open_ (N, M, B) -> (n, V). A slot 0 that
    is committed keeps its target: it is predicted from the clean text, where its label is right."""
    B = decoded.block_size
    is_label = take_blocks(answer_labels(decoded.tokens), block, B)   # (N, M, B)
    label = take_blocks(decoded.tokens, block, B)
    # Labels of earlier blocks need no treatment: the teacher has read them. PAD: no label here.
    label = torch.where(is_label & ~open_, label, PAD)            # (N, M, B) what the state shows
    shown = torch.zeros(*block.shape, target.shape[1], dtype=torch.bool, device=target.device)
    shown.scatter_(2, label, True)                                # (N, M, V)
    shown[..., PAD] = False
    asks = (is_label & open_)[..., None]                          # (N, M, B, 1)
    return target.masked_fill((shown[:, :, None] & asks)[scored], NO_TOKEN)
