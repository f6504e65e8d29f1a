"""The worker's side of a parameter server: gradients out, weights in, behind the same verb as the all-reduce.

A step queues the gradient's chunks from the end of the vector to its front, the order in which backward finishes them,
and takes the weights of each chunk as soon as all workers have pushed it. gRPC's own thread serializes and sends while
this one receives. All servers are pushed to at once.

A server whose connection is lost is given `return_seconds` to come back, from its last snapshot: the worker joins it
again, tells it the steps done, repeats the step's pushes and counts the steps that were lost.

Rules: arrays are filled in place. The gradient is not touched until `step` returns. Every wait has a deadline; what it
raises names the server, the step, what was waited for and how long. `close` leaves no thread behind.
"""

import queue
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TypeVar

import grpc
import numpy as np
from numpy.typing import NDArray

from protos import parameter_server_pb2 as pb
from worker.data.sharding import samples_of
from worker.errors import TrainingFault
from worker.sync.exchange_stream import END_SECONDS, ExchangeStream, check_ranges, lost, words
from worker.sync.server_connection import SERVICE, Server, queued
from worker.sync.server_wire import ChunkPush, Lossy, open_wire
from worker.sync.statistics import Staleness
from worker.wire import Float32, as_array, chunk_bounds, decode, encode, keep_freed_memory

GRADIENT = pb.ExchangeRequest.GRADIENT_FIELD_NUMBER
WEIGHTS = pb.ExchangeResponse.WEIGHTS_FIELD_NUMBER
DATA = pb.PullResponse.DATA_FIELD_NUMBER
JOIN_TIMEOUT_SECONDS = 20.0
WATCH_SECONDS = 0.2
FIRST_RETRY_SECONDS = 0.05
LAST_RETRY_SECONDS = 1.0  # between two attempts, which begin at the first and double

T = TypeVar("T")


class ParameterServerExchange:
    """Pushes `gradient`, pulls `parameters`, and sums `totals` over the workers."""

    def __init__(
        self, addresses: Sequence[str], worker: int, workers: int, generation: int, token: str, layout_digest: str,
        parameters: Float32, gradient: Float32, totals: NDArray[np.float64], timeout_seconds: float = 90.0,
        pushes_to: Collection[int] | None = None, return_seconds: float = 0.0,
        pushed: tuple[Float32, NDArray[np.float64]] | None = None, share_of: Callable[[int, int], int] | None = None,
        lossy: Lossy | None = None, ranks: int = 0,
    ) -> None:  # fmt: skip
        """Take 1-D arrays: `parameters` and `gradient` of one length, `totals` of any; all stay the caller's.

        Args:
            timeout_seconds: for one step. Keep it above the server's own, which knows whom a step waits for.
            pushes_to: which of the servers this process exchanges with, where others of the same worker take the rest;
                None: all. It can pull from all.
            return_seconds: how long a server that is gone may take to come back.
            pushed: a reproducible job's subtrees (subtrees, parameter_count) and totals (shards, total_count), which go
                out in the place of `gradient` and `totals`.
            share_of: from the samples of a batch, and how many guests share in it, to how many of them this worker
                computes; None: an equal share.
            lossy: the wire format, where it is not float32, and the residual to go on from.
            ranks: those that mpirun started; guests are told.
        """
        self.sent_bytes = self.received_bytes = 0
        self.wait_seconds = 0.0
        self.restarts = 0  # servers that were gone and came back
        self.steps_lost = 0  # by them, together
        self.found_returned = False  # the last pull met one that has not met its workers again: `meet_again` is due
        self.staleness = Staleness()  # of this worker's pushes
        self._step = 0  # the last one done
        self._return_seconds = return_seconds
        self.workers = workers  # founding ones
        self._worker, self._generation = worker, generation
        self._who = f"worker {worker} of {workers}"
        self._layout_digest, self._timeout_seconds = layout_digest, timeout_seconds
        self._parameters, self._totals = parameters, totals
        pushed_gradient, self._pushed_totals = pushed or (gradient, totals)
        self.wire = open_wire(lossy, pushed_gradient, parameters)
        self._servers = [Server(address, token) for address in addresses]
        self._own = [server for index, server in enumerate(self._servers) if pushes_to is None or index in pushes_to]
        self._share_of = share_of or (lambda samples, guests: samples_of([worker], samples, workers + guests))
        self._ranks = ranks
        self.guests: tuple[int, ...] = ()  # that the next batch is to be cut for, as the shard of element 0 tells
        self.samples = 0  # that the totals of the last step are of, as it tells
        self._summed: tuple[float, ...] = ()  # those totals
        self.dropped_guests = self._dropped_before = 0  # so far; by that shard's earlier processes
        self._expires = float("inf")  # on time.monotonic's scale; read by the watch
        self._expired = False
        self._awaited: Server | None = None
        self._closed = threading.Event()
        self._watching = threading.Thread(target=self._watch, name="parameter-server-watch", daemon=True)

    def join(self) -> int:
        """Agree on the model with every server, open the streams, and return the steps already applied.

        Does not fetch the weights: they are the start file's, or what `pull` gives.
        """
        self._begin()
        steps = set()
        for server in self._own:
            try:
                steps.add(self._join(server, JOIN_TIMEOUT_SECONDS).step)
            except grpc.RpcError as error:
                raise TrainingFault(f"parameter server {server.address}, join: {words(error)}") from error
        if len(self._own) == len(self._servers):
            check_ranges([(server.range, server.address) for server in self._own], len(self._parameters))
        if len(steps) > 1:
            raise TrainingFault(f"the parameter servers are at different steps: {sorted(steps)}")
        began = time.perf_counter()
        self._expires = time.monotonic() + JOIN_TIMEOUT_SECONDS
        for server in self._own:
            self._open_stream(server)
        for server in self._own:
            self._next(server, "join", "its stream", began)
        if self._own:
            trial = "join", "its answer to a trial of the network"
            self.wire.measure(lambda size: self._round_trip(self._own[0], size, *trial))
        self._expires = float("inf")
        self._step = steps.pop() if steps else 0
        return self._step

    def _begin(self) -> None:
        keep_freed_memory()
        self._watching.start()

    @property
    def held(self) -> list[tuple[range, str]]:
        """The elements of each server that this process exchanges with, and its address; after `join`."""
        return [(server.range, server.address) for server in self._own]

    def awaits(self) -> str:
        """Which server an answer is waited for from, now; "" for none. From any thread."""
        server = self._awaited
        return self._name(server) if server else ""

    def _name(self, server: Server) -> str:
        return f"parameter server {server.address} ({self._servers.index(server) + 1} of {len(self._servers)})"

    def _join(self, server: Server, timeout_seconds: float) -> pb.JoinResponse:
        request = pb.JoinRequest(
            worker=self._worker, generation=self._generation, parameter_count=len(self._parameters),
            layout_digest=self._layout_digest, step=self._step, wire_format=self.wire.wire_format,
            ranks=self._ranks, addresses=[other.address for other in self._servers],
            totals=self._summed, samples=self.samples,
        )  # fmt: skip
        response = server.call("Join", request, pb.JoinResponse, timeout_seconds)
        server.range = range(response.start, response.stop)
        server.chunks = dict(chunk_bounds(response.start, response.stop, response.chunk_elements))
        return response

    def _open_stream(self, server: Server) -> None:
        requests = self._requests(server, server.outgoing)
        server.stream = ExchangeStream(server.channel, f"/{SERVICE}/Exchange", requests, server.metadata)

    def step(self, step: int, samples: int, learning_rate: float) -> None:
        """Push the gradient (sums over this worker's samples), return with the weights after `step` (from 1).

        `samples` is the whole batch's count, over all workers. `totals` becomes the sum over the workers.
        """
        began = time.perf_counter()
        self._expires = time.monotonic() + self._timeout_seconds
        terms = samples, learning_rate, self._share_of(samples, len(self.guests)), self.guests
        queues = [
            [ChunkPush(step, start, stop, *terms) for start, stop in reversed(server.chunks.items())]
            for server in self._own
        ]
        for server, pushes in zip(self._own, queues, strict=True):
            for push in pushes:
                server.outgoing.put(push)
        for server, pushes in zip(self._own, queues, strict=True):
            self._awaited = server
            self._receive(server, step, began, pushes)
        self._awaited = None
        self._step = step
        self._expires = float("inf")
        self.wait_seconds += time.perf_counter() - began

    def pull(self, state: bool = True, publish: bool = False) -> dict[str, Float32]:
        """The weights as `parameters` and, with `state`, the optimizer's arrays as `optimizer.<name>`; all copies.

        Between two steps only. `publish`: this worker's next step begins with these weights (PullRequest).
        """
        self.found_returned = False
        request = pb.PullRequest(state=state, publish=publish, worker=self._worker, generation=self._generation)
        arrays: dict[str, Float32] = {}
        steps = set()
        for server in self._servers:
            self._awaited = server
            try:
                steps.add(self._with_retries(server, "pull", lambda: self._pull(server, request, arrays)))  # noqa: B023
            except grpc.RpcError as error:
                raise TrainingFault(f"parameter server {server.address}, pull: {words(error)}") from error
        self._awaited = None
        # Behind the others is only one that came back and has not met its workers again; it does at the next step.
        if max(steps) != min(steps) and not self._return_seconds:
            raise TrainingFault(f"the parameter servers are at different steps: {sorted(steps)}")
        return arrays

    def _pull(self, server: Server, request: pb.PullRequest, arrays: dict[str, Float32]) -> int:
        """Fill in what one server holds; the step its chunks are of."""
        stream = server.channel.unary_stream(f"/{SERVICE}/Pull", pb.PullRequest.SerializeToString, bytes)
        step = 0
        for data in stream(request, timeout=self._timeout_seconds, metadata=server.metadata):
            head, payload = decode(pb.PullResponse, DATA, data)
            array = arrays.setdefault(head.name, np.empty(len(self._parameters), np.float32))
            chunk = as_array(payload)
            array[head.offset : head.offset + len(chunk)] = chunk
            step = head.step
            self.found_returned |= head.awaits_workers
        return step

    def _with_retries(self, server: Server, when: str, act: Callable[[], T]) -> T:
        """`act`, again and again while the server cannot be reached, until `return_seconds` have passed."""
        deadline = time.monotonic() + self._return_seconds
        pause = FIRST_RETRY_SECONDS
        while True:
            try:
                return act()
            except grpc.RpcError as error:
                if not self._return_seconds or not lost(error):
                    raise
                if time.monotonic() + pause > deadline:
                    raise TrainingFault(
                        f"{self._name(server)}, {when}: it is gone and did not come back within "
                        f"{self._return_seconds:g} s; its own message is above"
                    ) from error
            if self._closed.wait(pause):
                raise TrainingFault(f"parameter server {server.address}, {when}: closed meanwhile")
            pause = min(2 * pause, LAST_RETRY_SECONDS)
            if server not in self._own:
                server.reconnect()

    def meet_again(self) -> None:
        """Between two steps: join those servers that died since the last one and came back, and count what they lost.

        Such a server answers once all workers are here.
        """
        for server in self._own:
            self._awaited = server
            self._expires = time.monotonic() + self._timeout_seconds
            try:
                self._round_trip(server, 0, f"step {self._step}", "a sign of life")
            except TrainingFault as fault:
                if self._expired or not lost(fault.__cause__):
                    raise
                self._return_to(server, self._step, [])
        self._awaited = None
        self._expires = float("inf")

    def leave(self) -> None:
        """Say that this worker has made its last step, and close. A server may end once every worker has left."""
        self._say_leave()
        self.close()

    def _say_leave(self) -> None:
        """Tell the servers that this worker pushes no more; one that is gone knows it no longer."""
        request = pb.LeaveRequest(worker=self._worker, generation=self._generation)
        for server in self._own:
            try:
                server.call("Leave", request, pb.LeaveResponse, JOIN_TIMEOUT_SECONDS)
            except grpc.RpcError as error:
                if not lost(error):
                    raise TrainingFault(f"parameter server {server.address}, leave: {words(error)}") from error

    def close(self) -> None:
        """Let go of the streams. Without `leave` before, the server takes this worker for lost and ends the others."""
        self._closed.set()
        for server in self._servers:
            server.close()
        if self._watching.ident is not None:
            self._watching.join(END_SECONDS)

    def _round_trip(self, server: Server, size: int, when: str, what: str) -> None:
        """Send so many bytes that the server ignores, and wait for its answer."""
        began = time.perf_counter()
        request = pb.ExchangeRequest(worker=self._worker, generation=self._generation, padding=bytes(size))
        server.outgoing.put(request.SerializeToString())
        self._next(server, when, what, began)

    def _requests(self, server: Server, outgoing: "queue.SimpleQueue[ChunkPush | bytes | None]") -> Iterator[bytes]:
        """What the stream sends; runs in gRPC's thread."""
        nothing = pb.ExchangeRequest(worker=self._worker, generation=self._generation).SerializeToString()
        yield nothing
        for push in queued(outgoing, server.heard_every):
            if not isinstance(push, ChunkPush):
                yield push or nothing
                continue
            head = pb.ExchangeRequest(
                worker=self._worker, generation=self._generation, step=push.step, offset=push.start,
                samples=push.samples, learning_rate=push.learning_rate,
                totals=self._pushed_totals.reshape(-1) if push.start == 0 else (),
                share_samples=push.share, guests=push.guests,
            )  # fmt: skip
            data = encode(head, GRADIENT, self.wire.outgoing(push))
            self.sent_bytes += len(data)
            yield data

    def _receive(self, server: Server, step: int, began: float, pushes: list[ChunkPush]) -> None:
        missing = dict(server.chunks)
        while missing:
            what = f"{len(missing)} of {len(server.chunks)} weight chunks"
            try:
                data: bytes = next(server.stream)
            except (grpc.RpcError, StopIteration) as error:
                if not self._return_seconds or self._expired or not lost(error):
                    raise self._fault(server, f"step {step}", what, began, error) from error
                self._return_to(server, step, pushes)
                missing = dict(server.chunks)
                continue
            self.received_bytes += len(data)
            head, payload = decode(pb.ExchangeResponse, WEIGHTS, data)
            if head.step == 0:  # the server lives, and has heard that this guest does
                self._expires = time.monotonic() + self._timeout_seconds
                continue
            stop = missing.pop(head.offset, None)
            if stop is None or head.step != step or not self.wire.take(head, payload, stop):
                raise TrainingFault(
                    f"parameter server {server.address}, step {step}: it answered with {len(payload)} bytes at offset "
                    f"{head.offset} of step {head.step}, which was not asked for"
                )
            if head.offset == server.range.start:
                self.staleness.see(head.staleness)
            if head.offset == 0:
                self.guests, self.samples = tuple(head.guests), head.samples
                self.dropped_guests = self._dropped_before + head.dropped_guests
                self._summed = tuple(head.totals)
                if head.totals:
                    self._totals[:] = head.totals

    def _return_to(self, server: Server, step: int, pushes: list[ChunkPush]) -> None:
        """Join a server that is gone as soon as it is back, and repeat the step's pushes."""
        self._expires = time.monotonic() + 2 * self._return_seconds + JOIN_TIMEOUT_SECONDS

        def join() -> pb.JoinResponse:
            server.reconnect()
            response = self._join(server, self._return_seconds)
            self._open_stream(server)
            next(server.stream)
            return response

        began = time.perf_counter()
        try:
            response = self._with_retries(server, f"step {step}", join)
        except (grpc.RpcError, StopIteration) as error:
            raise self._fault(server, f"step {step}", "its return", began, error) from error
        self._expires = time.monotonic() + self._timeout_seconds
        lost_steps = max(0, response.step - response.restored_step)
        self.restarts += 1
        if server.range.start == 0:
            self._dropped_before = self.dropped_guests
        self.steps_lost += lost_steps
        print(
            f"parameter server {server.address} is back at step {step}: elements {server.range.start} to "
            f"{server.range.stop - 1} are those after step {response.restored_step}, {lost_steps} steps are lost",
            file=sys.stderr,
            flush=True,
        )
        for push in pushes:
            server.outgoing.put(push)

    def _next(self, server: Server, when: str, what: str, began: float) -> bytes:
        """The stream's next message, or a fault that says what was waited for since `began`."""
        try:
            data: bytes = next(server.stream)
        except (grpc.RpcError, StopIteration) as error:
            raise self._fault(server, when, what, began, error) from error
        return data

    def _fault(self, server: Server, when: str, what: str, began: float, error: Exception) -> TrainingFault:
        seconds = time.perf_counter() - began
        why = "no answer in time" if self._expired else words(error)
        return TrainingFault(
            f"parameter server {server.address}, {when}: {why} ({self._who} waited {seconds:.1f} s for {what})"
        )

    def _watch(self) -> None:
        """Cancel the streams when a step's deadline has passed: gRPC has none for a part of a stream."""
        while not self._closed.wait(WATCH_SECONDS):
            if time.monotonic() > self._expires:
                self._expired = True
                for stream in [server.stream for server in self._own]:
                    if stream is not None:
                        stream.cancel()
                return
