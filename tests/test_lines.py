"""What is read is what runs: the lines of the lesson that a default run of all stages executes."""
import sys
from pathlib import Path

import evaluate
import train_ar
import train_cft
import train_opd
import train_rl
from conftest import ROOT
from scripts import run

LESSON = ("model.py", "diffusion.py", "sampler.py",
          "train_ar.py", "train_cft.py", "train_opd.py", "train_rl.py")


def lines_of_functions(path):
    """The lines of a file that hold code inside functions: what importing alone does not run."""
    found = set()
    todo = [compile(Path(path).read_text("utf-8"), path, "exec")]
    while todo:
        code = todo.pop()
        todo += [const for const in code.co_consts if hasattr(const, "co_lines")]
        if code.co_flags & 0x1:  # CO_OPTIMIZED: a function, not a module or a class
            found |= {line for _, _, line in code.co_lines() if line} - {code.co_firstlineno}
    return found


def test_a_default_run_executes_the_lesson(tmp_path, monkeypatch):
    seen = {str(Path(ROOT, name)): set() for name in LESSON}

    def trace_lines(frame, event, _):
        lines = seen.get(frame.f_code.co_filename)
        if lines is None:
            return None
        lines.add(frame.f_lineno)
        return trace_lines

    before = sys.gettrace()
    sys.settrace(trace_lines)
    try:
        for module in (train_ar, train_cft, train_opd, train_rl, evaluate):
            run(module, monkeypatch, tmp_path)
    finally:
        sys.settrace(before)

    there = {path: lines_of_functions(path) for path in seen}
    n_run = sum(len(there[path] & seen[path]) for path in seen)
    print({path: sorted(there[path] - seen[path]) for path in seen})
    assert n_run >= 0.95 * sum(map(len, there.values()))
