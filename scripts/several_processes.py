"""Runs a program in several processes at a time, as torchrun does, and ends as the first of them that fails: with its
exit code, and without torchrun's own traceback.

    python scripts/several_processes.py 2 inference.py arguments…
"""

import logging
import os
import signal
import sys
import tempfile
from pathlib import Path

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun


def start(processes: str, program: str, *args: str) -> int:
    """Returns the exit code. The processes say themselves why they end, once: they find in LONGLIVE_LAST_WORD the path
    of the file that the first to say it makes."""
    logging.disable(logging.CRITICAL)  # torchrun's view of the same
    with tempfile.TemporaryDirectory(prefix="longlive-") as folder:
        os.environ["LONGLIVE_LAST_WORD"] = str(Path(folder) / "said")
        try:
            torchrun(["--standalone", "--nproc-per-node", processes, program, *args])
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            if failure.exitcode >= 0:
                return failure.exitcode
            name = signal.Signals(-failure.exitcode).name
            sys.stderr.write(f"error: process {rank} was ended by signal {name}; where nobody sent it, host memory ran "
                             f"out\n")
            return 128 - failure.exitcode
        except (SignalException, KeyboardInterrupt):
            return 130
    return 0


if __name__ == "__main__":
    sys.exit(start(*sys.argv[1:]))
