"""Stands before every call: asks who calls, holds the call against permissions.RULES, and writes the audit log.

Rules: health is open to all; reflection to whoever is known; any other call that has no row is refused. A stream ends
when its caller's token does. Nothing is looked up for a caller nobody knows. Bytes that are no such request are refused
here, once it is known who sent them: gRPC itself would log a traceback and call it a fault of the coordinator.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import grpc
from google.protobuf.message import DecodeError
from grpc_health.v1 import health
from grpc_reflection.v1alpha import reflection

from coordinator.answers import STATUS_CODES, refuse
from coordinator.audit import AuditLog, Deed
from coordinator.callers import FRESH_SECONDS, Caller, Callers
from coordinator.permissions import RULES, SEE, Reach, Rule
from coordinator.refusals import Refused, no_such_job

OPEN = (health.SERVICE_NAME,)
FOR_THE_KNOWN = Rule(SEE, recorded=False)
REFUSED_TO_ALL = Rule({}, recorded=False)


class Guard(grpc.ServerInterceptor):  # type: ignore[type-arg]  # the stubs alone know it as generic
    """owner_of: whose job that is, None where there is none."""

    def __init__(self, service: str, callers: Callers, owner_of: Callable[[str], str | None], audit: AuditLog) -> None:
        self._service = service
        self._callers = callers
        self._owner_of = owner_of
        self._audit = audit

    def intercept_service(self, continuation: Any, details: grpc.HandlerCallDetails) -> Any:
        handler = continuation(details)
        service, _, call = details.method.lstrip("/").rpartition("/")
        if handler is None or service in OPEN:
            return handler
        rule = self._rule(service, call)
        read = _read_by(handler)
        if handler.response_streaming:
            guard = self._guard_stream(call, rule, read, handler.stream_stream or handler.unary_stream)
            kind = grpc.stream_stream_rpc_method_handler if handler.request_streaming else _unary_stream
        else:
            guard = self._guard_answer(call, rule, read, handler.stream_unary or handler.unary_unary)
            kind = grpc.stream_unary_rpc_method_handler if handler.request_streaming else _unary_unary
        return kind(
            guard, handler.request_deserializer if handler.request_streaming else None, handler.response_serializer
        )

    def _rule(self, service: str, call: str) -> Rule:
        if service == reflection.SERVICE_NAME:
            return FOR_THE_KNOWN
        return RULES.get(call, REFUSED_TO_ALL) if service == self._service else REFUSED_TO_ALL

    def _guard_answer(
        self, call: str, rule: Rule, read: Callable[[Any], Any], method: Callable[[Any, Any], Any]
    ) -> Callable[[Any, Any], Any]:
        def guarded(sent: Any, context: grpc.ServicerContext) -> Any:
            request = read(sent)
            caller = self._admit(call, rule, request, context)
            try:
                response = method(request, context)
            except BaseException:
                self._note(call, rule, caller, _job_of(request), context, ended=False)
                raise
            made = response.job.id if call == "SubmitJob" else ""
            self._note(call, rule, caller, made or _job_of(request), context, ended=True)
            return response

        return guarded

    def _guard_stream(
        self, call: str, rule: Rule, read: Callable[[Any], Any], method: Callable[[Any, Any], Iterator[Any]]
    ) -> Callable[[Any, Any], Iterator[Any]]:
        def guarded(sent: Any, context: grpc.ServicerContext) -> Iterator[Any]:
            request = read(sent)
            caller = self._admit(call, rule, request, context)
            ended = noted = False
            looked_at = time.monotonic()
            try:
                with contextlib.closing(method(request, context)) as responses:  # type: ignore[type-var]
                    for response in responses:
                        if time.monotonic() - looked_at > FRESH_SECONDS:
                            noted = True  # a refusal is written there
                            self._admit(call, rule, request, context)
                            noted = False
                            looked_at = time.monotonic()
                        yield response
                ended = True
            finally:
                if not noted:
                    self._note(call, rule, caller, _job_of(request), context, ended)

        return guarded

    def _admit(self, call: str, rule: Rule, request: Any, context: grpc.ServicerContext) -> Caller | None:
        """The caller, or None for a worker, whose token the controller looks at; ends the call where it may not be."""
        caller = None
        try:
            if rule.by_worker:
                _check_readable(call, request)
                return None
            caller = self._callers.of(context.invocation_metadata())
            reach = rule.reach.get(caller.role)
            if reach is None:
                raise not_allowed(call, caller)
            _check_readable(call, request)
            if reach is Reach.OWN and hasattr(request, "job_id") and self._owner_of(request.job_id) != caller.name:
                raise no_such_job(request.job_id)
        except Exception as fault:
            if isinstance(fault, Refused):
                self._write(call, caller, _job_of(request), context, STATUS_CODES[fault.reason].name, fault.reason)
            refuse(context, fault)
        return caller

    def _note(
        self, call: str, rule: Rule, caller: Caller | None, job: str, context: grpc.ServicerContext, ended: bool
    ) -> None:
        """Write what a call came to, where it is one that is recorded or it was refused."""
        code = context.code()  # type: ignore[attr-defined]  # the stubs lack it
        code = code or (grpc.StatusCode.OK if ended else grpc.StatusCode.CANCELLED)
        code = code if isinstance(code, grpc.StatusCode) else _CODES[code]
        if rule.recorded or code in (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED):
            self._write(call, caller, job, context, code.name)

    def _write(
        self, call: str, caller: Caller | None, job: str, context: grpc.ServicerContext, outcome: str, reason: str = ""
    ) -> None:
        name, role = (caller.name or None, caller.role.value) if caller else (None, None)
        self._audit.write(Deed(call, name, role, job, context.peer(), outcome, reason, known=caller is not None))


class _Unreadable(NamedTuple):
    """What came in place of a request."""

    size_bytes: int


def _read_by(handler: Any) -> Callable[[Any], Any]:
    """From what a caller sent to the request, or _Unreadable; a stream of requests is left to gRPC."""

    def read(sent: bytes) -> Any:
        try:
            return handler.request_deserializer(sent)
        except DecodeError:  # no message, too deeply nested, or a text that is not UTF-8
            return _Unreadable(len(sent))

    return (lambda requests: requests) if handler.request_streaming else read


def _check_readable(call: str, request: Any) -> None:
    if isinstance(request, _Unreadable):
        text = (
            f"the {request.size_bytes} bytes are no request of {call}: damaged, nested too deeply, or text not in UTF-8"
        )
        raise Refused("InvalidRequest", text)


def not_allowed(call: str, caller: Caller) -> Refused:
    who = f"{caller.name} is {caller.role}" if caller.name else f"the caller is {caller.role}"
    return Refused("RoleNotAllowed", f"{who}, which may not do that ({call}); ask an administrator")


def _job_of(request: Any) -> str:
    return str(getattr(request, "job_id", ""))


_CODES = {code.value[0]: code for code in grpc.StatusCode}
_unary_unary = grpc.unary_unary_rpc_method_handler
_unary_stream = grpc.unary_stream_rpc_method_handler
