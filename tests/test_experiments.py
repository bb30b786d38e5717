"""experiments/: comparisons at tiny scale, what they keep and what they refuse; interventions on
traces; the weights that come along; own data as a world; the examples of
docs/how-to-test-an-idea.md."""
import dataclasses
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from conftest import ROOT  # first: it puts the code on Python's path

import compare
import evaluate
import induced
import own_world
import puma
import train_ar
import train_cft
import train_opd
import tables
import toy.world
import traces
import trainer
from config import Config
from data import EOS, MASK, NONE, PAD, faithfulness, joined, parse_answers, responses
from diffusion import decode_states, every_block, take_blocks
from entries import ENTRIES, Entry, against, student
from make_beauty import make_beauty
from model import GPT
from ours.wording import consistency, reword
from plumbing.checkpoint import checksum, load_stage, load_tensors
from plumbing.script import script
from plumbing.settings import UserError, parse_args
from sampler import block_decode
from scripts import checkpoint, refused, run

TINY = dict(d_model=16, n_head=2, n_layer=1, n_train=64, n_val=8, n_test=60, batch_size=4,
            n_candidates=4, ar_steps=2, cft_steps=2, opd_steps=2, rl_steps=1, rl_prompts=2,
            rl_group=3, threads=1, tau=0.3)
ENTRY = Entry(
    "Does it run?",
    settings=TINY,
    students={
        "AR": student("ar"),
        "CFT": student("cft", "AR"),
        "more": student("cft", "AR", cft_steps="+2"),
        "rule": student("", "CFT", commit="threshold"),
        "OPD": student("opd", "CFT"),
        "RL": student("rl", "AR", block_size=1),
        "CFT of RL": student("cft", "RL", block_size=19),
        "OPD of RL": student("opd", "CFT of RL")},
    claims=against("CFT", "more", "rule", "OPD"),
    taus=(0.2, 0.9),
    forwards=5.0)


def made_up(cfg, model, split, tau):
    """Scores that depend on all that scores should depend on, in place of a decode. Rankings are
    the better the higher tau is."""
    weights = checksum(model.state_dict())
    rng = np.random.default_rng(int(checksum(weights, cfg.commit, split, tau)[:8], 16))
    n = cfg.n_val if split == "val" else cfg.n_test
    return {"forwards": np.full(n, 10 * (tau or 4)), "valid": rng.random(n).round(),
            "strict ndcg@10": rng.random(n) / 10 + (tau or 0), "faithful": np.ones(n),
            "copied": np.zeros(n)}


@pytest.fixture(autouse=True, scope="module")
def small_worlds():
    """So many users are drawn at a time, whatever is asked for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy.world, "TOY_DRAWN", 200)
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Where weights lie: the tests share what they train."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def compared(monkeypatch, runs):
    """compared(*options) -> the JSON of the comparison ENTRY, and which stages it trained. The
    stages are trained in this process, and scores are made up."""
    trained = []

    def train_stage(job, stage):
        trained.append((job.name, job.cfg.seed, stage))
        importlib.import_module(f"train_{stage}").main(job.cfg)

    def compared(*options, name="tiny", entry=ENTRY, run_dir=runs):
        trained.clear()
        monkeypatch.setitem(ENTRIES, "tiny", entry)
        argv = ["compare.py", name, "--run_dir", str(run_dir), "--seeds", "0", *options]
        monkeypatch.setattr("sys.argv", compare.expanded(argv))
        script(compare.main, compare.__doc__, compare.Options)
        return json.loads((run_dir / "compare" / "tiny.json").read_text()), list(trained)
    monkeypatch.setattr(compare, "train_stage", train_stage)
    monkeypatch.setattr(compare, "decode", made_up)
    monkeypatch.setattr(tables, "draw_curves", lambda students, path: Path(path).touch())
    return compared


# --- compare.py ---------------------------------------------------------------------------------

def test_what_is_compared_is_what_the_scripts_train(monkeypatch, tmp_path):
    """With processes of their own, and real decodes."""
    argv = ["compare.py", "tiny", "--seeds", "3", "--run_dir", str(tmp_path), "--parallel", "2"]
    entry = dataclasses.replace(ENTRY, students={n: ENTRY.students[n] for n in ("AR", "CFT")})
    monkeypatch.setitem(ENTRIES, "tiny", entry)
    for _ in range(2):
        monkeypatch.setattr("sys.argv", compare.expanded(argv))
        script(compare.main, compare.__doc__, compare.Options)
    result = json.loads((tmp_path / "compare" / "tiny.json").read_text())
    line = result["students"]["CFT"]["seeds"]["3"]
    job = compare.make_job(Config(**TINY, run_dir=str(tmp_path)), entry, "CFT", 3)
    world = compare.world_of(job.cfg)
    model, state = load_stage(job.cfg, "cft", world)
    written, forwards = trainer.decode_split(
        job.cfg, world, world.test, trainer.block_decoder(job.cfg, model, line["tau"]))
    scores = evaluate.score(world, world.test, joined(written), forwards)
    for name in ("forwards", "valid", "strict ndcg@10", "faithful"):
        assert line[name] == pytest.approx(scores[name].mean(), abs=1e-5)
    assert state["settings"]["seed"] == 3 and state["finished"]


def test_a_second_run_trains_nothing_and_goes_on_from_what_is_there(compared, runs):
    first, trained = compared()
    assert [name for name, _, _ in trained] == [n for n in ENTRY.students if n != "rule"]
    assert compared() == (first, [])
    assert [(claim["student"], claim["control"]) for claim in first["claims"]] == list(ENTRY.claims)
    students = first["students"]
    assert students["more"]["settings"]["cft_steps"] == 4
    assert students["CFT"]["seeds"]["0"]["tau"] == 0.3              # better than .2; .9 takes 9
    assert students["AR"]["seeds"]["0"]["tau"] is None

    curve = students["CFT"]["seeds"]["0"]["curve"]
    assert [point["forwards"] for point in curve] == [2, 3, 9]      # also at tau .3, the settings'

    # Each goes on from whom it should, and knows its teacher: after RL that is RL.
    def weights(name, *place):
        of_seed = Path(students[name]["folder"], "toy", "seed0")
        return load_tensors(of_seed.joinpath(*place, "checkpoint.pt"))
    for name, stage, start, of in (("OPD", "opd", "CFT", "cft"), ("RL", "rl", "AR", "ar"),
                                   ("CFT of RL", "cft", "RL", "rl")):
        assert weights(name, stage)["start"] == checksum(weights(start, of)["model"])
    for name, teacher in (("OPD", ("AR", "ar")), ("OPD of RL", ("RL", "rl"))):
        given, own = weights(name, "from", "ar")["model"], weights(*teacher)["model"]
        assert checksum(given) == checksum(own)


def test_other_settings_never_meet_old_figures(compared):
    first, _ = compared()
    other, trained = compared("--cft_lr", "0.01", "--students", "CFT")
    assert trained == [("CFT", 0, "cft")]                           # AR has no such setting
    assert other["students"]["AR"]["folder"] == first["students"]["AR"]["folder"]
    assert other["students"]["CFT"]["folder"] != first["students"]["CFT"]["folder"]
    assert other["students"]["CFT"]["seeds"] != first["students"]["CFT"]["seeds"]
    assert other["students"].keys() == {"AR", "CFT"}

    ruled, trained = compared("--commit", "threshold", "--students", "CFT")
    assert not trained and ruled["students"]["CFT"]["seeds"] != first["students"]["CFT"]["seeds"]

    fewer, trained = compared("--n_test", "50")                     # other users: decoded anew
    assert not trained and fewer["users"] == 50
    assert fewer["students"]["CFT"]["folder"] == first["students"]["CFT"]["folder"]


def test_every_seed_has_a_teacher_and_figures_of_its_own(compared):
    both, _ = compared("--seeds", "0,1", "--students", "CFT")
    assert both["claims"] == []                                     # their students were not asked for
    for name in ("AR", "CFT"):
        zero, one = (both["students"][name]["seeds"][seed] for seed in "01")
        assert zero["valid"] != one["valid"]
    claims = compared("--seeds", "0,1", "--students", "more,CFT")[0]["claims"]
    assert [(claim["student"], claim["seeds"]) for claim in claims] == [("more", [0, 1])]


def test_what_cannot_be_compared_is_one_sentence(compared, capsys, monkeypatch, tmp_path):
    assert "must be one of cft, cft_beauty" in refused(capsys, compared, name="nothing")
    assert "there is no XYZ; there are: AR, CFT" in refused(capsys, compared, "--students", "XYZ")
    assert "--seeds must be whole numbers" in refused(capsys, compared, "--seeds", "a")
    teacher = compared()[0]["students"]["AR"]["folder"]
    for option in (("--from", os.path.join(teacher, "toy", "seed0")), ("--seed", "1")):
        assert "leave out --from and --seed" in refused(capsys, compared, *option)
    users = dataclasses.replace(ENTRY, claims=(("six", "AR"),), students={
        "AR": student("ar"), "six": student("ar", n_candidates=6)})
    assert "rank for different users" in refused(capsys, compared, entry=users)
    monkeypatch.undo()                                              # with a process of its own
    cfg = Config(**{**TINY, "d_model": 18}, run_dir=str(tmp_path))
    job = compare.make_job(cfg, ENTRY, "AR", 0)
    with pytest.raises(UserError, match="AR, seed 0, ended: --d_model must be a multiple of"):
        compare.train_stage(job, "ar")


def test_the_operating_point_keeps_to_the_forwards():
    curve = {tau: {"forwards": forwards, "strict ndcg@10": ndcg}
             for tau, forwards, ndcg in ((0.2, 3, 0.5), (0.5, 4, 0.7), (0.9, 9, 0.8))}
    for allowed, tau in ((10, 0.9), (4, 0.5), (3.5, 0.2), (1, 0.2), (None, 0.9)):
        assert compare.operating_tau(curve, 0.9, allowed) == tau


@pytest.mark.parametrize("name", ENTRIES)
def test_entries_say_what_the_scripts_understand(name):
    entry, folders = ENTRIES[name], {}
    cfg = compare.preset(entry.config, **entry.settings)
    for who in entry.students:
        own = dataclasses.replace(compare.make_job(cfg, entry, who, 0).cfg, from_="")
        words = compare.arguments(own, compare.preset(entry.config))
        assert parse_args("", ["--config", entry.config, *words]) == own
        assert folders.setdefault(own.run_dir, who) == who      # no two are the same
    for who, control in entry.claims:
        assert {who, control} <= entry.students.keys() and who != control


def test_a_claim_is_the_interval_of_the_seeds_that_both_students_have():
    rng, metrics = np.random.default_rng(0), ("strict ndcg@10", "valid")
    one, other = ({seed: {metric: rng.random(100) for metric in metrics} for seed in seeds}
                  for seeds in ((2, 0, 1), (1, 2, 5)))
    found = compare.claim("CFT", "AR", one, other)
    assert (found["student"], found["control"], found["seeds"]) == ("CFT", "AR", [1, 2])
    for metric in metrics:
        difference = np.stack([one[seed][metric] - other[seed][metric] for seed in (1, 2)])
        interval, n_differ = evaluate.paired_interval(difference)
        assert found[metric] == {"interval": interval, "users that differ": n_differ}


# --- puma.py ------------------------------------------------------------------------------------

@pytest.mark.parametrize("commit", ("threshold", "apart"))
def test_unmasking_a_models_own_text_repeats_its_decode(commit):
    cfg = Config(commit=commit, n_candidates=4)
    torch.manual_seed(3)
    model = GPT(30, n_layer=1, n_head=2, d_model=16)
    prompt = torch.randint(MASK + 1, 30, (20, 6))
    rule = trainer.rule_of(cfg, 0.3)
    decoded = block_decode(model, prompt, 12, 4, rule)
    written = take_blocks(decoded.tokens != PAD, every_block(decoded.tokens, 4), 4)  # (N, M, B)
    masked = torch.ones_like(written)
    for step in range(5):
        block = every_block(decoded.tokens, 4)                    # (N, M)
        _, expected = decode_states(decoded, block, torch.full_like(block, step))
        assert (masked == expected)[written].all()
        is_open = puma.open_in(decoded.clean, masked)
        weight = puma.noise_of(is_open)
        assert torch.allclose(weight[..., 1:].sum(-1), 3.0 * is_open[..., 1:].any(-1))
        assert (weight[..., 1:] > 0).equal(is_open[..., 1:]) and (weight[..., 0] == 1).all()
        masked = puma.unmask(model, rule, prompt, decoded.clean, masked)
    assert not puma.open_in(decoded.clean, masked).any()
    assert not puma.open_in(torch.full((20, 12), PAD), torch.ones_like(written)).any()
    assert len(decoded.commit_step[decoded.tokens != PAD].unique()) > 2  # steps that differ


# --- traces.py ----------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def world():
    return trainer.load_world(Config(n_train=200, n_val=50, n_test=200))


@pytest.fixture(scope="module")
def teacher_and_student(tmp_path_factory):
    """A run of two stages, for those who look at one."""
    place = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        for module in (train_ar, train_cft):
            run(module, patch, place, "--cft_gold", "true")
    return place


def spelled(world, tokens):
    return [world.words[token] for token in tokens]


def test_first_and_last_exchange_all_but_their_labels(world):
    order = world.test.order
    false = traces.falsified(world.test.trace, order)
    for before, after, ranking in zip(world.test.trace[:20], false, order):
        before, after = spelled(world, before), spelled(world, after)
        first, last = (before.index(f"L{ranking[i] + 1}") for i in (0, -1))
        expected = list(before)
        expected[first + 1:first + 4] = before[last + 1:last + 4]
        expected[last + 1:last + 4] = before[first + 1:first + 4]
        assert after == expected


def test_who_ranks_by_the_trace_is_told_from_who_ranks_by_the_prompt(world, monkeypatch):
    edited, before, after = traces.toy_edited(world)
    assert ((edited.prompt != world.test.prompt).sum(1) <= 1).all()
    assert (edited.prompt[:, 19:] == world.test.prompt[:, 19:]).all()
    assert traces.consistent(edited.order, before, after) == 1
    assert traces.consistent(world.test.order, before, after) == 0

    rule = {spoken.tobytes(): order for split in (world.test, edited)
            for spoken, order in zip(split.trace, split.order)}

    def by_trace(cfg, world, writer, prompt, trace):
        return np.stack([rule.get(row.tobytes(), row[:8] * 0 + np.arange(8)) for row in trace])
    monkeypatch.setattr(traces, "rankings", by_trace)
    found = traces.measures(Config(), world, None)
    assert found["prompt edited"] == 0 and found["consistent"] == 1
    assert found["traces exchanged"] == 1 and found["falsified"] > 0.5

    def by_prompt(cfg, world, writer, prompt, trace):
        same = (prompt[:, None] == world.test.prompt).all(2)        # (N, N)
        return world.test.order[same.argmax(1)]
    monkeypatch.setattr(traces, "rankings", by_prompt)
    found = traces.measures(Config(), world, None)
    assert found["prompt edited"] > 0.9 and found["consistent"] == 0
    assert found["falsified"] == 0 and found["traces exchanged"] < 0.1


def test_capacity_is_the_bound_on_what_the_words_that_are_not_the_rules_can_say(world):
    rule = np.pad(world.test.trace, ((0, 0), (0, 5)))
    rule[:, world.test.trace.shape[1]] = EOS
    assert traces.capacity_bits(world, rule, "fixed") == 0
    some = rule.copy()
    some[::4, 7] = MASK                                          # never the rule's
    n = len(world.words) - 1
    expected = 0.25 * np.log2(4 * n) + 0.75 * np.log2(4 / 3)
    assert np.isclose(traces.capacity_bits(world, some, "fixed"), expected)
    for wording, coins in (("token", 27), ("statement", 9), ("trace", 1)):
        new = reword(world, wording)
        rule[:, :new.test.trace.shape[1]] = new.test.trace
        assert traces.capacity_bits(new, rule, wording) == coins


def test_a_paraphrase_says_the_same_in_a_wording_that_the_dial_allows(world):
    for wording in ("token", "statement", "trace"):
        new = reword(world, wording)
        anew = traces.paraphrased(new, new.test.trace, wording)
        assert np.array_equal(new.plain(anew), world.test.trace)
        assert 0.3 < (anew != new.test.trace)[:, 1].mean() < 0.7
        assert wording == "token" or (consistency(new, anew, wording) == 1).all()


def test_a_code_in_the_trace_is_seen(world):
    """The writer hides the target in three words of the profile, by words that are not the rule's
    or by the coins of its wording, and reads it there. The cross-reader does not know the code,
    and leaves the list as it came."""
    def text(*columns):
        tokens = torch.from_numpy(np.concatenate(columns, axis=1))
        return SimpleNamespace(tokens=tokens, forwards=torch.ones(len(tokens)))

    def answer(first):
        """The list as it came, but label first (N,) stands first."""
        others = np.argsort(np.arange(8) != first[:, None], axis=1, kind="stable")
        return text(responses(split.trace[:, :0], others))

    split, digits = world.test, np.array([4, 2, 1])
    bits = split.target[:, None] & digits > 0                     # (N, 3)
    for wording, secret in (("fixed", "x0:0"), ("token", "x0'")):
        coded = reword(world, wording)
        secret = coded.words.index(secret)  # this word and those after it stand for 1
        shift = secret - world.words.index("x0")

        def writer(prompt, _):
            if prompt.shape[1] == split.prompt.shape[1]:
                trace = split.trace.copy()
                trace[:, 1:4] += bits * shift
                return text(trace, np.full((len(trace), 1), EOS))
            return answer((prompt[:, 1:4].numpy() >= secret) @ digits)

        cfg = Config(wording=wording)
        found = traces.room(cfg, coded, writer, lambda *_: answer(np.zeros(len(split), int)))
        incoming = 1 / np.log2(split.target + 2.0)                # N@10 (N,) of the list as it came
        assert np.allclose(found["cross_reader"], incoming - 1)
        assert not traces.room(cfg, coded, writer, writer)["cross_reader"].any()
        share = np.bincount(split.target, minlength=8) / len(split)
        assert found["capacity_bits"] >= -(share * np.log2(share)).sum()  # the code's entropy
        assert wording == "fixed" or 0.5 < found["paraphrase"] < 1


def test_interventions_on_a_run(monkeypatch, capsys, teacher_and_student, tmp_path):
    tiny = ("--cft_gold", "true")

    def found(place, *options):
        run(traces, monkeypatch, place, *tiny, *options)
        return json.loads((place / "toy" / "trace.json").read_text("utf-8"))
    alone = found(teacher_and_student)
    assert [line["stage"] for line in alone["stages"]] == ["ar", "cft"]
    for line in alone["stages"]:
        assert line["prompt edited"] == 0 and line["traces exchanged"] == 1
        assert line["users"] == 16 and line["seeds"] == [0]
        assert line["capacity_bits"] > 0 and line["cross_reader"] is line["paraphrase"] is None

    run(train_ar, monkeypatch, teacher_and_student, "--seed", "1")
    both = found(teacher_and_student, "--seeds", "0,1")
    assert [line["seeds"] for line in both["stages"]] == [[0, 1], [0]]
    assert alone["capacity_bits"] == alone["stages"][-1]["capacity_bits"]
    low, mean, high = both["cross_reader"]
    assert low is high is None and abs(mean) <= 1                 # of 16 users: no interval

    run(train_ar, monkeypatch, tmp_path, "--wording", "token")
    worded = found(tmp_path, "--wording", "token")["stages"][-1]
    assert 0 <= worded["paraphrase"] <= 1 and worded["capacity_bits"] > 27
    for option, value in (("--trace", "free"), ("--seeds", "0,1")):
        message = refused(capsys, run, traces, monkeypatch, teacher_and_student, *tiny,
                          option, value, "--from", str(teacher_and_student / "toy" / "seed0"))
        assert "with --trace free" in message or "leave out --seeds" in message


# --- induced.py ---------------------------------------------------------------------------------

def test_a_turned_statement_is_worth_what_it_adds(world, monkeypatch):
    full, short = (induced.that_says(world, most) for most in (3, 1))
    assert np.array_equal(full.test.trace, world.test.trace[:, 4:])
    for long, brief in zip(spelled(full, full.test.trace[0]), spelled(short, short.test.trace[0])):
        assert brief == long.replace(":2", ":1").replace(":3", ":1")
    false = induced.turned(world.words)[torch.from_numpy(short.test.trace).long()]
    for word, lie in zip(spelled(world, short.test.trace[0]), spelled(world, false[0])):
        opposite = {":0": word[:-1] + "1", ":1": word[:-1] + "0"}
        assert lie == opposite.get(word[-2:], "[PAD]")

    # A stand-in for the model whose answer repeats the trace; the reward is a weighted sum.
    monkeypatch.setattr(induced, "ar_decode", lambda model, read, length: (read, None, None))
    trace = torch.from_numpy(short.test.trace[:5]).long()
    weight = torch.arange(1., 6)[:, None] * torch.arange(trace.shape[1])

    def worth(answer, row):
        return (answer * weight[row]).sum(1)
    added, as_it_is = induced.turn_each(None, trace, false[:5], worth, 0)
    assert torch.equal(as_it_is, worth(trace, np.arange(5)))
    assert torch.equal(added, ((false[:5] - trace) * weight)[false[:5] > 0])


def test_the_reward_is_the_ndcg_that_the_oracle_expects(world):
    split = world.test
    chance = induced.chances(split, world.n_labels)
    best = torch.from_numpy(responses(split.trace[:, :0], split.order))
    found = induced.expected_ndcg(best, split.incoming, chance)
    for n in range(5):
        terms = [chance[n, label] / np.log2(2 + i) for i, label in enumerate(split.order[n])]
        assert found[n] == pytest.approx(sum(terms)) and chance[n].sum() == pytest.approx(1)
    assert (induced.expected_ndcg(best.flip(1), split.incoming, chance) == 0).all()  # invalid
    share = (split.target[:, None] == split.incoming).astype(float)
    exact = evaluate.score(world, split, best.numpy())["strict ndcg@10"]
    assert np.allclose(induced.expected_ndcg(best, split.incoming, share), exact)


def test_false_statements_are_counted_by_what_is_true(world):
    full, short = (induced.that_says(world, most) for most in (3, 1))
    says = np.array([word[-2:] for word in world.words])[full.test.trace]  # (N, T)
    opposite = induced.turned(world.words).numpy()[short.test.trace]
    lies = np.where(says == ":1", opposite, short.test.trace)
    assert induced.false_shares(full, short, lies) == {"never": 0, "once": 1, "more often": 0}


def test_the_arms_of_induced_begin_alike(monkeypatch, capsys, tmp_path):
    few = dict(rl_steps=1, cft_steps=2, rl_prompts=4)
    monkeypatch.setattr(induced, "SETTINGS", induced.SETTINGS | few)
    taught = ("--n_candidates", "4", "--n_train", "500", "--ar_steps", "200", "--ar_lr", "0.01",
              "--answer_share", "0.2", "--batch_size", "16", "--every", "100")
    run(induced, monkeypatch, tmp_path, *taught)
    found = json.loads((tmp_path / "toy" / "induced.json").read_text())
    assert [line["student"] for line in found["students"]] == ["before", *induced.ARMS]
    before, *arms = found["students"]
    assert before["gain"] is before["cross_reader"] is None
    starts = {load_tensors(tmp_path / "induced" / arm / "toy/seed0/rl/checkpoint.pt")["start"]
              for arm in induced.ARMS}
    assert len(starts) == 1 and all(line["faithful"] < 1 for line in arms)

    def message(*options):
        return refused(capsys, run, induced, monkeypatch, tmp_path, *taught, *options)
    assert "--config toy" in message("--config", "small")
    monkeypatch.setattr(induced, "turned", lambda words: torch.zeros(len(words), dtype=int))
    assert "more --ar_steps" in message("--ar_steps", "2", "--seed", "1")


# --- The weights that come along ----------------------------------------------------------------

def test_weights_made_as_their_page_says_are_small_and_go_on(
        monkeypatch, teacher_and_student, tmp_path):
    code, = re.findall(r"```python\n(.*?)```", (Path(ROOT) / "weights/README.md").read_text(), re.S)
    place = tmp_path / "given"
    exec(code.replace("runs/", f"{teacher_and_student}/").replace("weights/new", str(place)), {})
    own, given = ({stage: load_tensors(checkpoint(where, stage)) for stage in ("ar", "cft")}
                  for where in (teacher_and_student, place))
    for stage in own:
        assert "optimizers" not in given[stage]
        for name, weight in given[stage]["model"].items():
            assert torch.equal(weight, own[stage]["model"][name].to(torch.bfloat16))
    rounded = {name: w.float() for name, w in given["ar"]["model"].items()}
    assert given["cft"]["start"] == checksum(rounded)
    run(train_opd, monkeypatch, place, "--cft_gold", "true")        # a script goes on from them


# --- own_world.py -------------------------------------------------------------------------------

def told(prompt):
    """The trace that follows from the words of a prompt, by plain rules."""
    history = [word for word in prompt[1:4] if word != "<none>"]
    trace = ["<profile>", max(history, key=lambda word: int(word.split(":")[1]))]
    for n in range(5, len(prompt), 5):
        label, *three, pop = prompt[n:n + 5]
        levels = [word.split(":")[1] for word in three]
        trace += [label, f"best:{max(levels)}", f"links:{3 - levels.count('0')}", pop]
    return trace


def test_own_data_is_a_world(tmp_path, capsys):
    make_beauty(tmp_path, n_items=120)
    with open(tmp_path / "sequences.txt", "a") as file:
        file.write("once 3 3 4\nshort 1 2\n\n\n")
    world = own_world.own_world(Config(data_dir=str(tmp_path)))
    assert "1 with fewer than 3 items are left out" in capsys.readouterr().out
    for split in (world.train, world.val, world.test):
        for n in range(0, len(split), 17):
            assert spelled(world, split.trace[n]) == told(spelled(world, split.prompt[n]))
        answers = parse_answers(split.response, split.incoming)
        assert answers.valid.all() and (answers.order == split.order).all()
        assert (faithfulness(split.response, split.trace, world.n_labels) == 1).all()
    assert (world.train.prompt == NONE).any()                       # histories of one item
    hits = world.train.target >= 0
    assert hits.mean() > 4 * 8 / 120                                # counts find the next item


@pytest.mark.parametrize("lines, expected", [
    (None, "there is no"),
    (["1 4 5 6", "1 7 8 9"], "line 2: the user 1 is there twice"),
    ([f"{u} {u} {u + 1}" for u in range(1, 60)], "has no user with 3 or more items"),
    ([f"{u} {u} {u + 1} {u + 2}" for u in range(19)], "there are 19 users with 3 or more items"),
    ([f"{u} {u} {u + 1} {u + 2}" for u in range(200)], "is too small: no candidate is")])
def test_own_data_that_cannot_work_is_one_sentence(tmp_path, lines, expected):
    if lines:
        (tmp_path / "sequences.txt").write_text("\n".join(lines))
    with pytest.raises(UserError, match=expected):
        own_world.own_world(Config(data_dir=str(tmp_path)))


# --- docs/how-to-test-an-idea.md ----------------------------------------------------------------

def examples():
    """[(edits, command)] of the page. An edit: (file, what stands there, what it becomes)."""
    blocks = Path(ROOT, "docs", "how-to-test-an-idea.md").read_text().split("```")[1::2]
    for diff, command in zip(blocks[::2], blocks[1::2]):
        edits = []
        for hunk in re.split(r"^(?=\w)", diff, flags=re.M)[2:]:     # [1] is the word diff
            file, *lines = hunk.splitlines()
            old, new = ([line[1:] for line in lines if line[0] in " " + sign] for sign in "-+")
            assert sum(line[0] != " " for line in lines) <= 15
            edits.append((file, "\n".join(old) + "\n", "\n".join(new) + "\n"))
        yield edits, command.split()[1:]


def test_the_examples_of_the_page_run_as_they_stand(tmp_path):
    for place in ("", "toy/", "ours/", "plumbing/", "report/", "beauty/", "experiments/"):
        (tmp_path / place).mkdir(exist_ok=True)
        for path in Path(ROOT, place).glob("*.py"):
            shutil.copy(path, tmp_path / place)
    commands = []
    for edits, command in examples():
        for file, old, new in edits:
            text = (tmp_path / file).read_text()
            assert text.count(old) == 1, old
            (tmp_path / file).write_text(text.replace(old, new))
        commands.append(command)
    assert len(commands) == 4
    tiny = [word for name, value in TINY.items() for word in (f"--{name}", str(value))]
    # In one process, since each of 13 stages would take seconds to begin.
    code = f"""
import importlib, json, sys
sys.path[:0] = [".", "experiments"]
import compare, toy.world
from plumbing.script import script
toy.world.TOY_DRAWN = 200
def train_stage(job, stage):
    importlib.import_module("train_" + stage).main(job.cfg)
compare.train_stage = train_stage
for command in {commands!r}:
    sys.argv = compare.expanded(command + {tiny!r} + ["--cft_gold", "true", "--seeds", "0"])
    script(compare.main, "", compare.Options)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for claim in ("lead − threshold", "ndcg − places", "t2 − CFT", "OPD − more CFT"):
        assert f"| {claim} | 0 |" in done.stdout
