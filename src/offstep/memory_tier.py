"""The memory tier: what a writer still holds when its trainer has died, handed to the run that goes on.

The writer of a trainer that was killed has made its newest snapshot durable, and keeps it in memory for a while. It
listens at a name that follows from the directory; whoever goes on there, as the same user, gets the descriptors of the
shared memory, restores from that, and tells the writer to end. Nothing here is needed for a restart: it is only faster
than the disk. The name is in Linux's abstract namespace, so that no file is left, on whatever file system the directory
is.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import struct
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offstep.errors import CheckpointDamaged
from offstep.inbox import Attached
from offstep.records import Job, Plan
from offstep.wire import Channel, Message, read_json

_PEER = struct.Struct("=iII")  # pid, uid, gid
_ANSWER_SECONDS = 10.0
_BIND_SECONDS = 5.0
_POLL_SECONDS = 0.02


@dataclass(frozen=True)
class Survivor:
    """A snapshot whose trainer has died.

    Attributes:
        job: Fields of `records.Job`.
        plan: Descriptor of the text of its plan.
        slot: Descriptor of its slot.
        attached: The files that belong to it.
        is_durable: Whether it was written after all.
        linger_seconds: How long to wait for the run that goes on; 0 where a newer one is on the disk.
    """

    job: dict[str, Any]  # JSON
    plan: int
    slot: int
    attached: Attached
    is_durable: bool
    linger_seconds: float


class Listener:
    """Waits in the writer process for the run that goes on. From its construction on, nobody is turned away."""

    def __init__(self, survivors: Sequence[Survivor]) -> None:
        self._served = [
            (survivor, server)
            for survivor in survivors
            if survivor.linger_seconds > 0
            if (server := _listen(survivor.job["root"])) is not None
        ]

    def wait(self) -> None:
        """Hands each snapshot over; returns when all were taken, or their time is up."""
        started = time.monotonic()
        for survivor, server in self._served:
            with server:
                _wait_for_heir(survivor, server, started + survivor.linger_seconds)


def _address(root: str | Path) -> str:
    """Returns the name for a directory of steps; two ways to write it are one."""
    digest = hashlib.sha256(os.fsencode(os.path.realpath(root))).hexdigest()
    return f"\0offstep-memory-{os.getuid()}-{digest[:32]}"


def _listen(root: str) -> socket.socket | None:
    """Takes the name; from another writer that waits there, which is older. `None` where it cannot be had."""
    deadline = time.monotonic() + _BIND_SECONDS
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    while True:
        try:
            server.bind(_address(root))
            server.listen()
        except OSError:
            if time.monotonic() > deadline:
                server.close()
                return None
            dismiss(root)
            time.sleep(_POLL_SECONDS)
        else:
            return server


def _wait_for_heir(survivor: Survivor, server: socket.socket, deadline: float) -> None:
    while (remaining := deadline - time.monotonic()) > 0:
        server.settimeout(remaining)
        try:
            connection, _ = server.accept()
        except TimeoutError:
            return
        with connection:
            if _peer(connection)[1] == os.getuid() and _hand_over(survivor, Channel(connection), deadline):
                return


def _hand_over(survivor: Survivor, channel: Channel, deadline: float) -> bool:
    """Returns whether the snapshot is not wanted any more."""
    try:
        channel.send({"do": "plan"}, survivor.plan)
        for name, (descriptor, size_bytes) in survivor.attached.items():
            channel.send({"do": "attach", "name": name, "bytes": size_bytes}, descriptor)
        note = {"do": "snapshot", "job": survivor.job, "is_durable": survivor.is_durable}
        channel.send(note, survivor.slot)
        answer = channel.receive(max(0.0, deadline - time.monotonic()))
    except (EOFError, OSError, ValueError):  # it has died, too
        return False
    return answer is None or answer.get("do") == "end"


@dataclass(frozen=True)
class Inheritance:
    """A snapshot in the memory of a dead run's writer, which ends once this is closed.

    Attributes:
        job: What the writer was told of it.
        plan: How it is laid out.
        slot: Descriptor of the slot.
        attached: Descriptors of the files that belong to it, by name.
        is_wanted: Whether nobody has deleted the checkpoint, or all of them, to begin anew.
        writer: Process id of the writer.
    """

    job: Job
    plan: Plan
    slot: int
    attached: Mapping[str, int]
    is_wanted: bool
    writer: int
    channel: Channel

    def attached_file(self, name: str) -> Path:
        """Returns a path under which a file that belongs to it can be read until it is closed."""
        if name not in self.attached:
            raise CheckpointDamaged(f"the snapshot in memory has no {name}")
        return Path(f"/proc/self/fd/{self.attached[name]}")

    def close(self) -> None:
        """Gives everything back, and tells the writer that nobody needs it any longer."""
        with contextlib.suppress(OSError):  # it has ended by itself
            self.channel.send({"do": "end"})
        for descriptor in (self.slot, *self.attached.values()):
            os.close(descriptor)
        self.channel.close()


def inherit(root: Path) -> Inheritance | None:
    """Asks the writer of a dead run for its snapshot; `None` where there is none.

    Raises:
        CheckpointDamaged: what it offers is not whole.
    """
    channel = _connect(root)
    if channel is None:
        return None
    held: list[int] = []
    try:
        return _receive(root, channel, held)
    except (EOFError, OSError, ValueError, KeyError, TypeError) as error:
        for descriptor in held:
            os.close(descriptor)
        channel.close()
        if isinstance(error, (EOFError, TimeoutError)):
            return None
        raise CheckpointDamaged(f"the snapshot in memory for {root} cannot be read: {error}") from error


def dismiss(root: str | Path) -> None:
    """Tells the writer of a dead run that nobody will ask for its snapshot; any thread."""
    channel = _connect(root)
    if channel is None:
        return
    try:
        while _next(channel)["do"] != "snapshot":
            pass
        channel.send({"do": "end"})
    except (EOFError, OSError, ValueError):
        pass
    channel.close()


def _connect(root: str | Path) -> Channel | None:
    if not hasattr(socket, "SO_PEERCRED"):
        return None
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(_ANSWER_SECONDS)
    try:
        connection.connect(_address(root))
        if _peer(connection)[1] == os.getuid():  # else somebody else has taken the name
            return Channel(connection)
    except OSError:
        pass
    connection.close()
    return None


def _receive(root: Path, channel: Channel, held: list[int]) -> Inheritance:
    plan, attached = None, {}
    while True:
        message = _next(channel)
        held.append(message["fd"])
        match message["do"]:
            case "plan":
                plan = Plan.from_json(read_json(message["fd"])["plan"])
                os.close(held.pop())
            case "attach":
                attached[message["name"]] = message["fd"]
            case "snapshot":
                break
    job = Job(**message["job"])
    if plan is None or os.path.realpath(job.root) != os.path.realpath(root):
        raise ValueError("it is of another directory")
    if os.fstat(message["fd"]).st_size < plan.slot_bytes:
        raise ValueError(f"its memory has not the {plan.slot_bytes} bytes of the plan")
    is_wanted = Path(job.target if message["is_durable"] else job.root).is_dir()
    return Inheritance(job, plan, message["fd"], attached, is_wanted, _peer(channel.socket)[0], channel)


def _next(channel: Channel) -> Message:
    message = channel.receive(_ANSWER_SECONDS)
    if message is None:
        raise TimeoutError("the writer does not answer")
    return message


def _peer(connection: socket.socket) -> tuple[int, int, int]:
    """Returns process, user and group of the other end."""
    found: tuple[int, int, int] = _PEER.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
    return found
