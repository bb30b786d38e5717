"""Stage 3, OPD: on-policy distillation. The student decodes, the frozen AR teacher corrects it.

    python train_opd.py --config toy_few  # after CFT on 300 responses: 3 minutes on 2 CPU cores
    python train_opd.py --config toy      # after CFT on all text; it has little to do

CFT shows states made by random masks over the training text. While it decodes, a student meets
others, made by its own choices. So the student decodes, and in states that it met its
distributions are pulled towards those of the teacher, which reads the same finished text from the
left (GKD, arXiv 2306.13649; OPDLM, arXiv 2606.06712). It pays where responses of the teacher are
few: it takes any prompt, and one parallel forward of the teacher (docs/regimes.md).

The paper takes the forward KL and no anchor, as toy_few does. After CFT on all text the forward KL
only makes the student as unsure as its teacher: there our presets take the JSD, and keep the CFT
loss in the mix.

Logged: loss (both terms); divergence alone; rollout_valid (share of valid answers among those
written); valid and tokens_per_forward as in CFT.
"""
from plumbing.script import script  # first: it sets how threads wait, before torch is loaded

import torch
import torch.nn.functional as F

from data import PAD, draw_batch, tensors, token_weights
from diffusion import decode_states, every_block, predict_blocks, take_blocks
from model import NO_TOKEN, Sampling, causal_hidden
from ours.bound import mean_loss
from ours.labels import exclude_shown
from ours.states import answer_blocks, state_weights
from plumbing.checkpoint import device_of, load_stage, start_from
from sampler import NEVER
from trainer import Run, autocast, load_world, rng_for, roll_out, valid_rate
from train_cft import batch_loss, training_responses, validate


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
        # Infinite where T is 0. So tokens that opd_exclude took out of T are taken out of S too,
        # and the two are compared on the rest.
        student_logits = student_logits.masked_fill(teacher_logits <= NO_TOKEN, NO_TOKEN)
    log_s = F.log_softmax(student_logits, -1)
    if kind == "forward":
        return kl(log_t, log_s)
    if kind == "reverse":
        return kl(log_s, log_t)
    m = beta * log_t.exp() + (1 - beta) * log_s.exp()
    log_m = torch.log(m + 1e-30)  # finite where both are 0
    return beta * kl(log_t, log_m) + (1 - beta) * kl(log_s, log_m)


def draw_steps(decoded, block, block_size, rng):
    """A step of each block (N, M), uniform among those that the sampler took there: (N, M).

    0 for a block after the response's end."""
    step = take_blocks(decoded.commit_step, block, block_size)    # (N, M, B)
    last = step.masked_fill(step == NEVER, -1).amax(-1)           # (N, M)
    n_steps = last + 1
    u = torch.rand(n_steps.shape, generator=rng).to(step.device)
    return (u * n_steps).long()


def opd_loss(cfg, student, teacher, prompt, decoded, rng):
    """Weighted mean divergence a token in states of the student's own decode, a scalar.

    prompt (N, P), decoded: the student's responses (N, R). Nothing after the first [EOS] counts.
    """
    B = cfg.block_size
    tokens = decoded.tokens

    # 1. Draw a state of each block, and see it as the sampler did.
    block = every_block(tokens, B)                                # (N, M)
    extra = answer_blocks(tokens, B, cfg.answer_states)          # ours: more of the answer
    block = torch.cat((block, extra), dim=1)                      # ours
    step = draw_steps(decoded, block, B, rng)
    noised, open_ = decode_states(decoded, block, step, B)        # (N, M, B)

    # 2. Score the slots still masked there, and always slot 0: the clean text predicts it.
    slot0 = torch.arange(B, device=tokens.device) == 0
    real = take_blocks(tokens != PAD, block, B)                   # (N, M, B)
    scored = real & (slot0 | open_)
    weight = token_weights(tokens, cfg.answer_weight)             # (N, R)
    weight = take_blocks(weight, block, B)                        # (N, M, B)
    if cfg.answer_states:                                         # ours
        weight = weight * state_weights(block, scored, real)      # (N, M, 1)
    weight = weight[scored]                                       # (n,)

    # 3. The student predicts them from the state, the teacher from the finished text before them.
    with autocast(cfg, prompt.device):
        hidden = predict_blocks(student, prompt, decoded.clean, noised, block)  # (N, M, B, d)
        predicted = student.logits(hidden[scored])                # (n, V)
        with torch.no_grad():
            hidden = causal_hidden(teacher, prompt, tokens)       # (N, R, d)
            hidden = take_blocks(hidden, block, B)                # (N, M, B, d)
            target = teacher.logits(hidden[scored])               # (n, V)
    if cfg.opd_exclude:                                           # ours
        target = exclude_shown(target, decoded, block, open_, scored)

    # 4. Pull the one towards the other.
    distance = divergence(predicted, target, cfg.opd_divergence)  # (n,)
    total = (distance * weight).sum()
    return total / weight.sum()


def main(cfg):
    world = load_world(cfg)
    teacher, _ = load_stage(cfg, "ar", world)
    student = start_from(cfg, world, "cft")
    run = Run(cfg, "opd", student, world)
    responses = training_responses(cfg, world) if cfg.opd_anchor else None  # the anchor's text
    for step in run.steps():
        rng = rng_for(cfg, "opd", step)

        # The student writes, to any prompts, as it is served; several of one prompt are drawn.
        n_prompts = min(cfg.opd_prompts, len(world.train))
        rows = draw_batch(n_prompts, cfg.batch_size, rng)         # (prompts,)
        prompt, _ = tensors(world.train, rows, device_of(cfg))
        how = Sampling(float(cfg.opd_group > 1), rng)
        parts = roll_out(cfg, student, prompt, world.max_response, cfg.opd_tau, how, cfg.opd_group)

        # The teacher corrects.
        losses = [opd_loss(own, student, teacher, read, decoded, rng)
                  for own, read, decoded in parts]
        distance = loss = mean_loss(parts, losses)
        if cfg.opd_anchor:                                        # ours
            anchor = batch_loss(cfg, world, student, responses, rng)
            loss = distance + cfg.opd_anchor * anchor
        log = run.update(loss)

        log["divergence"] = distance.item()
        answers, rows = parts[-1][-1].tokens, rows.repeat(cfg.opd_group)  # (N, R), (N,)
        log["rollout_valid"] = valid_rate(answers, world.train, rows)
        if run.time_to_validate():
            log |= validate(cfg, world, student)
        run.log(**log)


if __name__ == "__main__":
    script(main, __doc__)
