"""A small Google Cloud Storage: the JSON calls that TensorStore makes, with generations and their preconditions."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import socketserver
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

BUCKET = "checkpoints"
PAGE = 50  # names in an answer to a listing

_OBJECT = re.compile(r"/storage/v1/b/(?P<bucket>[^/]+)/o/(?P<name>.+)")
_OBJECTS = re.compile(r"/storage/v1/b/(?P<bucket>[^/]+)/o")
_UPLOAD = re.compile(r"/upload/storage/v1/b/(?P<bucket>[^/]+)/o")


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    allow_reuse_address = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects: dict[str, tuple[int, bytes]] = {}  # by name: generation and content
        self.generations = itertools.count(1)
        self.lock = threading.Lock()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that give up are what is tested."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  the name that it has
        """Says nothing."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        match, query = self._parse(_UPLOAD)
        if match is None:
            return
        name = query["name"][0]
        with self.server.lock:
            if not self._holds(name, query):
                self._send(412, {})
                return
            self.server.objects[name] = next(self.server.generations), body
            generation = self.server.objects[name][0]
        self._send(200, self._describe(name, generation, body))

    def do_DELETE(self) -> None:
        match, query = self._parse(_OBJECT)
        if match is None:
            return
        name = unquote(match["name"])
        with self.server.lock:
            if not self._holds(name, query):
                self._send(412, {})
            elif self.server.objects.pop(name, None) is None:
                self._send(404, {})
            else:
                self._send(204, None)

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        if _OBJECT.fullmatch(path):
            self._get_object()
        else:
            self._list_objects()

    def _get_object(self) -> None:
        match, query = self._parse(_OBJECT)
        if match is None:
            return
        name = unquote(match["name"])
        found = self.server.objects.get(name)
        if found is None:
            self._send(404, {})
            return
        generation, content = found
        if query.get("alt") == ["json"]:
            self._send(200, self._describe(name, generation, content))
            return
        self._send_content(generation, content)

    def _send_content(self, generation: int, content: bytes) -> None:
        wanted = self.headers.get("Range")
        status, extra = 200, {}
        if wanted:
            first, last = wanted.removeprefix("bytes=").split("-")
            start = int(first) if first else max(0, len(content) - int(last))
            stop = min(int(last) + 1, len(content)) if first and last else len(content)
            if start >= len(content):
                self._send(416, {})
                return
            status, extra = 206, {"Content-Range": f"bytes {start}-{stop - 1}/{len(content)}"}
            content = content[start:stop]
        self.send_response(status)
        for key, value in {**extra, "x-goog-generation": str(generation), "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(content)

    def _list_objects(self) -> None:
        match, query = self._parse(_OBJECTS)
        if match is None:
            return
        start = query.get("pageToken", query.get("startOffset", [""]))[0]
        end, prefix = query.get("endOffset", [""])[0], query.get("prefix", [""])[0]
        with self.server.lock:
            names = sorted(name for name in self.server.objects if name >= start and name.startswith(prefix))
            names = [name for name in names if not end or name < end]
            items = [self._describe(name, *self.server.objects[name]) for name in names[:PAGE]]
        more = {"nextPageToken": names[PAGE]} if len(names) > PAGE else {}
        self._send(200, {"kind": "storage#objects", "items": items, **more})

    def _parse(self, pattern: re.Pattern[str]) -> tuple[re.Match[str] | None, dict[str, list[str]]]:
        parts = urlsplit(self.path)
        match = pattern.fullmatch(parts.path)
        if match is None or match["bucket"] != BUCKET:
            self._send(404, {"error": {"code": 404, "message": "The specified bucket does not exist."}})
            return None, {}
        return match, parse_qs(parts.query)

    def _holds(self, name: str, query: dict[str, list[str]]) -> bool:
        """Returns whether a precondition holds; 0 stands for an object that is not there."""
        wanted = query.get("ifGenerationMatch")
        return wanted is None or int(wanted[0]) == self.server.objects.get(name, (0, b""))[0]

    def _describe(self, name: str, generation: int, content: bytes) -> dict[str, str]:
        return {"name": name, "bucket": BUCKET, "generation": str(generation), "size": str(len(content))}

    def _send(self, status: int, document: dict[str, Any] | None) -> None:
        content = b"" if document is None else json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@contextlib.contextmanager
def serve() -> Iterator[str]:
    """Runs the store in threads of this process and yields its address; it has the one bucket `BUCKET`."""
    with _Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, name="fake-gcs")
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()
