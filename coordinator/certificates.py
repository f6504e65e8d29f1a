"""The coordinator's certificate and key, and who must vouch for clients: files, read again when they change.

Rules: what is used was whole and fitted together when it was read; a change that does not is told once in the log, and
the last good pair stays. A certificate must name a host (subjectAltName), since clients check that name.
"""

from __future__ import annotations

import logging
import os
import ssl
import threading
from pathlib import Path
from typing import NamedTuple

import grpc

log = logging.getLogger("paceline.certificates")


class CertificateUnusable(Exception):
    """The files cannot be used; the message names which, why and what to do."""


class TlsFiles(NamedTuple):
    """PEM files. client_ca: clients must show a certificate that one of these vouches for."""

    certificate: Path
    key: Path
    client_ca: Path | None = None


class _Loaded(NamedTuple):
    certificate: bytes
    key: bytes
    client_ca: bytes | None
    name: str  # a host the certificate is good for


class Certificates:
    """The pair in use. Any thread may ask; a look at the files costs a stat of each."""

    def __init__(self, files: TlsFiles) -> None:
        self.files = files
        self._lock = threading.Lock()
        self._stamp = _stamp(files)
        self._loaded = _load(files)
        self.http_context = server_context(files)
        self._told = ""  # what was last said of files that cannot be used

    @property
    def name(self) -> str:
        """A host name, or address, that the certificate is good for: workers on this machine check it by that."""
        with self._lock:
            return self._loaded.name

    def refresh(self) -> bool:
        """Read the files again if they have changed; whether there is a new pair."""
        with self._lock:
            try:
                stamp = _stamp(self.files)
                if stamp == self._stamp:
                    return False
                self._stamp = stamp
                loaded = _load(self.files)
                if _stamp(self.files) != stamp:  # they change right now: looked at again with the next connection
                    self._stamp = ()
                    return False
                self.http_context = server_context(self.files)
            except CertificateUnusable as fault:
                if str(fault) != self._told:
                    log.error("%s; the certificate read before stays in use", fault)
                self._told = str(fault)
                return False
            self._told = ""
            changed, self._loaded = loaded != self._loaded, loaded
            if changed:
                log.info("the certificate in %s was read anew", self.files.certificate)
            return changed

    def grpc_credentials(self) -> grpc.ServerCredentials:
        """For a gRPC server: every handshake takes the newest pair."""

        given = self._loaded

        def configuration(pair: _Loaded) -> grpc.ServerCertificateConfiguration:
            return grpc.ssl_server_certificate_configuration([(pair.key, pair.certificate)], pair.client_ca)

        def newest() -> grpc.ServerCertificateConfiguration | None:
            nonlocal given
            self.refresh()
            if self._loaded is given:
                return None
            given = self._loaded
            return configuration(given)

        return grpc.dynamic_ssl_server_credentials(
            configuration(given),
            newest,  # type: ignore[arg-type]  # None says that nothing is new
            self.files.client_ca is not None,
        )


def server_context(files: TlsFiles) -> ssl.SSLContext:
    """For a server on plain sockets; CertificateUnusable."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    _load_pair(context, files)
    if files.client_ca is not None:
        _load_ca(context, "--tls-client-ca", files.client_ca)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _load(files: TlsFiles) -> _Loaded:
    server = server_context(files)
    # A client that trusts this very certificate and nothing else, as the workers do.
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.verify_flags |= ssl.VerifyFlags.VERIFY_X509_PARTIAL_CHAIN
    client.load_verify_locations(files.certificate)
    if files.client_ca is not None:
        _load_pair(client, files)
    try:
        peer = _shake_hands(server, client)
    except ssl.SSLCertVerificationError as fault:
        words = f"{files.certificate}: cannot be used: {fault.verify_message}"
        if files.client_ca is not None:
            words += f"; with --tls-client-ca the job's workers show it too, so {files.client_ca} must vouch for it"
        raise CertificateUnusable(words) from fault
    except ssl.SSLError as fault:
        raise CertificateUnusable(f"{files.certificate}: cannot be used: {fault.reason or fault}") from fault
    names = [value for kind, value in peer.get("subjectAltName", ()) if kind in ("DNS", "IP Address")]
    if not names:
        raise CertificateUnusable(
            f"{files.certificate}: names no host for clients to check: make one with a subjectAltName"
        )
    try:
        client_ca = files.client_ca.read_bytes() if files.client_ca else None
        return _Loaded(files.certificate.read_bytes(), files.key.read_bytes(), client_ca, names[0].replace("*", "any"))
    except OSError as fault:
        raise CertificateUnusable(f"{fault.filename}: cannot be read: {fault.strerror}") from fault


def _load_pair(context: ssl.SSLContext, files: TlsFiles) -> None:
    def no_password() -> str:
        raise CertificateUnusable(f"--tls-key: {files.key} is encrypted, and nobody is there to ask: decrypt it")

    _check_readable("--tls-certificate", files.certificate)
    _check_readable("--tls-key", files.key)
    try:
        context.load_cert_chain(files.certificate, files.key, no_password)
    except ssl.SSLError as fault:
        pair = f"--tls-certificate {files.certificate} and --tls-key {files.key}"
        why = "are not of one pair" if fault.reason == "KEY_VALUES_MISMATCH" else "are not both PEM files"
        raise CertificateUnusable(
            f"{pair} {why} ({fault.reason or 'no PEM'}): name two that belong together"
        ) from fault


def _load_ca(context: ssl.SSLContext, option: str, path: Path) -> None:
    _check_readable(option, path)
    try:
        context.load_verify_locations(path)
    except ssl.SSLError as fault:
        raise CertificateUnusable(f"{option}: {path} holds no certificate in PEM: name one that does") from fault


def _check_readable(option: str, path: Path) -> None:
    try:
        with open(path, "rb"):
            pass
    except OSError as fault:
        raise CertificateUnusable(f"{option}: {path} cannot be read: {fault.strerror}") from fault


def _shake_hands(server: ssl.SSLContext, client: ssl.SSLContext) -> dict[str, tuple[tuple[str, str], ...]]:
    """The server's certificate as a client sees it, in memory; ssl.SSLError where one does not accept the other's."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [client.wrap_bio(to_client, to_server), server.wrap_bio(to_server, to_client, server_side=True)]
    waiting = list(ends)
    while waiting:
        for end in list(waiting):
            try:
                end.do_handshake()
                waiting.remove(end)
            except ssl.SSLWantReadError:
                continue
    return ends[0].getpeercert() or {}  # type: ignore[return-value]  # a mapping of many shapes


def _stamp(files: TlsFiles) -> tuple[tuple[int, int, int], ...]:
    """What changes when a file does."""
    try:
        found = [os.stat(path) for path in files if path is not None]
    except OSError as fault:
        raise CertificateUnusable(f"{fault.filename}: cannot be read: {fault.strerror}") from fault
    return tuple((status.st_mtime_ns, status.st_size, status.st_ino) for status in found)
