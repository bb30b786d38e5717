"""Stage 1, AR: the teacher GR2, a GPT that writes a reasoning trace and then the ranking.

    python train_ar.py --config toy      # 3 minutes on 2 CPU cores; expect "match" (tokens as in the reference) above .97
    python train_ar.py --config small    # Amazon Beauty, about 20 minutes on 2 CPU cores; expect match .98

Plain next-token cross-entropy on the response, with the few answer tokens weighted above the many trace tokens (GR2,
arXiv 2602.07774: lambda_answer > lambda_trace). Traces are written by rule from the prompt, answers by the oracle (toy)
or by a learned scorer that exists only to write training data (Beauty).

Logged in metrics.jsonl: loss; trace_nats, answer_nats (mean -log p of a token, unweighted); now and then valid (share of valid
answers) and match (share of tokens as in the reference) of 64 validation users.
"""
import torch
import torch.nn.functional as F

from common import Run, draw_batch, generator, half, mine, script, start_from, total, valid_rate
from config import UserError
from data import ANSWER, load_world, tensors
from model import EOS, PAD, ar_decode, causal_hidden


def in_answer(tokens):
    """Which tokens (N, R) stand behind <answer>: bool (N, R)."""
    return (tokens == ANSWER).cumsum(1) - (tokens == ANSWER).long() > 0


def answer_labels(tokens):
    """Which tokens (N, R) belong to the ranking itself, without [EOS] and padding: bool (N, R)."""
    return in_answer(tokens) & (tokens != EOS) & (tokens != PAD)


def token_weights(response, answer_weight):
    """Loss weight of every token of responses (N, R): 1 in the trace, answer_weight behind <answer>, 0 for padding."""
    return torch.where(in_answer(response), answer_weight, 1.0) * (response != PAD)


def misplaced(response, share, generator):
    """Which slot's token each slot of responses (N, R) shows: (N, R) int64, a permutation of the slots. In a share of the rows
    the labels of the answer have moved, most by a place or two; everything else stands where it belongs.

    Whoever writes answers misplaces a label now and then, and then meets a beginning that no reference has. What should
    follow is known all the same: the best of the labels that are left (best_left).
    """
    N, R = response.shape
    slot = torch.arange(R, device=response.device)
    label = answer_labels(response)
    rand = lambda *size: torch.rand(*size, generator=generator).to(response.device)
    reach = 10 * rand(N, 1) ** 3 * (rand(N, 1) < share)  # in places, one draw an example: mostly about one, now and then anywhere
    moved = slot + reach * torch.randn(N, R, generator=generator).to(response.device)
    start, n = label.int().argmax(1, keepdim=True), label.sum(1, keepdim=True)
    moved = moved.clamp(min=start, max=start + n - 1)  # within the answer
    return torch.where(label, moved, slot).argsort(dim=1, stable=True)


def best_left(source):
    """What each slot must become when all before it are taken: source (N, R), the slot whose token a slot shows -> (N, R), the
    first slot whose token is not shown further left. The identity if source is."""
    return source.flip(1).cummin(1).values.flip(1)


def main(cfg):
    if cfg.teacher:
        raise UserError("train_ar.py trains a teacher: leave out --teacher")
    world = load_world(cfg)
    model = start_from(cfg, world, None)
    device = next(model.parameters()).device
    if cfg.compile and device.type == "cuda":
        model.run_block = torch.compile(model.run_block)
    run = Run(cfg, "ar", model, world)
    for step in run.steps():
        gen = generator(cfg, "ar", step)
        prompt, response = tensors(world.train, draw_batch(len(world.train), cfg.batch_size, gen), device)
        weight, answer = token_weights(response, cfg.answer_weight), in_answer(response) & (response != PAD)
        # In half of the examples at the end, in none at the start: a model that does not yet know the order learns it late, or
        # never, from orders that are broken (toy: exact answers .40 with half from the start, .60 like this, .61 with none).
        source = misplaced(response, cfg.ar_misplace * step / run.n_steps, gen)
        shown, response = response.gather(1, source), response.gather(1, best_left(source))

        rows = mine(cfg.batch_size)  # of several processes each takes a part

        # L = sum_i w_i (-log p(y_i | z_<i, prompt)) / sum_i w_i, z being what is shown: y, but for misplaced labels
        with half(cfg, device):
            logits = model.logits(causal_hidden(model, prompt[rows], shown[rows])).float()  # (N, R, V)
        nats = F.cross_entropy(logits.transpose(1, 2), response[rows], reduction="none")  # (N, R)
        loss = (nats * weight[rows]).sum() / weight.sum()
        log = run.update(loss)

        mean_nats = lambda part: (total((nats * part[rows]).sum()) / part.sum()).item()
        log |= {"trace_nats": mean_nats((weight > 0) & ~answer), "answer_nats": mean_nats(answer)}
        if run.time_to_validate():
            rows = range(min(64, len(world.val)))
            prompt, truth = tensors(world.val, rows, device)
            tokens = ar_decode(model, prompt, world.max_response)[0][:, :truth.shape[1]]
            log |= {"valid": valid_rate(tokens, world.val, rows), "match": ((tokens == truth) | (truth == PAD)).float().mean().item()}
        run.log(**log)


if __name__ == "__main__":
    script(main, __doc__)
