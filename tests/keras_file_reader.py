"""What is in a Keras file, down to the last attribute, for comparison with what stock Keras wrote."""

from __future__ import annotations

import io
import json
import re
import zipfile
from pathlib import Path
from typing import Any

import h5py
import numpy as np

Contents = dict[str, Any]  # by path: a group's attributes, or a dataset's dtype, shape, bytes and attributes


def read_hdf5(file: Path | io.BytesIO) -> Contents:
    contents: Contents = {}

    def visit(path: str, node: Any) -> None:  # a group or dataset of h5py
        attributes = {name: np.asarray(value).tolist() for name, value in node.attrs.items()}
        if isinstance(node, h5py.Dataset):
            value = np.asarray(node[()])
            contents[path] = (str(node.dtype), node.shape, value.tobytes(), attributes)
        else:
            contents[path] = attributes

    with h5py.File(file) as opened:
        visit("/", opened)
        opened.visititems(visit)
    return contents


def read_archive(path: Path) -> Contents:
    """The members of a `.keras` file in their order; without the date, which differs."""
    contents: Contents = {}
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        for member in archive.infolist():
            content = archive.read(member)
            assert (member.compress_type, member.file_size) == (zipfile.ZIP_STORED, len(content))
            contents[member.filename] = _read_member(member.filename, content)
    return contents


def _read_member(name: str, content: bytes) -> Any:
    if name == "model.weights.h5":
        return read_hdf5(io.BytesIO(content))
    if name == "metadata.json":
        metadata = json.loads(content)
        assert len(metadata.pop("date_saved")) == len("2026-01-01@00:00:00")
        return metadata
    return json.loads(_number_shared_objects(content.decode())) if name == "config.json" else content


def _number_shared_objects(config: str) -> str:
    """Counts the ids of shared objects, which Keras takes from their addresses."""
    numbers: dict[str, int] = {}
    pattern = r'(?<="shared_object_id": )\d+'
    return re.sub(pattern, lambda found: str(numbers.setdefault(found[0], len(numbers))), config)


def read_file(path: Path) -> Contents:
    return read_archive(path) if path.suffix == ".keras" else read_hdf5(path)


def assert_same(actual: Contents, expected: Contents) -> None:
    assert list(actual) == list(expected)
    differing = [path for path in expected if actual[path] != expected[path]]
    assert not differing, [(path, actual[path], expected[path]) for path in differing][:3]


def read_files(root: Path) -> dict[str, Any]:
    """Returns what is in each file below a directory; only that there are events of TensorBoard, which hold times."""
    files: dict[str, Any] = {}
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        name = str(path.relative_to(root))
        if "tfevents" in name:
            files[str(Path(name).parent / "events")] = None
        else:
            files[name] = read_file(path) if path.suffix in {".keras", ".h5"} else path.read_bytes()
    return files


def assert_same_files(ours: Path, stock: Path) -> None:
    """Compares two directories, file by file."""
    actual, expected = read_files(ours), read_files(stock)
    assert list(actual) == list(expected)
    for name, contents in expected.items():
        if isinstance(contents, dict):
            assert_same(actual[name], contents)
        else:
            assert actual[name] == contents, name
