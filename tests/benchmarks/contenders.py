"""Who is timed: the rows of the tables, each with the command a user of it would type and where it states its figures.

Rules: a peer is a script of peers/ and a row here, nothing else. Within a rank count ours stand among the peers,
next to those they are likely to be compared with.
"""

import json
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from coordinator.launchers.local import Scratch, available_cores, find_mpirun, find_worker, render
from tests.benchmarks.cases import LEARNING_RATE, Case
from tests.benchmarks.data_set import Data
from tests.benchmarks.measurement import (
    Command,
    Measurement,
    PeerAbsent,
    read_measurement,
    read_statement,
    run_command,
)

PEERS = Path(__file__).parent / "peers"
PRODUCTS = Path(__file__).parent / "products.py"
OURS = "Paceline"
EAGER = "PyTorch"
KINDS = ("mlp", "cnn", "transformer")


class Run(NamedTuple):
    """What one measurement is given."""

    case: Case
    epochs: int
    data: Data
    folder: Path  # empty, this run's own
    peers_python: Path


class Contender(NamedTuple):
    """One row of the tables for each network."""

    name: str
    side: str  # whose it is: two ranks are compared with one rank of the same side
    ranks: int
    measure: Callable[[Run], Measurement]
    kinds: tuple[str, ...] = KINDS  # of the networks it is timed on

    @property
    def ours(self) -> bool:
        return self.side == OURS


# --------------------------------------------------------------------------------------------------------------- ours


def job(run: Run, ranks: int, sync: Any) -> dict[str, Any]:
    """The job file for `run`."""
    return {
        "name": f"benchmark-{run.case.name}",
        "data": run.data.for_job(),
        "model": list(run.case.model),
        "loss": "softmax_cross_entropy",
        "optimizer": {"adam": {"learning_rate": LEARNING_RATE}},
        "training": {"epochs": run.epochs, "batch_size": run.case.batch_size * ranks, "keep_checkpoints": 1},
        "sync": sync,
        "workers": ranks,
    }


def paceline(ranks: int, sync: Any) -> Callable[[Run], Measurement]:
    """`paceline-worker train`, under the product's own mpirun line where there is more than one rank."""

    def measure(run: Run) -> Measurement:
        job_file, output = run.folder / "job.json", run.folder / "output"
        job_file.write_text(json.dumps(job(run, ranks, sync)))
        arguments = ("train", str(job_file), "-o", str(output))
        command, folders = Command((find_worker(), *arguments), {}), ()
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
            folders = scratch.folders
            command = Command(launch.argv, {**launch.environment, **scratch.environment})
        try:
            run_command(command, run.folder)
        finally:
            for folder in folders:
                shutil.rmtree(folder, ignore_errors=True)
        return read_measurement(json.loads((output / "summary.json").read_text()), run.case.classes)

    return measure


def matrix_products(run: Run) -> Measurement:
    """The matrix products of one of our steps, alone: as a rate of samples, and nothing else is measured."""
    job_file = run.folder / "job.json"
    job_file.write_text(json.dumps(job(run, 1, "all_reduce")))
    stated = read_statement(run_command(Command((sys.executable, str(PRODUCTS), str(job_file)), {}), run.folder))
    return Measurement(samples_per_second=run.case.batch_size / stated["seconds"], flop=stated["flop"])


# -------------------------------------------------------------------------------------------------------------- peers


def peer(script: str, environment: Mapping[str, str] | None = None) -> Callable[[Run], Measurement]:
    """A program of peers/ under the Python of the peers' environment; the result is its last line.

    Args:
        environment: additions of this peer's own.
    """

    def measure(run: Run) -> Measurement:
        argv = (
            *(str(run.peers_python), str(PEERS / script)),
            *("--model", json.dumps(run.case.model)),
            *("--batch-size", str(run.case.batch_size)),
            *("--epochs", str(run.epochs)),
            *("--learning-rate", str(LEARNING_RATE)),
            *("--scratch", str(run.folder)),
            *run.data.for_peer(),
        )
        stated = read_statement(run_command(Command(argv, dict(environment or {})), run.folder))
        if "absent" in stated:
            raise PeerAbsent(stated["absent"])
        return read_measurement(stated, run.case.classes)

    return measure


ONE_RANK = Contender("Paceline", OURS, 1, paceline(1, "all_reduce"))
# Timed like the others and shown in a table of its own, against the row before.
MATRIX_PRODUCTS = Contender("its matrix products alone", OURS, 1, matrix_products)

CONTENDERS = (
    Contender("scikit-learn MLPClassifier", "scikit-learn", 1, peer("scikit_learn.py"), kinds=("mlp",)),
    Contender("PyTorch eager", EAGER, 1, peer("pytorch_eager.py")),
    ONE_RANK,
    Contender("JAX jit", "JAX", 1, peer("jax_jit.py")),
    Contender("PyTorch compile", "PyTorch compile", 1, peer("pytorch_compile.py")),
    Contender("Paceline, all-reduce", OURS, 2, paceline(2, "all_reduce")),
    Contender("PyTorch DDP, gloo", EAGER, 2, peer("pytorch_ddp.py")),
    Contender("JAX, 2 devices", "JAX", 2, peer("jax_two_devices.py")),
    Contender("Paceline, parameter server", OURS, 2, paceline(2, "parameter_server"), kinds=("mlp",)),
)
