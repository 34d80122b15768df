"""The writers of this process: one that is a process, one that is a thread; each lives while somebody uses it."""

from __future__ import annotations

import os
import threading

from offstep.writer import Writer

_shared = {in_process: Writer(in_process=in_process) for in_process in (False, True)}
_users = {False: 0, True: 0}  # guarded by _users_lock
_users_lock = threading.RLock()


def borrow_shared(*, in_process: bool = False) -> Writer:
    """Returns this process's writer, which may not have been started; give it back with `return_shared`."""
    with _users_lock:
        _users[in_process] += 1
    return _shared[in_process]


def return_shared(*, in_process: bool = False) -> None:
    """Ends the writer once its last user has given it back and its work is done."""
    with _users_lock:
        _users[in_process] -= 1
        if _users[in_process] == 0:
            _shared[in_process].close()


def _forget_after_fork() -> None:
    global _users_lock  # noqa: PLW0603  the parent's may be held by a thread that this process does not have
    _users_lock = threading.RLock()
    for in_process, shared in _shared.items():
        shared.forget_after_fork()
        _users[in_process] = 0


os.register_at_fork(after_in_child=_forget_after_fork)
