"""How tests and benchmarks start mpirun: which one, and in what environment."""

import shutil
import sys
from pathlib import Path

from protos.environment import FAST_START, ROOT_ALLOWED

PROJECT = Path(__file__).parents[2]
ENVIRONMENT = {
    **ROOT_ALLOWED,
    **FAST_START,
    "OMPI_MCA_mpi_yield_when_idle": "1",
    "OPENBLAS_NUM_THREADS": "1",
}


def find_mpirun() -> str | None:
    """The one of this environment, else the machine's own."""
    beside = Path(sys.executable).with_name("mpirun")
    return str(beside) if beside.exists() else shutil.which("mpirun")


def error_lines(said: str) -> list[str]:
    """The lines in which a rank says what is wrong. mpirun ends some messages of its own with a NUL behind the line."""
    return [line for line in said.replace("\0", "").splitlines() if line.startswith("error: ")]
