"""States spread over eight devices: saved once, and restored by stock Keras on any number of them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import interpreters
import pytest
from keras_file_reader import assert_same, read_file

EIGHT_DEVICES = "--xla_force_host_platform_device_count=8"
METADATA_BYTES = 60_000  # whatever beside the arrays


def run(action: str, kind: str, directory: Path) -> None:
    script = Path(__file__).with_name("distributed_run.py")
    flags = "" if kind == "one" else EIGHT_DEVICES
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "KERAS_BACKEND": "jax"}
    done = interpreters.run([script, action, kind, directory], env=environment)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module", params=["data", "model"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp(request.param)
    run("save", request.param, directory)
    return directory


def test_each_array_is_stored_once(saved: Path) -> None:
    report = json.loads((saved / "report.json").read_text())
    stored = sum(path.stat().st_size for path in (saved / "root" / "4").rglob("*") if path.is_file())
    assert report["devices"] == [8]
    assert report["state_bytes"] <= stored < report["state_bytes"] + METADATA_BYTES
    # Kernels and biases with both moments of Adam, norm with its averages; what is left are counters and metrics.
    weights = 8 * 64 + 64 + 64 * 8 + 8 + 2 * 64
    assert 4 * (3 * weights + 2 * 64) <= report["state_bytes"] < 4 * (3 * weights + 2 * 64) + 200


def combine() -> Iterator[Any]:  # of pytest
    """How it was saved and how it is loaded."""
    for kinds in product(("data", "model"), ("none", "one", "model_wide", "data", "model")):
        is_chosen = kinds in {("data", "none"), ("model", "one"), ("model", "model_wide")}
        yield pytest.param(*kinds, marks=() if is_chosen else pytest.mark.campaign)


@pytest.mark.parametrize(("saved", "kind"), list(combine()), indirect=["saved"])
def test_stock_keras_loads_it_on_other_devices(kind: str, saved: Path) -> None:
    run("load", kind, saved)


@pytest.mark.parametrize("suffix", [".keras", ".weights.h5"])
def test_files_of_sharded_models_are_those_of_stock_keras(saved: Path, suffix: str) -> None:
    assert_same(read_file(saved / f"ours{suffix}"), read_file(saved / f"stock{suffix}"))
