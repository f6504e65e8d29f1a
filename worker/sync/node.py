"""Memory that the ranks of one machine share: standard MPI-3 windows, seen as NumPy arrays.

Rules: between two `fence()`s an element has one writer or many readers, never both, but for words of progress, which
their readers poll. A rank alone on its node gets
ordinary memory and its fences cost nothing.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from worker.sync.world import World

SHARED_MEMORY_FOLDER = "/dev/shm"  # where MPI backs its windows on Linux


class Node:
    """The ranks on this machine and the arrays they share."""

    def __init__(self, world: World) -> None:
        self.comm = world.node_comm
        self.rank = self.comm.Get_rank()
        self.size = self.comm.Get_size()
        self._windows: list[Any] = []

    def segments(self, elements: int, dtype: DTypeLike) -> list[np.ndarray]:
        """One array of `elements` for each local rank, all visible to all; zeroed. The one at `self.rank` is ours."""
        sizes = [elements] * self.size
        return self._allocate(elements, sizes, np.dtype(dtype))

    def shared(self, elements: int, dtype: DTypeLike) -> np.ndarray:
        """One array for the whole node; zeroed."""
        own = elements if self.rank == 0 else 0
        return self._allocate(own, [elements] + [0] * (self.size - 1), np.dtype(dtype))[0]

    def fence(self) -> None:
        """Wait for every rank of the node; what was written before is seen by all after."""
        if self.size == 1:
            return
        self.sync()
        self.comm.Barrier()
        self.sync()

    def sync(self) -> None:
        """What was written before is in memory ahead of what is written after, and reads after it are fresh.

        For a rank that leaves word in one array of what is ready in another; it waits for nobody.
        """
        for window in self._windows:
            window.Sync()

    def close(self) -> None:
        """Give the windows back. The arrays must not be touched afterwards."""
        for window in self._windows:
            window.Unlock_all()
            window.Free()
        self._windows.clear()

    def _allocate(self, own: int, sizes: list[int], dtype: np.dtype) -> list[np.ndarray]:
        if self.size == 1:
            return [np.zeros(own, dtype)]
        from mpi4py import MPI

        window = MPI.Win.Allocate_shared(own * dtype.itemsize, dtype.itemsize, comm=self.comm)
        self._windows.append(window)
        window.Lock_all()
        arrays = []
        for rank, size in enumerate(sizes):
            memory: Any  # mpi4py's buffer, which mypy does not know as one
            memory, _ = window.Shared_query(rank)
            arrays.append(np.ndarray((size,), dtype, buffer=memory))
        arrays[self.rank][:] = 0  # each rank touches its own pages first, so they lie near its core
        return arrays


def shared_memory_shortage(needed_bytes: int, folder: str = SHARED_MEMORY_FOLDER) -> str | None:
    """Why `needed_bytes` do not fit into shared memory, or None where they do.

    A container's /dev/shm is often 64 MB; writing past its end kills a process with SIGBUS, so ask first.
    """
    if not os.path.isdir(folder):
        return f"{folder} is not there"
    status = os.statvfs(folder)
    free = status.f_bavail * status.f_frsize
    if free < needed_bytes:
        return f"{folder} has {free / 1e6:.0f} MB free and {needed_bytes / 1e6:.0f} MB are needed"
    return None
