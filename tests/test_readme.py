"""The tables in results/ and in the README are those of the reports."""
import json
import math
import os
import re

import numpy as np
import pytest

from conftest import ROOT
from report.table import markdown, summary


def read(*path):
    with open(os.path.join(ROOT, *path), encoding="utf-8") as file:
        return file.read()


def strict_json(text):
    """Reads JSON as strict parsers do: NaN and Infinity are errors."""
    def refuse(name):
        raise ValueError(f"{name} is no JSON")
    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("config", ["toy", "small", "full"])
def test_report_md_is_made_of_report_json(config):
    text = read("results", config, "report.md")
    assert text == markdown(strict_json(read("results", config, "report.json")))
    table = text.split("\n\n")[2]  # title, how to read it, the stages
    assert table.startswith("| stage | R@1") and len(table.split("\n")) > 7


def test_the_readme_shows_what_make_prints():
    report = strict_json(read("results", "toy", "report.json"))
    assert summary(report).strip() in read("README.md")


def test_no_interval_where_few_users_differ():
    for config in ("toy", "small", "full"):
        for row in strict_json(read("results", config, "report.json"))["rows"]:
            for name in ("ar", "prerank", "cft", "opd"):
                counts = row[f"differ_from_{name}"] or {}
                for metric, count in counts.items():
                    low, _, high = row[f"diff_to_{name}"][metric]
                    if count is not None:
                        assert (low is None) == (high is None) == (count < 50)


def test_assignment_1_expects_what_the_report_says():
    rows = strict_json(read("results", "small", "report.json"))["rows"]
    variances = []
    for row in rows:
        if row["stage"] == "opd" and row["reported"] and row["seed"] != "mean":
            share = row["differ_from_cft"]["recall@1"] / row["n_users"]
            variances.append(share - row["diff_to_cft"]["recall@1"][1] ** 2)
    # z of the level .05, and of a power of .8
    least = (1.959964 + 0.841621) * math.sqrt(np.mean(variances)) / math.sqrt(1615)
    said = re.search(r"least = (\.\d+)", read("docs", "exercises.md"))
    assert float(said.group(1)) == pytest.approx(least, abs=6e-5)
