"""Checks checkpoints against their own checksums: without a model, without JAX, in the memory of a few chunks."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from offstep import catalog, manifest
from offstep._native import crc32c
from offstep.errors import CheckpointNotFound
from offstep.formats import file_manifest
from offstep.formats.database_check import check_database
from offstep.manifest import FileRecord, Json, Manifest
from offstep.records import Problem
from offstep.stores.path import Readable, StorePath, local_copy, open_place
from offstep.stores.staging import MARKER_NAME

_BLOCK_BYTES = 8 << 20
_MOST_DOCUMENT_BYTES = 256 << 20
_STEP_METADATA = "_CHECKPOINT_METADATA"
_DATABASE = "manifest.ocdbt"


@dataclass(frozen=True)
class VerifyReport:
    """What `verify` found.

    Attributes:
        path: What was verified.
        problems: What is not as it was written; empty where all is well.
        files: How many files were compared with size and checksum.
        leaves: Of how many arrays every chunk was compared with its checksum.
        checked_bytes: How many bytes have been compared with a checksum.
        unchecked: What carries no checksum; such a file was looked for, such an array decoded, no more.
    """

    path: Readable
    problems: tuple[Problem, ...] = ()
    files: int = 0
    leaves: int = 0
    checked_bytes: int = 0
    unchecked: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether there is no problem."""
        return not self.problems

    def __str__(self) -> str:
        """Says it in lines for people."""
        what = f"{self.files} files, {self.leaves} arrays, {self.checked_bytes / 1e6:,.1f} MB compared with checksums"
        lines = [f"{self.path}: {'ok' if self.ok else 'damaged'}; {what}"]
        lines += [f"  {problem}" for problem in self.problems]
        lines += [f"  without a checksum: {name}" for name in self.unchecked]
        return "\n".join(lines)


def verify(path: str | os.PathLike[str] | StorePath) -> VerifyReport:
    """Checks the structure of a checkpoint and every checksum in it.

    Reads everything once, a chunk at a time. What offstep wrote is covered as a whole; what stock Orbax wrote only as
    far as it has checksums, and the report names the rest.

    Args:
        path: A checkpoint, or a directory of steps: then all of them, each problem with its step. Of a store, each is
            copied into the directory for temporary files first, and deleted when it has been checked.

    Raises:
        CheckpointNotFound: there is no checkpoint at all.
        OSError: something cannot be read for another reason than damage, such as permissions.
    """
    path = open_place(path)
    if isinstance(path, StorePath):
        return _verify_remote(path)
    if path.is_file():
        return _verify_file(path)
    if _is_checkpoint(path):
        return _verify_directory(path)
    steps = catalog.named_steps(path)
    if not steps:
        raise CheckpointNotFound(f"{path} is no checkpoint, and holds no step of one")
    return _join(path, [(str(step), _verify_directory(path / str(step))) for step in steps])


def _verify_remote(path: StorePath) -> VerifyReport:
    if path.is_file() or _is_checkpoint(path):
        return _verify_copy(path)
    steps = [step for step in catalog.named_steps(path) if not catalog.is_unfinished(path / str(step))]
    if not steps:
        raise CheckpointNotFound(f"{path} is no checkpoint, and holds no step of one")
    return _join(path, [(str(step), _verify_copy(path / str(step))) for step in steps])


def _verify_copy(path: StorePath) -> VerifyReport:
    if path.is_dir() and catalog.is_unfinished(path):
        return VerifyReport(path, (Problem(MARKER_NAME, "the marker of a commit", "none"),))
    with local_copy(path) as copy:
        report = _verify_file(copy) if copy.is_file() else _verify_directory(copy)
    return replace(report, path=path)


@dataclass
class _Findings:
    problems: list[Problem] = field(default_factory=list)
    files: int = 0
    leaves: int = 0
    checked_bytes: int = 0
    unchecked: list[str] = field(default_factory=list)

    def report(self, path: Readable) -> VerifyReport:
        return VerifyReport(
            path, tuple(self.problems), self.files, self.leaves, self.checked_bytes, tuple(sorted(self.unchecked))
        )


def _is_checkpoint(path: Readable) -> bool:
    markers = (_STEP_METADATA, manifest.MANIFEST_NAME, _DATABASE, "commit_success.txt")
    return any((path / marker).exists() for marker in markers)


def _join(path: Readable, reports: Iterable[tuple[str, VerifyReport]]) -> VerifyReport:
    findings = _Findings()
    for name, report in reports:
        findings.problems += [
            Problem(f"{name}/{problem.where}", problem.expected, problem.found) for problem in report.problems
        ]
        findings.files += report.files
        findings.leaves += report.leaves
        findings.checked_bytes += report.checked_bytes
        findings.unchecked += [f"{name}/{where}" for where in report.unchecked]
    return findings.report(path)


def _verify_directory(checkpoint: Path) -> VerifyReport:
    findings = _Findings()
    written = _read_manifest(checkpoint, findings)
    if written is not None:
        _check_files(checkpoint, written, findings)
    _check_documents(checkpoint, written, findings)
    for item in _list_items(checkpoint, findings):
        if (item / _DATABASE).exists():
            _check_item(checkpoint, item, findings)
        elif (item / "d").exists():
            findings.problems.append(Problem(f"{item.name}/{_DATABASE}", "the manifest of a database", "nothing"))
    return findings.report(checkpoint)


def _read_manifest(checkpoint: Path, findings: _Findings) -> Manifest | None:
    try:
        return manifest.read(checkpoint)
    except ValueError as error:
        findings.problems.append(Problem(manifest.MANIFEST_NAME, "a whole manifest", str(error)))
        return None


def _check_files(checkpoint: Path, written: Manifest, findings: _Findings) -> None:
    for name, record in written.files.items():
        problem = _check_file(checkpoint / name, record)
        if problem is not None:
            findings.problems.append(Problem(name, *problem))
        elif record.crc32c is not None:
            findings.files += 1
            findings.checked_bytes += record.size


def _check_file(path: Path, record: FileRecord) -> tuple[str, str] | None:
    """Returns what was expected and what was found, if these differ."""
    try:
        size = path.stat().st_size
        if size != record.size:
            return f"{record.size} bytes", f"{size} bytes"
        found = None if record.crc32c is None else checksum_file(path)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return "a file", "none"
    return None if found == record.crc32c else (f"CRC-32C {record.crc32c:08x}", f"CRC-32C {found:08x}")


def checksum_file(path: Path) -> int:
    """Returns the CRC-32C of a file, read block by block."""
    crc = 0
    with path.open("rb", buffering=0) as file:
        while block := file.read(_BLOCK_BYTES):
            crc = crc32c(block, crc)
    return crc


def _check_documents(checkpoint: Path, written: Manifest | None, findings: _Findings) -> None:
    """Reads the JSON documents; those that no manifest covers are named as such."""
    covered = set() if written is None else set(written.files)
    for path in sorted(checkpoint.rglob("*")):
        name = path.relative_to(checkpoint).as_posix()
        if name in covered or name == manifest.MANIFEST_NAME or not path.is_file():
            continue
        if path.name in (_STEP_METADATA, "_METADATA", "_sharding", "_strings.json", "process_0"):
            _read_json(path, name, findings)
        if path.name != _DATABASE and path.parent.name != "d":
            findings.unchecked.append(name)


def _read_json(path: Path, name: str, findings: _Findings) -> Json:
    try:
        size = path.stat().st_size
        if size > _MOST_DOCUMENT_BYTES:
            raise ValueError(f"{size} bytes")
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        findings.problems.append(Problem(name, "a JSON document", str(error)))
    except FileNotFoundError:
        findings.problems.append(Problem(name, "a JSON document", "none"))
    return None


def _list_items(checkpoint: Path, findings: _Findings) -> Iterator[Path]:
    """Yields the items that the checkpoint says it has; a directory that is itself one item is that item."""
    if not (checkpoint / _STEP_METADATA).exists():
        if (checkpoint / _DATABASE).exists():
            yield checkpoint
            return
        findings.problems.append(Problem(_STEP_METADATA, "the metadata of a step", "none"))
        names = [path.parent.name for path in checkpoint.glob(f"*/{_DATABASE}")]
    else:
        metadata = _read_json(checkpoint / _STEP_METADATA, _STEP_METADATA, _Findings())
        handlers = metadata.get("item_handlers") if isinstance(metadata, dict) else None
        names = list(handlers) if isinstance(handlers, dict) else []
        names += [path.parent.name for path in checkpoint.glob(f"*/{_DATABASE}")]
    for name in sorted(set(names)):
        if (checkpoint / name).is_dir():
            yield checkpoint / name
        else:
            findings.problems.append(Problem(name, "the directory of an item", "none"))


def _check_item(checkpoint: Path, item: Path, findings: _Findings) -> None:
    prefix = "" if item == checkpoint else f"{item.name}/"
    leaves = _expected_leaves(item, prefix, findings)
    for leaf in check_database(item, leaves):
        findings.problems += [
            Problem(f"{prefix}{problem.where}", problem.expected, problem.found) for problem in leaf.problems
        ]
        findings.checked_bytes += leaf.checked_bytes
        if not leaf.has_checksums:
            findings.unchecked.append(f"{prefix}{leaf.name}")
        elif not leaf.problems:
            findings.leaves += 1


def _expected_leaves(item: Path, prefix: str, findings: _Findings) -> list[str]:
    """Returns the names of the arrays that the tree of an item refers to."""
    if not (item / "_METADATA").exists():
        return []
    # What is no JSON has been reported already.
    metadata = _read_json(item / "_METADATA", f"{prefix}_METADATA", _Findings())
    try:
        return [
            ".".join(str(key["key"]) for key in entry["key_metadata"])
            for entry in metadata["tree_metadata"].values()
            if not entry["value_metadata"].get("skip_deserialize")
        ]
    except (AttributeError, KeyError, TypeError) as error:
        found = f"{type(error).__name__}: {error}"
        findings.problems.append(Problem(f"{prefix}_METADATA", "the description of a tree", found))
        return []


def _verify_file(path: Path) -> VerifyReport:
    """Checks an HDF5 file by our manifest, a ZIP archive by the checksums that it has itself."""
    findings = _Findings()
    written: Manifest | None = None
    try:
        written = file_manifest.read(path)
    except (ValueError, zipfile.BadZipFile) as error:
        findings.problems.append(Problem(path.name, "a whole manifest", str(error)))
    if zipfile.is_zipfile(path):
        _check_archive(path, findings)
    elif path.name.endswith(".keras"):
        findings.problems.append(Problem(path.name, "a ZIP archive", "something else"))
    elif written is not None and file_manifest.covers(written.files):
        _check_covered(path, written, findings)
    elif not findings.problems:
        _check_uncovered(path, findings)
    return findings.report(path)


def _check_uncovered(path: Path, findings: _Findings) -> None:
    fault = file_manifest.find_fault(path)
    if fault is None:
        findings.unchecked.append(path.name)
    else:
        findings.problems.append(Problem(path.name, "a whole HDF5 file", fault))


def _check_covered(path: Path, written: Manifest, findings: _Findings) -> None:
    problem = file_manifest.check(path, written.files)
    if problem is not None:
        findings.problems.append(problem)
        return
    findings.files += 1
    findings.checked_bytes += sum(record.size for record in written.files.values())


def _check_archive(path: Path, findings: _Findings) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                _check_member(archive, member, findings)
    except (zipfile.BadZipFile, OSError, NotImplementedError, ValueError) as error:
        findings.problems.append(Problem(path.name, "a ZIP archive", str(error)))


def _check_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, findings: _Findings) -> None:
    try:
        with archive.open(member) as file:
            while file.read(_BLOCK_BYTES):
                pass
    except (zipfile.BadZipFile, EOFError, OSError) as error:
        findings.problems.append(Problem(member.filename, f"CRC-32 {member.CRC:08x}", str(error)))
    else:
        findings.files += 1
        findings.checked_bytes += member.file_size
