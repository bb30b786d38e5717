"""Every setting has a range, and says so in one sentence before anything is written."""
import dataclasses
import importlib
import inspect
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from config import PRESETS, STAGES, Config
from conftest import ROOT
from plumbing import settings
from plumbing.arguments import RUNTIME, parse_args, settings_of
from plumbing.settings import Kind, Number, Numbers, OneOf, Real, Switch, Text, UserError, Whole


def all_settings():
    """[(dataclass, field)] of Config and of the options of every script that has its own."""
    classes = [Config]
    # The project's own files: at the top and one folder below, not those of an environment.
    ours = [*Path(ROOT).glob("*.py"), *Path(ROOT).glob("[a-z]*/*.py")]
    for path in sorted(ours):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        if path.parent.name != "tests" and "\nclass Options" in path.read_text():
            module = importlib.import_module(name)
            classes += [c for _, c in inspect.getmembers(module, dataclasses.is_dataclass)
                        if c.__module__ == name and c.__name__.startswith("Options")]
    return [(cls, field) for cls in classes for field in dataclasses.fields(cls)]


SETTINGS = all_settings()
IDS = [field.name for _, field in SETTINGS]


def refusal(name, text, *classes):
    """The sentence with which a value is refused."""
    with pytest.raises(UserError) as refused:
        settings.parse("", [f"--{name}", text], *classes)
    sentence = str(refused.value)
    assert sentence and "\n" not in sentence and len(sentence) < 300
    return sentence


def impossible(kind):
    """Texts that no value of this kind may have, beyond each end of its range too."""
    if isinstance(kind, (OneOf, Switch)):
        return ["", "nonsense", "TOY ", "2"]
    if not isinstance(kind, Number):
        return []
    texts = ["", " ", "nan", "NaN", "-nan", "inf", "-inf", "1e999", "x", "0x10", "1,", "--1", "1+"]
    if not isinstance(kind, Numbers):
        texts += ["0.1,0.2", "true"]
    if isinstance(kind, Whole):
        texts += ["0.5", "1.0", "1e3", "9" * 5000, "-" + "9" * 400]
    for bound, outside in ((kind.low, -1), (kind.high, 1)):
        if bound is not None:
            texts += [str(bound + outside), str(bound + outside * 10 ** 30)]
            if isinstance(kind, Real):
                texts.append(repr(math.nextafter(bound, outside * math.inf)))
    if kind.above is not None:
        texts += [str(kind.above), str(kind.above - 1), str(-10 ** 30)]
    return texts


@pytest.mark.parametrize("cls, field", SETTINGS, ids=IDS)
def test_a_setting_refuses_what_it_cannot_be_in_one_sentence(cls, field):
    kind = field.type
    assert isinstance(kind, Kind), f"{field.name} has no kind"
    for text in impossible(kind):
        assert refusal(field.name, text, cls).startswith(f"--{field.name} must be {kind}, not ")
    for value in (None, [], torch.zeros(1)):
        assert not kind.allows(value)
    if isinstance(kind, Number):
        assert not kind.allows(True) and not kind.allows(math.nan)


@pytest.mark.parametrize("cls, field", SETTINGS, ids=IDS)
def test_a_setting_takes_what_its_range_says(cls, field):
    kind, presets = field.type, PRESETS if cls is Config else getattr(cls, "PRESETS", {})
    values = [field.default] + [p[field.name] for p in presets.values() if field.name in p]
    values += list(getattr(kind, "choices", ()))
    if isinstance(kind, Number) and not isinstance(kind, Numbers):
        values += [bound for bound in (kind.low, kind.high) if bound is not None]
        if kind.above is not None:
            values.append(math.nextafter(kind.above, math.inf))
    for value in values:
        assert kind.check(value) == value
        for argv in ([f"--{field.name}", kind.text(value)], [f"--{field.name}={kind.text(value)}"]):
            assert settings.parse("", argv, cls) == {field.name: value}


@pytest.mark.parametrize("cls, field", SETTINGS, ids=IDS)
def test_a_range_is_not_open_where_slips_are_dear(cls, field):
    kind = field.type
    if isinstance(kind, Number):
        assert kind.low is not None or kind.above is not None
    if isinstance(kind, Whole):  # memory and time grow with these
        assert kind.high is not None


# What once ended in a traceback, in nonsense, or in a run that learned nothing
@pytest.mark.parametrize("option, value", [
    ("grad_clip", "0"), ("grad_clip", "-1"), ("warmup", "-5"), ("warmup", "0"), ("seed", "-1"),
    ("seed", "18446744073709551616"), ("ar_lr", "nan"), ("ar_lr", "-0.001"), ("d_model", "0"),
    ("tau", "nan"), ("clash", "nan"), ("ar_misplace", "9"), ("ar_steps", "-1"),
    ("rl_group", "1"), ("n_candidates", "113"), ("block_size", "0"), ("every", "0")])
def test_a_slip_that_used_to_run_is_refused(option, value):
    with pytest.raises(UserError, match=f"--{option} must be .*, not '{value}'"):
        parse_args("", [f"--{option}", value])


@pytest.mark.parametrize("argv, expected", [
    (["--config", "toyy"], f"--config must be one of {', '.join(PRESETS)}, not 'toyy'"),
    (["--cft_step", "3"], "did you mean --cft_steps"),
    (["cft_steps", "3"], "unknown option 'cft_steps'"),
    (["--zzzzqqqq", "3"], "see --help"),
    (["--cft_steps"], "--cft_steps needs a value: it must be a whole number at least 0"),
    (["--cft_steps", "many\nmore"], "not 'many\\\\nmore'"),
    (["--rl_conditional", "maybe"], "must be true or false"),
    (["--commit", "all"], "must be one of independent, threshold"),
    (["--d_model", "18", "--n_head", "4"], "--d_model must be a multiple of 2 x n_head = 8"),
])
def test_a_command_line_that_cannot_work_is_answered(argv, expected):
    with pytest.raises(UserError, match=expected) as refused:
        parse_args("", argv)
    assert "\n" not in str(refused.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_named():
    with pytest.raises(UserError, match="--device cuda asks for a GPU"):
        parse_args("", ["--device", "cuda"])


def test_a_refusal_is_exit_code_2_and_one_line(tmp_path):
    done = subprocess.run([sys.executable, f"{ROOT}/train_ar.py", "--run_dir", str(tmp_path),
                           "--grad_clip", "0"], capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout and not list(tmp_path.iterdir())
    assert done.stderr == "error: --grad_clip must be a number above 0, not '0'\n"


@dataclasses.dataclass(frozen=True)
class Own:
    """Options of a script of its own."""
    users: Whole(1, 9) = 8         # how many
    points: Numbers(above=0, high=1) = (0.3, 0.7)
    name: Text() = "x"
    PRESETS = {"small": dict(users=3)}

    def method(self):
        pass


def test_a_script_adds_options_of_its_own_with_their_presets():
    cfg, own = parse_args("", ["--tau", "0.25", "--points", "0.5,1.0"], Own)
    assert cfg == Config(tau=0.25) and own == Own(points=(0.5, 1.0))
    assert parse_args("", ["--config", "small"], Own)[1].users == 3
    assert parse_args("", ["--config", "small", "--users", "4"], Own)[1].users == 4
    for text in ("0.5,much", "0.5,,1", "0.5,2", "0", ""):
        assert "each above 0 and at most 1" in refusal("points", text, Config, Own)
    with pytest.raises(UserError, match="unknown option '--users'"):
        parse_args("", ["--users", "4"])


def test_help_shows_every_setting_with_its_range(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_args("What the script does.", ["--tau", "0.5", "--help"], Own)
    out = capsys.readouterr().out
    assert stop.value.code == 0 and out.startswith("What the script does.")
    for name in settings.kinds(Config, Own):
        assert f"\n    {name}: " in out
    assert "grad_clip: Real(above=0) = 1.0" in out and "users: Whole(1, 9) = 8" in out
    assert "def " not in out and "PRESETS =" not in out and "@" not in out


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_go_together(preset):
    cfg = parse_args("", ["--config", preset])
    assert cfg.config == preset and {**PRESETS[preset]}.items() <= dataclasses.asdict(cfg).items()
    assert cfg.n_labels == 2 * cfg.n_candidates and cfg.min_list == cfg.n_candidates // 2


def test_a_stage_depends_on_its_settings_and_those_before_it():
    names = {field.name for field in dataclasses.fields(Config)}
    assert RUNTIME < names and len(names) <= 60
    cfg, shared = Config(), None
    for i, stage in enumerate(STAGES):
        now = set(settings_of(cfg, stage))
        for later in STAGES[i + 1:]:
            assert not {name for name in now if name.startswith(later + "_")}
        assert now.isdisjoint(RUNTIME) and (shared is None or shared < now)
        assert {name for name in names if name.startswith(stage + "_")} <= now
        shared = now
    assert "block_size" not in settings_of(cfg, "ar") and "block_size" in settings_of(cfg, "cft")
    assert shared == names - RUNTIME
