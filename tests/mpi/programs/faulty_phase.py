"""Under mpirun: `paceline-worker` in which something goes wrong in one phase of the second epoch, once.

Arguments: what (a rank's fault: raise, kill, stop; or that of the last parameter server, seen to by the rank that
started it: kill_server, stop_server, kill_server_for_good, lose_server), phase, rank, folder (in whose `processes` the
ranks leave their process ids, and in `logs` what they say); then those of `paceline-worker`. It is put into the
function that does the phase's work, in this process alone; an update is a server's work where there are servers, and
its fault then lies in the server itself (faulty_server.py).
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
from worker.processes import redirect_output
from worker.server import supervision
from worker.server.process import ServerProcess
from worker.server.supervision import SupervisedServer
from worker.sync.all_reduce import AllReduceExchange
from worker.sync.parameter_server import ParameterServerExchange

outcome, phase, rank, folder = sys.argv[1:5]
del sys.argv[1:5]
own_rank = os.environ["OMPI_COMM_WORLD_RANK"]
Path(folder, "processes", own_rank).write_text(str(os.getpid()))
redirect_output(Path(folder, "logs"), int(own_rank))
armed = False  # from the second epoch on
happened = False


NO_PROGRAM = ["/no/such/python"]  # to start a server with again
FAULTY_SERVER = Path(__file__).parents[2] / "contract" / "faulty_server.py"
start_process = supervision.start_server_process
servers: list[SupervisedServer] = []  # those that this rank started
start_server = SupervisedServer.__init__


def fault() -> None:
    """What goes wrong."""
    global armed, happened
    armed, happened = False, True
    if outcome == "raise":
        raise ValueError("out of cheese")
    if outcome == "lose_server":
        supervision.start_server_process = functools.partial(start_process, program=NO_PROGRAM)
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


def start_faulty(*arguments: Any, **options: Any) -> ServerProcess:
    """Start a server that has the fault in its update."""
    lost = outcome == "lose_server" and options["restored"]
    program = (sys.executable, str(FAULTY_SERVER), "apply", f"{folder}/happened", "serve-parameters")
    return start_process(*arguments, **options, program=NO_PROGRAM if lost else program)


take = CheckpointWriter.take
CheckpointWriter.take = take_and_wait
make_update = worker.sync.exchange.make_update
if own_rank == rank:
    Beat.step = arm(Beat.step)
    SupervisedServer.__init__ = noted
    if phase == "update" and outcome.endswith("server"):
        os.environ |= {"FAULTY_STEP": "6", "FAULTY_SIGNAL": "SIGSTOP" if outcome == "stop_server" else "SIGKILL"}
        supervision.start_server_process = start_faulty
    elif phase == "update":
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
