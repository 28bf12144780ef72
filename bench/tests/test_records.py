"""The file of records: what is written is read again, whatever a killed run left behind."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from bench.engine.records import SCHEMA_VERSION, Record, RecordError
from bench.engine.store import RecordStore, read
from bench.tests.samples import record


FULL = {
    "radius": 0.5,
    "seed": 3,
    "options": {"steps": 60, "mode": "a"},
    "delta": 1e-9,
    "terms": {"mixing": 0.1, "tail": math.inf},
    "details": {"residual": 1e-17},
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "results" / "records.jsonl"


def fill(path: Path, *records: Record) -> None:
    with RecordStore(path) as store:
        for each in records:
            store.append(each)


@pytest.mark.parametrize(
    "sample",
    [
        record(),
        record(value=math.inf),
        record(value=1 / 3, **FULL),
        record(value=None, error="no: é"),
        record(value=0.0),
    ],
)
def test_a_record_comes_back_as_it_was_written(path: Path, sample: Record) -> None:
    fill(path, sample)
    assert list(read(path).records.values()) == [sample]


def test_lines_are_strict_json_and_carry_the_schema_version(path: Path) -> None:
    fill(path, record(value=math.inf, terms={"tail": math.nan}))

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    for line in path.read_text().splitlines():
        assert json.loads(line, parse_constant=refuse)["schema_version"] == SCHEMA_VERSION


CHANGES = {"model_hash": "x", "input_hash": "x", "bound_version": 2, "radius": 0.1, "norm": "l1", "seed": 1}
CHANGES |= {"dtype": "float32", "device": "cuda", "options": {"steps": 61}, "layer": 1, "task": "speed", "model": "x"}


@pytest.mark.parametrize("change", [{name: value} for name, value in CHANGES.items()], ids=str)
def test_the_key_changes_with_all_that_determines_the_result(change: dict[str, Any]) -> None:
    assert record(**change).question.key != record().question.key


def test_the_key_does_not_change_with_the_answer_or_the_order_of_options() -> None:
    one = record(options={"a": 1, "b": 2}, seconds=1.0, environment="here")
    other = record(options={"b": 2, "a": 1}, value=5.0, seconds=2.0, environment="there")
    assert one.question.key == other.question.key


def test_a_line_torn_anywhere_is_cut_off_and_reported(path: Path) -> None:
    fill(path, record(layer=0), record(layer=1))
    whole = path.read_bytes()
    # The line break belongs to the line: without it only the next append would show the damage.
    start = whole.rstrip(b"\n").rindex(b"\n") + 1
    for end in range(start + 1, len(whole) - 1):
        path.write_bytes(whole[:end])
        with RecordStore(path) as store:
            assert f"{end - start} bytes" in store.repaired
            assert [each.question.layer for each in store.records.values()] == [0]
            store.append(record(layer=1))
        assert [each.question.layer for each in read(path).records.values()] == [0, 1]


def test_a_whole_line_without_its_line_break_is_kept(path: Path) -> None:
    fill(path, record(layer=0))
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    with RecordStore(path) as store:
        assert "line break" in store.repaired
        store.append(record(layer=1))
    assert len(read(path).records) == 2


def test_a_sound_file_is_not_touched_on_opening(path: Path) -> None:
    fill(path, record())
    before = path.read_bytes()
    with RecordStore(path) as store:
        assert store.repaired == ""
    assert path.read_bytes() == before


def test_damage_before_the_last_line_is_an_error_that_names_the_line(path: Path) -> None:
    fill(path, record(layer=0), record(layer=1))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], lines[1][:20] + b"\n", *lines[2:]]))
    with pytest.raises(RecordError, match="line 2 of"):
        read(path)


@pytest.mark.parametrize(
    ("version", "message"), [(SCHEMA_VERSION + 1, "update lipbounds"), (0, "older version"), (None, "older version")]
)
def test_another_schema_version_is_refused_with_what_to_do(path: Path, version: int | None, message: str) -> None:
    fill(path, record())
    lines = [json.loads(line) | {"schema_version": version} for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(RecordError, match=message) as caught:
        read(path)
    assert str(path) in str(caught.value)


def test_an_edited_line_is_refused(path: Path) -> None:
    fill(path, record())
    path.write_text(path.read_text().replace('"test.bound"', '"test.other"'))
    with pytest.raises(RecordError, match="edited"):
        read(path)


def test_a_record_whose_block_is_missing_is_refused(path: Path) -> None:
    fill(path, record())
    path.write_bytes(path.read_bytes().splitlines(keepends=True)[1])
    with pytest.raises(RecordError, match="block"):
        read(path)


def test_what_evaluations_at_one_block_share_is_written_once(path: Path) -> None:
    fill(path, record("a"), record("b"))
    fill(path, record("c"))
    assert path.read_text().count('"record":"block"') == 1
    assert len(read(path).records) == 3


def test_the_latest_record_of_a_key_counts_and_compacting_drops_the_rest(path: Path) -> None:
    with RecordStore(path) as store:
        first = store.add_environment({"run": 1})
        store.append(record("a", value=1.0, environment=first))
        second = store.add_environment({"run": 2})
        store.append(record("b", value=5.0, environment=second))
        store.append(record("a", value=2.0, environment=second))
        assert [each.value for each in read(path).records.values()] == [5.0, 2.0]
        store.compact()
        assert list(store.environments) == [second]
        written = path.stat().st_ino
        store.compact()
        assert path.stat().st_ino == written
        store.append(record("c", value=3.0, environment=second))
    contents = read(path)
    assert [each.value for each in contents.records.values()] == [5.0, 2.0, 3.0]
    assert list(contents.environments) == [second]
    assert contents.superseded == 0


def test_compacting_a_file_with_nothing_to_drop_leaves_it_alone(path: Path) -> None:
    with RecordStore(path) as store:
        store.append(record(environment=store.add_environment({"run": 1})))
        before = path.stat().st_ino
        store.compact()
        assert path.stat().st_ino == before


def test_a_second_run_on_the_same_folder_is_refused(path: Path) -> None:
    with RecordStore(path), pytest.raises(RecordError, match="one run at a time"):
        RecordStore(path)
    RecordStore(path).close()


def test_a_full_disk_leaves_no_half_line(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(path, record(layer=0))
    before = path.read_bytes()
    really_write = os.write
    monkeypatch.setattr(os, "write", lambda file, content: really_write(file, content[:10]))
    with RecordStore(path) as store, pytest.raises(OSError, match="disk full"):
        store.append(record(layer=1))
    assert path.read_bytes() == before
