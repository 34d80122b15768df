"""The manifest: strict, bounded, and sealed by a checksum of its own."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import offstep
from offstep._native import crc32c
from offstep.manifest import MAX_BYTES, FileRecord, Manifest, build, find_best, parse, read, record_files

ABOUT = {
    "step": 7,
    "run": "0a1b2c3d",
    "epoch": 2,
    "batch": None,
    "metrics": {"loss": 0.5, "acc": math.inf},
    "versions": {"keras": "3.15"},
}
RECORDS = {"a/b": FileRecord(3, 0xE3069283), "data": FileRecord(10**12)}


def seal(body: bytes) -> bytes:
    return body[:-1] + b',"crc32c":"%08x"}' % crc32c(body)


def test_what_is_built_is_parsed() -> None:
    assert parse(build(ABOUT, RECORDS, 3)) == Manifest(
        step=7,
        run="0a1b2c3d",
        epoch=2,
        metrics={"loss": 0.5, "acc": math.inf},
        versions={"keras": "3.15", "offstep": offstep.__version__},
        nonfinite=3,
        files=RECORDS,
    )


def test_it_is_plain_json() -> None:
    document = json.loads(build(ABOUT, RECORDS, None))
    assert document["files"] == {"a/b": {"size": 3, "crc32c": "e3069283"}, "data": {"size": 10**12, "crc32c": None}}
    assert (document["format_version"], document["nonfinite"], document["metrics"]["acc"]) == (1, None, "Infinity")


@given(st.dictionaries(st.text(), st.floats()), st.integers(0, 2**63))
def test_any_metrics_come_back(metrics: dict[str, float], step: int) -> None:
    manifest = parse(build({"step": step, "metrics": metrics}, {}, 0))
    assert manifest.step == step
    assert {name: repr(value) for name, value in manifest.metrics.items()} == {
        name: repr(value) for name, value in metrics.items()
    }


def test_what_is_no_json_is_refused() -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        build({"step": 1, "extra": {"rate": math.nan}}, {}, 0)


@settings(max_examples=300)
@given(st.data())
def test_a_flipped_bit_is_found(data: st.DataObject) -> None:
    text = bytearray(build(ABOUT, RECORDS, 0))
    place = data.draw(st.integers(0, 8 * len(text) - 1))
    text[place // 8] ^= 1 << place % 8
    with pytest.raises(ValueError, match="manifest"):
        parse(bytes(text))


@pytest.mark.parametrize("kept", [0, 1, 20, -1, -30])
def test_a_manifest_that_is_cut_short_is_found(kept: int) -> None:
    with pytest.raises(ValueError, match="cut short"):
        parse(build(ABOUT, RECORDS, 0)[:kept])


@pytest.mark.parametrize(
    "body",
    [
        b"[]",
        b'{"format_version":1}',
        b'{"format_version":1,"step":NaN,"metrics":{},"versions":{},"nonfinite":0,"files":{}}',
        b'{"format_version":1,"step":1,"metrics":{"a":"b"},"versions":{},"nonfinite":0,"files":{}}',
        b'{"format_version":1,"step":1,"metrics":{},"versions":{},"nonfinite":0,"files":[1]}',
        b'{"format_version":1,"step":1,"metrics":{},"versions":{},"nonfinite":0,"files":{"a/../../b":{"size":1,"crc32c":null}}}',
        b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"format_version":1,"step":' + b"1" * 10_000 + b',"metrics":{},"versions":{},"nonfinite":0,"files":{}}',
    ],
    ids=["list", "empty", "NaN", "metric", "files", "name", "deep", "digits"],
)
def test_a_manifest_of_another_form_is_refused(body: bytes) -> None:
    with pytest.raises(ValueError, match=r"manifest|JSON|digits"):
        parse(seal(body))


def test_a_manifest_of_a_newer_format_says_so() -> None:
    with pytest.raises(ValueError, match="manifest of format version 2; this offstep reads version 1"):
        parse(seal(b'{"format_version":2}'))


def test_a_manifest_that_is_too_large_is_neither_written_nor_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="bytes"):
        build({"step": 1, "extra": "x" * MAX_BYTES}, {}, 0)
    (tmp_path / "offstep.json").write_bytes(b" " * (MAX_BYTES + 1))
    with pytest.raises(ValueError, match="at most"):
        read(tmp_path)


def test_a_directory_without_a_manifest_has_none(tmp_path: Path) -> None:
    assert read(tmp_path) is None
    assert read(tmp_path / "none") is None


def test_files_are_recorded_with_size_and_checksum() -> None:
    assert record_files({"a": (b"1234", memoryview(b"56789")), "empty": ()}) == {
        "a": FileRecord(9, 0xE3069283),
        "empty": FileRecord(0, 0),
    }


def test_the_best_is_finite_and_of_equal_ones_the_newest() -> None:
    losses = {1: 2.0, 2: 1.0, 3: 1.0, 4: math.nan, 5: -math.inf, 6: 3.0}
    manifests = [Manifest(step, metrics={"loss": loss}) for step, loss in losses.items()] + [Manifest(7)]
    steps = [find_best(manifests, "loss", mode=mode) for mode in ("min", "max")]
    assert [manifest.step for manifest in steps if manifest] == [3, 6]
    assert find_best(manifests, "accuracy", mode="max") is None
