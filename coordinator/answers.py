"""How the service answers: a refusal becomes a google.rpc.Status, our own mistakes are logged, streams are counted.

Rules: every error carries an ErrorInfo whose reason is the refusal's word; the faults of a job file ride along as
BadRequest field violations, a limit that was reached as QuotaFailure. An error travels in HTTP/2 headers, of which gRPC
clients take 8 KB: what is longer is cut, and of many faults the first are told and the number of the others. The sync
server gives each stream a thread, so their number is limited and short calls always find one.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import grpc
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]  # ships no stubs
from grpc_status import rpc_status

from coordinator.database import StoreUnavailable
from coordinator.refusals import Refused
from protos.rules import Violation

DOMAIN = "paceline"
STREAMS_AT_MOST = 256
SHORT_CALLS_AT_MOST = 32  # threads beside those of the streams

STATUS_CODES: dict[str, grpc.StatusCode] = {
    "AttemptOver": grpc.StatusCode.FAILED_PRECONDITION,
    "CoordinatorStopping": grpc.StatusCode.UNAVAILABLE,
    "DataNotAllowed": grpc.StatusCode.PERMISSION_DENIED,
    "FileChanged": grpc.StatusCode.DATA_LOSS,
    "InvalidJob": grpc.StatusCode.INVALID_ARGUMENT,
    "InvalidRequest": grpc.StatusCode.INVALID_ARGUMENT,
    "JobEnded": grpc.StatusCode.FAILED_PRECONDITION,
    "JobNotEnded": grpc.StatusCode.FAILED_PRECONDITION,
    "JobNotFound": grpc.StatusCode.NOT_FOUND,
    "LimitExceeded": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "NoOutput": grpc.StatusCode.FAILED_PRECONDITION,
    "NoSuchRank": grpc.StatusCode.INVALID_ARGUMENT,
    "NotPossibleNow": grpc.StatusCode.FAILED_PRECONDITION,
    "RequestIdReused": grpc.StatusCode.ALREADY_EXISTS,
    "RoleNotAllowed": grpc.StatusCode.PERMISSION_DENIED,
    "StoreUnavailable": grpc.StatusCode.UNAVAILABLE,
    "TokenMissing": grpc.StatusCode.UNAUTHENTICATED,
    "TokenNotGood": grpc.StatusCode.UNAUTHENTICATED,
    "TokenRefused": grpc.StatusCode.PERMISSION_DENIED,
    "TooManyStreams": grpc.StatusCode.RESOURCE_EXHAUSTED,
}

MESSAGE_AT_MOST = 1200  # characters
FAULTS_AT_MOST = 1500  # characters of all faults together; they travel twice
FAULT_AT_MOST = 400
NOT_ASCII_COSTS = 6  # times as much: percent-encoded

log = logging.getLogger("paceline.service")
Request = TypeVar("Request")
Response = TypeVar("Response")


class HasStreams(Protocol):
    """A servicer whose streams are counted."""

    streams: threading.Semaphore


Servicer = TypeVar("Servicer", bound=HasStreams)


def answer(
    method: Callable[[Any, Request, grpc.ServicerContext], Response],
) -> Callable[[Any, Request, grpc.ServicerContext], Response]:
    """A unary method that may raise Refused."""

    @functools.wraps(method)
    def answered(self: Any, request: Request, context: grpc.ServicerContext) -> Response:
        try:
            return method(self, request, context)
        except Exception as fault:  # whatever it is, the caller gets a status and not a broken line
            refuse(context, fault)
            raise AssertionError("refuse() aborts the call") from fault

    return answered


def answer_stream(
    method: Callable[[Servicer, Request, grpc.ServicerContext], Iterator[Response]],
) -> Callable[[Servicer, Request, grpc.ServicerContext], Iterator[Response]]:
    """A streaming method that may raise Refused, also halfway."""

    @functools.wraps(method)
    def answered(self: Servicer, request: Request, context: grpc.ServicerContext) -> Iterator[Response]:
        if not self.streams.acquire(blocking=False):
            message = f"{STREAMS_AT_MOST} streams are open, which is all this coordinator has; try again later"
            refuse(context, Refused("TooManyStreams", message))
        try:
            yield from method(self, request, context)
        except Exception as fault:  # as in `answer`; the end of a stream whose caller went away is no Exception
            refuse(context, fault)
        finally:
            self.streams.release()

    return answered


def refuse(context: grpc.ServicerContext, fault: Exception) -> None:
    """End the call with the status of a refusal; with INTERNAL and one line in our log for anything else."""
    if isinstance(fault, StoreUnavailable):
        fault = Refused("StoreUnavailable", f"{fault}; ask again when it is back")
    if isinstance(fault, Refused):
        code, reason = STATUS_CODES[fault.reason], fault.reason
        violations = told(fault.violations)
        message = "\n".join(f"{path}: {text}" if path else text for path, text in violations) or fault.message
    else:
        log.error("a call failed", exc_info=fault)
        code, reason = grpc.StatusCode.INTERNAL, "Internal"
        violations = []
        message = f"the coordinator failed: {type(fault).__name__}: {fault}; its log has more"
    if not violations:
        message = shortened(message, MESSAGE_AT_MOST)
    details: list[Any] = [error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN)]
    if violations:
        faults = [
            error_details_pb2.BadRequest.FieldViolation(field=path, description=text) for path, text in violations
        ]
        details.append(error_details_pb2.BadRequest(field_violations=faults))
    if isinstance(fault, Refused) and fault.quota:
        exceeded = error_details_pb2.QuotaFailure.Violation(subject=fault.quota, description=message)
        details.append(error_details_pb2.QuotaFailure(violations=[exceeded]))
    status = status_pb2.Status(code=code.value[0], message=message)
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    context.abort_with_status(rpc_status.to_status(status))


def told(violations: Sequence[Violation]) -> list[Violation]:
    """The faults that an answer has room for, and after them, without a place, how many more there are."""
    room = FAULTS_AT_MOST
    kept: list[Violation] = []
    for path, text in violations:
        fault = Violation(shortened(path, FAULT_AT_MOST), shortened(text, FAULT_AT_MOST))
        room -= sum(len(part) * (1 if part.isascii() else NOT_ASCII_COSTS) for part in fault)
        if room < 0 and kept:
            return [*kept, Violation("", f"and {len(violations) - len(kept)} more")]
        kept.append(fault)
    return kept


def shortened(text: str, most: int) -> str:
    """The beginning and the end, where a remedy stands, of a text that is longer."""
    most = most if text.isascii() else most // NOT_ASCII_COSTS
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-(most // 2 - 5) :]}"
