"""Several processes, started by torchrun, work like one; the training scripts do not notice.

    torchrun --nproc_per_node 2 train_cft.py --config full

Every process draws the same whole batch and computes the same loss. Only what is expensive is
shared: a training forward reads this process's rows of its batch (`share_rows`), and the hidden
states of all rows are gathered; a decode writes this process's rows (`shared_decode`).

The gradient of a loss L over hidden states h of rows n and weights w is

    dL/dw = sum_n (dL/dh_n) (dh_n/dw) + the direct part, by way of the output embedding.

A process has the direct part whole, and of the sum its own rows; it counts these once for every
process (Gather.backward). So the *mean* over the processes is the gradient of one.
"""
import dataclasses
import itertools
import os

import torch
import torch.distributed as dist

from plumbing.settings import UserError

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # set by torchrun


def launched(environment):
    """(number of this process, number of processes), as a launcher says it in the environment.

    Raises UserError where it says a part of it, or nonsense: a process that took itself for one
    of several would train on a part of each batch, and write nothing."""
    if not {"RANK", "WORLD_SIZE"} & environment.keys():
        return 0, 1
    said = " ".join(f"{name}={environment.get(name, '(not set)')}" for name in VARIABLES)
    wrong = UserError(f"the environment has {said}, which no launcher sets so: start several "
                      "processes with `torchrun --nproc_per_node 2 ...`, or unset RANK and "
                      "WORLD_SIZE for one")
    numbers = [environment.get(name, "") for name in VARIABLES if name != "MASTER_ADDR"]
    if not environment.get("MASTER_ADDR") or not all(n.isdecimal() for n in numbers):
        raise wrong
    rank, ranks, local, port = map(int, numbers)
    if not local <= rank < ranks or port > 65535:
        raise wrong
    return rank, ranks


try:
    RANK, RANKS = launched(os.environ)
except UserError:
    RANK, RANKS = 0, 1  # `start` says what is wrong: not yet, while modules are imported


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
        reason = str(error).splitlines()[0]
        raise UserError(f"the {RANKS} processes cannot start together ({reason}): on one machine "
                        "start at most as many as it has GPUs, with `torchrun --standalone`")


def stop():
    if RANKS > 1:
        dist.destroy_process_group()


def everyone(x):
    """What each process has, in their order: a list."""
    out = [x] * RANKS
    if RANKS > 1:
        dist.all_gather_object(out, x)
    return out


def barrier():
    """Waits until all processes are here: nobody reads what the first has not yet written."""
    everyone(None)


# --- Training ---------------------------------------------------------------------------------

def my_rows(n):
    """This process's part of n rows, row numbers. Where the processes cannot share them evenly
    the first rows come again at the end, so that all have equally many."""
    each = -(-n // RANKS)
    return torch.arange(RANK * each, (RANK + 1) * each) % n


class Gather(torch.autograd.Function):
    """(n, ...) of each process -> (RANKS * n, ...) of all, on every process."""

    @staticmethod
    def forward(ctx, x):
        parts = [torch.empty_like(x) for _ in range(RANKS)]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        return grad.chunk(RANKS)[RANK] * RANKS  # times RANKS: the update takes a mean


def share_rows(model):
    """Makes every process read only its rows in the training forwards of a model."""
    if RANKS == 1:
        return

    def cut(model, args, kwargs):
        if not torch.is_grad_enabled():
            return None
        model.n_rows = len(args[0])
        rows = my_rows(model.n_rows)

        def part(x):
            of_rows = isinstance(x, torch.Tensor) and x.dim() > 1 and len(x) == model.n_rows
            return x[rows.to(x.device)] if of_rows else x

        return tuple(map(part, args)), {name: part(x) for name, x in kwargs.items()}

    def gather(model, args, kwargs, hidden):
        if torch.is_grad_enabled():
            return Gather.apply(hidden)[:model.n_rows]
        return None

    model.register_forward_pre_hook(cut, with_kwargs=True)
    model.register_forward_hook(gather, with_kwargs=True)


def mean_gradients(model):
    """Replaces the gradients of a model by their mean over the processes."""
    if RANKS == 1:
        return
    for p in model.parameters():
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        dist.all_reduce(p.grad)
        p.grad /= RANKS


# --- Decoding ---------------------------------------------------------------------------------

def shared_decode(decoder, prompt, rng):
    """decoder(prompt, rng) -> a dataclass of tensors, a row a prompt; each process decodes its
    rows of the prompts (N, P), and all get the whole.

    rng draws the tokens: each process has one of its own, or all would draw the same."""
    if RANKS == 1:
        return decoder(prompt, rng)
    seed = int(torch.randint(2 ** 62, (), generator=rng))
    own = torch.Generator(rng.device).manual_seed(seed + RANK)
    mine = decoder(prompt[my_rows(len(prompt)).to(prompt.device)], own)

    def whole(x):
        parts = [torch.empty_like(x) for _ in range(RANKS)]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)[:len(prompt)]

    fields = [getattr(mine, field.name) for field in dataclasses.fields(mine)]
    return type(mine)(*map(whole, fields))


def shared_map(function, inputs):
    """[function(x) for x in inputs]; each process does its part of the inputs, all get the whole.

    The results have to be picklable and on the CPU, as arrays are."""
    own = itertools.islice(inputs, RANK, None, RANKS)
    parts = everyone([function(x) for x in own])
    number = sum(map(len, parts))
    return [parts[i % RANKS][i // RANKS] for i in range(number)]
