"""A whole split, decoded in batches."""
import numpy as np
from tqdm import tqdm

from data import tensors
from plumbing.checkpoint import device_of
from plumbing.processes import RANK, shared_map

BATCH = 256  # rows decoded together


def decode_split(cfg, split, decoder, desc):
    """Runs decoder(prompt, rows) -> tokens (n, R), forwards (n,) over a split, in batches.

    -> tokens (N, R) int64, forwards (N,), arrays."""
    def part(start):
        rows = range(start, min(len(split), start + BATCH))
        prompt, _ = tensors(split, rows, device_of(cfg))
        tokens, forwards = decoder(prompt, rows)
        return tokens.cpu().numpy(), forwards.cpu().numpy()

    starts = tqdm(range(0, len(split), BATCH), desc=desc, leave=False, disable=RANK > 0)
    tokens, forwards = zip(*shared_map(part, starts))
    return np.concatenate(tokens), np.concatenate(forwards)
