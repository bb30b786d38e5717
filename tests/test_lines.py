"""What is read is what runs: the lines of the lesson that a default run of all stages executes."""
import ast
import sys
from pathlib import Path

import torch

import evaluate
import train_ar
import train_cft
import train_opd
import train_rl
from plumbing.settings import parse_args

ROOT = Path(__file__).parents[1]
LESSON = ("model.py", "diffusion.py", "sampler.py",
          "train_ar.py", "train_cft.py", "train_opd.py", "train_rl.py")
TINY = ("--n_train 64 --n_val 8 --n_test 8 --d_model 32 --batch_size 4 --threads 1 --ar_steps 4 "
        "--cft_steps 4 --opd_steps 2 --rl_steps 2 --rl_prompts 2 --rl_group 2").split()
TINY_REPORT = "--eval_curve_users 4 --eval_taus 0.9 --eval_speed_seconds 0.1".split()


def lines_of_functions(path):
    """The lines of a file that hold code inside functions: what importing alone does not run."""
    found = set()
    todo = [compile(path.read_text("utf-8"), str(path), "exec")]
    while todo:
        code = todo.pop()
        inner = [const for const in code.co_consts if hasattr(const, "co_lines")]
        todo += inner
        if code.co_flags & 0x1:  # CO_OPTIMIZED: a function, not a module or a class
            lines = {line for _, _, line in code.co_lines() if line}
            found |= lines - {code.co_firstlineno}
    docstrings = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            docstrings |= set(range(node.lineno, node.end_lineno + 1))
    return found - docstrings


def test_a_default_run_executes_the_lesson(tmp_path):
    paths = {str(ROOT / name): set() for name in LESSON}

    def trace_lines(frame, event, _):
        seen = paths.get(frame.f_code.co_filename)
        if seen is None:
            return None
        seen.add(frame.f_lineno)
        return trace_lines

    torch.set_num_threads(1)
    argv = [*TINY, "--run_dir", str(tmp_path)]
    before = sys.gettrace()
    sys.settrace(trace_lines)
    try:
        for stage in (train_ar, train_cft, train_opd, train_rl):
            stage.main(parse_args("", argv))
        evaluate.main(*parse_args("", argv + TINY_REPORT, evaluate.Options))
    finally:
        sys.settrace(before)

    all_lines = run_lines = 0
    for path, seen in paths.items():
        lines = lines_of_functions(Path(path))
        missed = sorted(lines - seen)
        print(f"{Path(path).name}: {len(lines) - len(missed)} of {len(lines)}; not {missed}")
        all_lines += len(lines)
        run_lines += len(lines & seen)
    assert run_lines >= 0.95 * all_lines
