"""`paceline-worker follow HOST:PORT`: evaluate the weights of a running job as it goes on, in one process without MPI.

It asks the servers for their newest weights whenever it is ready for some, so it never holds the job up; what it has no
time for it skips.

Rules: what several servers send is evaluated as of one step where they can be brought to one; a line says so where they
cannot. The end of the job is a good end.
"""

from __future__ import annotations

import json
import math
import queue
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import grpc
import numpy as np

from protos import parameter_server_pb2 as pb
from worker.data.batches import BatchReader
from worker.data.stores import fetch_all
from worker.errors import DataFault, TrainingFault
from worker.evaluation import conclude, samples_at_once, sum_over
from worker.invitation import Invitation
from worker.join import read_text
from worker.metrics import MetricSums
from worker.preparation import prepare
from worker.sync.exchange_stream import check_ranges, words
from worker.sync.guest import describe
from worker.sync.server_connection import SERVICE, Server
from worker.wire import as_array, decode

WEIGHTS = pb.BroadcastResponse.WEIGHTS_FIELD_NUMBER
ROUNDS = 8  # in which servers that are behind are asked for their next version
# A host that is gone says nothing: ask now and then whether it is there.
PINGS = (("grpc.keepalive_time_ms", 20_000), ("grpc.keepalive_timeout_ms", 20_000))


def follow_job(invitation: Invitation, every_steps: int, as_json: bool, say: Callable[[str], None]) -> None:
    """Print a line for each version of a job's weights, until it ends.

    Raises:
        Fault: the job or its data cannot be had.
    """
    told = describe(*invitation)
    job = read_text(told.job)
    fetch_all(job, lambda: None)
    prepared = prepare(job)
    if prepared.validation is None:
        raise DataFault("the job has no validation data to evaluate on: give data.validation or validation_fraction")
    model = prepared.model
    parameters = np.zeros(model.parameter_count, np.float32)
    model.attach(parameters)
    data = prepared.validation
    reader = BatchReader(data, prepared.preprocessing, samples_at_once(model, len(data)))
    model.reserve(reader.capacity)
    streams = [Stream(place, invitation.token, every_steps, parameters) for place in told.addresses]
    print(f"following: {len(data)} validation samples, at {told.addresses[0]}", file=sys.stderr, flush=True)
    try:
        while (steps := _newest(streams)) is not None:
            counted = MetricSums(job.metrics, model, data.targets)
            with np.errstate(over="ignore", invalid="ignore"):
                sums = sum_over(model, reader, 0, len(data), counted)
            report = conclude(sums, len(data), counted).as_report()
            if math.isnan(report["validation_loss"]):
                raise TrainingFault(f"step {steps.first}: the validation loss is nan; the weights are not finite")
            say(_line(steps, report, as_json))
    finally:
        for stream in streams:
            stream.close()


class Steps(NamedTuple):
    """Of which step the weights are, or from which to which where the servers differ."""

    first: int
    last: int


class Stream:
    """The versions of one server."""

    def __init__(self, address: str, token: str, every_steps: int, parameters: np.ndarray) -> None:
        self.step = -1
        self.elements = range(0)
        self._address = address
        self._parameters = parameters
        self._server = Server(address, token, PINGS)
        self._asked: queue.SimpleQueue[pb.BroadcastRequest | None] = queue.SimpleQueue()
        self._request = pb.BroadcastRequest(every_steps=every_steps)
        follow = self._server.channel.stream_stream(
            f"/{SERVICE}/Broadcast", pb.BroadcastRequest.SerializeToString, bytes
        )
        self._stream: Any = follow(iter(self._asked.get, None), metadata=self._server.metadata)

    def ask(self) -> None:
        """Want the next version; `read` it then."""
        self._asked.put(self._request)

    def read(self) -> bool:
        """Fill in the version that was asked for; False at the end of the job."""
        reached = -1
        while reached != self.elements.stop:
            try:
                data = next(self._stream)
            except StopIteration:
                return False
            except grpc.RpcError as error:
                raise TrainingFault(
                    f"parameter server {self._address}, after step {self.step}: {words(error)}"
                ) from error
            head, payload = decode(pb.BroadcastResponse, WEIGHTS, data)
            chunk = as_array(payload)
            self.elements = range(head.start, head.stop)
            if head.stop > len(self._parameters):
                raise TrainingFault(
                    f"parameter server {self._address}: it sends elements up to {head.stop}, "
                    f"the model has {len(self._parameters)}"
                )
            self._parameters[head.offset : head.offset + len(chunk)] = chunk
            self.step, reached = head.step, head.offset + len(chunk)
        return True

    @property
    def held(self) -> tuple[range, str]:
        """Its elements and its address."""
        return self.elements, self._address

    def close(self) -> None:
        """No more of it."""
        self._asked.put(None)
        self._server.close()


def _newest(streams: list[Stream]) -> Steps | None:
    """Take the next version of every server, and more of those behind, for all to be of one step; None at the end."""
    if not _read(streams):
        return None
    check_ranges([stream.held for stream in streams], len(streams[0]._parameters))
    for _ in range(ROUNDS):
        last = max(stream.step for stream in streams)
        behind = [stream for stream in streams if stream.step < last]
        if not behind or not _read(behind):
            break
    return Steps(min(stream.step for stream in streams), max(stream.step for stream in streams))


def _read(streams: list[Stream]) -> bool:
    """The next version of each of these servers, of about the same time; False at the end of the job."""
    for stream in streams:
        stream.ask()
    return all(stream.read() for stream in streams)


def _line(steps: Steps, report: dict[str, Any], as_json: bool) -> str:
    report = {name: value for name, value in report.items() if value is not None}
    if as_json:
        return json.dumps({"step": steps.first, "to_step": steps.last} | report)
    place = f"step {steps.first}" + (f" to {steps.last}" if steps.last > steps.first else "")
    numbers = report | report.pop("validation_metrics", {})
    return "  ".join([place, *(f"{name} {value:.4f}" for name, value in numbers.items() if isinstance(value, float))])
