"""The tables of the README are those of results/."""
import json
import os
import re

import pytest

from conftest import ROOT
from evaluate import summary

COLUMNS = {"R@1": ("strict", "recall@1"), "N@10": ("strict", "ndcg@10"), "MRR": ("strict", "mrr"), "share of gain": ("ar_gain_share",),
           "valid": ("valid",), "faithful": ("faithful",), "identity": ("identity",), "forwards": ("forwards",),
           "tok/fwd": ("tokens_per_forward",), "ms": ("latency_ms",), "× AR, batch 1": ("speedup_b1",), "× AR, batch 64": ("speedup_batch",)}


@pytest.mark.parametrize("config", ["small", "full"])
def test_the_readme_shows_the_figures_of_the_report(config):
    text = open(os.path.join(ROOT, "README.md"), encoding="utf-8").read()
    table = re.search(rf"### Amazon Beauty, `--config {config}`.*?\n\n(\|.*?)\n\n", text, re.S).group(1).split("\n")
    rows = {r["stage"]: r for r in json.load(open(os.path.join(ROOT, "results", config, "report.json")))["rows"]
            if r["reported"] and r["seed"] == "mean"}
    split = lambda line: [cell.strip() for cell in line.strip("|").split("|")]
    header, shown = split(table[0]), [split(line) for line in table[2:]]
    assert {cells[0] for cells in shown} == rows.keys() and set(COLUMNS) <= set(header)
    for cells in shown:
        for name, path in COLUMNS.items():
            value = rows[cells[0]]
            for key in path:
                value = value[key]
            cell = cells[header.index(name)]
            if value is None:
                assert cell == "–"
                continue
            number, digits = re.fullmatch(r"([-+]?\d+\.?(\d*)) ?%?(?: ± .*)?", cell).groups()
            assert float(number) == pytest.approx(value * (100 if "%" in cell else 1), abs=0.51 * 10 ** -len(digits)), (cells[0], name)


def test_the_readme_shows_what_make_prints():
    text = open(os.path.join(ROOT, "README.md"), encoding="utf-8").read()
    report = json.load(open(os.path.join(ROOT, "results", "toy", "report.json")))
    assert summary(report).strip() in text
