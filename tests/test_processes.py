"""Two processes under torchrun (gloo, CPU) make the update of one."""
import os
import subprocess
import sys

import torch

from conftest import ROOT

PROGRAM = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from model import GPT
from plumbing import processes

processes.start("cpu")
torch.manual_seed(0)
model = GPT(10, n_layer=1, n_head=2, d_model=16).double()
model.unused = torch.nn.Parameter(torch.zeros(3))  # of which one process has no gradient
n = processes.per_process(6)
rows = torch.randint(3, 10, (6, 5))[processes.RANK * n:][:n]
mask = torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()
loss = model(rows, torch.arange(5).expand(n, 5), mask).square().mean()
if processes.RANK == 0:
    loss = loss + processes.RANKS * model.unused.sum()
loss.backward()
processes.mean_gradients(model)
processes.barrier()
gradients = {name: p.grad for name, p in model.named_parameters()}
torch.save(gradients, f"{processes.RANK}of{processes.RANKS}.pt")
processes.stop()
"""


def test_the_mean_gradient_of_two_halves_is_that_of_the_whole_batch(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for how in ([], torchrun):
        done = subprocess.run([sys.executable, *how, "program.py", ROOT], cwd=tmp_path,
                              env={**os.environ, "RANK": "1"},  # which only torchrun may set
                              capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
    whole, *two = (torch.load(tmp_path / f"{name}.pt") for name in ("0of1", "0of2", "1of2"))
    for name, gradient in whole.items():
        assert gradient.abs().max() > 0
        assert torch.equal(two[0][name], two[1][name])
        torch.testing.assert_close(two[0][name], gradient, rtol=1e-9, atol=1e-12)
