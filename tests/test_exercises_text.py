"""docs/exercises.md: the figure that it expects, and the commands that it gives."""
import importlib
import math
import os
import re
import shlex

import pytest

from conftest import ROOT
from test_exercises import read, sd_of_opd
from plumbing.arguments import parse_args

TEXT = open(os.path.join(ROOT, "docs", "exercises.md"), encoding="utf-8").read()


def test_assignment_1_expects_what_the_report_says():
    sd = sd_of_opd(read("", "results", "small", "report.json", base=ROOT))
    least = (1.959964 + 0.841621) * sd / math.sqrt(1615)  # z of the level .05, and of a power of .8
    expected = float(re.search(r"Expect: least = (\.\d+)", TEXT)[1])
    assert expected == pytest.approx(least, abs=6e-5)


def commands():
    """The lines `python script.py ...` of the page, in code blocks and in sentences."""
    fence = re.compile(r"^```\w*\n(.*?)^```", flags=re.S | re.M)
    lines = "".join(fence.findall(TEXT)).replace("\\\n", " ").split("\n")
    lines += re.findall(r"`([^`\n]+)`", fence.sub("", TEXT))
    return [line for line in lines if re.match(r"python \S+\.py", line)]


def test_the_commands_are_understood():
    assert len(commands()) >= 6
    for command in commands():
        for name, value in (("$s", "0"), ("$c", "true"), ("$T", "checkpoint.pt")):
            command = command.replace(name, value)
        _, path, *options = shlex.split(command)
        assert os.path.exists(os.path.join(ROOT, path)), command
        module = importlib.import_module(os.path.basename(path).removesuffix(".py"))
        if "margin" not in options:  # assignment 3 adds it
            parse_args("", options, getattr(module, "Options", None))


def test_the_control_of_assignment_7_is_that_of_the_ablations():
    import ablations
    assert f"takes {ablations.OPD_COST} CFT steps" in TEXT
