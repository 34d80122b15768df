"""An HTTP proxy in front of a store that fails as told: what it forwards is forwarded as it is, signatures hold."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import socketserver
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import urlsplit

Matcher = Callable[[str, str], bool]  # of method and path

STATUSES = {"500": "InternalError", "503": "SlowDown", "429": "TooManyRequests", "403": "AccessDenied"}
UNIMPLEMENTED = "501"
SECONDS_PER_SLOW_BLOCK = 0.02
_SLOW_BLOCK_BYTES = 64 << 10


@dataclass
class _Fault:
    kind: str
    matches: Matcher
    left: float


@dataclass
class Proxy:
    """A running proxy.

    Attributes:
        endpoint: Where it listens.
        seen: Method, path and what became of each request, in the order of their ends.
    """

    endpoint: str
    seen: list[tuple[str, str, str]] = field(default_factory=list)
    _faults: list[_Fault] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _ended: threading.Event = field(default_factory=threading.Event)

    def fail(self, kind: str, matches: Matcher = lambda method, path: True, times: float = float("inf")) -> None:
        """Makes the next requests fail: as a status of `STATUSES`, or by `"reset"`, `"lost"` (done, but not
        acknowledged), `"black_hole"` (neither done nor answered), `"slow"`, `"gone"` (no such bucket)."""
        with self._lock:
            self._faults.append(_Fault(kind, matches, times))

    def heal(self) -> None:
        """Lets everything pass again; what is in a black hole stays there."""
        with self._lock:
            self._faults.clear()

    def choose(self, method: str, path: str) -> str | None:
        with self._lock:
            for fault in self._faults:
                if fault.left > 0 and fault.matches(method, path):
                    fault.left -= 1
                    return fault.kind
        return None

    def note(self, method: str, path: str, outcome: str) -> None:
        with self._lock:
            self.seen.append((method, path, outcome))

    def wait_for_end(self) -> None:
        self._ended.wait()

    def end(self) -> None:
        self._ended.set()


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    allow_reuse_address = True
    proxy: Proxy
    upstream: str

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that give up are what is tested."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  the name that it has
        """Says nothing."""

    def handle_one_request(self) -> None:
        self.raw_requestline = self.rfile.readline(65537)
        if not self.raw_requestline or not self.parse_request():
            self.close_connection = True
            return
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        kind = self.server.proxy.choose(self.command, self.path)
        try:
            self._answer(kind, body)
        finally:
            self.server.proxy.note(self.command, self.path, kind or "passed")

    def _answer(self, kind: str | None, body: bytes) -> None:
        if kind == "black_hole":
            self.server.proxy.wait_for_end()
            self.close_connection = True
        elif kind == "reset":
            self._reset()
        elif kind == "gone":
            self._refuse(404, "NoSuchBucket")
        elif kind == UNIMPLEMENTED:
            self._refuse(501, "NotImplemented")
        elif kind in STATUSES:
            self._refuse(int(kind), STATUSES[kind])
        else:
            status, headers, content = self._forward(body)
            if kind == "lost":
                self._reset()
            else:
                if kind == "slow":
                    time.sleep(SECONDS_PER_SLOW_BLOCK * (1 + len(body) / _SLOW_BLOCK_BYTES))
                self._send(status, headers, content)

    def _forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        upstream = urlsplit(self.server.upstream)
        with contextlib.closing(http.client.HTTPConnection(str(upstream.hostname), upstream.port or 80)) as connection:
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                connection.putheader(name, value)
            connection.endheaders(body)
            with connection.getresponse() as response:
                content = response.read()
                return response.status, response.getheaders(), content

    def _send(self, status: int, headers: list[tuple[str, str]], content: bytes) -> None:
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                self.send_header(name, value)
        length = next((value for name, value in headers if name.lower() == "content-length"), str(len(content)))
        self.send_header("Content-Length", length if self.command == "HEAD" else str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _refuse(self, status: int, code: str) -> None:
        if "storage/v1/" in self.path:  # Google's
            text = json.dumps({"error": {"code": status, "message": "as told"}})
            self._send(status, [("Content-Type", "application/json")], text.encode())
            return
        text = f"<Error><Code>{code}</Code><Message>as told</Message><AWSAccessKeyId>KEY</AWSAccessKeyId></Error>"
        self._send(status, [("Content-Type", "application/xml")], text.encode())

    def _reset(self) -> None:
        # With no time to linger, closing sends RST rather than FIN.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True
        raise ConnectionResetError


@contextlib.contextmanager
def stand_before(upstream: str) -> Iterator[Proxy]:
    """Runs a proxy in front of a server, given and giving an endpoint."""
    with _Server(("127.0.0.1", 0), _Handler) as server:
        proxy = Proxy(f"http://127.0.0.1:{server.server_address[1]}")
        server.proxy, server.upstream = proxy, upstream
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, name="proxy")
        thread.start()
        try:
            yield proxy
        finally:
            proxy.end()
            server.shutdown()
            thread.join()
