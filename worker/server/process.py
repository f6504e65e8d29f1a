"""The parameter server as a process: what `paceline-worker serve-parameters` runs, and how a rank starts it.

The server says `listening HOST:PORT` in one line on standard output when it is ready. It lives as long as its standard
input stays open: the pipe to the rank that started it closes however that rank ends, SIGKILL included, so no server
outlives its job.

Rules: nothing of MPI is in this process, neither the library nor a rank's environment.
"""

import asyncio
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from protos import environment, job_pb2
from protos.job_file import to_yaml
from worker.errors import CheckpointFault, TrainingFault, UsageFault
from worker.server.modes import mode_of
from worker.server.published import ShardWire, open_wire
from worker.server.pushes import ShardSetup
from worker.server.shard import Shard
from worker.server.snapshots import Snapshots
from worker.wire import keep_freed_memory

START_TIMEOUT_SECONDS = 20.0
STOP_TIMEOUT_SECONDS = 5.0
LEASES_IN_A_STALL = 4  # a guest that is gone is to cost less time than what ends a job
_READY = "listening "
_MPI_ENVIRONMENT = ("OMPI_", "PMIX_", "PRTE_")
# As `python -m worker` without the current folder on the path, where a person may keep a worker.py.
PROGRAM = (sys.executable, "-P", "-m", "worker", "serve-parameters")


class Part(NamedTuple):
    """Which elements of the flat vector a shard holds: as many as its start file, from `first` on."""

    first: int = 0
    of: int | None = None  # elements of the whole model; None: those of the start file


WHOLE = Part()


def load_shard(
    start_file: Path, spec: job_pb2.JobSpec, workers: int, generation: int, part: Part = WHOLE, restored: bool = False
) -> Shard:
    """A shard that holds the parameters and optimizer state of a checkpoint, the whole vector's or its own part's.

    Args:
        restored: the shard's process died and the file is its snapshot (`ShardSetup.restored`).

    Raises:
        CheckpointFault: names what is amiss in the file.
    """
    from worker.checkpoint import read_checkpoint
    from worker.update import make_update

    start = read_checkpoint(start_file)
    if start.parameters.ndim != 1 or start.parameters.dtype != np.float32 or len(start.parameters) == 0:
        given = f"{start.parameters.dtype} {start.parameters.shape}"
        raise CheckpointFault(f"{start_file}: parameters is {given}, needs float32 (n,)")
    optimizer = make_update(spec)
    state = optimizer.init(len(start.parameters), np.float32)
    for name in state:
        saved = start.state.get(name)
        if saved is None:
            if start.step > 0:
                raise CheckpointFault(f"{start_file}: optimizer.{name} is missing after step {start.step}")
            continue
        if saved.shape != start.parameters.shape or saved.dtype != np.float32:
            given, needed = f"{saved.dtype} {saved.shape}", f"float32 {start.parameters.shape}"
            raise CheckpointFault(f"{start_file}: optimizer.{name} is {given}, needs {needed}")
        state[name] = saved
    setup = ShardSetup(
        parameter_count=len(start.parameters) if part.of is None else part.of,
        start=part.first,
        stop=part.first + len(start.parameters),
        restored=restored,
        layout_digest=start.layout_digest,
        workers=workers,
        generation=generation,
        mode=mode_of(spec.sync.parameter_server),
        decayed=tuple(start.decayed),
        clip_norm=spec.training.clip_norm,
        guests=spec.sync.parameter_server.guests,
        lease_seconds=spec.limits.stall_seconds / LEASES_IN_A_STALL,
        virtual_shards=spec.training.virtual_shards if spec.training.reproducible else 0,
    )
    return Shard(setup, optimizer, start.parameters, state, start.step)


def serve_parameters(
    start_file: Path,
    spec: job_pb2.JobSpec,
    workers: int,
    listen: str = "127.0.0.1:0",
    generation: int = 1,
    part: Part = WHOLE,
    snapshots: bool = False,
    restored: bool = False,
) -> None:
    """Serve until standard input ends or SIGTERM comes; return then. The token is in the environment.

    Args:
        snapshots: keep the start file up to date, every `snapshot_steps` steps and after each pull of the state.
        restored: the shard has died and the start file is its last snapshot.
    """
    token = os.environ.get(environment.JOB_TOKEN, "")
    if not token:
        raise UsageFault(f"{environment.JOB_TOKEN} is not set: the parameter server needs the job's token")
    keep_freed_memory()
    shard = load_shard(start_file, spec, workers, generation, part, restored)
    every_steps = spec.sync.parameter_server.snapshot_steps
    keeper = Snapshots(shard, start_file, every_steps) if snapshots else None
    wire = open_wire(shard, spec.sync.parameter_server.wire_format)
    # A rank reports what overflows, by step; here it would be a second voice.
    with np.errstate(over="ignore", invalid="ignore"):
        asyncio.run(_serve(shard, token, listen, keeper, wire, to_yaml(spec)))
    if snapshots:
        start_file.unlink(missing_ok=True)  # whoever would have started it again is gone or needs it no more


async def _serve(
    shard: Shard, token: str, listen: str, snapshots: Snapshots | None, wire: ShardWire | None, job: str
) -> None:
    from worker.server.service import ParameterServer

    over = asyncio.Event()
    loop = asyncio.get_running_loop()
    # Whoever ends a whole job signals its servers too: where a rank keeps the shard alive, that rank decides.
    told = (lambda: None) if snapshots else over.set
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        loop.add_signal_handler(number, told)
    server = ParameterServer(shard, token, snapshots, wire, job)
    try:
        port = await server.start(listen)
    except RuntimeError as error:
        raise TrainingFault(f"parameter server: cannot listen on {listen}: take another address or port") from error
    threading.Thread(target=_await_end_of_input, args=(loop, over), name="input", daemon=True).start()
    print(f"{_READY}{listen.rpartition(':')[0]}:{port}", flush=True)
    await over.wait()
    await server.stop()


def _await_end_of_input(loop: asyncio.AbstractEventLoop, over: asyncio.Event) -> None:
    """Wait in a thread, because an event loop cannot wait on every kind of file that standard input may be."""
    try:
        while os.read(0, 4096):
            continue
    except OSError:  # standard input was closed before the start: the same as its end
        print("parameter server: standard input is closed", file=sys.stderr)
    if not loop.is_closed():
        loop.call_soon_threadsafe(over.set)


@dataclass(frozen=True)
class ServerProcess:
    """A parameter server that this process started."""

    address: str
    process: subprocess.Popen[bytes]

    def stop(self, timeout_seconds: float = STOP_TIMEOUT_SECONDS) -> int:
        """End it and return its exit code; one that does not end in time is killed. All workers must have left."""
        return _end(self.process, timeout_seconds)


def start_server_process(
    job_file: Path,
    start_file: Path,
    workers: int,
    generation: int,
    token: str,
    listen: str = "127.0.0.1:0",
    program: Sequence[str] = PROGRAM,
    timeout_seconds: float = START_TIMEOUT_SECONDS,
    part: Part = WHOLE,
    snapshots: bool = False,
    restored: bool = False,
) -> ServerProcess:
    """Start `program JOB START --workers N --generation G --listen L` and wait until it listens.

    Its standard error is this process's own. TrainingFault when it ends, or says nothing within the timeout.
    """
    arguments = [str(job_file), str(start_file)]
    arguments += ["--workers", str(workers), "--generation", str(generation), "--listen", listen]
    if part.of is not None:
        arguments += ["--part", str(part.first), str(part.of)]
    arguments += ["--snapshots"] * snapshots + ["--restored"] * restored
    try:
        process = subprocess.Popen(
            [*program, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=_child_environment(os.environ, token),
        )
    except OSError as error:
        raise TrainingFault(f"parameter server: {program[0]} cannot be started: {error.strerror}") from error
    line = _first_line(process, time.monotonic() + timeout_seconds)
    if not line.startswith(_READY):
        code = process.poll()
        _end(process, 0.0)
        if code is None and not line:
            raise TrainingFault(f"parameter server: it did not listen within {timeout_seconds:g} s; see its log above")
        what = f"it said {line!r}" if line else f"it ended with exit code {code} before it listened"
        raise TrainingFault(f"parameter server: {what}; its own message is above")
    return ServerProcess(line.removeprefix(_READY), process)


def _child_environment(own: Mapping[str, str], token: str) -> dict[str, str]:
    """A rank's environment without what makes a process a rank."""
    kept = {name: value for name, value in own.items() if not name.startswith(_MPI_ENVIRONMENT)}
    return kept | {environment.JOB_TOKEN: token}


def _first_line(process: subprocess.Popen[bytes], deadline: float) -> str:
    """The child's first line of output; empty when it ends or the deadline passes before one is complete."""
    assert process.stdout is not None
    pipe = process.stdout.fileno()
    text = b""
    while not text.endswith(b"\n"):
        readable, _, _ = select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))
        if not readable:
            return ""
        piece = os.read(pipe, 1)
        if not piece:
            process.wait(STOP_TIMEOUT_SECONDS)
            return ""
        text += piece
    return text.decode(errors="replace").strip()


def _end(process: subprocess.Popen[bytes], timeout_seconds: float) -> int:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.close()
    try:
        return process.wait(timeout_seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()
    finally:
        process.stdout.close()
