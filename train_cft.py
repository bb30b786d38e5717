"""Stage 2, CFT: conversion fine-tuning turns the AR teacher into a block-diffusion model.

    python train_cft.py --config toy    # on 2 CPU cores
    python train_cft.py --config small  # Amazon Beauty

It starts from the teacher's weights, and trains with the masked-diffusion loss on reference traces
and answers, as the paper does. One forward pass predicts all masked slots independently of each
other. Where two labels are equally likely, two slots may take the same one; then the answer has one
label twice and another not at all.

Ours: the AR loss stays in the mix (cft_ar_weight), so the same weights decode both ways; some
states are first steps (cft_first_steps) or show a label in a wrong place (cft_misplace).

Logged: loss; and for 64 validation users, decoded in blocks, valid (close to 0 at first: this is
the naive conversion), match and tokens_per_forward. Look at all of them: one can be raised at the
cost of another.
"""
import torch

from data import (MASK, Examples, as_prompt, draw_examples, examples_of, is_answer_label, joined,
                  parse_answers, tensors, token_weights)
from diffusion import draw_noise, every_block, fill_last_block, read_blocks, take_blocks
from ours.misplace import misplace
from plumbing.checkpoint import load_stage, start_from
from plumbing.processes import device_of, per_process
from plumbing.script import script
from plumbing.settings import UserError
from train_ar import weighted_nats
from trainer import (Run, ar_decoder, autocast, block_decoder, decode_split, load_world, rng_for,
                     validate)


def training_text(cfg, world):
    """What CFT is trained on, a list of Examples: the reference traces and answers, as in the
    paper. With cft_gold false they are the teacher's own responses."""
    split = world.train.take(slice(0, cfg.cft_prompts))
    return examples_of(split, cfg.trace) if cfg.cft_gold else teacher_text(cfg, world, split)


def teacher_text(cfg, world, split):
    """The greedy responses of the teacher to the users of a split, as a list of Examples. Only
    those with a valid answer are kept."""
    teacher, _ = load_stage(cfg, "ar", world)
    written, _ = decode_split(cfg, world, split, ar_decoder(teacher))  # one or two arrays (N, R)
    valid = parse_answers(joined(written), split.incoming).valid
    if not valid.any():
        raise UserError("the teacher has written no valid answer to learn from: use --cft_gold "
                        "true, or train it for longer (--ar_steps)")
    prompts = [split.prompt, as_prompt(written[0])]
    # With trace "free" there is one kind, and zip stops after it.
    return [Examples(prompt[valid], response[valid])
            for prompt, response in zip(prompts, written)]


def cft_loss(cfg, model, prompt, response, rng):
    """The masked-diffusion loss in nats a token, a scalar.

    -log p(y) <= sum over blocks of -log p(first token | past)
                            + E_t [ 1/t sum over masked i of -log p(y_i | state, past) ]
    past: the clean text before the block. (BD3-LM, arXiv 2503.09573, eq. 8; the first term comes
    from the token shift. docs/bound.md derives it.) At block size 1 it is the AR loss. With
    cft_ar_weight the AR loss is added.
    prompt (N, P) padded on the left, response (N, R) on the right."""
    B = min(cfg.block_size, response.shape[1])
    clean, is_fill = fill_last_block(response, B)                 # (N, R'), whole blocks
    token_weight = token_weights(clean, cfg.answer_weight)        # (N, R')
    token_weight = token_weight.masked_fill(is_fill, 1.0)         # filling counts as in a trace

    # 1. Draw a state of every block: which slots are masked, and their weights.
    block = every_block(clean, B)                                 # (N, M)
    masked, noise_weight = draw_noise(block, B, cfg.cft_first_steps, rng)  # (N, M, B) each

    # 2. Show the states.
    token = take_blocks(clean, block, B)                          # (N, M, B)
    noised = torch.where(masked, MASK, token)                     # (N, M, B)
    is_label = take_blocks(is_answer_label(clean), block, B)
    noised, token = misplace(noised, token, masked, is_label, cfg.cft_misplace, rng)  # ours

    # 3. Predict the masked slots, and slot 0. A slot's noise weight is 1 on average, so this
    # estimates a mean over tokens.
    weight = noise_weight * take_blocks(token_weight, block, B)   # (N, M, B)
    asked = weight > 0                                            # the others need no logits
    with autocast(cfg, prompt.device):
        from_left, hidden = read_blocks(model, prompt, clean, noised, block)
        total = weighted_nats(model, hidden[asked], token[asked], weight[asked])
        loss = total / token_weight.sum()

        # 4. Ours: the same forward has read the clean text from the left, as AR does.
        if cfg.cft_ar_weight:
            ar_weight = token_weight * ~is_fill                   # (N, R')
            real = ar_weight > 0
            total = weighted_nats(model, from_left[real], clean[real], ar_weight[real])
            loss = loss + cfg.cft_ar_weight * total / ar_weight.sum()
    return loss


def main(cfg):
    world = load_world(cfg)
    model = start_from(cfg, world, "cft")
    run = Run(cfg, "cft", model, world)
    kinds = training_text(cfg, world)
    for step in run.steps():
        rng = rng_for(cfg, "cft", step)
        examples, rows = draw_examples(kinds, per_process(cfg.batch_size), cfg.answer_share, rng)
        prompt, response = tensors(examples, rows, device_of(cfg))  # (N, P), (N, R)
        log = run.update(cft_loss(cfg, model, prompt, response, rng))
        if run.time_to_validate():
            log |= validate(cfg, world, block_decoder(cfg, model))
        run.log(**log)


if __name__ == "__main__":
    script(main, __doc__)
