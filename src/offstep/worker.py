"""The writer's end of the pipe: takes jobs one after another and makes them durable.

`serve` runs in a process of its own (`main`) or, where none can be started, in a thread. It imports neither JAX nor
Keras. When the trainer goes away it finishes what was submitted, then returns.
"""

from __future__ import annotations

import contextlib
import errno
import json
import mmap
import os
import signal
import socket
import sys
import threading
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from offstep import catalog, commit, retention
from offstep.buffers import Slot
from offstep.formats import orbax_directory
from offstep.formats.base_file import BaseFile, Split
from offstep.records import Job, Plan
from offstep.wire import Channel, Message

PROCESS_NICENESS = 5
_IO_THREADS = 2
MANIFEST_NAME = "offstep.json"


@dataclass
class _Holdings:
    """What the trainer has handed over: slots by number, prepared plans by number."""

    slots: dict[int, mmap.mmap] = field(default_factory=dict)
    plans: dict[int, orbax_directory.PreparedDirectory] = field(default_factory=dict)


def serve(channel: Channel, local_slots: dict[int, Slot] | None = None) -> None:
    """Serves one trainer until it says goodbye or goes away.

    Args:
        channel: The writer's end of the pipe.
        local_slots: Slots by number, where trainer and writer share one process.
    """
    holdings = _Holdings()
    while True:
        try:
            message = channel.receive()
        except EOFError:
            break
        if message is None or message["do"] == "close":
            break
        answer = _handle(message, holdings, local_slots)
        if answer is not None:
            _answer(channel, answer)
    channel.close()
    if local_slots is None:
        for buffer in holdings.slots.values():
            buffer.close()


def _answer(channel: Channel, answer: Message) -> None:
    with contextlib.suppress(OSError):  # the trainer is gone; what it submitted is written all the same
        channel.send(answer)


def _handle(message: Message, holdings: _Holdings, local_slots: dict[int, Slot] | None) -> Message | None:
    match message["do"]:
        case "add_slot":
            number = message["slot"]
            if local_slots is None:
                holdings.slots[number] = _map_slot(message["fd"], message["bytes"])
            elif number in local_slots:  # else it has been dropped again
                holdings.slots[number] = local_slots[number].buffer
        case "drop_slot":
            buffer = holdings.slots.pop(message["slot"], None)
            if local_slots is None and buffer is not None:
                buffer.close()
        case "add_plan":
            holdings.plans[message["plan"]] = _prepare(_read_plan(message["fd"]))
        case "drop_plan":
            del holdings.plans[message["plan"]]
        case "save":
            return _save(Job(**message["job"]), holdings)
    return None


def _map_slot(descriptor: int, size_bytes: int) -> mmap.mmap:
    try:
        return mmap.mmap(descriptor, size_bytes)
    finally:
        os.close(descriptor)


def _read_plan(descriptor: int) -> dict[str, Any]:
    with open(descriptor, "rb") as file:  # closes the descriptor
        file.seek(0)
        data: dict[str, Any] = json.load(file)
    return data


def _prepare(data: dict[str, Any]) -> orbax_directory.PreparedDirectory:
    documents = data["documents"]
    if documents is not None:
        assets = {name: bytes.fromhex(text) for name, text in documents["assets"].items()}
        documents = orbax_directory.ModelDocuments(config=documents["config"], assets=assets)
    return orbax_directory.prepare(Plan.from_json(data["plan"]), documents)


def _save(job: Job, holdings: _Holdings) -> Message:
    cpu_start = time.process_time()
    try:
        written_bytes = write_checkpoint(job, holdings.plans[job.plan], holdings.slots[job.slot])
    except Exception as error:  # noqa: BLE001  whatever it is, the trainer must hear of it
        code = error.errno if isinstance(error, OSError) else None
        if code is None:
            traceback.print_exc()  # not the disk's fault, so ours
        return {"job": job.number, "error": f"{type(error).__name__}: {error}", "errno": code}
    answer: Message = {
        "job": job.number,
        "durable_at": time.monotonic(),
        "cpu_seconds": time.process_time() - cpu_start,
        "written_bytes": written_bytes,
    }
    try:
        _retire(job)
    except OSError as error:  # The new checkpoint is durable all the same.
        answer["remark"] = f"older checkpoints of {job.root} could not be deleted: {error}"
    return answer


def write_checkpoint(job: Job, prepared: orbax_directory.PreparedDirectory, slot: mmap.mmap) -> int:
    """Writes one snapshot and commits it; returns the bytes of all files that were written, and not just linked.

    Raises:
        OSError: it is not durable; nothing that was there before is touched.
    """
    target, root = Path(job.target), Path(job.root)
    if not Path(job.base).is_dir():
        raise FileNotFoundError(errno.ENOENT, "the directory to save into has vanished", job.base)
    commit.make_root(root)
    with commit.StagedDirectory(target, tag=job.tag) as staged, memoryview(slot) as view:
        split, linked = _split(staged, job, prepared.base, view)
        files = orbax_directory.data_files(
            prepared, view, step=job.step, target=job.target, now_ns=time.time_ns(), split=split
        )
        sizes = staged.write(files, io_threads=_IO_THREADS)
        del files  # they refer to the slot
        manifest = json.dumps(job.manifest | {"files": sizes | linked}).encode()
        sizes |= staged.write({MANIFEST_NAME: (manifest,)})
        staged.commit()
    if prepared.base is not None and split is not None:
        file = None if split.base is None else commit.identify(target / orbax_directory.base_path(split))
        prepared.base.remember(split, file)
    return sum(sizes.values())


def _split(
    staged: commit.StagedDirectory, job: Job, base: BaseFile | None, slot: memoryview
) -> tuple[Split | None, dict[str, int]]:
    """Spreads the slot over two files, and links the one that is there already: its name and size are returned."""
    if base is None:
        return None, {}
    split = base.split(slot, full_every=job.full_every)
    if not split.is_linked or base.file is None:
        return split, {}
    name = orbax_directory.base_path(split)
    try:
        return split, {name: staged.link(name, base.file)}
    except OSError:  # deleted with its checkpoint, too many links, another file system, or one without links
        return base.split_anew(slot), {}


def _retire(job: Job) -> None:
    if job.keep is None and not job.replace_all:
        return
    root = Path(job.root)
    for step in retention.select_expired(
        catalog.list_steps(root), job.step, keep=job.keep, replace_all=job.replace_all
    ):
        commit.remove_directory(root / str(step))


def main() -> None:
    """Entry of the writer process; its end of the pipe is the descriptor in `sys.argv[1]`."""
    # Ctrl-C and a batch system's SIGTERM reach the whole job: the trainer decides, the writer finishes its work.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    os.nice(PROCESS_NICENESS)
    threading.main_thread().name = "offstep-writer"
    serve(Channel(socket.socket(fileno=int(sys.argv[1]))))


if __name__ == "__main__":
    main()
