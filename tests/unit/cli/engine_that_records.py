"""A Docker engine's address that notes what it is asked for and then refuses: where both clients are told apart."""

from __future__ import annotations

import io
import json
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qs, urlsplit

API = "1.43"


class Asked(NamedTuple):
    """One request that would have changed something."""

    path: str
    query: dict[str, list[str]]
    body: bytes

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.body)

    @property
    def files(self) -> dict[str, bytes]:
        """The files of the tar archive that was sent."""
        with tarfile.open(fileobj=io.BytesIO(self.body)) as archive:
            return {m.name: archive.extractfile(m).read() for m in archive if m.isfile()}


@contextmanager
def recording() -> Iterator[tuple[str, list[Asked]]]:
    """Its DOCKER_HOST, and what it was asked."""
    asked: list[Asked] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            version = {"ApiVersion": API, "MinAPIVersion": "1.24", "Version": "24.0", "Os": "linux", "Arch": "amd64"}
            self._answer(200, b"OK" if self.path.endswith("/_ping") else json.dumps(version).encode())

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_POST(self) -> None:
            parts = urlsplit(self.path)
            asked.append(Asked(parts.path.removeprefix(f"/v{API}"), parse_qs(parts.query), self._body()))
            self._answer(500, b'{"message": "noted"}')

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body

        def _answer(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Api-Version", API)
            self.send_header("Ostype", "linux")
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"tcp://127.0.0.1:{server.server_port}", asked
        finally:
            server.shutdown()
            thread.join()
