"""A stream of messages to and from one server, with an end to gRPC's threads; errors in words; who holds what.

gRPC reads the messages to send in one thread and is told in another what comes in. Both are daemons: Python stops them
where they are when it exits, perhaps within a lock that some object's end then waits for, and the process hangs.

Rules: when `close` returns, both have ended.
"""

import contextlib
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import grpc

from worker.errors import TrainingFault

END_SECONDS = 10.0  # for both threads of a cancelled stream, which need milliseconds


class ExchangeStream:
    """An iterator over what the server sends, as bytes; grpc.RpcError where it breaks."""

    def __init__(
        self, channel: grpc.Channel, method: str, requests: Iterator[bytes], metadata: tuple[tuple[str, str], ...]
    ) -> None:
        """Send `requests` as they come."""
        self._threads: queue.SimpleQueue[threading.Thread] = queue.SimpleQueue()
        # Chunks pass as bytes, worker/wire.py reads and writes them; bytes(x) of bytes is x itself.
        self._call: Any = channel.stream_stream(method, bytes, bytes)(self._noted(requests), metadata=metadata)
        # A call that is over already has no thread that could call back.
        self._thread_count = 1 + self._call.add_callback(self._note_thread)

    def __iter__(self) -> "ExchangeStream":
        return self

    def __next__(self) -> bytes:
        data: bytes = next(self._call)
        return data

    def cancel(self) -> None:
        """Break it; whoever waits for its next message gets an error."""
        self._call.cancel()

    def close(self) -> None:
        """Cancel it and wait for its threads. `requests` must have come to their end, or do so now."""
        self._call.cancel()
        deadline = time.monotonic() + END_SECONDS
        with contextlib.suppress(queue.Empty):
            for _ in range(self._thread_count):
                thread = self._threads.get(timeout=max(0.0, deadline - time.monotonic()))
                thread.join(max(0.0, deadline - time.monotonic()))

    def _noted(self, requests: Iterator[bytes]) -> Iterator[bytes]:
        self._note_thread()
        yield from requests

    def _note_thread(self) -> None:
        self._threads.put(threading.current_thread())


def lost(error: BaseException | None) -> bool:
    """Whether the server's process may be gone, which is another thing than a request it refuses."""
    return isinstance(error, grpc.Call) and error.code() is grpc.StatusCode.UNAVAILABLE


def words(error: Exception) -> str:
    """What a failed call says, on one line."""
    if not isinstance(error, grpc.Call):
        return "it ended the stream"
    code, details = error.code(), " ".join((error.details() or "").split())
    if code is grpc.StatusCode.UNAVAILABLE:
        return f"the connection is lost: {details}"
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return "no answer in time"
    return details or str(code)


def check_ranges(held: Sequence[tuple[range, str]], count: int) -> None:
    """Raise TrainingFault unless the servers (range, address) together hold each of `count` elements once."""
    reached = 0
    for elements, address in sorted(held, key=lambda pair: pair[0].start):
        if elements.start != reached:
            raise TrainingFault(
                f"parameter server {address} begins at element {elements.start}, {reached} is next to hold"
            )
        reached = elements.stop
    if reached != count:
        raise TrainingFault(f"the parameter servers hold {reached} of {count} elements")
