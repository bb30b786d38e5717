"""Stage 1, AR: the teacher GR2, a GPT that writes a reasoning trace and then the ranking.

    python train_ar.py --config toy      # 2 minutes on 2 CPU cores; expect "match" (tokens as in the reference) above .97
    python train_ar.py --config small    # Amazon Beauty, 34 minutes on 2 CPU cores; expect match .97

Plain next-token cross-entropy on the response, with the few answer tokens weighted above the many trace tokens (GR2,
arXiv 2602.07774: lambda_answer > lambda_trace). Traces are written by rule from the prompt, answers by the oracle (toy)
or by a learned scorer that exists only to write training data (Beauty).
"""
import torch
import torch.nn.functional as F

from common import Run, draw_batch, generator, half, script, start_from, valid_rate
from config import UserError
from data import ANSWER, load_world, tensors
from model import PAD, ar_decode, causal_hidden


def in_answer(tokens):
    """Which tokens (N, R) stand behind <answer>: bool (N, R)."""
    return (tokens == ANSWER).cumsum(1) - (tokens == ANSWER).long() > 0


def token_weights(response, answer_weight):
    """Loss weight of every token of responses (N, R): 1 in the trace, answer_weight behind <answer>, 0 for padding."""
    return torch.where(in_answer(response), answer_weight, 1.0) * (response != PAD)


def main(cfg):
    if cfg.teacher:
        raise UserError("train_ar.py trains a teacher: leave out --teacher")
    world = load_world(cfg)
    model = start_from(cfg, world, None)
    device = next(model.parameters()).device
    run = Run(cfg, "ar", model, world)
    for step in run.steps():
        gen = generator(cfg, "ar", step, device)
        prompt, response = tensors(world.train, draw_batch(world.train.k, cfg.batch_size, gen), device)
        weight = token_weights(response, cfg.answer_weight)

        # L = sum_i w_i (-log p(y_i | y_<i, prompt)) / sum_i w_i
        with half(cfg, device):
            logits = model.logits(causal_hidden(model, prompt, response)).float()  # (N, R, V)
        nats = F.cross_entropy(logits.transpose(1, 2), response, reduction="none")  # (N, R)
        loss = (nats * weight).sum() / weight.sum()
        norm = run.update(loss)

        mean_nats = lambda part: (nats * part).sum().item() / part.sum().item()
        log = {"loss": loss.item(), "trace_nats": mean_nats(weight == 1), "answer_nats": mean_nats(weight > 1),
               "grad_norm": norm}
        if run.time_to_validate():
            rows = range(min(64, len(world.val)))
            prompt, truth = tensors(world.val, rows, device)
            tokens = ar_decode(model, prompt, world.max_response)[0][:, :truth.shape[1]]
            log |= {"valid": valid_rate(tokens, world.val, rows), "match": ((tokens == truth) | (truth == PAD)).float().mean().item()}
        run.log(**log)


if __name__ == "__main__":
    script(main, __doc__)
