"""Stage 2, CFT: conversion fine-tuning, which turns the AR teacher into a block-diffusion model.

    python train_cft.py --config toy      # 8 minutes on 2 CPU cores; expect .99 valid at 4.7 tokens a forward
    python train_cft.py --config small    # Amazon Beauty, about 25 minutes on 2 CPU cores; expect .96 valid at 5.3

The teacher first answers `cft_prompts` training prompts, once. Its greedy outputs are a nearly deterministic function of
the prompt, and that is what decoding many tokens at once needs: where several labels are equally likely, independent
choices collide, and the answer shows a label twice and another not at all. Then the masked-diffusion loss, from the
teacher's weights, with the answer weighted above the trace.
"""
import os

import torch
from tqdm import tqdm

from common import (Run, checkpoint_path, device_of, draw_batch, generator, half, load_stage, load_tensors,
                    save_atomically, script, valid_rate)
from config import UserError
from data import load_world, tensors
from diffusion import block_decode, diffusion_loss
from model import PAD, ar_decode
from train_ar import token_weights


def teacher_outputs(cfg, world, teacher):
    """Greedy responses of the AR teacher to the first `cft_prompts` training prompts, decoded once and cached.

    Returns tokens (n, max_response) int64, right-padded. With cft_gold the reference responses instead.
    """
    n = min(cfg.cft_prompts, len(world.train))
    if cfg.cft_gold:
        return tensors(world.train, range(n), "cpu")[1]
    path = os.path.join(os.path.dirname(checkpoint_path(cfg, "cft")), "teacher_outputs.pt")
    device = next(teacher.parameters()).device

    def decode():
        for i in tqdm(range(0, n, cfg.eval_batch), desc="teacher outputs"):
            prompt, _ = tensors(world.train, range(i, min(n, i + cfg.eval_batch)), device)
            yield ar_decode(teacher, prompt, world.max_response)[0].cpu()

    if not os.path.exists(path):
        tokens = torch.cat(list(decode()))
        save_atomically(path, lambda p: torch.save(tokens, p))
    tokens = load_tensors(path)
    if tokens.shape != (n, world.max_response):
        raise UserError(f"{path} holds outputs for {len(tokens)} prompts, not {n}: delete it and run again")
    return tokens


def cft_loss(cfg, world, model, outputs, gen):
    """The loss of one batch drawn from the teacher's outputs; also the anchor of OPD and RL."""
    rows = draw_batch(world.train.k[:len(outputs)], cfg.batch_size, gen)
    prompt, _ = tensors(world.train, rows, gen.device)
    response = outputs[rows].to(gen.device)
    response = response[:, :int((response != PAD).sum(1).max())]
    with half(cfg, gen.device):
        return diffusion_loss(model, prompt, response, cfg.block_size, cfg.cft_noise, cfg.cft_first_step, gen,
                              token_weights(response, cfg.answer_weight))


def validate(cfg, world, model, n=64):
    """Valid rate and tokens a forward on the first validation prompts, at the operating point."""
    rows = range(min(n, len(world.val)))
    prompt, _ = tensors(world.val, rows, device_of(cfg))
    decoded = block_decode(model, prompt, world.max_response, cfg.block_size, cfg.commit, cfg.tau)
    return {"valid": valid_rate(decoded.tokens, world.val, rows),
            "tokens_per_forward": ((decoded.tokens != PAD).sum() / decoded.forwards.sum()).item()}


def main(cfg):
    world = load_world(cfg)
    model, _ = load_stage(cfg, "ar", world)
    run = Run(cfg, "cft", model, world)
    outputs = teacher_outputs(cfg, world, load_stage(cfg, "ar", world)[0])
    for step in run.steps():
        loss = cft_loss(cfg, world, model, outputs, generator(cfg, "cft", step, device_of(cfg)))
        log = {"grad_norm": run.update(loss), "loss": loss.item()}
        if run.time_to_validate():
            log |= validate(cfg, world, model)
        run.log(**log)


if __name__ == "__main__":
    script(main, __doc__)
