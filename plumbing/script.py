"""What surrounds the main function of every script: its command line, threads, errors, Ctrl-C.

Scripts import this *before* torch: see OMP_WAIT_POLICY.
"""
import os
import shlex
import sys
import time



def busy_cores(seconds=0.2):
    """How many cores other processes keep busy just now; 0 where /proc/stat does not say."""
    def times():
        with open("/proc/stat") as file:
            fields = [int(x) for x in file.readline().split()[1:]]
        return sum(fields[:8]), fields[3] + fields[4]  # all, idle

    try:
        all_before, idle_before = times()
        time.sleep(seconds)
        all_after, idle_after = times()
    except (OSError, ValueError, IndexError):
        return 0.0
    passed = max(1, all_after - all_before)
    return os.cpu_count() * (1 - (idle_after - idle_before) / passed)


# Threads that wait for work spin, which is quickest on an idle machine. But where another process
# is busy, a spinning thread holds the very core that the thread it waits for needs. Then they
# should sleep. (Toy on 2 cores, CFT steps a second: idle 6.6 spinning and 3.8 sleeping, with a
# busy neighbour 1.6 and 3.3.) So we look before torch is loaded, which reads this variable.
if "OMP_WAIT_POLICY" not in os.environ and busy_cores() > 0.3:
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

import torch  # noqa: E402

from fast.memory import keep_memory  # noqa: E402
from plumbing import checkpoint, processes  # noqa: E402
from plumbing.arguments import parse_args  # noqa: E402
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
