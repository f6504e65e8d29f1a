"""Checkpoints written beside training: copied at the step boundary, then checksummed, written and pruned by a thread.

Rules: one at a time; who takes the next waits for the one before. What could not be written is raised in the thread
that trains, by the next call, and ends the job. Every wait has a deadline.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from worker.checkpoint import Checkpoint, checkpoint_path, prune_checkpoints, write_checkpoint
from worker.errors import CheckpointFault


class CheckpointWriter:
    """Writes the checkpoints of one run.

    Args:
        keep: how many of the newest stay.
        wait_seconds: how long one may take that somebody waits for.
        written: told, from the thread, when one was complete, in seconds since the Unix epoch.

    Attributes:
        seconds: that the last one took to write.
    """

    def __init__(
        self, folder: Path, keep: int, wait_seconds: float, written: Callable[[float], None] = lambda seconds: None
    ) -> None:
        self.seconds = 0.0
        self._folder, self._keep, self._wait_seconds = folder, keep, wait_seconds
        self._written = written
        self._buffers: dict[str, np.ndarray] = {}  # made once: fresh memory costs as much as the copy
        self._thread: threading.Thread | None = None
        self._fault: BaseException | None = None

    @property
    def busy(self) -> bool:
        """Whether one is being written."""
        return self._thread is not None and self._thread.is_alive()

    def check(self) -> None:
        """Raise what the thread met."""
        if self._fault is not None:
            raise self._fault

    def take(self, checkpoint: Checkpoint) -> Path:
        """Copy it and begin to write; its arrays, but for the best epoch's, may change as soon as this returns.

        Returns:
            Where it will be.

        Raises:
            CheckpointFault: as of `wait`, for the one before.
        """
        self.wait()
        copied = replace(
            checkpoint,
            parameters=self._copy("", checkpoint.parameters),
            state={name: self._copy(name, array) for name, array in checkpoint.state.items()},
            model_state=None if checkpoint.model_state is None else checkpoint.model_state.copy(),
        )
        path = checkpoint_path(self._folder, checkpoint.step)
        self._thread = threading.Thread(target=self._write, args=(path, copied), name="checkpoint", daemon=True)
        self._thread.start()
        return path

    def wait(self) -> None:
        """Until what was taken is on disk.

        Raises:
            CheckpointFault: it could not be written, or not in time.
        """
        if self._thread is not None:
            self._thread.join(self._wait_seconds)
            if self._thread.is_alive():
                raise CheckpointFault(
                    f"{self._folder}: a checkpoint is not written after {self._wait_seconds:g} s; name a folder on a "
                    "faster disk with -o, or raise limits.stall_seconds"
                )
            self._thread = None
        self.check()

    def _copy(self, name: str, array: np.ndarray) -> np.ndarray:
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != array.shape or buffer.dtype != array.dtype:
            buffer = self._buffers[name] = np.empty_like(array)
        np.copyto(buffer, array)
        return buffer

    def _write(self, path: Path, checkpoint: Checkpoint) -> None:
        began = time.monotonic()
        try:
            write_checkpoint(path, checkpoint)
            prune_checkpoints(self._folder, self._keep)
            self.seconds = time.monotonic() - began
            self._written(time.time())
        except BaseException as fault:
            self._fault = fault
