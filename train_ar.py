"""Stage 1, AR: the teacher, a GPT that writes a reasoning trace and then the ranking.

    python train_ar.py --config toy      # 2 minutes on 2 CPU cores; expect match above .97
    python train_ar.py --config small    # Amazon Beauty, 20 minutes; expect match .98

Next-token cross-entropy on the response. The few answer tokens weigh more than the many trace
tokens (GR2, arXiv 2602.07774: lambda_answer > lambda_trace). Traces are written by rule from the
prompt; answers by the oracle (toy) or by a learned scorer that only writes training data (Beauty).
The paper's teacher is this *and then RL*: `train_rl.py` with `--block_size 1` on its weights.

Logged in metrics.jsonl: loss; trace_nats and answer_nats (mean -log p of a token, unweighted); now
and then, of 64 validation users, valid (share of valid answers) and match (share of tokens as in
the reference).
"""
from plumbing.script import script  # first: it sets how threads wait, before torch is loaded

import torch
import torch.nn.functional as F

from data import PAD, draw_batch, in_answer, tensors, token_weights
from model import causal_hidden
from ours.bound import mean_loss, packed, requests
from ours.labels import best_left, misplaced
from plumbing.checkpoint import device_of, start_from
from plumbing.settings import UserError
from trainer import Run, ar_write, autocast, load_world, rng_for, valid_rate


def ar_loss(cfg, model, prompt, response, shown_from):
    """The loss, and -log p of every token (N, R).

        L = sum_i w_i (-log p(y_i | y_<i, prompt)) / sum_i w_i

    prompt (N, P), response (N, R). shown_from (N, R), ours: place i shows token shown_from[i].
    Without misplaced labels it is 0, 1, 2, ..., and read = target = response."""
    weight = token_weights(response, cfg.answer_weight)           # (N, R)
    read = response.gather(1, shown_from)                         # ours; the paper: response
    target = response.gather(1, best_left(shown_from))            # ours; the paper: response
    with autocast(cfg, prompt.device):
        hidden = causal_hidden(model, prompt, read)               # (N, R, d)
        logits = model.logits(hidden).transpose(1, 2)             # (N, V, R)
    nats = F.cross_entropy(logits, target, reduction="none")      # (N, R)
    loss = (nats * weight).sum() / weight.sum()
    return loss, nats.detach()


def validate(cfg, world, model, n=64):
    """valid and match on the first validation users."""
    rows = range(min(n, len(world.val)))
    prompt, reference = tensors(world.val, rows, device_of(cfg))
    tokens = packed(ar_write(cfg, model, prompt, world.max_response).tokens, left=False)
    tokens = F.pad(tokens, (0, reference.shape[1] - tokens.shape[1]), value=PAD)
    match = (tokens == reference) | (reference == PAD)
    return {
        "valid": valid_rate(tokens, world.val, rows),
        "match": match.float().mean().item()}


def main(cfg):
    if cfg.teacher:
        raise UserError("train_ar.py trains a teacher: leave out --teacher")
    world = load_world(cfg)
    model = start_from(cfg, world, None)
    run = Run(cfg, "ar", model, world)
    for step in run.steps():
        rng = rng_for(cfg, "ar", step)
        rows = draw_batch(len(world.train), cfg.batch_size, rng)
        prompt, response = tensors(world.train, rows, device_of(cfg))
        # The share of misplaced labels grows from 0: a model that does not know the right order
        # yet cannot learn it from wrong ones.
        share = cfg.ar_misplace * step / run.n_steps
        parts = requests(cfg, prompt, response)                   # ours; the paper: one
        losses, nats = zip(*(
            ar_loss(own, model, read, written, misplaced(written, share, rng))
            for own, read, written in parts))
        log = run.update(mean_loss(parts, losses))

        nats = torch.cat(nats, dim=1)                             # (N, R)
        response = torch.cat([written for _, _, written in parts], dim=1)
        real = response != PAD
        answer = in_answer(response)
        log["trace_nats"] = nats[real & ~answer].mean().item()
        log["answer_nats"] = nats[real & answer].mean().item()
        if run.time_to_validate():
            log |= validate(cfg, world, model)
        run.log(**log)


if __name__ == "__main__":
    script(main, __doc__)
