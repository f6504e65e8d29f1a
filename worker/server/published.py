"""A lossy wire format on the shard's side: pushes are decoded, answers say how far the weights have moved.

The shard keeps what it has published: the sum of all it sent, which is what the workers hold, to the bit. An answer is
the encoded difference of the weights to that, and what is published then moves by what the encoding says. So what is
lost stays in the next difference and needs no residual (DoubleSqueeze, Tang et al. 2019; "EF21-P", Gruntkowska et al.
2023). The optimizer runs on the weights themselves; gradients are computed on what is published.

| mode                            | published                              | an answer is serialized |
|---------------------------------|----------------------------------------|-------------------------|
| synchronous                     | one vector, which all workers hold     | once for all workers    |
| bounded_staleness, asynchronous | one for each worker, from its first on | for the worker alone    |

Rules: no I/O. A push is decoded only where its length is that of its chunk, and what does not decode is refused and
changes nothing. For each chunk the shard knows who holds what is published. Where an answer goes to others than those
(the shard is back from a snapshot, a worker is new, one did not take what the others took), it is whole weights.
Whoever pulls in order to go on from it (`publish`) has whole weights too: at the end of an epoch every worker does, so
evaluation, checkpoints and the model file see the weights themselves, nothing is published beside them, and a
checkpoint is whole without the published vector.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np

from protos import job_pb2
from protos import parameter_server_pb2 as pb
from worker.compression import kind_of, make_answer_codec, make_codec
from worker.compression.codec import Bytes, decode, encode, encoded_bytes
from worker.server.pushes import Answer, Conflict, Refused
from worker.wire import Float32, chunk_bounds

if TYPE_CHECKING:
    from worker.server.shard import Shard

EVERYONE = -1  # in the place of a worker's number, where all hold the same


class _Published:
    """What one worker, or all of them, hold of the shard's elements."""

    def __init__(self, weights: Float32, offsets: Iterable[int], workers: Iterable[int] = ()) -> None:
        self.weights = weights
        self.holders = {offset: set(workers) for offset in offsets}  # by chunk: who holds its part of `weights`

    def drop(self, worker: int) -> None:
        """This worker holds something else, or nothing."""
        for workers in self.holders.values():
            workers.discard(worker)


class ShardWire:
    """Between a shard and its stream handlers."""

    def __init__(self, shard: Shard, wire_format: job_pb2.WireFormat) -> None:
        """`shard` as it was loaded: before its first worker."""
        setup = shard.setup
        self._shard, self.wire_format = shard, wire_format
        self._codec, self._answer_codec = make_codec(wire_format), make_answer_codec(wire_format)
        self._stops = dict(chunk_bounds(setup.start, setup.stop, setup.chunk_elements))
        longest = max(stop - start for start, stop in self._stops.items())
        self._difference, self._decoded = np.empty(longest, np.float32), np.empty(longest, np.float32)
        self._encoded = np.empty(encoded_bytes(self._answer_codec, longest), np.uint8)
        self._seconds = 0.0  # of coding, since the last answer
        self._first_step = shard.step
        self._published: dict[int, _Published] = {}
        self._taken: tuple[int, int] | None = None  # the version that was published whole last
        if not setup.mode.at_once:
            holders = () if setup.restored else range(setup.workers)  # who begin with the shard's weights
            self._published[EVERYONE] = _Published(shard.parameters.copy(), self._stops, holders)

    def join(self, worker: int) -> None:
        """A worker begins: what it holds is not known, unless it is what all begin with."""
        if self._shard.step != self._first_step:
            self.forget(worker)

    def forget(self, worker: int) -> None:
        """A worker has left, or begins anew."""
        self._published.pop(worker, None)
        if EVERYONE in self._published:
            self._published[EVERYONE].drop(worker)

    def gradient(self, head: pb.ExchangeRequest, payload: memoryview) -> Float32:
        """The sum of a worker's gradient over its samples, as far as the push says; empty where no chunk begins.

        Raises:
            Refused: the payload is not a chunk in the job's wire format.
        """
        stop = self._stops.get(head.offset)
        if stop is None:
            return np.empty(0, np.float32)  # the shard has the words for it
        elements = stop - head.offset
        where = f"worker {head.worker}, step {head.step}, offset {head.offset}"
        needed = encoded_bytes(self._codec, elements)
        if len(payload) != needed:
            kind = kind_of(self.wire_format)
            raise Refused(f"{where}: {len(payload)} bytes, {elements} elements take {needed} as {kind}")
        with self._coding(), np.errstate(over="ignore", invalid="ignore"):
            out = np.empty(elements, np.float32)
            try:
                decode(self._codec, np.frombuffer(payload, np.uint8), out)
            except ValueError as error:
                raise Refused(f"{where}: {error}") from error
            np.multiply(out, np.float32(head.samples), out=out)
        return out

    def answer(self, answer: Answer, reply: pb.ExchangeResponse) -> Float32 | Bytes:
        """What goes out as the answer's weights, valid until the next call; `reply` is told how to take it."""
        with self._coding():
            payload = self._moved(answer)
        reply.encoded = payload.dtype == np.uint8
        reply.coding_seconds, self._seconds = self._seconds, 0.0
        return payload

    def _moved(self, answer: Answer) -> Float32 | Bytes:
        published = self._of(answer.workers[0])
        here = self._slice(answer.offset)
        held = published.weights[here]
        to, holders = set(answer.workers), published.holders[answer.offset]
        if answer.again and holders:  # what the others have had
            holders |= to
            return held
        if to != holders:
            held[:] = answer.weights
            published.holders[answer.offset] = to
            return held
        elements = here.stop - here.start
        difference, decoded = self._difference[:elements], self._decoded[:elements]
        encoded = self._encoded[: encoded_bytes(self._answer_codec, elements)]
        with np.errstate(over="ignore", invalid="ignore"):
            np.subtract(answer.weights, held, out=difference)
            encode(self._answer_codec, difference, encoded)
            decode(self._answer_codec, encoded, decoded)
            np.add(held, decoded, out=held)
        return encoded

    def publish(self, worker: int, weights: Float32) -> None:
        """A worker takes these weights whole, between two of its steps."""
        published, version = self._of(worker), self._shard.version
        if self._taken != version or EVERYONE not in self._published:
            self._taken = version
            published.weights[:] = weights
            published.holders = {offset: set() for offset in self._stops}
        for workers in published.holders.values():
            workers.add(worker)

    def _of(self, worker: int) -> _Published:
        if EVERYONE in self._published:
            return self._published[EVERYONE]
        if worker not in self._published:
            self._published[worker] = _Published(np.empty_like(self._shard.parameters), self._stops)
        return self._published[worker]

    def _slice(self, offset: int) -> slice:
        begin = self._shard.setup.start
        return slice(offset - begin, self._stops[offset] - begin)

    @contextmanager
    def _coding(self) -> Iterator[None]:
        began = perf_counter()
        yield
        self._seconds += perf_counter() - began


def open_wire(shard: Shard, wire_format: job_pb2.WireFormat) -> ShardWire | None:
    """For the format of a resolved job; None where it is float32."""
    return None if kind_of(wire_format) == "float32" else ShardWire(shard, wire_format)


def check_format(worker: int, given: job_pb2.WireFormat, wire: ShardWire | None) -> None:
    """Raise Conflict unless a worker pushes what the shard takes."""
    taken = wire.wire_format if wire else job_pb2.WireFormat()
    if kind_of(given) == kind_of(taken) == "float32" or given == taken:
        return
    raise Conflict(
        f"worker {worker} pushes {_words(given)} and the parameter server takes {_words(taken)}: "
        "start every worker with the same job file"
    )


def _words(wire_format: job_pb2.WireFormat) -> str:
    return " ".join(str(wire_format).split()).removesuffix(" { }") or "float32"
