"""Stage 2, CFT: conversion fine-tuning, which turns the AR teacher into a block-diffusion model.

    python train_cft.py --config toy      # 8 minutes on 2 CPU cores; expect .999 valid at 11 tokens a forward
    python train_cft.py --config small    # Amazon Beauty, half an hour to an hour on 1 CPU core; expect .9997 valid at 11.5

The masked-diffusion loss, from the teacher's weights, with the answer weighted above the trace and, with --cft_penalty, a price on
giving a label that is taken. What is trained on must be a function of the prompt, as decoding many tokens at once needs it: where
several labels are equally likely, independent choices collide, and the answer shows a label twice and another not at all. The
reference orders are one. So are the teacher's own greedy outputs, which the paper takes (--cft_gold false): they repeat its mistakes.

Logged: loss; now and then valid and tokens_per_forward of 64 validation users, decoded at the operating point. valid starts near 0,
the naive conversion's; judge it together with tokens_per_forward.
"""
import os

import numpy as np
import torch

from common import (Run, checkpoint_path, checksum, decode_split, device_of, draw_batch, gathered, generator, half, load_stage,
                    load_tensors, mine, save_tensors, script, serve, start_from, valid_rate)
from data import ANSWER, load_world, parse_answers, tensors
from diffusion import diffusion_loss
from model import PAD, ar_decode
from train_ar import answer_labels, misplaced, token_weights


def teacher_outputs(cfg, world, teacher):
    """Greedy responses of the AR teacher to the first `cft_prompts` training prompts, decoded once and kept beside its
    checkpoint, for all conversions of this teacher. Where its answer is invalid, the reference stands in.

    Returns tokens (n, max_response) int64, right-padded. With cft_gold the reference responses instead.
    """
    n = min(cfg.cft_prompts, len(world.train))
    if cfg.cft_gold:
        return tensors(world.train, range(n), "cpu")[1]
    path = os.path.join(os.path.dirname(checkpoint_path(cfg, "ar")), "outputs.pt")
    made_of = checksum(teacher.state_dict(), torch.from_numpy(world.train.prompt))  # outputs of another teacher are not taken for its own
    saved = load_tensors(path) if os.path.exists(path) else {}
    gathered(None)  # nobody writes while another still looks
    if saved.get("made_of") != made_of or len(saved["tokens"]) < n:
        decoder = lambda prompt, rows: ar_decode(teacher, prompt, world.max_response)[::2]  # tokens, forwards
        split = world.train.take(slice(0, n))
        tokens, _ = decode_split(cfg, split, decoder, "teacher outputs")
        reference = np.pad(split.response, ((0, 0), (0, tokens.shape[1] - split.response.shape[1])), constant_values=PAD)
        tokens = np.where(parse_answers(tokens, split.incoming).valid[:, None], tokens, reference)
        saved = {"made_of": made_of, "tokens": torch.from_numpy(tokens)}
        save_tensors(path, saved)
    return saved["tokens"][:n]


def answer_blocks(response, block_size, times):
    """The blocks that hold the answers of responses (N, R), named `times` times each: (N, E) int64."""
    first = ((response == ANSWER).int().argmax(1) + 1) // block_size  # (N,)
    last = ((response != PAD).sum(1) - 1) // block_size
    span = torch.arange(int((last - first).max()) + 1, device=response.device)
    return torch.minimum(first[:, None] + span, last[:, None]).repeat(1, times)


def cft_loss(cfg, world, model, outputs, gen):
    """The loss of one batch drawn from the teacher's outputs; also the anchor of OPD and RL."""
    rows, device = draw_batch(len(outputs), cfg.batch_size, gen), device_of(cfg)
    prompt, _ = tensors(world.train, rows, device)
    response = outputs[rows].to(device)
    response = response[:, :int((response != PAD).sum(1).max())]
    with half(cfg, device):
        return diffusion_loss(model, prompt, response, cfg.block_size, cfg.cft_noise, cfg.cft_first_step, gen,
                              token_weights(response, cfg.answer_weight),
                              answer_blocks(response, cfg.block_size, cfg.cft_answer_states),
                              misplaced(response, cfg.cft_misplace, gen), cfg.cft_penalty * answer_labels(response),
                              mine(cfg.batch_size))


def validate(cfg, world, model, n=64):
    """Valid rate and tokens a forward on the first validation prompts, at the operating point."""
    rows = range(min(n, len(world.val)))
    prompt, _ = tensors(world.val, rows, device_of(cfg))
    decoded = serve(cfg, model, prompt, world.max_response)
    return {"valid": valid_rate(decoded.tokens, world.val, rows),
            "tokens_per_forward": ((decoded.tokens != PAD).sum() / decoded.forwards.sum()).item()}


def main(cfg):
    world = load_world(cfg)
    model = start_from(cfg, world, "ar")
    run = Run(cfg, "cft", model, world)
    outputs = teacher_outputs(cfg, world, load_stage(cfg, "ar", world)[0])
    for step in run.steps():
        loss = cft_loss(cfg, world, model, outputs, generator(cfg, "cft", step))
        log = run.update(loss)
        if run.time_to_validate():
            log |= validate(cfg, world, model)
        run.log(**log)


if __name__ == "__main__":
    script(main, __doc__)
