"""What each command of `offstep` does: from its arguments to an answer that can be shown or printed as JSON."""

from __future__ import annotations

import errno
import os
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import RenderableType

from offstep import averaging, checking, comparison, inspection, pruning
from offstep import export as exports
from offstep.discovery import open_newest
from offstep.listing import Entry, list_entries
from offstep.stored import Reader
from offstep.stores.path import Readable, StorePath
from offstep.tables import make_table, spell_age, spell_number
from offstep.words import spell_bytes

DONE, DIFFERENT, NOTHING, DAMAGED = 0, 1, 3, 5


@dataclass(frozen=True)
class Answer:
    """What a command has found.

    Attributes:
        document: The same as JSON; numbers may be NaN or infinite.
        shown: What people see, from top to bottom.
        code: Exit status.
    """

    document: dict[str, Any]  # JSON
    shown: Sequence[RenderableType] = field(default=())
    code: int = DONE


def ls(args: Namespace) -> Answer:
    """Lists checkpoints."""
    entries = list_entries(args.path)
    monitor = pruning.choose_monitor(entries, args.monitor)
    best = pruning.find_best(entries, monitor, args.mode)
    expired = [] if args.keep is None else pruning.select_prunable(entries, _wishes(args))
    gone = {entry.path for entry in expired}
    document = {
        "path": str(args.path),
        "monitor": monitor,
        "checkpoints": [
            _describe(entry) | {"is_best": entry is best, "would_go": entry.path in gone} for entry in entries
        ],
    }
    if not entries:
        return Answer(document, [f"no checkpoint in {args.path}"])
    columns = ["step", "age", "size", monitor or "metric", "", "whole", "path"]
    columns += [] if args.keep is None else ["retention"]
    rows = [_row(entry, monitor, best, args.path) for entry in entries]
    if args.keep is not None:
        rows = [[*row, "goes" if entry.path in gone else "stays"] for row, entry in zip(rows, entries, strict=True)]
    total = sum(entry.size_bytes for entry in entries)
    summary = f"{len(entries)} checkpoints, {spell_bytes(total)}"
    return Answer(document, [make_table(columns, rows, right=("step", "age", "size", monitor or "metric")), summary])


def inspect(args: Namespace) -> Answer:
    """Shows the leaves of one checkpoint, and what is kept with it."""
    reader = open_newest(args.path, verify=False)
    try:
        contents = reader.contents
        leaves = inspection.select_leaves(contents.leaves, args.prefix)
        if args.prefix and not leaves:
            raise ValueError(f"{reader.path} has no leaf below {' or '.join(args.prefix)}")
        found = {leaf.name: inspection.measure(reader, leaf) for leaf in leaves} if args.stats else {}
    finally:
        reader.close()
    about = {key: value for key, value in contents.manifest.items() if key != "files"}
    total = sum(leaf.size_bytes for leaf in leaves)
    document = {
        "path": str(reader.path),
        "format": contents.format,
        "manifest": about,
        "size_bytes": total,
        "leaves": [
            {"name": leaf.name, "shape": list(leaf.shape), "dtype": leaf.dtype, "size_bytes": leaf.size_bytes}
            | (asdict(found[leaf.name]) if args.stats else {})
            for leaf in leaves
        ],
    }
    columns = ["leaf", "dtype", "shape", "size"] + (["min", "max", "mean", "non-finite"] if args.stats else [])
    rows = []
    for leaf in leaves:
        row = [leaf.name, leaf.dtype, "x".join(map(str, leaf.shape)) or "scalar", spell_bytes(leaf.size_bytes)]
        if args.stats:
            numbers = found[leaf.name]
            row += [spell_number(number) for number in (numbers.minimum, numbers.maximum, numbers.mean)]
            row.append(str(numbers.nonfinite))
        rows.append(row)
    head = f"{reader.path} ({contents.format}): {len(leaves)} leaves, {spell_bytes(total)}"
    notes = [f"  {key}: {value}" for key, value in about.items()]
    return Answer(document, [head, *notes, make_table(columns, rows, right=columns[3:])])


def latest(args: Namespace) -> Answer:
    """Prints the newest valid checkpoint."""
    found = str(_find_one(args.path, verify=args.verify))
    return Answer({"path": found}, [found])


def verify(args: Namespace) -> Answer:
    """Checks one checkpoint, or all of a directory."""
    entries = list_entries(args.path)
    if not entries:
        open_newest(args.path, verify=False).close()  # raises, and says what is there instead
    is_one = len(entries) == 1 and entries[0].path == args.path
    verdicts = [checking.check(args.path)] if is_one else [checking.check_step(entry.path) for entry in entries]
    damaged = [verdict for verdict in verdicts if verdict.problems]
    document = {
        "ok": not damaged,
        "checkpoints": [
            asdict(verdict) | {"path": str(verdict.path), "ok": not verdict.problems} for verdict in verdicts
        ],
    }
    shown: list[RenderableType] = []
    for verdict in verdicts:
        if verdict.problems:
            shown += [f"damaged  {verdict.path}", *(f"         {problem}" for problem in verdict.problems)]
        else:
            shown.append(f"whole    {verdict.path}  ({_describe_cover(verdict)})")
    return Answer(document, shown, DAMAGED if damaged else DONE)


def _describe_cover(verdict: checking.Verdict) -> str:
    checked = f"{verdict.leaves} leaves, {spell_bytes(verdict.checked_bytes)} compared with checksums"
    if not verdict.unchecked:
        return checked
    more = f" and {len(verdict.unchecked) - 1} more" if len(verdict.unchecked) > 1 else ""
    return f"{checked}; without a checksum: {verdict.unchecked[0]}{more}"


def diff(args: Namespace) -> Answer:
    """Compares two checkpoints."""
    for name in ("atol", "rtol"):
        if not getattr(args, name) >= 0:
            raise ValueError(f"--{name} must not be negative. Received: {getattr(args, name)}")
    a = open_newest(args.a, verify=False)
    try:
        b = open_newest(args.b, verify=False)
        try:
            found = comparison.compare(a, b, atol=args.atol, rtol=args.rtol)
        finally:
            b.close()
    finally:
        a.close()
    document = {"a": str(a.path), "b": str(b.path), "equal": not found, "differences": [asdict(one) for one in found]}
    shown: list[RenderableType] = [f"A: {a.path}", f"B: {b.path}"]
    if not found:
        return Answer(document, [*shown, f"equal: {len(a.contents.leaves)} leaves"])
    if a.contents.format != b.contents.format:
        shown.append(
            f"A is {a.contents.format} and B is {b.contents.format}, which name their leaves differently; "
            "`offstep export` makes one the other"
        )
    columns = ["leaf", "differs in", "values", "max abs", "max rel"]
    shown.append(make_table(columns, [_difference_row(one) for one in found], right=columns[2:]))
    return Answer(document, shown, DIFFERENT)


def prune(args: Namespace) -> Answer:
    """Removes what retention would."""
    entries = list_entries(args.path)
    if len(entries) == 1 and entries[0].path == args.path:
        raise ValueError(f"{args.path} is one checkpoint; give the directory that holds several")
    expired = pruning.select_prunable(entries, _wishes(args))
    broken = [entry for entry in entries if not entry.is_whole]
    if not args.dry_run:
        if not args.while_saving:
            pruning.refuse_live(args.path, expired)
        for entry in expired:
            pruning.remove(entry)
    freed = sum(entry.size_bytes for entry in expired)
    document = {
        "dry_run": args.dry_run,
        "removed": [str(entry.path) for entry in expired],
        "broken": [str(entry.path) for entry in broken],
        "size_bytes": freed,
    }
    verb = "would remove" if args.dry_run else "removed"
    shown = [f"{verb} {entry.path}" for entry in expired]
    shown += [f"left alone {entry.path}: {entry.problem}" for entry in broken]
    staying = len(entries) - len(expired)
    shown.append(f"{verb} {len(expired)} checkpoints, {spell_bytes(freed)}; {staying} stay")
    return Answer(document, shown)


def export(args: Namespace) -> Answer:
    """Writes a checkpoint in another format."""
    is_keras = args.out.name.endswith((".keras", ".weights.h5"))
    if not is_keras and args.out.suffix not in exports.WRITERS:
        raise ValueError(
            f"the name of the file says the format: .safetensors, .npz, .keras or .weights.h5. Received: {args.out}"
        )
    _refuse_existing(args)
    reader = open_newest(args.path, verify=False)
    try:
        if is_keras:
            if args.weights_only:
                raise ValueError("--weights-only is for .safetensors and .npz; .weights.h5 holds weights only anyway")
            size = _export_keras(reader, args)
            return Answer({"path": str(args.out), "source": str(reader.path), "size_bytes": size}, [str(args.out)])
        leaves = [leaf for leaf in reader.contents.leaves if averaging.is_weight(leaf) or not args.weights_only]
        size = exports.export(reader, leaves, args.out.absolute())
    finally:
        reader.close()
    document = {"path": str(args.out), "source": str(reader.path), "size_bytes": size, "leaves": len(leaves)}
    return Answer(document, [f"{args.out}: {len(leaves)} leaves of {reader.path}, {spell_bytes(size)}"])


def _export_keras(reader: Reader, args: Namespace) -> int:
    # Before Keras is imported: this is the user's machine of training, whose accelerators are not ours to take.
    os.environ.setdefault("KERAS_BACKEND", "jax")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from offstep.keras_export import export_keras

    return export_keras(reader, args.out.absolute(), args.modules)


def average(args: Namespace) -> Answer:
    """Averages the weights of checkpoints."""
    if args.newest is not None and args.best is not None:
        raise ValueError("give --newest or --best, not both")
    _refuse_existing(args)
    paths = _choose_paths(args)
    if len(paths) < 2:
        found = ", ".join(map(str, paths)) or "none that is whole"
        raise ValueError(f"an average needs two checkpoints or more. Received: {found}")
    names = averaging.average(paths, args.out.absolute())
    document = {"path": str(args.out), "averaged": [str(path) for path in paths], "leaves": names}
    shown = [str(path) for path in paths]
    return Answer(document, [*shown, f"{args.out}: {len(names)} leaves are the mean of these {len(paths)}"])


def _choose_paths(args: Namespace) -> list[Readable]:
    count = args.newest or args.best
    if args.newest is None and args.best is None:
        return [_find_one(path) for path in args.path]
    if count < 1:
        raise ValueError(f"--newest and --best take a number of at least 1. Received: {count}")
    entries = [entry for path in args.path for entry in list_entries(path) if entry.is_whole and not entry.nonfinite]
    if args.best is not None:
        entries = pruning.rank(entries, pruning.choose_monitor(entries, args.monitor), args.mode)[:count]
        entries.sort(key=lambda entry: (entry.step or 0, entry.saved_at))
    return [entry.path for entry in entries[-count:]]


def _find_one(path: Readable, *, verify: bool = False) -> Readable:
    reader = open_newest(path, verify=verify)
    reader.close()
    return reader.path


def _refuse_existing(args: Namespace) -> None:
    if os.path.lexists(args.out) and not args.force:
        raise FileExistsError(errno.EEXIST, "it exists already; --force replaces it", str(args.out))


def doctor(args: Namespace) -> Answer:
    """Measures what saving could cost here."""
    from offstep.doctor import diagnose  # the other commands do without JAX

    found = diagnose(args.path.absolute())
    fetch = "-" if found.fetch_speed is None else f"{spell_bytes(round(found.fetch_speed))}/s"
    rows = [
        ["versions", ", ".join(f"{name} {text}" for name, text in found.versions.items())],
        ["devices", ", ".join(found.devices)],
        ["copy in memory", f"{spell_bytes(round(found.copy_speed))}/s"],
        ["device to host", fetch],
        ["write, durable", f"{spell_bytes(round(found.write_speed))}/s"],
        ["one page, durable", f"{found.sync_seconds * 1e3:.3g} ms"],
        ["file system", f"{found.file_system or 'unknown'}, {spell_bytes(found.free_bytes)} free"],
        ["memory for slots", spell_bytes(found.memory_bytes)],
        ["writer", "a process of its own" if found.can_share else "a thread"],
    ]
    return Answer(asdict(found) | {"path": str(args.path)}, [make_table(["", "measured"], rows), *found.advice])


def _wishes(args: Namespace) -> pruning.Wishes:
    return pruning.Wishes(args.keep, args.keep_best, args.keep_every, args.monitor, args.mode)


def _describe(entry: Entry) -> dict[str, Any]:  # JSON
    return asdict(entry) | {"path": str(entry.path), "metrics": dict(entry.metrics), "is_whole": entry.is_whole}


def _row(entry: Entry, monitor: str | None, best: Entry | None, directory: Readable) -> list[str]:
    return [
        "-" if entry.step is None else str(entry.step),
        spell_age(time.time() - entry.saved_at),
        spell_bytes(entry.size_bytes),
        spell_number(entry.metrics.get(monitor or "")),
        "best" if entry is best else "",
        "yes" if entry.is_whole else f"no: {entry.problem}",
        _show_path(entry.path, directory),
    ]


def _show_path(path: Readable, directory: Readable) -> str:
    if path == directory:
        return str(path)
    if isinstance(path, StorePath) and isinstance(directory, StorePath):
        return str(path.relative_to(directory))
    return str(Path(str(path)).relative_to(str(directory)))


def _difference_row(found: comparison.Difference) -> list[str]:
    if found.kind != "values":
        return [found.name, f"{found.kind}: {found.text}", "", "", ""]
    return [found.name, found.kind, str(found.count), spell_number(found.max_abs), spell_number(found.max_rel)]
