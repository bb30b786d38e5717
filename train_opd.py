"""Stage 3, OPD: on-policy distillation. The student decodes, the frozen AR teacher corrects it.

    python train_opd.py --config toy_few  # after CFT on 300 responses of the teacher
    python train_opd.py --config toy      # after CFT on all text; it has little to do

CFT's states come from random masks. The decoder meets other states, made by its own choices. So
the student decodes, and in states that occurred its distributions are pulled towards the
teacher's. The teacher reads the student's response from left to right, also the tokens that are
still masked for the student (GKD, arXiv 2306.13649; OPDLM, arXiv 2606.06712). It needs no
reference for what is written, only one teacher forward for each response.

The paper uses the forward KL, as toy_paper does. It has no upper bound where the teacher is unsure
and the student is not, so it pulls a sure student hard, and a student that is less sure needs more
forwards. The JSD is smallest at the same place, where both agree, but it is never above log 2. So
after CFT on all text our presets use the JSD.

Logged: loss, which is the divergence, and the figures of CFT.
"""
import torch
import torch.nn.functional as F

from data import PAD, draw_examples, examples_of, tensors, token_weights
from diffusion import decode_states, every_block, read_blocks, take_blocks
from model import FORBIDDEN, causal_hidden
from ours.exclude import exclude_shown
from plumbing.checkpoint import load_stage, start_from
from plumbing.processes import device_of, per_process
from plumbing.script import script
from sampler import NEVER, block_decode
from trainer import (Run, autocast, block_decoder, load_world, rng_for, rule_of, sampling_on,
                     validate)


def kl(log_p, log_q):
    """KL(P || Q) = sum over tokens of p log(p / q): (..., V) log-probabilities -> (...), nats."""
    p = log_p.exp()
    return (p * (log_p - log_q)).sum(-1)


def divergence(student_logits, teacher_logits, kind):
    """How far the student S is from the teacher T: logits (..., V) -> (...), in nats.

    forward  KL(T || S)
    reverse  KL(S || T)
    jsd      (KL(T || M) + KL(S || M)) / 2,  M = (T + S) / 2   (GKD, eq. 1, with beta = 1/2)
    """
    log_t = F.log_softmax(teacher_logits, -1)
    if kind == "reverse":
        # KL(S || T) is infinite where T is 0. exclude_shown (ours/exclude.py) sets some tokens
        # of T to 0, so the same tokens are removed from S.
        student_logits = student_logits.masked_fill(teacher_logits <= FORBIDDEN, FORBIDDEN)
    log_s = F.log_softmax(student_logits, -1)
    if kind == "forward":
        return kl(log_t, log_s)
    if kind == "reverse":
        return kl(log_s, log_t)
    m = (log_t.exp() + log_s.exp()) / 2
    log_m = torch.log(m + 1e-30)  # finite where both are 0
    return (kl(log_t, log_m) + kl(log_s, log_m)) / 2


def draw_steps(decoded, block, rng):
    """Draws a step of each block: block (N, M) -> (N, M), uniform among the steps that the sampler
    took there.

    It is 0 for a block after the response's end, where nothing is scored."""
    step = take_blocks(decoded.commit_step, block, decoded.block_size)  # (N, M, B)
    last = step.masked_fill(step == NEVER, -1).amax(-1)           # (N, M)
    n_steps = last + 1
    u = torch.rand(n_steps.shape, generator=rng).to(step.device)
    return (u * n_steps).long()


def opd_loss(cfg, student, teacher, prompt, decoded, rng):
    """Weighted mean of the divergence per token, in states of the student's own decode, a scalar.

    prompt (N, P), decoded: the student's responses (N, R). Nothing after the first [EOS] counts.
    """
    B = decoded.block_size
    tokens = decoded.tokens                                       # (N, R)

    # 1. Draw a state of each block, and see it as the sampler did.
    block = every_block(tokens, B)                                # (N, M)
    step = draw_steps(decoded, block, rng)                        # (N, M)
    noised, masked = decode_states(decoded, block, step)          # (N, M, B)

    # 2. Score the slots still masked there, and always slot 0: the clean text predicts it.
    slot0 = torch.arange(B, device=tokens.device) == 0
    real = take_blocks(tokens != PAD, block, B)                   # (N, M, B)
    scored = real & (slot0 | masked)
    weight = token_weights(tokens, cfg.answer_weight)             # (N, R)
    weight = take_blocks(weight, block, B)[scored]                # (n,)

    # 3. The student predicts them from the state, the teacher from all decoded tokens to their
    # left, also from those that this state masks.
    with autocast(cfg, prompt.device):
        _, hidden = read_blocks(student, prompt, decoded.clean, noised, block)  # (N, M, B, d)
        student_logits = student.logits(hidden[scored])           # (n, V)
        with torch.no_grad():
            hidden = causal_hidden(teacher, prompt, tokens)       # (N, R, d)
            hidden = take_blocks(hidden, block, B)                # (N, M, B, d)
            teacher_logits = teacher.logits(hidden[scored])               # (n, V)
    if cfg.opd_exclude:                                           # ours
        teacher_logits = exclude_shown(teacher_logits, decoded, block, masked, scored)

    # 4. Pull the student's distributions towards the teacher's.
    nats = divergence(student_logits, teacher_logits, cfg.opd_divergence)  # (n,)
    return (nats * weight).sum() / weight.sum()


def main(cfg):
    world = load_world(cfg)
    teacher, _ = load_stage(cfg, "ar", world)
    student = start_from(cfg, world, "opd")
    run = Run(cfg, "opd", student, world)
    kinds = examples_of(world.train.take(slice(0, cfg.opd_prompts)), cfg.trace)
    for step in run.steps():
        rng = rng_for(cfg, "opd", step)

        # The student writes by its own commit rule, at opd_tau: greedily if it writes one response
        # to a prompt, else at temperature 1. With bound traces an answer's prompt is a reference
        # trace.
        examples, rows = draw_examples(kinds, per_process(cfg.batch_size), cfg.answer_share, rng)
        prompt, response = tensors(examples, rows, device_of(cfg))  # (n, P)
        prompt = prompt.repeat_interleave(cfg.opd_group, dim=0)   # (N, P), N = n * group
        how = sampling_on(prompt.device, 1.0 if cfg.opd_group > 1 else 0.0, rng)
        decoded = block_decode(student, prompt, response.shape[1], cfg.block_size,
                               rule_of(cfg, cfg.opd_tau), how)

        # The teacher corrects.
        log = run.update(opd_loss(cfg, student, teacher, prompt, decoded, rng))
        if run.time_to_validate():
            log |= validate(cfg, world, block_decoder(cfg, student))
        run.log(**log)


if __name__ == "__main__":
    script(main, __doc__)
