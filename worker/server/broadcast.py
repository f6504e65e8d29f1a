"""The weights after each update, for whoever follows.

A follower asks for a version when it is ready for one, and is given a copy made between two steps, shared by all who
ask then. It skips the versions between; nothing is kept for it, and nobody waits for it. The last version is sent
unasked, because the server is about to end.

Rules: a version is of one step on all its chunks, or, where workers go at their own pace, of one moment. Whoever asks
has the newest version there is, also at the end.
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
        self._ended = asyncio.Event()

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
        self._ended.set()
        self.see()
        waiting, self._ready = self._ready, []
        for *_, future in waiting:
            if not future.done():
                future.set_result(None)

    async def follow(self, requests: AsyncIterator[pb.BroadcastRequest]) -> AsyncIterator[bytes]:
        """The messages of a version for each request, until the end."""
        setup = self._shard.setup
        had, every_steps = -1, 1
        while True:
            request = await self._request(requests)
            if request is None and not self._over:
                return
            every_steps = max(1, request.every_steps) if request else every_steps
            version = await self._next(had, every_steps)
            if version is None:
                return
            had = version.step
            for start, stop in chunk_bounds(setup.start, setup.stop, setup.chunk_elements):
                head = pb.BroadcastResponse(offset=start, step=had, start=setup.start, stop=setup.stop)
                yield encode(head, WEIGHTS, version.weights[start - setup.start : stop - setup.start])

    async def _request(self, requests: AsyncIterator[pb.BroadcastRequest]) -> pb.BroadcastRequest | None:
        """The next one; None when there are no more, or when the job is over and nobody need ask."""
        asked = asyncio.ensure_future(anext(requests, None))
        ended = asyncio.ensure_future(self._ended.wait())
        try:
            await asyncio.wait((asked, ended), return_when=asyncio.FIRST_COMPLETED)
            return asked.result() if asked.done() else None
        finally:
            asked.cancel()
            ended.cancel()

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
        return between and step > had and (step % every_steps == 0 or had < 0 or self._over)

    def _copy(self) -> Version:
        return Version(self._shard.version[0], self._shard.parameters.copy())
