"""Python processes that run scripts, forked from one that has imported what takes long (`warm_interpreter`)."""

from __future__ import annotations

import atexit
import ctypes
import inspect
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

_START_SECONDS = 120.0
_PR_SET_CHILD_SUBREAPER = 36
_READ_AT_IMPORT = ("JAX_", "KERAS_", "TF_")  # environment variables: what is imported has read them
_FOLLOWED = "JAX_PLATFORMS"  # except for this one


class Interpreter(subprocess.Popen[str]):
    """A child as `subprocess.Popen` starts it, of text, in a tenth of the time.

    Args:
        arguments: What would follow `sys.executable`: a script or `"-c"` with a text, then its arguments.
        options: Of `subprocess.Popen`: streams, `env`, `cwd` and `start_new_session`.
    """

    def __init__(self, arguments: Sequence[str | os.PathLike[str]], **options: Any) -> None:
        super().__init__([os.fspath(argument) for argument in arguments], text=True, **options)

    def _execute_child(self, *received: Any) -> None:  # where Popen starts a process
        given = inspect.signature(subprocess.Popen._execute_child).bind(self, *received).arguments
        pipes = [given[name] for name in ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")]
        environment = dict(os.environ if given["env"] is None else given["env"])
        order = {
            "arguments": given["args"],
            "directory": os.fspath(given["cwd"] or os.getcwd()),
            "environment": environment,
            "is_session": given["start_new_session"],
        }
        _refuse_what_is_read_at_import(environment)
        streams = [number if pipe < 0 else pipe for number, pipe in enumerate((pipes[0], pipes[3], pipes[5]))]
        self.pid = _find_server().bear(order, streams)
        self._child_created = True
        self._close_pipe_fds(*pipes)


def run(arguments: Sequence[str | os.PathLike[str]], **options: Any) -> subprocess.CompletedProcess[str]:
    """Does what `subprocess.run` does with `check=False` and `capture_output=True`."""
    timeout = options.pop("timeout", None)
    with Interpreter(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options) as child:
        try:
            out, err = child.communicate(timeout=timeout)
        except BaseException:
            child.kill()
            raise
    return subprocess.CompletedProcess(child.args, child.returncode, out, err)


def list_servants() -> list[int]:
    """Returns the process that is forked, if there is one: it is not what a test has left behind."""
    return [_find_server().pid] if _find_server.cache_info().currsize else []


def _refuse_what_is_read_at_import(environment: Mapping[str, str]) -> None:
    for name in {*environment, *os.environ}:
        if name.startswith(_READ_AT_IMPORT) and name != _FOLLOWED:
            assert environment.get(name) == os.environ.get(name), f"{name} is read at import: start a Python of its own"


class _Server:
    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        script = Path(__file__).with_name("warm_interpreter.py")
        command = [sys.executable, str(script), str(theirs.fileno())]
        self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        self.pid = self._process.pid
        theirs.close()
        self._socket.settimeout(_START_SECONDS)
        assert self._socket.recv(16) == b"ready", "it has not come up"
        atexit.register(self._end)

    def bear(self, order: dict[str, Any], streams: list[int]) -> int:
        """Returns the number of a new child of this process."""
        with _adopting():
            socket.send_fds(self._socket, [json.dumps(order).encode()], streams)
            pid = int(self._socket.recv(16))
            assert self._socket.recv(16) == b"born"
        return pid

    def _end(self) -> None:
        self._socket.close()
        self._process.wait()


_find_server = cache(_Server)


@contextmanager
def _adopting() -> Iterator[None]:
    """In the block whoever loses its parent becomes a child of this process."""
    prctl = ctypes.CDLL(None).prctl
    prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
