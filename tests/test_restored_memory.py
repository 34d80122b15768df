"""A restore takes little memory beside the state, and overwrites nothing that somebody else can see."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

LEAF_BYTES = 1448 * 1448 * 4
MARGIN_BYTES = 48 << 20  # a batch of small leaves, and what Python and XLA take for their work


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "KERAS_BACKEND": "jax"}
    script = str(Path(__file__).with_name("run_restored_large.py"))
    command = [sys.executable, script, str(tmp_path_factory.mktemp("large"))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def test_large_leaves_are_restored(report: dict[str, Any]) -> None:
    assert report["equal"]
    assert report["equal again"]


def test_arrays_and_views_that_somebody_holds_keep_their_values(report: dict[str, Any]) -> None:
    assert report["held is kept"]


def test_at_most_one_leaf_is_in_host_memory_beside_the_state(report: dict[str, Any]) -> None:
    assert report["state_bytes"] > 200e6
    assert report["peak_bytes"] < LEAF_BYTES + MARGIN_BYTES
