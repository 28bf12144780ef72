"""Files are written whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from lipbounds.errors import InvalidInput
from lipbounds.files import check_writable, json_text, write_atomically


def test_a_file_is_made_with_its_folder_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    for content in (b"one", b"two"):
        write_atomically(path, content)
        assert path.read_bytes() == content
    assert [*path.parent.iterdir()] == [path]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(
    error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def interrupted(_: int) -> None:
        raise error

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(error):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [*tmp_path.iterdir()] == [path]


def test_a_pipe_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        check_writable(pipe)
        write_atomically(pipe, b"content")
        assert os.read(reader, 100) == b"content"
        assert pipe.is_fifo()
    finally:
        os.close(reader)


def test_a_path_that_can_be_written_passes_the_check_and_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "file"
    check_writable(path)
    assert not [*tmp_path.iterdir()]
    path.write_bytes(b"old")
    check_writable(path)
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize("name", ["", "file/below", "x" * 300, "a\0b"])
def test_a_path_that_cannot_be_written_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InvalidInput, match="pass another path"):
        check_writable(tmp_path / name)


def test_json_is_read_by_every_parser() -> None:
    content = {"a": float("inf"), "b": [float("nan"), -float("inf"), 1.5], "c": ("\u03b5", None)}
    text = json_text(content)
    assert text.isascii()
    strict = json.loads(text, parse_constant=pytest.fail)
    assert strict == {"a": "inf", "b": ["nan", "-inf", 1.5], "c": ["\u03b5", None]}
