"""A checkpoint written again with other values: the same leaves, documents and format, piece by piece."""

from __future__ import annotations

import secrets
import shutil
import zipfile
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import IO, Any

import numpy as np

from offstep import commit
from offstep._native import crc32c
from offstep.blocks import split_leaf
from offstep.errors import UnsupportedFormat
from offstep.formats import file_manifest, orbax_step
from offstep.manifest import build
from offstep.orbax_documents import read_documents, read_empty_nodes, read_shardings
from offstep.publishing import map_pages, open_scratch, publish
from offstep.records import CRC_BYTES, Job, Leaf, LeafLayout, Plan
from offstep.stored import Reader, Region, StoredLeaf

Values = Callable[[Region], np.ndarray]
"""Gives the new values of a part of a leaf, with its shape and dtype."""

_MEMBER = "model.weights.h5"
SUFFIXES = {"orbax_directory": "", "keras_weights": ".weights.h5", "keras_archive": ".keras"}


def rewrite(source: Reader, target: Path, values: Values, extra: dict[str, Any]) -> None:  # JSON
    """Writes a checkpoint like `source` with other values, and makes it durable at `target`.

    Args:
        source: Open for reading.
        target: Its name ends as the format of `source` wants it; what is there is replaced.
        values: Gives the new values.
        extra: Kept in the manifest.

    Raises:
        UnsupportedFormat: `target` has the suffix of another format.
        OSError: it is not durable; what was there is untouched.
    """
    if source.contents.format not in SUFFIXES:
        raise UnsupportedFormat(f"{source.path} is in Keras's legacy format, which cannot be written anew")
    suffix = SUFFIXES[source.contents.format]
    others = [other for other in SUFFIXES.values() if other and other != suffix]
    if not target.name.endswith(suffix) or (not suffix and target.name.endswith(tuple(others))):
        shown = f"a name that ends in {suffix}" if suffix else "a directory"
        raise UnsupportedFormat(f"{source.path} is {source.contents.format}: give {shown}. Received: {target}")
    commit.make_root(target.parent)
    if not suffix:
        _rewrite_directory(source, target, values, extra)
    elif suffix == ".keras":
        _rewrite_archive(source, target, values, extra)
    else:
        with open_scratch(target.parent) as file:
            with source.file.open("rb") as original:
                shutil.copyfileobj(original, file)
            _overwrite(file, source, values)
            file_manifest.append_trailer(file, _describe(source, extra))
            publish(file, target)


def _describe(source: Reader, extra: dict[str, Any]) -> dict[str, Any]:  # JSON
    """Returns what the manifest says: of metrics nothing, they were of other values."""
    found = source.contents.manifest
    about = {key: found[key] for key in ("epoch", "versions") if key in found}
    return about | {"step": int(found.get("step", 0)), "extra": extra}


# --- Orbax -----------------------------------------------------------------------------------------------------------


def _rewrite_directory(source: Reader, target: Path, values: Values, extra: dict[str, Any]) -> None:  # JSON
    shardings = read_shardings(source.path)
    leaves = [_to_leaf(leaf, shardings) for leaf in source.contents.leaves]
    plan = orbax_step.place(leaves, read_empty_nodes(source.path))
    prepared = orbax_step.prepare(plan, read_documents(source.path))
    about = _describe(source, extra)
    if "step" not in source.contents.manifest and target.name.isdecimal():
        about["step"] = int(target.name)
    job = Job(
        number=1,
        step=about["step"],
        format="orbax_directory",
        target=str(target),
        base=str(target.parent),
        root=str(target.parent),
        slot=0,
        plan=0,
        tag=secrets.token_hex(8),
        manifest=about,
    )
    with open_scratch(target.parent) as file, map_pages(file, plan.slot_bytes) as slot:
        _fill(slot, plan, source, values)
        orbax_step.write(job, prepared, slot, {})  # no place in a run: an average is none to go on from


def _to_leaf(leaf: StoredLeaf, shardings: dict[str, str]) -> Leaf:
    name = ".".join(map(str, leaf.path))
    return Leaf(leaf.path, leaf.shape, leaf.dtype, leaf.value_type, leaf.shape, shardings.get(name), leaf.prng_impl)


def _fill(slot: Any, plan: Plan, source: Reader, values: Values) -> None:  # mmap
    for layout, leaf in zip(plan.leaves, source.contents.leaves, strict=True):
        if 0 in leaf.shape:
            continue
        positions = product(*map(range, layout.grid))
        for position, (offset, size) in zip(positions, layout.chunk_ranges(), strict=True):
            body = _make_chunk(layout, leaf, position, values)
            slot[offset : offset + size] = body + crc32c(body).to_bytes(CRC_BYTES, "little")


def _make_chunk(layout: LeafLayout, leaf: StoredLeaf, position: tuple[int, ...], values: Values) -> bytes:
    """Returns the bytes of one chunk; at the upper edge it is padded with zeros."""
    starts = [index * part for index, part in zip(position, layout.chunk_shape, strict=True)]
    span = tuple(
        (start, min(start + part, size))
        for start, part, size in zip(starts, layout.chunk_shape, leaf.shape, strict=True)
    )
    found = values(Region(leaf, span))
    if found.shape == tuple(layout.chunk_shape):
        return found.tobytes()
    padded = np.zeros(layout.chunk_shape, found.dtype)
    padded[tuple(map(slice, found.shape))] = found
    return padded.tobytes()


# --- Keras -----------------------------------------------------------------------------------------------------------


def _rewrite_archive(source: Reader, target: Path, values: Values, extra: dict[str, Any]) -> None:  # JSON
    with (
        zipfile.ZipFile(source.file) as original,
        open_scratch(target.parent) as weights,
        open_scratch(target.parent) as file,
    ):
        with original.open(_MEMBER) as member:
            shutil.copyfileobj(member, weights)
        _overwrite(weights, source, values)
        weights.seek(0)
        with zipfile.ZipFile(file, "w") as archive:
            for info in original.infolist():
                with (
                    archive.open(info.filename, "w", force_zip64=True) as copy,
                    weights if info.filename == _MEMBER else original.open(info) as member,
                ):
                    shutil.copyfileobj(member, copy)
            archive.comment = build(_describe(source, extra), {}, None)
        publish(file, target)


def _overwrite(file: IO[bytes], source: Reader, values: Values) -> None:
    """Replaces the values in a copy of the HDF5 file of `source`."""
    import h5py  # Orbax directories do without it

    file.seek(0)
    # A chunk, of a file with HDF5's checksums a whole leaf, is read and written once if it fits into the cache.
    cache_bytes = max((Region(leaf).size_bytes for leaf in source.contents.leaves), default=0)
    with h5py.File(file, "r+", rdcc_nbytes=max(cache_bytes, 1 << 20)) as h5:
        for leaf in source.contents.leaves:
            dataset = h5[leaf.name]
            for region in split_leaf(leaf):
                found = values(region)
                stored = found if found.dtype == dataset.dtype else found.view(dataset.dtype)
                dataset[tuple(slice(start, stop) for start, stop in region.box)] = stored
