"""Secrets and their digests: tokens as they are made, shown and compared.

Rules: what is kept of a token is its SHA-256; comparison takes the same time whatever is wrong with the offer. A job's
token is known to its own processes alone and dies with it (jobs.advance forgets the digest).
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Iterable
from typing import NamedTuple

_SCHEME = "bearer "


class Token(NamedTuple):
    """A fresh token and what may be stored of it."""

    secret: str
    digest: str  # SHA-256 in hexadecimal; a salt would add nothing to 256 random bits


def new_token() -> Token:
    secret = secrets.token_urlsafe(32)
    return Token(secret, digest_of(secret))


def digest_of(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def matches(offered: str, digest: str | None) -> bool:
    """Whether the offered token is the one behind the digest; a job without a live token matches nothing."""
    return hmac.compare_digest(digest_of(offered), digest or "0" * 64)


def bearer_token(metadata: Iterable[tuple[str, str | bytes]]) -> str | None:
    """The token of an `authorization: Bearer TOKEN` entry, None where there is none."""
    for key, value in metadata:
        if key.lower() == "authorization" and isinstance(value, str) and value.lower().startswith(_SCHEME):
            return value[len(_SCHEME) :].strip() or None
    return None
