r"""CFT in states that the sampler would make: PUMA (arXiv 2602.10314), a control of OPD.

    python experiments/puma.py --config toy_paper --run_dir runs/puma \
        --from runs/teacher/toy_paper/seed0/rl

After `make paper`, this trains another student of the same teacher. CFT masks at random, but the
sampler first commits what the model is sure of. OPD meets such states in roll-outs. Here a training
response is unmasked as the sampler would do it, by the commit rule at opd_tau, except that a
committed slot shows the token of the training text. After each training step the whole batch goes
one step further. A response that is unmasked makes room for another one.

All else is as in train_cft.py, whose checkpoint this writes. PUMA takes the confidences from the
forward of the loss. Here they come from one more forward, so a step takes longer. A run that was
stopped goes on with other responses.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from unittest import mock

import torch
import torch.nn.functional as F

import train_cft
from data import MASK, PAD, draw_rows, tensors
from diffusion import draw_noise, every_block, fill_last_block, read_blocks, take_blocks
from plumbing.checkpoint import start_from
from plumbing.processes import device_of, per_process
from plumbing.script import script
from plumbing.settings import UserError
from sampler import open_slots
from trainer import Run, block_decoder, load_world, rng_for, rule_of, validate


def open_in(clean, masked):
    """The open slots of all blocks, where masked (N, M, B) are masked: bool (N, M, B).

    clean (N, R): the training text, whole blocks."""
    N, M, B = masked.shape
    token = take_blocks(clean, every_block(clean, B), B)          # (N, M, B)
    noised = torch.where(masked, MASK, token)
    is_open = open_slots(noised.view(-1, B)).view(N, M, B)
    return is_open & (token != PAD)


@torch.no_grad()
def unmask(model, rule, prompt, clean, masked):
    """What is masked, (N, M, B), after one step of the sampler in all blocks, if every token that
    it commits is that of the training text. prompt (N, P), clean (N, R)."""
    N, M, B = masked.shape
    block = every_block(clean, B)                                 # (N, M)
    noised = torch.where(masked, MASK, take_blocks(clean, block, B))
    _, hidden = read_blocks(model, prompt, clean, noised, block)  # (N, M, B, d)
    logp = F.log_softmax(model.logits(hidden), -1)                # (N, M, B, V)
    is_open = open_in(clean, masked).view(-1, B)                  # (N M, B)
    forced = torch.zeros_like(is_open)
    forced[:, 0] = is_open[:, 0]
    chosen = rule.choose(logp.flatten(0, 1), is_open, forced)     # (N M, B)
    return masked & ~chosen.view(N, M, B)


def noise_of(is_open):
    """The weights (N, M, B) of open slots: together as much in each block as the masked slots of
    draw_noise on average. Slot 0 always has weight 1, as there."""
    others = is_open[:, :, 1:]
    share = others / others.sum(-1, keepdim=True).clamp(min=1)    # (N, M, B - 1)
    return F.pad(share * others.shape[-1], (1, 0), value=1.0)


def main(cfg):
    if cfg.trace != "free":
        raise UserError("here a response has one part: use --trace free")
    world = load_world(cfg)
    model = start_from(cfg, world, "cft")
    run = Run(cfg, "cft", model, world)
    [examples] = train_cft.training_text(cfg, world)
    rule = rule_of(cfg, cfg.opd_tau)
    rows = masked = None

    for step in run.steps():
        rng = rng_for(cfg, "puma", step)

        # 1. The first batch begins at random masks, so that its responses are not all as far.
        if rows is None:
            rows = draw_rows(len(examples), per_process(cfg.batch_size), rng)
        prompt, response = tensors(examples, rows, device_of(cfg))  # (N, P), (N, R)
        B = min(cfg.block_size, response.shape[1])
        clean, _ = fill_last_block(response, B)                   # (N, R')
        if masked is None:
            masked, _ = draw_noise(every_block(clean, B), B, 0.0, rng)  # (N, M, B)

        # 2. The loss of CFT, in these states.
        noise = masked, noise_of(open_in(clean, masked))
        with mock.patch.object(train_cft, "draw_noise", return_value=noise):
            log = run.update(train_cft.cft_loss(cfg, model, prompt, response, rng))

        # 3. One step of the sampler. New responses begin with masks alone.
        masked = unmask(model, rule, prompt, clean, masked)
        done = ~open_in(clean, masked).any(-1).any(-1)            # (N,)
        masked[done] = True
        new = draw_rows(len(examples), len(rows), rng)
        rows[done.cpu().numpy()] = new[done.cpu().numpy()]
        log["new"] = done.float().mean().item()

        if run.time_to_validate():
            log |= validate(cfg, world, block_decoder(cfg, model))
        run.log(**log)


if __name__ == "__main__":
    script(main, __doc__)
