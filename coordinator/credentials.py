"""What a client verb shows of itself, and by what it knows the coordinator: read from options and files.

Rules: a token leaves this machine encrypted, or not at all unless --insecure says so.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from coordinator.addresses import Address
from coordinator.faults import CommandFault
from protos.exit_codes import ExitCode

LONGEST_TOKEN = 1000  # characters


@dataclass(frozen=True)
class Credentials:
    """None of it is needed on loopback. ca: PEM; empty means the certificates this machine trusts."""

    token: str = field(default="", repr=False)
    tls: bool = False
    ca: bytes = b""
    certificate: bytes = b""
    key: bytes = field(default=b"", repr=False)
    insecure: bool = False

    def check(self, address: Address) -> None:
        """CommandFault where the token would travel readable for others."""
        if self.token and not (self.tls or self.insecure or address.loopback):
            raise CommandFault(
                f"--server {address}: the token would travel unencrypted: give --tls-ca FILE or --tls, "
                "or --insecure to send it all the same",
                ExitCode.USAGE,
            )


NO_CREDENTIALS = Credentials()


def read_credentials(
    token: str,
    token_file: Path | None,
    tls: bool,
    ca: Path | None,
    certificate: Path | None,
    key: Path | None,
    insecure: bool,
) -> Credentials:
    """What the options name; CommandFault for a file that cannot be read."""
    if (certificate is None) != (key is None):
        raise CommandFault("--tls-certificate and --tls-key go together: give both or none", ExitCode.USAGE)
    if token_file is not None:
        token = _read("--token-file", token_file).decode("utf-8", "replace")
    token = token.strip()
    if len(token) > LONGEST_TOKEN or not token.isascii() or not token.isprintable() or " " in token:
        where = f"--token-file {token_file}" if token_file is not None else "PACELINE_TOKEN"
        raise CommandFault(f"{where}: holds no token: one line, as `paceline token create` printed it", ExitCode.USAGE)
    return Credentials(
        token,
        tls or ca is not None or certificate is not None,
        _read_certificate("--tls-ca", ca),
        _read_certificate("--tls-certificate", certificate),
        _read("--tls-key", key) if key else b"",
        insecure,
    )


def _read_certificate(option: str, path: Path | None) -> bytes:
    if path is None:
        return b""
    found = _read(option, path)
    if b"-----BEGIN CERTIFICATE-----" not in found:
        raise CommandFault(f"{option}: {path} holds no certificate in PEM: name a file that does", ExitCode.USAGE)
    return found


def _read(option: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as fault:
        raise CommandFault(f"{option}: {path} cannot be read: {fault.strerror}", ExitCode.USAGE) from fault
