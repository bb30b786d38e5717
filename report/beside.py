"""Rows of other reports beside ours, of the same users: --beside name=folder:stage,..."""
import os

import torch

from plumbing.checkpoint import load_tensors
from plumbing.settings import UserError
from report.rows import SCORED, Result, known_orders
from report.speed import NO_TIMING


def parse_beside(text):
    """"name=folder:stage,..." -> [(name, folder, stage)]"""
    found = []
    for item in filter(None, text.split(",")):
        name, equals, rest = item.partition("=")
        where, colon, stage = rest.rpartition(":")
        if not (name and where and stage):
            raise UserError("--beside takes name=folder:stage, for example "
                            f"longer=runs/longer/small:ar, not '{item}'")
        found.append((name, where, stage))
    return found


def results_beside(cfg, options, world):
    """[Result] of the other runs. Raises UserError for what is missing, or is of other users."""
    results = []
    file = "report_users.pt" if options.eval_split == "test" else "report_val_users.pt"
    target = torch.from_numpy(world.test.target)
    taken = [*SCORED, *known_orders(cfg, world)]
    for name, where, stage in parse_beside(options.beside):
        if name in taken:
            raise UserError(f"--beside: the table has a row {name} already: choose another name")
        taken.append(name)
        path = os.path.join(where, file)
        if not os.path.exists(path):
            raise UserError(f"--beside: there is no {path}: first run evaluate.py there")
        saved = load_tensors(path)
        if stage not in saved.get("latency_ms", {}) or not torch.equal(saved["target"], target):
            raise UserError(f"--beside: {path} has no stage {stage}, or scores of other users")
        scores = {key: values.numpy() for key, values in saved[stage].items()}
        timing = NO_TIMING | {"latency_ms": saved["latency_ms"][stage]}
        results.append(Result(name, None, None, True, scores, timing))
    return results
