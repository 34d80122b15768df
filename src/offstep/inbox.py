"""The writer's ear: takes the trainer's messages in as they come, so that the trainer never waits for room in the pipe.

A writer that is busy with one checkpoint for long may be told of hundreds of others. Of those only what is still true
is kept: a slot holds one snapshot at a time, so the newest save of a slot stands for all that it was offered with, and
of the snapshots that are only kept in memory the newest is enough.
"""

from __future__ import annotations

import os
import threading
import traceback
from collections import deque

from offstep.records import NO_SLOT
from offstep.wire import Channel, Message

Attached = dict[str, tuple[int, int]]
"""Files to put into a checkpoint: descriptor and bytes, by name."""


class Inbox:
    """Reads a channel to its end, in a thread of its own; one other thread takes the messages out.

    A message `"save"` or `"keep"` has what was attached to its job under `"attached"`.

    Attributes:
        kept: The newest message `"keep"` of each plan, which the trainer has not taken back; complete once `next` has
            returned `None`.
    """

    def __init__(self, channel: Channel) -> None:
        self.kept: dict[int, Message] = {}
        self._channel = channel
        self._messages: deque[Message] = deque()  # guarded by _changed, as all that follows
        self._attached: dict[int, Attached] = {}  # by job
        self._has_ended = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._listen, name="offstep-inbox", daemon=True)
        self._thread.start()

    def next(self) -> Message | None:
        """Waits for a message, and returns it; `None` when the trainer has gone, and all it said was returned."""
        with self._changed:
            while not self._messages and not self._has_ended:
                self._changed.wait()
            return self._messages.popleft() if self._messages else None

    def close(self) -> None:
        """Frees what nobody will ask for, once `next` has returned `None`."""
        self._thread.join()
        for attached in (*self._attached.values(), *(message["attached"] for message in self.kept.values())):
            drop(attached)

    def _listen(self) -> None:
        try:
            while (message := self._channel.receive()) is not None and message["do"] != "close":
                with self._changed:
                    self._take_in(message)
                    self._changed.notify()
        except EOFError:
            pass
        except Exception:  # noqa: BLE001  what cannot be understood ends the conversation, as a lost trainer does
            traceback.print_exc()
        with self._changed:
            self._has_ended = True
            self._changed.notify()

    def _take_in(self, message: Message) -> None:
        match message["do"]:
            case "attach":
                attached = self._attached.setdefault(message["job"], {})
                attached[message["name"]] = message["fd"], message["bytes"]
            case "keep":
                self._forget(message["plan"])
                self.kept[message["plan"]] = self._with_attached(message)
            case "forget":
                self._forget(message["plan"])
            case "save":
                self._supersede(message["job"]["slot"])
                self._messages.append(self._with_attached(message))
            case _:
                self._messages.append(message)

    def _with_attached(self, message: Message) -> Message:
        return message | {"attached": self._attached.pop(message["job"]["number"], {})}

    def _supersede(self, slot: int) -> None:
        """Drops a save that waits here, and that the trainer must have taken back: its slot holds another snapshot."""
        if slot == NO_SLOT:
            return
        for message in self._messages:
            if message["do"] == "save" and message["job"]["slot"] == slot:
                drop(message["attached"])
                self._messages.remove(message)
                return

    def _forget(self, plan: int) -> None:
        earlier = self.kept.pop(plan, None)
        if earlier is not None:
            drop(earlier["attached"])


def drop(attached: Attached) -> None:
    """Closes what was attached to a job that is not written."""
    for descriptor, _ in attached.values():
        os.close(descriptor)
