"""What holds for every test: Keras runs on JAX, and nothing of ours outlives a test."""

from __future__ import annotations

import atexit
import gc
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import interpreters
import psutil
import pytest

if TYPE_CHECKING:
    from offstep.writer import Writer

# Before anything imports Keras or JAX: both read their settings once.
os.environ["KERAS_BACKEND"] = "jax"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

_held: list[Writer] = []  # what `one_writer` holds


def pytest_configure() -> None:
    """Has programs compiled fast, and once for all tests and the processes that they start.

    Most of the time went there, and nothing that is tested depends on how fast a training step is.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell leaves it to what it starts in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    directory = tempfile.mkdtemp(prefix="offstep-programs-")
    atexit.register(shutil.rmtree, directory)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = directory
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"


def pytest_collection_finish() -> None:
    """Keeps Python's collector off what was imported: to look at that took a third of the time of a training."""
    gc.collect()
    gc.freeze()


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
def one_writer() -> Iterator[None]:
    """Lets the tests of a module share a writer process: to start one takes most of the time of a small save."""
    from offstep import shared_writer

    _held.append(shared_writer.borrow_shared())
    yield
    shared_writer.return_shared()
    _held.clear()


@pytest.fixture
def own_writers(one_writer: None) -> Iterator[None]:
    """Gives a test in such a module writers that start and end with their users."""
    from offstep import shared_writer

    shared_writer.return_shared()
    yield
    shared_writer.borrow_shared()


def _find_owned() -> set[str]:
    return _find_children() | _find_threads() | _find_memfds()


def _find_children() -> set[str]:
    names = set()
    shared = [*(writer.pid for writer in _held), *interpreters.list_servants()]
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if child.pid not in shared:
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
