"""The tables of the README are those of results/."""
import json
import math
import os
import re

import pytest

from conftest import ROOT
from evaluate import markdown, summary


def read(*path):
    return open(os.path.join(ROOT, *path), encoding="utf-8").read()


@pytest.mark.parametrize("config", ["toy", "small", "full"])
def test_the_readme_shows_the_stage_table_of_the_report(config):
    report = read("results", config, "report.md")
    assert report == markdown(json.loads(read("results", config, "report.json")))
    table = report.split("\n\n")[2]  # title, how to read it, the stages
    assert table.startswith("| stage | R@1") and len(table.split("\n")) > 7
    if config != "toy":
        assert table in read("README.md")


def test_the_readme_shows_what_make_prints():
    assert summary(json.loads(read("results", "toy", "report.json"))).strip() in read("README.md")


def test_assignment_1_expects_what_the_report_says():
    rows = json.loads(read("results", "small", "report.json"))["rows"]
    widths = [r["diff_to_cft"]["recall@1"] for r in rows if r["stage"] == "opd" and r["reported"] and r["seed"] != "mean"]
    sd = math.sqrt(sum(((high - low) / 2 / 1.96) ** 2 * 1905 for low, _, high in widths) / len(widths))
    least = (1.959964 + 0.841621) * sd / math.sqrt(1615)  # z of the level .05, and of a power of .8
    assert float(re.search(r"Expect: least = (\.\d+)", read("exercises.md")).group(1)) == pytest.approx(least, abs=6e-5)
