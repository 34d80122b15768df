"""The text that Orbax keeps for a leaf's sharding, read back by its restore when no sharding is asked for."""

from __future__ import annotations

import base64
import json
from functools import lru_cache
from typing import Any

import jax

from offstep.stores.path import Readable


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


def read_sharding_texts(item: Readable) -> dict[str, str]:
    """Returns the texts that an item of a checkpoint has, by the name of the leaf; none where it has no file."""
    try:
        document = json.loads((item / "_sharding").read_bytes())
        return {base64.urlsafe_b64decode(name).decode(): text for name, text in document.items()}
    except (FileNotFoundError, AttributeError, ValueError):
        return {}


def parse_sharding(text: str) -> jax.sharding.Sharding | None:
    """Returns the sharding on one device of this process that a text means; `None` for all others."""
    try:
        described = json.loads(text)
        if described["sharding_type"] != "SingleDeviceSharding":
            return None
        name = described["device_str"]
    except (KeyError, TypeError, ValueError):
        return None
    device = next((device for device in jax.local_devices() if str(device) == name), None)
    return None if device is None else jax.sharding.SingleDeviceSharding(device)
