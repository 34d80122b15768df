"""A writer process that notes how long each call to the disk takes, for `bench_phases`."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from offstep import disk, worker, writer_process

_VARIABLE = "BENCHMARK_TIMES"


def install(path: Path) -> None:
    """In the trainer, before its writer starts; `path` gets a line of JSON per call: [name, seconds]."""
    os.environ[_VARIABLE] = str(path)
    writer_process.entry = __name__


def main() -> None:
    """In the writer process, in the place of `offstep.worker.main`."""
    with Path(os.environ[_VARIABLE]).open("a", buffering=1) as log:

        def timed(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
            def run(*arguments: Any) -> Any:
                start = time.perf_counter()
                try:
                    return call(*arguments)
                finally:
                    log.write(json.dumps([name, time.perf_counter() - start]) + "\n")

            return run

        names = [field.name for field in fields(disk.Calls)]
        disk.calls = replace(disk.calls, **{name: timed(name, getattr(disk.calls, name)) for name in names})
        worker.main()
