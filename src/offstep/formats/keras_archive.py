"""A `.keras` file as stock Keras reads it: a ZIP archive, uncompressed, with the weights file as one member.

file = metadata.json  config.json  model.weights.h5  assets/*  directory      a local header before each
model.weights.h5 = metadata  slot                                             the slot starts on a multiple of 4096
"""

from __future__ import annotations

import json
import mmap
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from offstep import commit
from offstep.formats.keras_weights import make_plan_skeleton, round_to_pages
from offstep.formats.stored_zip import Member, Moment, encode_directory, encode_header
from offstep.records import Job, Plan

METADATA_NAME, CONFIG_NAME, WEIGHTS_NAME, ASSETS_NAME = "metadata.json", "config.json", "model.weights.h5", "assets"
_DATE_FORMAT = "%Y-%m-%d@%H:%M:%S"  # stock's; as long for every date
_IO_THREADS = 2
# Below the 4 GiB where it is needed: the metadata come on top, and their length depends on this.
_ZIP64_FROM_BYTES = 3 << 30


@dataclass(frozen=True)
class PreparedArchive:
    """What is the same in every archive of one plan.

    Attributes:
        metadata: What Keras says of itself, without the date.
        config: The model's JSON.
        weights_head: The weights file up to the slot; with the headers and members before it, it is whole pages.
        weights_crc: CRC-32 of `weights_head`.
        body_bytes: How much of the slot belongs to the file.
        assets: Contents by name.
    """

    metadata: dict[str, Any]  # JSON
    config: bytes
    weights_head: bytes
    weights_crc: int
    body_bytes: int
    assets: dict[str, bytes]


def prepare(plan: Plan, documents: dict[str, Any] | None) -> PreparedArchive:  # JSON
    """Makes all that does not change from save to save.

    `documents` holds `groups` as for a weights file, `config` and `metadata` as Keras writes them, and `assets` as
    hexadecimal text by name.
    """
    assert documents is not None, "an archive has a config"
    skeleton, body_bytes = make_plan_skeleton(plan, documents["groups"])
    metadata, config = documents["metadata"], documents["config"].encode()
    # A draft shows how long what comes before is; neither sizes, checksums nor dates change that.
    draft, _ = _encode_front(metadata, config, Member(WEIGHTS_NAME, 0, 0, 0, _is_zip64(body_bytes)), datetime.now())
    before = len(draft)
    data_at = round_to_pages(before + len(skeleton.image)) - before
    head = skeleton.encode(data_at=data_at, data_bytes=body_bytes)
    assets = {name: bytes.fromhex(text) for name, text in documents["assets"].items()}
    return PreparedArchive(metadata, config, head, zlib.crc32(head), body_bytes, assets)


def write(job: Job, prepared: PreparedArchive, slot: mmap.mmap) -> int:
    """Writes one snapshot and commits it in place of an older file; returns its size in bytes.

    Raises:
        OSError: it is not durable; an older file is untouched.
    """
    target = Path(job.target)
    commit.make_root(target.parent)
    head, tail = _encode_frame(prepared, 0)  # as long as with the checksum
    size_bytes = len(head) + prepared.body_bytes + len(tail)
    with commit.StagedFile(target, size_bytes=size_bytes, tag=job.tag) as staged, memoryview(slot) as view:
        body = view[: prepared.body_bytes]
        with ThreadPoolExecutor(1, "offstep-crc32") as pool:  # it takes half as long as the disk
            checksum = _start_checksum(pool, body, prepared.weights_crc)
            staged.write(body, len(head), io_threads=_IO_THREADS)
            head, tail = _encode_frame(prepared, checksum())
        staged.write(head, 0)
        staged.write(tail, size_bytes - len(tail))
        staged.commit()
    return size_bytes


def _start_checksum(pool: ThreadPoolExecutor, body: memoryview, crc: int) -> Callable[[], int]:
    try:
        return pool.submit(zlib.crc32, body, crc).result
    except RuntimeError:  # a thread that writes while the interpreter ends can start no others
        return lambda: zlib.crc32(body, crc)


def _encode_frame(prepared: PreparedArchive, weights_crc: int) -> tuple[bytes, bytes]:
    """Returns what comes before and after the slot."""
    now = datetime.now()
    is_zip64 = _is_zip64(prepared.body_bytes)
    weights = Member(WEIGHTS_NAME, len(prepared.weights_head) + prepared.body_bytes, weights_crc, 0, is_zip64)
    front, members = _encode_front(prepared.metadata, prepared.config, weights, now)
    head = front + prepared.weights_head
    tail = bytearray()
    start = len(head) + prepared.body_bytes
    for name, content in prepared.assets.items():
        members.append(_append(tail, f"{ASSETS_NAME}/{name}", content, _moment(now), start))
    return head, bytes(tail) + encode_directory(members, _moment(now), start + len(tail))


def _encode_front(
    metadata: dict[str, Any], config: bytes, weights: Member, now: datetime
) -> tuple[bytes, list[Member]]:
    """Returns the members before the weights file, with its header at the end."""
    front = bytearray()
    dated = json.dumps(metadata | {"date_saved": now.strftime(_DATE_FORMAT)}).encode()
    members = [
        _append(front, METADATA_NAME, dated, _moment(now), 0),
        _append(front, CONFIG_NAME, config, _moment(now), 0),
    ]
    weights = replace(weights, offset=len(front))
    front += encode_header(weights, _moment(now))
    return bytes(front), [*members, weights]


def _is_zip64(body_bytes: int) -> bool:
    return body_bytes >= _ZIP64_FROM_BYTES


def _append(archive: bytearray, name: str, content: bytes, moment: Moment, start: int) -> Member:
    """Adds a member to a piece of the archive that starts at `start`."""
    member = Member(name, len(content), zlib.crc32(content), start + len(archive))
    archive += encode_header(member, moment) + content
    return member


def _moment(now: datetime) -> Moment:
    return now.year, now.month, now.day, now.hour, now.minute, now.second
