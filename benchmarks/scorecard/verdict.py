"""What became of one trial, and of all trials of a scenario?"""

from __future__ import annotations

import math
import time
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass, field


class Skipped(Exception):
    """A scenario cannot be run on this machine; the text is the reason."""


class Hung(Exception):
    """Something was not over by its deadline."""


class Ended(Exception):
    """A process ended before it said what was waited for; the text is what it wrote to stderr."""


@dataclass(frozen=True)
class Verdict:
    """What one trial showed; without any fault it was survived.

    Attributes:
        lost_bytes: Bytes of state that had been reported durable and cannot be restored.
        is_silent: Wrong values were restored without an error, or a run ended as if all were well though something
            was not saved.
        is_unreported: Something was not saved, and nobody was told.
        is_hung: It was not over by its deadline.
        fault: Anything else that should not be, in a few words.
        detail: What was found, for whoever looks into a fault.
    """

    lost_bytes: int = 0
    is_silent: bool = False
    is_unreported: bool = False
    is_hung: bool = False
    fault: str = ""
    detail: str = ""

    @property
    def has_survived(self) -> bool:
        return not (self.lost_bytes or self.is_silent or self.is_unreported or self.is_hung or self.fault)


def judge_accident(error: Hung | Ended) -> Verdict:
    """Returns the verdict on a trial that did not come to its end."""
    if isinstance(error, Hung):
        return Verdict(is_hung=True, detail=str(error))
    return Verdict(fault="a process ended too early", detail=str(error)[-500:])


@dataclass
class Tally:
    """All trials of one scenario with one peer."""

    trials: int = 0
    survived: int = 0
    lost_bytes: int = 0
    silent: int = 0
    unreported: int = 0
    hung: int = 0
    skipped: str | None = None
    details: list[str] = field(default_factory=list)

    def take(self, verdicts: Generator[Verdict], deadline: float = math.inf) -> bool:
        """Counts, and returns whether there were no more by the deadline (of `time.monotonic`).

        A trial that raises `Skipped` before any other skips all.
        """
        try:
            with closing(verdicts):
                for verdict in verdicts:
                    self.add(verdict)
                    if time.monotonic() > deadline:
                        return False
        except Skipped as reason:
            self.skipped = str(reason)
        except (Hung, Ended) as error:
            self.add(judge_accident(error))
        return True

    def add(self, verdict: Verdict) -> None:
        self.trials += 1
        self.survived += verdict.has_survived
        self.lost_bytes += verdict.lost_bytes
        self.silent += verdict.is_silent
        self.unreported += verdict.is_unreported
        self.hung += verdict.is_hung
        text = "; ".join(filter(None, (verdict.fault, verdict.detail)))
        if not verdict.has_survived and len(self.details) < 5:
            self.details.append(text)

    @property
    def is_clean(self) -> bool:
        return self.survived == self.trials and (self.trials > 0 or self.skipped is not None)

    def __str__(self) -> str:
        counts = (
            f"{self.survived} of {self.trials} survived | lost {self.lost_bytes:,} bytes | silent {self.silent}"
            f" | unreported {self.unreported} | hung {self.hung}"
        )
        if self.skipped is None:
            return counts
        return f"skipped ({self.skipped})" + (f" after {counts}" if self.trials else "")
