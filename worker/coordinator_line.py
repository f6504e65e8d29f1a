"""The channel to the coordinator, with TLS where it speaks that.

Rules: a coordinator is known by its very certificate, as it lies in its file whenever the channel is opened; what
vouches for it, and what its address is, does not matter. Where it asks for a certificate, workers show the same one.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from protos import environment


class Tls(NamedTuple):
    """The coordinator's certificate in PEM, a host it is good for, and its key where workers must show both."""

    certificate: Path
    name: str
    key: Path | None


def tls_of(settings: Mapping[str, str]) -> Tls | None:
    """How the coordinator is known, None where it speaks without TLS."""
    if not (certificate := settings.get(environment.COORDINATOR_CERTIFICATE)):
        return None
    key = settings.get(environment.COORDINATOR_KEY)
    return Tls(Path(certificate), settings[environment.COORDINATOR_NAME], Path(key) if key else None)


class CoordinatorLine:
    """An open channel and the stub on it."""

    def __init__(self, address: str, tls: Tls | None) -> None:
        self._address = address
        self._tls = tls
        self._open()

    def _open(self) -> None:
        import grpc

        from protos import coordinator_pb2_grpc

        if self._tls is None:
            self._channel = grpc.insecure_channel(self._address)
        else:
            credentials = grpc.ssl_channel_credentials(*_read(self._tls))
            options = [("grpc.ssl_target_name_override", self._tls.name)]
            self._channel = grpc.secure_channel(self._address, credentials, options=options)
        self.stub: Any = coordinator_pb2_grpc.CoordinatorServiceStub(self._channel)  # type: ignore[no-untyped-call]

    def renew(self) -> None:
        """After a failed call: the coordinator's certificate may be another one now."""
        if self._tls is not None:
            self.close()
            self._open()

    def close(self) -> None:
        self._channel.close()


def _read(tls: Tls) -> tuple[bytes | None, bytes | None, bytes | None]:
    """Whom to trust, and the key and certificate to show."""
    try:
        certificate = tls.certificate.read_bytes()
        key = tls.key.read_bytes() if tls.key else None
    except OSError as error:  # it is being replaced, perhaps: whom this machine trusts is all there is to go by
        print(f"{error.filename}: the coordinator's certificate cannot be read: {error.strerror}", file=sys.stderr)
        return None, None, None
    return certificate, key, certificate if key else None
