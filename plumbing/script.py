"""What surrounds the main function of every script: command line, threads, errors, Ctrl-C."""
import os
import sys
import time

import torch

from plumbing import processes
from plumbing.settings import UserError, parse_args


def script(main, doc, also=None):
    """Runs main(cfg), or main(cfg, options) with `also`, the dataclass of a script's own options.

    An error that the user can mend is one sentence on stderr and exit code 2, not a traceback."""
    try:
        parsed = parse_args(doc, also=also)
        cfg, *options = parsed if also else (parsed,)
        prepare(cfg)
        main(cfg, *options)
        processes.stop()
    except BrokenPipeError:  # whoever reads the output has seen enough, for example `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (UserError, OSError) as error:  # OSError: the disk is full, or a file cannot be read
        leave(f"error: {error}", 2)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        leave("error: this takes more memory than there is: use a smaller model (--d_model, "
              "--n_layer), --batch_size or --rl_prompts", 2)
    except KeyboardInterrupt:
        leave("stopped; the same command, without --again, goes on from the last checkpoint", 130)


def prepare(cfg):
    """Sets threads and precision, and joins the other processes."""
    torch.set_num_threads(cfg.threads)
    device = processes.device_of(cfg).type
    if device == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32: faster products of float32 matrices
    processes.start(device)


def out_of_memory(error):
    """Whether an error says so: numpy's MemoryError, torch's of a GPU, its RuntimeError of a CPU."""
    return (isinstance(error, (MemoryError, torch.OutOfMemoryError))
            or "can't allocate memory" in str(error))


def leave(message, code):
    """Prints why the script ends, and exits."""
    # If all processes fail alike, the first prints its message, and torchrun ends the others.
    time.sleep(3 * (processes.RANK > 0))
    print(message, file=sys.stderr, flush=True)
    if processes.RANKS > 1:
        os._exit(code)  # an orderly exit might wait for the other processes
    sys.exit(code)
