"""The metadata of an HDF5 file whose arrays are put in by hand, as h5py reads the result."""

from __future__ import annotations

import io

import h5py
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offstep.formats.hdf5_skeleton import Dataset, make_skeleton

DTYPES = ("float32", "float64", "float16", "bfloat16", "int8", "uint8", "int64", "uint32", "bool", "complex64")


def dtype_of(name: str) -> np.dtype:
    return np.dtype(getattr(ml_dtypes, name, name))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=3)), max_size=30),
    st.integers(0, 5000),
)
def test_every_array_is_read_from_where_it_was_put(arrays: list[tuple[str, list[int]]], spare_bytes: int) -> None:
    datasets, body = [], b""
    for number, (dtype, shape) in enumerate(arrays):
        body += b"\xee" * 5
        datasets.append(Dataset(f"layers/layer_{number // 3}/vars/{number}", tuple(shape), dtype, len(body)))
        body += random_bytes(datasets[-1], number)
    skeleton = make_skeleton(datasets, {})
    data_at = len(skeleton.image) + spare_bytes
    content = skeleton.encode(data_at=data_at, data_bytes=len(body)) + body
    with h5py.File(io.BytesIO(content + b"what follows")) as file:
        for number, dataset in enumerate(datasets):
            read = file[dataset.path]
            assert (read.shape, read[()].tobytes()) == (dataset.shape, random_bytes(dataset, number))
            assert dict(read.attrs) == ({"dtype": "bfloat16"} if dataset.dtype == "bfloat16" else {})
            assert read.id.get_offset() in (None, data_at + dataset.offset)


def random_bytes(dataset: Dataset, seed: int) -> bytes:
    count = int(np.prod(dataset.shape, dtype=int))
    if dataset.dtype == "bool":
        return (np.random.default_rng(seed).random(count) < 0.5).tobytes()
    return np.random.default_rng(seed).bytes(count * dtype_of(dataset.dtype).itemsize)


def test_groups_have_their_attributes_also_when_they_hold_no_array() -> None:
    groups = {"layers/dense/vars": {"name": "dense_7"}, "layers/flatten/vars": {"name": "ebene_ü"}, "vars": {}}
    skeleton = make_skeleton([Dataset("layers/dense/vars/0", (2,), "float32", 0)], groups)
    with h5py.File(io.BytesIO(skeleton.encode(data_at=16384, data_bytes=8) + bytes(8))) as file:
        assert {path: dict(file[path].attrs) for path in groups} == groups


def test_a_file_of_two_thousand_arrays_is_made_once_and_read_back() -> None:
    datasets = [Dataset(f"layers/dense_{n}/vars/0", (3,), "float32", 12 * n) for n in range(2000)]
    values = np.arange(6000, dtype=np.float32)
    skeleton = make_skeleton(datasets, {})
    head = skeleton.encode(data_at=len(skeleton.image), data_bytes=values.nbytes)
    with h5py.File(io.BytesIO(head + values.tobytes())) as file:
        assert np.array_equal(np.concatenate([file[dataset.path][()] for dataset in datasets]), values)


def test_too_little_room_for_the_metadata_is_refused() -> None:
    skeleton = make_skeleton([Dataset("a", (1,), "float32", 0)], {})
    with pytest.raises(ValueError, match="the metadata take"):
        skeleton.encode(data_at=100, data_bytes=4)
