"""Settings: which values they may have, and the command line that sets them.

A setting is a field of a dataclass. Its annotation says which values it may have:

    @dataclass(frozen=True)
    class Options:
        show: Whole(0, 1000) = 0             # print so many test users
        split: OneOf("test", "val") = "test"
"""
import argparse
import dataclasses
import difflib
import inspect
import math
import pathlib
import re
import reprlib
import sys

# Settings that change no weight: a checkpoint may be used with other values of them.
RUNTIME = {"run_dir", "threads", "device", "data_dir", "every", "n_val", "n_test", "tau",
           "from_", "again"}


class UserError(Exception):
    """An error that only the user can mend: one sentence that says what to do.

    Scripts print it and exit with code 2 (plumbing/script.py)."""


# --- Kinds of values --------------------------------------------------------------------------

class Kind:
    """Reads a value from a text: kind("0.5") is 0.5, or raises ArgumentTypeError. name: completes
    the sentence "it must be ..."."""

    def __init__(self, name, convert=str, allows=lambda value: True):
        self.name, self.convert, self.allows = name, convert, allows

    def __call__(self, text):
        try:
            value = self.convert(text)
            allowed = self.allows(value)
        except (KeyError, ValueError, OverflowError):
            allowed = False
        if not allowed:
            raise argparse.ArgumentTypeError(f"must be {self.name}, not {reprlib.repr(text)}")
        return value


class Real(Kind):
    """A finite number from low to high. `above` is a lower bound that is itself not allowed."""

    def __init__(self, low=None, high=None, above=None, name="a number", convert=float):
        bounds = {"above": above, "at least": low, "at most": high}
        given = [f"{words} {bound}" for words, bound in bounds.items() if bound is not None]
        super().__init__(f"{name} {' and '.join(given)}".strip(), convert, self.in_range)
        self.low, self.high, self.above = low, high, above

    def in_range(self, value):
        return (math.isfinite(value)
                and (self.low is None or value >= self.low)
                and (self.above is None or value > self.above)
                and (self.high is None or value <= self.high))


class Whole(Real):
    def __init__(self, low=None, high=None):
        super().__init__(low, high, name="a whole number", convert=int)


class Numbers(Real):
    """Numbers with commas between them, such as 0.3,0.7: a tuple."""

    def __init__(self, low=None, high=None, above=None):
        name = "numbers with commas between them, each"
        super().__init__(low, high, above, name, lambda text: tuple(map(float, text.split(","))))

    def in_range(self, value):
        return all(map(super().in_range, value))


class OneOf(Kind):
    def __init__(self, *choices):
        super().__init__("one of " + ", ".join(choices), allows=lambda value: value in choices)


class Switch(Kind):
    def __init__(self):
        values = {"true": True, "1": True, "false": False, "0": False}
        super().__init__("true or false", lambda text: values[text.lower()])


class Text(Kind):
    def __init__(self):
        super().__init__("text")


# --- The command line -------------------------------------------------------------------------

def parse_args(doc, argv=None, also=None):
    """Returns the Config of a command line, or (Config, also) if a dataclass `also` is given.

    `--config` picks a preset, and the other options override it. `also` has a script's own
    options; also.PRESETS, if it exists, has their values by preset. Raises UserError."""
    from config import PRESETS, Config  # not above: config.py imports this file
    classes = [Config] + ([also] if also else [])
    given = read(doc, sys.argv[1:] if argv is None else argv, classes)
    preset = given.get("config", Config.config)
    values = {**PRESETS[preset], **getattr(also, "PRESETS", {}).get(preset, {}), **given}
    made = []
    for cls in classes:
        names = [field.name for field in dataclasses.fields(cls)]
        made.append(cls(**{name: values[name] for name in names if name in values}))
    check(made[0])
    return tuple(made) if also else made[0]


def read(doc, argv, classes):
    """Returns the settings that a command line gives: {name: value}. Prints --help, and exits."""
    if "-h" in argv or "--help" in argv:
        print(help_text(doc, classes))
        sys.exit(0)
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False,
                                     argument_default=argparse.SUPPRESS)
    kinds = {}
    for field in [field for cls in classes for field in dataclasses.fields(cls)]:
        option = "--" + field.name.rstrip("_")  # from_ is --from: `from` is a word of Python
        parser.add_argument(option, dest=field.name, type=field.type)
        kinds[option] = field.type
    try:
        given, rest = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        option = error.argument_name
        if error.message.startswith("must be"):  # a kind refused the value
            raise UserError(f"{option} {error.message}") from None
        raise UserError(f"{option} needs a value: it must be {kinds[option].name}") from None
    if rest:
        option = rest[0].partition("=")[0]
        near = difflib.get_close_matches(option, kinds, n=1)
        hint = f"did you mean {near[0]}?" if near else "see --help for the list"
        raise UserError(f"unknown option {reprlib.repr(option)}: {hint}")
    return vars(given)


def help_text(doc, classes):
    """A script's docstring, then its settings as their source has them: kind, value, meaning."""
    out = [doc.strip(), "", "Settings, each with its range, its value in the toy preset and its "
           "meaning:", ""]
    for cls in classes:
        for line in inspect.getsource(cls).splitlines():
            if line.strip().startswith(("@property", "def ", "PRESETS")):
                break  # what follows is code
            if not line.startswith(("@", "class ")):
                out.append(re.sub(r"^ {4}(\w+?)_?: ", r"    --\1: ", line))
    return "\n".join(out)


def check(cfg):
    """Refuses settings that do not go together, before anything is written."""
    if cfg.d_model % (2 * cfg.n_head):
        raise UserError(f"--d_model must be a multiple of 2 x n_head = {2 * cfg.n_head} (rotary "
                        f"positions turn pairs), not {cfg.d_model}")
    if not cfg.run_dir:
        raise UserError("--run_dir is empty: name the folder that gets the results")
    there = pathlib.Path(cfg.from_)
    if cfg.from_ and not [*there.glob("checkpoint.pt"), *there.glob("*/checkpoint.pt")]:
        raise UserError(f"--from {cfg.from_} has no checkpoint: name the folder of a run, such as "
                        "runs/toy/seed0, or of a stage, such as runs/toy/seed0/cft")
    if cfg.device == "cuda":
        import torch  # not above: --help and the download of Beauty need no torch
        if not torch.cuda.is_available():
            raise UserError("--device cuda asks for a GPU, and torch sees none: use --device cpu")


# --- Which settings a checkpoint depends on ---------------------------------------------------

def settings_of(cfg, stage):
    """Returns the settings that a stage's weights depend on: {name: value}.

    These are the shared settings, and those of this stage and of the stages before it."""
    from config import STAGES  # not above: config.py imports this file
    later = tuple(name + "_" for name in STAGES[STAGES.index(stage) + 1:])
    values = dataclasses.asdict(cfg)
    if stage == "ar":
        del values["block_size"]  # the teacher writes one token at a time
    if stage in ("ar", "cft"):
        del values["commit"]      # the commit rule of roll-outs matters to OPD and RL alone
    return {name: value for name, value in values.items()
            if name not in RUNTIME and not name.startswith(later)}
