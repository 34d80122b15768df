"""Stores that fail: what is reported is what is there, within the deadline, and training goes on."""

from __future__ import annotations

import itertools
import re
import threading
import time
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from fault_proxy import STATUSES, Matcher, Proxy
from object_stores import SECRETS, Server, below, gs_only, list_objects, proxy, run, s3_only, store, through
from processes import find_writers
from runs import fit, make_model

import offstep
from offstep.errors import SaveFailed
from offstep.stores.address import parse_address
from offstep.stores.client import Store

__all__ = ["proxy", "run", "store"]  # fixtures

MARKER = "commit_success.txt"
OLD, NEW = {"w": jnp.zeros(70_000)}, {"w": jnp.ones(70_000)}
RETRY_SECONDS = 1.0
DEADLINE_SECONDS = 30.0  # of all that a failing save may take: far more than it should, far less than for ever


def is_probe(path: str) -> bool:
    return "offstep-probe" in path


def is_put(method: str, path: str) -> bool:
    return method in ("PUT", "POST") and not is_probe(path)


def is_marker(method: str, path: str) -> bool:
    return is_put(method, path) and re.search(r"%2F\d+%2Fcommit_success|/\d+/commit_success", path) is not None


def is_data(method: str, path: str) -> bool:
    return is_put(method, path) and re.search(r"(%2F|/)d(%2F|/)[0-9a-f]{32}", path) is not None


def is_document(method: str, path: str) -> bool:
    return is_put(method, path) and not is_data(method, path) and not is_marker(method, path)


def is_listing(method: str, path: str) -> bool:
    is_list = "prefix=" in path or "list-type" in path or "startOffset" in path
    return method == "GET" and is_list and not is_probe(path)


PHASES: dict[str, Matcher] = {"data": is_data, "documents": is_document, "marker": is_marker, "listing": is_listing}


def save_beside_an_older_one(
    proxy: Proxy, store: Server, run: str, kind: str, matches: Matcher, times: float, **options: Any
) -> None:
    """Saves step 2 after step 1 while the store fails; checks that what is reported is so."""
    address = through(proxy, store, run)
    options |= {"retry_seconds": RETRY_SECONDS, "on_error": "warn", "max_to_keep": 5}
    with offstep.Checkpointer(address, **options) as checkpointer:
        checkpointer.save(1, OLD).wait()
        proxy.fail(kind, matches, times)
        began = time.monotonic()
        pending = checkpointer.save(2, NEW)
        failure = None
        try:
            pending.wait(DEADLINE_SECONDS)
        except SaveFailed as error:
            failure = str(error)
        assert time.monotonic() - began < DEADLINE_SECONDS
        proxy.heal()
        steps = checkpointer.all_steps()
        if failure is None:
            assert steps == [1, 2]
            np.testing.assert_array_equal(checkpointer.restore()["w"], NEW["w"])
        else:
            assert steps == [1] or "it may still appear there" in failure, failure
            assert not any(secret in failure for secret in SECRETS)
            checkpointer.save(3, NEW).wait()
            np.testing.assert_array_equal(checkpointer.restore(3)["w"], NEW["w"])
        np.testing.assert_array_equal(checkpointer.restore(1)["w"], OLD["w"])


@pytest.mark.parametrize("kind", ["reset", "lost"])
def test_a_store_that_fails_now_and_then_is_asked_again(proxy: Proxy, store: Server, run: str, kind: str) -> None:
    counter = itertools.count()
    proxy.fail(kind, lambda method, path: next(counter) % 3 == 1)
    with offstep.Checkpointer(through(proxy, store, run), retry_seconds=20) as checkpointer:
        checkpointer.save(1, NEW).wait()
    proxy.heal()
    commits = [outcome for method, path, outcome in proxy.seen if is_marker(method, path)]
    assert commits.count("passed") + commits.count("lost") + commits.count("slow") >= 1
    assert [name for name in list_objects(run) if name.endswith(f"1/{MARKER}")] == [f"1/{MARKER}"]
    np.testing.assert_array_equal(offstep.restore(OLD, run).tree["w"], NEW["w"])


@pytest.mark.parametrize("kind", ["503", "black_hole"])
def test_a_store_that_fails_for_good_is_an_error_and_older_steps_stay(
    proxy: Proxy, store: Server, run: str, kind: str
) -> None:
    save_beside_an_older_one(proxy, store, run, kind, lambda method, path: True, float("inf"))


def test_a_commit_whose_acknowledgements_are_all_lost_is_read_back(proxy: Proxy, store: Server, run: str) -> None:
    proxy.fail("lost", is_marker)
    with offstep.Checkpointer(through(proxy, store, run), retry_seconds=RETRY_SECONDS) as checkpointer:
        checkpointer.save(1, NEW).wait()
        assert checkpointer.all_steps() == [1]
    assert {outcome for method, path, outcome in proxy.seen if is_marker(method, path)} == {"lost"}


def test_a_store_that_refuses_is_not_taken_for_an_empty_one(proxy: Proxy, store: Server, run: str) -> None:
    proxy.fail("403")
    with pytest.raises(PermissionError, match="the store refuses access"):
        offstep.latest(through(proxy, store, run))


@pytest.mark.parametrize(("kind", "error"), [("403", PermissionError), ("gone", FileNotFoundError), ("503", OSError)])
def test_where_nothing_can_be_saved_training_does_not_begin(
    proxy: Proxy, store: Server, run: str, kind: str, error: type[OSError]
) -> None:
    address = through(proxy, store, run)
    proxy.fail(kind)
    with pytest.raises(error, match=r"checkpoints cannot be saved here: .*the store"):
        offstep.Checkpointer(address, retry_seconds=RETRY_SECONDS)
    callback = offstep.ModelCheckpoint(below(address, "{step}"), retry_seconds=RETRY_SECONDS)
    model = make_model()
    with pytest.raises(error, match=r"checkpoints cannot be saved here: .*the store"):
        fit(model, [callback])
    assert model.optimizer.iterations == 0
    proxy.heal()
    with offstep.Checkpointer(address):
        assert list_objects(run) == [], "looking leaves nothing"


@gs_only
def test_a_bucket_that_is_not_there_is_told_at_once(run: str) -> None:
    with pytest.raises(FileNotFoundError, match="the store knows no such bucket"):
        offstep.Checkpointer(run.replace("checkpoints", "chekpoints"))


@gs_only
def test_a_writer_that_is_killed_in_the_middle_leaves_no_step_and_another_one_saves_it(
    proxy: Proxy, store: Server, run: str
) -> None:
    uploading = threading.Event()

    def is_first_document(method: str, path: str) -> bool:
        if is_document(method, path):
            uploading.set()
        return is_document(method, path)

    with offstep.Checkpointer(through(proxy, store, run)) as checkpointer:
        proxy.fail("black_hole", is_first_document)
        pending = checkpointer.save(1, NEW)
        assert uploading.wait(DEADLINE_SECONDS)
        assert offstep.latest(run) is None
        [writer] = find_writers()
        writer.kill()
        proxy.heal()
        pending.wait(DEADLINE_SECONDS)
        assert checkpointer.all_steps() == [1]
    assert len([name for name in list_objects(run) if "/d/" in name]) == 1, "the first attempt's data are gone"


@gs_only
def test_what_dead_runs_left_goes_with_the_older_steps(store: Server, run: str) -> None:
    with offstep.Checkpointer(run, max_to_keep=1) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, NEW).wait()
        place = parse_address(run)
        for step in (1, 5):
            Store(place).put((place / str(step) / "pytree" / "d" / "0123").key, b"a part")
        checkpointer.save(3, NEW).wait()
        assert checkpointer.all_steps() == [3]
    assert {name.partition("/")[0] for name in list_objects(run)} == {"3", "5"}, "5 may be on its way"


@gs_only
def test_training_goes_on_while_a_store_says_nothing(proxy: Proxy, store: Server, run: str) -> None:
    address = through(proxy, store, run)
    with offstep.Checkpointer(address, retry_seconds=RETRY_SECONDS, on_busy="skip", on_error="warn") as checkpointer:
        proxy.fail("black_hole")
        first, second, third = (checkpointer.save(step, NEW) for step in (1, 2, 3))
        assert not first.done()
        assert not second.done()
        assert third is None
        for pending in (first, second):
            with pytest.raises(SaveFailed, match="the store does not answer"):
                pending.wait(DEADLINE_SECONDS)
        with pytest.warns(UserWarning, match="A save was skipped"):
            checkpointer.wait()


def test_of_two_that_commit_one_step_one_is_told(store: Server, run: str) -> None:
    place = parse_address(run)
    with offstep.Checkpointer(run) as checkpointer:
        checkpointer.save(1, NEW).wait()
    assert not Store(place).create((place / "1" / MARKER).key, b"of another run")
    assert Store(place).create((place / "2" / MARKER).key, b"of this run")
    assert Store(place).create((place / "2" / MARKER).key, b"of this run"), "its own, found again"


@s3_only
def test_a_server_without_conditional_writes_is_looked_at_first(proxy: Proxy, store: Server, run: str) -> None:
    place = parse_address(through(proxy, store, run))
    proxy.fail("501", times=1)
    assert Store(place).create((place / MARKER).key, b"of this run")
    proxy.fail("501", times=1)
    assert not Store(place).create((place / MARKER).key, b"of another run")


@gs_only
def test_what_a_failed_save_has_put_there_goes_away(proxy: Proxy, store: Server, run: str) -> None:
    proxy.fail("403", is_marker)
    with (
        offstep.Checkpointer(through(proxy, store, run), on_error="warn") as checkpointer,
        pytest.raises(SaveFailed, match="the store refuses access"),
    ):
        checkpointer.save(1, NEW).wait()
    assert list_objects(run) == []
    assert offstep.latest(below(run, "1")) is None


@pytest.mark.campaign
@pytest.mark.timeout(600)
@pytest.mark.parametrize("times", [1, float("inf")], ids=["once", "always"])
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("kind", [*STATUSES, "reset", "lost", "black_hole", "slow", "gone"])
def test_every_fault_in_every_phase(proxy: Proxy, store: Server, run: str, kind: str, phase: str, times: float) -> None:
    for repeat in range(3):  # the first by a process; the others by a thread, which starts sooner
        proxy.heal()
        address = below(run, f"r{repeat}")
        save_beside_an_older_one(proxy, store, address, kind, PHASES[phase], times, in_process=repeat > 0)
