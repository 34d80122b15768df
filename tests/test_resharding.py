"""What eight devices saved comes back on one, on four, and distributed in another way."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import interpreters
import pytest


def run(kind: str, directory: Path, devices: int) -> dict[str, Any]:
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_PLATFORMS": "cpu",
        "KERAS_BACKEND": "jax",
    }
    done = interpreters.run([Path(__file__).with_name("run_resharded.py"), kind, directory], env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sharded")
    assert run("save", directory, 8) == {"sharded": True}
    return directory


@pytest.mark.parametrize(("kind", "devices"), [("one", 1), ("model", 4), ("data", 4)])
def test_a_model_saved_on_eight_devices_is_restored(kind: str, devices: int, saved: Path) -> None:
    assert run(kind, saved, devices) == {"values": True, "shardings": True, "names": True}
