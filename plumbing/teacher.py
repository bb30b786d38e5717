"""The teacher's own responses to training prompts: decoded once, kept beside its checkpoint."""
import os

import numpy as np
import torch

from data import PAD, pack, parse_answers
from plumbing.checkpoint import (checkpoint_path, checksum, load_stage, load_tensors,
                                 save_tensors)
from plumbing.decoding import decode_split
from trainer import ar_write


def teacher_responses(cfg, world, n):
    """Greedy responses (n, R) int64 of the teacher to the first n training prompts.

    Where its answer is invalid, the reference takes its place. All conversions of a teacher share
    them; those of another teacher, or to other prompts, are decoded anew."""
    teacher, _ = load_stage(cfg, "ar", world)
    path = os.path.join(os.path.dirname(checkpoint_path(cfg, "ar")), "outputs.pt")
    made_of = checksum(teacher.state_dict(), torch.from_numpy(world.train.prompt))
    saved = load_tensors(path) if os.path.exists(path) else {}
    if saved.get("made_of") != made_of or len(saved["tokens"]) < n:
        tokens = decode_teacher(cfg, world, teacher, world.train.take(slice(0, n)))
        saved = {"made_of": made_of, "tokens": torch.from_numpy(tokens)}
        save_tensors(path, saved)
    return saved["tokens"][:n]


def decode_teacher(cfg, world, teacher, split):
    """-> tokens (N, R), the reference in place of invalid answers."""
    def decoder(prompt, rows):
        decoded = ar_write(cfg, teacher, prompt, world.max_response)
        return decoded.tokens, decoded.forwards

    tokens, _ = decode_split(cfg, split, decoder, "teacher responses")
    tokens = pack(tokens, left=False)  # with --trace bound [PAD] stands before <answer>
    width = max(tokens.shape[1], split.response.shape[1])
    tokens, reference = (np.pad(rows, ((0, 0), (0, width - rows.shape[1])), constant_values=PAD)
                         for rows in (tokens, split.response))
    valid = parse_answers(tokens, split.incoming).valid
    return np.where(valid[:, None], tokens, reference)
