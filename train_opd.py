"""Stage 3, OPD: on-policy distillation. The student decodes, the frozen AR teacher corrects it.

    python train_opd.py --config toy      # 50 seconds on 2 CPU cores; expect valid and ranking as they were
    python train_opd.py --config small    # Amazon Beauty, 2 minutes on 1 CPU core; expect valid and ranking as they were

CFT shows the student states made by random masks over the teacher's text; while it decodes it meets others, made by its
own choices. So the student decodes, drawing its tokens, with its cached block sampler, and in the states that it met its
distributions are pulled towards those of the teacher that reads the same finished text (GKD, arXiv 2306.13649). Two corrections:
  - the teacher reads from the left and gives labels to a slot that the student has committed further right; they are
    taken out of the target (not with --opd_exclude false);
  - a state in which two labels are open weighs as much as one with ten: collisions happen there.
The CFT loss stays in the mix as an anchor. The presets take the JSD: forward KL makes the student as unsure as the teacher, which costs
forwards and, on Beauty, validity. And they take a low rate: at three times that, OPD unlearns a part of what a long CFT has learned,
and so do as many steps of CFT (results/findings.md).

Logged: loss (both terms); divergence alone; rollout_valid (share of valid answers in the roll-out, sampled); valid and
tokens_per_forward as in CFT.
"""
import numpy as np
import torch
import torch.nn.functional as F

from common import (Run, device_of, draw_batch, gathered, generator, half, load_stage, mine, of_my_own, script, start_from,
                    total, valid_rate)
from data import LABEL, load_world, tensors
from diffusion import decode_states, every_block, fill_last_block, full_precision, segment_hidden, take_blocks, tokens_shown
from model import MASK, PAD, causal_hidden
from sampler import DRAWN_CLASH, NEVER, Decoded, block_decode
from train_ar import answer_labels, in_answer, token_weights
from train_cft import answer_blocks, cft_loss, teacher_outputs, validate


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


def rollout(cfg, world, student, outputs, gen, own):
    """The student decodes a batch of training prompts: prompt (N, P), Decoded, share of valid ones. gen draws
    the prompts, own what this process draws apart (common.of_my_own).

    With opd_source="teacher" the text is the teacher's and the states are random: a token's commit step is its place in a
    random order of its block, the first slot's 0.
    """
    rows, device = draw_batch(len(outputs), cfg.batch_size, gen)[mine(cfg.batch_size)], device_of(cfg)
    prompt, _ = tensors(world.train, rows, device)
    if cfg.opd_source == "student":
        decoded = block_decode(student, prompt, world.max_response, cfg.block_size, "independent", cfg.opd_tau,
                               cfg.opd_rollout_temperature, own, clash=DRAWN_CLASH)
    else:
        tokens, B = outputs[rows].to(device), cfg.block_size
        filled, real = fill_last_block(tokens, B)
        order = torch.rand(len(rows), filled.shape[1] // B, B, generator=own).to(device)
        order[..., 0] = -1
        step = torch.where(real, order.argsort(-1).argsort(-1).flatten(1), NEVER)
        tokens = F.pad(tokens, (0, filled.shape[1] - tokens.shape[1]), value=PAD)
        decoded = Decoded(tokens, torch.where(real, filled, MASK), step, torch.zeros(step.shape, device=device), None)
    return prompt, decoded, np.mean(gathered(valid_rate(decoded.tokens, world.train, rows)))


def opd_loss(cfg, student, teacher, prompt, decoded, gen, n_labels=0):
    """Weighted mean divergence per token in states of the student's own decode, a scalar.

    One state a block, more for the answer's blocks, drawn uniformly from the steps that the sampler took there. Scored are
        masked     all tokens still masked in that state,
        committed  those that the sampler committed there, or
        next       the leftmost masked one, the only one whose left context the teacher and the student share;
    and the first token of a block, from the clean stream. The target for token i is the teacher's AR distribution at i-1 on
    the student's finished text; nothing behind the first [EOS] counts.
    """
    B, (N, R) = cfg.block_size, decoded.tokens.shape
    block = torch.cat((every_block(decoded.tokens, B), answer_blocks(decoded.tokens, B, cfg.opd_answer_states)), 1)  # (N, M)
    of_block = lambda x: take_blocks(x, block, B)  # (N, R) -> (N, M, B)
    step = of_block(decoded.commit_step)
    n_steps = step.masked_fill(step == NEVER, -1).amax(-1) + 1
    state = (torch.rand(n_steps.shape, generator=gen).to(n_steps.device) * n_steps).long()  # (N, M)
    noised, open_ = decode_states(decoded, block, state, B)  # (N, M, B)
    hidden = segment_hidden(student, prompt, decoded.clean, noised, block)  # (N, M, B, d)
    first = torch.arange(B, device=step.device) == 0
    masked = open_
    if cfg.opd_states == "committed":
        masked = step == state[..., None]
    elif cfg.opd_states == "next":
        masked = masked & (masked.cumsum(-1) == 1)
    scored = of_block(decoded.tokens != PAD) & (first | masked)
    if cfg.opd_cut:
        scored &= ~of_block(behind_a_wrong_label(decoded.tokens, n_labels))
    with torch.no_grad():
        hidden_t = causal_hidden(teacher, prompt, decoded.tokens).view(N, R // B, B, -1)
        hidden_t = hidden_t.gather(1, block[..., None, None].expand(-1, -1, B, hidden_t.shape[-1]))[scored]
        target = full_precision(teacher.logits(hidden_t)) / cfg.opd_temperature  # (scored, V)
        if cfg.opd_exclude:
            # The teacher reads from the left: to the slots before it, it gives labels that the student has committed further right.
            # A block's first token is predicted from the clean text alone, so there nothing is taken that the teacher does not see.
            answer = answer_labels(decoded.tokens)
            shown = tokens_shown(decoded.clean, answer, block, open_, target.shape[1])[:, :, None]  # (N, M, 1, V)
            target = target.masked_fill((shown & (open_ & of_block(answer))[..., None])[scored], -1e4)
    distance = divergence(full_precision(student.logits(hidden[scored])), target, cfg.opd_divergence)
    # A state in which few tokens are left weighs as much as one with many (as 1/t does in the CFT loss): there the last
    # labels must be told from those that are taken. Nor do more states of a block make it weigh more.
    times = (block[:, :, None] == block[:, None]).sum(2)[..., None]  # (N, M, 1)
    tokens = of_block(decoded.tokens != PAD).sum(-1, keepdim=True)
    share = tokens / scored.sum(-1, keepdim=True).clamp(min=1) / times
    weight = (of_block(token_weights(decoded.tokens, cfg.answer_weight)) * share)[scored]
    return (distance * weight).sum() / total(weight.sum())


def behind_a_wrong_label(tokens, n_labels):
    """Which tokens (N, R) stand behind a label that the answer had already: bool (N, R)."""
    answer = in_answer(tokens) & (tokens >= LABEL) & (tokens < LABEL + n_labels)  # (N, R)
    again = (tokens[:, :, None] == tokens[:, None]) & answer[:, None] & answer[:, :, None]  # (N, R, R)
    wrong = again.tril(-1).any(2)
    return wrong.cumsum(1) - wrong.long() > 0


def update(cfg, world, student, teacher, outputs, prompt, decoded, gen, own, run):
    """One step on D + opd_anchor * CFT loss."""
    with half(cfg, prompt.device):
        distance = opd_loss(cfg, student, teacher, prompt, decoded, own, world.n_labels)
    anchor = cfg.opd_anchor * cft_loss(cfg, world, student, outputs, gen) if cfg.opd_anchor else 0.0
    return run.update(distance + anchor) | {"divergence": total(distance).item()}


def main(cfg):
    world = load_world(cfg)
    teacher, _ = load_stage(cfg, "ar", world)
    student = start_from(cfg, world, "cft")
    run = Run(cfg, "opd", student, world)
    outputs = teacher_outputs(cfg, world, teacher)
    for step in run.steps():
        gen = generator(cfg, "opd", step)
        own = of_my_own(gen)
        prompt, decoded, rollout_valid = rollout(cfg, world, student, outputs, gen, own)
        log = update(cfg, world, student, teacher, outputs, prompt, decoded, gen, own, run) | {"rollout_valid": rollout_valid}
        if run.time_to_validate():
            log |= validate(cfg, world, student)
        run.log(**log)


if __name__ == "__main__":
    script(main, __doc__)
