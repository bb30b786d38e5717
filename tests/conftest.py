"""What the tests share: the path to the code, one thread, tiny random models and texts, and one
naive forward, a row at a time, that the batched code is compared with."""
import os
import sys

import pytest
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "experiments")]
torch.set_num_threads(1)

from data import EOS, PAD  # noqa: E402
from model import GPT  # noqa: E402
from plumbing.settings import UserError  # noqa: E402

VOCAB = 10
LENGTHS = [4, 1, 6, 3, 5, 2]  # of prompts: shorter and longer than a block


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def tiny_gpt(seed=0, vocab=VOCAB, dtype=torch.float64):
    """Two layers with weights so large that distributions are peaked: thresholds matter, and
    every input token counts. Seeds 0, 3, 9, 13 write responses of many lengths."""
    torch.manual_seed(seed)
    model = GPT(vocab, n_layer=2, n_head=2, d_model=16).to(dtype).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.5 if p.dim() == 2 else 1.0)
    return model


def words(*shape, seed=0, vocab=VOCAB):
    """Random tokens, but neither [PAD] nor [MASK] nor [EOS]."""
    return torch.randint(EOS + 1, vocab, shape, generator=gen(seed))


def left_padded(lengths, seed=0):
    """Random prompts of the given lengths, (N, max length), [PAD] on the left."""
    prompt = words(len(lengths), max(lengths), seed=seed)
    for row, length in zip(prompt, lengths):
        row[:len(row) - length] = PAD
    return prompt


def close(a, b, atol=1e-9):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def refusal(function, *args, **settings):
    """The one sentence with which something is refused."""
    with pytest.raises(UserError) as refused:
        function(*args, **settings)
    sentence = str(refused.value)
    assert "\n" not in sentence and len(sentence) < 500
    return sentence


def same_decode(a, b):
    """That two Decoded are the same."""
    for name in ("tokens", "filled", "commit_step", "forwards"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    close(a.logp, b.logp)
    assert a.block_size == b.block_size


def naive_hidden(model, prompt, text, state):
    """One row without padding through [prompt; text; state] under a mask written as loops: the
    prompt and the text are read from the left, the state (B,) sees everything -> (B, d) hidden
    states that predict the slots of the state. A state of one slot: plain AR."""
    row = torch.cat((prompt, text, state))
    before = len(row) - len(state)
    mask = torch.tensor([[k <= q or q >= before for k in range(len(row))] for q in range(len(row))])
    hidden = model(row[None], torch.arange(len(row))[None], mask[None, None])[0]
    return hidden[before - 1:-1]
