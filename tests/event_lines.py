"""Lines of an event log as a run writes them, made without one: as many saves as a test wants, at once."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

STATE_BYTES = 604_000_000
BEGAN = 1_795_000_000.0


class EventLines:
    """Writes the events of one run; the caller moves its clock `now` on."""

    def __init__(self, run: str = "0badcafe", root: str = "/data/ckpts", began: float = BEGAN) -> None:
        self.lines: list[str] = []
        self.now = began
        self._run, self._root = run, root
        self._saves = 0
        self.add("begin", version=1, pid=7, filepath=f"{root}/{{step}}", versions={"keras": "3.15.1"})

    def add(self, event: str, **about: Any) -> None:  # JSON
        self.lines.append(json.dumps({"event": event, "time": self.now, "run": self._run} | about))

    def train(self, step: int, count: int, seconds: float, *, writing: bool = False, warm_up: bool = False) -> None:
        """Trains `count` batches up to `step` in so many seconds."""
        began, self.now = self.now, self.now + seconds
        self.add(
            "batches",
            began=began,
            step=step,
            count=count,
            seconds=seconds,
            median_seconds=seconds / count,
            max_seconds=1.5 * seconds / count if count > 1 else seconds,
            is_writing=writing,
            is_warm_up=warm_up,
        )

    def snapshot(self, step: int, stall: float = 0.03, compute: float = 0.0) -> int:
        """Takes a snapshot and returns its number."""
        self._saves += 1
        began, self.now = self.now, self.now + stall + compute
        self.add(
            "snapshot",
            save=self._saves,
            **self._place(step),
            state_bytes=STATE_BYTES,
            began=began,
            stall_seconds=stall,
            wait_seconds=0.0,
            compute_seconds=compute,
        )
        return self._saves

    def durable(self, save: int, step: int, seconds: float = 0.35, retired: tuple[int, ...] = ()) -> None:
        self.add(
            "durable",
            save=save,
            **self._place(step),
            durable_seconds=seconds,
            write_seconds=0.8 * seconds,
            cpu_seconds=0.05,
            written_bytes=STATE_BYTES,
            retired=[f"{self._root}/{old}" for old in retired],
            retire_seconds=0.02,
        )

    def fail(self, save: int, step: int, error: str = "OSError: [Errno 28] No space left on device") -> None:
        self.add("failed", save=save, **self._place(step), error=error)

    def skip(self, step: int) -> None:
        self.add("skipped", save=None, **self._place(step))

    def _place(self, step: int) -> dict[str, Any]:
        return {"step": step, "path": f"{self._root}/{step}"}

    def write(self, path: Path) -> Path:
        path.write_text("".join(f"{line}\n" for line in self.lines))
        return path


def make_run(saves: int, *, keep: int = 5, failing: int | None = None, skipping: int | None = None) -> EventLines:
    """Returns a run that saves every 40 batches of about 85 ms and was killed while the last save was on its way."""
    dice = random.Random(saves)
    lines = EventLines()
    lines.train(2, 2, 3.0, warm_up=True)
    pending: tuple[int, int] | None = None
    kept: list[int] = []
    for number in range(1, saves + 1):
        step = 2 + 40 * number
        lines.train(step - 30, 10, 0.89 * dice.uniform(0.95, 1.05), writing=pending is not None)
        if pending is not None and pending[0] == failing:
            lines.fail(*pending)
        elif pending is not None:
            kept.append(pending[1])
            lines.durable(*pending, dice.uniform(0.3, 0.5), (kept.pop(0),) if len(kept) > keep else ())
        lines.train(step, 30, 2.55 * dice.uniform(0.95, 1.05))
        if number == skipping:
            lines.skip(step)
            pending = None
        else:
            pending = lines.snapshot(step, dice.lognormvariate(-3.4, 0.3), dice.uniform(0, 0.05)), step
        if number % 6 == 0:
            lines.now += 1.0  # validation
            lines.add("epoch", epoch=number // 6, stall_seconds=0.2)
    return lines
