"""The file of records: what is written is read again, whatever a killed run left behind."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench import __main__ as program
from bench.engine.answers import Shown
from bench.engine.records import SCHEMA_VERSION, Record, RecordError
from bench.engine.store import Store
from bench.engine.store_file import read
from bench.tests.samples import record, records_at


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
    with Store(path) as store:
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
    assert list(records_at(path).values()) == [sample]


def test_lines_are_strict_json_and_carry_the_schema_version(path: Path) -> None:
    fill(path, record(value=math.inf, terms={"tail": math.nan}))

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    for line in path.read_text().splitlines():
        assert json.loads(line, parse_constant=refuse)["schema_version"] == SCHEMA_VERSION


CHANGES = {"model_hash": "x", "input_hash": "x", "bound_version": 2, "radius": 0.1, "norm": "l1", "seed": 1}
CHANGES |= {"unit": "one"}
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
        with Store(path) as store:
            assert f"{end - start} bytes" in store.repaired
            assert [entry.question["layer"] for entry in store.entries.values()] == [0]
            store.append(record(layer=1))
        assert [each.question.layer for each in records_at(path).values()] == [0, 1]


def test_a_whole_line_without_its_line_break_is_kept(path: Path) -> None:
    fill(path, record(layer=0))
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    with Store(path) as store:
        assert "line break" in store.repaired
        store.append(record(layer=1))
    assert len(records_at(path)) == 2


def test_a_sound_file_is_not_touched_on_opening(path: Path) -> None:
    fill(path, record())
    before = path.read_bytes()
    with Store(path) as store:
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
    with pytest.raises(RecordError, match="names a block of an earlier line"):
        read(path)


def test_what_evaluations_at_one_block_share_is_written_once(path: Path) -> None:
    fill(path, record("a"), record("b"))
    fill(path, record("c"))
    assert path.read_text().count('"record":"block"') == 1
    assert len(records_at(path)) == 3


def test_the_latest_record_of_a_key_counts_and_compacting_drops_the_rest(path: Path) -> None:
    with Store(path) as store:
        first = store.add_environment({"run": 1})
        store.append(record("a", value=1.0, environment=first))
        second = store.add_environment({"run": 2})
        store.append(record("b", value=5.0, environment=second))
        store.append(record("a", value=2.0, environment=second))
        assert [each.value for each in records_at(path).values()] == [5.0, 2.0]
        store.compact()
        assert list(store.environments) == [second]
        with pytest.raises(RecordError, match="one run at a time"):  # the lock is on the new file, too
            Store(path)
        written = path.stat().st_ino
        store.compact()
        assert path.stat().st_ino == written
        store.append(record("c", value=3.0, environment=second))
    contents = read(path)
    assert [entry.answer["value"] for entry in contents.entries.values()] == [5.0, 2.0, 3.0]
    assert list(contents.environments) == [second]
    assert contents.superseded == 0


def test_compacting_a_file_with_nothing_to_drop_leaves_it_alone(path: Path) -> None:
    with Store(path) as store:
        store.append(record(environment=store.add_environment({"run": 1})))
        before = path.stat().st_ino
        store.compact()
        assert path.stat().st_ino == before


def test_a_second_run_on_the_same_file_is_refused(path: Path) -> None:
    with Store(path), pytest.raises(RecordError, match="one run at a time"):
        Store(path)
    Store(path).close()


def test_a_full_disk_leaves_no_half_line(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(path, record(layer=0))
    before = path.read_bytes()
    really_write = os.write
    monkeypatch.setattr(os, "write", lambda file, content: really_write(file, content[:10]))
    with Store(path) as store, pytest.raises(RecordError, match="disk full"):
        store.append(record(layer=1))
    assert path.read_bytes() == before


# -- what is in the way of a run: one line, status 2, nothing lost ---------------------------------------------------


def status_and_line(path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    status = program.main(["tightness", "--quick", "--results", str(path.parent)], [])
    (line,) = capsys.readouterr().err.splitlines()
    return status, line


def fifo(path: Path) -> None:
    os.mkfifo(path)


def dangling(path: Path) -> None:
    path.symlink_to(path.parent / "nowhere" / "file")


@pytest.mark.parametrize("put", [Path.mkdir, dangling, fifo], ids=["folder", "dangling link", "FIFO"])
def test_something_else_in_the_place_of_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], put: Callable[[Path], None]
) -> None:
    path = tmp_path / "tightness.jsonl"
    put(path)
    status, line = status_and_line(path, capsys)
    assert status == program.MISUSE
    assert f"{path} must be a file" in line
    assert sorted(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    status, line = status_and_line(tmp_path / "file" / "tightness.jsonl", capsys)
    assert status == program.MISUSE
    assert "--results must be a folder" in line


def test_a_file_system_that_is_only_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> int:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "open", refuse)
    status, line = status_and_line(tmp_path / "tightness.jsonl", capsys)
    assert status == program.MISUSE
    assert "Read-only file system" in line


@pytest.mark.parametrize(
    ("before", "after"), [('"scope":"point"', '"scope":"planet"'), ('"value":2.0', '"value":1.0'), ("0.5", '"x"')]
)
def test_an_edited_answer_is_named_and_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], before: str, after: str
) -> None:
    path = tmp_path / "tightness.jsonl"
    fill(path, record())
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after))
    status, line = status_and_line(path, capsys)
    assert status == program.MISUSE
    assert "edited" in line
    assert "line 2 of" in line
    assert path.read_text() == text.replace(before, after)


def test_a_line_that_was_only_set_anew_is_read(path: Path) -> None:
    fill(path, record(value=1 / 3, **FULL))
    path.write_text("".join(json.dumps(json.loads(line)) + "\n" for line in path.read_text().splitlines()))
    assert [each.value for each in records_at(path).values()] == [1 / 3]


def test_a_disk_that_is_full_in_the_middle_leaves_what_the_next_run_repairs(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(path, record(layer=0))
    whole = path.read_bytes()
    really_write = os.write

    def full(file: int, content: bytes) -> int:
        really_write(file, content[:7])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, Store(path) as store:
        patch.setattr(os, "write", full)
        patch.setattr(os, "ftruncate", refuse_to_cut)
        with pytest.raises(RecordError, match="No space left on device"):
            store.append(record(layer=1))
    assert path.read_bytes() != whole
    with Store(path) as store:
        assert "cut off 7 bytes" in store.repaired
        store.append(record(layer=1))
    assert [each.question.layer for each in records_at(path).values()] == [0, 1]


def refuse_to_cut(*_: Any) -> None:
    raise OSError(errno.EIO, "Input/output error")


def test_a_page_whose_answer_is_missing_is_an_error(path: Path) -> None:
    with Store(path) as store:
        page = store.show("standard", ["0" * 16])
        with pytest.raises(RecordError, match="must hold all answers of its page"):
            Shown(store, page)
