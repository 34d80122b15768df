"""A `.keras` file as stock Keras reads it: a ZIP archive, uncompressed, with the weights file as one member.

file = metadata.json  config.json  model.weights.h5  assets/*  directory      a local header before each
model.weights.h5 = metadata  slot                                             the slot starts on a multiple of 4096
"""

from __future__ import annotations

import json
import mmap
import zlib
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

import ml_dtypes
import numpy as np

from offstep.finiteness import counted_beside, float_table
from offstep.formats.file_manifest import WEIGHTS_NAME, encode_comment
from offstep.formats.file_staging import stage_file
from offstep.formats.hdf5_skeleton import make_skeleton
from offstep.formats.keras_weights import computed_beside, list_datasets, round_to_pages
from offstep.formats.model_config import ModelConfig, parse_config
from offstep.formats.stored_zip import SMALLEST_PADDING, Member, Moment, encode_directory, encode_header
from offstep.manifest import FileRecord
from offstep.records import Job, LeafLayout, Plan

METADATA_NAME, CONFIG_NAME, ASSETS_NAME = "metadata.json", "config.json", "assets"
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
        rate: Where the learning rate is in a slot, if it stands in `config`.
        weights_head: The weights file up to the slot; with the headers and members before it, it is whole pages.
        weights_crc: CRC-32 of `weights_head`.
        body_offset: Where in the archive the slot starts.
        body_bytes: How much of the slot belongs to the file.
        assets: Contents by name.
        float_table: Where values may be NaN or infinite, for `finiteness`.
    """

    metadata: dict[str, Any]  # JSON
    config: ModelConfig
    rate: LeafLayout | None
    weights_head: bytes
    weights_crc: int
    body_offset: int
    body_bytes: int
    assets: dict[str, bytes]
    float_table: bytes


def prepare(plan: Plan, documents: dict[str, Any] | None) -> PreparedArchive:  # JSON
    """Makes all that does not change from save to save.

    `documents` holds `groups` as for a weights file, `config` and `metadata` as Keras writes them, `assets` as
    hexadecimal text by name, and `learning_rate`, the number of the leaf that the config quotes, if one does.
    """
    assert documents is not None, "an archive has a config"
    datasets, body_bytes = list_datasets(plan)
    skeleton = make_skeleton(datasets, documents["groups"])
    number = documents.get("learning_rate")
    rate = None if number is None else plan.leaves[number]
    metadata, config = documents["metadata"], parse_config(documents["config"], quotes_rate=rate is not None)
    # A draft shows how long what comes before is; neither sizes, checksums nor dates change that.
    draft, _ = _encode_front(
        metadata, config, 0.0, Member(WEIGHTS_NAME, 0, 0, 0, _is_zip64(body_bytes)), datetime.now()
    )
    before = len(draft)
    data_at = round_to_pages(before + len(skeleton.image)) - before
    head = skeleton.encode(data_at=data_at, data_bytes=body_bytes)
    assets = {name: bytes.fromhex(text) for name, text in documents["assets"].items()}
    crc, floats = zlib.crc32(head), float_table(plan)
    return PreparedArchive(metadata, config, rate, head, crc, before + data_at, body_bytes, assets, floats)


def write(job: Job, prepared: PreparedArchive, slot: mmap.mmap) -> int:
    """Writes one snapshot and commits it in place of an older file; returns its size in bytes.

    Raises:
        OSError: it is not durable; an older file is untouched.
    """
    rate = None if prepared.rate is None else _read_scalar(prepared.rate, slot)
    size_bytes = prepared.body_bytes  # about; what is long enough to be written around the page cache
    with stage_file(job, size_bytes) as staged, memoryview(slot) as view:
        body, tables = view[: prepared.body_bytes], prepared.float_table
        with counted_beside(view, tables) as nonfinite, computed_beside(zlib.crc32, body, prepared.weights_crc) as crc:
            staged.write(body, prepared.body_offset, io_threads=_IO_THREADS)
            head, tail = _encode_frame(prepared, rate, crc(), job, nonfinite())
        staged.write(head, 0)
        staged.write(tail, len(head) + prepared.body_bytes)
        size_bytes = len(head) + prepared.body_bytes + len(tail)
        staged.commit(size_bytes)
    return size_bytes


def _encode_frame(
    prepared: PreparedArchive, rate: float | None, weights_crc: int, job: Job, nonfinite: int
) -> tuple[bytes, bytes]:
    """Returns what comes before and after the slot."""
    now = datetime.now()
    is_zip64 = _is_zip64(prepared.body_bytes)
    weights = Member(WEIGHTS_NAME, len(prepared.weights_head) + prepared.body_bytes, weights_crc, 0, is_zip64)
    front, members = _encode_front(prepared.metadata, prepared.config, rate, weights, now)
    head = front + prepared.weights_head
    tail = bytearray()
    start = len(head) + prepared.body_bytes
    for name, content in prepared.assets.items():
        members.append(_append(tail, f"{ASSETS_NAME}/{name}", content, _moment(now), start))
    comment = encode_comment(job, {member.name: FileRecord(member.size) for member in members}, nonfinite)
    return head, bytes(tail) + encode_directory(members, _moment(now), start + len(tail), comment)


def _encode_front(
    metadata: dict[str, Any], config: ModelConfig, rate: float | None, weights: Member, now: datetime
) -> tuple[bytes, list[Member]]:
    """Returns the members before the weights file, with its header at the end; as long for every learning rate."""
    text = config.encode(rate)
    front = bytearray()
    dated = json.dumps(metadata | {"date_saved": now.strftime(_DATE_FORMAT)}).encode()
    members = [
        _append(front, METADATA_NAME, dated, _moment(now), 0),
        _append(front, CONFIG_NAME, text, _moment(now), 0, padding=SMALLEST_PADDING + config.missing_bytes(text)),
    ]
    weights = replace(weights, offset=len(front))
    front += encode_header(weights, _moment(now))
    return bytes(front), [*members, weights]


def _read_scalar(layout: LeafLayout, slot: mmap.mmap) -> float:
    dtype = np.dtype(getattr(ml_dtypes, layout.leaf.dtype, layout.leaf.dtype))
    return float(np.frombuffer(slot[layout.offset : layout.offset + dtype.itemsize], dtype)[0])


def _is_zip64(body_bytes: int) -> bool:
    return body_bytes >= _ZIP64_FROM_BYTES


def _append(archive: bytearray, name: str, content: bytes, moment: Moment, start: int, *, padding: int = 0) -> Member:
    """Adds a member to a piece of the archive that starts at `start`."""
    member = Member(name, len(content), zlib.crc32(content), start + len(archive), padding=padding)
    archive += encode_header(member, moment) + content
    return member


def _moment(now: datetime) -> Moment:
    return now.year, now.month, now.day, now.hour, now.minute, now.second
