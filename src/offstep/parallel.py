"""Does the same to many things, several at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

_T = TypeVar("_T")


def run_all(task: Callable[[_T], object], items: Sequence[_T], threads: int, name: str) -> None:
    """Does a task for all items; the first failure is raised when none is at work any longer.

    Args:
        task: What to do; on any thread.
        items: What to do it for.
        threads: How many at a time.
        name: Begins the names of the threads.
    """
    if len(items) <= 1 or threads == 1:
        for item in items:
            task(item)
        return
    with ThreadPoolExecutor(threads, thread_name_prefix=name) as pool:
        futures = [pool.submit(task, item) for item in items]
        try:
            for future in futures:
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
