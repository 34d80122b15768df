"""The pipe between trainer and writer: JSON lines over a Unix socket, file descriptors beside them."""

from __future__ import annotations

import array
import json
import os
import select
import socket
import tempfile
from collections import deque
from typing import Any

Message = dict[str, Any]  # JSON

_RECEIVE_BYTES = 1 << 16
_MAX_DESCRIPTORS = 16


class Channel:
    """One end of the pipe. Not thread-safe: its owner holds a lock per direction."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self._text = b""
        self._messages: deque[Message] = deque()
        self._descriptors: deque[int] = deque()

    def send(self, message: Message, descriptor: int | None = None) -> None:
        """Sends one message; a descriptor arrives as a duplicate under the key `"fd"`.

        Raises:
            OSError: the other end is gone.
        """
        if descriptor is not None:
            message = message | {"fd": True}
        line = json.dumps(message).encode() + b"\n"
        if descriptor is None:
            self.socket.sendall(line)
            return
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [descriptor]))
        sent = self.socket.sendmsg([line], [rights])
        if rest := line[sent:]:  # else the other end may have had all it wants: to send it nothing is an error then
            self.socket.sendall(rest)

    def receive(self, timeout_seconds: float | None = None) -> Message | None:
        """Returns the next message, or `None` after the timeout.

        Raises:
            EOFError: the other end is gone and everything it sent has been returned.
        """
        while not self._messages:
            if not self.wait_readable(timeout_seconds):
                return None
            self._read()
        message = self._messages.popleft()
        if message.get("fd"):
            message["fd"] = self._descriptors.popleft()
        return message

    def close(self) -> None:
        """Closes this end, and the descriptors that nobody fetched."""
        self.socket.close()
        while self._descriptors:
            os.close(self._descriptors.popleft())

    def wait_readable(self, timeout_seconds: float | None) -> bool:
        """Returns whether a message, a part of one, or the end came within the time."""
        if self._messages:
            return True
        poll = select.poll()  # not select.select: descriptors may be above 1023
        poll.register(self.socket, select.POLLIN)
        return bool(poll.poll(None if timeout_seconds is None else timeout_seconds * 1000))

    def _read(self) -> None:
        space = socket.CMSG_SPACE(_MAX_DESCRIPTORS * array.array("i").itemsize)
        try:
            data, ancillary, _, _ = self.socket.recvmsg(_RECEIVE_BYTES, space)
        except ConnectionResetError:
            data, ancillary = b"", []
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                received = array.array("i")
                received.frombytes(payload[: len(payload) - len(payload) % received.itemsize])
                self._descriptors.extend(received)
        if not data:
            raise EOFError("the other end of the pipe is closed")
        *lines, self._text = (self._text + data).split(b"\n")
        self._messages.extend(json.loads(line) for line in lines)


def spool(text: bytes) -> int:
    """Returns a descriptor of an anonymous file that holds `text`; to send it never blocks, however long it is."""
    if not hasattr(os, "memfd_create"):
        with tempfile.TemporaryFile() as file:
            file.write(text)
            file.flush()
            return os.dup(file.fileno())
    descriptor = os.memfd_create("offstep-plan", os.MFD_CLOEXEC)
    with open(descriptor, "wb", closefd=False) as file:
        file.write(text)
    return descriptor


def read_json(descriptor: int) -> dict[str, Any]:
    """Returns what is in the file behind a descriptor that came with a message; it stays open."""
    with open(descriptor, "rb", closefd=False) as file:
        file.seek(0)
        data: dict[str, Any] = json.load(file)
    return data
