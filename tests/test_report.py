"""evaluate.py on a run in miniature: rows, files, speed; the page is one file that asks nobody."""
import html as entities
import json
import math
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch

import evaluate
from data import PAD
from plumbing import checkpoint as ck
from plumbing.checkpoint import new_model, save_run
from plumbing.settings import parse_args
from report import html, speed
from report.table import cell, markdown, plain, table
from sampler import Decoded
from scripts import TINY, refused, run
from trainer import Run, load_world

STAGES = {0: ("ar", "cft", "opd"), 1: ("ar", "cft")}  # of each seed


def make_run(run_dir, stages=STAGES):
    """Checkpoints of stages that have finished, with random weights that write something."""
    for seed, names in stages.items():
        options = [*TINY, "--run_dir", str(run_dir), "--seed", str(seed)]
        cfg = parse_args("", options)
        world = load_world(cfg)
        for number, name in enumerate(names):
            run = Run(cfg, name, new_model(cfg, world), world)
            torch.manual_seed(10 * seed + number)
            with torch.no_grad():
                for p in run.model.parameters():
                    p.normal_(std=0.3 if p.dim() == 2 else 1.0)
            save_run(run, run.n_steps)
    return run_dir


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def evaluated(made):
    """The folder of the run, after evaluate.py has seen both seeds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ck, "TRAINED_BY", {})  # other tests have read weights of other code
        run(evaluate, patch, made, "--seeds", "0,1")
    return made / "toy"


def report_of(folder, name="report.json"):
    return json.loads((folder / name).read_text())


# --- The report -------------------------------------------------------------------------------

def test_the_report_has_the_rows_of_every_seed_and_their_mean_in_order(evaluated):
    report = report_of(evaluated)
    mean = {row["stage"]: row for row in report["rows"] if row["seed"] == "mean"}
    assert list(mean) == ["prerank", "oracle", "ar", "naive", "cft", "opd", "own ar", "lossless"]
    for stage, row in mean.items():
        seeds = [0] if stage == "opd" else [] if stage in ("prerank", "oracle") else [0, 1]
        assert row["seeds"] == seeds, stage
        own = [r for r in report["rows"] if r["stage"] == stage and r["seed"] != "mean"]
        assert [r["seed"] for r in own] == seeds
        assert all(r["n_users"] == 16 for r in own)
    # The text of lossless decoding is that of the same weights token by token.
    for metric, value in mean["own ar"]["served"].items():
        assert mean["lossless"]["served"][metric] == value, metric
    assert mean["ar"]["forwards"] != mean["own ar"]["forwards"]  # other weights

    timed = [stage for stage, row in mean.items() if row["times"]]
    assert timed == ["ar", "cft", "lossless"] and mean["ar"]["times"]["speedup_b1"] == 1
    points = [(row["stage"], row["tau"], row["n_users"]) for row in report["curve"]]
    assert points == [(stage, tau, 8) for stage in ("cft", "opd") for tau in (0.5, 0.9, 1.0)]
    made = report["made_by"]
    assert made["settings"]["d_model"] == 16 and "grad_clip" not in made["settings"]
    for stage in ("ar", "cft", "opd"):
        assert made["weights"][stage] == [ck.short(ck.code_needed(stage, "toy", ck.CODE))]
    assert (evaluated / "report.md").read_text() == markdown(report)


@pytest.mark.skipif(not shutil.which("git"), reason="there is no git")
def test_a_commit_is_that_of_the_files_and_marked_if_they_have_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(ck, "__file__", str(tmp_path / "plumbing" / "checkpoint.py"))
    assert ck.commit_of("*.py") == "unknown"
    (tmp_path / "model.py").touch()
    for words in ("init -q", "add .", "-c user.name=x -c user.email=x commit -qm x --no-gpg-sign"):
        subprocess.run(["git", "-C", tmp_path, *words.split()], check=True)
    head = ck.commit_of("*.py")
    assert len(head) == 12
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "new.py").touch()
    assert ck.commit_of("*.py") == head and ck.commit_of("*.py", "toy/*.py") == head + "+"
    (tmp_path / "model.py").write_text("changed")
    assert ck.commit_of("*.py") == head + "+"


def test_validation_users_a_teacher_alone_and_bad_seeds(made, tmp_path, monkeypatch, capsys):
    run(evaluate, monkeypatch, made, "--eval_split", "val")
    report = report_of(made / "toy", "report_val.json")
    assert report["n_users"] == 8 and report["seeds"] == [0] and report["split"] == "val"

    alone = make_run(tmp_path, {0: ("ar",)})
    run(evaluate, monkeypatch, alone)
    report = report_of(alone / "toy")
    assert [row["stage"] for row in report["rows"] if row["seed"] == "mean"] == [
        "prerank", "oracle", "ar", "naive"]
    message = refused(capsys, run, evaluate, monkeypatch, made, "--seeds", "0,x")
    assert "--seeds must be whole numbers" in message
    assert "train_ar.py" in refused(capsys, run, evaluate, monkeypatch, made, "--seeds", "7")
    assert "train_cft.py" in refused(capsys, run, evaluate, monkeypatch, alone, "--show", "1")


def test_a_student_without_an_ar_loss_has_no_ar_decoder():
    stages = {"ar": ("A", {}), "cft": ("C", {"settings": {"cft_ar_weight": 0.0}})}
    assert list(evaluate.models_of(stages)) == ["ar", "naive", "cft"]
    stages["cft"][1]["settings"]["cft_ar_weight"] = 1.0
    assert evaluate.models_of(stages)["lossless"] == "C"


def test_cells_of_a_table():
    row = {"stage": "a|b", "x": {"y": 0.12345}, "none": None,
           "diff_to_ar": {"m": [0.1, 0.2, 0.3], "n": [None, -0.5, None]},
           "differ_from_ar": {"m": 70, "n": 7}}
    cases = [
        ("x y", ".1%", "12.3%"),
        ("x z", "", "–"),
        ("none deeper", "", "–"),
        ("diff_to_ar m", "", "+0.2000 [+0.1000, +0.3000]"),
        ("diff_to_ar n", "", "-0.5000 (7 differ)")]
    for keys, form, wanted in cases:
        assert cell(row, keys, form) == wanted, keys
    assert cell({**row, "stage": "ar"}, "diff_to_ar m", "") == "–"
    assert table([("s", "stage", "")], [row]) == "| s |\n| --- |\n| a\\|b |"


def test_json_is_strict():
    content = {"a": [math.nan, np.float32(1), np.int64(2), 1 / 3], "rows": [{"x": math.inf}, {}]}
    assert plain(content) == {"a": [None, 1, 2, 0.333333], "rows": [{"x": None}, {}]}


# --- Speed ------------------------------------------------------------------------------------

def test_jobs_take_turns_and_the_first_round_does_not_count(monkeypatch):
    now, order = [0.0], []
    monkeypatch.setattr(speed.time, "perf_counter", lambda: now[0])

    def takes(name, seconds):
        def run(round_):
            order.append((round_, name))
            now[0] += 10 * seconds if round_ == 0 else seconds
            return 6
        return run

    taken = speed.in_turn({"ar": takes("ar", 3.0), "cft": takes("cft", 1.0)}, seconds=45)
    assert order == [(0, "ar"), (0, "cft"), (1, "cft"), (1, "ar"), (2, "ar"), (2, "cft")]
    assert taken["ar"].tolist() == [[3, 6], [3, 6]] and taken["cft"].tolist() == [[1, 6], [1, 6]]
    assert len(speed.in_turn({"ar": takes("ar", 1.0)}, seconds=0)["ar"]) == 1


def test_speed_ups_are_those_of_tokens_a_second(monkeypatch):
    cfg = parse_args("", TINY)
    now, seen = [0.0], []
    monkeypatch.setattr(speed.time, "perf_counter", lambda: now[0])

    def writer(seconds, n_tokens):
        """Writes so many tokens to every prompt, in so many seconds a call."""
        def decoder(prompt, max_len):
            now[0] += seconds
            seen.append(len(prompt))
            tokens = torch.full((len(prompt), max_len), PAD)
            tokens[:, :n_tokens] = 9
            return Decoded(tokens, tokens, tokens, tokens, tokens[:, 0], 1)
        return decoder

    found = speed.speeds(cfg, load_world(cfg), {"ar": writer(2.0, 3), "cft": writer(0.5, 6)}, 1)
    assert set(seen) == {1, 64}
    assert found["ar"] == {"latency_ms": 4000, "speedup_b1": 1, "speedup_b64": 1}
    assert found["cft"]["speedup_b1"] == found["cft"]["speedup_b64"] == 8


# --- The page ---------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def page(made):
    with pytest.MonkeyPatch.context() as patch:
        run(html, patch, made, "--tau", "0.5")
    return (made / "toy" / "decode.html").read_text(encoding="utf-8")


def data_of(page):
    found = re.search(r'<script type="application/json".*?>(.*?)</script>', page, re.S)
    return json.loads(found[1])


def test_the_page_is_one_file_that_asks_nobody(page, made):
    for asks in ("http://", "https://", "src=", "href=", "@import", "url(", "fetch(", html.MARK):
        assert asks not in page
    ids = re.findall(r'\bid="([\w-]+)"', page)
    assert len(set(ids)) == len(ids) and set(re.findall(r'\$\("([\w-]+)"\)', page)) <= set(ids)
    assert (made / "toy" / "denoising.gif").read_bytes().startswith(b"GIF")


def test_the_page_has_every_user_and_every_threshold(page):
    data = data_of(page)
    assert [user["number"] for user in data["users"]] == [1, 2, 3]
    for user in data["users"]:
        assert list(user["students"]) == ["naive", "cft", "opd"]
        for at_tau in user["students"].values():
            assert list(at_tau) == ["0.3", "0.5", "0.9"]
        for response in (user["ar"], *user["students"]["opd"].values()):
            n = len(response["tokens"])
            assert n == len(response["block"]) == len(response["forward"])
            assert max(response["forward"]) < len(response["ends"])
            assert response["ends"] == sorted(response["ends"])
            assert sorted(response["order"]) == sorted(user["before"])


def test_words_of_the_data_stay_data():
    word = "</script><script>alert(1)</script><!-- \u2028 日本"
    assert data_of(html.page_of({"words": [word]})) == {"words": [word]}


def test_a_browser_shows_what_was_written(page, made, tmp_path):
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if not browser:
        pytest.skip("there is no chromium to look at the page with")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom",
               f"--user-data-dir={tmp_path}/profile", "--virtual-time-budget=2000",
               f"file://{made}/toy/decode.html#step=9999"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    cell = r'<span class="cell done[^>]*><span[^>]*>[^<]*</span><span>([^<]*)</span>'
    user = data_of(page)["users"][0]
    written = user["students"]["opd"]["0.5"]["tokens"] + user["ar"]["tokens"]
    assert [entities.unescape(word) for word in re.findall(cell, shown)] == [
        word for word in written if word is not None]
