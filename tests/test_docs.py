"""README and docs/: links lead somewhere, tables render, commands run, figures are those of the
files that they name.

    python -m pytest tests/test_docs.py
    python tests/test_docs.py     # after a new measurement: fills the tables again from results/

A table introduced by "From [file](path):" copies some rows and columns of a table of that file.
"""
import functools
import importlib.util
import io
import json
import math
import os
import re
import runpy
import shlex
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from conftest import ROOT  # first: it puts the project on Python's path

import evaluate
import trainer
from config import PRESETS, Config
from make_beauty import make_beauty
from plumbing import checkpoint as ck
from plumbing.settings import parse_args, settings_of
from report.table import markdown
from scripts import EVALUATION, TINY

ROOT = Path(ROOT)
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in ROOT.glob("docs/*.md"))]
CODE = [path.relative_to(ROOT).as_posix() for folder in (".", "beauty", "experiments", "plumbing")
        for path in sorted(ROOT.glob(f"{folder}/*.py"))]
RESULTS = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("results/**/*.json"))
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
SOURCE = re.compile(r"From \[[^\]]*\]\(([^)]+)\):$")
FEW = re.findall(r"\S+(?:_steps|n_test)|(?<=_steps |n_test )\d+", " ".join(TINY))  # steps and users
PROGRAMS = ("python", "python3", "make", "pytest", "torchrun")


def read(path):
    return (ROOT / path).read_text("utf-8")


def without_code(text):
    return re.sub(r"^ *```.*?^ *```", "", text, flags=re.S | re.M)


def paragraphs(text):
    return re.split(r"\n\s*\n", text)


def linked(page, target):
    """The path, from the root, of a relative link on a page."""
    return os.path.normpath(os.path.join(os.path.dirname(page), target))


# --- Tables -----------------------------------------------------------------------------------

def cells(line):
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip())[1:-1]]


def tables_of(text):
    """The tables of a page: [(head, rows)], cells as text. Fails where a table would not render."""
    found = []
    for paragraph in paragraphs(without_code(text)):
        lines = paragraph.strip("\n").split("\n")
        if not any(line.lstrip().startswith("|") for line in lines):
            continue
        assert all(re.fullmatch(r"\s*\|.*\|\s*", line) for line in lines), f"no row: {paragraph}"
        head, rule, *rows = map(cells, lines)
        assert set("".join(rule)) <= set("-:") and rows, f"a table cut in two: {paragraph[:200]}"
        assert {len(row) for row in (rule, *rows)} == {len(head)}, f"cells: {paragraph[:200]}"
        found.append((head, rows))
    return found


def copied(path, head, rows):
    """The rows of a page's table, with all cells taken from a table of the file at path that has
    these columns and rows. The first cell names a row, or the first ones if it comes twice."""
    for there, lines in tables_of(read(path)):
        if not set(head[1:]) <= set(there[1:]):
            continue
        places = [0] + [there.index(name) for name in head[1:]]
        lines = [[line[place] for place in places] for line in lines]
        width = next((n for n in range(1, len(head)) if
                      len({tuple(line[:n]) for line in lines}) == len(lines)), 1)
        known = {tuple(line[:width]): line for line in lines}
        if all(tuple(row[:width]) in known for row in rows):
            return [known[tuple(row[:width])] for row in rows]
    raise AssertionError(f"{path} has no table with the columns {head} and the rows "
                         f"{[row[0] for row in rows]}")


def filled(page):
    """The text of a page with each of its tables as its source has it."""
    blocks = re.split(r"(\n\s*\n)", read(page))
    for i, block in enumerate(blocks):
        if source := SOURCE.search(block):
            lines = blocks[i + 2].strip("\n").split("\n")
            head, *rows = [cells(line) for line in lines[:1] + lines[2:]]
            rows = copied(linked(page, source[1]), head, rows)
            blocks[i + 2] = "\n".join(lines[:2] + [f"| {' | '.join(row)} |" for row in rows])
    return "".join(blocks).rstrip("\n") + "\n"


@pytest.mark.parametrize("page", PAGES)
def test_tables_render_and_are_those_of_their_files(page):
    tables_of(read(page))
    assert read(page) == filled(page), "python tests/test_docs.py fills the tables again"


def test_a_table_of_measurements_in_the_readme_says_where_it_comes_from():
    blocks = paragraphs(read("README.md"))
    for before, block in zip(blocks, blocks[1:]):
        if block.startswith("|") and re.search(r"\d\.\d", re.sub(r"`[^`]*`", "", block)):
            said = before.startswith(("From the paper", "Computed"))
            assert said or SOURCE.search(before), f"a table after '{before[-80:]}'"


# --- Figures in sentences ---------------------------------------------------------------------

def has_number(path, number):
    """Does the file have this number, in JSON rounded to as many digits, or as a percentage?"""
    numbers = re.findall(r"\d+\.?\d*", read(path))
    if path.endswith(".md"):
        return number in numbers
    digits = len(number.partition(".")[2])
    return float(number) in {round(scale * float(n), digits) for n in numbers for scale in (1, 100)}


@pytest.mark.parametrize("page", PAGES)
def test_figures_in_sentences_are_those_of_the_files_they_name(page):
    for block in re.split(r"\n\s*\n|\n(?=\s*(?:- |\d+\. ))", without_code(read(page))):
        paths = [linked(page, target) for target in LINK.findall(block)]
        paths = [path for path in paths if re.match(r"results/.*\.(md|json)$", path)]
        if paths and not block.lstrip().startswith("|"):
            plain = re.sub(r"`[^`]*`|\$[^$]*\$|\]\([^)]*\)", " ", block)
            for number in re.findall(r"(?<![\w.@])(\d*\.\d+|\d+(?= ?%))(?![\w.])", plain):
                number = "0" + number if number.startswith(".") else number
                assert any(has_number(path, number) for path in paths), (
                    f"{page}: {number} of '{block[:80]}' is not in {', '.join(paths)}")


def test_the_example_of_the_bound_is_computed():
    text = " ".join(read("docs/bound.md").split())
    a, b, b_given_a, a_given_b = (
        float(re.search(rf"p\({name}\) = (\.\d+)", text)[1])
        for name in ("a", "b", "b given a", "a given b"))
    orders = [-math.log(a) - math.log(b_given_a), -math.log(b) - math.log(a_given_b)]
    mean = sum(orders) / 2
    exact = -math.log((a * b_given_a + b * a_given_b) / 2)
    assert exact < mean
    for number in (*orders, mean, exact):
        assert f"{number:.3f}".lstrip("0") in text, number


# --- Words, links -----------------------------------------------------------------------------

@pytest.mark.parametrize("page", PAGES)
def test_links_and_paths_lead_somewhere(page):
    for target in LINK.findall(without_code(read(page))):
        path, _, heading = target.partition("#")
        path = linked(page, path) if path else page
        if target.startswith("http"):
            continue
        assert (ROOT / path).exists(), f"{page}: there is no {path}"
        if heading:
            headings = re.findall(r"^#+ (.+)$", without_code(read(path)), re.M)
            anchors = [re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings]
            assert heading in anchors, f"{page}: {path} has no heading {heading}"
    for path in re.findall(r"`([\w/]+\.py)`", read(page)):
        assert (ROOT / path).exists(), f"{page}: there is no {path}"


def test_every_page_can_be_reached_from_the_readme():
    seen, todo = set(), ["README.md"]
    while todo:
        page = todo.pop()
        seen.add(page)
        todo += {linked(page, target.split("#")[0]) for target in LINK.findall(read(page))
                 } & set(PAGES) - seen
    assert seen == set(PAGES)


@pytest.mark.parametrize("page", [*PAGES, *RESULTS])
def test_a_page_speaks_of_nothing_that_its_reader_cannot_see(page):
    assert not re.findall(r"(?i)(?<!\w)/(?:work|tmp|root|home)\b|\bsessions?\b", read(page))


def test_the_settings_of_the_paper_are_those_of_its_preset():
    table, = (rows for head, rows in tables_of(read("docs/faq.md")) if "toy_paper" in head)
    default, paper = Config(), Config(**PRESETS["toy_paper"])
    differ = {name for name in vars(paper) if getattr(default, name) != getattr(paper, name)}
    assert {row[0].strip("`") for row in table} == differ - {"ar_steps", "opd_steps"}
    for name, *values, _ in table:
        there = [getattr(cfg, name.strip("`")) for cfg in (default, paper)]
        assert values == [str(value).replace("True", "true").replace("False", "false")
                          for value in there]


# --- Commands ---------------------------------------------------------------------------------

def commands(text):
    """The commands of shell lines, lists of words: variables and loops are written out, and what
    comes after a comment, a pipe or a redirection is left out."""
    found, variables = [], {}
    for line in text.replace("\\\n", " ").splitlines():
        line = re.sub(r"\$\{?(\w+)\}?", lambda m: variables.get(m[1], m[0]), line.strip(" \t!"))
        if assigned := re.fullmatch(r"(\w+)=(?:\"([^\"]*)\"|(\S+))", line):
            variables[assigned[1]] = assigned[2] or assigned[3]
        lines = [line]
        if loop := re.search(r"for (\w+) in (.+?); do (.+?); done", line):
            lines = [loop[3].replace(f"${loop[1]}", value) for value in loop[2].split()]
        for part in " && ".join(lines).split(" && "):
            part = re.sub(r"^(\w+=\S+ )*(\S*/)?", "", re.split(r" [|&;<>#]", part)[0])
            if re.match(rf"({'|'.join(PROGRAMS)})\b", part):
                found.append([word for word in shlex.split(part) if word != "..."])
    return found


def printed(page):
    """The commands of a page, or of the docstring of a file of code."""
    text = read(page)
    if page.endswith(".py"):
        doc = (re.match(r'"""(.*?)"""', text, re.S) or [None, ""])[1]
        return commands("\n".join(re.findall(r"^ {4,}(\S.*)$", doc, re.M)))
    blocks = re.findall(r"^ *```\w*\n(.*?)^ *```", text, re.S | re.M)
    inline = re.findall(rf"`((?:{'|'.join(PROGRAMS)}) [^`\n]+)`", without_code(text))
    return [words for part in (*blocks, "\n".join(inline)) for words in commands(part)]


@functools.cache
def parse(path, *options):
    """Reads a script's command line as the script does, and does nothing else."""
    with pytest.MonkeyPatch.context() as m:
        m.setattr("plumbing.script.script", lambda main, doc, also=None: parse_args(doc, also=also))
        m.setattr("plumbing.settings.check", lambda cfg: None)  # whether --from is there
        run_script(m, path, options)


def run_script(monkeypatch, path, options):
    monkeypatch.setattr("sys.argv", [str(ROOT / path), *options])
    monkeypatch.syspath_prepend(os.path.dirname(ROOT / path))
    try:
        runpy.run_path(str(ROOT / path), run_name="__main__")
    except SystemExit as stop:
        assert not stop.code, f"{path} {' '.join(options)}: exit code {stop.code}"


def check_command(program, *words):
    if program == "make":
        targets = re.search(r"^\.PHONY: (.*)$", read("Makefile"), re.M)[1].split()
        assert set(words) <= set(targets), f"make {' '.join(words)}"
    elif program == "pytest" or words[0] == "-m":
        if words[0] == "-m":
            assert importlib.util.find_spec(words[1]), words[1]
        for path in [word for word in words if word.endswith((".py", ".txt", "tests"))]:
            assert (ROOT / path).exists(), f"there is no {path}"
    else:
        place = next(i for i, word in enumerate(words) if word.endswith(".py"))
        assert (ROOT / words[place]).exists(), f"there is no {words[place]}"
        if "    script(main" in read(words[place]):
            parse(*words[place:])


@pytest.mark.parametrize("page", [*PAGES, *CODE])
def test_commands_name_files_and_options_that_exist(page):
    for words in printed(page):
        check_command(*words)


def recipe(target):
    """The commands of a target of the Makefile that has no $(CONFIG)."""
    text = read("Makefile")
    lines = re.search(rf"^{target}: \.venv/ready\n((?:\t.*\n)+)", text, re.M)[1]
    values = dict(re.findall(r"^(RUN|PAPER) = (.*)$", text, re.M))
    return commands(re.sub(r"\$\((\w+)\)", lambda m: values[m[1]], lines))


def test_commands_run_as_they_stand(tmp_path, monkeypatch):
    """Those of pages and docstrings that are cheap, one after another, with tiny models."""
    monkeypatch.chdir(tmp_path)
    make_beauty("data/beauty", n_users=120)
    make_beauty("my/data", n_users=120)
    request = b'{"history": [16, 20, 31], "candidates": [5, "A00010", 77, 93, 120]}\n'
    Path("requests.jsonl").write_bytes(request)
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(request)))
    todo = recipe("paper")[:3]
    todo += [["python", f"train_{stage}.py", "--config", "toy_few"] for stage in ("ar", "cft")]
    todo += [words for page in [*PAGES, *CODE] for words in printed(page)]
    rounds = np.ones((2, 2))  # nothing is timed
    monkeypatch.setattr("report.speed.in_turn", lambda jobs, _: dict.fromkeys(jobs, rounds))
    for program, path, *options in dict.fromkeys(words for words in map(tuple, todo) if words[2:]):
        tool = path.startswith("tests") or path in (
            "beauty/convert.py", "experiments/compare.py", "experiments/induced.py",
            "experiments/peer_sasrec.py")
        if not program.startswith("python") or path[0] == "-" or tool or "weights" in options:
            continue
        few = EVALUATION if path in ("evaluate.py", "experiments/own_world.py") else []
        with monkeypatch.context() as m:
            m.setattr(trainer, "beauty_world", trainer.beauty_world)  # own_world.py changes both
            m.setattr(evaluate, "make_report", evaluate.make_report)
            options = ["0" if word == "0,1,2" else word for word in options]  # seeds
            run_script(m, path, [*TINY, "--cft_gold", "true", *few, *options, *FEW])
    torch.set_num_threads(1)


# --- Files that come along ----------------------------------------------------------------------

@pytest.mark.parametrize("config", [p.parent.name for p in ROOT.glob("results/*/report.json")])
def test_report_md_is_made_of_report_json(config):
    report = json.loads(read(f"results/{config}/report.json"))
    assert read(f"results/{config}/report.md") == markdown(report)


def doubts(made):
    """Why a results file that was made so may differ from what this code measures: [words]."""
    if not made:
        return ["does not say what made it"]
    preset = Config(**{"config": made["config"], **PRESETS[made["config"]]})
    world = made["settings"].get("world", preset.world)
    found = [f"has weights of {stage} that other code trained"
             for stage, codes in made["weights"].items()
             if codes != [ck.short(ck.code_needed(stage, world, ck.CODE))]]
    found += ["was evaluated by other code"] * (made["code"] != ck.short(ck.CODE))
    in_git = re.fullmatch("[0-9a-f]{12,}", made["commit"])
    return found if in_git else [*found, f"is of the commit {made['commit']}"]


def test_results_are_of_this_code():
    """A warning, which `make release-check` turns into an error."""
    found = {}
    for path in RESULTS:
        content = json.loads(read(path))
        for part in content if isinstance(content, list) else [content]:
            found |= {f"{path} {doubt}": None for doubt in doubts(part.get("made_by"))}
    if found:
        warnings.warn("results may be old: " + "; ".join(found))


def test_results_of_other_code_are_found(monkeypatch):
    monkeypatch.setattr(ck, "TRAINED_BY", {"ar": {ck.short(ck.code_needed("ar", "toy", ck.CODE))}})
    monkeypatch.setattr(ck, "COMMIT", "0123456789ab")
    made = ck.made_by(Config())
    assert doubts(made) == [] and len(doubts(None)) == 1
    for change in ({"commit": "0123456789ab+"}, {"commit": "unknown"}, {"code": "0" * 12},
                   {"weights": {"ar": [*made["weights"]["ar"], "0" * 12]}}):
        assert len(doubts({**made, **change})) == 1, change


def test_the_demo_shows_users_re_ranked_by_weights_of_the_preset(monkeypatch, capsys):
    (_, path, *options), = recipe("demo")
    for stage in ("ar", "cft"):
        weights = ROOT / "weights/toy/seed0" / stage / "checkpoint.pt"
        assert torch.load(weights)["settings"] == settings_of(Config(), stage)
    monkeypatch.chdir(ROOT)
    run_script(monkeypatch, path, ["--threads", "1", "--n_test", "10", *options])
    said = capsys.readouterr()
    assert said.out.count("--- user") == 3 and "invalid" not in said.out and not said.err


if __name__ == "__main__":
    for page in PAGES:
        if read(page) != filled(page):
            (ROOT / page).write_text(filled(page), "utf-8")
            print(f"{page}: filled again")
