"""Under mpirun: `paceline-worker` in which one rank raises, is killed or is stopped in one phase of the second epoch.

Arguments: outcome (raise, kill or stop), phase, rank, folder for the ranks' process ids; then those of
`paceline-worker`. The fault is put into the function that does the phase's work, in this process alone.
"""

import functools
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import worker.sync.exchange
from worker.__main__ import main
from worker.beat import Beat
from worker.checkpoint import Checkpoint
from worker.checkpoint_writer import CheckpointWriter
from worker.data.batches import BatchReader
from worker.engine.model import Model
from worker.evaluation import Evaluator
from worker.sync.all_reduce import AllReduceExchange

outcome, phase, rank, folder = sys.argv[1:5]
del sys.argv[1:5]
own_rank = os.environ["OMPI_COMM_WORLD_RANK"]
Path(folder, own_rank).write_text(str(os.getpid()))
armed = False  # from the second epoch on


def fault() -> None:
    """What goes wrong."""
    if outcome == "raise":
        raise ValueError("out of cheese")
    os.kill(os.getpid(), signal.SIGKILL if outcome == "kill" else signal.SIGSTOP)


def faulty(work: Callable[..., Any]) -> Callable[..., Any]:
    """`work`, in front of which the fault lies."""

    @functools.wraps(work)
    def wrapped(*arguments: Any, **options: Any) -> Any:
        if armed:
            fault()
        return work(*arguments, **options)

    return wrapped


def arm(step: Callable[..., None]) -> Callable[..., None]:
    """The mark of a step's begin, which knows the epoch."""

    @functools.wraps(step)
    def wrapped(self: Beat, number: int, epoch: int) -> None:
        global armed
        step(self, number, epoch)
        armed = epoch == 2

    return wrapped


def faulty_update(job: Any) -> Any:
    """The job's optimizer, whose update does not work."""
    optimizer = make_update(job)
    return optimizer._replace(update=faulty(optimizer.update))


def take_and_wait(self: CheckpointWriter, checkpoint: Checkpoint) -> Path:
    """Take a checkpoint; it is on disk before the next step, so that what a row leaves does not hang on the disk."""
    path = take(self, checkpoint)
    self.wait()
    return path


take = CheckpointWriter.take
CheckpointWriter.take = take_and_wait
make_update = worker.sync.exchange.make_update
if own_rank == rank:
    Beat.step = arm(Beat.step)
    if phase == "update":
        worker.sync.exchange.make_update = faulty_update
    else:
        owner, name = {
            "data": (BatchReader, "take"),
            "forward": (Model, "forward"),
            "backward": (Model, "backward"),
            "exchange": (AllReduceExchange, "step"),
            "evaluate": (Evaluator, "evaluate"),
            "checkpoint": (CheckpointWriter, "take"),
        }[phase]
        setattr(owner, name, faulty(getattr(owner, name)))
main()
