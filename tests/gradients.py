"""Gradients of OPD and RL on recorded roll-outs, of which each process works on its part: `python tests/gradients.py FILE`, alone or
under torchrun. The sum over the processes is written."""
import sys
from types import SimpleNamespace

import torch
import torch.distributed as dist

from conftest import left_padded, tiny_gpt  # sets the path to the modules
import train_opd
import train_rl
from common import RANK, RANKS, mine
from config import Config
from sampler import Decoded, block_decode

N, B = 8, 4


class Gradients:
    """Stands in for common.Run: sums the gradients over the processes, as its update does."""

    def __init__(self, model):
        self.model, self.found = model, {}

    def update(self, loss):
        for name, p in self.model.named_parameters():
            g = torch.autograd.grad(loss, p, retain_graph=True)[0]
            if RANKS > 1:
                dist.all_reduce(g)
            self.found[name] = self.found.get(name, 0) + g
        return {}


def main(path):
    if RANKS > 1:
        dist.init_process_group("gloo")
    cfg = Config(block_size=B, opd_anchor=0.0, rl_anchor=0.0, rl_group=2, rl_prompts=N // 2, rl_epochs=2, bfloat16=False, opd_answer_states=0)
    model, teacher, prompt = tiny_gpt(0), tiny_gpt(3), left_padded([4, 1, 6, 3, 5, 2, 3, 4])
    decoded = block_decode(model, prompt, 12, B, "independent", 0.5, 1.0, torch.Generator().manual_seed(0))
    rewards = torch.tensor([[0.5, -1.0], [0.2, 0.2], [0.1, 0.3], [0.0, 0.0]])  # the second process has one group with a signal
    rows = mine(N)
    part = Decoded(*(getattr(decoded, f)[rows] for f in decoded.__dataclass_fields__))
    real = torch.rand  # the state of each block that is scored: the first, not drawn, which every process would do for itself
    torch.rand = lambda *size, **kw: torch.zeros(*size)
    opd, rl = Gradients(model), Gradients(model)
    train_opd.update(cfg, SimpleNamespace(n_labels=0), model, teacher, None, prompt[rows], part, None, None, opd)
    torch.rand = real
    train_rl.update(cfg, None, model, None, prompt[rows], part, rewards[mine(len(rewards))], None, rl)
    if not RANK:
        torch.save({"opd": opd.found, "rl": rl.found}, path)
    if RANKS > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
