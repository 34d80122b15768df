"""Small file systems of our own that can be broken: images on loop devices whose power can be cut, and tmpfs.

All need root. Whatever happens in the block, nothing stays mounted or attached when it ends; no other mount is touched.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import signal
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from processes import has_ended

# EXT4_IOC_SHUTDOWN and XFS_IOC_GOINGDOWN are one number, and so is the flag for "as if the power went":
# what is not in the journal on the disk by now is lost.
_SHUTDOWN = 0x8004587D
_WITHOUT_LOG_FLUSH = 2
_PATIENCE_SECONDS = 30.0
_PAGE_BYTES = 4096
_GREED_SECONDS = 0.001

# The journal is committed by fsyncs only, not by a timer, so that a cut does not show the luck of the moment.
_MOUNT_OPTIONS = {"ext4": "noatime,commit=900", "xfs": "noatime"}
_MAKE = {"ext4": ["mkfs.ext4", "-q", "-F"], "xfs": ["mkfs.xfs", "-q", "-f"]}
_LEAST_MEGABYTES = {"ext4": 8, "xfs": 320}


def why_not_here(kind: str) -> str | None:
    """Returns why such a file system cannot be made here. `kind` is ext4, xfs or tmpfs."""
    if os.geteuid() != 0:
        return "needs root"
    if kind == "tmpfs":
        return None
    if not Path("/dev/loop-control").exists():
        return "no loop devices"
    if shutil.which(_MAKE[kind][0]) is None:
        return f"no {_MAKE[kind][0]}"
    known = Path("/proc/filesystems").read_text().split()
    return None if kind in known else f"the kernel has no {kind}"


@dataclass
class Disk:
    """A mounted file system.

    Attributes:
        kind: ext4, xfs or tmpfs.
        path: Where it is mounted.
        device: Its loop device; empty for tmpfs.
    """

    kind: str
    path: Path
    device: str = ""

    def cut_power(self) -> None:
        """Loses, now, everything that is not on the disk; all further calls on it fail until `power_on`."""
        descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.ioctl(descriptor, _SHUTDOWN, struct.pack("I", _WITHOUT_LOG_FLUSH))
        finally:
            os.close(descriptor)

    def power_on(self) -> None:
        """Mounts it anew, as after a boot: processes that had it open have ended, the journal is replayed."""
        end_users(self.path)
        _unmount(self.path)
        _mount(self)

    def sync_something_else(self) -> None:
        """Fsyncs a file that has nothing to do with any checkpoint; that commits the journal."""
        with (self.path / "unrelated").open("w") as file:
            file.write("of another program")
            file.flush()
            os.fsync(file.fileno())

    @contextlib.contextmanager
    def hung(self) -> Iterator[None]:
        """In the block every call that changes the file system hangs."""
        subprocess.run(["fsfreeze", "--freeze", self.path], check=True)
        try:
            yield
        finally:
            subprocess.run(["fsfreeze", "--unfreeze", self.path], check=True)

    @contextlib.contextmanager
    def full(self) -> Iterator[None]:
        """In the block there is no space: another program takes whatever somebody lets go of."""
        ballast = self.path / "ballast"
        enough = threading.Event()
        with ballast.open("wb", buffering=0) as file:
            fill(file)
            greedy = threading.Thread(target=_keep_full, args=(file, enough))
            greedy.start()
            try:
                yield
            finally:
                enough.set()
                greedy.join()
                ballast.unlink()

    @contextlib.contextmanager
    def without_inodes(self, *, spare: int = 0) -> Iterator[None]:
        """In the block only `spare` more files or directories can be made."""
        ballast = self.path / "ballast-of-inodes"
        ballast.mkdir()
        try:
            take_inodes(ballast, spare)
            yield
        finally:
            shutil.rmtree(ballast)


def fill(file: FileIO) -> None:
    """Appends to a file until the file system is full."""
    for size_bytes in (1 << 20, _PAGE_BYTES):
        with contextlib.suppress(OSError):
            while True:
                file.write(bytes(size_bytes))
        os.fsync(file.fileno())


def _keep_full(file: FileIO, enough: threading.Event) -> None:
    while not enough.wait(_GREED_SECONDS):
        with contextlib.suppress(OSError):
            while file.write(bytes(_PAGE_BYTES)):
                pass


def take_inodes(ballast: Path, spare: int) -> None:
    """Makes empty files until no more can be made, then takes `spare` of them away."""
    made = []
    while True:
        path = ballast / str(len(made))
        try:
            path.touch(exist_ok=False)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            break
        made.append(path)
    for path in made[len(made) - spare :] if spare else []:
        path.unlink()


@contextlib.contextmanager
def mounted(kind: str, workplace: Path, *, megabytes: int = 64, inodes: int | None = None) -> Iterator[Disk]:
    """A new file system, mounted below `workplace` while the block lasts.

    Args:
        kind: ext4, xfs or tmpfs.
        workplace: Existing directory.
        megabytes: Its size; more where the kind needs more.
        inodes: How many files and directories it can hold; not with xfs.
    """
    path = workplace / f"{kind}-disk"
    path.mkdir()
    disk = Disk(kind, path)
    image = workplace / f"{kind}.img"
    try:
        if kind == "tmpfs":
            limit = "" if inodes is None else f",nr_inodes={inodes}"
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m{limit}", "offstep", path], check=True)
        else:
            _make_image(disk, image, max(megabytes, _LEAST_MEGABYTES[kind]), inodes)
            _mount(disk)
        yield disk
    finally:
        end_users(path)
        if os.path.ismount(path):
            _unmount(path)
        if disk.device:
            subprocess.run(["losetup", "--detach", disk.device], check=True)
        image.unlink(missing_ok=True)
        path.rmdir()


def _make_image(disk: Disk, image: Path, megabytes: int, inodes: int | None) -> None:
    with image.open("wb") as file:
        file.truncate(megabytes << 20)
    options = [] if inodes is None else ["-N", str(inodes)]
    # No blocks for root only: root is who fills it.
    options += ["-m", "0"] if disk.kind == "ext4" else []
    subprocess.run([*_MAKE[disk.kind], *options, image], check=True, capture_output=True)
    found = subprocess.run(["losetup", "--find", "--show", image], check=True, capture_output=True, text=True)
    disk.device = found.stdout.strip()


def _mount(disk: Disk) -> None:
    options = _MOUNT_OPTIONS[disk.kind]
    subprocess.run(["mount", "-t", disk.kind, "-o", options, disk.device, disk.path], check=True)


def _unmount(path: Path) -> None:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        done = subprocess.run(["umount", path], capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return
        if time.monotonic() > deadline:
            subprocess.run(["umount", "--lazy", path], check=True)
            raise OSError(errno.EBUSY, f"was only unmounted lazily: {done.stderr.strip()}", str(path))
        time.sleep(0.05)  # a process that was killed lets go of its files a moment later
        end_users(path)


def sweep(directory: Path) -> None:
    """Unmounts and detaches what runs that were killed have left in `directory`, which is ours alone."""
    for line in Path("/proc/mounts").read_text().splitlines():
        path = Path(line.split()[1])
        if _is_left_over(path, directory):
            end_users(path)
            subprocess.run(["umount", "--lazy", path], check=True)
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        image = Path(backing.read_text().strip().removesuffix(" (deleted)"))
        if _is_left_over(image, directory):
            subprocess.run(["losetup", "--detach", f"/dev/{backing.parts[3]}"], check=True)


def _is_left_over(path: Path, directory: Path) -> bool:
    if directory.resolve() not in path.parents:
        return False
    owner = path.relative_to(directory.resolve()).parts[0].rpartition("-")[2]
    return owner.isdecimal() and not Path("/proc", owner).exists()


def end_users(path: Path) -> None:
    """Kills the processes that have something open below `path`, which is ours alone."""
    for pid in find_users(path):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        has_ended(pid, _PATIENCE_SECONDS)


def find_users(path: Path) -> list[int]:
    """Returns the other processes that have a descriptor, or their working directory, at or below `path`."""
    root, users = str(path), []
    for process in Path("/proc").iterdir():
        if not process.name.isdecimal() or int(process.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            links = [process / "cwd", *(process / "fd").iterdir()]
            if any(_is_below(link, root) for link in links):
                users.append(int(process.name))
    return users


def _is_below(link: Path, root: str) -> bool:
    try:
        target = os.readlink(link)
    except OSError:
        return False
    return target == root or target.startswith(root + "/")
