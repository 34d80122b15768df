"""A file system that passes everything through to a directory, until it is told to fail, to be slow or to be read-only.

    python faulty_mount.py DIRECTORY MOUNT_POINT

Needs FUSE and `mfusepy`. Orders come as lines of JSON on stdin, each answered by a line on stdout; it unmounts at the
end of stdin. What fails does so for every program alike, below whatever library it uses.

    {"fail": "write", "nth": 3, "errno": 5}     the third write from now on fails; "times": how many in a row
    {"read_only": true}                         from now on everything that changes something fails with EROFS
    {"bytes_per_second": 1000000}               all writes together are that slow
    {}                                          only says what has happened so far

Answer: {"counts": {"write": calls since the last order, ...}, "failed": how many of them were made to fail}.
"""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from mfusepy import FUSE, FuseOSError, Operations

# What Linux hands to us as it was given to open(2), and what would not work on the directory below with our buffers.
_DROPPED_FLAGS = os.O_DIRECT | os.O_APPEND | os.O_NOFOLLOW


@dataclass
class Orders:
    """What to do with the calls from now on, and what came of it; fields are guarded by `lock`."""

    fail: str = ""
    nth: int = 0
    times: int = 1
    errno: int = errno.EIO
    read_only: bool = False
    bytes_per_second: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)
    failed: int = 0


class FaultyMount(Operations):  # type: ignore[misc]
    """The calls, relative to `root`."""

    use_ns = True

    def __init__(self, root: str) -> None:
        self._root = os.path.realpath(root)
        self._orders = Orders()
        self._lock = threading.Lock()
        self._free_at = 0.0  # when the slow disk has done what it was given

    def order(self, orders: dict[str, Any]) -> dict[str, Any]:
        """Takes new orders, if there are any, and tells what has happened under those before."""
        with self._lock:
            told = {"counts": dict(self._orders.counts), "failed": self._orders.failed}
            if orders:
                self._orders = Orders(**orders)
            return told

    def _change(self, kind: str) -> None:
        """Counts a call that changes something, and fails where it shall."""
        with self._lock:
            orders = self._orders
            orders.counts[kind] += 1
            if orders.read_only:
                orders.failed += 1
                raise FuseOSError(errno.EROFS)
            if orders.fail == kind and 0 <= orders.counts[kind] - orders.nth < orders.times:
                orders.failed += 1
                raise FuseOSError(orders.errno)

    def _slow_down(self, size_bytes: int) -> None:
        with self._lock:
            speed = self._orders.bytes_per_second
            if not speed:
                return
            self._free_at = max(self._free_at, time.monotonic()) + size_bytes / speed
            until = self._free_at
        time.sleep(max(0.0, until - time.monotonic()))

    def _below(self, path: str) -> str:
        return self._root + path

    # ------------------------------------------------------------------------------------------ what only looks

    def access(self, path: str, amode: int) -> int:
        if not os.access(self._below(path), amode):
            raise FuseOSError(errno.EACCES)
        return 0

    def getattr(self, path: str, fh: int | None = None) -> dict[str, Any]:
        found = os.lstat(self._below(path))
        names = ("st_mode", "st_nlink", "st_uid", "st_gid", "st_size", "st_blocks", "st_ino", "st_dev")
        about = {name: getattr(found, name) for name in names}
        times = {name: getattr(found, f"{name}_ns") for name in ("st_atime", "st_mtime", "st_ctime")}
        return about | times

    def readdir(self, path: str, fh: int) -> list[str]:
        return [".", "..", *os.listdir(self._below(path))]

    def readlink(self, path: str) -> str:
        return os.readlink(self._below(path))

    def statfs(self, path: str) -> dict[str, int]:
        found = os.statvfs(self._below(path))
        names = (
            "f_bavail",
            "f_bfree",
            "f_blocks",
            "f_bsize",
            "f_favail",
            "f_ffree",
            "f_files",
            "f_frsize",
            "f_namemax",
        )
        return {name: getattr(found, name) for name in names}

    def open(self, path: str, flags: int) -> int:
        if flags & os.O_TRUNC:
            self._change("write")
        return os.open(self._below(path), self._readable(flags))

    def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
        return os.pread(fh, size, offset)

    def flush(self, path: str, fh: int) -> int:
        return 0

    def release(self, path: str, fh: int) -> int:
        os.close(fh)
        return 0

    # ------------------------------------------------------------------------------------------ what changes things

    def create(self, path: str, mode: int, fi: Any = None) -> int:
        self._change("create")
        return os.open(self._below(path), os.O_RDWR | os.O_CREAT, mode)

    def mkdir(self, path: str, mode: int) -> int:
        self._change("create")
        os.mkdir(self._below(path), mode)
        return 0

    def symlink(self, target: str, source: str) -> int:
        self._change("create")
        os.symlink(source, self._below(target))
        return 0

    def link(self, target: str, source: str) -> int:
        self._change("create")
        os.link(self._below(source), self._below(target))
        return 0

    def write(self, path: str, data: bytes, offset: int, fh: int) -> int:
        self._change("write")
        self._slow_down(len(data))
        return os.pwrite(fh, data, offset)

    def truncate(self, path: str, length: int, fh: int | None = None) -> int:
        self._change("write")
        os.truncate(self._below(path), length)
        return 0

    def fsync(self, path: str, datasync: int, fh: int) -> int:
        self._change("fsync")
        os.fsync(fh)
        return 0

    def fsyncdir(self, path: str, datasync: int, fh: int) -> int:
        self._change("fsync")
        return 0

    def rename(self, old: str, new: str) -> int:
        self._change("rename")
        os.rename(self._below(old), self._below(new))
        return 0

    def unlink(self, path: str) -> int:
        self._change("delete")
        os.unlink(self._below(path))
        return 0

    def rmdir(self, path: str) -> int:
        self._change("delete")
        os.rmdir(self._below(path))
        return 0

    def chmod(self, path: str, mode: int) -> int:
        self._change("chmod")
        os.chmod(self._below(path), mode)
        return 0

    def chown(self, path: str, uid: int, gid: int) -> int:
        self._change("chmod")
        os.chown(self._below(path), uid, gid, follow_symlinks=False)
        return 0

    def utimens(self, path: str, times: tuple[int, int] | None = None) -> int:
        self._change("chmod")
        os.utime(self._below(path), ns=times)
        return 0

    @staticmethod
    def _readable(flags: int) -> int:
        """Returns flags with which what is open for writing can be read as well: the kernel's page cache does."""
        kept = flags & ~_DROPPED_FLAGS
        return (kept & ~os.O_ACCMODE) | os.O_RDWR if kept & os.O_ACCMODE == os.O_WRONLY else kept


class _Fuse(FUSE):  # type: ignore[misc]
    """Refuses what `mfusepy` would take for a plain rename: exchanging two names. Some file systems cannot either."""

    def rename_fuse_3(self, old: bytes, new: bytes, flags: int) -> int:
        return -errno.EINVAL if flags else super().rename_fuse_3(old, new, flags)


def _obey(mount: FaultyMount, mount_point: str) -> None:
    for line in sys.stdin:
        print(json.dumps(mount.order(json.loads(line))), flush=True)
    subprocess.run(["umount", "--lazy", mount_point], check=False)


def main() -> None:
    """Mounts, and stays until stdin ends."""
    root, mount_point = sys.argv[1:]
    mount = FaultyMount(root)
    threading.Thread(target=_obey, args=(mount, mount_point), daemon=True).start()
    _Fuse(mount, mount_point, foreground=True, fsname="offstep-faulty", hard_remove=True)


if __name__ == "__main__":
    main()
