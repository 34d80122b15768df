"""The frozen records that the layers hand to each other."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from offstep.stores.address import Address, Place

PathKey = str | int
"""One step of a leaf's path: a `str` is a dict key, an `int` a sequence index."""

CRC_BYTES = 4

NO_SLOT = 0
"""In the place of a slot's number: the job needs none."""


@dataclass(frozen=True)
class Leaf:
    """One array of the state, as the checkpoint will name and shape it.

    Attributes:
        path: Keys from the root of the tree to this leaf, e.g. `("trainable_variables", "d1", "kernel")`.
        shape: Global shape.
        dtype: NumPy (or ml_dtypes) name, e.g. `"float32"`, `"bfloat16"`.
        value_type: What Orbax calls it: `"jax.Array"`, `"np.ndarray"` or `"scalar"`.
        shard_shape: Shape of one shard; equal to `shape` when the leaf is not sharded.
        sharding: Text that Orbax keeps in `_sharding` for this leaf; `None` for host arrays.
        prng_impl: Name of the PRNG implementation of a key array, else `None`.
        is_frozen: Whether it is expected to stay as it is: then a checkpoint may refer to what an earlier one wrote.
    """

    path: tuple[PathKey, ...]
    shape: tuple[int, ...]
    dtype: str
    value_type: str = "jax.Array"
    shard_shape: tuple[int, ...] = ()
    sharding: str | None = None
    prng_impl: str | None = None
    is_frozen: bool = False

    @property
    def name(self) -> str:
        """The path joined by dots, as Orbax names arrays."""
        return ".".join(str(key) for key in self.path)


@dataclass(frozen=True)
class LeafLayout:
    """Where one leaf lies in a slot: equally sized chunks, `stride_bytes` apart.

    The `i`-th of them occupies `chunk_bytes` at `offset + i * stride_bytes`, followed at once by its CRC-32C (4 bytes,
    little-endian). Chunks at the upper edge are padded with zeros to the full chunk shape, as zarr wants it.

    Attributes:
        chunks: Which chunks of the grid are in the slot, in ascending C order; `None` for all of them. Several training
            processes have different ones.
    """

    leaf: Leaf
    chunk_shape: tuple[int, ...]
    grid: tuple[int, ...]
    offset: int
    chunk_bytes: int
    stride_bytes: int
    chunks: tuple[int, ...] | None = None

    @property
    def numbers(self) -> Sequence[int]:
        """Which chunks of the grid (C order) are in the slot."""
        return range(math.prod(self.grid)) if self.chunks is None else self.chunks

    @property
    def chunk_count(self) -> int:
        return len(self.numbers)

    @property
    def end(self) -> int:
        """Offset behind the last chunk and its padding."""
        return self.offset + self.chunk_count * self.stride_bytes

    def chunk_ranges(self) -> Iterator[tuple[int, int]]:
        """Yields (offset, size) for each chunk in the slot with its checksum, in C order over the grid."""
        size = self.chunk_bytes + CRC_BYTES
        for i in range(self.chunk_count):
            yield self.offset + i * self.stride_bytes, size


@dataclass(frozen=True)
class Plan:
    """All leaves of one state and their places in a slot; made once per model.

    Attributes:
        leaves: In the order in which the snapshot reads them.
        slot_bytes: Size of one slot, a multiple of 4096.
        empty_nodes: Paths of empty containers, each with the Orbax name of its type (`"Dict"`, `"List"`, ...).
    """

    leaves: tuple[LeafLayout, ...]
    slot_bytes: int
    empty_nodes: tuple[tuple[tuple[PathKey, ...], str], ...] = ()

    @cached_property
    def state_bytes(self) -> int:
        """Bytes of the arrays themselves, as far as they are in the slot, without padding and checksums."""
        return sum(map(_array_bytes, self.leaves))

    @cached_property
    def frozen_offset(self) -> int:
        """Where in a slot the frozen leaves begin, behind all others; a multiple of 4096."""
        return min((layout.offset for layout in self.leaves if layout.leaf.is_frozen), default=self.slot_bytes)

    def to_json(self) -> dict[str, Any]:  # JSON objects
        """Returns a JSON-ready form, for the writer process."""
        # Not `asdict`, which copies every value: a second for 10,000 leaves.
        leaves = [vars(layout) | {"leaf": vars(layout.leaf)} for layout in self.leaves]
        return {"leaves": leaves, "slot_bytes": self.slot_bytes, "empty_nodes": self.empty_nodes}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Plan:
        """Rebuilds the plan that `to_json` described."""
        layouts = []
        for item in data["leaves"]:
            leaf = Leaf(**_with_tuples(item["leaf"], "path", "shape", "shard_shape"))
            chunks = None if item["chunks"] is None else tuple(item["chunks"])
            places = {"leaf": leaf, "chunks": chunks}
            layouts.append(LeafLayout(**_with_tuples(item, "chunk_shape", "grid") | places))
        empty = tuple((tuple(path), kind) for path, kind in data["empty_nodes"])
        return cls(tuple(layouts), data["slot_bytes"], empty)


def _array_bytes(layout: LeafLayout) -> int:
    if layout.chunks is not None:
        return layout.chunk_count * layout.chunk_bytes  # with the padding, which is little
    return math.prod(layout.leaf.shape) * (layout.chunk_bytes // math.prod(layout.chunk_shape))


def _with_tuples(item: dict[str, Any], *names: str) -> dict[str, Any]:
    """Returns the JSON object with the lists under `names` turned back into tuples."""
    return item | {name: tuple(item[name]) for name in names}


@dataclass(frozen=True)
class Target:
    """Where one checkpoint goes.

    Attributes:
        base: Existing directory, or an address in a store, below which everything happens.
        root: Directory of steps; the checkpoint is `root/<step>`. For a single file, the directory that it is in.
        shown: The path that the user is told.
        keep: How many of the newest steps stay; `None` keeps all.
        replace_all: Whether all other steps of the root go.
        file: The checkpoint itself, where it is a single file.
        siblings: Other files that `keep` counts, oldest first.
        upload: Address of the steps in a store to which the checkpoint is copied once it is durable; `None` for none.
        upload_keep: How many of the newest steps stay there; `None` keeps all.
    """

    base: Place
    root: Place
    shown: str
    keep: int | None = None
    replace_all: bool = False
    file: Place | None = None
    siblings: tuple[str, ...] = ()
    upload: Address | None = None
    upload_keep: int | None = None


@dataclass(frozen=True)
class Job:
    """One checkpoint to write: what the trainer sends to the writer.

    Attributes:
        number: Sequence number within the run, from 1.
        step: Training step; names the checkpoint inside its root.
        format: Key into `formats.FORMATS`.
        target: Final absolute path, or address in a store.
        base: Existing directory below which everything happens; that it vanished is an error. Or an address.
        root: Directory that holds the steps of an Orbax root, or a file (`target`'s parent), made if missing.
        slot: Number of the slot with the snapshot, or `NO_SLOT`.
        plan: Number of the plan that describes the slot.
        tag: Tells the temporary names of this job from all others', so that a second attempt finds what the first left.
        keep: How many of the newest steps of `root` stay; `None` keeps all.
        replace_all: Every other step of `root` goes once this one is durable.
        siblings: Other files that this run has saved by the same template, oldest first; of those that are there, the
            newest `keep - 1` stay.
        file_bytes: Size of the file, where the trainer has made it and the slot holds nothing else.
        manifest: What `offstep.json` shall say beside the files: see `manifest.build`.
        lock: Number of the lock that the run must still have on the target; `None` where there is none.
        ranking: Fields of `retention.Ranking`: which steps stay beside the newest.
        full_every: Each how many saves of a plan its frozen leaves are written anew; `None` only when it must be.
        retry_seconds: How long to try again after a failure that may pass; how long a store may fail altogether.
        private: Nobody but the owner may read the checkpoint.
        key: Tells the save from all others, where several processes make one checkpoint; the same in all of them.
        source: Directory of the durable step to copy. Such a job is done beside saves, at a lower priority.
        busy: Other targets of saves that are on their way: what lies there is no leftover.
        until: When a copy that is not done is given up, by `time.monotonic()`, which is the same in all processes of a
            machine; `None` never.
    """

    number: int
    step: int
    format: str
    target: str
    base: str
    root: str
    slot: int
    plan: int
    tag: str
    keep: int | None = None
    replace_all: bool = False
    siblings: tuple[str, ...] = ()
    file_bytes: int | None = None
    manifest: dict[str, Any] = field(default_factory=dict)  # JSON
    ranking: dict[str, Any] = field(default_factory=dict)  # JSON
    lock: int | None = None
    full_every: int | None = None
    retry_seconds: float = 0.0
    private: bool = False
    source: str = ""
    key: str = ""
    busy: tuple[str, ...] = ()
    until: float | None = None


@dataclass(frozen=True)
class Share:
    """What the writer of one of several processes has written of a checkpoint that they make together.

    Attributes:
        written_bytes: Bytes of all files or objects.
        note: What the process that commits has to know of it; JSON.
    """

    written_bytes: int
    note: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SaveStats:
    """What one save cost.

    Attributes:
        step: Training step.
        path: What the user can load; for a root that holds one step, the root.
        state_bytes: Bytes of state.
        call_seconds: Time in the training thread's hook.
        wait_seconds: The part of `call_seconds` spent waiting for a free slot.
        compute_seconds: The part of `call_seconds` spent waiting until the state was computed: the rest of a training
            step that had been dispatched before the hook was called. That is training, not saving.
        durable_seconds: From the start of the call until the checkpoint was durable; `None` while pending or failed.
        cpu_seconds: CPU time that the writer spent on it; `None` while pending or failed.
        written_bytes: Bytes of all files that were written for it, and not just linked; `None` while pending or failed.
        error: Message of the failure, else `None`.
        skipped: Whether it was skipped or replaced by a newer one, because all slots were on their way.
        write_seconds: The part of `durable_seconds` that the writer spent on it; what is left of it after the call, the
            save has waited for its turn or been brought from a device. `None` while pending or failed.
        retired: Paths of the older checkpoints that went once it was durable.
        retire_seconds: How long that took, after `durable_seconds`.
    """

    step: int
    path: str
    state_bytes: int
    call_seconds: float
    wait_seconds: float
    durable_seconds: float | None = None
    cpu_seconds: float | None = None
    written_bytes: int | None = None
    error: str | None = None
    compute_seconds: float = 0.0
    skipped: bool = False
    write_seconds: float | None = None
    retired: tuple[str, ...] = ()
    retire_seconds: float = 0.0

    @property
    def stall_seconds(self) -> float:
        """How long the training thread waited because of the save: `call_seconds` without `compute_seconds`."""
        return self.call_seconds - self.compute_seconds


@dataclass(frozen=True)
class Problem:
    """Something in a checkpoint that is not as it was written.

    Attributes:
        where: The file, or the leaf with its chunk, relative to the checkpoint.
        expected: What should be there.
        found: What is there.
    """

    where: str
    expected: str
    found: str

    def __str__(self) -> str:
        """Says it in one line."""
        return f"{self.where}: expected {self.expected}, found {self.found}"
