"""Several processes on one machine, as in nanoGPT: each draws its own part of every batch.

    torchrun --standalone --nproc_per_node 2 train_cft.py --config full

All begin with the same weights and average their gradients before each update, so that their
weights stay the same. The first process writes the checkpoints and the log.
"""
import os

import torch
import torch.distributed as dist

from plumbing.settings import UserError

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # set by torchrun


def launched(environment):
    """Returns (number of this process, number of processes), as torchrun sets them.

    Raises UserError for nonsense: a process that takes itself for the second writes nothing."""
    if "RANK" not in environment and "WORLD_SIZE" not in environment:
        return 0, 1
    try:
        rank, ranks, local, port = (int(environment[name]) for name in VARIABLES
                                    if name != "MASTER_ADDR")
        if environment["MASTER_ADDR"] and 0 <= local <= rank < ranks and 0 < port < 65536:
            return rank, ranks
    except (KeyError, ValueError):
        pass
    said = " ".join(f"{name}={environment.get(name, '(not set)')!r}" for name in VARIABLES)
    raise UserError(f"the environment has {said}, which torchrun never sets: start several "
                    "processes with `torchrun --standalone --nproc_per_node 2 ...`, or unset RANK "
                    "and WORLD_SIZE for one")


try:
    RANK, RANKS = launched(os.environ)
except UserError:
    RANK, RANKS = 0, 1  # start() tells the user; during an import nobody would catch it


def start(device):
    """Joins the other processes, if there are any. device: "cuda" or "cpu"."""
    launched(os.environ)
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
