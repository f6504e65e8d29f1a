"""Who calls: the holder of a token, or where none is asked for, the administrator of this machine.

Rules: tokens are asked for as soon as one was ever made, and from the start where others can reach the coordinator.
A token that is shown must be good, asked for or not. What is made or revoked counts within FRESH_SECONDS. A token is
held against every stored digest, in the same time whichever fits.
"""

from __future__ import annotations

import hmac
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from typing import NamedTuple

from coordinator import auth
from coordinator.refusals import Refused
from coordinator.tokens import Role, StoredToken

FRESH_SECONDS = 1.0

Metadata = Iterable[tuple[str, str | bytes]]


class Caller(NamedTuple):
    """`name` is also whose jobs are the caller's own; empty where nobody was asked."""

    name: str
    role: Role


LOCAL = Caller("", Role.ADMINISTRATOR)


class Callers:
    """Tells the caller of each call. Any thread may ask."""

    def __init__(
        self,
        read_tokens: Callable[[], Sequence[StoredToken]],
        clock: Callable[[], datetime],
        *,
        tokens_needed: bool,
        seconds: Callable[[], float] = time.monotonic,
    ) -> None:
        self._read_tokens = read_tokens
        self._clock = clock
        self._tokens_needed = tokens_needed
        self._seconds = seconds
        self._lock = threading.Lock()
        self._tokens: Sequence[StoredToken] = ()
        self._read_at: float | None = None

    def of(self, metadata: Metadata) -> Caller:
        """The caller of a call with these headers; Refused where it is nobody known."""
        stored = self._stored()
        offered = auth.bearer_token(metadata)
        if offered is None:
            if stored or self._tokens_needed:
                raise Refused("TokenMissing", f"this coordinator asks for a token: {_REMEDY}")
            return LOCAL
        digest = auth.digest_of(offered)
        found = None
        for token in stored:  # all of them: nothing is to be learned from how long it takes
            if hmac.compare_digest(token.digest, digest):
                found = token
        state = "unknown" if found is None else found.state(self._clock())
        if found is None or state != "live":
            raise Refused("TokenNotGood", f"the token is {state} here: {_REMEDY}")
        return Caller(found.name, found.role)

    def _stored(self) -> Sequence[StoredToken]:
        with self._lock:
            now = self._seconds()
            if self._read_at is None or now - self._read_at >= FRESH_SECONDS:
                self._tokens = self._read_tokens()
                self._read_at = now
            return self._tokens


_REMEDY = "give one by --token-file or PACELINE_TOKEN; its administrator makes them with `paceline token create`"
