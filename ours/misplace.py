"""Ours, --cft_misplace: training states that show a label in a wrong place.

Reference text never shows one. So a student places each label by its evidence, and does not learn
to look which labels are taken. When it has once committed a wrong label, it writes that label again
where it belongs, and the answer is invalid. Here a slot that is shown gets the label of a masked
slot, and the masked slot is asked for the label that is then left:

    clean text      L4     L1     L7     L2
    state           L4   [MASK]   L7   [MASK]      asked:  L1, L2
    misplaced       L4   [MASK]   L1   [MASK]      asked:  L7, L2
"""
import torch


def misplace(noised, token, masked, is_label, share, rng):
    """Misplaces a label in a share of the segments that show a label and mask another.

    noised, token, masked (N, M, B): a state, the clean tokens, what is masked; is_label (N, M, B):
    labels of an answer -> noised, and the tokens to ask for (N, M, B). A slot 0 that is shown is
    still asked for its clean token, because the clean text predicts it."""
    def one_of(candidates):
        """One of some slots (N, M, B) of each segment, at random, and whether there is one."""
        u = torch.rand(candidates.shape, generator=rng).to(candidates.device)
        best, slot = torch.where(candidates, u, -1.0).max(-1, keepdim=True)
        return slot, best >= 0                                    # (N, M, 1) each

    shown, some_shown = one_of(is_label & ~masked)
    asked, some_asked = one_of(is_label & masked)
    drawn = torch.rand(shown.shape, generator=rng).to(shown.device) < share
    here = drawn & some_shown & some_asked                        # (N, M, 1)
    moved = noised.scatter(-1, shown, token.gather(-1, asked))    # (N, M, B)
    left = token.scatter(-1, asked, token.gather(-1, shown))      # (N, M, B)
    return torch.where(here, moved, noised), torch.where(here, left, token)
