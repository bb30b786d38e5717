"""experiments/rl_commits.py: the likelihood of drawn commits, and a tiny run."""
from collections import Counter

import pytest
import torch

import rl_commits
import scripts
import train_ar
import train_cft
from conftest import gen, tiny_gpt, words
from data import PAD
from model import Sampling
from rl_commits import Drawn, replay_steps
from sampler import block_decode


@pytest.mark.parametrize("power", [1.0, 3.0])
@torch.no_grad()
def test_trajectories_come_as_often_as_their_likelihood_says(power):
    n, B = 20000, 3
    model, prompt = tiny_gpt(3), words(1, 3, seed=7).expand(n, -1)
    rng = gen(1)
    decoded = block_decode(model, prompt, B, B, Drawn(power, rng), Sampling(1.0, rng))
    tokens, choices, _ = replay_steps(model, prompt, decoded, B, power)
    likely = (tokens.sum(1) + choices.sum((1, 2))).exp()
    in_response = decoded.tokens != PAD
    ways = [tuple(row) for row in torch.cat(
        (decoded.tokens, decoded.commit_step.masked_fill(~in_response, -1)), dim=1).tolist()]
    whole = in_response.all(1)  # after an early [EOS] a trajectory forgets what it committed there
    count, found = Counter(ways), 0
    for way, p, is_whole in set(zip(ways, likely.tolist(), whole.tolist())):
        if is_whole and p > 0.003:
            found += 1
            assert abs(count[way] / n - p) < 5 * (p / n) ** 0.5, way
    assert found > 5


def test_forced_slots_are_committed_and_one_at_least():
    logp = torch.full((200, 4, 10), -5.0)
    open_ = torch.tensor([True, True, True, False]).expand(200, -1)
    forced = torch.zeros_like(open_)
    logp[:, 2, 3] = -1.0
    chosen = Drawn(9.0, gen()).choose(logp, open_, forced)
    assert chosen.any(1).all() and not chosen[:, 3].any()
    assert chosen[:, 2].float().mean() > 0.9  # the surest, where none was drawn
    forced[:, 0] = True
    chosen = Drawn(9.0, gen()).choose(logp, open_, forced)
    assert chosen[:, 0].all() and not chosen[:, 2].all()


def test_a_run_moves_the_weights_with_the_choice_and_without(monkeypatch, capsys, tmp_path):
    few = ("--config", "toy", "--rl_group", "4", "--rl_steps", "2")
    for module in (train_ar, train_cft):
        scripts.run(module, monkeypatch, tmp_path, *few)
    ends = []
    for choice in ("true", "false"):
        place = tmp_path / choice
        scripts.run(rl_commits, monkeypatch, place, *few, "--choice", choice,
                    "--teacher", scripts.checkpoint(tmp_path, "ar"),
                    "--init", scripts.checkpoint(tmp_path, "cft"))
        ends.append(torch.load(scripts.checkpoint(place, "rl"), weights_only=True)["model"])
    assert any(not torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    said = scripts.refused(rl_commits, monkeypatch, capsys, tmp_path, *few, "--trace", "free")
    assert "--trace bound" in said
