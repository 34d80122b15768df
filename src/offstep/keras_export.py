"""A checkpoint as a file of Keras: the model is rebuilt from its configuration, and saves itself."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import keras

from offstep import commit
from offstep.errors import StructureMismatch, UnsupportedFormat
from offstep.orbax_documents import read_config
from offstep.publishing import publish
from offstep.restoration import restore
from offstep.stored import Reader

Model = Any  # Keras carries no types


def export_keras(reader: Reader, target: Path, modules: Sequence[str]) -> int:
    """Writes `target`, a `.keras` or `.weights.h5` file, and makes it durable; returns its size in bytes.

    Args:
        reader: An Orbax directory with a model's configuration, or a `.keras` file.
        target: The file.
        modules: Imported first, so that they register custom layers.

    Raises:
        UnsupportedFormat: the checkpoint has no configuration.
        StructureMismatch: its model cannot be rebuilt, or has other leaves.
        OSError: it is not durable; an older file is untouched.
    """
    for module in modules:
        import_module(module)
    model = _load(reader)
    commit.make_root(target.parent)
    suffix = ".keras" if target.name.endswith(".keras") else ".weights.h5"
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".offstep-tmp-") as directory:
        scratch = Path(directory) / f"model{suffix}"
        model.save(scratch) if suffix == ".keras" else model.save_weights(scratch)
        with scratch.open("r+b") as file:
            return publish(file, target)


def _load(reader: Reader) -> Model:
    config = read_config(reader.path) if reader.path.is_dir() else None
    if reader.contents.format != "keras_archive" and config is None:
        raise UnsupportedFormat(f"{reader.path} has no configuration of a Keras model, so none can be built from it")
    try:
        if config is None:
            return keras.saving.load_model(reader.file)
        model = keras.saving.deserialize_keras_object(json.loads(config))  # in safe mode: it may be anybody's
    except (TypeError, ValueError) as error:
        raise StructureMismatch(
            f"the model of {reader.path} cannot be rebuilt: {error}; "
            "--import MODULE loads one that registers its custom layers"
        ) from error
    restore(model, reader.path)
    return model
