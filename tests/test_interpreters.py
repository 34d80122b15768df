"""What our tests start in place of fresh interpreters is as one."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import interpreters
import psutil
import pytest
from interpreters import Interpreter

LOOK = """
import os, sys
print(sys.argv, __name__, os.getppid(), os.environ.get("MINE"), [name for name in globals() if name[0] != "_"])
import jax, keras, random
import numpy as np
print(keras.layers.Dense(1).name, len(jax.devices()), "offstep" in sys.modules)
print(random.random(), np.random.random())
"""


def test_it_is_as_a_fresh_one(tmp_path: Path) -> None:
    environment = os.environ | {"MINE": "yes", "XLA_FLAGS": "--xla_force_host_platform_device_count=3"}
    (tmp_path / "look.py").write_text(LOOK)
    numbers = set()
    for arguments in (["-c", LOOK, "a b"], ["look.py", "a b"]):
        ended = interpreters.run(arguments, env=environment | {"JAX_PLATFORMS": "cpu"}, cwd=tmp_path)
        assert (ended.returncode, ended.stderr) == (0, "")
        first, second, third = ended.stdout.splitlines()
        assert first == f"{[arguments[0], 'a b']} __main__ {os.getpid()} yes ['os', 'sys']"
        assert second == "dense 3 False"
        numbers.add(third)
    assert len(numbers) == 2


@pytest.mark.parametrize(
    ("code", "status", "words"),
    [
        ("import sys; sys.exit(3)", 3, ""),
        ("raise ValueError('of the script')", 1, "ValueError: of the script"),
        ("raise KeyboardInterrupt", -signal.SIGINT, "KeyboardInterrupt"),
        ("import os; os.kill(os.getpid(), 9)", -signal.SIGKILL, ""),
        ("import atexit, sys; atexit.register(print, 'at exit', file=sys.stderr); kept = []", 0, "at exit"),
    ],
)
def test_it_ends_as_a_fresh_one(code: str, status: int, words: str) -> None:
    ended = interpreters.run(["-c", code])
    assert ended.returncode == status
    assert words in ended.stderr
    assert "Warning" not in ended.stderr


def test_it_is_talked_to_and_signalled_as_any_other() -> None:
    code = "import sys\nprint(sys.stdin.readline().strip(), flush=True)\nsys.stdin.read()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with Interpreter(["-c", code], start_new_session=True, **pipes) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write("hello\n")
        child.stdin.flush()
        assert child.stdout.readline() == "hello\n"
        assert child.pid in [each.pid for each in psutil.Process().children()]
        os.killpg(child.pid, signal.SIGTERM)
        assert child.wait() == -signal.SIGTERM


def test_what_was_read_at_import_cannot_be_another() -> None:
    with pytest.raises(AssertionError, match="JAX_ENABLE_X64 is read at import"):
        interpreters.run(["-c", ""], env=os.environ | {"JAX_ENABLE_X64": "1"})
