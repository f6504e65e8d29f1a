"""One shard of the parameter servers as a worker sees it: its channel, its range of the vector, its stream."""

import queue
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
from google.protobuf.message import Message

from protos import parameter_server_pb2 as pb

SERVICE = pb.DESCRIPTOR.services_by_name["ParameterServerService"].full_name
MESSAGE_LIMIT = ("grpc.max_receive_message_length", 64 << 20)

R = TypeVar("R", bound=Message)


@dataclass(frozen=True)
class Push:
    """A chunk on its way out; the gradient is read when gRPC's thread takes it."""

    step: int
    start: int
    stop: int
    samples: int
    learning_rate: float
    share: int  # of the samples, this worker's
    guests: tuple[int, ...]  # that the batch was cut for


class Server:
    """One shard: its channel, its range of the vector, its stream."""

    def __init__(self, address: str, token: str, options: Sequence[tuple[str, int]] = ()) -> None:
        self._options = (MESSAGE_LIMIT, *options)
        self.address = address
        self.metadata = (("authorization", f"Bearer {token}"),)
        self.range = range(0)
        self.chunks: dict[int, int] = {}  # start -> stop
        self.stream: Any = None  # the call object of the Exchange stream
        self.heard_every: float | None = None  # seconds in which a guest sends something
        self._connect()

    def _connect(self) -> None:
        self.channel = grpc.insecure_channel(self.address, options=self._options)
        self.outgoing: queue.SimpleQueue[Push | None] = queue.SimpleQueue()

    def reconnect(self) -> None:
        """A channel and a queue anew; nothing of the old stream is sent."""
        self.close()
        self._connect()

    def close(self) -> None:
        """End the stream and the channel."""
        self.outgoing.put(None)
        self.channel.close()

    def call(self, method: str, request: Message, response: type[R], timeout_seconds: float) -> R:
        caller = self.channel.unary_unary(
            f"/{SERVICE}/{method}",
            request_serializer=type(request).SerializeToString,
            response_deserializer=response.FromString,
        )
        answer: R = caller(request, timeout=timeout_seconds, metadata=self.metadata)
        return answer


def queued(outgoing: "queue.SimpleQueue[Push | None]", heard_every: float | None) -> Iterator[Push | None]:
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


def lost(error: Exception) -> bool:
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
