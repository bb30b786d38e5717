"""The peer of experiments/peer_sasrec.py, with a small network in place of that of RecTools."""
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from conftest import ROOT

import train_ar
import train_cft
from beauty.amazon import read_beauty
from make_beauty import make_beauty
from scripts import run

sys.path.insert(0, f"{ROOT}/experiments")
import peer_sasrec  # noqa: E402


class Sums(torch.nn.Module):
    """The state after a history is the sum of its vectors, the older ones halved each time."""

    def __init__(self, n_items, dropout):
        super().__init__()
        self.vectors = torch.nn.Parameter(torch.randn(n_items + 1, 8))
        self.item_model = SimpleNamespace(get_all_embeddings=lambda: self.vectors)

    def encode_sessions(self, batch, vectors):
        states, state = [], 0.0
        for token in batch["x"].T:
            state = state / 2 + vectors[token] * (token > 0)[:, None]
            states.append(state)
        return torch.stack(states, 1)


@pytest.fixture
def data(tmp_path, monkeypatch):
    """The sequences and the number of items of a small Beauty."""
    monkeypatch.setattr(peer_sasrec, "network", Sums)
    monkeypatch.chdir(tmp_path)
    make_beauty("data/beauty", n_users=120)
    sequences, items, *_ = read_beauty("data/beauty")
    return sequences, len(items)


def test_ranks_are_those_of_a_loop_and_leave_out_what_the_user_has(data):
    sequences, n_items = data
    net = Sums(n_items, 0.0)
    histories = [own[:-1] for own in sequences]
    items = np.array([[own[-1], 5, 17] for own in sequences])
    chosen, rank = peer_sasrec.scored(net, histories, items)
    vectors = net.vectors[1:].detach().double().numpy()
    for n, history in enumerate(histories):
        state = sum(vectors[item] / 2 ** k for k, item in enumerate(history[::-1]))
        score = vectors @ state
        score[history] = -np.inf
        assert np.allclose(chosen[n], score[items[n]], atol=1e-4)
        assert rank[n] == (score > score[items[n, 0]] + 1e-6).sum()


def test_a_peer_never_learns_from_the_items_that_are_cut(data):
    """Others in their place change no weight; others before them do."""
    sequences, n_items = data
    for cut in (1, 2):
        weights = []
        options = peer_sasrec.Options(epochs=1, validate=cut == 2)
        for place in (None, -cut, -cut - 1):
            other = [own.copy() for own in sequences]
            for own in other if place else ():
                own[place:] = (own[place:] + 7) % n_items
            weights.append(peer_sasrec.train_peer(options, other, n_items, 0).vectors.detach())
        assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_the_tables(data, monkeypatch, tmp_path):
    sequences, _ = data
    small = ("--config", "small", "--n_test", "1000")
    for stage in (train_ar, train_cft):
        run(stage, monkeypatch, tmp_path, *small)
    run(peer_sasrec, monkeypatch, tmp_path, *small, "--into", "tables", "--epochs", "1")
    found = json.loads((tmp_path / "tables/beauty_catalogue.json").read_text())
    ten, everyone = found["same_ten"], found["catalogue"]
    for name in ("R@1", "N@10"):
        share = everyone["prerank"]["R@10"]
        assert everyone["prerank"][name] == pytest.approx(ten["prerank"][name] * share, abs=1e-5)
        low, mean, high = found["claims"]["SASRec − prerank"][name]
        assert mean == pytest.approx(ten["SASRec"][name] - ten["prerank"][name], abs=2e-6)
