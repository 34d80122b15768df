"""What an Orbax directory says beside its arrays: a Keras model's configuration, shardings, empty containers."""

from __future__ import annotations

import json
from base64 import urlsafe_b64decode
from collections.abc import Mapping
from typing import Any

from offstep.formats.orbax_reader import OrbaxReader, find_item
from offstep.records import PathKey
from offstep.stored import Region
from offstep.stores.path import Readable

_SEQUENCE_KEY = 1
_ARRAY_TYPES = frozenset(("jax.Array", "np.ndarray", "scalar", "string"))

EmptyNodes = list[tuple[tuple[PathKey, ...], str]]


def read_config(checkpoint: Readable) -> str | None:
    """Returns the JSON of the Keras model in the checkpoint; `None` where there is none."""
    config = _read(checkpoint / "model_config" / "_strings.json").get("config")
    return config if isinstance(config, str) else None


def read_documents(checkpoint: Readable) -> dict[str, Any] | None:  # JSON
    """Returns what the format's `prepare` takes: configuration and assets of a Keras model, if there is one."""
    config = read_config(checkpoint)
    return None if config is None else {"config": config, "assets": _read_assets(checkpoint / "assets")}


def read_shardings(checkpoint: Readable) -> dict[str, str]:
    """Returns Orbax's text for the sharding of each leaf, by its path joined by dots."""
    item = find_item(checkpoint)
    texts = {} if item is None else _read(item / "_sharding")
    return {urlsafe_b64decode(name).decode(): str(text) for name, text in texts.items()}


def read_empty_nodes(checkpoint: Readable) -> EmptyNodes:
    """Returns the containers without any array, each with the name that Orbax gives its type."""
    item = find_item(checkpoint)
    entries = {} if item is None else _read(item / "_METADATA").get("tree_metadata", {})
    found: EmptyNodes = []
    for entry in entries.values():
        kind = entry["value_metadata"]["value_type"]
        if kind not in _ARRAY_TYPES:
            found.append((tuple(_path_key(key) for key in entry["key_metadata"]), kind))
    return found


def _read_assets(item: Readable) -> dict[str, str]:
    if find_item(item) is None:
        return {}
    reader = OrbaxReader(item)
    try:
        return {leaf.name: reader.read([Region(leaf)], 1)[0].tobytes().hex() for leaf in reader.contents.leaves}
    finally:
        reader.close()


def _path_key(key: Mapping[str, Any]) -> PathKey:  # JSON
    return int(key["key"]) if key["key_type"] == _SEQUENCE_KEY else str(key["key"])


def _read(path: Readable) -> dict[str, Any]:  # JSON
    return dict(json.loads(path.read_bytes())) if path.is_file() else {}
