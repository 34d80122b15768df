from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from offstep import CheckpointDamaged, attachments

leaves = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.binary())
values = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner), st.dictionaries(st.one_of(st.text(), st.integers()), inner), st.tuples(inner, inner)
    ),
)


def write(path: Path, value: Any) -> Path:
    attachment = attachments.pack(value)
    path.write_bytes(os.pread(attachment.fd, attachment.size_bytes, 0))
    return path


@given(value=values)
def test_what_is_packed_comes_back(tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
    path = write(tmp_path_factory.mktemp("packed") / "extra", value)
    assert attachments.is_same(attachments.read(path), value)


def test_arrays_and_long_lists_come_back_with_their_kind(tmp_path: Path) -> None:
    value = {
        "bf16": np.arange(7, dtype=ml_dtypes.bfloat16).reshape(7, 1),
        "empty": np.zeros((0, 3), "float32"),
        "rank 0": np.array(2.5),
        "scalar": np.float32(0.1),
        "strided": np.arange(10)[::3],
        "big-endian": np.arange(3, dtype=">i4"),
        "integers": list(range(1000)),
        "floats": [float("nan"), *map(float, range(1000))],
        "beyond 64 bits": [1 << 70] * 100,
        "pair": (1, [2.0, None]),
    }
    back = attachments.read(write(tmp_path / "extra", value))
    value["big-endian"] = np.arange(3, dtype="<i4")
    assert attachments.is_same(back, value)


@pytest.mark.parametrize("value", [object(), {1, 2}, np.array(["text"]), np.array([None]), lambda: 0, [1, object()]])
def test_anything_else_is_refused(value: Any) -> None:
    assert not attachments.is_packable(value)
    with pytest.raises(TypeError, match="cannot be kept with a checkpoint"):
        attachments.pack(value)


@pytest.mark.parametrize("offset", [0, 9, 17, 30, -1])
def test_a_flipped_bit_is_found(tmp_path: Path, offset: int) -> None:
    path = write(tmp_path / "extra", {"a": np.arange(1000)})
    data = bytearray(path.read_bytes().rstrip(b"\0"))
    data[offset] ^= 4
    path.write_bytes(data)
    with pytest.raises(CheckpointDamaged, match=r"checksum .* is wrong|cut off"):
        attachments.read(path)


def test_equal_means_bit_for_bit() -> None:
    assert attachments.is_same({"a": [float("nan"), (1, 2)]}, {"a": [float("nan"), (1, 2)]})
    assert not attachments.is_same(1, 1.0)
    assert not attachments.is_same([1, 2], (1, 2))
    assert not attachments.is_same(np.float32(1), np.float64(1))
    assert not attachments.is_same(np.zeros(2), np.zeros(3))
