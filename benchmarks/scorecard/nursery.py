"""Brings processes up fast: imports Keras, JAX and Orbax once, and forks whoever is to be born.

A child runs `main` of a module and then falls off the end of this script as a script of its own would: with its exit
handlers, its traceback and its exit status. offstep is not imported here, so that the verifier has it not.

Each message on the socket (the descriptor in `sys.argv[1]`) is JSON with `module` and `arguments`, and brings stdin,
stdout and stderr of the child. `--once JSON` runs one child in this very process, which a tracer can wrap.
"""

from __future__ import annotations

import importlib
import json
import os
import socket
import sys
import warnings

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.append(os.path.join(HERE, "..", "..", "tests"))  # for processes and failing_disk
_MOST_BYTES = 1 << 20


def _import_all() -> None:
    import h5py  # noqa: F401
    import jax  # noqa: F401
    import keras  # noqa: F401
    import numpy  # noqa: F401
    import orbax.checkpoint  # noqa: F401
    from orbax.checkpoint import v1  # noqa: F401


def _wait_for_birth(server: socket.socket) -> str | None:
    """Returns the message in each child, and `None` in this process once nobody asks any more."""
    while True:
        message, descriptors, _, _ = socket.recv_fds(server, _MOST_BYTES, 3)
        if not message:
            return None
        if os.fork() == 0:
            if os.fork():  # so that whoever asked is the parent of what lives on
                os._exit(0)
            for number, descriptor in enumerate(descriptors):
                os.dup2(descriptor, number)
                os.close(descriptor)
            server.close()
            os.setsid()
            return message.decode()
        for descriptor in descriptors:
            os.close(descriptor)
        os.wait()


def _receive() -> str | None:
    if sys.argv[1] == "--once":
        return sys.argv[2]
    _import_all()
    warnings.filterwarnings("ignore", message=".*os.fork")  # nothing of JAX runs here yet
    server = socket.socket(fileno=int(sys.argv[1]))
    server.send(b"ready")
    return _wait_for_birth(server)


_message = _receive()
if _message is not None:
    _order = json.loads(_message)
    os.write(1, f"pid {os.getpid()}\n".encode())
    importlib.import_module(_order["module"]).main(_order["arguments"])
