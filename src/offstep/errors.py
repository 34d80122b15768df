"""The exceptions that a caller may want to catch.

OffstepError
├── SaveFailed          (also OSError)       a checkpoint could not be made durable
│   ├── WriterDied      (also OSError)       ... because its writer process kept dying
│   └── SaveReplaced    (also OSError)       ... because a newer one took its place (`on_busy="latest"`)
├── TargetInUse         (also OSError)       another live run saves to the same place
├── SaveTimeout         (also TimeoutError)  `wait(timeout)` ran out; the saves go on
├── BudgetExceeded      (also MemoryError)   one snapshot does not fit the host memory budget
├── UnsupportedLeaf     (also TypeError)     a leaf that no checkpoint reader could read back
├── StructureMismatch   (also ValueError)    checkpoint and target differ in leaves or shapes
├── CheckpointDamaged   (also OSError)       a checksum, a length or a file of a checkpoint is wrong
├── UnsupportedFormat   (also ValueError)    not a checkpoint, or one that a newer version wrote
└── CheckpointNotFound  (also FileNotFoundError)  nothing committed where it was looked for
"""

from __future__ import annotations


class OffstepError(Exception):
    """Base of all exceptions of this package."""


class SaveFailed(OffstepError, OSError):
    """A submitted checkpoint did not become durable; older ones are untouched."""


class WriterDied(SaveFailed):
    """The writer process died repeatedly while it worked on the same checkpoint."""


class SaveReplaced(SaveFailed):
    """With `on_busy="latest"`, a newer snapshot took the place of this one before it was written.

    Raised by the `wait` of that save only; it is counted as skipped, not as failed.
    """


class TargetInUse(OffstepError, OSError):
    """Another live run saves to the same directory or file; the message names its process and host."""


class SaveTimeout(OffstepError, TimeoutError):
    """`wait(timeout)` ran out before all submitted checkpoints were durable.

    Attributes:
        steps: Those waited for that are not durable, in the order in which they were saved.
        newest_step: The greatest step of this run that is durable; `None` when none is.
    """

    def __init__(self, text: str, steps: tuple[int, ...] = (), newest_step: int | None = None) -> None:
        super().__init__(text)
        self.steps = steps
        self.newest_step = newest_step


class BudgetExceeded(OffstepError, MemoryError):
    """One snapshot of the state does not fit into the host memory budget."""


class UnsupportedLeaf(OffstepError, TypeError):
    """The state holds a leaf that stock readers could not restore."""


class StructureMismatch(OffstepError, ValueError):
    """A checkpoint and the structure to restore into do not agree."""


class CheckpointDamaged(OffstepError, OSError):
    """A checkpoint is not what was written: a checksum is wrong, a file truncated or missing."""


class UnsupportedFormat(OffstepError, ValueError):
    """What was given is not a checkpoint, or one that a newer version of offstep wrote."""


class CheckpointNotFound(OffstepError, FileNotFoundError):
    """No committed checkpoint was found."""
