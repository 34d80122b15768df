"""Short messages between the training processes, through the key-value store of JAX's coordination service.

The only module that touches `jax._src.distributed`: JAX has no public way to its client. Nothing here runs on devices.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax

PRIMARY = 0
"""The process that has the lock, writes what all have in common, and commits."""

_NEEDED = ("key_value_set", "blocking_key_value_get", "key_value_try_get", "key_value_delete")
AGREE_SECONDS = 300.0
"""How long a process waits for the others at the beginning and at the end of a training, and to restore."""

_GRACE = 0.1
_LATE, _ABSENT = "DEADLINE_EXCEEDED", "NOT_FOUND"

Client = Any  # of JAX's runtime, which carries no types
Json = Any


class ServiceLost(Exception):
    """The coordination service does not answer: its process has ended, or the network is down."""


class ProcessMissing(Exception):
    """A process has not said in time what all have to say; the message names it."""


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

    def agree(
        self, key: str, own: Json, decide: Callable[[list[Json]], Json], timeout_seconds: float = AGREE_SECONDS
    ) -> Json:
        """Has the primary decide by what all processes say, and returns its decision: in all of them the same.

        Waits for all, on the caller's thread. It takes two messages of each process but the primary.

        Args:
            key: The same in all processes, and used once.
            own: What this process says.
            decide: What to make of what they say, in their order; the primary's is called.
            timeout_seconds: How long to wait for the others.

        Raises:
            ProcessMissing: one has said nothing in time.
            ServiceLost: nobody can tell.
        """
        if self.index != PRIMARY:
            self.put(f"{key}/{self.index}", json.dumps(own))
            # Longer than the primary, which names who is missing.
            text = self.get(f"{key}/decision", timeout_seconds * (1 + _GRACE))
            answer = {"missing": PRIMARY} if text is None else json.loads(text)
        else:
            answer = self._decide(key, own, decide, timeout_seconds)
            self.put(f"{key}/decision", json.dumps(answer))
        if "missing" in answer:
            text = f"process {answer['missing']} of {self.count} has not come within {timeout_seconds:g} s"
            raise ProcessMissing(text)
        return answer["decided"]

    def _decide(self, key: str, own: Json, decide: Callable[[list[Json]], Json], timeout_seconds: float) -> Json:
        said, deadline = [own], time.monotonic() + timeout_seconds
        for process in range(1, self.count):
            text = self.get(f"{key}/{process}", max(0.0, deadline - time.monotonic()))
            if text is None:
                return {"missing": process}
            said.append(json.loads(text))
        return {"decided": decide(said)}

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


def list_common(said: Sequence[Sequence[Json]]) -> list[Json]:
    """Returns what all say, in the order of the first one."""
    others = [set(each) for each in said[1:]]
    return [entry for entry in said[0] if all(entry in other for other in others)]


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
