"""Several processes of one command on this machine: torchrun, without its traceback at the end."""

import logging
import signal
import sys

from infra.cli import leave


def start_several(number: int, timeout_minutes: float) -> None:
    """Run this command in as many processes; end with the status of the first that failed."""
    logging.disable(logging.ERROR)  # the processes say themselves what happened
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main

    # A process that is asked to end may finish its step first.
    patience = ["--shutdown-timeout", str(max(1, round(60 * timeout_minutes)))]
    try:
        main(["--standalone", "--nproc-per-node", str(number), *patience, *sys.argv])
    except SignalException as error:
        sys.exit(128 + error.sigval)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:  # it could not say so itself
            name = signal.Signals(-failure.exitcode).name
            leave("train.py", f"process {rank} of {number} was ended by {name} (SIGKILL: perhaps "
                  "memory ran out); --resume continues from the last state", 1)
        sys.exit(failure.exitcode)
