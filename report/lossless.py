"""Lossless decoding, as a row of the table: AR's own text, drafted by the last student."""
import torch

import fast.lossless  # noqa: F401  the quick twin registers itself
from ours.bound import joined, write
from ours.lossless import lossless_decode
from sampler import Decoded
from trainer import rule_of


def lossless_write(cfg, models, prompt, max_len):
    """trainer.ar_write of the teacher, in fewer forwards: models (teacher, student), prompt (N, P)
    -> Decoded; forwards: of both. Log-probabilities and steps are not kept."""
    def decoder(own, read, max_len, _):
        tokens, drafts, verifies = lossless_decode(
            *models, read, max_len, own.block_size, rule_of(own))
        nothing = torch.zeros_like(tokens)
        return Decoded(tokens, tokens, nothing, nothing.float(), drafts + verifies)
    return joined(write(cfg, decoder, prompt, max_len))
