"""Stage 3, OPD: on-policy distillation. The student decodes, the frozen AR teacher corrects it.

    python train_opd.py --config toy_few  # after CFT on 300 responses of the teacher
    python train_opd.py --config toy      # after CFT on all text; it has little to do

CFT's states come from random masks. The decoder meets other states, made by its own choices. So
the student decodes, and in states that occurred its distributions are pulled towards the
teacher's. The teacher reads the same finished text from left to right (GKD, arXiv 2306.13649;
OPDLM, arXiv 2606.06712). This works with any prompt, and needs one teacher forward per response.

The paper uses the forward KL and nothing else, as toy_paper does. A forward KL makes the student
as unsure as its teacher, and a student that is less sure needs more forwards. So after CFT on all
text our presets use the JSD, and add the CFT loss as an anchor.

Logged: loss (both terms), divergence alone, and the figures of CFT.
"""
import torch
import torch.nn.functional as F

from data import PAD, draw_examples, examples_of, tensors, token_weights
from diffusion import decode_states, every_block, read_blocks, take_blocks
from model import NO_TOKEN, causal_hidden
from ours.exclude import exclude_shown
from plumbing.checkpoint import device_of, load_stage, start_from
from plumbing.processes import share
from plumbing.script import script
from sampler import NEVER, block_decode
from trainer import (Run, autocast, block_writer, load_world, rng_for, rule_of, sampling_on,
                     validate)
from train_cft import cft_loss, training_text


def kl(log_p, log_q):
    """KL(P || Q) = sum over tokens of p log(p / q): (..., V) log-probabilities -> (...), nats."""
    p = log_p.exp()
    return (p * (log_p - log_q)).sum(-1)


def divergence(student_logits, teacher_logits, kind, beta=0.5):
    """How far the student S is from the teacher T: logits (..., V) -> (...), in nats.

    forward  KL(T || S)
    reverse  KL(S || T)
    jsd      beta KL(T || M) + (1 - beta) KL(S || M),  M = beta T + (1 - beta) S   (GKD, eq. 1)
    """
    log_t = F.log_softmax(teacher_logits, -1)
    if kind == "reverse":
        # KL(S || T) is infinite where T is 0. exclude_shown (ours/exclude.py) sets some tokens
        # of T to 0, so the same tokens are removed from S.
        student_logits = student_logits.masked_fill(teacher_logits <= NO_TOKEN, NO_TOKEN)
    log_s = F.log_softmax(student_logits, -1)
    if kind == "forward":
        return kl(log_t, log_s)
    if kind == "reverse":
        return kl(log_s, log_t)
    m = beta * log_t.exp() + (1 - beta) * log_s.exp()
    log_m = torch.log(m + 1e-30)  # finite where both are 0
    return beta * kl(log_t, log_m) + (1 - beta) * kl(log_s, log_m)


def draw_steps(decoded, block, rng):
    """A step of each block (N, M), uniform among those that the sampler took there: (N, M).

    It is 0 for a block after the response's end, where nothing is scored."""
    step = take_blocks(decoded.commit_step, block, decoded.block_size)  # (N, M, B)
    last = step.masked_fill(step == NEVER, -1).amax(-1)           # (N, M)
    n_steps = last + 1
    u = torch.rand(n_steps.shape, generator=rng).to(step.device)
    return (u * n_steps).long()


def opd_loss(cfg, student, teacher, prompt, decoded, rng):
    """Weighted mean divergence a token in states of the student's own decode, a scalar.

    prompt (N, P), decoded: the student's responses (N, R). Nothing after the first [EOS] counts.
    """
    B = decoded.block_size
    tokens = decoded.tokens                                       # (N, R)

    # 1. Draw a state of each block, and see it as the sampler did.
    block = every_block(tokens, B)                                # (N, M)
    step = draw_steps(decoded, block, rng)                        # (N, M)
    noised, open_ = decode_states(decoded, block, step)           # (N, M, B)

    # 2. Score the slots still masked there, and always slot 0: the clean text predicts it.
    slot0 = torch.arange(B, device=tokens.device) == 0
    real = take_blocks(tokens != PAD, block, B)                   # (N, M, B)
    scored = real & (slot0 | open_)
    weight = token_weights(tokens, cfg.answer_weight)             # (N, R)
    weight = take_blocks(weight, block, B)[scored]                # (n,)

    # 3. The student predicts them from the state, the teacher from all decoded tokens to their
    # left, also from those that this state masks.
    with autocast(cfg, prompt.device):
        _, hidden = read_blocks(student, prompt, decoded.clean, noised, block)  # (N, M, B, d)
        predicted = student.logits(hidden[scored])                # (n, V)
        with torch.no_grad():
            hidden = causal_hidden(teacher, prompt, tokens)       # (N, R, d)
            hidden = take_blocks(hidden, block, B)                # (N, M, B, d)
            target = teacher.logits(hidden[scored])               # (n, V)
    if cfg.opd_exclude:                                           # ours
        target = exclude_shown(target, decoded, block, open_, scored)

    # 4. Pull the student's distributions towards the teacher's.
    distance = divergence(predicted, target, cfg.opd_divergence)  # (n,)
    return (distance * weight).sum() / weight.sum()


def main(cfg):
    world = load_world(cfg)
    teacher, _ = load_stage(cfg, "ar", world)
    student = start_from(cfg, world, "opd")
    run = Run(cfg, "opd", student, world)
    kinds = examples_of(world.train.take(slice(0, cfg.opd_prompts)), cfg.trace)
    text = training_text(cfg, world) if cfg.opd_anchor else None  # of the anchor
    for step in run.steps():
        rng = rng_for(cfg, "opd", step)

        # The student writes by its own commit rule, at opd_tau: greedily if it writes one response
        # to a prompt, else at temperature 1. With bound traces an answer's prompt is a reference
        # trace.
        examples, rows = draw_examples(kinds, share(cfg.batch_size), cfg.answer_share, rng)
        prompt, response = tensors(examples, rows, device_of(cfg))  # (n, P)
        prompt = prompt.repeat_interleave(cfg.opd_group, dim=0)   # (N, P), N = n * group
        how = sampling_on(prompt.device, 1.0 if cfg.opd_group > 1 else 0.0, rng)
        decoded = block_decode(student, prompt, response.shape[1], cfg.block_size,
                               rule_of(cfg, cfg.opd_tau), how)

        # The teacher corrects.
        distance = loss = opd_loss(cfg, student, teacher, prompt, decoded, rng)
        if cfg.opd_anchor:                                        # ours
            examples, rows = draw_examples(text, share(cfg.batch_size), cfg.answer_share, rng)
            prompt, response = tensors(examples, rows, device_of(cfg))
            loss = loss + cfg.opd_anchor * cft_loss(cfg, student, prompt, response, rng)
        log = run.update(loss)
        log["divergence"] = distance.item()
        if run.time_to_validate():
            log |= validate(cfg, world, block_writer(cfg, student))
        run.log(**log)


if __name__ == "__main__":
    script(main, __doc__)
