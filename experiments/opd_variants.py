"""OPD with choices that the lesson does not have: train_opd.py, and the switches of `Options`.

    python experiments/opd_variants.py --config toy --source teacher --states committed

Needs finished AR and CFT checkpoints, as train_opd.py does, or --teacher and --init. It writes
where train_opd.py writes: give it a --run_dir of its own, as experiments/ablations.py does.
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from plumbing.script import script  # noqa: E402  first: it sets how threads wait

from dataclasses import dataclass  # noqa: E402

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from config import Config  # noqa: E402
from data import (ANSWER, LABEL, MASK, PAD, draw_batch, in_answer, tensors,  # noqa: E402
                  token_weights)
from diffusion import (decode_states, every_block, fill_last_block, predict_blocks,  # noqa: E402
                       take_blocks)
from model import Sampling, causal_hidden  # noqa: E402
from ours.bound import mean_loss, requests  # noqa: E402
from ours.labels import exclude_shown  # noqa: E402
from ours.states import answer_blocks, state_weights  # noqa: E402
from plumbing.checkpoint import device_of, load_stage, start_from  # noqa: E402
from plumbing.settings import OneOf, Real, Switch, Text, UserError  # noqa: E402
from plumbing.teacher import teacher_responses  # noqa: E402
from sampler import NEVER, Decoded  # noqa: E402
from trainer import Run, autocast, load_world, rng_for, roll_out, valid_rate  # noqa: E402
from train_cft import batch_loss, training_responses, validate  # noqa: E402
from train_opd import divergence, draw_steps  # noqa: E402


@dataclass(frozen=True)
class Options:
    source: OneOf("student", "teacher") = "student"
    # whose text: the student's roll-outs; or the teacher's own, greedy, in random states
    states: OneOf("masked", "committed", "next") = "masked"
    # scored in a state: all that is masked; what was committed there; the leftmost masked slot
    target: OneOf("teacher", "later") = "teacher"
    # later: of answers, the student's own prediction of a slot in the state that committed it
    teacher_temperature: Real(above=0) = 1.0  # above 1 the target is softer
    rollout_temperature: Real(0) = 0.0  # of the student's draws; 0: greedy
    cut: Switch() = False  # nothing counts after the first label that the answer had already


@dataclass(frozen=True)
class VariantConfig(Config):
    """The settings of a run, these switches among them: a checkpoint belongs to its variant."""
    opd_variant: Text() = ""


def as_decoded(response, block_size, rng):
    """Responses (N, R) as if a sampler had written them, a slot a step: slot 0 of a block first,
    the others in random order -> Decoded."""
    filled, in_block = fill_last_block(response, block_size)      # (N, R'), whole blocks
    place = torch.rand(len(filled), filled.shape[1] // block_size, block_size, generator=rng)
    place[..., 0] = -1
    order = place.argsort(-1).argsort(-1).flatten(1).to(response.device)  # (N, R')
    return Decoded(
        tokens=F.pad(response, (0, filled.shape[1] - response.shape[1]), value=PAD),
        filled=torch.where(in_block, filled, MASK),
        commit_step=torch.where(in_block, order, NEVER),
        logp=torch.zeros(filled.shape, device=filled.device),
        forwards=filled.new_zeros(len(filled)))


def after_a_repeated_label(tokens, n_labels):
    """Which tokens (N, R) come after a label that the answer had already: bool (N, R)."""
    label = in_answer(tokens) & (tokens >= LABEL) & (tokens < LABEL + n_labels)
    same = (tokens[:, :, None] == tokens[:, None]) & label[:, None] & label[..., None]
    again = same.tril(-1).any(2)                                  # (N, R)
    return again.cumsum(1) - again.long() > 0


def scored_slots(options, decoded, block, step, open_):
    """Which slots of the states step of the blocks block (N, M) are scored: bool (N, M, B).

    open_ (N, M, B): those still masked there. First slots always are, from the clean text."""
    B = open_.shape[-1]
    scored = open_
    if options.states == "committed":
        scored = take_blocks(decoded.commit_step, block, B) == step[..., None]
    if options.states == "next":
        scored = open_ & (open_.cumsum(-1) == 1)
    slot0 = torch.arange(B, device=open_.device) == 0
    return scored | slot0


def every_step(decoded, block_size):
    """A segment for each step of each block: the step that committed a token, -1 outside the
    response (N, R); the segments' blocks and steps (N, M)."""
    committed = torch.where(decoded.tokens != PAD, decoded.commit_step, -1)  # (N, R)
    n_steps = int(committed.max()) + 1
    block = every_block(decoded.tokens, block_size)               # (N, R / B)
    step = torch.arange(n_steps, device=block.device).repeat(block.shape[1])  # (M,)
    return committed, block.repeat_interleave(n_steps, 1), step.expand(len(block), -1)


def later_logits(student, prompt, decoded, block_size):
    """The student's logits of every token of its roll-outs, each in the state in which it was
    committed: (N, R, V), 0 after [EOS]."""
    B = block_size
    committed, block, step = every_step(decoded, B)
    noised, _ = decode_states(decoded, block, step, B)            # (N, M, B)
    hidden = predict_blocks(student, prompt, decoded.clean, noised, block)  # (N, M, B, d)
    here = take_blocks(committed, block, B) == step[..., None]    # (N, M, B)
    logits = student.logits(hidden[here])                         # (n, V)
    row, segment, slot = here.nonzero(as_tuple=True)
    out = logits.new_zeros(*committed.shape, logits.shape[-1])
    return out.index_put((row, block[row, segment] * B + slot), logits)


def variant_loss(cfg, options, student, teacher, prompt, decoded, rng):
    """train_opd.opd_loss with the switches of options; without them the very same, a scalar."""
    B, tokens = cfg.block_size, decoded.tokens
    extra = answer_blocks(tokens, B, cfg.answer_states)
    block = torch.cat((every_block(tokens, B), extra), dim=1)     # (N, M)
    step = draw_steps(decoded, block, B, rng)
    noised, open_ = decode_states(decoded, block, step, B)        # (N, M, B)

    real = take_blocks(tokens != PAD, block, B)                   # (N, M, B)
    scored = real & scored_slots(options, decoded, block, step, open_)
    if options.cut:
        wrong = after_a_repeated_label(tokens, cfg.n_labels)
        scored &= ~take_blocks(wrong, block, B)
    weight = take_blocks(token_weights(tokens, cfg.answer_weight), block, B)
    if cfg.answer_states:
        weight = weight * state_weights(block, scored, real)
    weight = weight[scored]                                       # (n,)

    with autocast(cfg, prompt.device):
        hidden = predict_blocks(student, prompt, decoded.clean, noised, block)  # (N, M, B, d)
        predicted = student.logits(hidden[scored])                # (n, V)
        with torch.no_grad():
            if options.target == "later" and (tokens == ANSWER).any():
                target = later_logits(student, prompt, decoded, B)  # (N, R, V)
                target = take_blocks(target, block, B)[scored]    # (n, V)
            else:
                hidden = causal_hidden(teacher, prompt, tokens)   # (N, R, d)
                target = teacher.logits(take_blocks(hidden, block, B)[scored])
    target = target / options.teacher_temperature
    if cfg.opd_exclude:
        target = exclude_shown(target, decoded, block, open_, scored)
    distance = divergence(predicted, target, cfg.opd_divergence)  # (n,)
    return (distance * weight).sum() / weight.sum()


def main(cfg, options):
    if cfg.opd_group > 1:
        raise UserError("the variants are of one roll-out a prompt: use --opd_group 1")
    cfg = VariantConfig(**vars(cfg), opd_variant=repr(options))
    world = load_world(cfg)
    teacher, _ = load_stage(cfg, "ar", world)
    student = start_from(cfg, world, "cft")
    run = Run(cfg, "opd", student, world)
    responses = training_responses(cfg, world) if cfg.opd_anchor else None
    n_prompts = min(cfg.opd_prompts, len(world.train))
    if options.source == "teacher":
        own = teacher_responses(cfg, world, n_prompts)            # whatever cft_gold says
    for step in run.steps():
        rng = rng_for(cfg, "opd", step)
        rows = draw_batch(n_prompts, cfg.batch_size, rng)
        prompt, _ = tensors(world.train, rows, device_of(cfg))
        if options.source == "teacher":
            parts = [(how, read, as_decoded(written, how.block_size, rng))
                     for how, read, written in requests(cfg, prompt, own[rows].to(prompt.device))]
        else:
            parts = roll_out(cfg, student, prompt, world.max_response, cfg.opd_tau,
                             Sampling(options.rollout_temperature, rng))

        losses = [variant_loss(how, options, student, teacher, read, decoded, rng)
                  for how, read, decoded in parts]
        loss = distance = mean_loss(parts, losses)
        if cfg.opd_anchor:
            anchor = batch_loss(cfg, world, student, responses, rng)
            loss = distance + cfg.opd_anchor * anchor
        log = run.update(loss)

        log |= {"divergence": distance.item(),
                "rollout_valid": valid_rate(parts[-1][-1].tokens, world.train, rows)}
        if run.time_to_validate():
            log |= validate(cfg, world, student)
        run.log(**log)


if __name__ == "__main__":
    script(main, __doc__, also=Options)
