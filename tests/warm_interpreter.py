"""A Python that has imported JAX, Keras and Orbax, and is forked where a test wants one that runs a script.

To import them takes most of the time of a short script. A child has all that a fresh interpreter has: its arguments,
streams, environment and `__main__`, counters of names in Keras, random numbers of its own; and it ends as one. No
backend of JAX has been made before the fork, and offstep is not imported.

`interpreters` asks for children through the socket whose descriptor is the argument.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
import types
import warnings
from typing import Any

_MOST_BYTES = 1 << 17
_MODULES = ("h5py", "jax.numpy", "keras", "orbax.checkpoint.experimental.v1", "psutil")


def _receive() -> types.CodeType | None:
    """Returns in each child what it is to run, and `None` in this process once nobody asks any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for whoever asks
    del sys.path[0]
    for module in _MODULES:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # what collections in a child would look at, and thereby copy
    server = socket.socket(fileno=int(sys.argv[1]))
    server.send(b"ready")
    while True:
        message, streams, _, _ = socket.recv_fds(server, _MOST_BYTES, 3)
        if not message:
            return None
        if _fork() == 0:
            between = os.getpid()  # it ends, so that whoever asks becomes the parent
            if child := _fork():
                server.send(str(child).encode())
                os._exit(0)
            server.close()
            _wait_for_end(between)
            return _become(json.loads(message), streams)
        for stream in streams:
            os.close(stream)
        os.wait()
        server.send(b"born")


def _fork() -> int:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*os.fork")  # nothing of JAX runs here yet
        return os.fork()


def _wait_for_end(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        descriptor = os.pidfd_open(pid)
        select.select([descriptor], [], [])
        os.close(descriptor)


def _become(order: dict[str, Any], streams: list[int]) -> types.CodeType:
    """Makes this process what a fresh interpreter with these arguments would be."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdout.reconfigure(line_buffering=os.isatty(1))
    if order["is_session"]:
        os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(order["directory"])
    before = _list_paths()
    os.environ.clear()
    os.environ.update(order["environment"])
    sys.modules["jax"].config.update("jax_platforms", os.environ.get("JAX_PLATFORMS"))
    sys.modules["numpy"].random.seed()
    sys.argv = order["arguments"]
    if sys.argv[0] == "-c":
        name, text, first = "<string>", sys.argv.pop(1), ""
    else:
        name, first = sys.argv[0], os.path.dirname(os.path.abspath(sys.argv[0]))
        with open(name, encoding="utf-8") as file:
            text = file.read()
        globals()["__file__"] = name
    sys.path[:] = [first, *_list_paths(), *(path for path in sys.path if path not in before)]
    importlib.invalidate_caches()
    return compile(text, name, "exec", dont_inherit=True)


def _list_paths() -> list[str]:
    return [os.path.abspath(path) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]


_code = _receive()
if _code is not None:
    # From here on this module is the script's.
    for _name in [name for name in globals() if not name.startswith("__") and name != "_code"]:
        del globals()[_name]
    del _name
    exec(globals().pop("_code"))
