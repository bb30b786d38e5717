"""The command line: what it takes, and the one sentence with which it refuses the rest."""
import dataclasses
import subprocess
import sys

import pytest
import torch

from conftest import ROOT, refusal  # first: it puts the project on Python's path

import scripts
import toy.world
import train_ar
import train_cft
import train_opd
import train_rl
from config import PRESETS, STAGES, Config
from plumbing import checkpoint
from plumbing.script import script
from plumbing.settings import (RUNTIME, Numbers, OneOf, Real, Switch, Text, UserError, Whole,
                               parse_args, settings_of)


@dataclasses.dataclass(frozen=True)
class Own:
    """Options of a script of its own."""
    users: Whole(1, 9) = 8         # how many
    shift: Real(-5, 5) = 0.0
    PRESETS = {"small": dict(users=3)}

    def method(self):
        pass


def test_kinds_take_and_refuse_values():
    cases = [
        (Whole(1, 256), {"1": 1, "256": 256, " 7 ": 7}, ["0", "257", "1.0", "", "x", "9" * 5000]),
        (Whole(-3), {"-3": -3, "9" * 30: int("9" * 30)}, ["-4", "nan"]),
        (Real(0, 1), {"0": 0.0, "1e-3": 0.001}, ["-0.1", "1.1", "nan", "-inf", "1e999", "0,1"]),
        (Real(above=0), {"5e-324": 5e-324, "1e300": 1e300}, ["0", "-1", "inf"]),
        (Numbers(above=0, high=1), {"0.3,1": (0.3, 1.0), "1": (1.0,)}, ["", "0.5,", "0.5,2", "0"]),
        (OneOf("a", "b"), {"a": "a"}, ["", "A", "c"]),
        (Switch(), {"true": True, "1": True, "False": False, "0": False}, ["", "maybe", "2"]),
        (Text(), {"": "", "a b": "a b"}, [])]
    for kind, good, bad in cases:
        for text, value in good.items():
            assert kind(text) == value and type(kind(text)) is type(value)
        for text in bad:
            with pytest.raises(Exception, match="^must be .*, not '"):
                kind(text)
    for field in dataclasses.fields(Config):
        values = [field.default] + [p[field.name] for p in PRESETS.values() if field.name in p]
        assert all(field.type(str(value)) == value for value in values), field.name


def test_a_command_line_that_cannot_work_gets_one_sentence(tmp_path):
    whole = "a whole number at least 0"
    cases = [
        ("--config toyy", f"--config must be one of {', '.join(PRESETS)}, not 'toyy'"),
        ("--threads x", "--threads must be a whole number at least 1 and at most 256, not 'x'"),
        ("--cft_step 3", "unknown option '--cft_step': did you mean --cft_steps"),
        ("--zzqq 3", "unknown option '--zzqq': see --help for the list"),
        ("--tau 0.5 -5", "unknown option '-5'"),
        ("--from_ x", "unknown option '--from_': did you mean --from?"),
        ("--help=3", "unknown option '--help'"),
        ("--cft_steps", f"--cft_steps needs a value: it must be {whole}"),
        ("--cft_steps --seed 3", f"--cft_steps needs a value: it must be {whole}"),
        ("--cft_steps -1", f"--cft_steps must be {whole}"),
        ("--tau -inf", "--tau needs a value: it must be a number above 0 and at most 1"),
        ("--d_model 18 --n_head 4", "--d_model must be a multiple of 2 x n_head = 8"),
        ("--run_dir=", "--run_dir is empty: name the folder that gets the results"),
        (f"--from {tmp_path}", f"--from {tmp_path} has no checkpoint: name the folder of a run")]
    if not torch.cuda.is_available():
        cases.append(("--device cuda", "--device cuda asks for a GPU, and torch sees none"))
    for line, expected in cases:
        assert refusal(parse_args, "", line.split()).startswith(expected)
    assert "not 'many\\nmore'" in refusal(parse_args, "", ["--cft_steps", "many\nmore"])


def test_presets_and_what_overrides_them(tmp_path):
    for preset, values in PRESETS.items():
        cfg = parse_args("", ["--config", preset])
        assert cfg == Config(**{"config": preset, **values})
    cfg = parse_args("", "--tau=0.25 --config small --seed 4 --seed 5".split())
    assert cfg == dataclasses.replace(parse_args("", ["--config", "small"]), tau=0.25, seed=5)
    (tmp_path / "checkpoint.pt").write_text("")
    cfg = parse_args("", ["--from", str(tmp_path), "--again", "true", "--run_dir", "a b"])
    assert (cfg.from_, cfg.again, cfg.run_dir) == (str(tmp_path), True, "a b")
    assert parse_args("", ["--shift", "-2"], Own) == (Config(), Own(shift=-2.0))
    assert parse_args("", ["--config", "small"], Own)[1].users == 3
    assert parse_args("", ["--users", "4", "--config", "small"], Own)[1].users == 4


def test_help_shows_every_setting_as_its_source_has_it(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_args("What the script does: 5 %.\n", ["--tau", "0.5", "--help"], Own)
    out = capsys.readouterr().out
    assert stop.value.code == 0 and out.startswith("What the script does: 5 %.\n")
    for field in dataclasses.fields(Config) + dataclasses.fields(Own):
        assert f"\n    --{field.name.rstrip('_')}: " in out
    assert "--users: Whole(1, 9) = 8         # how many\n" in out
    assert "def " not in out and "PRESETS =" not in out and "@" not in out


def test_a_stage_depends_on_its_settings_and_on_those_before_it():
    names = {field.name for field in dataclasses.fields(Config)}
    assert RUNTIME < names
    before = set()
    for i, stage in enumerate(STAGES):
        now = settings_of(Config(), stage).keys()
        assert before < now and not any(name.startswith(STAGES[i + 1:]) for name in now)
        assert {name for name in names if name.startswith(stage + "_")} < now
        assert ("block_size" in now) == (stage != "ar")
        assert ("commit" in now) == (stage in ("opd", "rl"))  # the rule of their roll-outs
        before = now
    assert before == names - RUNTIME


def test_a_stage_reads_every_setting_that_it_depends_on(tmp_path, monkeypatch):
    """So none of them is without effect, because a line names a constant in its place."""
    read = set()

    class Seen(Config):
        def __getattribute__(self, name):
            read.add(name)
            return super().__getattribute__(name)

    def unseen(cfg, stage):
        return settings_of(Config(**vars(cfg)), stage)
    monkeypatch.setattr(toy.world, "TOY_DRAWN", 64)
    monkeypatch.setattr(checkpoint, "settings_of", unseen)         # these two read all
    monkeypatch.setattr(checkpoint, "check_same", lambda *_: None)
    tiny = parse_args("", [*scripts.TINY, "--run_dir", str(tmp_path)])
    shared = settings_of(tiny, "ar").keys() - {name for name in vars(tiny) if name[:3] == "ar_"}
    for stage, module in zip(STAGES, (train_ar, train_cft, train_opd, train_rl)):
        cfg = Seen(**vars(tiny))
        read.clear()
        module.main(cfg)
        own = {name for name in vars(tiny) if name.startswith(stage + "_")}
        # RL has a number of prompts of its own, no loss of tokens, and nothing but answers.
        others = {"batch_size", "answer_weight", "answer_share"} if stage == "rl" else set()
        assert not (own | shared - others) - read, stage


def test_a_script_ends_with_one_line_and_an_exit_code(monkeypatch, capsys):
    going_on = "stopped; the same command, without --again, goes on from the last checkpoint\n"
    cases = [(UserError("mend it"), 2, "error: mend it\n"),
             (FileNotFoundError(2, "No such file", "x"), 2, "error: [Errno 2] No such file: 'x'\n"),
             (KeyboardInterrupt(), 130, going_on)]
    too_large = ("error: this takes more memory than there is: use a smaller model (--d_model, "
                 "--n_layer), --batch_size or --rl_prompts\n")
    cases += [(error, 2, too_large) for error in (
        MemoryError(), torch.OutOfMemoryError(), RuntimeError("[x] can't allocate memory: y"))]
    monkeypatch.setattr(sys, "argv", "a.py --seed 3 --threads 1".split())
    for error, code, expected in cases:
        def main(cfg):
            assert cfg.seed == 3 and torch.get_num_threads() == 1
            raise error
        with pytest.raises(SystemExit) as stop:
            script(main, "")
        assert stop.value.code == code and capsys.readouterr().err == expected

    def wrong(cfg):
        raise RuntimeError("of another kind")
    with pytest.raises(RuntimeError, match="of another kind"):
        script(wrong, "")
    code = ("from plumbing.script import script\n"
            "def main(cfg):\n"
            "    for i in range(100000): print(i)\n"
            "script(main, '')")
    command = f'"{sys.executable}" -c "{code}" --threads 1 | head -1; echo ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "0\n1\n" and done.stderr == ""  # a reader has seen enough: no traceback
