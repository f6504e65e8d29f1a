"""What lets guests come to a running job, in a file of its output folder: where its servers are, and its token.

Rules: its owner alone can read the file, and it is there only while the job runs.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import NamedTuple

from protos import environment
from worker.errors import OutputFault, UsageFault
from worker.output_folder import GUESTS


class Invitation(NamedTuple):
    """Where guests ask to take part, and what they show."""

    address: str
    token: str


def leave_invitation(folder: Path, invitation: Invitation) -> Path:
    """Write it into the output folder. OutputFault where it cannot be written."""
    path = folder / GUESTS
    try:
        path.unlink(missing_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(json.dumps(invitation._asdict()) + "\n")
    except OSError as error:
        raise OutputFault(f"{path}: {error.strerror or error}; make room, or name another folder with -o") from error
    return path


def read_invitation(place: str, token_file: Path | None) -> Invitation:
    """From a run's output folder; or of HOST:PORT with the token of a file, else of the environment.

    Raises:
        UsageFault: there is no token, or no job that takes guests runs in the folder.
    """
    if os.path.isdir(place):
        found = _read(Path(place) / GUESTS, f"{place}: no job that takes guests runs there")
        return Invitation(found["address"], _check_token(found["token"], str(Path(place) / GUESTS)))
    host, colon, port = place.rpartition(":")
    if not (host and colon and port.isdigit()):
        raise UsageFault(f"{place}: is neither HOST:PORT nor the output folder of a running job")
    if token_file is not None:
        found = _read(token_file, f"{token_file}: holds no token")
        return Invitation(place, _check_token(found["token"], str(token_file)))
    if token := os.environ.get(environment.JOB_TOKEN, ""):
        return Invitation(place, _check_token(token, environment.JOB_TOKEN))
    raise UsageFault(f"the job's token is missing: name its file with --token-file, or set {environment.JOB_TOKEN}")


def _check_token(token: str, where: str) -> str:
    """One line of printable ASCII, which is what gRPC carries in a header."""
    if not (token and token.isascii() and token.isprintable()):
        raise UsageFault(f"{where}: holds no token: one line of ASCII, as {GUESTS} of the output folder has it")
    return token


def _read(path: Path, what: str) -> dict[str, str]:
    """A whole invitation, or a file with nothing but the token in it."""
    try:
        text = path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageFault(f"{what} ({getattr(error, 'strerror', None) or error})") from error
    try:
        found = json.loads(text) if text.startswith("{") else {"token": text}
        return {"address": str(found.get("address", "")), "token": str(found["token"])}
    except (ValueError, KeyError) as error:
        raise UsageFault(f"{what}: take {GUESTS} of the output folder of a running job") from error
