"""Ours, --opd_exclude: labels that a state shows are removed from the teacher's distribution.

The teacher reads from the left. So it may want, in a slot, a label that the student has committed
further right:

    the student's state       L7 [MASK] L4 [MASK]
    the teacher for slot 1    L4 .6  L1 .4
    what is left              L4 0   L1 1
"""
import torch

from data import PAD, is_answer_label
from diffusion import take_blocks
from model import FORBIDDEN


def exclude_shown(teacher_logits, decoded, block, masked, scored):
    """Removes the labels that a state's answer shows from the teacher's distributions, at those
    masked slots of the state that later got a label.

    teacher_logits (n, V) of the slots scored (N, M, B); masked (N, M, B) -> (n, V). A slot 0 that
    is committed keeps its logits: it is predicted from the clean text before the block, and there
    its own label is not taken yet."""
    B = decoded.block_size
    is_label = take_blocks(is_answer_label(decoded.tokens), block, B)   # (N, M, B)
    label = take_blocks(decoded.tokens, block, B)
    # Labels of earlier blocks need no treatment: the teacher has read them. PAD: no label here.
    label = torch.where(is_label & ~masked, label, PAD)           # (N, M, B) what the state shows
    shown = torch.zeros(*block.shape, teacher_logits.shape[1], dtype=torch.bool,
                        device=teacher_logits.device)
    shown.scatter_(2, label, True)                                # (N, M, V)
    shown[..., PAD] = False
    asks = (is_label & masked)[..., None]                         # (N, M, B, 1)
    removed = (shown[:, :, None] & asks)[scored]                  # (n, V)
    return teacher_logits.masked_fill(removed, FORBIDDEN)
