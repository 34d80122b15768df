"""What a checkpoint looks like on disk: one entry for each format."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from offstep.formats import (
    keras_archive,
    keras_weights,
    orbax_merged,
    orbax_share,
    orbax_share_copy,
    orbax_share_objects,
    orbax_step,
    orbax_upload,
    whole_file,
)
from offstep.records import Job, Leaf, PathKey, Plan, Share


@dataclass(frozen=True)
class Format:
    """What engine and writer need to know of one format.

    Attributes:
        place: In the trainer, once for each structure: gives each leaf its place in a slot. Raises `UnsupportedLeaf`.
        prepare: In the writer, once for each plan: (plan, documents) → what `write` wants; documents are JSON.
        write: In the writer, for each save: makes the slot durable under `job.target`, with files attached by name, and
            returns the bytes that were written, or what else is to be told of them. Raises `OSError`.
        is_file: Whether a checkpoint is a single file rather than a directory in a root of steps.
    """

    place: Callable[[Sequence[Leaf], Sequence[tuple[tuple[PathKey, ...], str]]], Plan]
    prepare: Callable[[Plan, dict[str, Any] | None], Any]  # JSON; whatever the same format's `write` takes
    write: Callable[[Job, Any, mmap.mmap, Mapping[str, mmap.mmap]], int | Share]
    is_file: bool = False


def _alone(
    write: Callable[[Job, Any, mmap.mmap], int],
) -> Callable[[Job, Any, mmap.mmap, Mapping[str, mmap.mmap]], int]:
    def write_alone(job: Job, prepared: Any, slot: mmap.mmap, attachments: Mapping[str, mmap.mmap]) -> int:
        assert not attachments, "there is no room for them in a single file"
        return write(job, prepared, slot)

    return write_alone


FORMATS = {
    "orbax_directory": Format(orbax_step.place, orbax_step.prepare, orbax_step.write),
    # Of several processes each writes a share; one of them merges these. Who gets what is decided in `shares`.
    "orbax_share": Format(orbax_step.place, orbax_share.prepare, orbax_share.write),
    "orbax_share_copy": Format(orbax_step.place, orbax_share.prepare, orbax_share_copy.write),
    "orbax_merged": Format(orbax_step.place, orbax_merged.prepare, orbax_merged.write),
    "orbax_discard": Format(orbax_step.place, orbax_share.prepare, orbax_share_objects.discard),
    # Where each has a disk of its own, it writes all that it holds; what is older goes when all have done so.
    "orbax_retire": Format(orbax_step.place, orbax_step.prepare, orbax_step.write_nothing),
    "keras_weights": Format(keras_weights.place, keras_weights.prepare, _alone(keras_weights.write), is_file=True),
    "keras_archive": Format(keras_weights.place, keras_archive.prepare, _alone(keras_archive.write), is_file=True),
    "upload": Format(orbax_step.place, whole_file.prepare, orbax_upload.write),
    "whole_file": Format(keras_weights.place, whole_file.prepare, _alone(whole_file.write), is_file=True),
}
