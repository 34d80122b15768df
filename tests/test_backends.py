"""Keras on TensorFlow and on PyTorch: everything works through a plain copy in host memory."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("backend", ["torch", "tensorflow"])
def test_another_backend_saves_what_stock_saves(backend: str, tmp_path: Path) -> None:
    if importlib.util.find_spec(backend) is None:
        pytest.skip(f"Keras on {backend} is NOT tested here: {backend} is not installed.")
    command = [sys.executable, str(Path(__file__).with_name("run_backend.py")), str(tmp_path)]
    environment = os.environ | {"KERAS_BACKEND": backend, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report
    assert "\n".join(f"{name}: {outcome}" for name, outcome in report.items() if outcome != "equal") == ""
