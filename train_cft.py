"""Stage 2, CFT: conversion fine-tuning turns the AR teacher into a block-diffusion model.

    python train_cft.py --config toy    # 3 minutes on 2 CPU cores; expect .999 valid
    python train_cft.py --config small  # Amazon Beauty

From the teacher's weights, the masked-diffusion loss on the paper's training text: reasoning
traces and reference answers. Tokens written at once are chosen independently, so the text must be
a function of the prompt: where two labels are equally likely, two slots may take the same one,
and the answer shows one label twice and another not at all.

Logged: loss; now and then, of 64 validation users decoded as the settings say, valid (near 0 at
first, the naive conversion's) and tokens_per_forward. Judge the two together.
"""
from plumbing.script import script  # first: it sets how threads wait, before torch is loaded

import torch
import torch.nn.functional as F

from data import MASK, PAD, draw_batch, tensors, token_weights
from diffusion import draw_noise, every_block, fill_last_block, predict_blocks, take_blocks
from ours.bound import mean_loss, requests
from ours.labels import extend, misplaced, price_of_taken, what_is_left
from ours.states import answer_blocks, first_steps, share_weight
from plumbing.checkpoint import device_of, start_from
from plumbing.teacher import teacher_responses
from trainer import Run, autocast, decode, load_world, rng_for, valid_rate


def training_responses(cfg, world):
    """What CFT is trained on: responses (n, R) int64 to the first cft_prompts training prompts.

    The reference traces and answers, as in the paper; without cft_gold the teacher's own."""
    n = min(cfg.cft_prompts, len(world.train))
    if cfg.cft_gold:
        return tensors(world.train, range(n), "cpu")[1]
    return teacher_responses(cfg, world, n)


def cft_batch(cfg, world, responses, rng):
    """A batch of training prompts (N, P) and their responses (N, R), without columns of [PAD]."""
    rows = draw_batch(len(responses), cfg.batch_size, rng)
    device = device_of(cfg)
    prompt, _ = tensors(world.train, rows, device)
    response = responses[rows].to(device)
    longest = int((response != PAD).sum(1).max())
    return prompt, response[:, :longest]


def weights_in_blocks(cfg, response, in_block):
    """Weights of tokens (N, R) in whole blocks (N, R'). An [EOS] that fills up weighs 1."""
    weight = token_weights(response, cfg.answer_weight)
    weight = F.pad(weight, (0, in_block.shape[1] - response.shape[1]))
    return torch.where(in_block & (weight == 0), 1.0, weight)


def draw_states(cfg, response, filled, rng):
    """The states in which the blocks of a batch are shown: which block each is a copy of (N, M),
    which of its slots are masked (N, M, B), and the loss weight of each slot (N, M, B).

    response (N, R), filled (N, R') the same in whole blocks. The paper shows every block once."""
    block = every_block(filled, cfg.block_size)
    extra = answer_blocks(response, cfg.block_size, cfg.answer_states)  # ours
    block = torch.cat((block, extra), dim=1)                      # ours
    masked, weight = draw_noise(block, cfg.block_size, rng)
    masked, weight = first_steps(masked, weight, cfg.cft_first_step, rng)  # ours
    weight = share_weight(block, weight)                          # ours
    return block, masked, weight


def cft_loss(cfg, model, prompt, response, rng):
    """The masked-diffusion loss in nats a token, a scalar; also OPD's anchor.

    -log p(y) <= sum over blocks of -log p(first token | clean past)
                            + E_t [ 1/t sum over masked i of -log p(y_i | state, clean past) ]
    (BD3-LM, arXiv 2503.09573, eq. 8; the token shift adds the first term. E_t is the mean AR loss
    over random orders of the slots: a bound, by Jensen.) Without our lines, at answer_weight 1:

        block     every block once
        masked    draw_noise(block), with the weights w
        noised    [MASK] where masked, else the block
        loss      sum of w * -log p(true token | noised, clean past) / number of tokens (unbiased)

    At block size 1 it is the AR loss. prompt (N, P) padded on the left, response (N, R) on the
    right."""
    B = cfg.block_size
    shown_from = misplaced(response, cfg.cft_misplace, rng)       # ours: (N, R)
    filled, in_block = fill_last_block(response, B)               # (N, R'), whole blocks
    token_weight = weights_in_blocks(cfg, response, in_block)     # (N, R')
    shown_from = extend(shown_from, filled.shape[1])              # ours: (N, R')
    shown = filled.gather(1, shown_from)                          # the paper: filled

    # 1. Draw the states: copies of the blocks, with some slots masked.
    block, masked, noise_weight = draw_states(cfg, response, filled, rng)

    # 2. Show them.
    noised = torch.where(masked, MASK, take_blocks(shown, block, B))  # (N, M, B)

    # 3. Predict.
    left = what_is_left(shown_from, block, masked)                # ours: (N, M, B)
    target = filled.gather(1, left.flatten(1)).view_as(noised)    # the paper: filled, in blocks
    slot_weight = noise_weight * take_blocks(token_weight, block, B)
    asked = slot_weight > 0                                       # the others need no logits
    with autocast(cfg, prompt.device):
        hidden = predict_blocks(model, prompt, shown, noised, block)  # (N, M, B, d)
        logits = model.logits(hidden[asked])                      # (n, V)
    nats = F.cross_entropy(logits, target[asked], reduction="none")   # (n,)

    # 4. Weigh. A slot's noise weights have mean 1, so this is a mean over tokens.
    if cfg.cft_penalty:                                           # ours
        price = price_of_taken(response, shown, block, masked, asked, logits)
        nats = nats + cfg.cft_penalty * price
    return (nats * slot_weight[asked]).sum() / token_weight.sum()


def batch_loss(cfg, world, model, responses, rng):
    """The CFT loss of a batch of training text; OPD keeps it in the mix (ours)."""
    prompt, response = cft_batch(cfg, world, responses, rng)
    parts = requests(cfg, prompt, response)                       # ours; the paper: one
    return mean_loss(parts, [cft_loss(own, model, read, written, rng)
                             for own, read, written in parts])


def validate(cfg, world, model, n=64):
    """valid and tokens_per_forward on the first validation users, at the settings' tau."""
    rows = range(min(n, len(world.val)))
    prompt, _ = tensors(world.val, rows, device_of(cfg))
    decoded = decode(cfg, model, prompt, world.max_response)
    written = (decoded.tokens != PAD).sum()
    return {
        "valid": valid_rate(decoded.tokens, world.val, rows),
        "tokens_per_forward": (written / decoded.forwards.sum()).item()}


def main(cfg):
    world = load_world(cfg)
    model = start_from(cfg, world, "ar")
    run = Run(cfg, "cft", model, world)
    responses = training_responses(cfg, world)
    for step in run.steps():
        rng = rng_for(cfg, "cft", step)
        log = run.update(batch_loss(cfg, world, model, responses, rng))
        if run.time_to_validate():
            log |= validate(cfg, world, model)
        run.log(**log)


if __name__ == "__main__":
    script(main, __doc__)
