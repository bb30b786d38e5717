"""Stage 3, OPD: on-policy distillation. The student decodes, the frozen AR teacher corrects every token it wrote.

    python train_opd.py --config toy      # 40 seconds on 2 CPU cores; expect no harm (a gain is still to be shown)
    python train_opd.py --config small    # Amazon Beauty, 2 minutes on 2 CPU cores; expect the same

CFT shows the student states made by random masks over the teacher's text; while it decodes it meets others, made by its
own choices. So the student decodes with its cached block sampler, and in the states that it met its distributions are
pulled towards those of the teacher that reads the same finished text (GKD, arXiv 2306.13649). The CFT loss stays in the
mix as an anchor: without it, distillation has been seen to move the student along the speed-quality curve, or off it.
"""
import torch
import torch.nn.functional as F

from common import Run, device_of, draw_batch, generator, half, load_stage, script, valid_rate
from data import load_world, tensors
from diffusion import NEVER, block_decode, decode_states, full_precision, stream_hidden
from model import MASK, PAD, causal_hidden
from train_cft import cft_loss, teacher_outputs, validate


def divergence(student_logits, teacher_logits, kind, beta=0.5):
    """Divergence over the whole vocabulary, a value a token: (..., V), (..., V) -> (...), in nats.

    forward  KL(T||S) = sum_v T log(T/S)
    reverse  KL(S||T) = sum_v S log(S/T)
    jsd      beta KL(T||M) + (1-beta) KL(S||M),  M = beta T + (1-beta) S        (GKD, arXiv 2306.13649, eq. 1)
    """
    log_s, log_t = F.log_softmax(student_logits, -1), F.log_softmax(teacher_logits, -1)
    kl = lambda log_p, log_q: (log_p.exp() * (log_p - log_q)).sum(-1)
    if kind == "forward":
        return kl(log_t, log_s)
    if kind == "reverse":
        return kl(log_s, log_t)
    log_m = torch.log(beta * log_t.exp() + (1 - beta) * log_s.exp() + 1e-30)
    return beta * kl(log_t, log_m) + (1 - beta) * kl(log_s, log_m)


def rollout(cfg, world, student, gen):
    """The student decodes a batch of training prompts with its own sampler: prompt (N, P), Decoded, share of valid ones."""
    rows = draw_batch(world.train.k, cfg.batch_size, gen)
    prompt, _ = tensors(world.train, rows, gen.device)
    decoded = block_decode(student, prompt, world.max_response, cfg.block_size, "threshold", cfg.opd_tau)
    return prompt, decoded, valid_rate(decoded.tokens, world.train, rows)


def opd_loss(cfg, student, teacher, prompt, decoded, gen):
    """Mean divergence per token in states of the student's own decode, a scalar.

    One state a block, drawn uniformly from the steps that the sampler took in it; every token still masked there counts
    (the first token of a block always does, from the clean stream). The target for token i is the teacher's AR
    distribution at i-1 on the student's finished text; nothing behind the first [EOS] counts.
    """
    B, (N, R) = cfg.block_size, decoded.tokens.shape
    per_block = decoded.commit_step.masked_fill(decoded.commit_step == NEVER, -1).view(N, R // B, B).amax(-1) + 1
    state = (torch.rand(per_block.shape, generator=gen, device=gen.device) * per_block).long()  # (N, blocks)
    noised = decode_states(decoded, state.repeat_interleave(B, 1)[:, None])  # (N, 1, R)
    hidden = stream_hidden(student, prompt, decoded.clean, noised, B)[:, 0]  # (N, R, d)
    first = torch.arange(R, device=gen.device) % B == 0
    scored = (decoded.tokens != PAD) & (first | (noised[:, 0] == MASK))
    with torch.no_grad():
        target = full_precision(teacher.logits(causal_hidden(teacher, prompt, decoded.tokens)[scored]))  # (M, V)
    return divergence(full_precision(student.logits(hidden[scored])), target, cfg.opd_divergence, cfg.opd_beta).mean()


def update(cfg, world, student, teacher, outputs, prompt, decoded, gen, run):
    """One step on opd_weight * D + opd_anchor * CFT loss."""
    with half(cfg, gen.device):
        distance = opd_loss(cfg, student, teacher, prompt, decoded, gen)
    loss = cfg.opd_weight * distance
    if cfg.opd_anchor:
        loss = loss + cfg.opd_anchor * cft_loss(cfg, world, student, outputs, gen)
    return {"grad_norm": run.update(loss), "loss": loss.item(), "divergence": distance.item()}


def main(cfg):
    world = load_world(cfg)
    teacher, _ = load_stage(cfg, "ar", world)
    student, _ = load_stage(cfg, "cft", world)
    run = Run(cfg, "opd", student, world)
    outputs = teacher_outputs(cfg, world, teacher)
    for step in run.steps():
        gen = generator(cfg, "opd", step, device_of(cfg))
        prompt, decoded, rollout_valid = rollout(cfg, world, student, gen)
        log = update(cfg, world, student, teacher, outputs, prompt, decoded, gen, run) | {"rollout_valid": rollout_valid}
        if run.time_to_validate():
            log |= validate(cfg, world, student)
        run.log(**log)


if __name__ == "__main__":
    script(main, __doc__)
