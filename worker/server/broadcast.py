"""The weights after each update, for whoever follows.

A follower that is ready takes the next version: a copy made between two steps and shared by all who are ready then. One
that still sends or computes makes none, so it skips versions; it holds no memory but the version it is being sent, and
nobody waits for it.

Rules: a version is of one step on all its chunks, or, where workers go at their own pace, of one moment. The newest
version there is comes last, also to who was busy when it was made.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import NamedTuple

from protos import parameter_server_pb2 as pb
from worker.server.shard import Shard
from worker.wire import Float32, chunk_bounds, encode

WEIGHTS = pb.BroadcastResponse.WEIGHTS_FIELD_NUMBER


class Version(NamedTuple):
    """The shard's weights after a step."""

    step: int
    weights: Float32


class Broadcaster:
    """Hands out versions of one shard; on its event loop."""

    def __init__(self, shard: Shard) -> None:
        self._shard = shard
        self._ready: list[tuple[int, int, asyncio.Future[Version | None]]] = []  # last step had, every so many
        self._over = False

    def see(self) -> None:
        """After an update: a version for those who are ready, where the shard is between two steps."""
        if not self._ready:
            return
        version: Version | None = None
        waiting, self._ready = self._ready, []
        for had, every, future in waiting:
            if future.done():  # its follower is gone
                continue
            if not self._is_due(had, every):
                self._ready.append((had, every, future))
                continue
            version = version or self._copy()
            future.set_result(version)

    def end(self) -> None:
        """The job is over: followers get the newest version, if they have not, and their end."""
        self._over = True
        self.see()
        waiting, self._ready = self._ready, []
        for *_, future in waiting:
            if not future.done():
                future.set_result(None)

    async def follow(self, every_steps: int) -> AsyncIterator[bytes]:
        """The messages of one version after another, until the end."""
        setup = self._shard.setup
        had = -1
        while (version := await self._next(had, every_steps)) is not None:
            had = version.step
            for start, stop in chunk_bounds(setup.start, setup.stop, setup.chunk_elements):
                head = pb.BroadcastResponse(offset=start, step=version.step, start=setup.start, stop=setup.stop)
                yield encode(head, WEIGHTS, version.weights[start - setup.start : stop - setup.start])

    async def _next(self, had: int, every_steps: int) -> Version | None:
        if self._is_due(had, every_steps):
            return self._copy()
        if self._over:
            return None
        future: asyncio.Future[Version | None] = asyncio.get_running_loop().create_future()
        self._ready.append((had, every_steps, future))
        return await future

    def _is_due(self, had: int, every_steps: int) -> bool:
        step, begun = self._shard.version
        between = not begun or self._shard.setup.mode.at_once
        return between and step > had and (step % every_steps == 0 or self._over)

    def _copy(self) -> Version:
        return Version(self._shard.version[0], self._shard.parameters.copy())
