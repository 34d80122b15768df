"""The public face of the package: its names, its version, what its metadata promise."""

from __future__ import annotations

import importlib
import subprocess
import sys
import tomllib
from pathlib import Path

import offstep

ROOT = Path(__file__).parent.parent
NAMES = {
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
}


def test_these_names_are_public() -> None:
    assert set(offstep.__all__) == NAMES
    assert all(getattr(offstep, name).__doc__ for name in NAMES)


def test_importing_the_package_imports_neither_keras_nor_jax() -> None:
    script = "import sys, offstep; sys.exit(any(name in sys.modules for name in ('keras', 'jax', 'numpy')))"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_the_version_is_in_one_place() -> None:
    text = (Path(offstep.__file__).parent / "VERSION").read_text()
    assert offstep.__version__ == text.strip()
    assert "version: files('src/offstep/VERSION')" in (ROOT / "meson.build").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["dynamic"] == ["version"]
    assert f"({offstep.__version__})" in (ROOT / "CHANGELOG.md").read_text()


def test_the_command_of_the_metadata_is_there() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, function = project["scripts"]["offstep"].split(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_types_are_shipped() -> None:
    assert (Path(offstep.__file__).parent / "py.typed").is_file()
