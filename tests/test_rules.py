"""experiments/rules.py: every rule against loops, and the file that is written."""
import json
import math

import torch
import torch.nn.functional as F

from conftest import LENGTHS, gen, left_padded, same_decode, tiny_gpt

import rules
import train_ar
import train_cft
from config import Config
from sampler import NEVER, block_decode
from scripts import refused, run

N, B, V = 100, 6, 12


def by_loops(name, x, p, slots, forced):
    """What a rule with its dial at x commits of the open slots of a row p (B, V)."""
    def entropy(row):
        return -sum(v * math.log(v) for v in row)

    c, h = [max(row) for row in p], [entropy(row) for row in p]
    odds = [math.log(max(row) / sorted(row)[-2]) for row in p]
    alike = {(i, j): 1 - (entropy((p[i] + p[j]) / 2) - (h[i] + h[j]) / 2) / math.log(2)
             for i in slots for j in slots if i != j}
    most = max(alike.values(), default=1)
    q = {i: 1 / (1 + math.exp(-odds[i])) for i in slots}
    for _ in range(2):
        less = {i: sum(alike[i, j] / most * q[j] for j in slots - {i}) for i in slots}
        q = {i: 1 / (1 + math.exp(less[i] - odds[i])) for i in slots}
    key = {"number": lambda i: (i in forced, c[i]), "entropy": lambda i: -h[i],
           "conflicts": q.get}.get(name, c.__getitem__)
    order = sorted(slots, key=key, reverse=True)
    fits = {
        "number": lambda some, last: len(some) <= x,
        "factor": lambda some, last: (len(some) + 1) * (1 - c[last]) < x,
        "certificate": lambda some, last: max(0, 1 - sum(1 - c[i] for i in some)) > x + 1 - c[last],
        "entropy": lambda some, last: sum(h[i] for i in some[:-1]) <= x,
        "conflicts": lambda some, last: q[last] >= x}[name]
    n = max([n for n in range(1, len(order) + 1) if fits(order[:n], order[n - 1])], default=0)
    return set(order[:n]) | forced or set(order[:1])


def test_choices_equal_loops():
    logits = torch.randn(N, B, V, generator=gen(1), dtype=torch.float64)
    logits *= 6 * torch.rand(N, B, 1, generator=gen(2))           # from unsure to sure
    logp = F.log_softmax(logits, -1)
    p = logp.exp().numpy()
    open_ = torch.rand(N, B, generator=gen(3)) < 0.8
    forced = torch.zeros_like(open_)
    forced[:, 0] = open_[:, 0]
    for name in ("number", "factor", "certificate", "entropy", "conflicts"):
        sizes = set()
        for rule in rules.rules_of(Config())[name]:
            for n, chosen in enumerate(rule.choose(logp, open_, forced)):
                slots, must = (set(x[n].nonzero()[:, 0].tolist()) for x in (open_, forced))
                expected = by_loops(name, *vars(rule).values(), p[n], slots, must)
                assert set(chosen.nonzero()[:, 0].tolist()) == expected, (rule, n)
                sizes.add(len(expected))
        assert len(sizes) >= B - 1  # the test has cases


def test_stability_waits_for_two_calm_steps_and_knows_its_rows():
    p = F.log_softmax(9 * torch.eye(V)[:4], -1).expand(2, 4, V)   # two rows, sure of all slots
    rule, open_, no = rules.Stability(0.9), torch.ones(2, 4).bool(), torch.zeros(2, 4).bool()
    first = no.clone()
    first[:, 0] = True
    for logp, forced, expected in ((p, first, 1), (p, no, 1), (p, no, 2)):
        chosen = rule.choose(logp, open_, forced)
        assert chosen.sum(1).tolist() == [expected] * 2
        open_ = open_ & ~chosen
    for seed in (0, 3):
        model, prompt = tiny_gpt(seed), left_padded(LENGTHS, seed)
        together = block_decode(model, prompt, 12, 4, rules.Stability(0.3))
        for n in range(len(prompt)):
            alone = block_decode(model, prompt[n:n + 1], 12, 4, rules.Stability(0.3))
            same_decode(together.take(slice(n, n + 1)), alone)
    assert (together.commit_step[together.commit_step != NEVER] > 0).any()


def test_the_file_of_curves(tmp_path, monkeypatch, capsys):
    for module in (train_ar, train_cft):
        run(module, monkeypatch, tmp_path, "--cft_gold", "true")
    other = {"config": "small", "rule": "factor", "points": [[1, 0.5, 0.5]]}
    (tmp_path / "rules.json").write_text(json.dumps([other, {"config": "toy", "rule": "gone"}]))
    fastest = {name: found[-1:] for name, found in rules.rules_of(Config()).items()}
    monkeypatch.setattr(rules, "rules_of", lambda cfg: fastest)
    run(rules, monkeypatch, tmp_path, "--cft_gold", "true", "--into", str(tmp_path))
    *found, last = json.loads((tmp_path / "rules.json").read_text())
    assert last == other and (tmp_path / "rules.png").exists()
    assert {x["rule"] for x in found} == {*fastest, "at once"}
    for x in found:
        assert x["config"] == "toy" and x["seeds"] == [0] and len(x["made_by"]["code"]) == 12
        assert len(x["points"]) == len(x["dial"]) and all(len(y) == 3 for y in x["points"])
    assert [forwards for forwards, _, _ in found[-1]["points"]] == [1, 1]
    assert "--trace bound" in refused(capsys, run, rules, monkeypatch, tmp_path, "--trace", "free")
