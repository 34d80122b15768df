"""The command `offstep`: arguments in, an answer on standard output, an exit status that scripts can use."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import offstep
from offstep import commands
from offstep.bench import bench
from offstep.commands import Answer
from offstep.errors import (
    CheckpointDamaged,
    CheckpointNotFound,
    OffstepError,
    StructureMismatch,
    UnsupportedFormat,
    UnsupportedLeaf,
)
from offstep.run_report import DEFAULT_NAME, report
from offstep.stores.address import is_address
from offstep.stores.path import Readable, open_place
from offstep.tables import make_console

USAGE, NOTHING, UNSUITABLE, DAMAGED, REFUSED, INTERRUPTED = 2, 3, 4, 5, 6, 130

_STATUS: tuple[tuple[type[BaseException], int], ...] = (
    (CheckpointNotFound, NOTHING),
    (UnsupportedFormat, UNSUITABLE),
    (StructureMismatch, UNSUITABLE),
    (UnsupportedLeaf, UNSUITABLE),
    (CheckpointDamaged, DAMAGED),
    (OSError, REFUSED),
    (OffstepError, REFUSED),
    (ValueError, USAGE),
    (KeyboardInterrupt, INTERRUPTED),
)
_CODES = """exit status:
  0  done; what was asked for is so
  1  diff: the checkpoints differ
  2  bad arguments
  3  there is no checkpoint, or no event log
  4  it is no checkpoint, one of a newer version, or one that does not fit
  5  damaged
  6  the system refused: permission, disk full, ...
  130  interrupted"""

Add = Callable[..., argparse.ArgumentParser]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status. Errors are told on standard error in one line."""
    args = make_parser().parse_args(arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("always", RuntimeWarning)
        warnings.showwarning = _show_warning
        try:
            answer: Answer = args.run(args)
            _print(answer, as_json=args.json)
        except BrokenPipeError:  # the reader has seen enough, as `head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except (OffstepError, OSError, ValueError, KeyboardInterrupt) as error:
            return _fail(error, as_json=args.json)
    return answer.code


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="offstep",
        description="Looks at, checks, compares and converts checkpoints of offstep, Orbax and Keras.",
        epilog=_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"offstep {offstep.__version__}")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run: Callable[[argparse.Namespace], Answer], text: str) -> argparse.ArgumentParser:
        command = subparsers.add_parser(
            name, help=text, description=text, epilog=_CODES, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        command.add_argument("--json", action="store_true", help="print one JSON document")
        command.set_defaults(run=run)
        return command

    _add_looking(add)
    _add_retention(add)
    _add_making(add)
    _add_measuring(add)
    _add_report(add)
    return parser


def local_path(text: str) -> Path:
    """Reads a path of this machine; the address of a store would become a directory of that name."""
    if is_address(text):
        raise argparse.ArgumentTypeError(f"it must be a path of this machine, got {text}")
    return Path(text)


def read_place(text: str) -> Readable:
    """Reads a path, or the address of a store."""
    try:
        return open_place(text)
    except (ValueError, OSError) as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _add_looking(add: Add) -> None:
    command = add("inspect", commands.inspect, "Shows the leaves of a checkpoint and what is kept with it.")
    command.add_argument("path", type=read_place, help="a checkpoint, or a directory whose newest one is taken")
    command.add_argument("prefix", nargs="*", help="only leaves below these names")
    command.add_argument("--stats", action="store_true", help="read the values: min, max, mean, non-finite")
    command = add("latest", commands.latest, "Prints the path of the newest valid checkpoint.")
    command.add_argument("path", type=read_place, metavar="DIR", help="a checkpoint is its own newest one")
    command.add_argument("--verify", action="store_true", help="read all of it and check every checksum too")
    command = add("verify", commands.verify, "Checks every checksum of a checkpoint, or of all in a directory.")
    command.add_argument("path", type=read_place)
    command = add("diff", commands.diff, "Compares the structure and the values of two checkpoints.")
    command.add_argument("a", type=read_place)
    command.add_argument("b", type=read_place)
    command.add_argument("--atol", type=float, default=0.0, help="absolute difference that is allowed")
    command.add_argument("--rtol", type=float, default=0.0, help="difference that is allowed relative to the value")


def _add_retention(add: Add) -> None:
    for name, run, text in (
        ("ls", commands.ls, "Lists checkpoints: step, age, size, metric, best, whole, what retention would do."),
        ("prune", commands.prune, "Removes checkpoints, oldest first; the best and the newest stay."),
    ):
        command = add(name, run, text)
        command.add_argument("path", type=read_place, metavar="DIR")
        command.add_argument("--keep", type=int, required=name == "prune", help="how many of the newest stay")
        command.add_argument("--keep-best", type=int, default=1, metavar="K", help="how many of the best stay as well")
        command.add_argument("--keep-every", type=int, metavar="N", help="multiples of this step stay as well")
        command.add_argument("--monitor", help="metric that tells the best (default: val_loss, loss or the first)")
        command.add_argument("--mode", choices=("auto", "min", "max"), default="auto")
    command.add_argument("--dry-run", action="store_true", help="only say what would go")
    command.add_argument("--while-saving", action="store_true", help="also where a live run saves")


def _add_making(add: Add) -> None:
    command = add(
        "export", commands.export, "Writes a checkpoint as .safetensors, .npz, .keras or .weights.h5, as OUT ends."
    )
    command.add_argument("path", type=read_place, help="a checkpoint, or a directory whose newest one is taken")
    command.add_argument("out", type=local_path, metavar="OUT")
    command.add_argument("--weights-only", action="store_true", help="leave out optimizer, metrics and seeds")
    command.add_argument(
        "--import", dest="modules", action="append", default=[], metavar="MODULE", help="registers custom layers"
    )
    command.add_argument("--force", action="store_true", help="replace OUT")
    command = add("average", commands.average, "Averages the weights of checkpoints; all else is that of the last one.")
    command.add_argument(
        "path", type=read_place, nargs="+", help="checkpoints, or directories whose newest ones are taken"
    )
    command.add_argument("out", type=local_path, metavar="OUT")
    command.add_argument("--newest", type=int, metavar="K", help="the K newest of these")
    command.add_argument("--best", type=int, metavar="K", help="the K best of these")
    command.add_argument("--monitor", help="metric that tells the best")
    command.add_argument("--mode", choices=("auto", "min", "max"), default="auto")
    command.add_argument("--force", action="store_true", help="replace OUT")


def _add_measuring(add: Add) -> None:
    command = add("doctor", commands.doctor, "Measures what saving could cost on this machine and in DIR.")
    command.add_argument("path", type=local_path, metavar="DIR", nargs="?", default=Path(), help="default: here")
    command = add("bench", bench, "Trains with offstep and with Keras's callbacks, and says what saving costs each.")
    command.add_argument("path", type=local_path, metavar="DIR", nargs="?", default=Path(), help="default: here")
    command.add_argument("--state", default="500MB", metavar="SIZE", help="weights and optimizer (default: 500MB)")
    command.add_argument("--leaves", type=int, default=400, metavar="N", help="arrays in it (default: 400)")
    command.add_argument("--step", default="120ms", metavar="TIME", help="of a training step (default: 120ms)")
    command.add_argument(
        "--every", type=int, nargs="+", default=[1, 5, 20], metavar="N", help="batches from save to save (1 5 20)"
    )
    command.add_argument("--saves", type=int, default=3, metavar="N", help="saves timed at each of these (default: 3)")
    command.add_argument("--budget", default="1%", metavar="SHARE", help="overhead that is fine (default: 1%%)")
    command.add_argument("--mtbf", metavar="TIME", help="mean time between failures, 24h say: how often is best then")


def _add_report(add: Add) -> None:
    command = add(
        "report", report, "Makes a page of what saving has cost a run, and of what is durable, from its event log."
    )
    command.add_argument(
        "path", type=local_path, metavar="RUN", nargs="?", default=Path(), help="the event log, or its directory (here)"
    )
    command.add_argument(
        "out", type=local_path, metavar="OUT", nargs="?", help=f"default: {DEFAULT_NAME} beside the log"
    )
    command.add_argument("--trace", type=local_path, metavar="FILE", help="also write a trace for ui.perfetto.dev")
    command.add_argument("--run", dest="run_name", metavar="NAME", help="which run of the log (default: the newest)")
    command.add_argument("--force", action="store_true", help="replace files that are no reports")


def _print(answer: Answer, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(_strict(answer.document), allow_nan=False, indent=2))
    else:
        console = make_console()
        with console.capture() as capture:  # the console would end the process when the reader has gone
            for part in answer.shown:
                console.print(part)
        sys.stdout.write(capture.get())
    sys.stdout.flush()


def _strict(value: Any) -> Any:  # JSON, but for numbers that it does not know and tuples
    if isinstance(value, dict):
        return {str(key): _strict(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _fail(error: BaseException, *, as_json: bool) -> int:
    text = "interrupted" if isinstance(error, KeyboardInterrupt) else _describe(error)
    if as_json:
        print(json.dumps({"error": {"kind": type(error).__name__, "message": text}}, indent=2))
    print(f"offstep: {text}", file=sys.stderr)
    return next(status for kind, status in _STATUS if isinstance(error, kind))


def _describe(error: BaseException) -> str:
    if isinstance(error, OSError) and not isinstance(error, OffstepError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return str(error)


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"offstep: {message}", file=sys.stderr)
