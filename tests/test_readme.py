"""The tables of the README are those of results/."""
import json
import os

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
