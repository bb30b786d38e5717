"""Stage 1, AR: the teacher, a GPT that writes a reasoning trace and then the ranking.

    python train_ar.py --config toy      # on 2 CPU cores
    python train_ar.py --config small    # Amazon Beauty

Next-token cross-entropy on the response. Traces are written by rule from the prompt; answers by
the oracle (toy) or by a learned scorer that only writes training data (Beauty). The paper's teacher
is this *and then RL*: see `make paper`.

metrics.jsonl, in runs/<config>/seed<seed>/ar/, has the loss of every step and, at some steps,
figures of 64 validation users: valid (share of valid answers), match (share of tokens as in the
reference) and tokens_per_forward.

All stages share trainer.Run: run.steps() yields the numbers of the steps and saves in between,
run.update(loss) is one step of the optimisers, run.log(...) writes a line. Also from there:
autocast (bfloat16), rng_for (a seeded generator), validate (the figures above).
"""
import torch
import torch.nn.functional as F

from data import draw_examples, examples_of, tensors, token_weights
from model import causal_hidden
from plumbing.checkpoint import start_from
from plumbing.processes import device_of, per_process
from plumbing.script import script
from trainer import Run, ar_decoder, autocast, load_world, rng_for, validate


def weighted_nats(model, hidden, token, weight):
    """Cross-entropy of tokens (n,) under hidden states (n, d), in nats, times weight (n,).

    The result is a sum, a scalar."""
    logits = model.logits(hidden)                                 # (n, V)
    nats = F.cross_entropy(logits, token, reduction="none")       # (n,)
    return (nats * weight).sum()


def ar_loss(cfg, model, prompt, response):
    """The AR loss in nats a token, a scalar: prompt (N, P), response (N, R).

        L = sum_i w_i (-log p(y_i | y_<i, prompt)) / sum_i w_i
    Answer tokens have the weight answer_weight, trace tokens 1 (GR2, arXiv 2602.07774)."""
    weight = token_weights(response, cfg.answer_weight)           # (N, R)
    real = weight > 0
    with autocast(cfg, prompt.device):
        hidden = causal_hidden(model, prompt, response)           # (N, R, d)
        total = weighted_nats(model, hidden[real], response[real], weight[real])
    return total / weight.sum()


def main(cfg):
    world = load_world(cfg)
    model = start_from(cfg, world, "ar")  # random; a later stage gets those of an earlier one
    run = Run(cfg, "ar", model, world)
    kinds = examples_of(world.train, cfg.trace)
    for step in run.steps():
        rng = rng_for(cfg, "ar", step)
        # per_process(n): its part of a batch; all of it, where there is one process.
        examples, rows = draw_examples(kinds, per_process(cfg.batch_size), cfg.answer_share, rng)
        prompt, response = tensors(examples, rows, device_of(cfg))  # (N, P), (N, R)
        log = run.update(ar_loss(cfg, model, prompt, response))
        if run.time_to_validate():
            log |= validate(cfg, world, ar_decoder(model))
        run.log(**log)


if __name__ == "__main__":
    script(main, __doc__)
