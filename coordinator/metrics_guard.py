"""Who may read /metrics: as everywhere, whoever is known; but it is of all jobs, so only roles that see all."""

from __future__ import annotations

from http import HTTPStatus

from coordinator.audit import AuditLog, Deed
from coordinator.callers import Caller, Callers
from coordinator.database import StoreUnavailable
from coordinator.guard import not_allowed
from coordinator.permissions import SEES_METRICS
from coordinator.refusals import Refused

CALL = "GET /metrics"


class MetricsGuard:
    """Holds a call against the tokens, and writes a refusal to the audit log."""

    def __init__(self, callers: Callers, audit: AuditLog) -> None:
        self._callers = callers
        self._audit = audit

    def refusal(self, authorization: str, peer: str) -> tuple[HTTPStatus, str] | None:
        """The answer to a caller that may not; None for one that may."""
        caller: Caller | None = None
        try:
            caller = self._callers.of([("authorization", authorization)] if authorization else [])
            if caller.role not in SEES_METRICS:
                raise not_allowed(CALL, caller)
        except StoreUnavailable as fault:
            return HTTPStatus.SERVICE_UNAVAILABLE, str(fault)
        except Refused as fault:
            status = HTTPStatus.UNAUTHORIZED if caller is None else HTTPStatus.FORBIDDEN
            name, role = (caller.name or None, caller.role.value) if caller else (None, None)
            self._audit.write(Deed(CALL, name, role, "", peer, status.name, fault.reason, known=caller is not None))
            return status, fault.message
        return None
