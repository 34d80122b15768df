"""A checkpoint in the formats of others: `.safetensors` and `.npz`, leaf by leaf and without their libraries.

safetensors: https://github.com/huggingface/safetensors#format. npz: a ZIP archive of
https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html, one member for each array.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

import numpy as np

from offstep import commit
from offstep.blocks import read_blocks, widen
from offstep.errors import UnsupportedLeaf
from offstep.publishing import open_scratch, publish
from offstep.stored import Reader, StoredLeaf, as_dtype

_SAFETENSORS_NAMES = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "uint16": "U16",
    "int16": "I16",
    "uint32": "U32",
    "int32": "I32",
    "uint64": "U64",
    "int64": "I64",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "complex64": "C64",
}
_HEADER_ALIGNMENT = 8


def export(reader: Reader, leaves: Sequence[StoredLeaf], target: Path) -> int:
    """Writes leaves of a checkpoint to a `.safetensors` or `.npz` file; returns its size in bytes.

    Names are paths joined by slashes. What NumPy does not know (bfloat16, float8, int4) is exactly converted in an
    `.npz`, to float32 or int32.

    Raises:
        UnsupportedLeaf: the format has no such dtype.
        CheckpointDamaged: a checksum is wrong.
        OSError: it is not durable; an older file is untouched.
    """
    commit.make_root(target.parent)
    with open_scratch(target.parent) as file:
        WRITERS[target.suffix](reader, leaves, file)
        return publish(file, target)


def _write_safetensors(reader: Reader, leaves: Sequence[StoredLeaf], file: IO[bytes]) -> None:
    # Wide dtypes first, so that each array lies on a multiple of its own size.
    ordered = sorted(leaves, key=lambda leaf: (-as_dtype(leaf.dtype).itemsize, leaf.name))
    header: dict[str, object] = {"__metadata__": {"format": "offstep"}}
    offset = 0
    for leaf in ordered:
        if leaf.dtype not in _SAFETENSORS_NAMES:
            raise UnsupportedLeaf(f"{leaf.name}: safetensors has no {leaf.dtype}; export to .npz instead")
        end = offset + leaf.size_bytes
        header[leaf.name] = {
            "dtype": _SAFETENSORS_NAMES[leaf.dtype],
            "shape": leaf.shape,
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _HEADER_ALIGNMENT)
    file.write(len(text).to_bytes(8, "little") + text)
    for leaf in ordered:
        for block in read_blocks(reader, leaf):
            file.write(block.tobytes())


def _write_npz(reader: Reader, leaves: Sequence[StoredLeaf], file: IO[bytes]) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        for leaf in leaves:
            with archive.open(f"{leaf.name}.npy", "w", force_zip64=True) as member:
                _write_array(reader, leaf, member)


def _write_array(reader: Reader, leaf: StoredLeaf, member: IO[bytes]) -> None:
    dtype = as_dtype(leaf.dtype)
    known = dtype if dtype == np.float16 else widen(np.empty(0, dtype)).dtype
    header = {"descr": np.lib.format.dtype_to_descr(known), "fortran_order": False, "shape": leaf.shape}
    np.lib.format.write_array_header_2_0(member, header)
    for block in read_blocks(reader, leaf):
        member.write(block.astype(known).tobytes())


WRITERS: dict[str, Callable[[Reader, Sequence[StoredLeaf], IO[bytes]], None]] = {
    ".safetensors": _write_safetensors,
    ".npz": _write_npz,
}
"""By suffix."""
