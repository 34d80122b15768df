"""The writer's end of the pipe: takes jobs one after another and makes them durable.

`serve` runs in a process of its own (`main`) or, where none can be started, in a thread. It imports neither JAX nor
Keras. When the trainer goes away it finishes what was submitted, then returns.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import signal
import socket
import sys
import threading
import time
import traceback
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from offstep import catalog, commit, memory_tier, ownership, recovery, retention
from offstep.buffers import Claim, Slot
from offstep.errors import TargetInUse
from offstep.formats import FORMATS, file_manifest, orbax_share_objects
from offstep.inbox import Attached, Inbox, drop
from offstep.manifest import Manifest
from offstep.records import NO_SLOT, Job, Plan, Share
from offstep.retention import Kept, Ranking
from offstep.retry import retry
from offstep.stores.address import Address, is_address, to_place
from offstep.stores.client import Unanswered
from offstep.stores.path import Readable, StorePath, open_place
from offstep.uploading import Uploader
from offstep.wire import Channel, Message, read_json

PROCESS_NICENESS = 5
_NOTHING = mmap.mmap(-1, mmap.PAGESIZE)  # in the place of a slot


@dataclass
class _Holdings:
    """What the trainer has handed over: slots by number, with their claims, plans by number; and the roots seen so far.

    In place of a plan that could not be prepared there is the error, for the jobs that need it.
    """

    slots: dict[int, mmap.mmap] = field(default_factory=dict)
    claims: dict[int, Claim] = field(default_factory=dict)
    plans: dict[int, Any] = field(default_factory=dict)  # whatever the format's `prepare` returned
    plan_texts: dict[int, int] = field(default_factory=dict)  # descriptors
    slot_files: dict[int, int] = field(default_factory=dict)  # descriptors
    locks: dict[int, tuple[Path, int]] = field(default_factory=dict)
    roots: set[str] = field(default_factory=set)
    census: catalog.Census = field(default_factory=catalog.Census)
    uploader: Uploader | None = None


def serve(channel: Channel, local_slots: dict[int, Slot] | None = None) -> None:
    """Serves one trainer until it says goodbye or goes away.

    Args:
        channel: The writer's end of the pipe.
        local_slots: Slots by number, where trainer and writer share one process.
    """
    stored = catalog.Census()  # of the thread that uploads
    telling = threading.Lock()

    def tell(message: Message) -> None:
        with telling:
            _answer(channel, message)

    holdings = _Holdings()
    uploader = holdings.uploader = Uploader(lambda job, attached: _upload(job, holdings, attached, stored), tell)
    inbox = Inbox(channel)
    while (message := inbox.next()) is not None:
        answer = _handle(message, holdings, local_slots)
        if answer is not None:
            tell(answer)
    kept = inbox.kept.values() if local_slots is None else ()  # a thread dies with the trainer
    survivors = [_rescue(message, holdings) for message in kept]
    uploader.finish()  # only now: what is being copied is durable already, and a store may take its time
    channel.close()
    heirs = memory_tier.Listener(survivors) if survivors else None
    for path, descriptor in holdings.locks.values():  # the trainer was killed, and left them to us
        ownership.give_up(path, descriptor)
    if heirs is not None:
        _let_go_of_streams()
        heirs.wait()
    inbox.close()
    _free(holdings, is_shared=local_slots is None)


def _let_go_of_streams() -> None:
    """Whoever reads what the trainer printed shall see the end of it now."""
    with open(os.devnull, "wb") as nothing:
        os.dup2(nothing.fileno(), sys.stderr.fileno())


def _free(holdings: _Holdings, *, is_shared: bool) -> None:
    for descriptor in (*holdings.plan_texts.values(), *holdings.slot_files.values()):
        os.close(descriptor)
    if is_shared:
        for buffer in holdings.slots.values():
            buffer.close()
        for claim in holdings.claims.values():
            claim.close()


def _rescue(message: Message, holdings: _Holdings) -> memory_tier.Survivor:
    """Makes a snapshot durable that was only kept in memory, now that its trainer has died."""
    job = Job(**message["job"])
    saved = [written for written in holdings.census.look(Path(job.root)) if written.run == job.manifest["run"]]
    is_newest = all(written.step < job.step for written in saved)
    answer = _save(job, holdings, message["attached"], holdings.census) if is_newest else {}
    return memory_tier.Survivor(
        message["job"],
        holdings.plan_texts[job.plan],
        holdings.slot_files[job.slot],
        message["attached"],
        "durable_at" in answer,
        message["linger_seconds"] if is_newest else 0.0,
    )


def _answer(channel: Channel, answer: Message) -> None:
    with contextlib.suppress(OSError):  # the trainer is gone; what it submitted is written all the same
        channel.send(answer)


def _handle(message: Message, holdings: _Holdings, local_slots: dict[int, Slot] | None) -> Message | None:
    match message["do"]:
        case "add_slot" | "drop_slot":
            _keep_slot(message, holdings, local_slots)
        case "add_lock":
            holdings.locks[message["lock"]] = Path(message["path"]), message["fd"]
        case "drop_lock":
            os.close(holdings.locks.pop(message["lock"])[1])
        case "add_plan":
            holdings.plans[message["plan"]] = _prepare(read_json(message["fd"]))
            holdings.plan_texts[message["plan"]] = message["fd"]
        case "drop_plan":
            del holdings.plans[message["plan"]]
            os.close(holdings.plan_texts.pop(message["plan"]))
        case "save":
            job = Job(**message["job"])
            if job.source and holdings.uploader is not None:
                holdings.uploader.add(job, message["attached"])
                return None
            claim = holdings.claims.get(job.slot)
            try:
                # Else the trainer has taken it back.
                if job.slot == NO_SLOT or (claim is not None and claim.take(job.number)):
                    return _save(job, holdings, message["attached"], holdings.census)
            finally:
                drop(message["attached"])
    return None


def _keep_slot(message: Message, holdings: _Holdings, local_slots: dict[int, Slot] | None) -> None:
    number = message["slot"]
    if message["do"] == "add_slot":
        if local_slots is None:
            descriptor, size_bytes = message["fd"], message["bytes"]
            holdings.slot_files[number] = descriptor
            holdings.slots[number] = mmap.mmap(descriptor, size_bytes)
            holdings.claims[number] = Claim(descriptor, size_bytes)
        elif slot := local_slots.get(number):  # else it has been dropped again
            holdings.slots[number], holdings.claims[number] = slot.buffer, slot.claim
    else:
        buffer, claim = holdings.slots.pop(number, None), holdings.claims.pop(number, None)
        if local_slots is None and buffer is not None and claim is not None:
            buffer.close()
            claim.close()
            os.close(holdings.slot_files.pop(number))


def _prepare(data: dict[str, Any]) -> Any:
    try:
        return FORMATS[data["format"]].prepare(Plan.from_json(data["plan"]), data["documents"])
    except Exception as error:  # noqa: BLE001  raised by each job that needs it, where the trainer hears of it
        return error


def _save(job: Job, holdings: _Holdings, attached: Attached, census: catalog.Census) -> Message:
    with ExitStack() as maps:
        files = {name: maps.enter_context(mmap.mmap(fd, size_bytes)) for name, (fd, size_bytes) in attached.items()}
        return _make_durable(job, holdings, files, census)


def _make_durable(
    job: Job, holdings: _Holdings, attachments: Mapping[str, mmap.mmap], census: catalog.Census
) -> Message:
    cpu_start, started = time.process_time(), time.monotonic()
    remarks: list[str] = []
    try:
        _check_lock(job, holdings)
        remarks += _look_after(job, holdings)
        plan, slot = holdings.plans[job.plan], _NOTHING if job.slot == NO_SLOT else holdings.slots[job.slot]
        written, remark = retry(lambda: _write(job, plan, slot, attachments), job.retry_seconds)
    except Exception as error:  # noqa: BLE001  whatever it is, the trainer must hear of it
        return _describe_failure(job, error)
    if remark is not None:
        remarks.append(f"step {job.step} is durable, but {remark}")
    durable_at = time.monotonic()
    share = written if isinstance(written, Share) else Share(written)
    retired: list[str] = []
    answer: Message = {
        "job": job.number,
        "durable_at": durable_at,
        "cpu_seconds": time.process_time() - cpu_start,
        "write_seconds": durable_at - started,
        "written_bytes": share.written_bytes,
        "note": share.note,
        "remarks": remarks,
        "retired": retired,
    }
    try:
        busy = frozenset(job.busy) | (holdings.uploader.sources if holdings.uploader is not None else frozenset())
        retired.extend(map(str, _retire(job, census, busy)))  # what went before an error is in it too
    except OSError as error:  # The new checkpoint is durable all the same.
        remarks.append(f"older checkpoints of {job.root} could not be deleted: {error}")
    return answer | {"retire_seconds": time.monotonic() - durable_at}


def _describe_failure(job: Job, error: Exception) -> Message:
    code = error.errno if isinstance(error, OSError) else None
    if code is None:
        traceback.print_exc()  # not the disk's fault, so ours
    text = "; ".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", ())])
    return {"job": job.number, "error": text, "errno": code, "is_unsure": isinstance(error, Unanswered)}


def _upload(job: Job, holdings: _Holdings, attached: Attached, census: catalog.Census) -> Message:
    """Copies a durable step into a store, on the uploader's thread, or does its part where several processes do so."""
    if job.format == "upload":
        return _copy(job, census)
    try:
        return _save(job, holdings, attached, census)
    finally:
        drop(attached)


def _copy(job: Job, census: catalog.Census) -> Message:
    """Copies a durable step as a whole; one whose save failed is not there to be copied."""
    try:
        written_bytes = FORMATS[job.format].write(job, None, _NOTHING, {})
    except Exception as error:  # noqa: BLE001  whatever it is, the trainer must hear of it
        is_gone = not Path(job.source).is_dir()
        return {"job": job.number, "withdrawn": True} if is_gone else _describe_failure(job, error)
    answer: Message = {"job": job.number, "durable_at": time.monotonic(), "written_bytes": written_bytes, "remarks": []}
    try:
        answer["retired"] = list(map(str, _retire(job, census)))
    except OSError as error:
        answer["remarks"] = [f"older checkpoints of {job.root} could not be deleted: {error}"]
    return answer


def _check_lock(job: Job, holdings: _Holdings) -> None:
    if job.lock is not None and ownership.is_taken_over(*holdings.locks[job.lock]):
        raise TargetInUse(errno.EBUSY, "another run has taken over, and saves there now", job.target)


def _look_after(job: Job, holdings: _Holdings) -> list[str]:
    """At the first job for a root, recovers what dead runs left there, and says what could not be.

    Of the root that is locked the trainer did so; there only what an earlier writer of this trainer left is put back.
    """
    root = to_place(job.root)
    if job.root in holdings.roots or not (job.format == "orbax_merged" if isinstance(root, Address) else root.is_dir()):
        return []
    holdings.roots.add(job.root)
    try:
        if isinstance(root, Address):
            recovery.sweep_store(root, partial(orbax_share_objects.is_of_run, key=job.key))
        elif ownership.is_alone(root):
            recovery.recover(root)
        elif job.lock is not None and ownership.owns(holdings.locks[job.lock][0], root):
            recovery.put_back_replaced(root)
    except OSError as error:
        return [f"what dead runs left in {root} could not be swept: {error}"]
    return []


def _write(job: Job, prepared: Any, slot: mmap.mmap, attachments: Mapping[str, mmap.mmap]) -> int | Share:
    if isinstance(prepared, Exception):
        raise prepared
    if not is_address(job.base) and not Path(job.base).is_dir():
        raise FileNotFoundError(errno.ENOENT, "the directory to save into has vanished", job.base)
    return FORMATS[job.format].write(job, prepared, slot, attachments)


def _retire(job: Job, census: catalog.Census, busy: frozenset[str] = frozenset()) -> Iterator[Readable]:
    """Removes what may go, and yields each of it once it is gone; what is `busy` may go the next time."""
    if FORMATS[job.format].is_file:
        yield from _retire_files(job)
        return
    if job.keep is None and not job.replace_all:
        return
    root = open_place(job.root)
    fault = catalog.find_fault(root / str(job.step))
    if fault is not None:
        raise OSError(errno.EIO, f"step {job.step} is not what was written ({fault}), so the older ones stay")
    ranking = Ranking(**job.ranking)
    for step in retention.select_expired(
        [_describe(written, ranking.monitor) for written in census.look(root)],
        job.step,
        keep=job.keep,
        replace_all=job.replace_all,
        keep_best=ranking.keep_best,
        keep_every=ranking.keep_every,
        mode=ranking.mode,
    ):
        if str(root / str(step)) in busy:
            continue
        _remove(root / str(step))
        yield root / str(step)
    for attempt in catalog.abandoned(root, job.step):
        if str(attempt) not in busy:
            attempt.remove_own()


def _remove(checkpoint: Readable) -> None:
    if isinstance(checkpoint, StorePath):
        checkpoint.remove()
    elif checkpoint.is_dir():
        commit.remove_directory(checkpoint)
    else:
        commit.remove_file(checkpoint)


def _describe(written: Manifest, monitor: str | None) -> Kept:
    metric = None if monitor is None else written.metrics.get(monitor)
    return Kept(written.step, metric, finite=not written.nonfinite)


def _retire_files(job: Job) -> Iterator[Readable]:
    if job.keep is None:
        return
    written = [path for path in map(open_place, job.siblings) if path.is_file()]  # what failed does not count
    if len(written) < job.keep:
        return
    by_age = [Kept(age, finite=_is_finite(path)) for age, path in enumerate([*written, open_place(job.target)])]
    for age in retention.select_expired(by_age, len(written), keep=job.keep):
        _remove(written[age])
        yield written[age]


def _is_finite(path: Readable) -> bool:
    """Returns whether a file of Keras is not known to hold weights that are NaN or infinite."""
    try:
        written = file_manifest.read(path)
    except (OSError, ValueError, zipfile.BadZipFile):  # damaged, or no longer what was saved
        return True
    return written is None or not written.nonfinite


def main() -> None:
    """Entry of the writer process; its end of the pipe is the descriptor in `sys.argv[1]`."""
    # Ctrl-C and a batch system's SIGTERM reach the whole job: the trainer decides, the writer finishes its work.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    os.nice(PROCESS_NICENESS)
    threading.main_thread().name = "offstep-writer"
    channel = Channel(socket.socket(fileno=int(sys.argv[1])))
    _answer(channel, {"hello": os.getpid()})  # so that the trainer knows that this is a writer
    serve(channel)


if __name__ == "__main__":
    main()
