"""The writer process as its trainer sees it: started, shared, killed, replaced, or a thread instead."""

from __future__ import annotations

import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import psutil
import pytest
from processes import find_writers, wait_for_end, wait_until

from offstep import catalog, writer_process
from offstep.arrays import describe_leaf
from offstep.checkpointer import Checkpointer
from offstep.engine import Engine
from offstep.errors import SaveFailed, WriterDied
from offstep.options import Options
from offstep.pending import PendingSave
from offstep.records import Target

LARGE = 16 << 20  # elements; a save takes long enough to be met in the middle


def state(step: int, size: int = 1000) -> dict[str, Any]:
    return {"w": jnp.full((size,), step, jnp.float32), "b": jnp.full((3,), step, jnp.bfloat16)}


def assert_holds(checkpointer: Checkpointer, step: int, size: int = 1000) -> None:
    restored = checkpointer.restore(step, state(0, size))
    assert (np.asarray(restored["w"]) == step).all()
    assert (np.asarray(restored["b"]).astype(np.float32) == step).all()


def submit(checkpointer: Checkpointer, step: int, size: int = 1000) -> PendingSave:
    pending = checkpointer.save(step, state(step, size))
    assert pending is not None
    return pending


@contextmanager
def stopped(process: psutil.Process) -> Iterator[None]:
    process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        process.send_signal(signal.SIGCONT)


def test_the_writer_is_one_process_of_lower_priority_without_jax_and_ends_with_close(tmp_path: Path) -> None:
    with Checkpointer(tmp_path) as checkpointer:
        submit(checkpointer, 1).wait()
        [writer] = find_writers()
        assert writer.nice() == min(19, psutil.Process().nice() + 5)
        loaded = Path(f"/proc/{writer.pid}/maps").read_text()
        assert "_native.abi3.so" in loaded
        assert "jaxlib" not in loaded
        assert os.getsid(writer.pid) != os.getsid(0)  # Ctrl-C does not reach it
    assert find_writers() == []
    assert not psutil.pid_exists(writer.pid)


def test_the_writer_runs_the_package_of_its_trainer_though_another_copy_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other" / "offstep").mkdir(parents=True)
    (tmp_path / "other" / "offstep" / "__init__.py").write_text("raise ImportError('another copy')")
    monkeypatch.syspath_prepend(tmp_path / "other")
    with Checkpointer(tmp_path / "steps") as checkpointer:
        submit(checkpointer, 1).wait()
        assert find_writers()
        assert_holds(checkpointer, 1)


def test_two_checkpointers_share_one_writer_process(tmp_path: Path) -> None:
    with Checkpointer(tmp_path / "a") as a:
        with Checkpointer(tmp_path / "b") as b:
            submit(a, 1)
            submit(b, 2)
            assert len(find_writers()) == 1
            submit(a, 3)
        assert b.all_steps() == [2]
        submit(a, 4)
        a.wait()
        assert len(find_writers()) == 1
    assert a.all_steps() == [1, 3, 4]
    assert find_writers() == []


@pytest.mark.crash
def test_a_writer_killed_in_the_middle_of_a_save_is_replaced_and_the_save_becomes_durable(tmp_path: Path) -> None:
    with Checkpointer(tmp_path) as checkpointer:
        submit(checkpointer, 1, LARGE).wait()
        [writer] = find_writers()
        pending = submit(checkpointer, 2, LARGE)
        wait_until(lambda: bool(catalog.leftovers(tmp_path)))
        writer.kill()
        pending.wait()
        assert find_writers() != [writer]
        assert_holds(checkpointer, 1, LARGE)
        assert_holds(checkpointer, 2, LARGE)
        assert sorted(os.listdir(tmp_path)) == [".offstep-lock", "1", "2"]  # nothing of the first attempt is left
        submit(checkpointer, 3, LARGE).wait()


@pytest.mark.crash
def test_all_that_a_killed_writer_had_in_its_queue_becomes_durable(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, slots=4) as checkpointer:
        submit(checkpointer, 1).wait()
        [writer] = find_writers()
        writer.send_signal(signal.SIGSTOP)
        for step in (2, 3, 4, 5):
            submit(checkpointer, step)
        writer.kill()
        checkpointer.wait()
        assert checkpointer.all_steps() == [1, 2, 3, 4, 5]
        for step in (2, 3, 4, 5):
            assert_holds(checkpointer, step)


@pytest.mark.crash
def test_a_writer_killed_while_idle_is_replaced_before_save_returns(tmp_path: Path) -> None:
    """Else the snapshot would be lost if the trainer were killed next."""
    with Checkpointer(tmp_path) as checkpointer:
        submit(checkpointer, 1).wait()
        [writer] = find_writers()
        writer.kill()
        wait_for_end(writer.pid)
        pending = submit(checkpointer, 2)
        [successor] = find_writers()
        assert successor.pid != writer.pid
        pending.wait()
        assert_holds(checkpointer, 2)


@pytest.mark.crash
def test_a_writer_that_keeps_dying_is_given_up_and_the_next_save_gets_another(tmp_path: Path) -> None:
    with Checkpointer(tmp_path) as checkpointer:
        submit(checkpointer, 1).wait()
        failures: list[Exception] = []
        pending = submit_to_a_stopped_writer(checkpointer, 2)
        waiting = threading.Thread(target=lambda: failures.append(error_of(pending)))
        waiting.start()
        killed: set[int] = set()
        while len(killed) < 3:
            for writer in find_writers():
                if writer.pid not in killed:
                    killed.add(writer.pid)
                    writer.kill()
        waiting.join()
        [failure] = failures
        assert isinstance(failure, WriterDied)
        assert "the writer process ended 3 times while it wrote this (exit status -9)" in str(failure)
        assert f"step 2 was not saved to {tmp_path}/2" in str(failure)
        assert "checkpoints saved before it are untouched" in str(failure)
        submit(checkpointer, 3).wait()
        assert checkpointer.all_steps() == [1, 3]
        assert_holds(checkpointer, 1)
        assert checkpointer.counts.failed == 1


def submit_to_a_stopped_writer(checkpointer: Checkpointer, step: int) -> PendingSave:
    [writer] = find_writers()
    writer.send_signal(signal.SIGSTOP)  # so that it is killed with the job in its hands
    return submit(checkpointer, step)


def error_of(pending: PendingSave) -> Exception:
    try:
        pending.wait()
    except SaveFailed as error:
        return error
    raise AssertionError("it did not fail")


@pytest.mark.parametrize("executable", ["/nonexistent/python", "", None])
def test_where_no_process_can_be_started_a_thread_writes_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, executable: str | None
) -> None:
    monkeypatch.setattr(sys, "executable", executable)
    with Checkpointer(tmp_path) as checkpointer:
        with pytest.warns(RuntimeWarning, match=r"cannot start its writer process .* writes in a thread"):
            submit(checkpointer, 1)
        checkpointer.wait()
        submit(checkpointer, 2).wait()
        assert find_writers() == []
        assert_holds(checkpointer, 2)
    monkeypatch.undo()
    with Checkpointer(tmp_path) as checkpointer:  # the next one tries again
        submit(checkpointer, 3).wait()
        assert len(find_writers()) == 1


FALSE_WRITERS = {
    "ends at once": ("exit(0)", r"ended at once, with status 0"),
    "fails at once": ("exit(3)", r"ended at once, with status 3"),
    "lives on, deaf": ("import os; os.closerange(3, 1000); signal.pause()", "runs, but not as a writer"),
    "lives on, silent": ("signal.pause()", "runs, but not as a writer"),
}


@pytest.mark.parametrize(("code", "reason"), FALSE_WRITERS.values(), ids=FALSE_WRITERS.keys())
def test_a_program_that_is_no_writer_is_replaced_by_a_thread_which_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, reason: str
) -> None:
    """As where Python is embedded: `sys.executable` is then the application, or a launcher of it."""
    monkeypatch.setattr(writer_process, "HELLO_SECONDS", 2.0 if "pause" in code else 60.0)
    launcher = make_program(tmp_path / "launcher", f"import signal; {code}")
    monkeypatch.setattr(sys, "executable", str(launcher))
    with Checkpointer(tmp_path / "run") as checkpointer:
        with pytest.warns(
            RuntimeWarning, match=rf"cannot start its writer process \({launcher} {reason}\); it writes in"
        ):
            submit(checkpointer, 1).wait()
        submit(checkpointer, 2).wait()
        assert find_writers() == []
        assert_holds(checkpointer, 1)
        assert_holds(checkpointer, 2)
    monkeypatch.undo()
    with Checkpointer(tmp_path / "run") as checkpointer:  # the next one tries again
        submit(checkpointer, 3).wait()
        assert len(find_writers()) == 1


def make_program(path: Path, code: str) -> Path:
    path.write_text(f"#!{sys.executable}\n{code}\n")
    path.chmod(0o755)
    return path


def test_in_thread_mode_no_process_is_started(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, in_process=True, max_to_keep=2) as checkpointer:
        for step in (1, 2, 3):
            submit(checkpointer, step)
        checkpointer.wait()
        assert find_writers() == []
        assert checkpointer.all_steps() == [2, 3]
        assert_holds(checkpointer, 3)
    assert not any(thread.name == "offstep-writer" for thread in threading.enumerate())


def test_a_save_that_failed_in_thread_mode_gives_its_slot_back(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, in_process=True, slots=1) as checkpointer:
        submit(checkpointer, 1).wait()
        (tmp_path / "2").write_text("in the way")
        pending = submit(checkpointer, 2)
        with pytest.raises(SaveFailed, match="a file is where the checkpoint shall go"):
            pending.wait()
        submit(checkpointer, 3).wait()
    assert checkpointer.all_steps() == [1, 3]


@pytest.mark.parametrize("in_process", [True, False])
def test_slots_that_come_and_go_without_a_save_do_no_harm(tmp_path: Path, in_process: bool) -> None:
    """A slot that was dropped before the writing thread looked at it once ended that thread."""
    arrays = [jnp.ones(3)]
    leaves = [describe_leaf(("w",), arrays[0])]
    with Checkpointer(tmp_path, in_process=in_process) as checkpointer:
        submit(checkpointer, 1)
        for _ in range(50):
            engine = Engine(Options(in_process=in_process))
            engine.open(leaves, arrays)
            engine.close()
        submit(checkpointer, 2).wait()
    assert checkpointer.all_steps() == [1, 2]


def test_a_plan_much_larger_than_the_pipe_reaches_the_writer(tmp_path: Path) -> None:
    tree = {f"a-rather-long-name-of-a-leaf-{number}": np.full((2,), number, np.float32) for number in range(4000)}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, tree)
        checkpointer.wait()
        restored = checkpointer.restore(1, tree)
    assert all((restored[name] == value).all() for name, value in tree.items())


def test_many_saves_while_the_writer_is_stopped_do_not_block_before_the_slots_are_gone(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, slots=8) as checkpointer:
        submit(checkpointer, 1).wait()
        [writer] = find_writers()
        with stopped(writer):
            for step in range(2, 10):
                submit(checkpointer, step)
            assert checkpointer.all_steps() == [1]
        checkpointer.wait()
        assert checkpointer.all_steps() == list(range(1, 10))


def test_a_thread_that_waits_for_the_last_save_does_not_keep_the_slot_of_the_first_from_the_next(
    tmp_path: Path,
) -> None:
    with Checkpointer(tmp_path, slots=3) as checkpointer:
        submit(checkpointer, 1).wait()
        [writer] = find_writers()
        with stopped(writer):
            pending = [submit(checkpointer, step) for step in (2, 3, 4)]
            waiting = threading.Thread(target=pending[-1].wait)
            waiting.start()
        submit(checkpointer, 5)
        waiting.join()
        checkpointer.wait()
    assert checkpointer.all_steps() == [1, 2, 3, 4, 5]


def test_a_signal_handler_may_wait_for_the_save_that_its_thread_waits_for(tmp_path: Path) -> None:
    """It once waited for the call that it had interrupted."""
    waited = []
    with Checkpointer(tmp_path) as checkpointer:
        submit(checkpointer, 1).wait()
        [process] = find_writers()
        process.send_signal(signal.SIGSTOP)
        pending = submit(checkpointer, 2)

        def wait_too(*_: object) -> None:
            process.send_signal(signal.SIGCONT)
            pending.wait()
            waited.append(pending.done())

        before = signal.signal(signal.SIGALRM, wait_too)
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.2)
            pending.wait()
        finally:
            signal.signal(signal.SIGALRM, before)
    assert waited == [True]


def test_an_error_after_the_hand_over_does_not_free_what_the_writer_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fetching thread once reported a failure, though the new writer had been told of the job by then."""
    with Checkpointer(tmp_path, snapshot_mode="device_copy", slots=1) as checkpointer:
        submit(checkpointer, 1).wait()
        [process] = find_writers()
        monkeypatch.setattr(sys, "executable", "")
        process.kill()
        wait_for_end(process.pid)
        pending = submit(checkpointer, 2)  # that a thread writes is a warning, and here an error
        with suppress(SaveFailed):
            pending.wait()
        assert pending.error is None or "cannot start its writer process" in str(pending.error)
        assert (catalog.list_steps(tmp_path) == [1, 2]) == (pending.error is None)
        with suppress(RuntimeWarning):
            checkpointer.wait()
        submit(checkpointer, 3).wait()
        assert_holds(checkpointer, 3)


def test_a_manifest_that_is_no_json_fails_before_anybody_waits_for_it(tmp_path: Path) -> None:
    """The job once stayed in the list of those to be waited for."""
    arrays = [jnp.ones(3)]
    engine = Engine(Options(slots=1))
    engine.open([describe_leaf(("w",), arrays[0])], arrays)
    target = Target(tmp_path, tmp_path, str(tmp_path))
    with pytest.raises(TypeError, match="not JSON serializable"):
        engine.save(arrays, 2, lambda _: target, manifest={"loss": object()})
    engine.save(arrays, 3, lambda _: target)
    engine.close()
    assert catalog.list_steps(tmp_path) == [3]


def test_that_older_steps_cannot_be_deleted_is_a_warning_and_no_failure(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, max_to_keep=1) as checkpointer:
        submit(checkpointer, 1).wait()
        make_immutable(tmp_path / "1")
        try:
            submit(checkpointer, 2)
            with pytest.warns(RuntimeWarning, match="older checkpoints of .* could not be deleted"):
                checkpointer.wait()
        finally:
            make_immutable(tmp_path / "1", undo=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            submit(checkpointer, 3).wait()
    assert checkpointer.latest_step() == 3


def make_immutable(directory: Path, *, undo: bool = False) -> None:
    import subprocess

    command = ["chattr", "-i" if undo else "+i", str(directory)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no directory can be made undeletable here: {error}")
