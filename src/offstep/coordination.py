"""Short messages between the training processes, through the key-value store of JAX's coordination service.

The only module that touches `jax._src.distributed`: JAX has no public way to its client. Nothing here runs on devices.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax

from offstep.errors import CheckpointNotFound

PRIMARY = 0
"""The process that has the lock, writes what all have in common, and commits."""

_NEEDED = ("key_value_set", "blocking_key_value_get", "key_value_try_get", "key_value_delete")
_RESTORE_SECONDS = 300.0
_restores = itertools.count(1)  # all processes restore the same, in the same order
_LATE, _ABSENT = "DEADLINE_EXCEEDED", "NOT_FOUND"

Client = Any  # of JAX's runtime, which carries no types


class ServiceLost(Exception):
    """The coordination service does not answer: its process has ended, or the network is down."""


@dataclass(frozen=True)
class Group:
    """The training processes of one `jax.distributed` job, as one of them sees it. Any thread.

    Attributes:
        index: Number of this process, from 0.
        count: How many there are.
        client: What speaks to the service.
    """

    index: int
    count: int
    client: Client

    def put(self, key: str, text: str) -> None:
        """Stores a text under a new key, for all processes.

        Raises:
            ServiceLost: it is not known to be stored.
        """
        self._call("key_value_set", key, text)

    def get(self, key: str, timeout_seconds: float) -> str | None:
        """Returns the text under a key as soon as somebody has stored it; `None` after the timeout.

        Raises:
            ServiceLost: nobody can tell.
        """
        deadline = time.monotonic() + timeout_seconds
        milliseconds = max(1, round(timeout_seconds * 1000))
        try:
            return str(self.client.blocking_key_value_get(key, milliseconds))
        except RuntimeError as error:
            if _LATE in str(error) or time.monotonic() >= deadline:
                return None
            raise ServiceLost(_first_line(error)) from error

    def peek(self, key: str) -> str | None:
        """Returns the text under a key, if there is one.

        Raises:
            ServiceLost: nobody can tell.
        """
        try:
            return str(self.client.key_value_try_get(key))
        except RuntimeError as error:
            if _ABSENT in str(error):
                return None
            raise ServiceLost(_first_line(error)) from error

    def delete(self, key: str) -> None:
        """Deletes a key, or all keys that begin with it and a slash.

        Raises:
            ServiceLost: it may still be there.
        """
        self._call("key_value_delete", key)

    def _call(self, name: str, *arguments: str) -> None:
        try:
            getattr(self.client, name)(*arguments)
        except RuntimeError as error:
            raise ServiceLost(_first_line(error)) from error


def find_group() -> Group | None:
    """Returns the processes that this one trains with; `None` where it is alone, or JAX has no such store."""
    try:
        from jax._src.distributed import global_state
    except ImportError:
        return None
    client = getattr(global_state, "client", None)
    if client is None or jax.process_count() < 2 or not all(hasattr(client, name) for name in _NEEDED):
        return None
    return Group(jax.process_index(), jax.process_count(), client)


def agree_on_steps(group: Group, steps: Sequence[int]) -> list[int]:
    """Returns the steps that all processes have. Waits for them: all restore at the same time.

    Raises:
        CheckpointNotFound: a process does not say what it has.
    """
    root = f"offstep/restore/{next(_restores)}"
    group.put(f"{root}/{group.index}", json.dumps(list(steps)))
    common = set(steps)
    for process in range(group.count):
        text = group.get(f"{root}/{process}", _RESTORE_SECONDS)
        if text is None:
            raise CheckpointNotFound(f"process {process} has not said within {_RESTORE_SECONDS:g} s which steps it has")
        common &= set(json.loads(text))
    return sorted(common)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
