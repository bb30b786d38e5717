"""From a command line to a Config, and which of its settings a checkpoint depends on."""
import dataclasses
import sys

import torch

from config import PRESETS, STAGES, Config
from plumbing.settings import UserError, make, parse

# Settings that change no weight. (teacher and init name files: what counts is what is in them.)
RUNTIME = {"run_dir", "threads", "device", "fast", "data_dir", "every", "n_val", "n_test",
           "tau", "commit", "clash", "teacher", "init"}


def parse_args(doc, argv=None, also=None):
    """The Config of a command line: `--config` picks a preset, other settings override it.

    also: a dataclass of a script's own options, whose PRESETS, if it has any, hold the values
    that differ by preset. Then returns (Config, also). Raises UserError for what cannot work."""
    classes = [Config] + ([also] if also else [])
    given = parse(doc, sys.argv[1:] if argv is None else argv, *classes)
    preset = given.get("config", "toy")
    values = {**PRESETS[preset], **getattr(also, "PRESETS", {}).get(preset, {}), **given}
    cfg = check(make(Config, values))
    return (cfg, make(also, values)) if also else cfg


def check(cfg):
    """Refuses settings that do not go together, before anything is written; returns cfg."""
    if cfg.d_model % (2 * cfg.n_head):
        raise UserError(f"--d_model must be a multiple of 2 x n_head = {2 * cfg.n_head} (rotary "
                        f"positions turn pairs), not {cfg.d_model}")
    if cfg.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda asks for a GPU, and torch sees none: use --device cpu")
    return cfg


def settings_of(cfg, stage):
    """The settings that a stage's result depends on: the shared ones, and its own and those of
    the stages before it. {name: value}"""
    later = [name + "_" for name in STAGES[STAGES.index(stage) + 1:]]
    if stage == "ar":
        later.append("block_size")
    return {name: value for name, value in dataclasses.asdict(cfg).items()
            if name not in RUNTIME and not name.startswith(tuple(later))}
