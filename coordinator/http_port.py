"""The coordinator's HTTP port: /metrics for Prometheus, /healthz for whoever restarts programs.

Rules: with a certificate it speaks TLS alone. /metrics is for whom the coordinator knows; /healthz says no more than
whether it is well, to everyone.
"""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from coordinator.certificates import Certificates

REQUEST_SECONDS = 10  # a client that neither sends nor takes is dropped

Health = Callable[[], str | None]  # None when well, else what is wrong
# None, or why not, of a caller of /metrics: the Authorization header, the peer.
Refusal = Callable[[str, str], tuple[HTTPStatus, str] | None]

log = logging.getLogger("paceline.http")


def everyone(_authorization: str, _peer: str) -> None:
    """Where nobody is asked who they are."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    certificates: Certificates | None = None

    def get_request(self) -> tuple[socket.socket, tuple[str, int]]:
        connection, peer = super().get_request()
        if self.certificates is not None:
            self.certificates.refresh()
            context = self.certificates.http_context
            # The handshake comes with the first read, in the connection's own thread and within its time.
            connection = context.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
        return connection, peer

    def handle_error(self, request: object, client_address: object) -> None:
        """One line for what a client did to its connection."""
        log.info("an HTTP call from %s failed", client_address, exc_info=log.isEnabledFor(logging.DEBUG))


class HttpPort:
    """The bound port; answers between start and stop. OSError when it cannot be bound."""

    def __init__(
        self,
        host: str,
        port: int,
        registry: CollectorRegistry,
        health: Health,
        refusal: Refusal = everyone,
        certificates: Certificates | None = None,
    ) -> None:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
        server = type("Server", (_Server,), {"address_family": family, "certificates": certificates})
        self._server: ThreadingHTTPServer = server((host, port), _handler(registry, health, refusal))
        # How soon stop() is seen, in seconds; requests are served at once.
        arguments = {"poll_interval": 0.1}
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs=arguments, name="http", daemon=True)

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        if self._thread.is_alive():
            self._server.shutdown()
        self._server.server_close()


def _handler(registry: CollectorRegistry, health: Health, refusal: Refusal) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = REQUEST_SECONDS
        server_version = "paceline"
        sys_version = ""

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            if path == "/metrics":
                peer = f"{self.client_address[0]}:{self.client_address[1]}"
                if refused := refusal(self.headers.get("Authorization", ""), peer):
                    self._send(refused[0], f"{refused[1]}\n".encode())
                    return
                encode, content_type = choose_encoder(self.headers.get("Accept", ""))
                self._send(HTTPStatus.OK, encode(registry), content_type)
            elif path == "/healthz":
                fault = health()
                status = HTTPStatus.OK if fault is None else HTTPStatus.SERVICE_UNAVAILABLE
                self._send(status, f"{fault or 'ok'}\n".encode())
            else:
                self._send(HTTPStatus.NOT_FOUND, b"here are /metrics and /healthz\n")

        do_HEAD = do_GET

        def _send(self, status: HTTPStatus, body: bytes, content_type: str = "text/plain; charset=utf-8") -> None:
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            if status is HTTPStatus.UNAUTHORIZED:
                self.send_header("WWW-Authenticate", "Bearer")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """A scrape every few seconds is no news."""

    return Handler
