"""The metadata of HDF5 files read without h5py: what h5py finds, or the word that h5py has to be asked."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import h5py
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offstep.formats.hdf5_index import Dataset, UnknownLayout, list_datasets
from offstep.formats.keras_reader import KerasReader
from offstep.stored import Region

File = Any  # of h5py


def write(path: Path, **options: Any) -> Path:
    """Writes all that Keras writes, and so many members that a group has several nodes."""
    with h5py.File(path, "w", **options) as file:
        for number in range(400):
            file[f"layers/dense_{number}/vars/0"] = np.full((2, 3), number, np.float32)
        for number, dtype in enumerate(("f4", "f8", ">f4", "i4", "u1", "?", "f2", "c8")):
            file[f"layers/kinds/vars/{number}"] = np.arange(4).astype(dtype)
        file["layers/kinds"].attrs["name"] = "kinds"
        file["optimizer/vars/0"] = np.int32(7)
        file["empty"] = np.zeros((0, 3), np.float32)
        file.create_dataset("never", (3,), "f4")
        brief = file.create_dataset("brief", data=np.arange(3).astype(ml_dtypes.bfloat16).view("V2"))
        brief.attrs["dtype"] = "bfloat16"
        file.create_group("a group without any")
        file["the same"] = file["layers/dense_3/vars/0"]
    return path


def index(path: Path) -> dict[str, Dataset]:
    with path.open("rb") as file:
        return list_datasets(file.fileno(), 0, os.fstat(file.fileno()).st_size)


def test_it_finds_what_h5py_finds(tmp_path: Path) -> None:
    path = write(tmp_path / "m.weights.h5")
    found = index(path)
    expected = {}
    with h5py.File(path) as file:

        def visit(name: str, node: Any) -> None:
            if isinstance(node, h5py.Dataset):
                expected[name] = (node.shape, node.id.get_offset(), node.dtype.itemsize)

        file.visititems(visit)
        expected["the same"] = expected["layers/dense_3/vars/0"]
    assert {name: found[name][:3] for name in found} == expected
    assert found["layers/kinds/vars/0"].kind != found["layers/kinds/vars/2"].kind


def test_values_are_those_that_h5py_reads(tmp_path: Path) -> None:
    path = write(tmp_path / "m.weights.h5")
    reader = KerasReader(path)
    leaves = reader.contents.leaves
    values = dict(zip(leaves, reader.read([Region(leaf) for leaf in leaves], 1), strict=True))
    with h5py.File(path) as file:
        for leaf, value in values.items():
            host = np.asarray(file[leaf.name])
            wanted = (
                host.view(ml_dtypes.bfloat16) if leaf.dtype == "bfloat16" else host.astype(host.dtype.newbyteorder("="))
            )
            assert (value.dtype, value.shape, value.tobytes()) == (wanted.dtype, wanted.shape, wanted.tobytes())
    reader.close()
    assert len(leaves) == 413


STRANGE: dict[str, Callable[[File], Any]] = {
    "a compressed dataset": lambda file: file.create_dataset("x", data=np.ones(9), compression="gzip"),
    "a dataset in chunks": lambda file: file.create_dataset("x", data=np.ones(9), chunks=(3,)),
    "a link": lambda file: file.__setitem__("x", h5py.SoftLink("/w")),
    "a link out of the file": lambda file: file.__setitem__("x", h5py.ExternalLink("other.h5", "/w")),
    "a type with a name": lambda file: file.__setitem__("x", np.dtype("f4")),
    "a group in itself": lambda file: file.__setitem__("group/x", file["group"]),
    "a group in the order of its making": lambda file: file.create_group("x", track_order=True),
    "values elsewhere": lambda file: file.create_dataset("x", (3,), "f4", external=[("x.bin", 0, 12)]),
}


@pytest.mark.parametrize("make", STRANGE.values(), ids=STRANGE.keys())
def test_what_it_does_not_know_is_left_to_h5py(make: Callable[[File], Any], tmp_path: Path) -> None:
    path = tmp_path / "m.weights.h5"
    with h5py.File(path, "w") as file:
        file["w"] = np.ones(3)
        file.create_group("group")
        make(file)
    with pytest.raises(UnknownLayout):
        index(path)


@pytest.mark.parametrize("options", [{"libver": "latest"}, {"userblock_size": 512}], ids=str)
def test_other_versions_of_the_format_are_left_to_h5py(options: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "m.weights.h5", **options)
    with pytest.raises(UnknownLayout):
        index(path)
    reader = KerasReader(path)
    assert len(reader.contents.leaves) == 413
    assert reader.read([Region(leaf) for leaf in reader.contents.leaves if leaf.name == "optimizer/vars/0"], 1)[0] == 7
    reader.close()


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_damage_is_left_to_h5py_or_is_not_in_the_metadata(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.weights.h5"
    with h5py.File(path, "w") as file:
        for number in range(12):
            file[f"layer_{number}/vars/0"] = np.ones((2, 3), np.float32)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(len(content) // 2, len(content)))])
    with suppress(UnknownLayout):
        assert all(len(dataset.shape) <= 32 for dataset in index(path).values())
