"""Under mpirun: `paceline-worker` in which something goes wrong in one phase of the second epoch, once.

Arguments: what (a rank's fault: raise, kill, stop; or that of the last parameter server, seen to by the rank that
started it: kill_server, stop_server, kill_server_for_good, lose_server), phase, rank, folder for the ranks' process
ids; then those of `paceline-worker`. It is put into the function that does the phase's work, in this process alone.
"""

import contextlib
import functools
import os
import signal
import sys
import threading
import time
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
from worker.server import supervision
from worker.server.supervision import SupervisedServer
from worker.sync.all_reduce import AllReduceExchange
from worker.sync.parameter_server import ParameterServerExchange

outcome, phase, rank, folder = sys.argv[1:5]
del sys.argv[1:5]
own_rank = os.environ["OMPI_COMM_WORLD_RANK"]
Path(folder, own_rank).write_text(str(os.getpid()))
armed = False  # from the second epoch on
happened = False


servers: list[SupervisedServer] = []  # those that this rank started
start_server = SupervisedServer.__init__


def fault() -> None:
    """What goes wrong."""
    global armed, happened
    armed, happened = False, True
    if outcome == "raise":
        raise ValueError("out of cheese")
    if outcome == "lose_server":  # no program to start it with again
        supervision.start_server_process = functools.partial(
            supervision.start_server_process, program=["/no/such/python"]
        )
    if outcome == "kill_server_for_good":
        threading.Thread(target=keep_killing, daemon=True).start()
        return
    victim = servers[-1].pid if outcome.endswith("server") else os.getpid()
    os.kill(victim, signal.SIGSTOP if outcome.startswith("stop") else signal.SIGKILL)


def keep_killing() -> None:
    """Kill the server each time it is there again."""
    while True:
        with contextlib.suppress(ProcessLookupError):
            os.kill(servers[-1].pid, signal.SIGKILL)
        time.sleep(0.02)


def noted(self: SupervisedServer, *arguments: Any) -> None:
    """A server is started."""
    start_server(self, *arguments)
    servers.append(self)


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
        armed = epoch == 2 and not happened

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
    SupervisedServer.__init__ = noted
    if phase == "update":
        worker.sync.exchange.make_update = faulty_update
    else:
        places = {
            "data": [(BatchReader, "take")],
            "forward": [(Model, "forward")],
            "backward": [(Model, "backward")],
            "exchange": [(AllReduceExchange, "step"), (ParameterServerExchange, "step")],  # a job has one of the two
            "evaluate": [(Evaluator, "evaluate")],
            "checkpoint": [(CheckpointWriter, "take")],
            "pull": [(ParameterServerExchange, "pull")],
        }[phase]
        for owner, name in places:
            setattr(owner, name, faulty(getattr(owner, name)))
main()
