"""The repository root and experiments/ on the path, one thread, and the tiny random models that the tests share."""
import os
import sys

import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "experiments")]
torch.set_num_threads(1)

from diffusion import every_block, segment_hidden  # noqa: E402
from model import EOS, GPT, PAD  # noqa: E402

VOCAB = 10


def pytest_ignore_collect(collection_path, config):
    """Leave the graders of exercises.md out, which fail until somebody does the exercises, unless they are named on the command
    line or asked to fail (UNTOUCHED=1)."""
    if collection_path.name == "test_exercises.py" and not os.environ.get("UNTOUCHED"):
        return not any("test_exercises.py" in arg for arg in config.invocation_params.args) or None


def tiny_gpt(seed=0, vocab=VOCAB, dtype=torch.float64):
    """Two layers with weights so large that distributions are peaked: thresholds matter, and every input token counts.
    Seeds 0, 3, 4, 5 write responses of many lengths."""
    torch.manual_seed(seed)
    model = GPT(vocab, n_layer=2, n_head=2, d_model=16).to(dtype).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.5 if p.dim() == 2 else 1.0)
    return model


def words(*shape, seed=0, vocab=VOCAB):
    """Random tokens that are not special."""
    return torch.randint(EOS + 1, vocab, shape, generator=torch.Generator().manual_seed(seed))


def left_padded(lengths, seed=0):
    """Random prompts of the given lengths, (N, max length), [PAD] on the left."""
    prompt = words(len(lengths), max(lengths), seed=seed)
    for row, length in zip(prompt, lengths):
        row[:len(row) - length] = PAD
    return prompt


def close(a, b, atol=1e-9):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def stream_hidden(model, prompt, clean, noised, B):
    """segment_hidden for whole noised responses (N, S, R) -> (N, S, R, d): S copies of every block."""
    N, S, R = noised.shape
    block = every_block(clean, B).repeat(1, S)
    return segment_hidden(model, prompt, clean, noised.reshape(N, -1, B), block).view(N, S, R, -1)
