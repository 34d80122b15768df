"""The text that Orbax keeps for a leaf's sharding, read back by its restore when no sharding is asked for."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

import jax


@lru_cache(maxsize=256)  # a model has thousands of leaves and a handful of shardings
def sharding_text(sharding: jax.sharding.Sharding) -> str | None:
    """Returns the JSON of a sharding as Orbax 0.12 writes it into `_sharding`, or `None` for kinds it does not keep."""
    if isinstance(sharding, jax.sharding.NamedSharding):
        return json.dumps(_named(sharding))
    if isinstance(sharding, jax.sharding.SingleDeviceSharding):
        device = next(iter(sharding.device_set))
        return json.dumps({"sharding_type": "SingleDeviceSharding", "device_str": str(device)})
    return None


def _named(sharding: jax.sharding.NamedSharding) -> dict[str, Any]:
    mesh = sharding.mesh
    return {
        "sharding_type": "NamedSharding",
        "shape": list(mesh.shape.values()),
        "axis_names": list(mesh.axis_names),
        "axis_types": [str(kind) for kind in mesh.axis_types],
        "partition_spec": list(sharding.spec),
        "device_mesh": {"mesh": _device_ids(mesh.devices.tolist())},
    }


def _device_ids(devices: Any) -> Any:  # nested lists of devices
    if isinstance(devices, list):
        return [_device_ids(device) for device in devices]
    return {"id": devices.id}
