"""Page tokens of a list: where the next page begins, in a form that promises nothing to its holder.

Rules: a token names the oldest job shown, so that jobs added meanwhile move nothing; it goes with the filter it was
given for and with no other.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re

from protos.wording import quoted


def page_token(before: int | None, filter_text: str) -> str:
    """Empty on the last page."""
    if before is None:
        return ""
    return base64.urlsafe_b64encode(f"{before}.{_digest(filter_text)}".encode()).decode().rstrip("=")


def read_page_token(token: str, filter_text: str) -> int | None:
    """What page_token was given. ValueError says what is wrong with a token."""
    if not token:
        return None
    try:
        text = base64.urlsafe_b64decode(token.encode() + b"=" * (-len(token) % 4)).decode()
    except (binascii.Error, ValueError):
        text = ""
    match = re.fullmatch(r"([0-9]{1,18})\.([0-9a-f]{12})", text, re.ASCII)
    if match is None:
        raise ValueError(f"{quoted(token)} is not one a response gave")
    if match[2] != _digest(filter_text):
        raise ValueError("it was given for another filter: repeat that one, or begin without a token")
    return int(match[1])


def _digest(filter_text: str) -> str:
    return hashlib.sha256(filter_text.encode()).hexdigest()[:12]
