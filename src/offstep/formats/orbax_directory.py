"""Turns a slot into the files of a checkpoint directory that stock Orbax and stock Keras read.

Pure: it decides names and contents, writes nothing and makes nothing durable. Arrays are
zarr3 in one OCDBT database per item, uncompressed, each chunk followed by its CRC-32C, which the stock reader checks.
The slot already holds the chunks in this form, so it becomes the head of the data file without a copy.
"""

from __future__ import annotations

import json
import os
import re
import struct
from base64 import urlsafe_b64encode
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from offstep._native import crc32c
from offstep.errors import UnsupportedLeaf
from offstep.finiteness import float_table
from offstep.formats.base_file import BaseFile, Run, Split, frozen_layouts
from offstep.formats.ocdbt import BASE_FILE, OWN_FILE, Entry, PreparedDatabase, SlotRange, prepare_database
from offstep.records import CRC_BYTES, Leaf, LeafLayout, PathKey, Plan

DTYPES = frozenset(
    (
        *("bool", "int2", "int4", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
        *("bfloat16", "float16", "float32", "float64", "complex64", "complex128", "float4_e2m1fn"),
        *("float8_e3m4", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e4m3b11fnuz", "float8_e5m2", "float8_e5m2fnuz"),
        "float8_e8m0fnu",
    )
)
"""What stock Orbax restores from zarr3; all narrower than a byte lie in one byte per element."""

Parts = tuple[bytes | memoryview, ...]
"""Contents of a file, in parts to be written one after another."""

STATE = "pytree"
"""The item with the arrays of the state."""

_CONFIG, _ASSETS = "model_config", "assets"
_HANDLER = "orbax.checkpoint.experimental.v1._src.handlers.pytree_handler.PyTreeHandler"
_SEQUENCE_KEY, _DICT_KEY = 1, 2
# Keras 3.15 does not recognise Orbax's own step directories; it looks for a file of this name. With it,
# `model.load_weights(root/step)` works, which is the only way to an older step.
_KERAS_MARKER = "checkpoint_metadata"
_JAX_ARRAY = "jax.Array"


@dataclass(frozen=True)
class ModelDocuments:
    """What Keras needs beside the arrays to rebuild a model.

    Attributes:
        config: The model's JSON.
        assets: Contents of the layers' asset files by relative path, e.g. `"layers/lookup/vocab.txt"`.
    """

    config: str
    assets: Mapping[str, bytes]


@dataclass(frozen=True)
class ArrayItem:
    """One item that holds arrays: a directory with an OCDBT database of its own."""

    name: str
    image_bytes: int
    entries: tuple[Entry, ...]
    database: PreparedDatabase


@dataclass(frozen=True)
class PreparedDirectory:
    """What is the same in every checkpoint of one plan, made by `prepare`.

    Attributes:
        base: Remembers which frozen leaves are written already; `None` when no leaf is frozen.
        spread: The state's item as the last split has it.
        float_table: Where in a slot the floating leaves lie; see `finiteness`.
    """

    items: tuple[str, ...]
    constant_files: Mapping[str, bytes]
    state: ArrayItem
    assets: ArrayItem | None
    assets_image: bytes
    base: BaseFile | None = None
    spread: dict[tuple[Run, ...], ArrayItem] = field(default_factory=dict)
    float_table: bytes = b""


def check_leaves(leaves: Iterable[Leaf]) -> None:
    """Checks that stock readers can restore such leaves; the trainer calls it before it takes a snapshot.

    Raises:
        UnsupportedLeaf: stock Orbax cannot restore a dtype, or two leaves would have one name.
    """
    paths: dict[str, tuple[PathKey, ...]] = {}
    for leaf in leaves:
        name = leaf.name
        if leaf.dtype not in DTYPES:
            raise UnsupportedLeaf(f"{name}: stock Orbax cannot restore {leaf.dtype}; cast the leaf to a wider dtype")
        if name in paths:
            raise UnsupportedLeaf(
                f"{leaf.path} and {paths[name]}: Orbax would store both as {name!r}; rename one of them"
            )
        paths[name] = leaf.path


def prepare(plan: Plan, documents: ModelDocuments | None, *, state: ArrayItem | None = None) -> PreparedDirectory:
    """Makes everything that does not change from save to save.

    Without `documents` the checkpoint holds the arrays only: `load_weights` and Orbax read it, `load_model` does not.
    With `state`, that is the item with the arrays, rather than one whose data file begins with the slot.

    Raises:
        UnsupportedLeaf: a leaf that stock Orbax could not restore, or two leaves that it would store under one name.
    """
    files = _state_documents(plan)
    items = [STATE]
    assets, image = None, b""
    if documents is not None:
        items.append(_CONFIG)
        files |= _config_documents(documents.config)
    if documents is not None and documents.assets:
        items.append(_ASSETS)
        assets_plan, image = _pack_assets(documents.assets)
        files[f"{_ASSETS}/_METADATA"] = _encode_tree(assets_plan)
        assets = prepare_item(_ASSETS, assets_plan)
    base = BaseFile(plan) if state is None and frozen_layouts(plan) else None
    state = state or prepare_item(STATE, plan)
    return PreparedDirectory(tuple(sorted(items)), files, state, assets, image, base, float_table=float_table(plan))


def base_path(split: Split) -> str:
    """Returns the relative path of the base in the checkpoint's directory."""
    return f"{STATE}/{split.base}"


def data_files(
    prepared: PreparedDirectory,
    slot: memoryview,
    *,
    step: int,
    target: str,
    now_ns: int,
    split: Split | None = None,
) -> dict[str, Parts]:
    """Returns all files of the checkpoint by relative path; `slot` itself is the first part of the data file.

    With a `split`, only its first part is; the others are in the base, which is left out if it is to be linked.

    Args:
        prepared: Made for the plan that describes the slot.
        slot: One whole slot; it must keep its contents until the files are written.
        step: Training step.
        target: Final absolute path of the checkpoint, which Orbax repeats in its success markers.
        now_ns: Time of the save since the epoch.
        split: How the slot is spread over two data files.
    """
    if slot.nbytes != prepared.state.image_bytes:
        raise ValueError(f"the slot has {slot.nbytes} bytes, its plan says {prepared.state.image_bytes}")
    files = document_files(prepared, step=step, target=target, now_ns=now_ns)
    if split is None:
        return files | database_files(prepared.state, (slot,), now_ns)
    if split.base is not None and not split.is_linked:
        files[base_path(split)] = split.pieces(slot, BASE_FILE)
    own = split.pieces(slot, OWN_FILE)
    return files | database_files(spread(prepared, split), own, now_ns, () if split.base is None else (split.base,))


def document_files(prepared: PreparedDirectory, *, step: int, target: str, now_ns: int) -> dict[str, Parts]:
    """Returns what `data_files` does, except the database with the arrays of the state."""
    files: dict[str, Parts] = {path: (content,) for path, content in prepared.constant_files.items()}
    if prepared.assets is not None:
        files |= database_files(prepared.assets, (memoryview(prepared.assets_image),), now_ns)
    for item in prepared.items:
        files[f"{item}/commit_success.txt"] = (_success_text(f"{target}/{item}"),)
    files["_CHECKPOINT_METADATA"] = (_encode_step_metadata(prepared.items, now_ns),)
    files["commit_success.txt"] = (_success_text(target),)
    files[_KERAS_MARKER] = ()
    return files


def name_data_file() -> str:
    """Returns a name that no other data file has, relative to its database."""
    return f"d/{os.urandom(16).hex()}"


def database_files(
    item: ArrayItem,
    values: Sequence[memoryview],
    now_ns: int,
    other_files: Sequence[str] = (),
    data_file: str | None = None,
) -> dict[str, Parts]:
    """Returns the files of one database by relative path.

    Args:
        item: What is the same in each of them.
        values: What the data file begins with.
        now_ns: Time of the save since the epoch.
        other_files: Names of the other data files that the entries refer to, relative to the item.
        data_file: Name of the own one; `None` makes one up.
    """
    data_file = data_file or name_data_file()
    nodes, manifest = item.database.encode(
        data_file=data_file, other_files=other_files, uuid=os.urandom(16), commit_time_ns=now_ns, crc32c=crc32c
    )
    return {f"{item.name}/{data_file}": (*values, *nodes), f"{item.name}/manifest.ocdbt": (manifest,)}


def spread(prepared: PreparedDirectory, split: Split) -> ArrayItem:
    """Returns the state's item as it is when its slot lies in several data files."""
    if split.runs not in prepared.spread:
        prepared.spread.clear()
        entries = tuple(split.move(prepared.state.entries))
        database = prepare_database(entries, node_offset=split.own_bytes)
        prepared.spread[split.runs] = replace(prepared.state, entries=entries, database=database)
    return prepared.spread[split.runs]


def prepare_item(name: str, plan: Plan) -> ArrayItem:
    """Makes what is the same in every database of one plan, whose slot begins the data file."""
    check_leaves(layout.leaf for layout in plan.leaves)
    entries = sorted((entry for layout in plan.leaves for entry in leaf_entries(layout)), key=lambda entry: entry[0])
    database = prepare_database(entries, node_offset=plan.slot_bytes)
    return ArrayItem(name, plan.slot_bytes, tuple(entries), database)


def leaf_entries(layout: LeafLayout) -> Iterator[Entry]:
    """Yields the keys of a leaf in the database: its `zarr.json`, and where in a slot each of its chunks lies."""
    yield zarr_key(layout), encode_zarr(layout)
    for number, (offset, size) in zip(layout.numbers, layout.chunk_ranges(), strict=True):
        yield chunk_key(layout.leaf.name, np.unravel_index(number, layout.grid)), SlotRange(offset, size)


def zarr_key(layout: LeafLayout) -> bytes:
    """Returns the key of an array's metadata."""
    return f"{layout.leaf.name}/zarr.json".encode()


def chunk_key(name: str, position: Iterable[object]) -> bytes:
    """Returns the key of one chunk of an array, by its indices in the grid."""
    return "/".join([name, "c", *map(str, position)]).encode()


def encode_zarr(layout: LeafLayout) -> bytes:
    """Returns an array's `zarr.json`, in the form of Orbax but for the codecs."""
    dtype = layout.leaf.dtype
    to_bytes: dict[str, Any] = {"name": "bytes"}  # JSON
    if not _is_single_byte(dtype):
        to_bytes["configuration"] = {"endian": "little"}
    return _encode_json(
        {
            "chunk_grid": {"configuration": {"chunk_shape": _chunk_shape(layout)}, "name": "regular"},
            "chunk_key_encoding": {"name": "default"},
            "codecs": [to_bytes, {"name": "crc32c"}],
            "data_type": dtype,
            "fill_value": _fill_value(dtype),
            "node_type": "array",
            "shape": layout.leaf.shape,
            "zarr_format": 3,
        }
    )


def _chunk_shape(layout: LeafLayout) -> tuple[int, ...]:
    """zarr3 has no chunks of size 0, not even in an array without elements."""
    return tuple(max(1, size) for size in layout.chunk_shape)


def _is_single_byte(dtype: str) -> bool:
    bits = re.search(r"\d+", dtype)
    return bits is None or int(bits[0]) <= 8


def _fill_value(dtype: str) -> bool | int | float | list[float]:
    if dtype == "bool":
        return False
    if dtype.startswith("complex"):
        return [0.0, 0.0]
    return 0.0 if "float" in dtype else 0


def _state_documents(plan: Plan) -> dict[str, bytes]:
    return {
        f"{STATE}/_METADATA": _encode_tree(plan),
        f"{STATE}/_sharding": _encode_shardings(plan),
        f"{STATE}/array_metadatas/process_0": _encode_array_metadatas(plan),
    }


def _config_documents(config: str) -> dict[str, bytes]:
    entry = _tree_entry(("config",), {"value_type": "string", "skip_deserialize": False})
    return {
        f"{_CONFIG}/_METADATA": _encode_tree_entries([entry]),
        f"{_CONFIG}/_strings.json": _encode_json({"config": config}),
    }


def _encode_tree(plan: Plan) -> bytes:
    leaves = [_tree_entry(layout.leaf.path, _leaf_metadata(layout.leaf)) for layout in plan.leaves]
    empty = [_tree_entry(path, {"value_type": kind, "skip_deserialize": True}) for path, kind in plan.empty_nodes]
    return _encode_tree_entries(leaves + empty)


def _encode_tree_entries(entries: Sequence[tuple[str, dict[str, Any]]]) -> bytes:  # JSON
    return _encode_json(
        {
            "tree_metadata": dict(entries),
            "use_ocdbt": True,
            "use_zarr3": True,
            "store_array_data_equal_to_fill_value": True,
            "custom_metadata": None,
        }
    )


def _tree_entry(path: tuple[PathKey, ...], value: dict[str, Any]) -> tuple[str, dict[str, Any]]:  # JSON
    keys = [{"key": str(key), "key_type": _SEQUENCE_KEY if isinstance(key, int) else _DICT_KEY} for key in path]
    return str(tuple(map(str, path))), {"key_metadata": keys, "value_metadata": value}


def _leaf_metadata(leaf: Leaf) -> dict[str, Any]:  # JSON
    metadata: dict[str, Any] = {"value_type": leaf.value_type, "skip_deserialize": False}
    if leaf.value_type == _JAX_ARRAY:
        metadata["write_shape"] = _write_shape(leaf)
    return metadata


def _write_shape(leaf: Leaf) -> tuple[int, ...]:
    return leaf.shard_shape or leaf.shape


def _encode_shardings(plan: Plan) -> bytes:
    leaves = [layout.leaf for layout in plan.leaves]
    return _encode_json(
        {urlsafe_b64encode(leaf.name.encode()).decode(): leaf.sharding for leaf in leaves if leaf.sharding is not None}
    )


def _encode_array_metadatas(plan: Plan) -> bytes:
    layouts = [layout for layout in plan.leaves if layout.leaf.value_type == _JAX_ARRAY]
    return _encode_json({"array_metadatas": [{"array_metadata": _array_metadata(layout)} for layout in layouts]})


def _array_metadata(layout: LeafLayout) -> dict[str, Any]:  # JSON
    leaf = layout.leaf
    return {
        "param_name": leaf.name,
        "write_shape": _write_shape(leaf),
        "chunk_shape": _chunk_shape(layout),
        "ext_metadata": None if leaf.prng_impl is None else {"random_key_impl": leaf.prng_impl},
    }


def _encode_step_metadata(items: Sequence[str], now_ns: int) -> bytes:
    return _encode_json(
        {
            "item_handlers": dict.fromkeys(items, _HANDLER),
            "metrics": {},
            "performance_metrics": {},
            "init_timestamp_nsecs": now_ns,
            "commit_timestamp_nsecs": now_ns,
            "custom_metadata": {},
        }
    )


def _success_text(path: str) -> bytes:
    return f"Checkpoint commit was successful to {path}".encode()


def _pack_assets(assets: Mapping[str, bytes]) -> tuple[Plan, bytes]:
    """Lays the files out as a state of uint8 arrays would be: a plan and its slot."""
    layouts = []
    image = bytearray()
    for path, content in sorted(assets.items()):
        leaf = Leaf(tuple(path.split("/")), (len(content),), "uint8", "np.ndarray")
        layouts.append(LeafLayout(leaf, leaf.shape, (1,), len(image), len(content), len(content) + CRC_BYTES))
        image += content + struct.pack("<I", crc32c(content, 0))
    return Plan(tuple(layouts), len(image)), bytes(image)


def _encode_json(value: dict[str, Any]) -> bytes:  # JSON
    return json.dumps(value).encode()
