"""Scripts of the project, run in the tests' own process with tiny settings."""
import os

import pytest

from plumbing.script import script

TINY = ("--d_model 16 --n_head 2 --n_layer 1 --n_train 64 --n_val 8 --n_test 16 --batch_size 4 "
        "--cft_prompts 16 --ar_steps 6 --cft_steps 6 --opd_steps 4 --rl_steps 4 "
        "--rl_prompts 2 --rl_group 3 --every 2 --threads 1 --tau 0.9").split()
EVALUATION = "--eval_taus 0.5,1.0 --eval_curve_users 8 --eval_speed_seconds 0.01".split()


def run(module, monkeypatch, run_dir, *options):
    """Runs a script with TINY settings, which options override; evaluate.py measures little."""
    few = EVALUATION if module.__name__ == "evaluate" else []
    argv = [module.__file__, *TINY, *few, "--run_dir", str(run_dir), *options]
    monkeypatch.setattr("sys.argv", argv)
    script(module.main, module.__doc__, getattr(module, "Options", None))


def refused(capsys, run, *args, **how):
    """Runs what must refuse: one line on stderr, exit code 2. Returns the line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(*args, **how)
    message = capsys.readouterr().err.splitlines()[-1]  # after what is left of bars
    assert stop.value.code == 2 and message.startswith("error: ")
    return message


def checkpoint(run_dir, stage, config="toy"):
    return os.path.join(run_dir, config, "seed0", stage, "checkpoint.pt")
