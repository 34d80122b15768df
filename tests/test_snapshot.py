"""From device memory into a slot: bit for bit, for every dtype and sharding, while the state is donated and stepped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import interpreters
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from slots import all_readers, assert_same

from offstep import _native
from offstep.arrays import describe_leaf
from offstep.buffers import SlotPool
from offstep.checkpointer import Checkpointer
from offstep.errors import StructureMismatch, UnsupportedLeaf
from offstep.plans import make_plan
from offstep.snapshot import Mode, Snapshotter, has_room

pytestmark = pytest.mark.usefixtures("one_writer")

MODES: tuple[Mode, ...] = ("host", "device_copy", "transfer")
all_modes = pytest.mark.parametrize("mode", MODES)


def snapshotter_of(arrays: list[Any], mode: Mode | None = "host") -> Snapshotter:
    leaves = [describe_leaf((f"leaf{number}",), array) for number, array in enumerate(arrays)]
    return Snapshotter(make_plan(leaves), arrays, mode=mode)


def random_bits(dtype: Any, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Returns an array of all kinds of bit patterns, NaNs with a payload and subnormals among them."""
    dtype = np.dtype(dtype)
    content = np.random.default_rng(seed).integers(0, 256, int(np.prod(shape)) * dtype.itemsize, np.uint8)
    if dtype.kind == "b":
        content &= 1
    if dtype.name in ("int4", "uint4"):
        return (content % 8).astype(dtype).reshape(shape)
    return content.view(dtype).reshape(shape)


# ------------------------------------------------------------------------------------------------------ dtypes

NARROW = (
    *("float32", "bfloat16", "float16", "int8", "int16", "int32", "uint8", "uint16", "uint32", "bool", "complex64"),
    *("int4", "float8_e4m3fn", "float8_e5m2"),
)
SHAPES = ((), (1,), (7,), (3, 5), (2, 3, 4))


@all_modes
@pytest.mark.parametrize("in_process", [False, True])
def test_jax_arrays_of_all_dtypes_come_back_bit_for_bit(tmp_path: Path, mode: Mode, in_process: bool) -> None:
    tree = {
        f"{name}-{len(shape)}": jnp.asarray(random_bits(getattr(ml_dtypes, name, name), shape, seed))
        for seed, (name, shape) in enumerate((name, shape) for name in NARROW for shape in SHAPES)
    }
    with Checkpointer(tmp_path, snapshot_mode=mode, in_process=in_process) as checkpointer:
        checkpointer.save(1, tree)
        checkpointer.wait()
        assert_same(checkpointer.restore(1, tree), tree)


@all_modes
def test_numpy_arrays_of_all_dtypes_and_orders_come_back_bit_for_bit(tmp_path: Path, mode: Mode) -> None:
    tree = {
        name: random_bits(getattr(ml_dtypes, name, name), (3, 5))
        for name in (*NARROW, "float64", "int64", "complex128")
    }
    tree["scalar"] = np.array(3.5)
    tree["fortran"] = np.asfortranarray(tree["float32"])
    tree["strided"] = tree["int64"][::2, ::-1]
    tree["read only"] = np.broadcast_to(np.arange(4), (3, 4))
    with Checkpointer(tmp_path, snapshot_mode=mode) as checkpointer:
        checkpointer.save(1, tree)
        checkpointer.wait()
        restored = checkpointer.restore(1, tree)
    assert_same(restored, {name: np.ascontiguousarray(array) if array.ndim else array for name, array in tree.items()})


@all_modes
def test_a_big_endian_array_is_stored_by_its_values(tmp_path: Path, mode: Mode) -> None:
    """It was once stored as if its bytes were in this machine's order."""
    tree = {"w": np.arange(5, dtype=">f4"), "n": np.array(258, ">i8")}
    with Checkpointer(tmp_path, snapshot_mode=mode) as checkpointer:
        checkpointer.save(1, tree)
        checkpointer.wait()
        restored = checkpointer.restore(1)
    assert np.asarray(restored["w"]).tolist() == [0, 1, 2, 3, 4]
    assert int(restored["n"]) == 258


@all_modes
def test_python_numbers_come_back(tmp_path: Path, mode: Mode) -> None:
    tree = {"int": -3, "float": 0.1, "bool": True, "np": np.float32(2.5), "np64": np.int64(7)}
    with Checkpointer(tmp_path, snapshot_mode=mode) as checkpointer:
        checkpointer.save(1, tree)
        checkpointer.save(2, tree | {"int": 4})
        checkpointer.wait()
        restored, later = checkpointer.restore(1), checkpointer.restore(2)
    assert {name: float(value) for name, value in restored.items()} == {name: float(v) for name, v in tree.items()}
    assert later["int"] == 4


@all_modes
@pytest.mark.parametrize("grown", [2**63, 2**70])
def test_a_python_number_that_outgrew_its_dtype_is_an_error(tmp_path: Path, mode: Mode, grown: int) -> None:
    """It once wrapped, or an address was stored in its place."""
    with Checkpointer(tmp_path, snapshot_mode=mode) as checkpointer:
        checkpointer.save(1, {"n": 1})
        with pytest.raises(OverflowError):
            checkpointer.save(2, {"n": grown})
        checkpointer.save(3, {"n": 3})
    assert checkpointer.all_steps() == [1, 3]


@all_modes
def test_keys_of_a_random_generator_come_back_as_keys(tmp_path: Path, mode: Mode) -> None:
    tree = {
        "typed": jax.random.key(3),
        "batch": jax.random.split(jax.random.key(4), 5),
        "rbg": jax.random.key(5, impl="rbg"),
        "raw": jax.random.PRNGKey(6),
    }
    with Checkpointer(tmp_path, snapshot_mode=mode) as checkpointer:
        checkpointer.save(1, tree)
        checkpointer.wait()
        restored = checkpointer.restore(1)
    for name, key in tree.items():
        assert restored[name].dtype == key.dtype
        assert restored[name].shape == key.shape
        if name != "raw":
            assert str(jax.random.key_impl(restored[name])) == str(jax.random.key_impl(key))
            key, restored[name] = jax.random.key_data(key), jax.random.key_data(restored[name])  # noqa: PLW2901
        assert np.array_equal(key, restored[name])


NO_NUMBERS = ("text", b"bytes", object(), np.array(["a"]), np.array([object()]), np.zeros(2, "datetime64[s]"), 2**70)


@pytest.mark.parametrize("value", NO_NUMBERS, ids=lambda value: type(value).__name__)
def test_what_is_no_array_of_numbers_is_refused_with_its_path(tmp_path: Path, value: object) -> None:
    with Checkpointer(tmp_path) as checkpointer:
        with pytest.raises(UnsupportedLeaf, match=r"^layer\.0\.w: .*Received: "):
            checkpointer.save(1, {"layer": [{"w": value}]})
        checkpointer.save(2, {"layer": [{"w": 1.0}]})
    assert checkpointer.all_steps() == [2]


@pytest.mark.parametrize("dtype", ["uint4", "uint2", "float8_e4m3"])
def test_a_dtype_that_orbax_cannot_restore_is_refused_when_it_is_saved(tmp_path: Path, dtype: str) -> None:
    values = np.zeros(3, getattr(ml_dtypes, dtype))
    text = rf"^w: stock Orbax cannot restore {dtype}"
    with Checkpointer(tmp_path) as checkpointer, pytest.raises(UnsupportedLeaf, match=text):
        checkpointer.save(1, {"w": values})


def test_a_traced_array_is_refused(tmp_path: Path) -> None:
    with Checkpointer(tmp_path) as checkpointer:

        @jax.jit
        def step(x: jax.Array) -> jax.Array:
            checkpointer.save(1, {"w": x})
            return x

        with pytest.raises(UnsupportedLeaf, match=r"^w: it is being traced; save outside"):
            step(jnp.ones(3))


# ---------------------------------------------------------------------------------------- donation and snapshots


@partial(jax.jit, donate_argnums=0)
def advance(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf + 1, tree)


@all_modes
def test_a_state_that_is_donated_right_after_the_save_is_stored_as_it_was(tmp_path: Path, mode: Mode) -> None:
    tree = {"large": jnp.zeros((1000, 1000)), "small": jnp.zeros(3), "scalar": jnp.zeros((), jnp.int32)}
    with Checkpointer(tmp_path, snapshot_mode=mode) as checkpointer:
        for step in range(1, 11):
            tree = advance(tree)
            checkpointer.save(step, tree)
        tree = advance(advance(tree))
        checkpointer.wait()
        for step in range(1, 11):
            restored = checkpointer.restore(step)
            assert {float(value) for leaf in restored.values() for value in np.unique(leaf)} == {step}


@all_modes
def test_numpy_leaves_may_be_changed_as_soon_as_save_returns(tmp_path: Path, mode: Mode) -> None:
    values = np.zeros(1_000_000, np.int32)
    with Checkpointer(tmp_path, snapshot_mode=mode) as checkpointer:
        for step in (1, 2, 3):
            values[:] = step
            checkpointer.save(step, {"w": values})
            values[:] = -1
        checkpointer.wait()
        for step in (1, 2, 3):
            assert (np.asarray(checkpointer.restore(step)["w"]) == step).all()


@pytest.mark.parametrize("mode", ["host", "transfer"])
def test_donation_is_not_refused_because_of_a_snapshot(mode: Mode) -> None:
    """A NumPy view that outlives the call makes XLA copy the state in the next step."""
    tree = [jnp.zeros(1000), jnp.zeros((100, 100))]
    snapshotter = snapshotter_of(tree, mode)
    pool = SlotPool(snapshotter.plan.slot_bytes, 1)
    slot = pool.slots[0]
    snapshotter.take(tree, slot)
    addresses = [leaf.unsafe_buffer_pointer() for leaf in tree]
    stepped = advance(tree)
    assert all(leaf.is_deleted() for leaf in tree)
    assert [leaf.unsafe_buffer_pointer() for leaf in stepped] == addresses
    pool.close()


def test_a_copy_on_the_device_shares_no_memory_with_the_state() -> None:
    tree = [jnp.zeros(1000), jnp.zeros((100, 100)), jnp.zeros(())]
    private = snapshotter_of(tree, "device_copy").copy_on_device(tree)
    assert not {leaf.unsafe_buffer_pointer() for leaf in tree} & {leaf.unsafe_buffer_pointer() for leaf in private}
    advance(tree)
    assert not any(leaf.is_deleted() for leaf in private)


def test_a_copy_on_the_device_waits_for_nothing(tmp_path: Path) -> None:
    state = {"w": jnp.zeros(1000), "b": jnp.zeros(3)}
    compute = jax.jit(lambda w: jax.lax.fori_loop(0, 300_000, lambda _, x: jnp.sin(x) + 1, w))  # a few seconds
    compiled = compute.lower(state["w"]).compile()
    with Checkpointer(tmp_path, snapshot_mode="device_copy") as checkpointer:
        checkpointer.save(1, state)  # compiles the copy
        state["w"] = compiled(state["w"])
        checkpointer.save(2, state)
        assert not state["w"].is_ready()
        checkpointer.wait()
        assert np.array_equal(checkpointer.restore(2)["w"], state["w"])


def test_no_copy_on_the_host_stays_with_live_arrays(tmp_path: Path) -> None:
    state = {"w": jnp.zeros(1000), "key": jax.random.key(0), "packed": jnp.zeros(8, jnp.int4)}
    with Checkpointer(tmp_path, snapshot_mode="transfer") as checkpointer:
        checkpointer.save(1, state)
        # Where JAX keeps what it has brought to the host; `key_data` is an array over the same memory each time.
        assert [getattr(array, "_npy_value", None) for array in state.values()] == [None] * 3
        assert jax.random.key_data(state["key"])._npy_value is None


def test_leaves_that_exceed_what_is_in_transfer_at_once_all_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offstep.snapshot._IN_TRANSFER_BYTES", 1000)
    tree = [jnp.full(size, size, jnp.float32) for size in (1, 100, 1000, 10, 2, 500, 3)]
    for mode in ("transfer", "device_copy"):
        snapshotter = snapshotter_of(tree, mode)
        pool = SlotPool(snapshotter.plan.slot_bytes, 1)
        slot = pool.slots[0]
        if mode == "transfer":
            snapshotter.take(tree, slot)
        else:
            private = snapshotter.copy_on_device(tree)
            snapshotter.fetch(private, slot)
            assert private == [None] * len(tree)
        for layout, array in zip(snapshotter.plan.leaves, tree, strict=True):
            found = np.frombuffer(slot.buffer, np.float32, array.size, layout.offset)
            assert (found == array.size).all()
            del found
        pool.close()


@all_modes
@pytest.mark.parametrize("how", ["deleted", "donated"])
def test_a_state_that_no_longer_exists_is_a_clear_error(tmp_path: Path, mode: Mode, how: str) -> None:
    tree = {"w": jnp.ones(1000), "b": jnp.ones(3)}
    with Checkpointer(tmp_path, snapshot_mode=mode, slots=1) as checkpointer:
        checkpointer.save(1, tree)
        if how == "deleted":
            tree["b"].delete()
        else:
            advance(tree)
        for _ in range(3):  # its slot must come back each time
            with pytest.raises(StructureMismatch, match=r"cannot be read .* was an array of it donated"):
                checkpointer.save(2, tree)
        checkpointer.save(3, {"w": jnp.ones(1000), "b": jnp.ones(3)})
    assert checkpointer.all_steps() == [1, 3]


def train_and_check_for_tears(directory: Path, mode: Mode, steps: int) -> None:
    tree = {f"leaf{number:02}": jnp.zeros((20_000 + number,)) for number in range(50)}  # 4 MB
    with Checkpointer(directory, snapshot_mode=mode, slots=3) as checkpointer:
        for step in range(1, steps + 1):
            tree = advance(tree)
            checkpointer.save(step, tree)
            if step % 20 == 0:
                check_and_delete(checkpointer, step)
        checkpointer.wait()
        check_and_delete(checkpointer, steps + 1)
    assert checkpointer.counts.durable == steps


def check_and_delete(checkpointer: Checkpointer, below: int) -> None:
    from offstep import commit

    for step in checkpointer.all_steps():
        if step < below - 10:
            assert_holds_one_step(checkpointer.directory / str(step), step)
            commit.remove_directory(checkpointer.directory / str(step))


def assert_holds_one_step(checkpoint: Path, step: int) -> None:
    from orbax.checkpoint import v1 as ocp

    restored = ocp.load(checkpoint, checkpointable_name="pytree")
    assert len(restored) == 50
    assert {float(leaf.min()) for leaf in restored.values()} == {step}
    assert {float(leaf.max()) for leaf in restored.values()} == {step}


@pytest.mark.parametrize(
    ("mode", "steps"),
    [
        ("host", 30),
        ("device_copy", 30),
        ("transfer", 15),
        pytest.param("host", 300, marks=pytest.mark.campaign),
        pytest.param("device_copy", 300, marks=pytest.mark.campaign),
        pytest.param("transfer", 300, marks=pytest.mark.campaign),
    ],
)
def test_every_checkpoint_taken_while_training_goes_on_holds_exactly_one_step(
    tmp_path: Path, mode: Mode, steps: int
) -> None:
    train_and_check_for_tears(tmp_path, mode, steps)


# ---------------------------------------------------------------------------------------------------- structure


@pytest.mark.parametrize(
    "changed",
    [
        [jnp.zeros((3, 4)), jnp.zeros(3)],
        [jnp.zeros((4, 3)), jnp.zeros(3, jnp.bfloat16)],
        [jnp.zeros((4, 3))],
        [jnp.zeros((4, 3)), jnp.zeros(3), jnp.zeros(3)],
        [jnp.zeros((4, 3)), np.zeros(3, np.float32)],
        [jnp.zeros((4, 3)), 1.0],
    ],
    ids=["shape", "dtype", "fewer", "more", "numpy", "number"],
)
def test_a_changed_structure_does_not_match(changed: list[Any]) -> None:
    arrays = [jnp.zeros((4, 3)), jnp.zeros(3)]
    snapshotter = snapshotter_of(arrays)
    assert snapshotter.matches([jnp.ones((4, 3)), jnp.ones(3)])
    assert not snapshotter.matches(changed)


def test_the_type_of_a_python_number_is_part_of_the_structure() -> None:
    snapshotter = snapshotter_of([1, 2.0, True])
    assert snapshotter.matches([5, 7.0, False])
    assert not snapshotter.matches([5.0, 7.0, False])
    assert not snapshotter.matches([5, 7.0, 1])


def test_a_jax_array_that_became_a_numpy_array_is_saved_all_the_same(tmp_path: Path) -> None:
    """It once met a table made for the other kind, in both directions."""
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"w": jnp.full(3, 1.0)})
        checkpointer.save(2, {"w": np.full(3, 2, np.float32)})
        checkpointer.save(3, {"w": jnp.full(3, 3.0)})
        checkpointer.wait()
        for step in (1, 2, 3):
            assert (np.asarray(checkpointer.restore(step)["w"]) == step).all()


def test_cpu_arrays_and_host_values_are_read_on_the_host() -> None:
    for arrays in ([jnp.ones(3), np.ones(3), 1.0], [1.0]):
        assert snapshotter_of(arrays, None).settle_mode(arrays) == "host"


def test_a_copy_on_the_device_needs_room_for_it_beside_what_training_needs() -> None:
    arrays = [jnp.ones(1000), jnp.ones((10, 100), jnp.bfloat16), jax.random.key(0), np.ones(1000), 1.0]
    state_bytes = 4000 + 2000 + 8
    limit = 10 * state_bytes
    enough, too_much = limit - int(1.1 * state_bytes) - 1, limit - int(1.1 * state_bytes) + 1
    for stats, expected in (
        ({"bytes_limit": limit, "bytes_in_use": enough}, True),
        ({"bytes_limit": limit, "bytes_in_use": too_much}, False),
        ({"bytes_limit": limit, "bytes_in_use": 0, "peak_bytes_in_use": too_much}, False),
        ({"bytes_limit": limit}, True),
        ({"bytes_in_use": too_much}, True),
        ({}, True),
        (None, True),
    ):
        assert has_room(arrays, lambda device, stats=stats: stats) == expected, stats


def test_the_device_with_the_least_room_decides() -> None:
    """In a process of its own: it needs several devices."""
    code = """
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from offstep.snapshot import has_room
mesh = jax.make_mesh((4,), ("x",))
split = jax.device_put(np.ones((8, 100), np.float32), NamedSharding(mesh, P("x")))
whole = jax.device_put(np.ones(100, np.float32), NamedSharding(mesh, P()))
asked = []
def stats(device, used):
    asked.append(device)
    return {"bytes_limit": 10_000, "bytes_in_use": used.get(device.id, 0)}
needed = 1.1 * (800 + 400)
assert has_room([split, whole], lambda device: stats(device, {}))
assert len(asked) == 4
assert has_room([split, whole], lambda device: stats(device, {3: 10_000 - needed - 1}))
assert not has_room([split, whole], lambda device: stats(device, {3: 10_000 - needed + 1}))
"""
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    ended = interpreters.run(["-c", code], env=environment, timeout=100)
    assert ended.returncode == 0, ended.stderr


def test_an_array_in_column_major_order_is_stored_by_its_values(tmp_path: Path) -> None:
    from jax.experimental.layout import Format, Layout

    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    array = jax.device_put(values, Format(Layout(major_to_minor=(1, 0)), sharding))
    if array.format.layout.major_to_minor != (1, 0):
        pytest.skip("this backend keeps arrays in one order only")
    for step, mode in enumerate(MODES):
        with Checkpointer(tmp_path, snapshot_mode=mode) as checkpointer:
            checkpointer.save(step, {"w": array})
            checkpointer.wait()
            assert_same(checkpointer.restore(step), {"w": values})


@all_readers
def test_stock_readers_restore_what_was_saved(tmp_path: Path, read: Any) -> None:
    tree = {"layers": [{"w": jnp.arange(6.0).reshape(2, 3)}, {"w": jnp.ones(3, jnp.bfloat16)}], "n": jnp.int32(3)}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(5, tree)
    assert_same(read(tmp_path, 5), tree)


# ------------------------------------------------------------------------------- what needs a process of its own


def test_arrays_of_eight_bytes_come_back_bit_for_bit(tmp_path: Path) -> None:
    command = [sys.executable, Path(__file__).with_name("run_x64.py"), tmp_path]
    environment = os.environ | {"JAX_ENABLE_X64": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report == {"float64": True, "int64": True, "uint64": True, "complex128": True}


def test_sharded_arrays_are_stored_once_and_restored_with_any_sharding(tmp_path: Path) -> None:
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    done = interpreters.run([Path(__file__).with_name("run_sharded.py"), tmp_path], env=environment)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report.pop("bytes") == report.pop("expected bytes")
    assert report
    assert {name: is_fine for name, is_fine in report.items() if is_fine is not True} == {}


def test_the_native_table_refuses_a_source_that_is_not_there() -> None:
    snapshotter = snapshotter_of([jnp.ones(3), jnp.ones(4)])
    with pytest.raises(ValueError, match="source"):
        _native.gather([jnp.ones(3).unsafe_buffer_pointer()], snapshotter._table.data, bytearray(4096), 1)
