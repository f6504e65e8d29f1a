"""ParameterServerService over a shard: messages in, `Shard.receive`, messages out.

One event loop runs everything, so the shard needs no lock and no request can be left waiting on a thread. A worker's
stream is one task that writes answers and one that reads pushes; measured beside a server of threads, the round trip
is the same.

Rules: every call shows the job's token. A stream that ends before its worker has left ends the step for all workers,
with a status that names it; a guest's ends nothing but its part in the job. A chunk's answer is serialized once for all
workers.
"""

import asyncio
import contextlib
import hmac
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NamedTuple, TypeAlias

import grpc
from google.protobuf.message import DecodeError

from protos import parameter_server_pb2 as pb
from worker.server.broadcast import Broadcaster
from worker.server.published import ShardWire, check_format
from worker.server.push_reader import read_push
from worker.server.pushes import NO_GUESTS, Answer, Apart, Conflict, Refused
from worker.server.shard import Shard
from worker.server.snapshots import Snapshots
from worker.wire import Float32, chunk_bounds, decode, encode

SERVICE = pb.DESCRIPTOR.services_by_name["ParameterServerService"].full_name
GRADIENT = pb.ExchangeRequest.GRADIENT_FIELD_NUMBER
WEIGHTS = pb.ExchangeResponse.WEIGHTS_FIELD_NUMBER
DATA = pb.PullResponse.DATA_FIELD_NUMBER

# A chunk and its head; the library's own limit is 4 MB.
MESSAGE_LIMIT = ("grpc.max_receive_message_length", 64 << 20)
# Without this a second server on the same port would get half of the first one's connections.
EXCLUSIVE_PORT = ("grpc.so_reuseport", 0)
# Followers ask now and then whether the server lives, though nothing is sent.
PINGS = ("grpc.http2.min_ping_interval_without_data_ms", 5000)
TICK_SECONDS = 0.1
NOTHING = pb.ExchangeResponse().SerializeToString()  # the answer to a request without a push

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class End(NamedTuple):
    """How a stream ends."""

    code: grpc.StatusCode
    message: str


def status_of(refusal: Refused) -> grpc.StatusCode:
    """The gRPC status for a request that the shard refuses."""
    if isinstance(refusal, Apart):
        return grpc.StatusCode.NOT_FOUND
    if isinstance(refusal, Conflict):
        return grpc.StatusCode.FAILED_PRECONDITION
    return grpc.StatusCode.INVALID_ARGUMENT


class ParameterServer:
    """A gRPC server around one shard."""

    def __init__(
        self, shard: Shard, token: str, snapshots: Snapshots | None = None, wire: ShardWire | None = None,
        job: str = "",
    ) -> None:  # fmt: skip
        """Take `wire`, for a job's lossy wire format, None for float32; and `job`, the text that guests are told."""
        self._shard = shard
        self._job = job
        self._addresses: list[str] = []  # as the founding workers have told
        self._ranks = 0
        self._broadcaster = Broadcaster(shard)
        self._snapshots = snapshots
        self._wire = wire
        self._all_joined = asyncio.Event()  # of a shard that is back from a snapshot
        self._streams: dict[int, asyncio.Queue[bytes | End]] = {}
        self._server = grpc.aio.server(
            interceptors=(_TokenCheck(token),), options=(MESSAGE_LIMIT, EXCLUSIVE_PORT, PINGS)
        )  # fmt: skip
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, self._handlers()),))
        self._ticker: asyncio.Task[None] | None = None

    async def start(self, listen: str) -> int:
        """Listen on HOST:PORT (port 0: any free one) and return the port. Raises RuntimeError when it cannot."""
        port = self._server.add_insecure_port(listen)
        await self._server.start()
        self._ticker = asyncio.create_task(self._tick())
        return port

    async def stop(self, grace_seconds: float = 1.0) -> None:
        """Let calls under way finish within the grace, then cut them."""
        if self._ticker is not None:
            self._ticker.cancel()
        self._broadcaster.end()
        self._end_all(End(grpc.StatusCode.UNAVAILABLE, "the parameter server is stopping"))
        if self._snapshots:
            await self._snapshots.close()
        await self._server.stop(grace_seconds)

    def _handlers(self) -> "dict[str, grpc.RpcMethodHandler[Any, Any]]":
        return {
            "Describe": grpc.unary_unary_rpc_method_handler(
                self._describe, pb.DescribeRequest.FromString, pb.DescribeResponse.SerializeToString
            ),
            "Join": grpc.unary_unary_rpc_method_handler(
                self._join, pb.JoinRequest.FromString, pb.JoinResponse.SerializeToString
            ),
            # No deserializer and no serializer: chunks pass as bytes, worker/wire.py reads and writes them.
            "Exchange": grpc.stream_stream_rpc_method_handler(self._exchange),
            "Pull": grpc.unary_stream_rpc_method_handler(self._pull, pb.PullRequest.FromString),
            "Leave": grpc.unary_unary_rpc_method_handler(
                self._leave, pb.LeaveRequest.FromString, pb.LeaveResponse.SerializeToString
            ),
            "Broadcast": grpc.stream_stream_rpc_method_handler(self._broadcast, pb.BroadcastRequest.FromString),
        }

    async def _join(self, request: pb.JoinRequest, context: Context) -> pb.JoinResponse:
        shard = self._shard
        guest = request.worker == -1 or (shard.setup.guests and not shard.members.is_founding(request.worker))
        if guest and shard.setup.guests:
            await self._founders()
        terms = request.generation, request.parameter_count, request.layout_digest, request.step
        number = request.worker
        try:
            check_format(request.worker, request.wire_format, self._wire)
            if guest:
                number = shard.welcome(number, *terms, _now())
            else:
                shard.join(number, *terms, (request.samples, tuple(request.totals)))
                self._addresses, self._ranks = list(request.addresses) or self._addresses, request.ranks
        except Refused as refusal:
            await context.abort(status_of(refusal), str(refusal))
        if self._wire:
            self._wire.join(number)
        if not shard.awaits_workers:
            self._all_joined.set()
        await self._all_joined.wait()  # until the caller's deadline at the latest
        setup = shard.setup
        return pb.JoinResponse(
            chunk_elements=setup.chunk_elements, step=shard.step, start=setup.start, stop=setup.stop,
            restored_step=shard.restored_step if setup.restored else shard.step,
            worker=number, lease_seconds=setup.lease_seconds if guest else 0,
        )  # fmt: skip

    async def _founders(self) -> None:
        """Wait until guests may come, until the caller's deadline at the latest."""
        while self._shard.awaits_founders and self._shard.fault is None:
            await asyncio.sleep(TICK_SECONDS)

    async def _describe(self, _request: pb.DescribeRequest, context: Context) -> pb.DescribeResponse:
        shard = self._shard
        if not shard.setup.guests:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, NO_GUESTS)
        while not self._addresses:  # the founding workers are about to tell
            await asyncio.sleep(TICK_SECONDS)
        return pb.DescribeResponse(
            job=self._job, generation=shard.setup.generation, addresses=self._addresses, ranks=self._ranks,
            step=shard.step,
        )  # fmt: skip

    async def _broadcast(self, requests: AsyncIterator[pb.BroadcastRequest], context: Context) -> AsyncIterator[bytes]:
        if not self._shard.setup.guests:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, NO_GUESTS)
        async for data in self._broadcaster.follow(requests):
            yield data
        if self._shard.fault is not None:
            await context.abort(grpc.StatusCode.ABORTED, self._shard.fault)

    async def _leave(self, request: pb.LeaveRequest, context: Context) -> pb.LeaveResponse:
        try:
            self._send(self._shard.leave(request.worker, request.generation))
        except Refused as refusal:
            await context.abort(status_of(refusal), str(refusal))
        if self._wire:
            self._wire.forget(request.worker)
        self._spread_news()
        return pb.LeaveResponse()

    async def _pull(self, request: pb.PullRequest, context: Context) -> AsyncIterator[bytes]:
        shard = self._shard
        version = step, applied = shard.version
        at_once = shard.setup.mode.at_once
        if applied and not at_once:
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"step {step + 1} is half applied ({applied} chunks): pull between steps",
            )
        arrays: dict[str, Float32] = {"parameters": shard.parameters}
        if request.state:
            arrays |= {f"optimizer.{name}": array for name, array in shard.state.items()}
        if at_once:  # workers at their own pace leave no pause between steps
            arrays = {name: array.copy() for name, array in arrays.items()}
        if request.publish and self._wire:
            try:
                shard.members.check(request.worker, request.generation)
            except Refused as refusal:
                await context.abort(status_of(refusal), str(refusal))
            self._wire.publish(request.worker, arrays["parameters"])
        begin = shard.setup.start
        for name, array in arrays.items():
            for start, stop in chunk_bounds(begin, shard.setup.stop, shard.setup.chunk_elements):
                if shard.version != version and not at_once:
                    await context.abort(grpc.StatusCode.ABORTED, f"step {step + 1} began during the pull")
                head = pb.PullResponse(name=name, offset=start, step=step, awaits_workers=shard.awaits_workers)
                yield encode(head, DATA, array[start - begin : stop - begin])
        if self._snapshots and request.state:
            self._snapshots.take()

    async def _exchange(self, _requests: AsyncIterator[bytes], context: Context) -> None:
        answers: asyncio.Queue[bytes | End] = asyncio.Queue()
        reader = asyncio.create_task(self._read(context, answers))
        try:
            while not isinstance(answer := await answers.get(), End):
                await context.write(answer)
            if answer.code is not grpc.StatusCode.OK:
                await context.abort(answer.code, answer.message)
        finally:
            reader.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await reader

    async def _read(self, context: Context, answers: "asyncio.Queue[bytes | End]") -> None:
        """Feed a stream's pushes to the shard; tell it when the stream is over before its worker left."""
        worker: int | None = None
        why = "its stream ended"
        try:
            while (data := await context.read()) is not grpc.aio.EOF:  # type: ignore[attr-defined]
                try:
                    head, payload = decode(pb.ExchangeRequest, GRADIENT, data)
                    if worker is None:
                        worker = self._tie(head, answers)
                    self._take(head, payload, worker)
                except (Refused, DecodeError, ValueError) as refusal:
                    why = f"its push was refused: {refusal}"
                    code = status_of(refusal) if isinstance(refusal, Refused) else grpc.StatusCode.INVALID_ARGUMENT
                    answers.put_nowait(End(code, str(refusal)))
                    return
        finally:
            answers.put_nowait(End(grpc.StatusCode.OK, ""))
            if worker is not None:
                del self._streams[worker]
                self._send(self._shard.lose(worker, why))
                self._spread_news()

    def _tie(self, head: pb.ExchangeRequest, answers: "asyncio.Queue[bytes | End]") -> int:
        """Make this the stream of the worker that its first message names."""
        if self._shard.members.is_founding(head.worker):
            self._shard.members.check_joined(head.worker, head.generation)
        else:
            self._shard.members.check(head.worker, head.generation)
        if head.worker in self._streams:
            raise Conflict(f"worker {head.worker} has a stream already: two processes have the same number")
        self._shard.open(head.worker, head.generation, _now())
        self._streams[head.worker] = answers
        return head.worker

    def _take(self, head: pb.ExchangeRequest, payload: memoryview, worker: int) -> None:
        if head.worker == worker and head.step == 0 and not payload:
            self._shard.hear(worker, _now())
            self._streams[worker].put_nowait(NOTHING)
            return
        push = read_push(head, payload, worker, self._wire)
        self._send(self._shard.receive(push, _now()))

    def _send(self, answers: list[Answer]) -> None:
        for answer in answers:
            if self._streams.keys().isdisjoint(answer.workers):
                continue
            reply = pb.ExchangeResponse(
                step=answer.step, offset=answer.offset, totals=answer.totals, staleness=answer.staleness,
                guests=answer.guests, samples=answer.samples, dropped_guests=answer.dropped_guests,
            )  # fmt: skip
            weights = self._wire.answer(answer, reply) if self._wire else answer.weights
            data = encode(reply, WEIGHTS, weights)
            for waiting in answer.workers:
                if waiting in self._streams:
                    self._streams[waiting].put_nowait(data)
        if answers:
            self._broadcaster.see()
        if self._snapshots:
            self._snapshots.see()

    async def _tick(self) -> None:
        """Show the shard the clock."""
        while True:
            await asyncio.sleep(TICK_SECONDS)
            self._send(self._shard.expire(_now()))
            self._spread_news()

    def _spread_news(self) -> None:
        """End the streams of guests that were dropped, and all streams once the job is over or has a fault."""
        for news in self._shard.take_news():
            if self._shard.setup.start == 0:  # the authority speaks for all shards
                print(f"parameter server: {news.line}", file=sys.stderr, flush=True)
            if news.dropped in self._streams:
                self._streams[news.dropped].put_nowait(End(grpc.StatusCode.NOT_FOUND, f"{news.line}; join again"))
        if self._shard.fault is not None:
            self._broadcaster.end()
            self._end_all(End(grpc.StatusCode.ABORTED, self._shard.fault))
        elif self._shard.members.over:
            self._broadcaster.end()
            self._end_all(End(grpc.StatusCode.OK, ""))

    def _end_all(self, end: End) -> None:
        for answers in self._streams.values():
            answers.put_nowait(end)


def _now() -> float:
    return asyncio.get_running_loop().time()


class _TokenCheck(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Refuses every call that does not show the job's token."""

    def __init__(self, token: str) -> None:
        self._expected = f"Bearer {token}".encode()

    async def intercept_service(
        self,
        continuation: "Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any]]]",
        details: grpc.HandlerCallDetails,
    ) -> "grpc.RpcMethodHandler[Any, Any]":
        shown = dict(details.invocation_metadata or ()).get("authorization", "")
        shown = shown.encode() if isinstance(shown, str) else shown
        if hmac.compare_digest(shown, self._expected):
            return await continuation(details)
        return grpc.unary_unary_rpc_method_handler(_not_allowed)


async def _not_allowed(_request: bytes, context: Context) -> bytes:
    await context.abort(
        grpc.StatusCode.UNAUTHENTICATED, "the job's token is missing or wrong: send `authorization: Bearer TOKEN`"
    )
    return b""
