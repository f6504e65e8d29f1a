"""Whether a coordinator may be reached where it is told to listen, decided from what it was given.

Rules: on loopback everything may be left out. Anywhere else there must be a certificate and a token, or --insecure.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from coordinator.addresses import Address


def exposure_fault(reached: Sequence[tuple[str, Address]], tls: bool, insecure: bool) -> str | None:
    """Why this may not be, in one line; None where it may. reached: each option as it was typed, and its address."""
    for option, address in reached:
        if not (address.loopback or tls or insecure):
            return (
                f"{option}: other machines can reach this: give --tls-certificate and --tls-key, and make tokens "
                "with `paceline token create`; or --insecure, which lets whoever reaches it run, see and end jobs"
            )
    return None


def exposure_warning(reached: Sequence[tuple[str, Address]], tls: bool) -> str | None:
    """What --insecure has let through, None where there is nothing to say."""
    if tls:
        return None
    for option, address in reached:
        if not address.loopback:
            return (
                f"{option} --insecure: whoever reaches it can run, see and end jobs here, unless tokens were made; "
                "and whoever is on the way reads and changes everything, tokens too"
            )
    return None


def no_token_yet(state: Path, other_store: bool) -> str:
    and_store = " with the same --store" if other_store else ""
    return (
        "other machines can reach this coordinator and no token was made yet: make the first with "
        f"`paceline token create NAME --role administrator --state {state}`{and_store}, or give --insecure"
    )
