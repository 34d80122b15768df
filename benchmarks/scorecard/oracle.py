"""Is everything there that the trainee was told is durable?

The parent of all processes keeps what was reported, and judges what a fresh process could restore.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from model import Shape
from verdict import Verdict

_TELLING = re.compile(
    "not saved|not durable|is lost|may be lost|left to the writer|save.*fail|fail.*save|checkpoint.*error",
    re.IGNORECASE,
)


@dataclass
class Claims:
    """What a trainee has said.

    Attributes:
        submitted: Steps whose save was accepted: the call returned.
        durable: Steps that were reported durable.
        is_done: The training ended normally, by which all that was submitted is reported too.
    """

    submitted: list[int] = field(default_factory=list)
    durable: list[int] = field(default_factory=list)
    is_done: bool = False


@dataclass(frozen=True)
class Found:
    """What the verifier made of one checkpoint on the disk.

    Attributes:
        name: Of the file or directory.
        step: Which step it is, or is named.
        state: Whether all values are those of that step.
        detail: What is wrong, or the reader's error.
    """

    name: str
    step: int | None
    state: Literal["equal", "wrong", "error"]
    detail: str = ""


def judge(
    shape: Shape,
    keep: int,
    claims: Claims,
    found: list[Found],
    *,
    wants_submitted: bool = False,
    errors: str = "",
    is_hung: bool = False,
    may_be_empty: bool = False,
) -> Verdict:
    """Judges one trial.

    Args:
        shape: Of the model.
        keep: So many newer checkpoints retire an older one.
        claims: What was reported.
        found: What could be restored.
        wants_submitted: Also what had been submitted must be there, or somebody must have been told that it is not.
        errors: What the trainee wrote to stderr.
        is_hung: It had to be killed at its deadline.
        may_be_empty: It may have been killed before it said of any save that it was accepted.
    """
    equal = {each.step for each in found if each.state == "equal"}
    wrong = [each for each in found if each.state == "wrong"]
    lost = _select_missing(claims.durable, equal, keep)
    dropped = [step for step in _select_missing(claims.submitted, equal, keep) if step not in lost]
    is_told = bool(_TELLING.search(errors))
    return Verdict(
        lost_bytes=len(lost) * shape.state_bytes,
        is_silent=bool(wrong) or (bool(dropped) and claims.is_done and not is_told),
        is_unreported=bool(dropped) and wants_submitted and not claims.is_done and not is_told,
        is_hung=is_hung,
        fault="" if claims.submitted or may_be_empty else "it saved nothing: the trial shows nothing",
        detail=_describe(claims, found, lost, dropped),
    )


def _select_missing(promised: list[int], equal: set[int | None], keep: int) -> list[int]:
    """Returns which of the newest `keep` steps are neither there nor retired by as many newer ones."""
    there = {step for step in equal if step is not None}
    newest = sorted(set(promised))[-keep:]
    return [step for step in newest if step not in there and sum(other > step for other in there) < keep]


def _describe(claims: Claims, found: list[Found], lost: list[int], dropped: list[int]) -> str:
    texts = [f"{each.name}: {each.state}{f' ({each.detail})' if each.detail else ''}" for each in found]
    end = " and done" if claims.is_done else ""
    return (
        f"durable {claims.durable[-4:]}, submitted {claims.submitted[-4:]}{end}; found {', '.join(texts) or 'nothing'}"
        f"; lost {lost}; not saved {dropped}"
    )
