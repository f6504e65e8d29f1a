"""How a worker's chunks travel to the parameter servers and back: as float32, or in a lossy wire format.

As float32 a push is the sum of the gradient and an answer the weights. In a lossy format a push is this worker's part
of the mean gradient plus what its earlier pushes left out, and an answer is what to add to the weights the worker
holds (worker/server/published.py); or whole weights, where the shard says so.

Rules: a chunk of a step is encoded once, however often it is pushed, so a push repeated to a server that came back is
the same bytes and the residual counts once. The residual is in units of the mean gradient, and so means the same in a
short last batch. A worker without a sample in a step sends zeros and keeps its residual, because a server that applies
each push by itself leaves such a push out.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from protos import job_pb2
from protos import parameter_server_pb2 as pb
from worker.compression import make_answer_codec, make_codec
from worker.compression.codec import (
    BLOCK_ELEMENTS,
    Bytes,
    decode,
    encode,
    encode_with_feedback,
    encoded_bytes,
)
from worker.sync.compression_costs import Costs, best_bandwidth
from worker.wire import Float32


class Lossy(NamedTuple):
    """A lossy wire format and what it has yet to send."""

    wire_format: job_pb2.WireFormat
    residual: Float32  # (parameter_count,): of this worker's mean gradient, changed in place


class ChunkPush(NamedTuple):
    """A chunk on its way out; the gradient is read when gRPC's thread takes it."""

    step: int
    start: int
    stop: int
    samples: int  # of the whole batch
    learning_rate: float
    share: int  # samples in this worker's sum
    guests: tuple[int, ...] = ()  # that the batch was cut for


class ServerWire(Protocol):
    """Between a worker's arrays and the bytes of messages."""

    wire_format: job_pb2.WireFormat | None  # what the servers are told; None: float32

    def measure(self, send: Callable[[int], None]) -> None:
        """Learn how fast the network is, where it matters; `send` returns when so many bytes have come to a server."""

    def outgoing(self, push: ChunkPush) -> Float32 | Bytes:
        """What is pushed; valid until the next step."""

    def take(self, head: pb.ExchangeResponse, payload: memoryview, stop: int) -> bool:
        """Turn an answer into the weights up to `stop`; False, and nothing done, where it is no such answer."""


class PlainWire:
    """Float32, both ways."""

    wire_format = None

    def __init__(self, gradient: NDArray[np.float32], parameters: Float32) -> None:
        """`gradient`: (parameter_count,), or a reproducible job's (subtrees, parameter_count)."""
        self._gradient = gradient
        self._into = parameters.data.cast("B")

    def measure(self, send: Callable[[int], None]) -> None:
        """As in ServerWire: it does not matter."""

    def outgoing(self, push: ChunkPush) -> Float32:
        """As in ServerWire."""
        return np.ascontiguousarray(self._gradient[..., push.start : push.stop]).reshape(-1)

    def take(self, head: pb.ExchangeResponse, payload: memoryview, stop: int) -> bool:
        """As in ServerWire; a plain copy of bytes, which unlike one between arrays does not care about alignment."""
        if head.encoded or len(payload) != 4 * (stop - head.offset):
            return False
        self._into[4 * head.offset : 4 * stop] = payload
        return True


class LossyWire:
    """A lossy format both ways, with what it cost."""

    def __init__(self, lossy: Lossy, gradient: Float32, parameters: Float32) -> None:
        self.wire_format = lossy.wire_format
        self.bytes_per_second = 0.0  # as measured at the start
        self.pushing, self.taking = Costs(), Costs()  # of gRPC's threads, and of the one that waits for answers
        self._gradient, self._parameters, self._residual = gradient, parameters, lossy.residual
        self._whole = PlainWire(gradient, parameters)
        self._lock = threading.Lock()  # each server has a thread that takes pushes
        self._encoder, self._decoder = make_codec(lossy.wire_format), make_answer_codec(lossy.wire_format)
        self._encoded: dict[int, tuple[int, Bytes]] = {}  # by the chunk's start: of which step, and what was sent
        self._scratch = np.empty(BLOCK_ELEMENTS, np.float32)
        self._added = np.empty(0, np.float32)

    @property
    def coding_seconds(self) -> float:
        """Of this worker and, for its sake, of the servers."""
        return self.pushing.coding_seconds + self.taking.coding_seconds

    def measure(self, send: Callable[[int], None]) -> None:
        """As in ServerWire."""
        self.bytes_per_second = best_bandwidth(send)

    def outgoing(self, push: ChunkPush) -> Bytes:
        """As in ServerWire."""
        here = slice(push.start, push.stop)
        with self._lock, self.pushing.coding():
            step, encoded = self._encoded.get(push.start, (0, None))
            if encoded is None:
                encoded = np.empty(encoded_bytes(self._encoder, push.stop - push.start), np.uint8)
            if step != push.step:
                self._encode(push, here, encoded)
                self._encoded[push.start] = push.step, encoded
        return encoded

    def _encode(self, push: ChunkPush, here: slice, out: Bytes) -> None:
        if not push.share:
            encode(self._encoder, np.zeros(push.stop - push.start, np.float32), out)
            return
        scale = np.float32(1 / push.samples)
        encode_with_feedback(self._encoder, self._gradient[here], scale, self._residual[here], out, self._scratch)

    def take(self, head: pb.ExchangeResponse, payload: memoryview, stop: int) -> bool:
        """As in ServerWire."""
        self.taking.coding_seconds += head.coding_seconds
        if not head.encoded:
            return self._whole.take(head, payload, stop)
        elements = stop - head.offset
        if len(payload) != encoded_bytes(self._decoder, elements):
            return False
        if len(self._added) < elements:
            self._added = np.empty(elements, np.float32)
        added, weights = self._added[:elements], self._parameters[head.offset : stop]
        with self.taking.coding():
            try:
                decode(self._decoder, np.frombuffer(payload, np.uint8), added)
            except ValueError:
                return False
            np.add(weights, added, out=weights)
        return True


def open_wire(lossy: Lossy | None, gradient: NDArray[np.float32], parameters: Float32) -> PlainWire | LossyWire:
    """For a worker's arrays; `lossy` None is float32."""
    return PlainWire(gradient, parameters) if lossy is None else LossyWire(lossy, gradient, parameters)
