"""What a worker process arranges for itself before anything heavy is loaded: output, threads, parentage.

Rules: nothing here imports NumPy or MPI, because BLAS reads its thread count when NumPy is first loaded. Who we are
is read from the launcher's environment, as MPI has not been asked yet.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path

# Which variable says it under which launcher: Open MPI, PMIx, MPICH and Intel MPI, Slurm.
RANK_VARIABLES = ("OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "SLURM_PROCID")
LOCAL_SIZE_VARIABLES = ("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "SLURM_NTASKS_PER_NODE")
THREAD_VARIABLES = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def rank_before_mpi(environ: Mapping[str, str]) -> int:
    """This process's rank as its launcher states it; 0 without a launcher."""
    return _first_number(environ, RANK_VARIABLES, 0)


def set_blas_threads(environ: dict[str, str] | os._Environ[str], cores: int, reproducible: bool = False) -> None:
    """Share the machine's cores among its ranks. What the user has set stays, unless the result is to be reproducible:

    OpenBLAS cuts a product among its threads, and another cut rounds otherwise.
    """
    if reproducible:
        environ.update(dict.fromkeys(THREAD_VARIABLES, "1"))
        return
    threads = max(1, cores // _first_number(environ, LOCAL_SIZE_VARIABLES, 1))
    for name in THREAD_VARIABLES:
        environ.setdefault(name, str(threads))


def redirect_output(folder: Path, rank: int) -> None:
    """Send this process's standard output and error, those of C libraries too, to folder/rank-N.log."""
    descriptor = os.open(folder / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # a TextIOWrapper, as nobody replaced it


def die_with_parent(environ: Mapping[str, str]) -> None:
    """Ask the kernel to end this rank when its launcher is gone, even if that was killed with SIGKILL."""
    if any(name in environ for name in RANK_VARIABLES):
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def process_start_time() -> float:
    """When this process was started, in seconds since the Unix epoch (Linux counts it in hundredths)."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    started_seconds = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - started_seconds)


def has_ended(process: int) -> bool:
    """Whether a process of this machine runs no more, be it that its parent has yet to ask how it ended."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def _first_number(environ: Mapping[str, str], names: tuple[str, ...], default: int) -> int:
    for name in names:
        value = environ.get(name, "")
        if value.isdigit():
            return int(value)
    return default
