"""A store of messages in the place of JAX's coordination service, for threads that stand for processes."""

from __future__ import annotations

import threading


class Messages:
    """Takes the calls that `coordination.Group` makes, and fails as JAX's client does."""

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}  # guarded by self._changed
        self._changed = threading.Condition()
        self.is_lost = False  # whether it answers no more

    def key_value_set(self, key: str, text: str) -> None:
        with self._changed:
            if self.is_lost:
                raise RuntimeError(f"UNAVAILABLE: {key}")
            if key in self.texts:
                raise RuntimeError(f"ALREADY_EXISTS: {key}")
            self.texts[key] = text
            self._changed.notify_all()

    def blocking_key_value_get(self, key: str, milliseconds: int) -> str:
        with self._changed:
            if self.is_lost:
                raise RuntimeError(f"UNAVAILABLE: {key}")
            if not self._changed.wait_for(lambda: key in self.texts, milliseconds / 1000):
                raise RuntimeError(f"DEADLINE_EXCEEDED: {key}")
            return self.texts[key]

    def key_value_try_get(self, key: str) -> str:
        with self._changed:
            if key not in self.texts:
                raise RuntimeError(f"NOT_FOUND: {key}")
            return self.texts[key]

    def key_value_delete(self, key: str) -> None:
        with self._changed:
            for name in [name for name in self.texts if name == key or name.startswith(f"{key}/")]:
                del self.texts[name]
