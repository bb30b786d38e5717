"""Several processes on one machine, as in nanoGPT: each draws its own part of every batch.

    torchrun --standalone --nproc_per_node 2 train_cft.py --config full

All begin with the same weights and average their gradients before each update, so that their
weights stay the same. The first process writes the checkpoints and the log.
"""
import os

import torch
import torch.distributed as dist

from plumbing.settings import UserError

# torchrun sets both variables. Where anything else has set them, this is the only process.
LAUNCHED = dist.is_torchelastic_launched()
RANK = int(os.environ["RANK"]) if LAUNCHED else 0
RANKS = int(os.environ["WORLD_SIZE"]) if LAUNCHED else 1


def start(device):
    """Joins the other processes, if there are any. device: "cuda" or "cpu"."""
    if RANKS == 1:
        return
    try:
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
    except (RuntimeError, ValueError) as error:
        raise UserError(f"the {RANKS} processes cannot start ({str(error).splitlines()[0]}): start "
                        "at most as many as the machine has GPUs, with `torchrun --standalone`")


def stop():
    if RANKS > 1:
        dist.destroy_process_group()


def barrier():
    """Waits for all processes, for example until the first has written a file."""
    if RANKS > 1:
        dist.barrier()


def device_of(cfg):
    """Returns the torch.device that this process computes on."""
    if cfg.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(cfg.device)


def per_process(n):
    """Returns how many of n rows this process draws: a part, rounded up."""
    return -(-n // RANKS)


def mean_gradients(model):
    """Replaces the gradients of a model by their mean over the processes, which all must call."""
    if RANKS == 1:
        return
    for p in model.parameters():
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        dist.all_reduce(p.grad)
        p.grad /= RANKS
