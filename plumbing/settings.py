"""Settings: which values they may have, and the command line that reads them.

A setting is a field of a frozen dataclass, and its annotation is a *kind* of value:

    @dataclass(frozen=True)
    class Options:
        show: Whole(0, 1000) = 0     # print so many test users
        split: OneOf("test", "val") = "test"

Range and meaning are said there and nowhere else: `parse` checks against them, --help prints them.
"""
import dataclasses
import difflib
import inspect
import math


class UserError(Exception):
    """Something only the user can mend: one sentence that says what to do.

    Scripts print it and exit with code 2 (plumbing/script.py)."""


# --- Kinds of values: `read` makes one from text, `check` refuses one with ValueError ---------

class Kind:
    """What all kinds share. str(kind) completes "it must be ...": "one of test, val"."""

    def read(self, text):
        return self.check(self.convert(text))

    def check(self, value):
        if not self.allows(value):
            raise ValueError(f"must be {self}, not {value!r}")
        return value

    def text(self, value):
        """How a value is given on the command line: read(text(value)) is the value."""
        return str(value)


class Number(Kind):
    """A finite number from low to high; `above` is a lower bound that is itself left out."""

    def __init__(self, low=None, high=None, above=None):
        self.low, self.high, self.above = low, high, above

    def allows(self, value):
        if isinstance(value, bool) or not isinstance(value, self.types):
            return False
        if isinstance(value, float) and not math.isfinite(value):
            return False
        large_enough = self.low is None or value >= self.low
        if self.above is not None:
            large_enough = large_enough and value > self.above
        return large_enough and (self.high is None or value <= self.high)

    def __str__(self):
        bounds = {"above": self.above, "at least": self.low, "at most": self.high}
        given = [f"{name} {bound}" for name, bound in bounds.items() if bound is not None]
        return " ".join([self.name, " and ".join(given)]).strip()


class Whole(Number):
    name, types, convert = "a whole number", int, int


class Real(Number):
    name, types, convert = "a number", (int, float), float


class Numbers(Real):
    """Numbers with commas between them, `0.3,0.7`: a tuple, each in the range."""
    name = "numbers with commas between them, each"

    def convert(self, text):
        return tuple(float(part) for part in text.split(","))

    def allows(self, value):
        each = super().allows
        return isinstance(value, tuple) and len(value) > 0 and all(map(each, value))

    def text(self, value):
        return ",".join(map(str, value))


class OneOf(Kind):
    def __init__(self, *choices):
        self.choices = choices

    def convert(self, text):
        return text

    def allows(self, value):
        return value in self.choices

    def __str__(self):
        return "one of " + ", ".join(self.choices)


class Switch(Kind):
    """true or false; 1 and 0 will do."""

    def convert(self, text):
        return {"true": True, "1": True, "false": False, "0": False}[text.lower()]

    def allows(self, value):
        return isinstance(value, bool)

    def text(self, value):
        return str(value).lower()

    def __str__(self):
        return "true or false"


class Text(Kind):
    """Any text: a file, a folder, a list that a script takes apart."""

    def convert(self, text):
        return text

    def allows(self, value):
        return isinstance(value, str)

    def __str__(self):
        return "text"


# --- The command line -------------------------------------------------------------------------

def kinds(*classes):
    """{name: kind} of the settings of dataclasses."""
    return {f.name: f.type for cls in classes for f in dataclasses.fields(cls)}


def parse(doc, argv, *classes):
    """The settings of the dataclasses `classes` that a command line gives: {name: value}.

    Takes `--name value` and `--name=value`. Prints `doc` and all settings for --help, and exits.
    Raises UserError for an unknown name (with the nearest), a missing value, one out of range."""
    if "-h" in argv or "--help" in argv:
        print(help_text(doc, *classes))
        raise SystemExit(0)
    known, given, rest = kinds(*classes), {}, list(argv)
    while rest:
        option, equals, text = rest.pop(0).partition("=")
        name = option.removeprefix("--")
        if name == option or name not in known:
            raise UserError(unknown(option, known))
        if not equals:
            if not rest:
                raise UserError(f"{option} needs a value: it must be {known[name]}")
            text = rest.pop(0)
        try:
            given[name] = known[name].read(text)
        except (KeyError, ValueError, OverflowError):
            raise UserError(f"{option} must be {known[name]}, not {shown(text)}") from None
    return given


def make(cls, values):
    """A dataclass with those of the values {name: value} that are its own."""
    own = [field.name for field in dataclasses.fields(cls)]
    return cls(**{name: values[name] for name in own if name in values})


def shown(text, most=60):
    """A text of the user's, short and on one line."""
    return repr(text if len(text) <= most else text[:most] + "...")


def unknown(option, known):
    near = difflib.get_close_matches(option.lstrip("-"), known, n=3, cutoff=0.4)
    hint = "see --help for the list"
    if near:
        hint = f"did you mean {' or '.join('--' + name for name in near)}?"
    return f"unknown option {shown(option)}: {hint}"


def help_text(doc, *classes):
    """A script's docstring, then its settings as they stand in the source: kind, value, meaning."""
    out = [doc.strip(), "", "Settings, any of them as --name value, with their ranges and the "
           "values of the toy preset:", ""]
    for cls in classes:
        for line in inspect.getsource(cls).splitlines():
            if line.strip().startswith(("@property", "def ", "PRESETS")):
                break  # what follows is code
            if not line.startswith(("@", "class ")):
                out.append(line)
    return "\n".join(out)
