"""How are runs of several peers made comparable? Fresh processes, alternating order, watched from outside.

Every run is its own process, so that no peer inherits another one's threads, memory or warm caches. The order is
rotated from repeat to repeat, the bounds of the machine are taken in between, and after every run its files are
removed and the disk is synced, so that no peer pays for another one's dirty pages. While a run goes on, this process
samples the memory of its process tree and notes when checkpoints get their final names; neither takes a lock or the
GIL in the training process.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from bounds import measure_bounds
from equalise import fsync_tree
from measure import RunSpec
from peers import BASELINE, PEERS, Peer
from workloads import Workload

HERE = Path(__file__).parent
FINAL_NAME = re.compile(r"(\d+)(\.\w+)?")
MEMORY_INTERVAL_SECONDS = 0.02
NAME_INTERVAL_SECONDS = 0.005
TREE_INTERVAL_SECONDS = 0.5


@dataclass(frozen=True)
class Options:
    """How a benchmark runs.

    Attributes:
        directory: Where checkpoints go; its file system is what is measured.
        repeats: Runs of every peer.
        equalise: Peers that are not durable are made so with fsync.
        barrier: Wait for the state before every save.
        pss: Memory by proportional set size: exact where processes share pages, but it disturbs who is measured.
        cache_compilation: Programs that XLA compiled are kept on disk for the next runs.
        timeout_seconds: A run that takes longer has failed.
        say: Where progress goes.
    """

    directory: Path
    repeats: int = 3
    equalise: bool = False
    barrier: bool = True
    pss: bool = False
    cache_compilation: bool = False
    timeout_seconds: float = 600.0
    say: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True)


@dataclass
class Runs:
    """All runs of one workload.

    Attributes:
        workload: What was trained.
        by_peer: Name of a peer to the results of its runs, in order of repeats.
        bounds: One measurement of the machine's bounds per repeat.
        failures: Name of a peer to the end of the output of its failed run.
    """

    workload: Workload
    by_peer: dict[str, list[dict[str, Any]]] = field(default_factory=dict)  # RunResult as JSON, and what was watched
    bounds: list[dict[str, dict[str, float]]] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)


def run_alternating(workload: Workload, peers: list[Peer], options: Options) -> Runs:
    """Runs every peer `options.repeats` times, in rotated order, with the bounds in between."""
    runs = Runs(workload, {peer.name: [] for peer in peers})
    if options.cache_compilation:
        # Not counted: whoever compiled would have compiled in its memory, and everybody else not.
        run_once(workload, PEERS[BASELINE], 0, options)
    for repeat in range(options.repeats):
        shift = repeat * len(peers) // options.repeats
        for peer in [*peers[shift:], *peers[:shift]]:
            _run_into(runs, peer, repeat, options)
        with empty_directory(options.directory) as directory:
            runs.bounds.append(measure_bounds(workload.state_bytes, directory))
    return runs


def _run_into(runs: Runs, peer: Peer, repeat: int, options: Options) -> None:
    if peer.name in runs.failures:
        return
    try:
        result = run_once(runs.workload, peer, repeat, options)
    except RunFailedError as error:
        runs.failures[peer.name] = str(error)
        runs.by_peer.pop(peer.name, None)
        options.say(f"  {runs.workload.name} · {peer.label}: failed\n{error}")
        return
    runs.by_peer[peer.name].append(result)
    calls = statistics.median(save["call_seconds"] for save in result["saves"])
    options.say(
        f"  {runs.workload.name} · repeat {repeat + 1} · {peer.label}: "
        f"{result['wall_seconds']:.2f} s, t_call {1e3 * calls:.2f} ms"
    )


class RunFailedError(Exception):
    """A run ended badly; the text is the end of its output."""


def run_once(workload: Workload, peer: Peer, seed: int, options: Options) -> dict[str, Any]:
    """Runs one peer in a fresh process and returns its `RunResult` as JSON, with what was watched."""
    with empty_directory(options.directory) as directory:
        checkpoints = directory / "checkpoints"
        checkpoints.mkdir()
        spec = RunSpec(workload, peer.name, str(checkpoints), seed, options.equalise, options.barrier)
        answer = directory / "result.json"
        with Watcher(
            checkpoints,
            equalise=options.equalise and peer.finished == "name",
            read_memory=read_pss_bytes if options.pss else read_memory_bytes,
        ) as watcher:
            _run_process(spec, answer, watcher, options)
        result = json.loads(answer.read_text())
    watcher.annotate(result)
    result["equalised"] = options.equalise
    _check(result)
    return result


def _run_process(spec: RunSpec, answer: Path, watcher: Watcher, options: Options) -> None:
    environment = {**os.environ, "KERAS_BACKEND": "jax", "TF_CPP_MIN_LOG_LEVEL": "3"}
    if options.cache_compilation:
        environment["JAX_COMPILATION_CACHE_DIR"] = str(options.directory / "xla")
    command = [sys.executable, str(HERE / "measure.py"), spec.to_json(), str(answer)]
    log = answer.with_suffix(".log")
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment)
        watcher.pid = process.pid
        try:
            status = process.wait(options.timeout_seconds)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            process.kill()
            process.wait()
    if status != 0:
        reason = f"no end after {options.timeout_seconds:.0f} s" if status is None else f"exit status {status}"
        raise RunFailedError(f"{reason}: {log.read_text(errors='replace')[-2000:]}")


def _check(result: dict[str, Any]) -> None:
    """Refuses a run whose checkpoints cannot hold the state: it must not look fast."""
    if PEERS[result["peer"]].finished == "never":
        return
    if result["checkpoint_bytes"] < 0.5 * result["state_bytes"]:
        raise RunFailedError(f"the newest checkpoint has {result['checkpoint_bytes']} bytes of {result['state_bytes']}")
    if not all(save["call_seconds"] for save in result["saves"]):
        raise RunFailedError("a save was made in a hook that is not timed")
    errors = [save["own"]["error"] for save in result["saves"] if save["own"].get("error")]
    if errors:
        raise RunFailedError(errors[0])


@contextmanager
def empty_directory(parent: Path) -> Iterator[Path]:
    """Yields a new directory; afterwards its files are removed and the disk is synced."""
    directory = parent / f"run-{os.getpid()}-{time.monotonic_ns()}"
    directory.mkdir(parents=True)
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        os.sync()


class Watcher:
    """Watches a run from outside: memory of the process tree, and when checkpoints get their final names."""

    def __init__(self, directory: Path, *, equalise: bool, read_memory: Callable[[list[int]], int]) -> None:
        self.directory = directory
        self.equalise = equalise
        self.read_memory = read_memory
        self.pid: int | None = None
        self.memory: list[tuple[float, int]] = []
        self.named_at: dict[int, float] = {}
        self.fsynced_at: dict[int, float] = {}
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=loop, name=loop.__name__) for loop in (self._memory, self._names)]

    def __enter__(self) -> Watcher:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def annotate(self, result: dict[str, Any]) -> None:
        """Adds to a result: peak memory in its window, and times to the final name and to fsync of each save."""
        window = [size for at, size in self.memory if result["opened_at"] <= at <= result["closed_at"]]
        result["peak_memory_bytes"] = max(window, default=0)
        for save in result["saves"]:
            for key, times in (("named_seconds", self.named_at), ("fsynced_seconds", self.fsynced_at)):
                at = times.get(save["step"])
                save[key] = None if at is None else at - save["started_at"]

    def _memory(self) -> None:
        pids: list[int] = []
        listed_at = 0.0
        while not self._stop.wait(MEMORY_INTERVAL_SECONDS):
            now = time.perf_counter()
            if self.pid is not None and now - listed_at > TREE_INTERVAL_SECONDS:
                pids, listed_at = list_tree(self.pid), now
            self.memory.append((now, self.read_memory(pids)))

    def _names(self) -> None:
        while not self._stop.wait(NAME_INTERVAL_SECONDS):
            for entry in os.scandir(self.directory):
                final = FINAL_NAME.fullmatch(entry.name)
                if final and int(final[1]) not in self.named_at:
                    self._note(int(final[1]), Path(entry.path))

    def _note(self, step: int, path: Path) -> None:
        self.named_at[step] = time.perf_counter()
        if self.equalise:
            fsync_tree(path)
            self.fsynced_at[step] = time.perf_counter()


def list_tree(pid: int) -> list[int]:
    """Returns the process and all its descendants."""
    try:
        return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
    except psutil.NoSuchProcess:
        return []


def read_memory_bytes(pids: list[int]) -> int:
    """Returns the memory of a process tree: private memory of each, shared memory (the slots) once.

    `/proc/<pid>/status` gives counters, without walking page tables under a lock of the measured process, as PSS
    does. Processes of one tree map the same slots, so the largest share of shared memory stands for all.
    """
    private, shared = 0, 0
    for pid in pids:
        fields = _read_fields(Path(f"/proc/{pid}/status"))
        private += fields.get("RssAnon", 0)
        shared = max(shared, fields.get("RssShmem", 0))
    return private + shared


def read_pss_bytes(pids: list[int]) -> int:
    """Returns the memory of a process tree by proportional set size, without mapped files."""
    rollups = [_read_fields(Path(f"/proc/{pid}/smaps_rollup")) for pid in pids]
    return sum(fields.get("Pss_Anon", 0) + fields.get("Pss_Shmem", 0) for fields in rollups)


def _read_fields(path: Path) -> dict[str, int]:
    """Returns the sizes in a file of `/proc`, in bytes."""
    try:
        lines = path.read_text().splitlines()
    except OSError:  # The process is gone.
        return {}
    fields = (line.split() for line in lines if line.endswith(" kB"))
    return {name.rstrip(":"): int(size) << 10 for name, size, _ in fields}
