"""RL in which the choice of slots belongs to the policy, and a forward has a price.

    python experiments/rl_commits.py --config toy --price 0.05 --run_dir runs/commits

train_rl.py holds the slots of each step fixed: which are committed together does not reach its
gradient, though it decides about collisions and speed. Here roll-outs *draw* their commits: an
open slot is committed with probability confidence^power, its confidence being the highest
probability. So a step has a likelihood,

    sum over open slots of   power log c  if committed,   log(1 - c^power)  if not,

beside that of the tokens (mask-aware policy gradients, arXiv 2607.15200), and both are in the
ratio. The reward loses `price` for every forward of the answer. Decoding afterwards is as ever.

Needs finished AR and CFT checkpoints, as train_rl.py does, or --teacher and --init; writes where
train_rl.py writes: give it a --run_dir of its own. For a CPU, with --trace bound.
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from plumbing.script import script  # noqa: E402  first: it sets how threads wait

import dataclasses  # noqa: E402
from dataclasses import dataclass  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from config import Config  # noqa: E402
from data import PAD, draw_batch, tensors  # noqa: E402
from diffusion import decode_states, predict_blocks, take_blocks  # noqa: E402
from model import GREEDY, Sampling  # noqa: E402
from opd_variants import every_step  # noqa: E402
from ours.bound import write  # noqa: E402
from plumbing.checkpoint import device_of, start_from  # noqa: E402
from plumbing.settings import Real, Switch, Text, UserError  # noqa: E402
from sampler import block_decode, unfinished  # noqa: E402
from trainer import Run, autocast, load_world, rng_for, rule_of  # noqa: E402
from train_cft import validate  # noqa: E402
from train_rl import advantages, policy_loss, score_answers  # noqa: E402

LEAST = 1e-4  # a choice is never quite certain, so that its logarithm is finite


@dataclass(frozen=True)
class Options:
    price: Real(0, 1) = 0.05        # of a forward of the answer, in units of the reward
    power: Real(above=0) = 2.0      # a slot is committed with probability confidence^power
    choice: Switch() = True         # false: slots are held fixed in the ratio, as in train_rl.py


@dataclass(frozen=True)
class CommitsConfig(Config):
    """The settings of a run, these options among them: a checkpoint belongs to its variant."""
    rl_commits: Text() = ""


def commit_probability(logp, power):
    """Probability of each slot to be committed: logp (..., B, V) -> (..., B)."""
    return (logp.amax(-1) * power).exp().clamp(LEAST, 1 - LEAST)


@dataclass(frozen=True)
class Drawn:
    """Commits slots by chance: each open one with commit_probability; the surest if none is."""
    power: float
    rng: torch.Generator

    def choose(self, logp, open_, forced):
        """As sampler.Threshold.choose: logp (N, B, V), open_ and forced (N, B) -> (N, B)."""
        p = commit_probability(logp, self.power)
        u = torch.rand(p.shape, generator=self.rng)
        drawn = (open_ & (u < p)) | forced
        surest = F.one_hot(torch.where(open_, p, -1.0).argmax(1), p.shape[1]).bool()
        return torch.where(drawn.any(1, keepdim=True), drawn, surest & open_)


def replay_steps(model, prompt, decoded, block_size, power):
    """Log-probabilities of a decode by the rule Drawn, in one forward. Differentiable.

    -> those of the tokens (N, R), 0 outside the response; those of the choices (N, M, B), a
    segment a step of each block; and which of those were choices, bool (N, M, B)."""
    B, (N, R) = block_size, decoded.tokens.shape
    step, block, shown = every_step(decoded, B)                   # (N, R), (N, M), (N, M)
    noised, _ = decode_states(decoded, block, shown, B)           # (N, M, B)
    hidden = predict_blocks(model, prompt, decoded.clean, noised, block)  # (N, M, B, d)
    logp = F.log_softmax(model.logits(hidden), dim=-1)            # (N, M, B, V)

    # Tokens: each in the step that committed it.
    here = take_blocks(step, block, B) == shown[..., None]        # (N, M, B)
    token = take_blocks(decoded.clean, block, B)
    of_token = logp.gather(-1, token[..., None])[..., 0][here]    # (n,)
    row, segment, slot = here.nonzero(as_tuple=True)
    tokens = of_token.new_zeros(N, R).index_put((row, block[row, segment] * B + slot), of_token)

    # Choices: in the steps that a block took, every open slot but a first one.
    taken = take_blocks(step, block, B).amax(-1) >= shown         # (N, M)
    open_ = unfinished(noised.flatten(0, 1)).view_as(noised) & taken[..., None]
    committed = take_blocks(decoded.commit_step, block, B) == shown[..., None]
    first = (torch.arange(B) == 0) & (shown[..., None] == 0)      # always committed
    p = commit_probability(logp, power)                           # (N, M, B)
    chances = torch.where(committed, p, 1 - p).log()
    # One alone that was the surest: drawn, or taken as none was. p q + (1 - p) q = q.
    surest = F.one_hot(torch.where(open_, p, -1.0).argmax(-1), B).bool()
    alone = (committed & open_).sum(-1, keepdim=True) == 1
    sure = alone & surest & committed & (shown[..., None] > 0)
    is_choice = open_ & ~first & ~sure
    return tokens, torch.where(is_choice, chances, 0.0), is_choice


def sampled(cfg, options, model, prompt, max_len, rng):
    """A group of responses to each prompt, their commits drawn, as parts (ours/bound.py)."""
    def decoder(own, read, length, greedily):
        rule = rule_of(own, own.rl_tau) if greedily else Drawn(options.power, rng)
        how = GREEDY if greedily else Sampling(1.0, rng)
        return block_decode(model, read, length, own.block_size, rule, how)
    return write(cfg, decoder, prompt, max_len, cfg.rl_group)


def update(cfg, options, run, prompt, decoded, advantage):
    """rl_epochs updates, as train_rl.update, with the choices among the tokens -> for the log."""
    is_token = decoded.tokens != PAD                              # (N, R)
    old, log = None, {}
    for _ in range(cfg.rl_epochs):
        with autocast(cfg, prompt.device):
            tokens, choices, is_choice = replay_steps(
                run.model, prompt, decoded, cfg.block_size, options.power)
        logp, counted = tokens, is_token
        if options.choice:
            logp = torch.cat((tokens, choices.flatten(1)), dim=1)
            counted = torch.cat((is_token, is_choice.flatten(1)), dim=1)
        old = logp.detach() if old is None else old
        loss, _ = policy_loss(logp, old, advantage, counted, cfg.rl_eps_low, cfg.rl_eps_high)
        log |= run.update(loss)
    return log


def main(cfg, options):
    if cfg.trace != "bound" or device_of(cfg).type != "cpu":
        raise UserError("commits are drawn in the answer's block, on a CPU: use --trace bound "
                        "--device cpu")
    cfg = CommitsConfig(**vars(cfg), rl_commits=repr(options))
    world = load_world(cfg)
    model = start_from(cfg, world, "cft")
    run = Run(cfg, "rl", model, world)
    with_target = np.flatnonzero(world.train.target >= 0)
    for step in run.steps():
        rng = rng_for(cfg, "rl", step)
        rows = with_target[draw_batch(len(with_target), cfg.rl_prompts, rng)]
        prompt, _ = tensors(world.train, rows, device_of(cfg))
        _, (own, read, decoded) = sampled(cfg, options, model, prompt, world.max_response, rng)
        rows = rows.repeat(cfg.rl_group)

        rewards, log = score_answers(cfg, world, rows, decoded)
        rewards = rewards - options.price * decoded.forwards.numpy()
        groups = torch.from_numpy(rewards).float().view(-1, cfg.rl_group)
        advantage, signal = advantages(groups)
        log |= {"signal": signal.float().mean().item(),
                "forwards": decoded.forwards.float().mean().item()}
        if signal.any():
            kept = signal.repeat_interleave(cfg.rl_group)
            log |= update(own, options, run, read[kept], decoded.take(kept),
                          advantage.flatten()[kept])
        if run.time_to_validate():
            log |= validate(cfg, world, model)
        run.log(**log)


if __name__ == "__main__":
    script(main, __doc__, also=Options)
