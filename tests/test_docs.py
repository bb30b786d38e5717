"""README and docs/ show the figures of results/; links lead somewhere; the English is plain.

    pytest tests/test_docs.py
    python tests/test_docs.py     # after a new measurement: fills the tables again from results/

A table introduced by "From [file](path):" copies some rows and columns of a table of that file.
By "From [file](path), differences:", or other words: TABLES says how its rows are computed.
"""
import glob
import json
import os
import re
import sys

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PAGES = ["README.md"] + sorted(
    os.path.relpath(path, ROOT) for path in glob.glob(os.path.join(ROOT, "docs", "*.md")))
# Words of other versions of the code, which a reader cannot know, and of sentences read twice.
FORBIDDEN = ["earlier", "version before", "before the last", "less AR's", "behind", "so it is"]
NAMES = {"incoming order": "prerank", "AR": "ar", "CFT": "cft", "OPD": "opd", "RL": "rl"}
METRICS = {"R@1": "recall@1", "N@10": "ndcg@10", "MRR": "mrr"}
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
SOURCE = re.compile(r"From \[[^\]]*\]\(([^)]+)\)(?:, ([^:]+))?:$")


def read(*path):
    with open(os.path.join(ROOT, *path), encoding="utf-8") as file:
        return file.read()


def linked(page, target):
    """The path, from the root, of a relative link on a page."""
    return os.path.normpath(os.path.join(os.path.dirname(page), target))


def cells(line):
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def tables_of(text):
    """The tables of a markdown text: [(header, rows)], cells as text."""
    found = []
    for block in re.split(r"\n\s*\n", text):
        lines = [line for line in block.split("\n") if line.startswith("|")]
        if len(lines) > 2 and set(lines[1]) <= set("|-: "):
            found.append((cells(lines[0]), [cells(line) for line in lines[2:]]))
    return found


# --- Tables that are computed from a report.json or from speed.json ---------------------------

def interval(value):
    if not value:
        return "–"
    low, mean, high = value
    if low is None:
        return f"{mean:+.4f}"
    return f"{mean:+.4f} [{low:+.4f}, {high:+.4f}]"


def differences(report, header, names):
    """A row a pair of stages, "CFT − AR": the mean difference and its 95 % interval."""
    mean = {r["stage"]: r for r in report["rows"] if r["reported"] and r["seed"] == "mean"}
    rows = []
    for name in names:
        stage, other = (NAMES.get(part, part) for part in name.split(" − "))
        values = mean[stage][f"diff_to_{other}"]
        rows.append([name] + [interval(values[METRICS[metric]]) for metric in header[1:]])
    return rows


def against_ar(speed, header, names):
    run = speed["runs"][0]
    return [[name, f"{run['speedup_b' + name]:.2f}"] for name in names]


def response_time(speed, header, names):
    latency = speed["runs"][0]["latency_ms"]
    found = [(name, latency[NAMES.get(name, name)]) for name in names]
    return [[name, f"{ms['p50']:.1f}", f"{ms['p95']:.1f}"] for name, ms in found]


def growth(speed, header, names):
    """A row a batch or a length, "batch 16": the measured speed-up, and the two cost models'."""
    curves = {f"{c['against']} {c[c['against']]}": c for c in speed["curves"] if "model" in c}
    return [[name] + [f"{curves[name][key]:.2f}" for key in ("speedup", "model", "model_rows")]
            for name in names]


def training_cost(speed, header, names):
    steps = {name: cost["step"] for name, cost in speed["runs"][0]["training"].items()}
    seconds = [steps[NAMES.get(name, name)] for name in names]
    return [[name, f"{s:.3f}", f"{s / steps['ar']:.2f}"] for name, s in zip(names, seconds)]


def peers(speed, header, names):
    """A row a peer: how many times as fast ours is, and how many responses were compared."""
    run = speed["runs"][0]
    ar, lookup = run["ar_vs_transformers"], run["vs_prompt_lookup"]
    rows = {"transformers, batch 1": ("AR", ar["ratio_b1"], ar["agreement_b1"]),
            "transformers, batch 64": ("AR", ar["ratio_b64"], ar["agreement_b64"]),
            "prompt lookup": ("student", lookup["ratio"], lookup["of"][lookup["fastest"]])}
    for name, peer in run["sampler_vs_peers"].items():
        short = "diffusers" if "diffusers" in name else "Fast-dLLM"
        rows[short] = ("student, threshold rule", peer["ratio_b1"], peer)
    return [[name, ours, f"{ratio:.2f}", f"{same['identical']:.0%} of {same['n']}"]
            for name in names for ours, ratio, same in [rows[name]]]


def claims(found, header, names):
    """A row a claim, "few_300, toy_few: OPD − more CFT" (regime, preset, stage, control): the
    differences of the column's metric."""
    known = {(f"{c['regime']}, {c['config']}: {c['stage']} − {c['control']}", c["metric"]):
             c["difference"] for c in found}
    return [[name] + [interval(known.get((name, METRIC_OF.get(column, column))))
                      for column in header[1:]] for name in names]


METRIC_OF = {"N@10": "ndcg@10 strict", "forwards": "forwards at equal quality"}
TABLES = {"differences": differences, "against AR": against_ar, "response time": response_time,
          "as work grows": growth, "training": training_cost,
          "peers": peers, "claims": claims}


def copied(path, header, rows):
    """The rows of a docs table, with every cell taken from the table of a markdown file that has
    these columns and rows. A row is known by its first cells, as many as make it unique there."""
    for there, lines in tables_of(read(path)):
        if not set(header[1:]) <= set(there[1:]):
            continue
        places = [0] + [there.index(name) for name in header[1:]]
        lines = [[line[place] for place in places] for line in lines]
        width = next((n for n in range(1, len(header)) if
                      len({tuple(line[:n]) for line in lines}) == len(lines)), 1)
        known = {tuple(line[:width]): line for line in lines}
        keys = [tuple(row[:width]) for row in rows]
        keys = [key if key in known else (NAMES.get(key[0], key[0]), *key[1:]) for key in keys]
        if all(key in known for key in keys):
            return [[row[0], *known[key][1:]] for row, key in zip(rows, keys)]
    raise AssertionError(f"{path} has no table with the columns {header} and the rows "
                         f"{[row[0] for row in rows]}")


def filled(page):
    """The text of a page with each of its tables as its source has it."""
    blocks = re.split(r"(\n\s*\n)", read(page))
    for i, block in enumerate(blocks):
        source = SOURCE.search(block)
        if source is None:
            continue
        path = linked(page, source[1])
        lines = blocks[i + 2].split("\n")
        header, rows = cells(lines[0]), [cells(line) for line in lines[2:] if line.startswith("|")]
        if source[2]:
            rows = TABLES[source[2]](json.loads(read(path)), header, [row[0] for row in rows])
        else:
            rows = copied(path, header, rows)
        blocks[i + 2] = "\n".join(lines[:2] + ["| " + " | ".join(row) + " |" for row in rows])
    return "".join(blocks).rstrip("\n") + "\n"


@pytest.mark.parametrize("page", PAGES)
def test_tables_are_those_of_their_files(page):
    assert read(page) == filled(page), "python tests/test_docs.py fills the tables again"


@pytest.mark.parametrize("page", PAGES)
def test_a_table_of_measurements_says_where_it_comes_from(page):
    blocks = re.split(r"\n\s*\n", read(page))
    for before, block in zip(blocks, blocks[1:]):
        if block.startswith("|") and re.search(r"\d\.\d", re.sub(r"`[^`]*`", "", block)):
            said = before.startswith(("From the paper", "Measured", "Computed"))
            assert said or SOURCE.search(before), f"{page}: a table after '{before[-80:]}'"


# --- Figures in sentences ---------------------------------------------------------------------

def numbers_in(text):
    """Decimal numbers and percentages of a text, without sign: {"0.627", "99.97"}."""
    text = re.sub(r"`[^`]*`|\$[^$]*\$|\]\([^)]*\)", " ", text)
    found = re.findall(r"(?<![\w.@])(\d*\.\d+|\d+(?= ?%))(?![\w.])", text)
    return {("0" + n if n.startswith(".") else n) for n in found}


def values_of(tree):
    if isinstance(tree, dict):
        tree = list(tree.values())
    if isinstance(tree, list):
        return [value for part in tree for value in values_of(part)]
    return [float(tree)] if isinstance(tree, (int, float)) else []


def has_number(path, number):
    """Does the file have this number, rounded to as many digits, as it is or as a percentage?"""
    text = read(path)
    if path.endswith(".md"):
        return number in {n.lstrip("+-") for n in re.findall(r"[-+]?\d+\.?\d*", text)}
    digits = len(number.partition(".")[2])
    shown = [abs(float(f"{scale * value:.{digits}f}"))
             for value in values_of(json.loads(text)) for scale in (1, 100)]
    return float(number) in shown


@pytest.mark.parametrize("page", PAGES)
def test_figures_in_sentences_are_those_of_the_files_they_name(page):
    for block in prose(read(page)):
        paths = [linked(page, target) for target in LINK.findall(block)]
        paths = [path for path in paths if re.match(r"results/.*\.(md|json)$", path)]
        for number in numbers_in(block) if paths else ():
            assert any(has_number(path, number) for path in paths), (
                f"{page}: {number} of '{block[:80]}' is not in {', '.join(paths)}")


def prose(text):
    """Paragraphs and list items of a page, without code, tables, headings and formulas."""
    text = re.sub(r"```.*?```|\$\$.*?\$\$|<!--.*?-->", "", text, flags=re.S)
    blocks = re.split(r"\n\s*\n|\n(?=\s*(?:- |\d+\. ))", text)
    lines = [" ".join(block.split()) for block in blocks]
    return [line for line in lines if line and not line.startswith(("|", "#", "!"))]


@pytest.mark.parametrize("page", [page for page in PAGES if "exercises" not in page])
def test_at_most_two_figures_a_sentence(page):
    for block in prose(read(page)):
        plain = re.sub(r"`[^`]*`|\$[^$]*\$|\[[^\]]*\](\([^)]*\))?", "", block)  # code, links
        plain = re.sub(r"\w+@\d+|\w+ = \.?\d[\d.]*", "", plain)                  # N@10, τ = .9
        for sentence in re.split(r"(?<=[.!?:])\s+", plain):
            figures = re.findall(r"(?<![\w.])\d[\d,]*\.?\d*", sentence)
            assert len(figures) <= 2, f"{page}: {sentence}"


# --- Words, links, length ---------------------------------------------------------------------

@pytest.mark.parametrize("page", PAGES)
def test_plain_words(page):
    text = " ".join(read(page).split())
    found = [word for word in FORBIDDEN if re.search(rf"\b{word}\b", text, re.I)]
    assert not found, f"{page} has {found}"


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in LINK.findall(read(page)):
        if target.startswith("http"):
            continue
        path, _, heading = target.partition("#")
        path = linked(page, path) if path else page
        assert os.path.exists(os.path.join(ROOT, path)), f"{page}: there is no {path}"
        if heading:
            assert heading in anchors(read(path)), f"{page}: {path} has no heading {heading}"


def anchors(text):
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


def test_every_page_can_be_reached_from_the_readme():
    for page in PAGES[1:]:
        assert page in LINK.findall(read("README.md")), f"the README does not name {page}"


def test_the_readme_is_short():
    text = read("README.md")
    assert len(re.findall(r"\S+", text)) <= 1700
    assert len(text.splitlines()) <= 180


def write_again(page):
    text = filled(page)
    if page == "README.md":  # what `make` prints
        sys.path.insert(0, ROOT)
        from evaluate import summary
        printed = summary(json.loads(read("results", "toy", "report.json"))).strip()
        start = text.index("<!-- make -->\n```\n") + len("<!-- make -->\n```\n")
        text = text[:start] + printed + text[text.index("\n```", start):]
    if text != read(page):
        with open(os.path.join(ROOT, page), "w", encoding="utf-8") as file:
            file.write(text)
        print(f"{page}: filled again")


if __name__ == "__main__":
    for page in PAGES:
        write_again(page)
