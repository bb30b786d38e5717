"""Gradients of AR, CFT, OPD and RL on one recorded batch: `python tests/gradients.py FILE`, alone
or under torchrun. However many processes share its rows, it is the same gradient."""
import sys
from types import SimpleNamespace

import torch
import torch.distributed as dist

from conftest import left_padded, tiny_gpt, words  # sets the path to the modules
import train_ar
import train_cft
import train_opd
import train_rl
from config import Config
from data import ANSWER, EOS
from fast.gpt import FastGPT
from model import GPT, Sampling
from plumbing.processes import RANK, RANKS, mean_gradients, share_rows
from sampler import Threshold, block_decode

N, B, VOCAB = 7, 4, 20  # seven rows: two processes cannot share them evenly
CFG = Config(block_size=B, bfloat16=False, rl_epochs=2, rl_anchor=0.0)


def gradient(model, loss):
    """As Run.update takes it."""
    model.zero_grad()
    loss.backward()
    mean_gradients(model)
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def gradients(kind):
    """{stage: {weight: gradient}}, of RL a sum over its updates."""
    teacher, model = (tiny_gpt(seed, VOCAB, kind=kind) for seed in (3, 0))
    prompt = left_padded([4, 1, 6, 3, 5, 2, 3])
    decoded = block_decode(model, prompt, 12, B, Threshold(0.5),
                           Sampling(1.0, torch.Generator().manual_seed(0)))
    share_rows(model)
    response = words(N, 10, vocab=VOCAB)
    response[:, 5], response[:, 9] = ANSWER, EOS

    def rng():
        return torch.Generator().manual_seed(1)

    found = {}
    slots = torch.arange(10).expand(N, -1)
    found["ar"] = gradient(model, train_ar.ar_loss(CFG, model, prompt, response, slots)[0])
    found["cft"] = gradient(model, train_cft.cft_loss(CFG, model, prompt, response, rng()))
    loss = train_opd.opd_loss(CFG, model, teacher, prompt, decoded, rng())
    found["opd"] = gradient(model, loss)

    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}

    def update(loss):
        for name, g in gradient(model, loss).items():
            total[name] += g
        return {}

    advantage = torch.tensor([1.0, -1.0, 0.5, -0.5, 0.0, 2.0, -2.0]).double()
    run = SimpleNamespace(model=model, update=update)
    train_rl.update(CFG, run, prompt, decoded, advantage, None)
    return found | {"rl": total}


def main(path):
    if RANKS > 1:
        dist.init_process_group("gloo")
    found = {kind.__name__: gradients(kind) for kind in (GPT, FastGPT)}
    if not RANK:
        torch.save(found, path)
    if RANKS > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
