"""Where the checkpoints of a callback go: its filepath, and the places that it means once training has begun."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from offstep import catalog, commit, ownership, policy
from offstep.manifest import Manifest
from offstep.pending import PendingSave
from offstep.records import Target
from offstep.stores import staging
from offstep.stores.address import Address, Place, is_address, parse_address, split_query, to_place
from offstep.stores.path import open_place

Fields = Mapping[str, object]

_UNSURE_FILES = 64  # more than can be on their way at once; what fails does not count as kept


class Destination:
    """A filepath with fields to fill in, and the places that it stands for.

    Args:
        filepath: The template.
        weights_only: Whether no whole models go there.
        keep: How many of the newest checkpoints stay; `None` keeps all.

    Attributes:
        template: The template.
        format: Key of `formats.FORMATS` that the suffix asks for.
        is_file: Whether a checkpoint is a single file.
        is_remote: Whether it is the address of a store.
        plain: The template without the options of an address.

    Raises:
        ValueError: the template is malformed, has a field that is not allowed, or is an address that cannot be one.
    """

    def __init__(self, filepath: str, *, weights_only: bool, keep: int | None) -> None:
        self.is_remote = is_address(filepath)
        if self.is_remote:
            parse_address(filepath)
        self.template = policy.Template(filepath)
        self.plain, self._query = split_query(filepath)
        self.format = policy.format_of(self.plain, weights_only=weights_only)
        self.is_file = self.format != "orbax_directory"
        self._root, kind = policy.split_target(policy.Template(self.plain, filepath=filepath))
        self._holds_one_step = kind == "single"
        if self.is_file:
            self._root = policy.Template(os.path.dirname(self.plain) or ".", filepath=filepath)
        self._keep = keep
        self._saved: deque[PendingSave] = deque(maxlen=None if keep is None else keep + _UNSURE_FILES)
        self._directory: Path | None = None
        self._base: Place = Path()

    def __getstate__(self) -> dict[str, Any]:
        """A copy keeps or deletes the files only that it saves itself."""
        return self.__dict__ | {"_saved": deque(maxlen=self._saved.maxlen)}

    def is_fixed(self) -> bool:
        """Returns whether `fix` was called."""
        return self._directory is not None

    def fix(self, patience_seconds: float) -> None:
        """Fixes what a relative path means, whatever becomes of the working directory, and checks the target.

        Args:
            patience_seconds: How long a store may fail before that is an error.

        Raises:
            OSError: nothing can be saved there.
        """
        self._directory = Path.cwd()
        self._base = _constant_parent(self._absolute(self._root.text))
        if isinstance(self._base, Path):
            commit.probe_directory(self._base)
        else:
            staging.probe(self._base, patience_seconds)
        if not self.template.fields:
            self.refuse_directory(self.template.format({}))

    def lock_path(self) -> Path | None:
        """Returns the lock file that stands for all places of the filepath; a store has none."""
        if not isinstance(self._base, Path):
            return None
        if self.is_constant:
            return ownership.lock_path(self._base)
        text = self.template.text if self.is_file else self._root.text
        return ownership.lock_path(self._base, os.path.relpath(str(self._absolute(text)), self._base))

    @property
    def holds_one_step(self) -> bool:
        """Whether each save replaces everything else in its directory."""
        return self._holds_one_step and not self.is_file

    @property
    def is_constant(self) -> bool:
        """Whether it is one directory, whatever the fields."""
        return not self.is_file and not self._root.fields

    def read_manifests(self) -> list[Manifest]:
        """Returns the manifests of what is committed in the one directory."""
        return catalog.Census().look(open_place(self._absolute(self._root.text)))

    def refuse_directory(self, filepath: str) -> None:
        """Raises an `OSError` in the words of Keras if a directory is where a file shall go."""
        place = self._absolute(filepath)
        if self.is_file and isinstance(place, Path) and place.is_dir():
            raise OSError(
                "Please specify a non-directory filepath for ModelCheckpoint. "
                f"Filepath used is an existing directory: {filepath}"
            )

    def place(self, fields: Fields) -> Callable[[int], Target]:
        """Returns what gives the place of a step; `fields` fill the template in."""
        siblings = self._list_siblings()

        def at(step: int) -> Target:
            known = {**fields, "step": step}
            shown = self.template.format(known)
            return self._target(self._root.format(known), shown, siblings, self._holds_one_step)

        return at

    def place_at(self, filepath: str, step: int) -> Callable[[int], Target]:
        """Returns the same for a path that is not made by the template, where `step` is expected.

        Raises:
            OSError: nothing can be saved there.
        """
        siblings = self._list_siblings()
        path = to_place(filepath)
        holds_one_step = self._holds_one_step or path.name != str(step)
        root = str(path.parent) if self.is_file or not holds_one_step else filepath
        place = self._absolute(root)
        if not self._is_below_base(root) and isinstance(place, Path):
            commit.probe_directory(place)

        def at(actual: int) -> Target:
            is_named = self.is_file or holds_one_step
            shown = filepath if is_named else str(path.with_name(str(actual)))
            return self._target(root, shown, siblings, holds_one_step)

        return at

    def remember(self, pending: PendingSave) -> None:
        """Counts a file among those of which the newest are kept."""
        if self._keep is not None and self.is_file:
            self._saved.append(pending)

    def _target(self, root: str, shown: str, siblings: list[Place], holds_one_step: bool) -> Target:
        directory = self._absolute(root)
        base = self._base if self._is_below_base(root) else directory
        if not self.is_file:
            return Target(base, directory, shown, self._keep, holds_one_step)
        file = self._absolute(shown)
        others = tuple(str(path) for path in siblings if path != file)
        return Target(base, directory, shown, self._keep, file=file, siblings=others)

    def _list_siblings(self) -> list[Place]:
        """Returns the files saved so far, each once, in the order of their newest contents."""
        newest_first = dict.fromkeys(self._absolute(pending.path) for pending in reversed(self._saved))
        return list(newest_first)[::-1]

    def _is_below_base(self, root: str) -> bool:
        place = self._absolute(root)
        if isinstance(place, Path):
            return isinstance(self._base, Path) and place.is_relative_to(self._base)
        return isinstance(self._base, Address) and place.is_relative_to(self._base)

    def _absolute(self, filepath: str) -> Place:
        if is_address(filepath):
            return parse_address(filepath if "?" in filepath else f"{filepath}{self._query}")
        return (self._directory or Path.cwd()) / filepath


def _constant_parent(path: Place) -> Place:
    """Returns the part of a path before the first one with a field in it."""
    if isinstance(path, Address):
        names = path.key.split("/")
        constant = next((number for number, name in enumerate(names) if "{" in name), len(names))
        return replace(path, key="/".join(names[:constant]))
    parts: list[str] = []
    for part in path.parts:
        if "{" in part:
            break
        parts.append(part)
    return Path(*parts)
