"""What holds for every test: Keras runs on JAX, and nothing of ours outlives a test."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

# Before anything imports Keras or JAX: both read their settings once.
os.environ["KERAS_BACKEND"] = "jax"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    """Fails a test that leaves a child process, a thread of ours or a memfd; what was there before does not count."""
    before = _find_owned()
    yield
    left = _find_owned() - before
    if left:
        # Only a cycle may still hold them; collecting after every test would cost more than the tests.
        gc.collect()
        left = _find_owned() - before
    if left:
        pytest.fail("left behind: " + ", ".join(sorted(left)), pytrace=False)


@pytest.fixture(scope="module")
def programs_on_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Lets models that are made again and again in a module be compiled once."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    options = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("programs")),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in options}
    for name, value in options.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def _find_owned() -> set[str]:
    return _find_children() | _find_threads() | _find_memfds()


def _find_children() -> set[str]:
    names = set()
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            names.add(f"process {child.pid} {child.name()}")
    return names


def _find_threads() -> set[str]:
    return {f"thread {thread.name}" for thread in threading.enumerate() if thread.name.startswith("offstep")}


def _find_memfds() -> set[str]:
    links = set()
    for entry in Path("/proc/self/fd").glob("*"):
        with suppress(FileNotFoundError):
            links.add((entry.name, os.readlink(entry)))
    return {f"descriptor {number} {link}" for number, link in links if link.startswith("/memfd:")}
