"""What goes wrong around a save: killed trainers, signals, forks, scripts that just end, and full disks."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import product
from pathlib import Path
from typing import Any

import interpreters
import jax.numpy as jnp
import numpy as np
import pytest
from interpreters import Interpreter
from orbax.checkpoint import v1
from processes import PATIENCE_SECONDS, find_writers, open_files, wait_for_end, wait_until

from offstep import catalog
from offstep.checkpointer import Checkpointer
from offstep.errors import SaveFailed

pytestmark = pytest.mark.crash

PRELUDE = """
import os, signal, sys, time
import jax.numpy as jnp, numpy as np, psutil
import offstep

directory, SIZE = sys.argv[1], 1_000_000

def state(step):
    return {"w": jnp.full((SIZE,), step, jnp.float32), "b": jnp.full((3,), step, jnp.bfloat16)}

def tell(*words):
    print(*words, flush=True)

def hear():
    return sys.stdin.readline().strip()

def writer_pid():
    children = psutil.Process().children()
    [pid] = [child.pid for child in children if any(part.endswith("main()") for part in child.cmdline())]
    return pid

options = {"in_process": True} if "thread" in sys.argv[2:] else {}
if "device_copy" in sys.argv[2:]:
    options["snapshot_mode"] = "device_copy"
checkpointer = offstep.Checkpointer(directory, **options)
"""


@contextmanager
def running(script: str, *arguments: str) -> Iterator[Interpreter]:
    """A trainer in a process group of its own."""
    trainer = Interpreter(
        ["-c", PRELUDE + script, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        yield trainer
    finally:
        with suppress(ProcessLookupError):
            os.killpg(trainer.pid, signal.SIGKILL)  # children that live on too, or their end of the pipes stays open
        trainer.communicate()


def run(script: str, *arguments: str) -> tuple[int, str, str]:
    with running(script, *arguments) as trainer:
        out, err = trainer.communicate(timeout=PATIENCE_SECONDS)
        return trainer.returncode, out, err


def hear(trainer: Interpreter) -> str:
    assert trainer.stdout is not None
    line = trainer.stdout.readline().strip()
    if not line:
        raise AssertionError(f"the trainer ended: {trainer.communicate()[1]}")
    return line


def tell(trainer: Interpreter, text: str = "go") -> None:
    assert trainer.stdin is not None
    trainer.stdin.write(text + "\n")
    trainer.stdin.flush()


def assert_holds(directory: Path, steps: list[int]) -> None:
    """Exactly these steps, each restored by stock Orbax; no leftovers."""
    names = set(os.listdir(directory)) - {".offstep-lock"}  # a run's, while it lives
    assert sorted(names) == sorted(map(str, steps))
    for step in steps:
        restored = v1.load(directory / str(step), checkpointable_name="pytree")
        assert restored["w"].shape == (1_000_000,)
        assert (np.asarray(restored["w"]) == step).all()
        assert (np.asarray(restored["b"]).astype(np.float32) == step).all()


# ------------------------------------------------------------------------------------------- the trainer is killed


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV], ids=lambda end: end.name)
def test_what_was_saved_right_before_the_trainer_was_killed_becomes_durable(
    tmp_path: Path, end: signal.Signals
) -> None:
    script = """
checkpointer.save(1, state(1))
checkpointer.wait()
tell(writer_pid())
checkpointer.save(2, state(2))
os.kill(os.getpid(), int(sys.argv[2]))
"""
    with running(script, str(tmp_path), str(int(end))) as trainer:
        writer = int(hear(trainer))
        assert trainer.wait(PATIENCE_SECONDS) == -end
        wait_for_end(writer)
    assert_holds(tmp_path, [1, 2])


def test_the_very_first_save_becomes_durable_though_the_trainer_is_killed_while_the_writer_starts(
    tmp_path: Path,
) -> None:
    script = """
checkpointer.save(1, state(1))
tell(writer_pid())
os.kill(os.getpid(), signal.SIGKILL)
"""
    with running(script, str(tmp_path)) as trainer:
        writer = int(hear(trainer))
        trainer.wait(PATIENCE_SECONDS)
        wait_for_end(writer)
    assert_holds(tmp_path, [1])


def test_all_that_was_on_its_way_becomes_durable_after_the_trainer_was_killed(tmp_path: Path) -> None:
    script = """
checkpointer = offstep.Checkpointer(directory, slots=5, max_to_keep=3)
checkpointer.save(1, state(1))
checkpointer.wait()
pid = writer_pid()
os.kill(pid, signal.SIGSTOP)
for step in range(2, 7):
    checkpointer.save(step, state(step))
tell(pid)
os.kill(os.getpid(), signal.SIGKILL)
"""
    with running(script, str(tmp_path)) as trainer:
        writer = int(hear(trainer))
        trainer.wait(PATIENCE_SECONDS)
        assert sorted(os.listdir(tmp_path)) == [".offstep-lock", "1"]  # the writer has the lock now
        os.kill(writer, signal.SIGCONT)
        wait_for_end(writer)
    assert_holds(tmp_path, [4, 5, 6])


def test_ctrl_c_does_not_reach_the_writer(tmp_path: Path) -> None:
    script = """
checkpointer.save(1, state(1))
checkpointer.wait()
pid = writer_pid()
os.kill(pid, signal.SIGSTOP)
checkpointer.save(2, state(2))
try:
    tell(pid)
    hear()
except KeyboardInterrupt:
    tell("interrupted")
    os.kill(pid, signal.SIGCONT)
    checkpointer.save(3, state(3))
    raise
"""
    with running(script, str(tmp_path)) as trainer:
        writer = int(hear(trainer))
        os.killpg(trainer.pid, signal.SIGINT)
        assert hear(trainer) == "interrupted"
        _, err = trainer.communicate(timeout=PATIENCE_SECONDS)
        assert trainer.returncode == -signal.SIGINT
        assert "KeyboardInterrupt" in err
        wait_for_end(writer)
    assert_holds(tmp_path, [1, 2, 3])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_a_signal_to_the_writer_itself_does_not_stop_its_work(tmp_path: Path, number: signal.Signals) -> None:
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"w": jnp.ones(3)})
        checkpointer.wait()
        [writer] = find_writers()
        writer.send_signal(number)
        checkpointer.save(2, {"w": jnp.ones(3)})
        checkpointer.wait()
        assert find_writers() == [writer]
    assert checkpointer.all_steps() == [1, 2]


# ----------------------------------------------------------------------------------------------------------- forks


def test_a_forked_child_that_ends_changes_nothing(tmp_path: Path) -> None:
    script = """
import warnings
warnings.simplefilter("ignore")
checkpointer.save(1, state(1))
for how in (os._exit, sys.exit):
    child = os.fork()
    if child == 0:
        signal.alarm(3)  # JAX itself may crash or hang in a child's exit handlers
        how(0)
    os.waitpid(child, 0)
checkpointer.save(2, state(2))
checkpointer.wait()
tell(writer_pid())
"""
    status, out, err = run(script, str(tmp_path))
    assert (err, status) == ("", 0)
    wait_for_end(int(out))
    assert_holds(tmp_path, [1, 2])


def test_a_forked_child_that_lives_on_does_not_keep_the_writer_alive(tmp_path: Path) -> None:
    script = """
import warnings
warnings.simplefilter("ignore")
checkpointer.save(1, state(1))
checkpointer.wait()
child = os.fork()
if child == 0:
    sys.stdin.readline()  # until the test has seen enough
    os._exit(0)
checkpointer.save(2, state(2))
tell(writer_pid(), child)
os.kill(os.getpid(), signal.SIGKILL)
"""
    with running(script, str(tmp_path)) as trainer:
        writer, child = map(int, hear(trainer).split())
        trainer.wait(PATIENCE_SECONDS)
        wait_for_end(writer)
        assert Path(f"/proc/{child}").exists()
        assert not [link for link in open_files(child) if link.startswith("/memfd:offstep")]
        tell(trainer)
        wait_for_end(child)
    assert_holds(tmp_path, [1, 2])


def test_a_forked_child_saves_with_a_writer_of_its_own_and_leaves_the_parents_slots_alone(tmp_path: Path) -> None:
    script = """
import warnings
warnings.simplefilter("ignore")
tree = {"w": np.full(SIZE, 1, np.float32), "b": np.ones(3, np.float32)}
def fill(step):
    for leaf in tree.values():
        leaf[:] = step
    return tree
checkpointer.save(1, fill(1))
checkpointer.wait()
pid = writer_pid()
os.kill(pid, signal.SIGSTOP)
checkpointer.save(2, fill(2))
checkpointer.save(3, fill(3))
child = os.fork()
if child == 0:
    checkpointer.save(4, fill(4))
    checkpointer.wait()
    checkpointer.close()
    os._exit(0)
assert os.waitpid(child, 0) == (child, 0)
os.kill(pid, signal.SIGCONT)
"""
    status, _, err = run(script, str(tmp_path))
    assert (err, status) == ("", 0)
    assert_holds(tmp_path, [1, 2, 3, 4])


def test_a_forked_child_that_waits_for_a_save_of_its_parent_is_told_so(tmp_path: Path) -> None:
    """It once waited for ever."""
    script = """
import warnings
warnings.simplefilter("ignore")
checkpointer.save(1, state(1)).wait()
pid = writer_pid()
os.kill(pid, signal.SIGSTOP)
pending = checkpointer.save(2, state(2))
child = os.fork()
if child == 0:
    try:
        pending.wait()
    except offstep.SaveFailed as error:
        os._exit(0 if "belongs to the parent process" in str(error) else 2)
    os._exit(1)
assert os.waitpid(child, 0) == (child, 0)
os.kill(pid, signal.SIGCONT)
pending.wait()
"""
    status, _, err = run(script, str(tmp_path))
    assert (err, status) == ("", 0)


# -------------------------------------------------------------------------------------------- scripts that just end

ENDINGS = {
    "falls off its end": ("", 0),
    "sys.exit(0)": ("sys.exit(0)", 0),
    "sys.exit(3)": ("sys.exit(3)", 3),
    "an exception": ("raise ValueError('of the training')", 1),
}


def every_ending() -> Iterator[Any]:  # of pytest
    """Every ending where a process writes; the other ways to save meet one each, and the rest in the campaigns."""
    for how, name in product(("process", "thread", "device_copy"), ENDINGS):
        is_chosen = how == "process" or (how, name) in {("thread", "an exception"), ("device_copy", "sys.exit(3)")}
        marks = () if is_chosen else (pytest.mark.campaign,)
        yield pytest.param(how, *ENDINGS[name], id=f"{how}-{name}", marks=marks)


endings = pytest.mark.parametrize(("how", "ending", "status"), list(every_ending()))


@endings
def test_what_a_script_saved_before_it_ended_becomes_durable(
    tmp_path: Path, how: str, ending: str, status: int
) -> None:
    script = f"""
for step in (1, 2):
    checkpointer.save(step, state(step))
tell("thread" if options.get("in_process") else writer_pid())
{ending}
"""
    actual, out, err = run(script, str(tmp_path), how)
    assert actual == status, err
    assert "offstep:" not in err
    assert_holds(tmp_path, [1, 2])  # at once: nothing is left to a writer that still runs
    if how != "thread":
        assert not Path(f"/proc/{int(out)}").exists()


@endings
def test_a_script_that_ends_without_hearing_of_a_failure_prints_it_and_fails(
    tmp_path: Path, how: str, ending: str, status: int
) -> None:
    (tmp_path / "2").write_text("in the way")
    script = f"""
for step in (1, 3, 2):
    checkpointer.save(step, state(step))
{ending}
"""
    actual, _, err = run(script, str(tmp_path), how)
    assert actual == (status or 1)
    assert err.count("offstep: ") == 1
    assert f"step 2 was not saved to {tmp_path}/2: NotADirectoryError: " in err
    (tmp_path / "2").unlink()
    assert_holds(tmp_path, [1, 3])


@pytest.mark.parametrize("on_error", ["raise", "warn"])
def test_a_failure_that_a_script_has_heard_of_does_not_fail_its_exit(tmp_path: Path, on_error: str) -> None:
    (tmp_path / "2").write_text("in the way")
    script = """
checkpointer = offstep.Checkpointer(directory, on_error=sys.argv[2])
checkpointer.save(2, state(2))
try:
    checkpointer.wait()
except offstep.SaveFailed:
    pass
checkpointer.save(3, state(3))
"""
    status, _, err = run(script, str(tmp_path), on_error)
    assert status == 0, err
    assert "offstep: " not in err


def test_handlers_that_run_at_exit_run_also_when_the_exit_fails(tmp_path: Path) -> None:
    (tmp_path / "2").write_text("in the way")
    script = """
import atexit
atexit.register(print, "registered later")
checkpointer.save(2, state(2))
sys.stdout.write("without an end of line, ")
"""
    before = "import atexit\natexit.register(print, 'registered earlier')\n"
    done = interpreters.run(["-c", before + PRELUDE + script, tmp_path])
    assert done.returncode == 1
    assert done.stdout == "without an end of line, registered later\nregistered earlier\n"


def test_ctrl_c_while_a_script_waits_at_exit_leaves_the_saves_to_the_writer(tmp_path: Path) -> None:
    script = """
checkpointer.save(1, state(1))
checkpointer.wait()
pid = writer_pid()
os.kill(pid, signal.SIGSTOP)
checkpointer.save(2, state(2))
import atexit
atexit.register(tell, pid)
"""
    with running(script, str(tmp_path)) as trainer:
        writer = int(hear(trainer))
        while not is_waiting_for_the_writer(trainer.pid):
            pass
        os.killpg(trainer.pid, signal.SIGINT)
        try:
            status = trainer.wait(PATIENCE_SECONDS)
        finally:
            os.kill(writer, signal.SIGCONT)
        _, err = trainer.communicate(timeout=PATIENCE_SECONDS)
        assert "offstep: interrupted at exit; 1 saves that were not durable yet are left to the writer process" in err
        assert status == 1
        wait_for_end(writer)
    assert_holds(tmp_path, [1, 2])


def test_os_exit_leaves_the_saves_to_the_writer(tmp_path: Path) -> None:
    script = """
checkpointer.save(1, state(1))
tell(writer_pid())
os._exit(5)
"""
    with running(script, str(tmp_path)) as trainer:
        writer = int(hear(trainer))
        assert trainer.wait(PATIENCE_SECONDS) == 5
        wait_for_end(writer)
    assert_holds(tmp_path, [1])


def test_a_disk_that_hangs_keeps_the_exit_waiting_only_as_long_as_it_may(tmp_path: Path) -> None:
    script = """
checkpointer = offstep.Checkpointer(directory, exit_seconds=0.2)
checkpointer.save(1, state(1))
checkpointer.wait()
pid = writer_pid()
os.kill(pid, signal.SIGSTOP)
checkpointer.save(2, state(2))
tell(pid)
"""
    with running(script, str(tmp_path)) as trainer:
        writer = int(hear(trainer))
        try:
            status = trainer.wait(PATIENCE_SECONDS)
        finally:
            os.kill(writer, signal.SIGCONT)
        _, err = trainer.communicate(timeout=PATIENCE_SECONDS)
        assert status == 1
        late = "not durable after 0.2 s at exit; 1 saves that were not durable yet are left to the writer process"
        assert f"offstep: {late}" in err
        wait_for_end(writer)
    assert_holds(tmp_path, [1, 2])


def test_a_save_after_the_waiting_at_exit_is_refused(tmp_path: Path) -> None:
    script = """
checkpointer.save(1, state(1))
"""
    early = "import atexit\natexit.register(lambda: checkpointer.save(2, state(2)))\n"
    done = interpreters.run(["-c", early + PRELUDE + script, tmp_path])
    assert "a checkpoint cannot be saved any more: the interpreter is shutting down" in done.stderr
    assert_holds(tmp_path, [1])


FIT = """
import keras
from offstep import ModelCheckpoint

class Ending(keras.callbacks.Callback):
    def on_train_batch_begin(self, batch, logs=None):
        if batch == 3:
            [writer] = psutil.Process().children()
            writer.suspend()
        if batch == 5:
            [writer] = psutil.Process().children()
            tell(writer.pid)
            end(writer.pid)

def fit():
    model = keras.Sequential([keras.layers.Input((2,), name="i"), keras.layers.Dense(1, name="d")], name="m")
    model.compile("sgd", "mse")
    ours = ModelCheckpoint(directory + "/{step}", save_freq=2, slots=3)
    model.fit(np.ones((20, 2)), np.ones((20, 1)), batch_size=1, verbose=0, callbacks=[ours, Ending()])

"""
FIT_ENDINGS = {
    "an exception": ("os.kill(pid, signal.SIGCONT); raise ZeroDivisionError", 1),
    "sys.exit": ("os.kill(pid, signal.SIGCONT); sys.exit(3)", 3),
    "Ctrl-C": ("os.kill(pid, signal.SIGCONT); signal.raise_signal(signal.SIGINT)", -signal.SIGINT),
    "os._exit": ("os.kill(pid, signal.SIGCONT); os._exit(4)", 4),
    "SIGTERM": ("os.kill(pid, signal.SIGCONT); os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM),
}


@pytest.mark.parametrize(("ending", "status"), FIT_ENDINGS.values(), ids=FIT_ENDINGS.keys())
def test_what_fit_saved_before_it_ended_early_becomes_durable(tmp_path: Path, ending: str, status: int) -> None:
    with running(f"{FIT}end = lambda pid: exec('{ending}')\nfit()", str(tmp_path)) as trainer:
        writer = int(hear(trainer))
        _, err = trainer.communicate(timeout=PATIENCE_SECONDS)
        assert trainer.returncode == status, err
        wait_for_end(writer)
    assert sorted(os.listdir(tmp_path)) == ["2", "4"]


def test_a_second_ctrl_c_ends_also_the_waiting_for_what_fit_saved(tmp_path: Path) -> None:
    script = (
        FIT
        + """
end = lambda pid: signal.raise_signal(signal.SIGINT)
try:
    fit()
except KeyboardInterrupt:
    tell("once")
"""
    )
    with running(script, str(tmp_path)) as trainer:
        writer = int(hear(trainer))
        assert hear(trainer) == "once"
        wait_until(lambda: is_waiting_for_the_writer(trainer.pid))
        trainer.send_signal(signal.SIGINT)
        try:
            status = trainer.wait(PATIENCE_SECONDS)
        finally:
            os.kill(writer, signal.SIGCONT)
        _, err = trainer.communicate(timeout=PATIENCE_SECONDS)
        assert re.search("offstep: interrupted at exit; [12] saves .* yet are left to the writer process", err)
        assert status == 1
        wait_for_end(writer)
    assert sorted(os.listdir(tmp_path)) == ["2", "4"]


def is_waiting_for_the_writer(pid: int) -> bool:
    return "poll" in Path(f"/proc/{pid}/wchan").read_text() or Path(f"/proc/{pid}/syscall").read_text().startswith("7 ")


# --------------------------------------------------------------------------------------------------------- full disks


@contextmanager
def small_disk(at: Path, size: str) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small file system")
    at.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(at)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr}")
    try:
        yield at
    finally:
        subprocess.run(["umount", "-l", str(at)], check=True)


def filled(step: int) -> dict[str, Any]:
    return {"w": jnp.full((1_000_000,), step, jnp.float32), "b": jnp.full((3,), step, jnp.bfloat16)}


FULL = r".*No space left on device; tried 3 times in 0\.\d s; checkpoints saved before it are untouched"


@pytest.mark.parametrize("in_process", [False, True])
def test_a_disk_that_is_full_fails_the_save_and_older_checkpoints_stay(tmp_path: Path, in_process: bool) -> None:
    options = {"in_process": in_process, "retry_seconds": 0.3}
    with small_disk(tmp_path / "disk", "10m") as disk, Checkpointer(disk, **options) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, filled(step))
        checkpointer.wait()
        checkpointer.save(3, filled(3))
        with pytest.raises(SaveFailed, match=rf"step 3 was not saved to {disk}/3: {FULL}") as raised:
            checkpointer.wait()
        assert raised.value.errno == 28
        assert_holds(disk, [1, 2])
        with pytest.raises(SaveFailed, match="step 2 was not saved"):  # nor is a step replaced by half of itself
            save_and_wait(checkpointer, 2)
        assert_holds(disk, [1, 2])
        subprocess.run(["rm", "-r", str(disk / "1")], check=True)
        save_and_wait(checkpointer, 4)
        assert_holds(disk, [2, 4])


def test_a_save_that_finds_the_disk_full_becomes_durable_once_there_is_room(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "10m") as disk, Checkpointer(disk, retry_seconds=60) as checkpointer:
        save_and_wait(checkpointer, 1)
        (disk / "ballast").write_bytes(bytes(4_000_000))
        pending = checkpointer.save(2, filled(2))
        assert pending is not None
        for _ in range(2):  # two attempts have begun, so one has failed
            wait_until(lambda: catalog.leftovers(disk) != [])
            wait_until(lambda: catalog.leftovers(disk) == [])
        (disk / "ballast").unlink()
        with pytest.warns(RuntimeWarning, match=r"step 2 is durable, but it took \d+ tries and .*No space left"):
            checkpointer.wait()
        assert_holds(disk, [1, 2])


def save_and_wait(checkpointer: Checkpointer, step: int) -> None:
    checkpointer.save(step, filled(step))
    checkpointer.wait()


def test_a_disk_with_room_for_two_keeps_the_last_durable_one_when_max_to_keep_is_one(tmp_path: Path) -> None:
    with (
        small_disk(tmp_path / "disk", "9m") as disk,
        Checkpointer(disk, max_to_keep=1, retry_seconds=0) as checkpointer,
    ):
        for step in (1, 2, 3):
            save_and_wait(checkpointer, step)
        assert_holds(disk, [3])
        (disk / "ballast").write_bytes(bytes(3_000_000))
        with pytest.raises(SaveFailed, match="No space left on device"):
            save_and_wait(checkpointer, 4)
        (disk / "ballast").unlink()
        assert_holds(disk, [3])
