"""Snapshots that are only kept in memory: what becomes of them when the trainer dies, fails, or ends well."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any

import interpreters
import keras
import numpy as np
import pytest
from processes import find_writers, open_files, wait_for_end, wait_until

import offstep
from offstep import catalog, memory_tier
from offstep.buffers import Slot
from offstep.copy_table import copy_table
from offstep.errors import CheckpointDamaged
from offstep.formats.slot_reader import SlotReader
from offstep.inbox import Inbox
from offstep.plans import make_plan
from offstep.records import Job, Leaf
from offstep.stored import Region
from offstep.wire import Channel

SCRIPT = Path(__file__).with_name("keep_in_memory.py")


def run(directory: Path, batch: int) -> subprocess.CompletedProcess[str]:
    return interpreters.run([SCRIPT, directory, str(batch)], timeout=100)


def test_a_killed_training_goes_on_from_memory_and_ends_with_the_same_bits(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", -1)
    assert whole.returncode == 0, whole.stderr
    assert catalog.list_steps(tmp_path / "whole") == []  # 1,000 batches were not reached, and it ended well
    target = tmp_path / "killed"
    killed = run(target, 5)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert catalog.list_steps(target) == [5]  # the writer let go of the streams, so it had written it
    finished = run(target, -1)
    assert finished.returncode == 0, finished.stderr
    assert "step 5 was restored from the memory of writer" in finished.stdout
    assert finished.stdout.splitlines()[-1] == whole.stdout.splitlines()[-1]


def test_who_deletes_the_directory_begins_anew(tmp_path: Path) -> None:
    target = tmp_path / "run"
    assert run(target, 3).returncode == -signal.SIGKILL
    shutil.rmtree(target)
    anew = run(target, 1)
    assert anew.returncode == -signal.SIGKILL, anew.stderr
    assert "restored" not in anew.stdout
    assert catalog.list_steps(target) == [1]
    found = memory_tier.inherit(target)
    assert found is not None
    found.close()
    wait_for_end(found.writer)


class _Stop(Exception):
    pass


class _Fail(keras.callbacks.Callback):
    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        if batch == 4:
            raise _Stop


def make_model() -> Any:
    model = keras.Sequential([keras.layers.Input((3,)), keras.layers.Dense(2)])
    model.compile("adam", "mse")
    return model


def fit(model: Any, *callbacks: Any) -> None:
    model.fit(np.ones((24, 3)), np.ones((24, 2)), batch_size=4, verbose=0, callbacks=list(callbacks))


def test_an_exception_in_fit_makes_the_snapshot_durable(tmp_path: Path) -> None:
    saver = offstep.ModelCheckpoint(tmp_path / "{step}", save_freq=1000, memory_every=1)
    with pytest.raises(_Stop):
        fit(make_model(), saver, _Fail())
    saver.wait_until_finished()
    saver._engine.close()
    assert catalog.list_steps(tmp_path) == [4]
    assert offstep.verify(tmp_path / "4").ok


def test_a_training_that_ends_well_leaves_what_save_freq_says(tmp_path: Path) -> None:
    saver = offstep.ModelCheckpoint(tmp_path / "{step}", save_freq=4, memory_every=1)
    fit(make_model(), saver)
    assert catalog.list_steps(tmp_path) == [4]
    assert saver.counts.requested == 1
    assert memory_tier.inherit(tmp_path) is None


def test_a_writer_that_dies_is_replaced_and_told_of_the_snapshot(tmp_path: Path) -> None:
    class KillWriter(keras.callbacks.Callback):  # type: ignore[misc]
        def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
            if batch == 2:
                for writer in find_writers():
                    os.kill(writer.pid, signal.SIGKILL)
                    wait_until(lambda writer=writer: writer.status() == "zombie")

    saver = offstep.ModelCheckpoint(tmp_path / "{step}", save_freq=1000, memory_every=1)
    with pytest.raises(_Stop):
        fit(make_model(), saver, KillWriter(), _Fail())
    saver._engine.close()
    assert catalog.list_steps(tmp_path) == [4]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"memory_every": 0}, "Received: 0"),
        ({"memory_every": 1, "in_process": True}, "in_process=True"),
        ({"memory_every": 1, "save_best_only": True}, "save_best_only=True"),
        ({"memory_every": 1, "filepath": "m.keras"}, "m.keras"),
        ({"memory_every": 1, "filepath": "{epoch}/{step}"}, "{epoch}"),
        ({"memory_every": 1, "memory_linger": "soon"}, "Received: 'soon'"),
    ],
)
def test_what_cannot_be_kept_is_refused_at_construction(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match="Received") as caught:
        offstep.ModelCheckpoint(**{"filepath": "ckpts/{step}"} | arguments)
    assert text in str(caught.value)


# ----------------------------------------------------------------------------------------------------- the pieces


def test_of_saves_to_one_slot_the_inbox_keeps_the_newest_and_frees_the_files_of_the_others() -> None:
    before = len(open_files(os.getpid()))
    ours, theirs = map(Channel, socket.socketpair())
    attached = os.memfd_create("attached")
    inbox = Inbox(theirs)
    for number in range(300):
        ours.send({"do": "attach", "job": number, "name": "extra", "bytes": 1}, attached)
        ours.send({"do": "save", "job": {"number": number, "slot": 1 + number % 2}})
        ours.send({"do": "attach", "job": 1000 + number, "name": "extra", "bytes": 1}, attached)
        ours.send({"do": "keep", "plan": 1, "job": {"number": 1000 + number}})
    ours.close()
    os.close(attached)
    inbox._thread.join()  # all has come before anything is taken out
    taken = list(iter(inbox.next, None))
    assert [message["job"]["number"] for message in taken] == [298, 299]
    assert inbox.kept[1]["job"]["number"] == 1299
    for message in taken:
        os.close(message["attached"]["extra"][0])
    inbox.close()
    theirs.close()
    assert len(open_files(os.getpid())) == before


def test_what_was_taken_back_is_not_kept() -> None:
    ours, theirs = map(Channel, socket.socketpair())
    ours.send({"do": "keep", "plan": 1, "job": {"number": 1}})
    ours.send({"do": "forget", "plan": 1})
    ours.close()
    inbox = Inbox(theirs)
    assert inbox.next() is None
    assert not inbox.kept
    inbox.close()
    theirs.close()


def test_who_takes_the_snapshot_and_leaves_at_once_ends_the_waiting(tmp_path: Path) -> None:
    """The last bytes of the snapshot may be on their way to somebody who has had all he wants."""
    plan = make_plan([Leaf(("w",), (3, 4), "float32")])
    text, slot = os.memfd_create("plan"), Slot(plan.slot_bytes, shared=True)
    os.write(text, json.dumps({"plan": plan.to_json()}).encode())
    target = str(tmp_path / "3")
    job = asdict(Job(1, 3, "orbax_directory", target, str(tmp_path), str(tmp_path), slot.number, 1, "tag"))
    try:
        for _ in range(60):
            listener = memory_tier.Listener([memory_tier.Survivor(job, text, slot.fd, {}, False, 30.0)])
            waiting = threading.Thread(target=listener.wait)
            waiting.start()
            found = memory_tier.inherit(tmp_path)
            assert found is not None
            assert found.job.step == 3
            assert found.is_wanted
            found.close()
            waiting.join(20)
            assert not waiting.is_alive()
    finally:
        slot.close()
        os.close(text)


def test_a_slot_is_read_chunk_by_chunk_against_its_checksums() -> None:
    from offstep import _native

    array = np.arange(12, dtype="float32").reshape(3, 4)
    plan = make_plan([Leaf(("w",), (3, 4), "float32")])
    slot = Slot(plan.slot_bytes, shared=True)
    try:
        _native.gather([array.ctypes.data], copy_table(plan).data, slot.buffer, 1)
        reader = SlotReader(Path("somewhere/7"), plan, slot.fd, {"step": 7})
        [leaf] = reader.contents.leaves
        np.testing.assert_array_equal(reader.read([Region(leaf)], 1)[0], array)
        slot.buffer[plan.leaves[0].offset + 5] ^= 1
        with pytest.raises(CheckpointDamaged, match="w: its checksum is wrong"):
            reader.read([Region(leaf)], 1)
        reader.close()
    finally:
        slot.close()
