"""Who is timed: the rows of the tables, each with the command a user of it would type and where it states its figures.

Rules: a peer is a script of peers/ and a row here, nothing else. Within a rank count ours stand on both sides of the
peer, so that whichever is compared with it ran next to it.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from coordinator.launchers.local import Scratch, available_cores, find_mpirun, find_worker, render
from tests.benchmarks.cases import LEARNING_RATE, Case
from tests.benchmarks.data_set import DataFiles
from tests.benchmarks.measurement import BenchmarkFailed, Command, Measurement, read_measurement, run_command

PEERS = Path(__file__).parent / "peers"
OURS = "Paceline"


class Run(NamedTuple):
    """What one measurement is given."""

    case: Case
    epochs: int
    files: DataFiles
    folder: Path  # empty, this run's own
    peers_python: Path


class Contender(NamedTuple):
    """One row of the tables for each network."""

    name: str
    side: str  # whose it is: two ranks are compared with one rank of the same side
    ranks: int
    measure: Callable[[Run], Measurement]

    @property
    def ours(self) -> bool:
        return self.side == OURS


# --------------------------------------------------------------------------------------------------------------- ours


def job(run: Run, ranks: int, sync: str) -> dict[str, Any]:
    """The job file for `run`."""
    layers: list[Any] = []
    for units in run.case.units[1:]:
        layers += [{"dense": {"units": units}}, "relu"]
    return {
        "name": f"benchmark-{run.case.name}",
        "data": {
            "train": {"npy": {"features": str(run.files.features), "targets": str(run.files.labels)}},
            "scale": 1 / 255,
        },
        "model": layers[:-1],
        "loss": "softmax_cross_entropy",
        "optimizer": {"adam": {"learning_rate": LEARNING_RATE}},
        "training": {"epochs": run.epochs, "batch_size": run.case.batch_size * ranks, "keep_checkpoints": 1},
        "sync": sync,
        "workers": ranks,
    }


def paceline(ranks: int, sync: str) -> Callable[[Run], Measurement]:
    """`paceline-worker train`, under the product's own mpirun line where there is more than one rank."""

    def measure(run: Run) -> Measurement:
        job_file, output = run.folder / "job.json", run.folder / "output"
        job_file.write_text(json.dumps(job(run, ranks, sync)))
        arguments = ("train", str(job_file), "-o", str(output))
        command, scratch = Command((find_worker(), *arguments), {}), None
        if ranks > 1:
            launch = render(
                mpirun=find_mpirun(),
                worker=find_worker(),
                ranks=ranks,
                cores=available_cores(),
                arguments=arguments,
                forwarded={},
            )
            scratch = Scratch()
            command = Command(launch.argv, {**launch.environment, **scratch.environment})
        try:
            run_command(command, run.folder)
        finally:
            if scratch is not None:
                scratch.remove()
        return read_measurement(json.loads((output / "summary.json").read_text()), run.case.units[-1])

    return measure


# -------------------------------------------------------------------------------------------------------------- peers


def peer(script: str) -> Callable[[Run], Measurement]:
    """A program of peers/ under the Python of the peers' environment; the result is its last line."""

    def measure(run: Run) -> Measurement:
        argv = (
            *(str(run.peers_python), str(PEERS / script)),
            *("--units", *map(str, run.case.units)),
            *("--batch-size", str(run.case.batch_size)),
            *("--epochs", str(run.epochs)),
            *("--learning-rate", str(LEARNING_RATE)),
            *("--features", str(run.files.features)),
            *("--labels", str(run.files.labels)),
            *("--rendezvous", str(run.folder / "rendezvous")),
        )
        lines = run_command(Command(argv, {}), run.folder).splitlines()
        if not lines:
            raise BenchmarkFailed(f"{script} printed no result")
        try:
            stated = json.loads(lines[-1])
        except ValueError as error:
            raise BenchmarkFailed(f"{script} ended with what is not a result: {lines[-1]}") from error
        return read_measurement(stated, run.case.units[-1])

    return measure


CONTENDERS = (
    Contender("Paceline", OURS, 1, paceline(1, "all_reduce")),
    Contender("PyTorch eager", "PyTorch", 1, peer("pytorch_eager.py")),
    Contender("Paceline, all-reduce", OURS, 2, paceline(2, "all_reduce")),
    Contender("PyTorch DDP, gloo", "PyTorch", 2, peer("pytorch_ddp.py")),
    Contender("Paceline, parameter server", OURS, 2, paceline(2, "parameter_server")),
)
