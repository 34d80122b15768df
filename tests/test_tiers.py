"""Two tiers: durable in a directory of this machine first, copied into a store while training goes on."""

from __future__ import annotations

import shutil
import signal
import threading
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from fault_proxy import Proxy
from interpreters import Interpreter
from object_stores import Server, below, download, gs_only, list_objects, proxy, run, store, through
from processes import wait_for_end, wait_until
from runs import assert_same, fit, make_model, read_step
from test_store_faults import is_marker, is_put

import offstep
from offstep.catalog import list_steps
from offstep.errors import SaveFailed
from offstep.formats import orbax_upload
from offstep.inbox import Attached
from offstep.records import NO_SLOT, Job
from offstep.stores.path import open_place
from offstep.uploading import Uploader
from offstep.wire import Message

__all__ = ["proxy", "run", "store"]  # fixtures

KEEP_IN_MEMORY = Path(__file__).with_name("keep_in_memory.py")


def remote_steps(run: str) -> list[int]:
    return list_steps(open_place(run))


@gs_only
def test_steps_go_to_the_disk_and_some_of_them_on_to_the_store(run: str, tmp_path: Path) -> None:
    local = tmp_path / "run"
    model = make_model()
    callback = offstep.ModelCheckpoint(
        below(run, "{step}"), save_freq=2, local=local, upload_every=3, max_to_keep=1, local_max_to_keep=4
    )
    fit(model, [callback], epochs=2)
    assert (callback.counts.durable, callback.counts.failed) == (7, 0)
    assert 1 <= callback.counts.uploaded <= 2, "the newer of two that wait takes the place of the other"
    assert list_steps(local)[-4:] == [8, 10, 12, 14]
    assert list_steps(local)[:-4] in ([], [6]), "what is on its way to the store stays until the next save"
    assert remote_steps(run) == [12]
    copy = download(run, tmp_path / "copy")
    assert_same(read_step(copy / "12"), read_step(local / "12"))
    assert offstep.verify(run).ok
    again = make_model()
    assert offstep.restore(again, run, local=local).step == 14
    for restored, trained in zip(again.trainable_variables, model.trainable_variables, strict=True):
        np.testing.assert_array_equal(restored, trained)
    shutil.rmtree(local)
    assert offstep.restore(again, run, local=local).step == 12


@gs_only
def test_training_resumes_from_the_store_where_the_disk_is_lost(run: str, tmp_path: Path) -> None:
    def train(epochs: int) -> offstep.ModelCheckpoint:
        callback = offstep.ModelCheckpoint(
            below(run, "{step}"), save_freq="epoch", local=tmp_path / "run", resume=True, verbose=0
        )
        fit(make_model(), [callback], epochs=epochs)
        return callback

    train(1)
    assert remote_steps(run) == [7]
    shutil.rmtree(tmp_path / "run")
    assert train(2).counts.durable == 1, "the first epoch is not trained again"
    assert remote_steps(run) == [7, 14]


@gs_only
def test_a_copy_that_fails_is_told_and_the_step_stays_durable(
    proxy: Proxy, store: Server, run: str, tmp_path: Path
) -> None:
    proxy.fail("403", is_marker)
    callback = offstep.ModelCheckpoint(
        through(proxy, store, below(run, "{step}")), local=tmp_path / "run", save_freq="epoch"
    )
    with pytest.raises(SaveFailed, match=r"step 7 is durable, but was not copied to .*the store refuses access"):
        fit(make_model(), [callback], epochs=1)
    assert (callback.counts.durable, callback.counts.uploaded) == (1, 0)
    assert list_steps(tmp_path / "run") == [7]


@gs_only
def test_a_snapshot_in_memory_is_durable_before_a_store_has_taken_its_copies(
    proxy: Proxy, run: str, tmp_path: Path
) -> None:
    proxy.fail("black_hole", is_put)
    local, said = tmp_path / "run", tmp_path / "said"
    with said.open("wb") as out:
        assert Interpreter([KEEP_IN_MEMORY, local, "7", run], stdout=out).wait(100) == -signal.SIGKILL
    wait_until(lambda: list_steps(local) == [4, 7])
    assert remote_steps(run) == []
    proxy.heal()
    proxy.end()  # whoever was not answered asks again
    wait_for_end(int(said.read_text().split()[-1]))
    assert remote_steps(run) == [4]


@gs_only
def test_a_copy_is_cut_in_pieces_and_holds_what_earlier_steps_wrote(run: str, tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    tree = {f"layer{n}": jnp.asarray(random.random((1300, 1300 + n), np.float32)) for n in range(3)}
    with offstep.Checkpointer(tmp_path / "run", skip_unchanged=True) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, tree | {"count": jnp.full(3, step)})
    source, target = tmp_path / "run" / "2", below(run, "2")
    job = Job(1, 2, "upload", target, run, run, NO_SLOT, 0, "tag", source=str(source), retry_seconds=10)
    orbax_upload.write(job, None, None, {})  # type: ignore[arg-type]  # there is no slot
    assert len([name for name in list_objects(run) if "/pytree/d/" in name]) > 2
    restored = offstep.restore(tree | {"count": jnp.zeros(3, int)}, target).tree
    np.testing.assert_array_equal(restored["count"], np.full(3, 2))
    for name, array in tree.items():
        np.testing.assert_array_equal(restored[name], array)
    assert_same(read_step(download(run, tmp_path / "copy") / "2"), read_step(source))


def test_a_newer_copy_takes_the_place_of_one_that_waits_for_the_same_store_only() -> None:
    is_begun, may_go_on = threading.Event(), threading.Event()
    made: list[int] = []
    told: list[Message] = []

    def make(job: Job, attached: Attached) -> Message:
        is_begun.set()
        assert may_go_on.wait(60)
        made.append(job.number)
        return {"job": job.number}

    def add(number: int, root: str, form: str = "upload") -> None:
        uploader.add(Job(number, number, form, root, root, root, NO_SLOT, 0, "tag", source=f"{root}/{number}"), {})

    uploader = Uploader(make, told.append)
    add(1, "gs://a")
    assert is_begun.wait(60)
    for number, root in ((2, "gs://a"), (3, "gs://b"), (4, "gs://a")):
        add(number, root)
    for number in (5, 6):  # what several processes have chosen together
        add(number, "gs://a", "orbax_share_copy")
    assert uploader.sources == {"gs://a/1", "gs://b/3", "gs://a/4", "gs://a/5", "gs://a/6"}
    may_go_on.set()
    uploader.finish()
    assert made == [1, 3, 4, 5, 6]
    assert told[0] == {"job": 2, "withdrawn": True}


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"upload_every": 2}, "upload_every copies from a first tier"),
        ({"local": "s3://bucket/b"}, "local must be a directory of this machine"),
        ({"local": "run", "upload_every": 0}, "upload_every must be None or an integer of at least 1"),
        ({"local": "run", "filepath": "ckpts/{step}"}, "filepath is the address of the steps in a store"),
        ({"local": "run", "filepath": "gs://bucket/best.keras"}, "filepath is the address of the steps in a store"),
    ],
)
def test_tiers_that_do_not_go_together_are_refused(arguments: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=rf"{text}.* Received: "):
        offstep.ModelCheckpoint(**({"filepath": "gs://bucket/run/{step}"} | arguments))
