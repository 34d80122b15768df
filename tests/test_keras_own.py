"""The tests that Keras ships for its `ModelCheckpoint` and what is used beside it, run on ours."""

from __future__ import annotations

import os
import re
from pathlib import Path

import interpreters
import keras
import pytest

import offstep

MODULES = ("model_checkpoint_test", "monitor_callback_test", "callback_test", "early_stopping_test")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_tests_of_keras_pass_with_our_class(tmp_path: Path) -> None:
    tests = [str(Path(keras.__file__).parent / "src" / "callbacks" / f"{name}.py") for name in MODULES]
    paths = [str(Path(__file__).parent), str(Path(offstep.__file__).parents[1])]
    command = ["-c", "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"]
    command += ["-q", "-p", "keras_own_plugin", "-p", "no:cacheprovider"]
    # Not `prepend`: that would put the directory of Keras, and another offstep in it, before ours.
    command += ["--import-mode=importlib", "-c", os.devnull, "--rootdir", str(tmp_path), *tests]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "KERAS_BACKEND": "jax"}
    done = interpreters.run(command, env=environment, cwd=tmp_path, timeout=280)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert re.search(r"^\d+ passed", done.stdout, re.MULTILINE), done.stdout
    assert "cannot start its writer" not in done.stdout
