"""No bytes make the readers of records fail in a way of their own: they are read, or refused with a RecordError."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.engine.records import RecordError
from bench.engine.store import Store
from bench.engine.store_file import read
from bench.tests.samples import record, records_at


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)
HARD = [b"[" * 100_000, b'{"a":' * 100_000, b"1" * 5000, b"\xff\n", b"3\n", b"null\n", b'{"a": 1}\n', b'"\\ud800"\n']


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The lines of a file with everything a record can have."""
    path = tmp_path_factory.mktemp("good") / "records.jsonl"
    with Store(path) as store:
        environment = store.add_environment({"methods": {}})
        store.append(record(radius=0.5, terms={"tail": 1.0}, details={"residual": 0.0}, environment=environment))
        store.append(record(value=None, error="it broke", seed=1))
    return [json.loads(line) for line in path.read_text().splitlines()]


def open_all(path: Path, content: bytes) -> None:
    """Read, open for appending and rewrite; and read as answers."""
    path.write_bytes(content)
    with contextlib.suppress(RecordError):
        read(path)
    with contextlib.suppress(RecordError), Store(path) as store:
        store.append(record(value=1.0))
        store.compact()
        assert read(path).torn == 0
    path.write_bytes(content)
    with contextlib.suppress(RecordError), Store(path) as answers:
        answers.ask({"a": 1}, lambda: {"value": 2.0})
        assert read(path).entries == answers.entries


@settings(max_examples=30, deadline=None)
@given(content=st.binary(max_size=60) | st.lists(JSON.map(json.dumps), max_size=3).map(lambda x: "\n".join(x).encode()))
def test_random_bytes_are_read_or_refused(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    open_all(tmp_path_factory.getbasetemp() / "random.jsonl", content)


@pytest.mark.parametrize("content", HARD, ids=lambda content: repr(content[:9]))
def test_hard_bytes_are_read_or_refused(content: bytes, tmp_path: Path) -> None:
    open_all(tmp_path / "hard.jsonl", content)
    open_all(tmp_path / "hard.jsonl", content + b"\n")


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_a_damaged_line_is_read_or_refused(
    data: st.DataObject, good: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    lines = [dict(line) for line in good]
    line = data.draw(st.sampled_from(lines))
    field = data.draw(st.sampled_from(sorted(line)))
    if data.draw(st.booleans()):
        line[field] = data.draw(JSON)
    else:
        del line[field]
    content = "".join(f"{json.dumps(line)}\n" for line in lines).encode()
    cut = data.draw(st.integers(0, 40))
    open_all(tmp_path_factory.getbasetemp() / "damaged.jsonl", content[: len(content) - cut])


@settings(max_examples=20, deadline=None)
@given(cut=st.integers(0, 400))
def test_a_file_cut_anywhere_gives_what_was_whole(
    cut: int, good: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "cut.jsonl"
    content = "".join(f"{json.dumps(line)}\n" for line in good).encode()
    path.write_bytes(content[: len(content) - cut])
    whole = sum(json.loads(line)["record"] == "answer" for line in path.read_bytes().splitlines(keepends=True)[:-1])
    assert len(records_at(path)) - whole in (0, 1)
