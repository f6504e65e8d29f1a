"""The coordinator's HTTP port: /metrics for Prometheus, /healthz for whoever restarts programs."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

REQUEST_SECONDS = 10  # a client that neither sends nor takes is dropped

Health = Callable[[], str | None]  # None when well, else what is wrong


class HttpPort:
    """The bound port; answers between start and stop. OSError when it cannot be bound."""

    def __init__(self, host: str, port: int, registry: CollectorRegistry, health: Health) -> None:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
        server = type("Server", (ThreadingHTTPServer,), {"address_family": family, "daemon_threads": True})
        self._server: ThreadingHTTPServer = server((host, port), _handler(registry, health))
        self._thread = threading.Thread(target=self._server.serve_forever, name="http", daemon=True)

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        if self._thread.is_alive():
            self._server.shutdown()
        self._server.server_close()


def _handler(registry: CollectorRegistry, health: Health) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = REQUEST_SECONDS
        server_version = "paceline"
        sys_version = ""

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            if path == "/metrics":
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
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """A scrape every few seconds is no news."""

    return Handler
