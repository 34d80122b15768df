"""Opens an Orbax checkpoint directory, ours or stock's, for reading: plain chunks directly, all else by TensorStore."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from offstep import manifest
from offstep.errors import CheckpointDamaged, UnsupportedFormat
from offstep.formats.image_reader import KEPT_BYTES, ChunkedArray, ImageReader
from offstep.formats.ocdbt_index import UnknownLayout, read_index
from offstep.formats.tensorstore_reader import TensorStoreReader
from offstep.records import PathKey
from offstep.stored import Contents, Region, StoredLeaf
from offstep.stores.path import Readable

_SEQUENCE_KEY = 1
_ITEM_NAMES = ("pytree", "state", "default")  # Keras's and ours, Orbax v1's, Orbax v0's
_ARRAY_TYPES = frozenset(("jax.Array", "np.ndarray", "scalar"))

_Entry = tuple[str, tuple[PathKey, ...], str]


def find_item(checkpoint: Readable) -> Readable | None:
    """Returns the directory with the arrays of a checkpoint: one of its items, or itself."""
    candidates = [checkpoint, *(checkpoint / name for name in _ITEM_NAMES)]
    return next((item for item in candidates if (item / "_METADATA").is_file() and _has_arrays(item)), None)


def _has_arrays(item: Readable) -> bool:
    return (item / "manifest.ocdbt").is_file() or any(item.glob("*/.zarray")) or any(item.glob("*/zarr.json"))


class OrbaxReader:
    """The arrays of one checkpoint directory; a `stored.Reader`.

    Args:
        checkpoint: The step's directory.

    Raises:
        UnsupportedFormat: it is not such a directory, or a newer version wrote it.
        CheckpointDamaged: its index cannot be read, or its files are shorter than that says.
    """

    def __init__(self, checkpoint: Readable) -> None:
        item = find_item(checkpoint)
        if item is None:
            raise UnsupportedFormat(
                f"{checkpoint} holds no arrays of an Orbax checkpoint (a 'pytree' directory with _METADATA and "
                "manifest.ocdbt); give the directory of one step, or that of all steps"
            )
        self.path: Readable = checkpoint
        written = read_manifest(checkpoint)
        metadata = _read_json(item / "_METADATA")
        try:
            entries, others = _list_entries(metadata)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointDamaged(
                f"{item / '_METADATA'} does not describe a tree ({type(error).__name__}: {error}); restore another "
                "checkpoint"
            ) from error
        self._arrays: ImageReader | TensorStoreReader = _open_arrays(item, metadata, [name for name, _, _ in entries])
        self._names = {path: name for name, path, _ in entries}
        leaves = _make_leaves(entries, self._arrays.arrays, _read_prng_impls(item))
        self.contents = Contents("orbax_directory", leaves, bool(written), written, tuple(others))

    @property
    def file(self) -> Path:
        """A directory is no single file."""
        raise UnsupportedFormat(f"{self.path} is a directory; expected a file of Keras")

    @property
    def is_checked_fast(self) -> bool:
        """Whether `verify` costs much less than reading; see `stored.Reader`."""
        # From a store all would come a second time, and in each of several processes, which need a part of it.
        is_near = isinstance(self.path, Path) or sum(leaf.size_bytes for leaf in self.contents.leaves) <= KEPT_BYTES
        return self.is_direct and is_near

    @property
    def is_direct(self) -> bool:
        """Whether the arrays are read without TensorStore."""
        return isinstance(self._arrays, ImageReader)

    def read(
        self, regions: Sequence[Region], threads: int, into: Sequence[np.ndarray] | None = None
    ) -> list[np.ndarray]:
        """Returns the regions; see `stored.Reader`."""
        return self._arrays.read([(self._names[region.leaf.path], region) for region in regions], threads, into)

    def verify(self, leaves: Sequence[StoredLeaf], threads: int) -> None:
        """Checks the checksums of leaves; see `stored.Reader`."""
        named = [(self._names[leaf.path], leaf) for leaf in leaves]
        if self.contents.manifest.get("part") is not None and isinstance(self._arrays, ImageReader):
            self._arrays.verify(named, threads, is_partial=True)  # a process's own disk need not have all of a leaf
        else:
            self._arrays.verify(named, threads)

    def close(self) -> None:
        """Closes its files."""
        self._arrays.close()


def read_manifest(checkpoint: Readable) -> Mapping[str, Any]:
    """Returns the fields of `manifest.Manifest` as `offstep.json` has them; nothing where there is no such file.

    Raises:
        UnsupportedFormat: a newer version of offstep wrote the checkpoint.
        CheckpointDamaged: it is not what was written.
    """
    path = checkpoint / manifest.MANIFEST_NAME
    if not path.is_file():
        return {}
    with path.open("rb") as file:
        return parse_manifest(file.read(manifest.MAX_BYTES + 1), checkpoint)


def parse_manifest(text: bytes, origin: Readable) -> Mapping[str, Any]:
    """Reads the text of a manifest; see `read_manifest`."""
    version = _find_version(text)
    if version is not None and version > manifest.FORMAT_VERSION:
        raise UnsupportedFormat(
            f"{origin} has format version {version}, this offstep reads up to {manifest.FORMAT_VERSION}; upgrade "
            "offstep, or load it with keras.saving.load_model or Orbax"
        )
    try:
        return vars(manifest.parse(text))
    except ValueError as error:
        raise CheckpointDamaged(f"{origin}: {error}; restore another checkpoint") from error


def _find_version(text: bytes) -> int | None:
    """Returns the format version, whatever else is in the text; `None` where it does not say."""
    found = re.search(rb'"format_version":\s*(\d{1,9})', text)
    return None if found is None else int(found[1])


def _read_json(path: Readable) -> dict[str, Any]:  # JSON
    try:
        data = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise CheckpointDamaged(f"{path} is missing; restore another checkpoint") from error
    except ValueError as error:
        raise CheckpointDamaged(f"{path} is no JSON ({error}); restore another checkpoint") from error
    if not isinstance(data, dict):
        raise CheckpointDamaged(f"{path} holds no JSON object; restore another checkpoint")
    return data


def _list_entries(metadata: Mapping[str, Any]) -> tuple[list[_Entry], list[tuple[tuple[PathKey, ...], str]]]:  # JSON
    """Returns the arrays in the order of the file (the names under which they are stored, paths, Orbax's types), and
    paths and types of all else.
    """
    entries, others = [], []
    for entry in metadata["tree_metadata"].values():
        value = entry["value_metadata"]
        path = tuple(_path_key(key) for key in entry["key_metadata"])
        if value["value_type"] in _ARRAY_TYPES and not value.get("skip_deserialize", False):
            entries.append((".".join(map(str, path)), path, value["value_type"]))
        else:
            others.append((path, str(value["value_type"])))
    return entries, others


def _path_key(key: Mapping[str, Any]) -> PathKey:  # JSON
    return int(key["key"]) if key["key_type"] == _SEQUENCE_KEY else str(key["key"])


def _open_arrays(
    item: Readable, metadata: Mapping[str, Any], names: list[str]
) -> ImageReader | TensorStoreReader:  # JSON
    is_zarr3 = bool(metadata.get("use_zarr3", False))
    if not (item / "manifest.ocdbt").is_file():
        return TensorStoreReader(item, names, is_zarr3=is_zarr3, is_ocdbt=False)
    try:
        reader = ImageReader(item, read_index(item))
    except UnknownLayout:
        return TensorStoreReader(item, names, is_zarr3=is_zarr3, is_ocdbt=True)
    absent = next((name for name in names if name not in reader.arrays), None)
    if absent is not None:
        reader.close()
        raise CheckpointDamaged(f"{absent}: it is not in the index of {item}; restore another checkpoint")
    return reader


def _make_leaves(
    entries: Sequence[_Entry], arrays: Mapping[str, ChunkedArray], impls: Mapping[str, str]
) -> tuple[StoredLeaf, ...]:
    return tuple(
        StoredLeaf(path, arrays[name].shape, arrays[name].dtype, value_type, impls.get(name))
        for name, path, value_type in entries
    )


def _read_prng_impls(item: Readable) -> dict[str, str]:
    """Returns the PRNG implementation of each array of keys, by its name."""
    impls: dict[str, str] = {}
    for path in item.glob("array_metadatas/process_*"):
        text = path.read_bytes()
        if b"random_key_impl" in text:  # there are thousands of arrays and hardly ever a key among them
            entries = [entry["array_metadata"] for entry in json.loads(text)["array_metadatas"]]
            impls |= {
                entry["param_name"]: entry["ext_metadata"]["random_key_impl"]
                for entry in entries
                if (entry.get("ext_metadata") or {}).get("random_key_impl")
            }
    return impls
