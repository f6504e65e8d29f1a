"""One shard of the parameter servers as a worker sees it: its channel, its range of the vector, its stream."""

import queue
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import grpc
import grpc.experimental
from google.protobuf.message import Message

from protos import parameter_server_pb2 as pb
from worker.sync.server_wire import ChunkPush

SERVICE = pb.DESCRIPTOR.services_by_name["ParameterServerService"].full_name
MESSAGE_LIMIT = ("grpc.max_receive_message_length", 64 << 20)
NO_THREAD_FOR_PULL = (grpc.experimental.ChannelOptions.SingleThreadedUnaryStream, 1)

R = TypeVar("R", bound=Message)


class Server:
    """One shard: its channel, its range of the vector, its stream."""

    def __init__(self, address: str, token: str, options: Sequence[tuple[str, int]] = ()) -> None:
        self._options = (MESSAGE_LIMIT, NO_THREAD_FOR_PULL, *options)
        self.address = address
        self.metadata = (("authorization", f"Bearer {token}"),)
        self.range = range(0)
        self.chunks: dict[int, int] = {}  # start -> stop
        self.stream: Any = None  # an ExchangeStream, once it is open
        self.heard_every: float | None = None  # seconds in which a guest sends something
        self._connect()

    def _connect(self) -> None:
        self.channel = grpc.insecure_channel(self.address, options=self._options)
        self.outgoing: queue.SimpleQueue[ChunkPush | bytes | None] = queue.SimpleQueue()

    def reconnect(self) -> None:
        """A channel and a queue anew; nothing of the old stream is sent."""
        self.close()
        self._connect()

    def close(self) -> None:
        """End the stream and the channel."""
        self.outgoing.put(None)
        if self.stream is not None:
            self.stream.close()
            self.stream = None
        self.channel.close()

    def call(self, method: str, request: Message, response: type[R], timeout_seconds: float) -> R:
        caller = self.channel.unary_unary(
            f"/{SERVICE}/{method}",
            request_serializer=type(request).SerializeToString,
            response_deserializer=response.FromString,
        )
        answer: R = caller(request, timeout=timeout_seconds, metadata=self.metadata)
        return answer


def queued(
    outgoing: "queue.SimpleQueue[ChunkPush | bytes | None]", heard_every: float | None
) -> Iterator[ChunkPush | bytes | None]:
    """What is to be sent, until the queue says None; yields None where it is time that something is sent."""
    while True:
        try:
            push = outgoing.get(timeout=heard_every)
        except queue.Empty:
            yield None
            continue
        if push is None:
            return
        yield push
