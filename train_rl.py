"""Stage 4, RL: GRPO with DAPO's corrections, on a re-ranking reward.

    python train_rl.py --config toy  # on 2 CPU cores; valid and ranking hardly change

The student samples a group of responses to each prompt. The reward says how far the target rose.
The ratio compares the probabilities of a token in the very state in which it was committed. It
ignores that an updated model might commit other slots. With --trace bound only answers are
sampled: a prompt is a reference trace. With --block_size 1, where there is no student yet,
it begins with the teacher and trains the teacher (`make paper`).

Logged, beside the figures of CFT:
    reward, sampled_valid, copied    mean reward; shares of valid answers, and of copies of the list
    signal          share of groups whose rewards differ
    replay_off      mean |log-probability replayed - recorded|: rounding, more of it in bfloat16
    ratio_off       mean |r - 1| in the last update: near 0 the policy hardly moved
    clipped         share of tokens beyond the clip in that update
    sampled_nats    mean -log p of the groups kept: it falls as the policy sharpens
"""
import numpy as np
import torch

from data import PAD, draw_rows, examples_of, parse_answers, tensors
from diffusion import replay_logp
from plumbing.checkpoint import start_from
from plumbing.processes import device_of, per_process
from plumbing.script import script
from plumbing.settings import UserError
from sampler import block_decode
from trainer import (Run, autocast, block_decoder, load_world, rng_for, rule_of, sampling_on,
                     validate)


def reward(before, after, k, valid, alpha, conditional):
    """GR2's re-ranking reward (arXiv 2602.07774), arrays (N,) -> (N,).

        R = (before - after) / k + alpha * [format bonus],   and -1 for an invalid answer
    before, after: rank of the target (0 = first) in the incoming list and in the answer; k: list
    length. -1 is lower than the reward of any valid answer; with 0, an invalid answer would beat
    every answer that demotes the target. The bonus is paid only if the target rose or stayed first.
    GR2 found that an unconditional bonus (conditional=False) teaches a model to copy the input."""
    rise = (before - after) / k
    stayed_first = (before == 0) & (after == 0)
    bonus = (rise > 0) | stayed_first if conditional else np.ones_like(valid)
    return np.where(valid, rise + alpha * bonus, -1.0)


def advantages(rewards):
    """A = (reward - mean) / std among the samples of a prompt (GRPO, arXiv 2402.03300).

    rewards (G, n) -> A (G, n), and which groups (G,) carry a signal: one whose rewards are all
    equal has none and is dropped (DAPO)."""
    centred = rewards - rewards.mean(1, keepdim=True)
    signal = centred.abs().amax(1) > 1e-6
    return centred / (rewards.std(1, keepdim=True) + 1e-6), signal


def policy_loss(logp, old_logp, advantage, is_token, eps_low, eps_high):
    """DAPO (arXiv 2503.14476, eq. 8): the clipped surrogate, a mean over all tokens.

        L = - 1/#tokens sum_{n,i} min(r A, clip(r, 1 - eps_low, 1 + eps_high) A)
        r = exp(logp - old_logp); beyond the clip, on the side that A favours: no gradient
    logp, old_logp, is_token (N, R), advantage (N,) -> the loss, and the ratio r (N, R)."""
    ratio = torch.exp(logp - old_logp)
    A = advantage[:, None]
    clipped = ratio.clamp(1 - eps_low, 1 + eps_high)
    surrogate = torch.minimum(ratio * A, clipped * A)
    return -(surrogate * is_token).sum() / is_token.sum(), ratio


def score_answers(cfg, world, rows, decoded):
    """Rewards (N,) of responses to training rows (N,), and figures for the log."""
    incoming = world.train.incoming[rows]                         # (N, K) labels
    target = world.train.target[rows, None]                       # (N, 1)
    answers = parse_answers(decoded.tokens.cpu().numpy(), incoming)
    before = (incoming == target).argmax(1)
    after = (answers.order == target).argmax(1)
    k = world.train.list_length[rows]
    rewards = reward(before, after, k, answers.valid, cfg.rl_alpha, cfg.rl_conditional)
    copied = answers.valid & answers.identity
    log = {
        "reward": rewards.mean(),
        "sampled_valid": answers.valid.mean(),
        "copied": copied.mean()}
    return rewards, log


def update_policy(cfg, run, prompt, decoded, advantage):
    """rl_epochs updates on the same responses; clipping has an effect from the second on.

    The old log-probabilities come from the first replay, not from the sampler, so the first ratio
    is exactly 1. The sampler's differ by rounding, in bfloat16 by more: it computes in float32.
    prompt (N, P), advantage (N,) -> figures for the log."""
    is_token = decoded.tokens != PAD                              # (N, R)
    old_logp = None
    log = {}

    def mean(x):
        total = (x * is_token).sum()
        return (total / is_token.sum()).item()

    for _ in range(cfg.rl_epochs):
        with autocast(cfg, prompt.device):
            logp = replay_logp(run.model, prompt, decoded, 1.0)   # (N, R)
        if old_logp is None:
            old_logp = logp.detach()
            log["replay_off"] = mean((old_logp - decoded.logp).abs())
        loss, ratio = policy_loss(logp, old_logp, advantage, is_token,
                                  cfg.rl_eps_low, cfg.rl_eps_high)
        log |= run.update(loss)

    off = ratio.detach() - 1                                      # (N, R)
    beyond = (off < -cfg.rl_eps_low) | (off > cfg.rl_eps_high)
    log["ratio_off"] = mean(off.abs())
    log["clipped"] = mean(beyond)
    log["sampled_nats"] = mean(-decoded.logp)
    return log


def main(cfg):
    world = load_world(cfg)
    model = start_from(cfg, world, "rl")
    run = Run(cfg, "rl", model, world)
    examples = examples_of(world.train, cfg.trace)[-1]  # the kind that ends with a ranking
    with_target = np.flatnonzero(world.train.target >= 0)
    if not len(with_target):
        raise UserError("no training list holds its target, so there is nothing to reward: use a "
                        "larger --n_train")

    for step in run.steps():
        rng = rng_for(cfg, "rl", step)

        # 1. Sample a group of responses to each prompt. The rows of a group are adjacent.
        drawn = draw_rows(len(with_target), per_process(cfg.rl_prompts), rng)
        rows = np.repeat(with_target[drawn], cfg.rl_group)        # (N,), N = prompts * group
        prompt, response = tensors(examples, rows, device_of(cfg))  # (N, P)
        decoded = block_decode(model, prompt, response.shape[1], cfg.block_size,
                               rule_of(cfg, cfg.rl_tau), sampling_on(prompt.device, 1.0, rng))

        # 2. Reward them, and compare the samples of a prompt.
        rewards, log = score_answers(cfg, world, rows, decoded)
        groups = torch.from_numpy(rewards).float().view(-1, cfg.rl_group)
        advantage, signal = advantages(groups)                    # (prompts, group), (prompts,)
        log["signal"] = signal.float().mean().item()

        # 3. Several updates on them; the first has ratio 1. Groups without a signal are dropped. If
        # no group has one, all advantages are 0: only momentum and weight decay act then.
        kept = signal if signal.any() else ~signal                # (prompts,)
        kept = kept.repeat_interleave(cfg.rl_group).to(prompt.device)  # (N,)
        advantage = advantage.flatten().to(prompt.device)[kept]
        log |= update_policy(cfg, run, prompt[kept], decoded.take(kept), advantage)
        if run.time_to_validate():
            log |= validate(cfg, world, block_decoder(cfg, model))
        run.log(**log)


if __name__ == "__main__":
    script(main, __doc__)
