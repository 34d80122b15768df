"""One save of a state that spans several processes, as one of them follows it, and why it failed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offstep.attachments import Attachment
from offstep.coordination import ServiceLost
from offstep.handover import Outcome
from offstep.records import Job


@dataclass(frozen=True)
class Upload:
    """A copy into a store that is to be made of the step when it is durable.

    Attributes:
        job: For the writer.
        on_outcome: Called once with what became of it, `{"withdrawn": True}` if it was never begun; on any thread.
    """

    job: Job
    on_outcome: Callable[[Outcome], None]


@dataclass(eq=False)
class JointSave:
    """One save of this process, from its snapshot to what became of the checkpoint. The fields below `deadline` are
    guarded by `JointCommits._changed`.
    """

    job: Job
    attachments: Mapping[str, Attachment]
    on_submitted: Callable[[], None]
    on_written: Callable[[], None]
    on_outcome: Callable[[Outcome], None]
    upload: Upload | None
    deadline: float  # time.monotonic()
    key: str = ""  # the same in all processes; empty until the share is submitted
    staged: Path | None = None  # where the share is, in a file system that all see
    written: Outcome | None = None  # what the writer says of the share
    merged: Outcome | None = None  # what it says of the whole
    is_settled: bool = False
    is_refused: bool = False  # it is known that it has failed in all processes, and will never be a checkpoint

    def remaining_seconds(self) -> float:
        return max(0.0, self.deadline - time.monotonic())


class Failure(Exception):
    """Why there will be no checkpoint, as all processes are told.

    Args:
        text: For people.
        code: The system's number for it.
        is_unsure: Whether nobody can tell: the checkpoint may still appear.
    """

    def __init__(self, text: str, code: int | None = None, *, is_unsure: bool = False) -> None:
        super().__init__(text)
        self.code, self.is_unsure = code, is_unsure


def describe(error: Exception) -> Outcome:
    """Returns what the training thread, and other processes, are told of an error."""
    if isinstance(error, Failure):
        return {"error": str(error), "errno": error.code, "is_unsure": error.is_unsure}
    if isinstance(error, ServiceLost):
        return {"error": f"the coordination service of JAX does not answer ({error})", "errno": None}
    return {"error": f"{type(error).__name__}: {error}", "errno": error.errno if isinstance(error, OSError) else None}


def refuse(report: Mapping[str, Any]) -> None:
    """Raises what another thread, or process, reports as a failure."""
    if "error" in report:
        is_unsure = report.get("is_unsure", False) or report.get("died", False)
        raise Failure(report["error"], report["errno"], is_unsure=is_unsure)
