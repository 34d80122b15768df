"""Asynchronous, durable checkpoints for Keras 3 on JAX, and for any JAX pytree."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offstep.errors import (
    BudgetExceeded,
    CheckpointDamaged,
    CheckpointNotFound,
    OffstepError,
    SaveFailed,
    SaveReplaced,
    SaveTimeout,
    StructureMismatch,
    TargetInUse,
    UnsupportedFormat,
    UnsupportedLeaf,
    WriterDied,
)

if TYPE_CHECKING:
    from offstep.backup import BackupAndRestore
    from offstep.callbacks import ModelCheckpoint
    from offstep.checkpointer import Checkpointer
    from offstep.discovery import best, latest
    from offstep.pending import PendingSave
    from offstep.records import Problem, SaveStats
    from offstep.restoration import RestoreReport, read, restore
    from offstep.verification import VerifyReport, verify

__version__ = (Path(__file__).parent / "VERSION").read_text().strip()  # meson.build reads the same file

__all__ = [
    "BackupAndRestore",
    "BudgetExceeded",
    "CheckpointDamaged",
    "CheckpointNotFound",
    "Checkpointer",
    "ModelCheckpoint",
    "OffstepError",
    "PendingSave",
    "Problem",
    "RestoreReport",
    "SaveFailed",
    "SaveReplaced",
    "SaveStats",
    "SaveTimeout",
    "StructureMismatch",
    "TargetInUse",
    "UnsupportedFormat",
    "UnsupportedLeaf",
    "VerifyReport",
    "WriterDied",
    "best",
    "latest",
    "read",
    "restore",
    "verify",
]

# Imported on first use: the writer process imports this package too, and must not wait for Keras and JAX.
_MODULES = {
    "BackupAndRestore": "offstep.backup",
    "Checkpointer": "offstep.checkpointer",
    "ModelCheckpoint": "offstep.callbacks",
    "PendingSave": "offstep.pending",
    "RestoreReport": "offstep.restoration",
    "Problem": "offstep.records",
    "VerifyReport": "offstep.verification",
    "SaveStats": "offstep.records",
    "verify": "offstep.verification",
    "best": "offstep.discovery",
    "latest": "offstep.discovery",
    "read": "offstep.restoration",
    "restore": "offstep.restoration",
}


def __getattr__(name: str) -> Any:  # whatever the module has under that name
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
