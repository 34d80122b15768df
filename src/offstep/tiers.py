"""Two tiers: every step goes to a directory of this machine, some of them from there into a store."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

from offstep import policy
from offstep.records import Target
from offstep.stores import staging
from offstep.stores.address import Address, is_address, parse_address, split_query
from offstep.stores.client import Unanswered


@dataclass
class SecondTier:
    """A store into which steps of a directory are copied.

    Attributes:
        address: Of its steps.
        every: Each how many saves one is copied.
        keep: How many of the newest stay there; `None` keeps all.
        saves: How many there were.
    """

    address: Address
    every: int
    keep: int | None
    saves: int = 0

    def extend(self, place: Callable[[int], Target]) -> Callable[[int], Target]:
        """Returns the place of the next save, with the copy that is due after it."""
        if (self.saves + 1) % self.every:
            return place
        return lambda step: replace(place(step), upload=self.address, upload_keep=self.keep)

    def probe(self, patience_seconds: float) -> None:
        """Checks that steps can be copied there; that the store does not answer now is only warned of.

        Raises:
            OSError: they cannot, and never will.
        """
        try:
            staging.probe(self.address, patience_seconds)
        except Unanswered as error:
            warnings.warn(f"steps are durable on this machine only, as long as {error}", RuntimeWarning, stacklevel=2)

    def count(self) -> None:
        """Counts a save that was submitted."""
        self.saves += 1


def make_tiers(
    filepath: str, local: str | os.PathLike[str] | None, upload_every: int | None, keep: int | None
) -> tuple[str, SecondTier | None]:
    """Returns the template that is saved to, and the second tier if there is one.

    Args:
        filepath: Template that the user gave: with `local` the address of the steps in a store.
        local: Directory that the steps go to first.
        upload_every: Each how many saves one is copied; `None` copies each.
        keep: How many of the newest stay in the store.

    Raises:
        ValueError: they do not go together.
    """
    if local is None:
        if upload_every is not None:
            raise ValueError(f"upload_every copies from a first tier: give local too. Received: {upload_every=}")
        return filepath, None
    plain, options = split_query(filepath)
    root, kind = policy.split_target(policy.Template(plain, filepath=filepath))
    if not is_address(filepath) or kind != "steps" or root.fields:
        raise ValueError(
            "with local, filepath is the address of the steps in a store, such as 's3://bucket/run/{step}'. "
            f"Received: {filepath=!s}"
        )
    if is_address(local):
        raise ValueError(f"local must be a directory of this machine. Received: {local=!s}")
    every = 1 if upload_every is None else upload_every
    if not isinstance(every, int) or every < 1:
        raise ValueError(f"upload_every must be None or an integer of at least 1. Received: {upload_every!r}")
    directory = os.fspath(local).rstrip("/").replace("{", "{{").replace("}", "}}")
    return f"{directory}/{policy.STEP_FIELD}", SecondTier(parse_address(f"{root.text}{options}"), every, keep)
