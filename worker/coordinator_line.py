"""The channel to the coordinator, with TLS where it speaks that.

Rules: a coordinator is known by its very certificate, as it lies in its file whenever the channel is opened; what
vouches for it, and what its address is, does not matter. Where it asks for a certificate, workers show the same one.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from protos import environment

# Left to itself gRPC looks ever more seldom, in the end every two minutes, whether somebody answers again.
CHANNEL_OPTIONS = (("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 1000))


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
    """The way to the coordinator where it is now."""

    def __init__(self, address: str, address_file: Path | None, tls: Tls | None) -> None:
        self.address = address
        self._address_file = address_file
        self._tls = tls
        self._channel: Any = None  # grpc.Channel

    def stub(self) -> Any:
        """Of the coordinator's service; its calls fail where the coordinator is away."""
        import grpc

        from protos import coordinator_pb2_grpc

        address = self.address
        if self._address_file is not None:
            with contextlib.suppress(OSError):  # the state folder may be away; what was known last is as good
                address = self._address_file.read_text().strip() or address
        if address != self.address:
            self.close()
        if self._channel is None:
            self.address = address
            if self._tls is None:
                self._channel = grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
            else:
                credentials = grpc.ssl_channel_credentials(*_read(self._tls))
                options = (*CHANNEL_OPTIONS, ("grpc.ssl_target_name_override", self._tls.name))
                self._channel = grpc.secure_channel(address, credentials, options=options)
        return coordinator_pb2_grpc.CoordinatorServiceStub(self._channel)  # type: ignore[no-untyped-call]  # generated

    def renew(self) -> None:
        """After a failed call: the coordinator's certificate may be another one now."""
        if self._tls is not None:
            self.close()

    def close(self) -> None:
        if self._channel is not None:
            self._channel.close()
            self._channel = None


def _read(tls: Tls) -> tuple[bytes | None, bytes | None, bytes | None]:
    """Whom to trust, and the key and certificate to show."""
    try:
        certificate = tls.certificate.read_bytes()
        key = tls.key.read_bytes() if tls.key else None
    except OSError as error:  # it is being replaced, perhaps: whom this machine trusts is all there is to go by
        print(f"{error.filename}: the coordinator's certificate cannot be read: {error.strerror}", file=sys.stderr)
        return None, None, None
    return certificate, key, certificate if key else None
