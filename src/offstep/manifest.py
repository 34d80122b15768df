"""The manifest of a checkpoint: where it belongs in its run, and what each of its files must be.

Strict JSON (RFC 8259) in UTF-8. Metrics that are no numbers are the texts `"NaN"`, `"Infinity"`, `"-Infinity"`. The
last member, `crc32c`, is the CRC-32C of the document without it, so that a flipped bit in the manifest is found too.
"""

from __future__ import annotations

import json
import math
import mmap
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import offstep
from offstep._native import crc32c
from offstep.parts import Parts
from offstep.stores.path import Readable

MANIFEST_NAME = "offstep.json"
FORMAT_VERSION = 1
MAX_BYTES = 16 << 20
"""A larger manifest is neither written nor read."""

Json = Any  # what `json` makes: dict, list, str, int, float, bool or None

_SEAL = re.compile(rb',"crc32c":"([0-9a-f]{8})"\}$')
_SEAL_BYTES = len(b',"crc32c":"00000000"}')
_SPELLED = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


@dataclass(frozen=True)
class FileRecord:
    """What one file of a checkpoint must be.

    Attributes:
        size: In bytes.
        crc32c: CRC-32C of the contents; `None` where the file carries checksums of its own, in place: the data file of
            an Orbax directory, whose chunks and nodes each have one.
    """

    size: int
    crc32c: int | None = None


@dataclass(frozen=True)
class Manifest:
    """What a manifest says.

    Attributes:
        step: Training step.
        run: Names the run that wrote it.
        number: Orders the saves of that run.
        epoch: From 1, if known.
        batch: From 1, if it was saved after a batch.
        metrics: Numbers kept with the checkpoint; they may be NaN or infinite.
        versions: Of offstep, Keras, JAX.
        nonfinite: How many values of the floating leaves are NaN or infinite; `None` where nobody counted.
        files: By relative POSIX path; without the manifest itself.
        part: Process that wrote it and number of processes, where each has a disk of its own: it may hold parts of
            arrays only.
        save: Tells the save from all others of the step, where each process has a disk of its own: the same in all.
        extra: JSON that the caller of the save wanted to keep.
    """

    step: int
    run: str = ""
    number: int | None = None
    epoch: int | None = None
    batch: int | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    nonfinite: int | None = None
    files: Mapping[str, FileRecord] = field(default_factory=dict)
    extra: Json = None
    part: tuple[int, int] | None = None
    save: str = ""


def build(about: Mapping[str, Json], records: Mapping[str, FileRecord], nonfinite: int | None) -> bytes:
    """Returns the text of a manifest.

    Args:
        about: What the trainer says of the checkpoint: fields of `Manifest`, `step` at least.
        records: Its files.
        nonfinite: See `Manifest`.

    Raises:
        ValueError: something is no JSON, or all of it is too much.
    """
    document = {
        "format_version": FORMAT_VERSION,
        **about,
        "metrics": {name: _spell(value) for name, value in about.get("metrics", {}).items()},
        "versions": {"offstep": offstep.__version__, **about.get("versions", {})},
        "nonfinite": nonfinite,
        "files": {name: _describe(record) for name, record in records.items()},
    }
    text = json.dumps(document, allow_nan=False, separators=(",", ":")).encode()
    if len(text) + _SEAL_BYTES > MAX_BYTES:
        raise ValueError(f"the manifest would have {len(text):,} bytes; at most {MAX_BYTES:,} are kept")
    return text[:-1] + b',"crc32c":"%08x"}' % crc32c(text)


def record_files(files: Mapping[str, Parts]) -> dict[str, FileRecord]:
    """Returns the records of files before they are written; see `FileRecord` for those that begin with a slot."""
    return {name: FileRecord(sum(map(len, parts)), _checksum(parts)) for name, parts in files.items()}


def parse(text: bytes) -> Manifest:
    """Reads the text of a manifest.

    Raises:
        ValueError: it is no whole manifest, or one of a newer format; the message says which.
    """
    if len(text) > MAX_BYTES:
        raise ValueError(f"a manifest has at most {MAX_BYTES:,} bytes, this one has {len(text):,}")
    document = _open_seal(text)
    version = document.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(f"manifest of format version {version}; this offstep reads version {FORMAT_VERSION}")
    try:
        return _to_manifest(document)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"the manifest has not the form of one: {type(error).__name__}: {error}") from error


def read(checkpoint: Readable) -> Manifest | None:
    """Reads the manifest of a directory; `None` where there is none, as in what stock Orbax wrote.

    Raises:
        ValueError: see `parse`.
        OSError: it cannot be read.
    """
    try:
        with (checkpoint / MANIFEST_NAME).open("rb") as file:
            return parse(file.read(MAX_BYTES + 1))
    except (FileNotFoundError, NotADirectoryError):
        return None


def find_best(manifests: Iterable[Manifest], monitor: str, *, mode: str) -> Manifest | None:
    """Returns the one with the best finite metric of that name, the newest where several are equal."""
    sign = 1.0 if mode == "max" else -1.0
    ranked = [
        (sign * manifest.metrics[monitor], manifest.step, manifest)
        for manifest in manifests
        if math.isfinite(manifest.metrics.get(monitor, math.nan))
    ]
    return max(ranked, key=lambda entry: entry[:2])[2] if ranked else None


def _checksum(parts: Parts) -> int | None:
    if parts and isinstance(parts[0], memoryview) and isinstance(parts[0].obj, mmap.mmap):
        return None
    crc = 0
    for part in parts:
        crc = crc32c(part, crc)
    return crc


def _describe(record: FileRecord) -> dict[str, Json]:
    return {"size": record.size, "crc32c": None if record.crc32c is None else f"{record.crc32c:08x}"}


def _spell(value: float) -> float | str:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _open_seal(text: bytes) -> dict[str, Json]:
    seal = _SEAL.search(text[-_SEAL_BYTES:])
    if seal is None:
        raise ValueError("the manifest is cut short, or none of ours: its checksum is not at its end")
    body = text[:-_SEAL_BYTES] + b"}"
    if crc32c(body) != int(seal[1], 16):
        raise ValueError(f"the manifest is damaged: expected CRC-32C {seal[1].decode()}, found {crc32c(body):08x}")
    try:
        document = json.loads(body, parse_constant=_refuse)
    except RecursionError as error:
        raise ValueError("the manifest is nested too deeply") from error
    if not isinstance(document, dict):
        raise ValueError(f"a manifest is a JSON object, found {type(document).__name__}")
    return document


def _refuse(constant: str) -> None:
    raise ValueError(f"JSON knows no {constant}")


def _to_manifest(document: dict[str, Json]) -> Manifest:
    files = {
        _check_name(name): FileRecord(int(entry["size"]), None if entry["crc32c"] is None else int(entry["crc32c"], 16))
        for name, entry in document["files"].items()
    }
    return Manifest(
        step=int(document["step"]),
        run=str(document.get("run", "")),
        number=document.get("number"),
        epoch=document.get("epoch"),
        batch=document.get("batch"),
        metrics={str(name): _to_number(value) for name, value in document["metrics"].items()},
        versions={str(name): str(version) for name, version in document["versions"].items()},
        nonfinite=document["nonfinite"],
        files=files,
        extra=document.get("extra"),
        part=_read_part(document.get("part")),
        save=str(document.get("save", "")),
    )


def _read_part(part: Json) -> tuple[int, int] | None:
    return None if part is None else (int(part[0]), int(part[1]))


def _check_name(name: str) -> str:
    if name.startswith("/") or ".." in name.split("/") or "\0" in name:
        raise ValueError(f"the file name {name!r} leaves the checkpoint")
    return name


def _to_number(value: Json) -> float:
    return _SPELLED[value] if isinstance(value, str) else float(value)
