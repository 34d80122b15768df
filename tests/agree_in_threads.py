"""Lets threads stand for processes that agree through a coordination service of JAX; prints what each got, as JSON."""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
from joint import find_port

from offstep.coordination import Group, ProcessMissing, list_common

STEPS = [[4, 3, 1], [3, 4, 2], [5, 4, 3]]


def agree(index: int, key: str, timeout_seconds: float) -> Any:  # JSON
    from jax._src.distributed import global_state

    group = Group(index, len(STEPS), global_state.client)
    try:
        return group.agree(key, STEPS[index], list_common, timeout_seconds)
    except ProcessMissing as error:
        return str(error)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    jax.distributed.initialize(f"127.0.0.1:{find_port()}", 1, 0)
    with ThreadPoolExecutor(len(STEPS)) as pool:
        together = list(pool.map(lambda index: agree(index, "all", 60.0), range(3)))
        without = list(pool.map(lambda index: agree(index, "without-1", 1.0), (0, 2)))
        headless = list(pool.map(lambda index: agree(index, "without-0", 1.0), (1, 2)))
    json.dump([together, without, headless], sys.stdout)
