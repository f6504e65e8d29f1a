"""The worker's side of a parameter server: gradients out, weights in, behind the same verb as the all-reduce.

A step queues the gradient's chunks from the end of the vector to its front, the order in which backward finishes them,
and takes the weights of each chunk as soon as all workers have pushed it. gRPC's own thread serializes and sends while
this one receives.

Rules: arrays are filled in place. The gradient is not touched until `step` returns. Every wait has a deadline; what it
raises names the server, the step, what was waited for and how long.
"""

import queue
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
import numpy as np
from google.protobuf.message import Message
from numpy.typing import NDArray

from protos import parameter_server_pb2 as pb
from worker.data.sharding import share
from worker.errors import TrainingFault
from worker.wire import Float32, as_array, chunk_bounds, decode, encode, keep_freed_memory

SERVICE = pb.DESCRIPTOR.services_by_name["ParameterServerService"].full_name
GRADIENT = pb.ExchangeRequest.GRADIENT_FIELD_NUMBER
WEIGHTS = pb.ExchangeResponse.WEIGHTS_FIELD_NUMBER
DATA = pb.PullResponse.DATA_FIELD_NUMBER
MESSAGE_LIMIT = ("grpc.max_receive_message_length", 64 << 20)
JOIN_TIMEOUT_SECONDS = 20.0
WATCH_SECONDS = 0.2

R = TypeVar("R", bound=Message)


@dataclass(frozen=True)
class _Push:
    """A chunk on its way out; the gradient is read when gRPC's thread takes it."""

    step: int
    start: int
    stop: int
    samples: int
    learning_rate: float


class _Server:
    """One shard: its channel, its range of the vector, its stream."""

    def __init__(self, address: str, token: str) -> None:
        self.address = address
        self.metadata = (("authorization", f"Bearer {token}"),)
        self.channel = grpc.insecure_channel(address, options=(MESSAGE_LIMIT,))
        self.range = range(0)
        self.chunks: dict[int, int] = {}  # start -> stop
        self.outgoing: queue.SimpleQueue[_Push | None] = queue.SimpleQueue()
        self.stream: Any = None  # the call object of the Exchange stream

    def call(self, method: str, request: Message, response: type[R], timeout_seconds: float) -> R:
        caller = self.channel.unary_unary(
            f"/{SERVICE}/{method}",
            request_serializer=type(request).SerializeToString,
            response_deserializer=response.FromString,
        )
        answer: R = caller(request, timeout=timeout_seconds, metadata=self.metadata)
        return answer


class ParameterServerExchange:
    """Pushes `gradient`, pulls `parameters`, and sums `totals` over the workers."""

    def __init__(
        self, addresses: Sequence[str], worker: int, workers: int, generation: int, token: str, layout_digest: str,
        parameters: Float32, gradient: Float32, totals: NDArray[np.float64], timeout_seconds: float = 90.0,
    ) -> None:  # fmt: skip
        """Take 1-D arrays: `parameters` and `gradient` of one length, `totals` of any; all stay the caller's.

        `timeout_seconds` is for one step. Keep it above the server's own, which knows whom a step waits for.
        """
        self.sent_bytes = 0
        self.received_bytes = 0
        self.wait_seconds = 0.0
        self._worker, self._workers, self._generation = worker, workers, generation
        self._layout_digest = layout_digest
        self._parameters, self._gradient, self._totals = parameters, gradient, totals
        self._into = parameters.data.cast("B")
        self._timeout_seconds = timeout_seconds
        self._servers = [_Server(address, token) for address in addresses]
        self._expires = float("inf")  # on time.monotonic's scale; read by the watch
        self._expired = False
        self._closed = threading.Event()

    def join(self) -> int:
        """Agree on the model with every server, open the streams, and return the steps already applied.

        Does not fetch the weights: they are the start file's, or what `pull` gives.
        """
        keep_freed_memory()
        request = pb.JoinRequest(
            worker=self._worker, generation=self._generation, parameter_count=len(self._parameters),
            layout_digest=self._layout_digest,
        )  # fmt: skip
        steps = set()
        for server in self._servers:
            try:
                response = server.call("Join", request, pb.JoinResponse, JOIN_TIMEOUT_SECONDS)
            except grpc.RpcError as error:
                raise TrainingFault(f"parameter server {server.address}, join: {_words(error)}") from error
            server.range = range(response.start, response.stop)
            server.chunks = dict(chunk_bounds(response.start, response.stop, response.chunk_elements))
            steps.add(response.step)
        self._check_ranges()
        if len(steps) != 1:
            raise TrainingFault(f"the parameter servers are at different steps: {sorted(steps)}")
        threading.Thread(target=self._watch, name="parameter-server-watch", daemon=True).start()
        for server in self._servers:
            # Chunks pass as bytes, worker/wire.py reads and writes them; bytes(x) of bytes is x itself.
            exchange = server.channel.stream_stream(f"/{SERVICE}/Exchange", bytes, bytes)
            server.stream = exchange(self._requests(server), metadata=server.metadata)
        began = time.perf_counter()
        self._expires = time.monotonic() + JOIN_TIMEOUT_SECONDS
        for server in self._servers:
            self._next(server, "join", "its stream", began)
        self._expires = float("inf")
        return steps.pop()

    def step(self, step: int, samples: int, learning_rate: float) -> None:
        """Push the gradient (sums over this worker's samples), return with the weights after `step` (from 1).

        `samples` is the whole batch's count, over all workers. `totals` becomes the sum over the workers.
        """
        began = time.perf_counter()
        self._expires = time.monotonic() + self._timeout_seconds
        for server in self._servers:
            for start, stop in reversed(server.chunks.items()):
                server.outgoing.put(_Push(step, start, stop, samples, learning_rate))
        for server in self._servers:
            self._receive(server, step, began)
        self._expires = float("inf")
        self.wait_seconds += time.perf_counter() - began

    def pull(self, state: bool = True) -> dict[str, Float32]:
        """The weights as `parameters` and, with `state`, the optimizer's arrays as `optimizer.<name>`; all copies.

        Between two steps only.
        """
        arrays: dict[str, Float32] = {}
        steps = set()
        for server in self._servers:
            stream = server.channel.unary_stream(f"/{SERVICE}/Pull", pb.PullRequest.SerializeToString, bytes)
            try:
                for data in stream(
                    pb.PullRequest(state=state), timeout=self._timeout_seconds, metadata=server.metadata
                ):
                    head, payload = decode(pb.PullResponse, DATA, data)
                    array = arrays.setdefault(head.name, np.empty(len(self._parameters), np.float32))
                    chunk = as_array(payload)
                    array[head.offset : head.offset + len(chunk)] = chunk
                    steps.add(head.step)
            except grpc.RpcError as error:
                raise TrainingFault(f"parameter server {server.address}, pull: {_words(error)}") from error
        if len(steps) != 1:
            raise TrainingFault(f"the parameter servers are at different steps: {sorted(steps)}")
        return arrays

    def leave(self) -> None:
        """Say that this worker has made its last step, and close. A server may end once every worker has left."""
        request = pb.LeaveRequest(worker=self._worker, generation=self._generation)
        for server in self._servers:
            try:
                server.call("Leave", request, pb.LeaveResponse, JOIN_TIMEOUT_SECONDS)
            except grpc.RpcError as error:
                raise TrainingFault(f"parameter server {server.address}, leave: {_words(error)}") from error
        self.close()

    def close(self) -> None:
        """Let go of the streams. Without `leave` before, the server takes this worker for lost and ends the others."""
        self._closed.set()
        for server in self._servers:
            server.outgoing.put(None)
            server.channel.close()

    def _requests(self, server: _Server) -> Iterator[bytes]:
        """What the stream sends; runs in gRPC's thread."""
        yield pb.ExchangeRequest(worker=self._worker, generation=self._generation).SerializeToString()
        while (push := server.outgoing.get()) is not None:
            head = pb.ExchangeRequest(
                worker=self._worker, generation=self._generation, step=push.step, offset=push.start,
                samples=push.samples, learning_rate=push.learning_rate,
                totals=self._totals if push.start == server.range.start else (),
                share_samples=self._share(push.samples),
            )  # fmt: skip
            data = encode(head, GRADIENT, self._gradient[push.start : push.stop])
            self.sent_bytes += len(data)
            yield data

    def _share(self, samples: int) -> int:
        """This worker's part of a batch of so many."""
        low, high = share(0, samples, self._worker, self._workers)
        return high - low

    def _receive(self, server: _Server, step: int, began: float) -> None:
        missing = dict(server.chunks)
        while missing:
            data = self._next(server, f"step {step}", f"{len(missing)} of {len(server.chunks)} weight chunks", began)
            self.received_bytes += len(data)
            head, payload = decode(pb.ExchangeResponse, WEIGHTS, data)
            stop = missing.pop(head.offset, None)
            if stop is None or head.step != step or len(payload) != 4 * (stop - head.offset):
                raise TrainingFault(
                    f"parameter server {server.address}, step {step}: it answered with {len(payload)} bytes at offset "
                    f"{head.offset} of step {head.step}, which was not asked for"
                )
            # A plain copy of bytes, which unlike an assignment between arrays does not care about alignment.
            self._into[4 * head.offset : 4 * stop] = payload
            if head.totals and head.offset == 0:
                self._totals[:] = head.totals

    def _next(self, server: _Server, when: str, what: str, began: float) -> bytes:
        """The stream's next message, or a fault that says what was waited for since `began`."""
        try:
            data: bytes = next(server.stream)
        except (grpc.RpcError, StopIteration) as error:
            seconds = time.perf_counter() - began
            why = "no answer in time" if self._expired else _words(error)
            raise TrainingFault(
                f"parameter server {server.address}, {when}: {why} "
                f"(worker {self._worker} of {self._workers} waited {seconds:.1f} s for {what})"
            ) from error
        return data

    def _watch(self) -> None:
        """Cancel the streams when a step's deadline has passed: gRPC has none for a part of a stream."""
        while not self._closed.wait(WATCH_SECONDS):
            if time.monotonic() > self._expires:
                self._expired = True
                for server in self._servers:
                    if server.stream is not None:
                        server.stream.cancel()
                return

    def _check_ranges(self) -> None:
        """The shards together hold every element once."""
        held = sorted((server.range.start, server.range.stop, server.address) for server in self._servers)
        reached = 0
        for start, stop, address in held:
            if start != reached:
                raise TrainingFault(f"parameter server {address} begins at element {start}, {reached} is next to hold")
            reached = stop
        if reached != len(self._parameters):
            raise TrainingFault(f"the parameter servers hold {reached} of {len(self._parameters)} elements")


def _words(error: Exception) -> str:
    """What a failed call says, on one line."""
    if not isinstance(error, grpc.Call):
        return "it ended the stream"
    code, details = error.code(), " ".join((error.details() or "").split())
    if code is grpc.StatusCode.UNAVAILABLE:
        return f"the connection is lost: {details}"
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return "no answer in time"
    return details or str(code)
