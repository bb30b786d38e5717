"""What surrounds the main function of every script: its command line, threads, errors, Ctrl-C.

Scripts import this *before* torch: see OMP_WAIT_POLICY.
"""
import os
import shlex
import sys
import time

# Threads that wait for work sleep instead of spinning. Spinning is quicker on an idle machine
# (toy, CFT steps a second on 2 cores: 5.1, else 4.3), but with one other busy process it holds
# the very core that the thread it waits for needs (1.4, else 2.6). It counts when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch  # noqa: E402

from config import parse_args  # noqa: E402
from fast.memory import keep_memory  # noqa: E402
from plumbing import checkpoint, processes  # noqa: E402
from plumbing.settings import UserError  # noqa: E402

WRONG, STOPPED = 2, 130  # exit codes: what the user can mend; Ctrl-C, as shells count it


def script(main, doc, also=None):
    """Runs main(cfg), or main(cfg, options) with `also`, the dataclass of a script's own options.

    What the user can mend is one sentence on stderr, and exit code 2; never a traceback."""
    try:
        parsed = parse_args(doc, also=also)
        cfg, *options = parsed if also else (parsed,)
        prepare(cfg)
        main(cfg, *options)
        processes.stop()
    except BrokenPipeError:  # whoever reads the output has seen enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (UserError, OSError) as error:  # OSError: what the disk says (full, gone, read-only)
        leave(f"error: {error}", WRONG)
    except KeyboardInterrupt:
        typed = "the same command" if processes.RANKS > 1 else shlex.join(sys.orig_argv)
        leave(f"stopped; to go on from the last checkpoint, type again: {typed}", STOPPED)


def prepare(cfg):
    """Threads, memory, precision, processes."""
    if checkpoint.fcntl is None:
        raise UserError("Windows is not supported, since it cannot lock files as this project "
                        "does (fcntl): use WSL or a container")
    torch.set_num_threads(cfg.threads)
    keep_memory()
    device = checkpoint.device_of(cfg).type
    if device == "cuda":
        # TF32: decoding is several times faster, and still float32 between products.
        torch.set_float32_matmul_precision("high")
    processes.start(device)


def leave(message, code):
    """Says why, and exits. What all processes find, the first of them says: it ends sooner, and
    torchrun then ends the others. An orderly exit of one of several might wait for the others."""
    time.sleep(3 * (processes.RANK > 0))
    print(message, file=sys.stderr, flush=True)
    if processes.RANKS > 1:
        os._exit(code)
    sys.exit(code)
