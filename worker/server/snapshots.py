"""What a shard leaves on disk so that it can come back: its elements and their optimizer state, in a checkpoint's form.

Rules: a snapshot is taken between two steps, or between two pushes where workers go at their own pace. It is written
beside the event loop and complete or absent. One at a time: where the disk is slower than the steps, the next one waits
for a later step. What cannot be written is said and ends nothing.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from worker.checkpoint import Checkpoint, write_checkpoint
from worker.errors import CheckpointFault
from worker.server.shard import Shard


class Snapshots:
    """Snapshots of one shard, each in the place of the one before."""

    def __init__(self, shard: Shard, path: Path, every_steps: int) -> None:
        """`every_steps` 0: only when `take` is called."""
        self._shard = shard
        self._path = path
        self._every_steps = every_steps
        self._taken = shard.step
        self._writing: asyncio.Task[None] | None = None

    def see(self) -> None:
        """After a push: take a snapshot where one is due."""
        if self._every_steps and self._shard.step >= self._taken + self._every_steps:
            self.take()

    def take(self) -> None:
        """Copy the shard's arrays now and write them meanwhile; nothing within a step, or while one is written."""
        shard = self._shard
        step, applied = shard.version
        if (
            (applied and not shard.setup.mode.at_once)
            or (self._writing and not self._writing.done())
            or step == self._taken
        ):
            return
        self._taken = step
        copy = Checkpoint(
            *(step, 0, 0),
            layout_digest=shard.setup.layout_digest,
            decayed=list(shard.setup.decayed),
            parameters=shard.parameters.copy(),
            state={name: array.copy() for name, array in shard.state.items()},
        )
        self._writing = asyncio.create_task(self._write(copy))

    async def close(self) -> None:
        """Wait for the one that is being written."""
        if self._writing:
            await self._writing

    async def _write(self, copy: Checkpoint) -> None:
        try:
            await asyncio.to_thread(write_checkpoint, self._path, copy)
        except CheckpointFault as fault:
            print(f"parameter server: no snapshot after step {copy.step}: {fault}", file=sys.stderr, flush=True)
