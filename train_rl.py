"""Stage 4, RL: GRPO with DAPO's corrections, on a re-ranking reward.

    python train_rl.py --config toy      # 45 seconds on 2 CPU cores; expect valid as it was and the ranking no better: CFT is nearly perfect there
    python train_rl.py --config small    # Amazon Beauty, 7 minutes on 1 CPU core; expect valid and ranking as they were

The student samples a group of responses to each prompt; the reward says how far the true target rose. Importance ratios
are exact for the decode: log-probabilities are replayed in the very states in which the tokens were committed.

The CFT loss stays in the mix as an anchor, where others put a KL to the reference model: without it fewer answers are valid
(results/toy/hacking.md). No gradient tells the model so, since the choice of positions is held fixed in the likelihood.

Logged: reward, sampled_valid, copied (mean reward, shares of valid answers and of copied lists in the roll-out); signal (share of
groups whose rewards differ); replay_off (mean |log-probability replayed - recorded|: 0 but for bfloat16); ratio_off and clipped
(mean |r - 1| and share of tokens beyond the clip, in the last update: near 0 the policy hardly moved); sampled_nats (mean -log p
of what was sampled: it falls as the policy sharpens); valid and tokens_per_forward as in CFT.
"""
import numpy as np
import torch

from common import Run, device_of, draw_batch, gathered, generator, half, load_stage, mine, of_my_own, script, start_from, total
from data import load_world, parse_answers, tensors
from diffusion import replay_logp
from model import PAD
from sampler import DRAWN_CLASH, block_decode
from train_cft import cft_loss, teacher_outputs, validate


def reward(before, after, k, valid, alpha, conditional):
    """GR2's re-ranking reward (arXiv 2602.07774), arrays (N,) -> (N,).

    before, after: rank of the target (0 = first) in the incoming list and in the answer; k: list length.
        R = (before - after) / k + alpha * [format bonus],   and -1 for an invalid answer
    -1 is below the worst valid answer, (0 - (k-1)) / k: with 0 an invalid answer would beat every demotion. The bonus is
    paid only if the target rose, or stood first and still does: GR2 found that paid for format alone (conditional=False) it
    teaches to copy the incoming order.
    """
    rank = (before - after) / k
    bonus = (rank > 0) | ((before == 0) & (after == 0)) if conditional else np.ones_like(valid)
    return np.where(valid, rank + alpha * bonus, -1.0)


def advantages(rewards):
    """A = (reward - mean) / std within the samples of one prompt (GRPO, arXiv 2402.03300): rewards (G, n) -> A (G, n), and which
    groups (G,) carry a signal: one whose rewards are all equal has none and is dropped."""
    centred = rewards - rewards.mean(1, keepdim=True)
    signal = centred.abs().amax(1) > 1e-6
    return centred / (rewards.std(1, keepdim=True) + 1e-6), signal


def policy_loss(logp, old_logp, advantage, token_mask, eps_low, eps_high, n_tokens):
    """DAPO (arXiv 2503.14476, eq. 8): clipped surrogate, averaged over all tokens of the batch.

        L = - 1/#tokens sum_{n,i} min(r A, clip(r, 1 - eps_low, 1 + eps_high) A),   r = exp(logp - old_logp)
    logp, old_logp, token_mask (N, R), advantage (N,); n_tokens: tokens of the whole batch, of which these rows may be a part.
    Returns the loss, and the ratio (N, R).
    """
    ratio = torch.exp(logp - old_logp)
    A = advantage[:, None]
    surrogate = torch.minimum(ratio * A, ratio.clamp(1 - eps_low, 1 + eps_high) * A)
    return -(surrogate * token_mask).sum() / n_tokens, ratio


def rollout(cfg, world, model, candidates, gen, own):
    """Sample rl_group responses to each of rl_prompts prompts (of several processes, each to its part of them). candidates: rows
    of the training split with a target; gen draws the prompts, own the responses.

    Returns prompt (N, P), Decoded, rewards (G, n) and figures for the log; N = G * n, a group's rows are adjacent.
    """
    rows = candidates[draw_batch(len(candidates), cfg.rl_prompts, gen)[mine(cfg.rl_prompts)]].repeat(cfg.rl_group)
    prompt, _ = tensors(world.train, rows, device_of(cfg))
    decoded = block_decode(model, prompt, world.max_response, cfg.block_size, "independent", cfg.rl_tau, cfg.rl_temperature,
                           own, clash=DRAWN_CLASH)
    incoming = world.train.incoming[rows]
    answers = parse_answers(decoded.tokens.cpu().numpy(), incoming)
    target, k = world.train.target[rows, None], (incoming >= 0).sum(1)
    before, after = (incoming == target).argmax(1), (answers.order == target).argmax(1)
    rewards = reward(before, after, k, answers.valid, cfg.rl_alpha, cfg.rl_conditional)
    log = {"reward": rewards.mean(), "sampled_valid": answers.valid.mean(),
           "copied": (answers.valid & answers.identity).mean()}
    log = {name: np.mean(gathered(value)) for name, value in log.items()}
    return prompt, decoded, torch.from_numpy(rewards).view(-1, cfg.rl_group).float(), log


def update(cfg, world, model, outputs, prompt, decoded, rewards, gen, run):
    """rl_epochs updates on one roll-out; the first has ratio 1, the clip acts from the second on.

    The old log-probabilities are those of the first replay: equal to the sampler's own record in float32 (replay_off in the
    log), and free of rounding differences where bfloat16 replays are much cheaper.
    """
    advantage, signal = advantages(rewards)
    log = {"signal": np.mean(gathered(signal.float().mean().item()))}
    if not log["signal"]:
        return log
    keep = signal.repeat_interleave(cfg.rl_group).nonzero()[:, 0].to(prompt.device)
    if not len(keep):  # others have a signal: take part in their update, with rows that weigh nothing
        keep = torch.arange(cfg.rl_group, device=prompt.device)
    advantage = advantage.flatten().to(prompt.device)[keep]
    prompt, decoded = prompt[keep], decoded.take(keep)
    token_mask, old_logp = (decoded.tokens != PAD) & signal.any().to(prompt.device), None
    n_tokens = total(token_mask.sum())
    mean = lambda x: (total((x * token_mask).sum()) / n_tokens).item()
    for _ in range(cfg.rl_epochs):
        with half(cfg, prompt.device):
            logp = replay_logp(model, prompt, decoded, cfg.block_size, cfg.rl_temperature)
        if old_logp is None:
            old_logp = logp.detach()
            log["replay_off"] = mean((old_logp - decoded.logp).abs())
        loss, ratio = policy_loss(logp, old_logp, advantage, token_mask, cfg.rl_eps_low, cfg.rl_eps_high, n_tokens)
        anchor = cfg.rl_anchor * cft_loss(cfg, world, model, outputs, gen) if cfg.rl_anchor else 0.0
        log |= run.update(loss + anchor)
    ratio = ratio.detach()
    clipped = (ratio < 1 - cfg.rl_eps_low) | (ratio > 1 + cfg.rl_eps_high)
    return log | {"policy_loss": total(loss).item(), "ratio_off": mean((ratio - 1).abs()), "clipped": mean(clipped), "sampled_nats": mean(-decoded.logp)}


def main(cfg):
    world = load_world(cfg)
    model = start_from(cfg, world, "opd")
    run = Run(cfg, "rl", model, world)
    outputs = teacher_outputs(cfg, world, load_stage(cfg, "ar", world)[0])
    candidates = np.flatnonzero(world.train.target >= 0)
    for step in run.steps():
        gen = generator(cfg, "rl", step)
        prompt, decoded, rewards, log = rollout(cfg, world, model, candidates, gen, of_my_own(gen))
        log |= update(cfg, world, model, outputs, prompt, decoded, rewards, gen, run)
        if run.time_to_validate():
            log |= validate(cfg, world, model)
        run.log(**log)


if __name__ == "__main__":
    script(main, __doc__)
