"""Invariants of what we add to the paper (ours/): the commit rule, what leaves OPD's target, the
wording dial."""
import itertools
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from config import Config
from conftest import gen
from data import ANSWER, EOS, LABEL, NONE, PAD, PROFILE, Split, faithfulness, statements
from model import FORBIDDEN
from ours.commit import Apart
from ours.exclude import exclude_shown
from ours.misplace import misplace
from ours.wording import entropy_bits, reword
from plumbing.settings import UserError
from sampler import Decoded, Threshold
from toy.world import toy_world


# --- Slots that want one label ------------------------------------------------------------------

def test_choices_equal_loops_and_every_step_makes_progress():
    N, B, V = 200, 5, 6
    logits = 3 * torch.randn(N, B, V, generator=gen(1), dtype=torch.float64)
    logits[:, 3] = logits[:, 1]  # equally sure: the left one
    logp = F.log_softmax(logits, -1)
    open_ = torch.rand(N, B, generator=gen(2)) < 0.7
    forced = torch.zeros_like(open_)
    forced[:, 0] = open_[:, 0] & (torch.rand(N, generator=gen(3)) < 0.3)
    for tau, labels in itertools.product((0.5, 0.9, 1.0), (range(2, 5), range(0, 6))):
        chosen = Apart(tau, labels).choose(logp, open_, forced)
        sure = Threshold(tau).choose(logp, open_, forced)
        for n in range(N):
            best, p = logp[n].argmax(-1).tolist(), logp[n].amax(-1).tolist()
            slots = sorted(sure[n].nonzero()[:, 0].tolist(),
                           key=lambda j: (not forced[n, j], -p[j], j))
            expected, taken = set(), set()
            for j in slots:
                if best[j] not in labels or best[j] not in taken:
                    expected.add(j)
                    taken.add(best[j])
            assert set(chosen[n].nonzero()[:, 0].tolist()) == expected
        assert torch.equal(chosen.any(1), open_.any(1))


# --- Labels in a wrong place --------------------------------------------------------------------

def test_a_misplaced_label_is_shown_once_and_what_is_left_is_asked_for():
    N, M, B = 40, 2, 6
    token = torch.rand(N, M, B, generator=gen(1)).argsort(-1) + 5  # all different
    masked = torch.rand(N, M, B, generator=gen(2)) < 0.5
    is_label = torch.rand(N, M, B, generator=gen(3)) < 0.7
    state = torch.where(masked, 1, token)
    possible = (is_label & masked).any(-1) & (is_label & ~masked).any(-1)
    changed = {}
    for share in (0.0, 0.3, 1.0):
        noised, asked = misplace(state, token, masked, is_label, share, gen(4))
        moved = (noised != state).any(-1)
        changed[share] = moved.float().mean() / possible.float().mean()
        assert not (moved & ~possible).any()
        for n, m in moved.nonzero().tolist():
            (i,), (j,) = ((x[n, m] != y[n, m]).nonzero()[:, 0].tolist()
                          for x, y in ((noised, state), (asked, token)))
            assert is_label[n, m, i] and not masked[n, m, i]
            assert is_label[n, m, j] and masked[n, m, j]
            # A label for a label: shown and asked together are the same tokens as before.
            assert noised[n, m, i] == token[n, m, j] and asked[n, m, j] == token[n, m, i]
        assert torch.equal(asked[~moved], token[~moved])
    assert changed[0.0] == 0 and changed[1.0] == 1 and 0.15 < changed[0.3] < 0.45


# --- What a state shows is no target ------------------------------------------------------------

def test_labels_that_a_state_shows_leave_the_targets_of_its_open_slots():
    L1, L2, L3, L4 = range(LABEL, LABEL + 4)
    tokens = torch.tensor([[L3, L2, ANSWER, L1,  L4, L2, L3, EOS]])
    decoded = Decoded(tokens, tokens, None, None, None, 4)
    block = torch.tensor([[0, 1, 1]])
    # Open slots (.) in the states: L3 . A .  |  . . . .  |  L4 . L3 .
    open_ = torch.tensor([[[0, 1, 0, 1], [1, 1, 1, 1], [0, 1, 0, 1]]]).bool()
    scored = torch.tensor([[[1, 1, 0, 1], [1, 1, 1, 1], [1, 1, 0, 1]]]).bool()
    target = torch.randn(int(scored.sum()), LABEL + 4, generator=gen())
    got = exclude_shown(target, decoded, block, open_, scored)
    out = (got == FORBIDDEN) & (target != FORBIDDEN)
    expected = torch.zeros_like(out)
    # Of the third state slot 1 alone: slot 0 stands there, the last slot is [EOS]. The trace is
    # free to name a label that is shown, and nothing of the trace counts as shown.
    expected[8, [L3, L4]] = True
    assert torch.equal(out, expected)
    assert torch.equal(got[~out], target[~out])


# --- The wording dial ---------------------------------------------------------------------------

CFG = Config(trace="free", n_train=2000, n_val=50, n_test=300)
WORDINGS = ("token", "statement", "trace")


@pytest.fixture(scope="module")
def world():
    return toy_world(CFG)


def splits_of(world):
    return zip(("train", "val", "test"), (world.train, world.val, world.test))


def test_only_traces_change_and_only_to_synonyms(world):
    assert reword(world, "fixed") is world and entropy_bits(world, "fixed") == 0
    assert world.plain(world.test.trace) is world.test.trace
    fixed = [PAD, PROFILE, NONE, *range(LABEL, LABEL + world.n_labels)]
    for wording in WORDINGS:
        new, n = reword(world, wording), len(world.words)
        assert new.words[:n] == world.words and new.checksum != world.checksum
        assert new.words[n:] == [word + "'" for word in world.words[LABEL + world.n_labels:]]
        assert [new.words[t] + "'" for t in new.canonical[n:]] == new.words[n:]
        for name, old in splits_of(world):
            split = getattr(new, name)
            for f in fields(Split):
                same = np.array_equal(getattr(split, f.name), getattr(old, f.name))
                assert same == (f.name != "trace"), f.name
            assert np.array_equal(new.plain(split.trace), old.trace)
            assert (split.trace == old.trace)[np.isin(old.trace, fixed)].all()
            # Every wording of a true trace is true.
            plain = new.plain(split.response)
            assert (faithfulness(plain, old.trace, world.n_labels) == 1).all()
        few = reword(toy_world(replace(CFG, n_train=7)), wording)     # the first users are the same
        assert np.array_equal(few.train.trace, new.train.trace[:7])


def test_coins_are_fair_and_shared_as_the_dial_says(world):
    first, n = LABEL + world.n_labels, len(world.words)
    for wording in WORDINGS:
        new = reword(world, wording)
        by_statement, by_trace = [], []
        for row in new.train.trace:
            parts = [[token for token in part if token >= first]
                     for part in statements(row, world.n_labels)]
            by_statement += [np.mean([token >= n for token in part]) for part in parts]
            by_trace.append(np.mean([token >= n for token in sum(parts, [])]))
        by_statement, by_trace = np.array(by_statement), np.array(by_trace)
        assert abs(by_trace.mean() - 0.5) < 0.05
        assert np.isin(by_statement, (0, 1)).all() == (wording != "token")
        assert np.isin(by_trace, (0, 1)).all() == (wording == "trace")
        if wording == "token":  # three words: all alike with probability 2^-2
            assert abs(np.isin(by_statement, (0, 1)).mean() - 0.25) < 0.02
        if wording == "statement":
            assert np.isin(by_trace, (0, 1)).mean() < 0.1
        # As many bits as coins that decide something: words, statements, a trace.
        coins = {"token": 3 + 3 * 8, "statement": 1 + 8, "trace": 1}[wording]
        assert entropy_bits(new, wording) == entropy_bits(world, wording) == coins


def test_words_that_cannot_have_a_synonym_are_refused():
    world = toy_world(replace(CFG, n_train=2, n_val=2, n_test=2))
    for words in ([*world.words, "x0'"], [f"w{i}" for i in range(20000)]):
        with pytest.raises(UserError, match="--wording trace needs a synonym"):
            reword(replace(world, words=words), "trace")
