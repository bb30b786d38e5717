"""evaluate.py on runs in miniature: the contract of report.json, other reports beside it, --show,
speed, the constrained row, and figures that fail."""
import dataclasses
import glob
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import evaluate
import scripts
import gif
import train_ar
import train_cft
import train_opd
import train_rl
from config import PRESETS, Config
from conftest import ROOT, left_padded, tiny_gpt
from data import PAD, parse_answers
from fast.gpt import FastGPT
from make_beauty import make_beauty
from model import GPT
from plumbing.settings import UserError
from report import figures
from report.constrained import assigned, constrained_decode
from report.figures import denoising_figure, read_log, stages_figure, tradeoff_figure, write_gif
from report.options import finished_seeds
from report.speed import in_turn, speed, speed_jobs
from toy.world import toy_world

FEW = "--eval_taus 1.0,0.5,0.9,0.5 --eval_curve_users 8 --eval_speed_seconds 0.01".split()
STAGES = {"ar": train_ar, "cft": train_cft, "opd": train_opd, "rl": train_rl}
FIGURES = ("tradeoff.png", "throughput.png", "trace_lengths.png", "stages.png", "mask.png",
           "denoising.png", "denoising.gif")


def run(module, monkeypatch, run_dir, *options):
    """scripts.run with more test users and a curve of other taus."""
    own = FEW if module is evaluate else []
    scripts.run(module, monkeypatch, run_dir, "--n_test", "60", *own, *options)


def refused(*args):
    return scripts.refused(*args, run=run)


def read_report(folder, name="report.json"):
    def refuse(constant):
        raise ValueError(f"{constant} is no JSON")
    with open(os.path.join(folder, name), encoding="utf-8") as file:
        return json.loads(file.read(), parse_constant=refuse)


def without_figures(monkeypatch):
    monkeypatch.setattr(evaluate, "draw_figures", lambda *args: None)


def one_row(report, stage, seed="mean"):
    found = [row for row in report["rows"]
             if (row["stage"], row["seed"], row["reported"]) == (stage, seed, True)]
    assert len(found) == 1
    return found[0]


# --- The whole recipe -------------------------------------------------------------------------

ROW_KEYS = set(
    "stage block_size tau seed seeds reported n_users recall@1 recall@3 recall@5 ndcg@3 ndcg@5 "
    "ndcg@10 mrr strict valid duplicated dropped out_of_set faithful identity trace_tokens "
    "forwards tokens_per_forward ar_gain_share train_seconds se seed_se diff_to_ar "
    "diff_to_prerank diff_to_cft diff_to_opd differ_from_ar differ_from_prerank differ_from_cft "
    "differ_from_opd tokens_per_s_b1 speedup_b1 latency_ms tokens_per_s_batch speedup_batch "
    "batch".split())


@pytest.mark.parametrize("world", ["toy", "beauty"])
def test_the_recipe_in_miniature_fulfils_the_contract_of_the_report(world, monkeypatch, capsys,
                                                                    tmp_path):
    options, seeds = ["--seed", "1"], [1]
    if world == "beauty":
        make_beauty(tmp_path / "data")
        options += ["--config", "small", "--data_dir", str(tmp_path / "data")]
    else:  # a second seed, of which two stages have finished
        seeds = [0, 1]
        for module in (train_ar, train_cft):
            run(module, monkeypatch, tmp_path, "--seed", "0")
    for module in (*STAGES.values(), evaluate):
        run(module, monkeypatch, tmp_path, *options)
    folder = tmp_path / ("small" if world == "beauty" else "toy")
    report = read_report(folder)
    assert {"config", "dataset", "source", "split", "n_users", "device", "seeds",
            "operating_point", "data", "rows"} == report.keys()
    clash, block_size = 0.4, Config().block_size
    if world == "beauty":
        clash, block_size = 0.1, PRESETS["small"]["block_size"]
    assert report["seeds"] == seeds and report["operating_point"] == {
        "block_size": block_size, "commit": "independent", "clash": clash, "tau": 0.9}
    assert all(row.keys() == ROW_KEYS for row in report["rows"])
    order = [row["stage"] for row in report["rows"] if row["reported"] and row["seed"] == "mean"]
    known = ["prerank", "oracle"] if world == "toy" else ["prerank", "writer", "prerank, fresh"]
    assert order == known + ["ar", "naive", "cft", "opd", "rl", "constrained", "lossless"]
    for stage, made in (("cft", seeds), ("rl", [1])):
        rows = [row for row in report["rows"] if row["stage"] == stage and row["reported"]]
        assert [row["seed"] for row in rows] == [*made, "mean"] and rows[-1]["seeds"] == made
        assert (rows[-1]["seed_se"] is None) == (len(made) == 1)
        curve = [(row["tau"], row["n_users"]) for row in report["rows"]
                 if row["stage"] == stage and not row["reported"] and row["seed"] == "mean"]
        assert curve == [(0.9, 8), (0.5, 8), (1.0, 8)]
    points = [(row["stage"], row["tau"], row["seed"], row["reported"]) for row in report["rows"]]
    assert len(points) == len(set(points))
    assert one_row(report, "constrained")["valid"] == 1  # whatever the weights
    assert one_row(report, "ar")["speedup_b1"] == 1 and one_row(report, "rl")["latency_ms"] > 0
    for name in ("report.md", *FIGURES):
        assert (folder / name).stat().st_size > 500
    out = capsys.readouterr()
    assert "warning" not in out.err
    assert "share" in out.out and f"written: {folder}/report.json and .md" in out.out


def test_the_report_on_validation_users_has_a_name_of_its_own(monkeypatch, capsys, tmp_path):
    for module in (train_ar, train_cft):
        run(module, monkeypatch, tmp_path)
    capsys.readouterr()
    run(evaluate, monkeypatch, tmp_path, "--eval_split", "val")
    folder = tmp_path / "toy"
    report = read_report(folder, "report_val.json")
    assert report["split"] == "val" and report["n_users"] == 8
    assert sorted(os.listdir(folder)) == ["report_val.json", "report_val.md",
                                          "report_val_users.pt", "seed0"]
    assert "8 val users" in capsys.readouterr().out


def test_a_teacher_alone_is_scored_and_timed(monkeypatch, tmp_path):
    without_figures(monkeypatch)
    run(train_ar, monkeypatch, tmp_path, "--fast", "false")
    run(evaluate, monkeypatch, tmp_path, "--fast", "false")
    report = read_report(tmp_path / "toy")
    assert one_row(report, "ar")["latency_ms"] > 0 and one_row(report, "naive")["speedup_b1"] > 0
    assert "cft" not in {row["stage"] for row in report["rows"]}


def test_seeds_that_share_a_teacher_and_rows_of_other_reports(monkeypatch, capsys, tmp_path):
    without_figures(monkeypatch)
    run(train_ar, monkeypatch, tmp_path / "a")
    teacher = str(tmp_path / "a" / "toy" / "seed0" / "ar" / "checkpoint.pt")
    for seed in ("0", "1"):  # two conversions of one teacher, in a folder that has none
        run(train_cft, monkeypatch, tmp_path / "b", "--seed", seed, "--teacher", teacher)
    decoded, real = [], evaluate.decode_split
    monkeypatch.setattr(evaluate, "decode_split", lambda cfg, split, decoder, desc: (
        decoded.append(desc) or real(cfg, split, decoder, desc)))
    run(evaluate, monkeypatch, tmp_path / "b", "--teacher", teacher)
    assert sum(" ar " in desc for desc in decoded) == 1  # the teacher is decoded once
    report = read_report(tmp_path / "b" / "toy")
    assert one_row(report, "ar", 0)["strict"] == one_row(report, "ar", 1)["strict"]
    made = one_row(report, "cft")
    assert made["seeds"] == [0, 1]
    run(evaluate, monkeypatch, tmp_path / "b", "--teacher", teacher, "--seeds", "1")
    assert read_report(tmp_path / "b" / "toy")["seeds"] == [1]
    only_one = one_row(read_report(tmp_path / "b" / "toy"), "cft")

    run(train_cft, monkeypatch, tmp_path / "c", "--teacher", teacher)
    other = tmp_path / "b" / "toy"
    run(evaluate, monkeypatch, tmp_path / "c", "--teacher", teacher, "--beside",
        f"other={other}:cft,theirs={other}:ar")
    report = read_report(tmp_path / "c" / "toy")
    assert one_row(report, "other")["strict"] == pytest.approx(only_one["strict"])
    assert one_row(report, "other")["latency_ms"] == only_one["latency_ms"] > 0
    stages = [row["stage"] for row in report["rows"] if row["seed"] == "mean"]
    assert stages[:4] == ["prerank", "oracle", "other", "theirs"]

    for beside, expected in (
            ("x", "--beside takes name=folder:stage"), ("=y:z", "--beside takes name"),
            ("x=nowhere:ar", "first run evaluate.py there"), (f"x={other}:rl", "no stage rl"),
            (f"x={other}:target", "no stage target"), (f"cft={other}:cft", "has a row cft already"),
            (f"x={other}:ar,x={other}:cft", "has a row x already")):
        assert expected in refused(evaluate, monkeypatch, capsys, tmp_path / "c", "--teacher",
                                   teacher, "--beside", beside)
    assert read_report(tmp_path / "c" / "toy") == report  # nothing that existed is lost


@pytest.mark.parametrize("options, expected", [
    (["--eval_taus", "0.5,much"], "--eval_taus must be"),
    (["--eval_taus", "0.5,nan"], "--eval_taus must be"),
    (["--eval_curve_users", "0"], "--eval_curve_users must be"),
    (["--eval_speed_seconds", "-1"], "--eval_speed_seconds must be"),
    (["--eval_speed_seconds", "inf"], "--eval_speed_seconds must be"),
    (["--show", "-1"], "--show must be"),
    (["--eval_split", "train"], "--eval_split must be one of test, val"),
    (["--seeds", "0,many"], "--seeds must be all, or whole numbers"),
    (["--seeds", "-1"], "--seeds must be all, or whole numbers"),
    (["--seeds", "7"], "train_ar.py --config toy"),
    ([], "train_ar.py --config toy"),
    (["--show", "1"], "train_cft.py --config toy")])
def test_what_cannot_be_evaluated_is_refused(options, expected, monkeypatch, capsys, tmp_path):
    assert expected in refused(evaluate, monkeypatch, capsys, tmp_path, *options)
    assert not list(tmp_path.iterdir())


def test_seeds_are_found_whatever_else_lies_there(tmp_path):
    cfg = Config(run_dir=str(tmp_path / "odd [1]"))
    for name in ("seed3/ar", "seed10/cft", "seedling/ar", "seed/ar", "seed5/ar/deep"):
        os.makedirs(tmp_path / "odd [1]" / "toy" / name)
        (tmp_path / "odd [1]" / "toy" / name / "checkpoint.pt").touch()
    assert finished_seeds(cfg) == [3, 10] and finished_seeds(cfg, "2,0,2") == [0, 2]
    alone = Config(run_dir=str(tmp_path / "none"), seed=4, teacher="x")
    assert finished_seeds(alone) == [4]
    with pytest.raises(UserError, match="no checkpoint"):
        finished_seeds(dataclasses.replace(alone, teacher=""))


# --- Speed ------------------------------------------------------------------------------------

def test_jobs_run_in_turn_and_the_first_round_is_not_counted():
    calls = []

    def job(name):
        return lambda i: calls.append((i, name)) or torch.tensor([[i + 3, PAD]])

    taken, texts = in_turn({"a": job("a"), "b": job("b")}, 0.0)
    assert calls == [(0, "a"), (0, "b"), (1, "b"), (1, "a")]
    assert taken["a"].shape == (1, 2) and taken["a"][0, 1] == 1
    assert texts["b"][0].tolist() == [[4, PAD]]


def tiny_prompts():
    prompts = left_padded([3, 5, 4]).numpy().astype(np.int16)
    split = type("Rows", (SimpleNamespace,), {"__len__": lambda self: 3})
    return SimpleNamespace(words=["w"] * 10, max_response=12, n_labels=4,
                           test=split(prompt=prompts, response=prompts))


@pytest.mark.parametrize("kind", [GPT, FastGPT])
@pytest.mark.parametrize("name", ["ar", "block"])
def test_a_timed_job_reads_its_prompt_once_and_writes_its_response_once(kind, name):
    model = tiny_gpt(kind=kind, dtype=torch.float32)
    world = tiny_prompts()
    cfg = Config(device="cpu", trace="free", block_size=4, commit="threshold", tau=0.5)
    read = []
    hook = model.register_forward_pre_hook(lambda model, args: read.append(args[0].shape))
    job = speed_jobs(cfg, world, model, model, 3, 12)[name]
    tokens = job(0)
    hook.remove()
    P = world.test.prompt.shape[1]
    steps = int((tokens != PAD).sum(1).max())
    if name == "ar":
        assert read == [(3, P)] + [(3, 1)] * (steps - 1)  # the prompt, then a token a forward
    else:
        assert read[0] == (3, P + 4) and len(read) <= steps
        assert all(n <= 3 and width <= 8 for n, width in read[1:])  # two blocks at most
    assert speed(cfg, world, model, model, 3, 0.0)["ratio"] > 0


def test_a_decoder_that_writes_nothing_has_no_ratio(monkeypatch):
    world, model = tiny_prompts(), tiny_gpt(dtype=torch.float32)
    nothing = torch.full((3, 12), PAD)
    monkeypatch.setattr("report.speed.ar_write", lambda *args: SimpleNamespace(tokens=nothing))
    found = speed(Config(device="cpu", block_size=4), world, model, model, 3, 0.0)
    assert found["ratio"] is None and found["ar"] == 0


# --- The constrained row ----------------------------------------------------------------------

@pytest.mark.parametrize("world_name", ["toy", "toy_random_labels"])
@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("trace", ["free", "bound"])
def test_constrained_answers_are_permutations_of_the_list_whatever_the_weights(
        world_name, fast, trace):
    cfg = Config(world=world_name, n_train=8, n_val=8, n_test=6, n_layer=1, d_model=16,
                 device="cpu", fast=fast, trace=trace)
    world = toy_world(cfg)
    kind = FastGPT if fast else GPT
    for seed in range(3):
        model = tiny_gpt(seed, len(world.words), torch.float32, kind)
        if not fast:  # as new_model makes it, to be copied into its twin
            model = kind(len(world.words), 1, 2, 16).eval()
        rows = range(1, 6)
        prompt = torch.from_numpy(world.test.prompt[1:6]).long()
        decoded = constrained_decode(cfg, world, model, prompt, rows)
        answers = parse_answers(decoded.tokens.numpy(), world.test.incoming[1:6])
        assert answers.valid.all()
        assert trace == "bound" or (answers.trace_tokens == 36).all()


def test_labels_are_assigned_the_surest_first():
    p = torch.tensor([[[0.5, 0.4, 0.1], [0.6, 0.3, 0.1], [0.0, 0.0, 0.0]]])
    taken = assigned(p, 3)[0].nonzero().tolist()
    assert taken == [[0, 1], [1, 0]]  # slot 1 takes label 0, so slot 0 takes label 1; slot 2 none


# --- Figures ----------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """A folder with a teacher and a student of the toy world."""
    folder = tmp_path_factory.mktemp("student")
    with pytest.MonkeyPatch.context() as monkeypatch:
        for module in (train_ar, train_cft):
            run(module, monkeypatch, folder)
    return folder


def test_figures_that_fail_cost_neither_the_table_nor_each_other(student, monkeypatch, capsys):
    def broken(*args):
        raise KeyError("what")
    monkeypatch.setattr(figures, "stages_figure", broken)
    monkeypatch.setattr(figures, "denoising_figure", broken)
    for name in glob.glob(str(student / "toy" / "*.*")):
        os.remove(name)
    capsys.readouterr()
    run(evaluate, monkeypatch, student)
    out = capsys.readouterr()
    assert "oracle" in out.out and out.out.index("oracle") < out.out.index("written: ")
    warnings = [line.split("\r")[-1] for line in out.err.split("\n") if "warning" in line]
    assert len(warnings) == 2 and "stages.png could not be drawn (KeyError" in warnings[0]
    there = set(os.listdir(student / "toy"))
    assert {"report.json", "report.md", "tradeoff.png", "mask.png", "throughput.png"} <= there
    assert "stages.png" not in there and not glob.glob(str(student / "toy" / "*.part"))


def test_the_table_is_printed_before_anything_can_go_wrong(student, monkeypatch, capsys):
    def full(*args):
        raise UserError("cannot write report.json (No space left on device)")
    monkeypatch.setattr(evaluate, "write_report", full)
    with pytest.raises(SystemExit):
        run(evaluate, monkeypatch, student)
    assert "constrained" in capsys.readouterr().out


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "nonsense"])
def test_a_notebooks_backend_does_not_matter(backend):
    environment = os.environ | {"MPLBACKEND": backend, "OMP_NUM_THREADS": "1"}
    code = ("from report.figures import mask_figure\n"
            "mask_figure().savefig('/dev/null', format='png')")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True)


def test_damaged_lines_of_a_log_are_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "valid": 0.5, "tokens_per_forward": 3}\n{"step": 2, "va\n'
                     b'\xff\xfe\x00\n[1]\n3\n\n{"step": 3}\n')
    assert [line["step"] for line in read_log(path)] == [1, 3]
    assert read_log(tmp_path / "none") == []


@pytest.mark.parametrize("log", [b"", b"garbage\n{\n", b'{"step": 0}\n{"step": 1, "valid": 0.5'])
def test_the_stages_are_drawn_with_a_damaged_log_or_none(log, tmp_path):
    cfg = Config(run_dir=str(tmp_path))
    os.makedirs(tmp_path / "toy" / "seed0" / "cft")
    (tmp_path / "toy" / "seed0" / "cft" / "metrics.jsonl").write_bytes(log)
    path = os.path.join(ROOT, "results", "toy", "report.json")
    with open(path, encoding="utf-8") as file:
        report = json.load(file)
    for fig in (stages_figure(cfg, report), tradeoff_figure(report)):
        fig.savefig(tmp_path / "x.png")


@pytest.mark.filterwarnings("ignore:Glyph")
@pytest.mark.parametrize("word", ["A $5 > B $9 \\frac{", "$\\unknown$", "日本"])
def test_words_of_the_data_are_no_markup_in_a_figure(word, tmp_path):
    cfg = Config(n_train=8, n_val=8, n_test=6, device="cpu")
    world = toy_world(cfg)
    world.words = [word] * len(world.words)
    model = tiny_gpt(0, len(world.words), torch.float32, FastGPT)
    fig, show_until, order = denoising_figure(cfg, world, model, user=2, tau=0.99)
    assert order == sorted(order) and len(order) > 3
    write_gif(str(tmp_path / "x.gif.part"), fig, show_until, order, most=3)
    from PIL import Image
    image = Image.open(tmp_path / "x.gif.part")
    assert image.format == "GIF" and 3 <= image.n_frames <= 5


def test_the_gif_of_a_run_shows_more_steps_at_a_higher_tau(student, monkeypatch, capsys, tmp_path):
    out = str(tmp_path / "x.gif")
    run(gif, monkeypatch, student, "--out", out, "--user", "2", "--tau", "1")
    many = int(capsys.readouterr().out.split("tau 1.0, ")[1].split()[0])
    run(gif, monkeypatch, student, "--out", out, "--user", "2", "--tau", "0.01")
    few = int(capsys.readouterr().out.split("tau 0.01, ")[1].split()[0])
    assert many > few and os.path.getsize(out) > 500
    assert "there are 60 test users" in refused(gif, monkeypatch, capsys, student, "--user", "61")


# --- --show -----------------------------------------------------------------------------------

def test_show_prints_users_and_writes_nothing(student, monkeypatch, capsys):
    before = sorted(os.listdir(student / "toy"))
    capsys.readouterr()
    run(evaluate, monkeypatch, student, "--show", "2")
    out = capsys.readouterr().out
    assert "cft of toy" in out and "user 2: " in out and "user 3" not in out
    assert out.count("<answer>") <= 4 and sorted(os.listdir(student / "toy")) == before
    assert out.count("true next item") == 2
