"""Reads arrays of an Orbax item through TensorStore: whatever compression, sharding or container they have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from offstep.errors import CheckpointDamaged
from offstep.formats.image_reader import ChunkedArray
from offstep.host_memory import copy_into
from offstep.stored import Region, StoredLeaf
from offstep.stores.path import Readable, StorePath


class TensorStoreReader:
    """The named arrays of one item.

    Args:
        item: Its directory.
        names: Of the arrays, as Orbax stores them.
        is_zarr3: Whether they are zarr3 rather than zarr.
        is_ocdbt: Whether they lie in an OCDBT database rather than in directories.

    Raises:
        CheckpointDamaged: an array is missing or its description damaged.
    """

    def __init__(self, item: Readable, names: Sequence[str], *, is_zarr3: bool, is_ocdbt: bool) -> None:
        import tensorstore as ts  # most checkpoints are read without it

        # A context of its own, without a cache that outlives the restore.
        context = ts.Context()
        specs = [_spec(item, name, is_zarr3=is_zarr3, is_ocdbt=is_ocdbt) for name in names]
        futures = [ts.open(spec, open=True, read=True, context=context) for spec in specs]
        self._stores = {name: _wait(future, name, item) for name, future in zip(names, futures, strict=True)}
        self.arrays: Mapping[str, ChunkedArray] = {
            name: ChunkedArray(tuple(store.shape), store.dtype.numpy_dtype.name, tuple(store.shape))
            for name, store in self._stores.items()
        }
        self._item = item

    def read(
        self, wanted: Sequence[tuple[str, Region]], threads: int, into: Sequence[np.ndarray] | None = None
    ) -> list[np.ndarray]:
        """Returns regions of the named arrays; see `stored.Reader.read`. TensorStore has threads of its own."""
        futures = []
        for name, region in wanted:
            box = tuple(slice(start, stop) for start, stop in region.box)
            futures.append(self._stores[name][box].read(order="C"))
        found = [
            np.ascontiguousarray(_wait(future, region.leaf.name, self._item)).reshape(region.shape)
            for future, (_, region) in zip(futures, wanted, strict=True)
        ]
        return found if into is None else copy_into(into, found)

    def verify(self, names: Sequence[tuple[str, StoredLeaf]], threads: int) -> None:
        """Reads the named arrays, one after another, since that is how TensorStore checks them."""
        for name, leaf in names:
            _wait(self._stores[name].read(), leaf.name, self._item)

    def close(self) -> None:
        """Lets go of the stores."""
        self._stores = {}


def _spec(item: Readable, name: str, *, is_zarr3: bool, is_ocdbt: bool) -> dict[str, Any]:  # JSON
    files = item.kvstore() if isinstance(item, StorePath) else {"driver": "file", "path": f"{item}/"}
    kvstore = (
        {"driver": "ocdbt", "base": files, "path": f"{name}/"}
        if is_ocdbt
        else files | {"path": f"{files['path']}{name}/"}
    )
    return {"driver": "zarr3" if is_zarr3 else "zarr", "kvstore": kvstore, "recheck_cached_data": False}


def _wait(future: Any, name: str, item: Readable) -> Any:  # of TensorStore
    try:
        return future.result()
    except ValueError as error:
        raise CheckpointDamaged(f"{name}: it cannot be read from {item} ({error}); restore another one") from error
