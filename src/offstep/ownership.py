"""Who writes to a target: one run at a time, by a lock that lasts until the last process of the run is done with it.

The lock is `flock` on a small hidden file beside the checkpoints, which stock readers ignore. It belongs to the open
file, and the writer process has a duplicate of it: a trainer that is killed leaves it to its writer. The file goes
away with the lock; one that was left by a power cut is not locked, and in nobody's way.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import threading
import time
import warnings
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from offstep import commit
from offstep._native import crc32c
from offstep.errors import TargetInUse

LOCK_NAME = ".offstep-lock"

_TAKEN_OVER = "taken_over_by"  # a key in the file of a run whose place another one has taken
_PATIENCE_SECONDS = 60.0
_POLL_SECONDS = 0.05
_MOST_OWNER_BYTES = 4096
_OPEN_FLAGS = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
_CANNOT_LOCK = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


@dataclass(frozen=True)
class Policy:
    """What one user of a directory of steps does there to the steps of all its users.

    Attributes:
        holds_one_step: Whether each save replaces everything else in it.
        max_to_keep: How many of the newest stay.
        ranking: Which stay beside those; `None` where all do.
        weights_only: Whether its checkpoints are without optimizer.
        resumes: Whether its checkpoints hold what a training goes on with.
    """

    holds_one_step: bool = False
    max_to_keep: int | None = None
    ranking: Hashable = None
    weights_only: bool = False
    resumes: bool = False


@dataclass(eq=False)
class Lock:
    """A target that this process has for itself; several users in it may share it.

    Attributes:
        path: The lock file.
        descriptor: It, opened; whoever holds a duplicate holds the lock.
        is_parents: Whether it is the lock of the process that this one was forked from, which it saves beside.
        is_new: Whether no other user of this process had it before: then nobody else is writing there.
        policies: Of those users of this process that had one, each once.
    """

    path: Path
    descriptor: int
    is_new: bool = True
    is_parents: bool = False
    users: int = 1
    policies: list[Policy] = field(default_factory=list)


_Identity = tuple[int, int, bytes]  # device, inode, signature: inodes are used again

_held: dict[Path, Lock] = {}  # guarded by _guard
_inherited: dict[Path, _Identity] = {}  # what the process had that this one was forked from
_guard = threading.Lock()


def lock_path(folder: Path, name: str = "") -> Path:
    """Returns the lock file of a target.

    Args:
        folder: Existing directory that holds the target; two ways to write it are one.
        name: Template of what comes below the folder; empty for a directory of steps.
    """
    suffix = f"-{crc32c(name.encode()):08x}" if name else ""
    return folder.resolve() / f"{LOCK_NAME}{suffix}"


def acquire(path: Path, *, takeover: bool = False, policy: Policy | None = None) -> Lock:
    """Takes the lock at `path` (from `lock_path`) for this process, or counts one more user where it has it.

    Where the run that has it was killed, waits up to a minute for its writer to finish. Any thread.

    Args:
        path: The lock file.
        takeover: Take it from a live run, whose saves fail from then on.
        policy: What the user does there; a warning says where two of this process differ.

    Raises:
        TargetInUse: a live run has it.
        ValueError: another user of this process keeps many steps where this one keeps one, or the reverse.
        OSError: the lock file cannot be made.
    """
    with _guard:
        policies = [] if policy is None else [policy]
        held = _held.get(path)
        if held is not None:
            _agree(held, policies)
            held.users += 1
            held.is_new = False
            return held
        inherited = None if takeover else _open_inherited(path)
        if inherited is not None:
            _held[path] = Lock(path, inherited, is_new=False, is_parents=True, policies=policies)
            return _held[path]
        descriptor, is_new = _open_locked(path, takeover=takeover)
        _held[path] = Lock(path, descriptor, is_new, policies=policies)
        return _held[path]


def _agree(held: Lock, policies: list[Policy]) -> None:
    """Refuses a user of a directory who would delete all of another, and warns where two differ; once."""
    for policy in policies:
        if policy in held.policies:
            return
        folder = held.path.parent
        if any(policy.holds_one_step != other.holds_one_step for other in held.policies):
            raise ValueError(
                f"a path that ends in '{{step}}' and one that holds a single step cannot share a directory: each save "
                f"to the latter deletes all other steps. Received: {folder} for both"
            )
        held.policies.append(policy)
        if len(held.policies) == 2:
            warnings.warn(
                f"{folder} is shared by two that differ in max_to_keep, in what stays beside that, or in what a "
                "checkpoint holds: the stricter retention deletes the steps of the other too, and of a step that both "
                "save the later one stays. Give each a directory of its own.",
                UserWarning,
                stacklevel=4,
            )


def release(lock: Lock) -> None:
    """Gives a lock back; it goes with its last user. All saves to the target are done."""
    with _guard:
        lock.users -= 1
        if lock.users > 0 or _held.get(lock.path) is not lock:
            return
        del _held[lock.path]
        if lock.is_parents:
            os.close(lock.descriptor)
        else:
            give_up(lock.path, lock.descriptor)


def give_up(path: Path, descriptor: int) -> None:
    """Deletes the lock file, if it still is the one that is open, and closes it."""
    with suppress(OSError):  # a directory that was deleted, or became read-only, needs no lock
        if is_current(path, descriptor):
            commit.delete(path)
    os.close(descriptor)


def is_alone(folder: Path, but: Path | None = None) -> bool:
    """Returns whether nobody has a lock in `folder`, except the one at `but`; our own other locks count too.

    Where that cannot be known (the lock file is another user's, or there are no locks), somebody may.
    """
    return all(path == but or _is_free(path) for path in folder.glob(f"{LOCK_NAME}*"))


def _is_free(path: Path) -> bool:
    try:
        descriptor = os.open(path, _OPEN_FLAGS & ~os.O_CREAT)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    try:
        return bool(_flock(descriptor))
    finally:
        os.close(descriptor)


def refuse_in_use(folder: Path) -> None:
    """Raises `TargetInUse` if a live run has a lock in `folder`, or may have one: see `is_alone`."""
    for path in sorted(folder.glob(f"{LOCK_NAME}*")):
        if not _is_free(path):
            raise TargetInUse(errno.EBUSY, f"a live run saves to {folder} ({_describe_owner(path)})")


def is_taken_over(path: Path, descriptor: int) -> bool:
    """Returns whether another run has put a lock file of its own in the place of the open one, or did and has ended.

    A file that is gone with its directory, or was deleted by hand, was not taken over.
    """
    if os.path.lexists(path):
        return not is_current(path, descriptor)
    return _TAKEN_OVER in _read_owner(descriptor)


def owns(path: Path, folder: Path) -> bool:
    """Returns whether the lock at `path` is that of the directory of steps `folder` itself."""
    return path.name == LOCK_NAME and path == lock_path(folder)


def is_current(path: Path, descriptor: int) -> bool:
    """Returns whether the open lock file is the one that others find: not after a takeover."""
    try:
        return os.path.samestat(os.lstat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _open_locked(path: Path, *, takeover: bool) -> tuple[int, bool]:
    """Returns the locked file, and whether nobody alive had it, as far as there are locks."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    was_free = True
    while True:
        descriptor = os.open(path, _OPEN_FLAGS, 0o666)
        with _closed_on_error(descriptor):
            is_locked = _try_lock(path, descriptor)
            if is_locked is not False:
                if is_current(path, descriptor):
                    _sign(descriptor)
                    return descriptor, was_free and bool(is_locked)
            elif takeover:
                was_free = False
                _write(descriptor, _read_owner(descriptor) | {_TAKEN_OVER: os.getpid()})
                commit.delete(path)
            else:
                owner = _read_owner(descriptor)
                if not _is_finishing(owner) or time.monotonic() > deadline:
                    raise TargetInUse(errno.EBUSY, _describe(path, owner))
                time.sleep(_POLL_SECONDS)
        os.close(descriptor)


@contextmanager
def _closed_on_error(descriptor: int) -> Iterator[None]:
    try:
        yield
    except BaseException:
        os.close(descriptor)
        raise


def _try_lock(path: Path, descriptor: int) -> bool | None:
    """Returns whether the lock is ours now; `None`, with a warning, where there are none."""
    is_locked = _flock(descriptor)
    if is_locked is None:
        text = f"{path.parent}: this file system has no locks; a second run in it would not be noticed"
        warnings.warn(text, RuntimeWarning, stacklevel=2)
    return is_locked


def _flock(descriptor: int) -> bool | None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _CANNOT_LOCK:
            raise
        return None
    return True


def _sign(descriptor: int) -> None:
    owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    _write(descriptor, owner)


def _write(descriptor: int, owner: Mapping[str, object]) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(owner).encode(), 0)


def _read_owner(descriptor: int) -> dict[str, object]:
    try:
        owner = json.loads(os.pread(descriptor, _MOST_OWNER_BYTES, 0))
    except ValueError:  # it has the lock, and has not signed yet
        return {}
    return owner if isinstance(owner, dict) else {}


def _is_finishing(owner: dict[str, object]) -> bool:
    """Returns whether the trainer has died on this host: then the lock is left with its writer."""
    pid = owner.get("pid")
    if owner.get("host") != socket.gethostname() or not isinstance(pid, int) or pid < 1:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return _is_zombie(pid)


def _is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] in (b"Z", b"X")
    except (OSError, IndexError):
        return False


def _spell(owner: dict[str, object]) -> str:
    return f"process {owner.get('pid', '?')} on {owner.get('host', '?')}, since {owner.get('since', '?')}"


def _describe_owner(path: Path) -> str:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        return f"{path.name}: {error.strerror}"
    try:
        return _spell(_read_owner(descriptor))
    finally:
        os.close(descriptor)


def _describe(path: Path, owner: dict[str, object]) -> str:
    return (
        f"another run saves to {path.parent} ({_spell(owner)}). Let it end, choose another path, or pass "
        "takeover=True, which makes its later saves fail"
    )


def _identify(descriptor: int) -> _Identity:
    found = os.fstat(descriptor)
    return found.st_dev, found.st_ino, os.pread(descriptor, _MOST_OWNER_BYTES, 0)


def _open_inherited(path: Path) -> int | None:
    """Opens the lock file if it still is the one of the process that this one was forked from."""
    if path not in _inherited:
        return None
    try:
        descriptor = os.open(path, _OPEN_FLAGS & ~os.O_CREAT)
    except FileNotFoundError:
        return None
    with _closed_on_error(descriptor):
        if _identify(descriptor) == _inherited[path]:
            return descriptor
    os.close(descriptor)
    return None


def _forget_after_fork() -> None:
    global _guard  # noqa: PLW0603  the parent's may be held by a thread that this process does not have
    _guard = threading.Lock()
    for path, held in _held.items():
        with suppress(OSError):
            _inherited[path] = _identify(held.descriptor)
        os.close(held.descriptor)  # else the lock would last as long as the child
    _held.clear()


os.register_at_fork(after_in_child=_forget_after_fork)
