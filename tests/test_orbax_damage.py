"""What bit rot and torn files do to a directory of ours: stock readers refuse it, or nothing has changed."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from orbax.checkpoint.experimental import v1
from slots import Tree, assert_same, example_arrays, nest, open_zarr, save_arrays


@pytest.fixture
def damage() -> Iterator[None]:
    """Orbax leaves coroutines behind when a restore fails; they complain when they are collected."""
    yield
    gc.collect()


may_leave_coroutines = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def small_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_arrays(tmp_path_factory.mktemp("small"), 1, example_arrays())


@may_leave_coroutines
@pytest.mark.usefixtures("damage")
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_flipped_bit_changes_no_value_silently(small_checkpoint: Path, data: st.DataObject) -> None:
    files = sorted(path for path in (small_checkpoint / "pytree").rglob("*") if path.is_file())
    path = data.draw(st.sampled_from(files))
    original = path.read_bytes()
    bit = data.draw(st.integers(0, 8 * len(original) - 1))
    path.write_bytes(flip(original, bit))
    restored = try_to_restore(small_checkpoint)
    path.write_bytes(original)
    if restored is not None:
        assert_same(restored, nest(example_arrays()))


def flip(content: bytes, bit: int) -> bytes:
    flipped = bytearray(content)
    flipped[bit // 8] ^= 1 << bit % 8
    return bytes(flipped)


def try_to_restore(step: Path) -> Tree | None:
    try:
        return v1.load(step, checkpointable_name="pytree")
    except Exception:  # noqa: BLE001 (Orbax raises a bare Exception for an array that it cannot read)
        return None


def test_every_flipped_bit_of_a_chunk_is_refused(tmp_path: Path) -> None:
    arrays = {("w",): np.arange(6, dtype=np.int16)}
    step = save_arrays(tmp_path, 1, arrays)
    (path,) = (step / "pytree" / "d").iterdir()
    original = path.read_bytes()
    for bit in range(8 * (12 + 4)):
        path.write_bytes(flip(original, bit))
        with pytest.raises(ValueError, match="Digest mismatch"):
            open_zarr(step / "pytree", "w").read().result()


@may_leave_coroutines
@pytest.mark.usefixtures("damage")
@pytest.mark.parametrize("kept", [0, 1, 100, 4095, 4096, -1])
def test_a_truncated_data_file_is_refused(tmp_path: Path, kept: int) -> None:
    step = save_arrays(tmp_path, 1, example_arrays())
    (path,) = (step / "pytree" / "d").iterdir()
    path.write_bytes(path.read_bytes()[:kept])
    assert try_to_restore(step) is None
