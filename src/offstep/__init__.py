"""Asynchronous, durable checkpoints for Keras 3 on JAX, and for any JAX pytree."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from offstep.errors import (
    BudgetExceeded,
    CheckpointNotFound,
    OffstepError,
    SaveFailed,
    SaveTimeout,
    StructureMismatch,
    UnsupportedLeaf,
    WriterDied,
)

if TYPE_CHECKING:
    from offstep.callbacks import ModelCheckpoint
    from offstep.checkpointer import Checkpointer
    from offstep.engine import PendingSave
    from offstep.records import SaveStats

__version__ = "0.1.0"

__all__ = [
    "BudgetExceeded",
    "CheckpointNotFound",
    "Checkpointer",
    "ModelCheckpoint",
    "OffstepError",
    "PendingSave",
    "SaveFailed",
    "SaveStats",
    "SaveTimeout",
    "StructureMismatch",
    "UnsupportedLeaf",
    "WriterDied",
]

# Imported on first use: the writer process imports this package too, and must not wait for Keras and JAX.
_MODULES = {
    "Checkpointer": "offstep.checkpointer",
    "ModelCheckpoint": "offstep.callbacks",
    "PendingSave": "offstep.engine",
    "SaveStats": "offstep.records",
}


def __getattr__(name: str) -> Any:  # whatever the module has under that name
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
