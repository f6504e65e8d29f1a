"""An S3 store of one bucket on the loopback: HEAD and ranged GET of objects, no signature is checked."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

BUCKET = "bucket"
LAST_MODIFIED = "Mon, 01 Jan 2024 00:00:00 GMT"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    folder: Path
    requests: list[str]

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        self.requests.append(f"{self.command} {self.path}")
        path, _, query = self.path.partition("?")
        file = self.folder / path.removeprefix(f"/{BUCKET}/")
        if "list-type" in query:
            self._send(200, b"<ListBucketResult><KeyCount>0</KeyCount><IsTruncated>false</IsTruncated>"
                            b"</ListBucketResult>", {"Content-Type": "application/xml"}, with_body)  # fmt: skip
            return
        if not file.is_file():
            code = b"<Error><Code>NoSuchKey</Code><Message>no such key</Message></Error>"
            self._send(404, code, {"Content-Type": "application/xml"}, with_body)
            return
        content = file.read_bytes()
        headers = {"ETag": f'"{hashlib.md5(content).hexdigest()}"', "Last-Modified": LAST_MODIFIED}
        wanted = self.headers.get("Range")
        if wanted is None:
            self._send(200, content, headers, with_body)
            return
        first, last = wanted.removeprefix("bytes=").split("-")
        stop = min(int(last) + 1, len(content)) if last else len(content)
        headers["Content-Range"] = f"bytes {first}-{stop - 1}/{len(content)}"
        self._send(206, content[int(first) : stop], headers, with_body)

    def _send(self, code: int, body: bytes, headers: dict[str, str], with_body: bool) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Tests read `requests`."""


@contextmanager
def served(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """(endpoint URL, requests so far) of a store whose objects are the files of a folder."""
    requests: list[str] = []
    handler = type("BoundHandler", (Handler,), {"folder": folder, "requests": requests})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=5)
