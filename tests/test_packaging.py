"""What is built from the repository, and what a new user meets who follows the README in an empty environment."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from blocks_of_text import find_blocks

import offstep

ROOT = Path(__file__).parent.parent
pytestmark = [
    pytest.mark.campaign,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(not (ROOT / ".git").exists(), reason="a source distribution is made of a checkout"),
]


def run(*command: str | Path, directory: Path, **environment: str) -> str:
    path = os.pathsep.join([str(Path(command[0]).parent), os.environ["PATH"]])
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "KERAS_BACKEND")}
    ended = subprocess.run(
        command, cwd=directory, env=kept | {"PATH": path} | environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the source distribution, so that this is complete."""
    built = tmp_path_factory.mktemp("built")
    build = "import mesonpy, sys; mesonpy.build_sdist(sys.argv[1])"
    run(sys.executable, "-c", build, built, directory=ROOT)
    [source] = built.glob("*.tar.gz")
    assert source.name == f"offstep-{offstep.__version__}.tar.gz"
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir")
    run(sys.executable, "-m", "pip", "wheel", *options, built, source, directory=built)
    [found] = built.glob("*.whl")
    return found


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    assert wheel.name.startswith(f"offstep-{offstep.__version__}-cp311-abi3-")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    sources = {str(path.relative_to(ROOT / "src")) for path in (ROOT / "src/offstep").rglob("*") if path.is_file()}
    sources = {name for name in sources if "__pycache__" not in name} | {"offstep/_native.abi3.so"}
    assert names == sources
    assert {"offstep/py.typed", "offstep/_native.pyi", "offstep/VERSION"} <= names


def test_a_new_user_gets_to_a_restored_checkpoint(wheel: Path, tmp_path: Path) -> None:
    scripts = {block.file: block.code for block in find_blocks((ROOT / "README.md").read_text()) if block.file}
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv/bin/python"
    run(python, "-m", "pip", "install", "--quiet", wheel, directory=tmp_path)
    run(python, "-m", "pip", "check", directory=tmp_path)
    for name in ("train.py", "restore.py"):
        (tmp_path / name).write_text(scripts[name])
    assert "step 200 durable after" in run(python, "train.py", directory=tmp_path, JAX_PLATFORMS="cpu")
    command = python.parent / "offstep"
    assert "3 checkpoints" in run(command, "ls", "ckpts", directory=tmp_path)
    assert run(command, "verify", "ckpts", directory=tmp_path).count("whole") == 3
    assert run(python, "-m", "offstep", "--version", directory=tmp_path) == f"offstep {offstep.__version__}\n"
    run(python, "-m", "pip", "uninstall", "--quiet", "--yes", "offstep", directory=tmp_path)
    assert run(python, "restore.py", directory=tmp_path, JAX_PLATFORMS="cpu") == "restored at step 200\n"
