"""The file of records: appended line by line, so that a run killed at any time loses only the evaluation in flight.

Three kinds of lines: `"record": "environment"`, once a run; `"record": "block"`, what all evaluations at one attention
block share; and the evaluations, which name their block and environment by id.
"""

from __future__ import annotations

import dataclasses as dc
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

from bench.engine.records import SCHEMA_VERSION, Record, RecordError, check_schema, content_hash, to_json
from lipbounds.files import write_atomically as write_atomically


if sys.platform != "win32":
    import fcntl


BLOCK_FIELDS = ("model", "model_hash", "layer", "module", "input", "input_hash", "tokens", "heads", "dtype", "device")


@dc.dataclass
class Contents:
    """What a file of records holds.

    Args:
        records: the latest record of each key, in the order of the file.
        environments: environment lines by id.
        blocks: ids of the block lines, with what they say.
        torn: bytes at the end of the file that are no whole line: what a killed run left.
        superseded: number of records that a later one with the same key replaces.
    """

    records: dict[str, Record] = dc.field(default_factory=dict)
    environments: dict[str, dict[str, Any]] = dc.field(default_factory=dict)
    blocks: dict[str, dict[str, Any]] = dc.field(default_factory=dict)
    torn: int = 0
    superseded: int = 0

    def add(self, fields: dict[str, Any], place: str) -> None:
        """Take in one line.

        Args:
            fields: the parsed line.
            place: where it stands, for messages.

        Raises:
            RecordError: another schema version; no such record; a block that no earlier line describes.
        """
        check_schema(fields, place)
        kind = fields.get("record")
        if kind in ("environment", "block") and not isinstance(fields.get("id"), str):
            raise RecordError(f"{place} must have an id, got id={fields.get('id')!r}; restore the file.")
        if kind == "environment":
            self.environments[fields["id"]] = fields
        elif kind == "block":
            self.blocks[fields["id"]] = {name: fields[name] for name in BLOCK_FIELDS if name in fields}
        else:
            name = fields.pop("block", "")
            if not isinstance(name, str) or name not in self.blocks:
                raise RecordError(f"{place} must name a block that an earlier line describes; restore the file.")
            try:
                self.put(Record.from_dict(fields | self.blocks[name]))
            except RecordError as error:
                raise RecordError(f"{place}: {error}") from error

    def put(self, record: Record) -> None:
        """Take in one record; the latest of a key is the one that counts, and the order is that of the latest."""
        self.superseded += self.records.pop(record.question.key, None) is not None
        self.records[record.question.key] = record

    def lines(self, record: Record) -> list[str]:
        """The lines to write for a record: itself, and before it that of its block if it is new here."""
        fields = record.to_dict()
        block = {name: fields.pop(name) for name in BLOCK_FIELDS if name in fields}
        identity = content_hash(block)
        new = identity not in self.blocks
        self.blocks[identity] = block
        block_line = {"schema_version": SCHEMA_VERSION, "record": "block", "id": identity, **block}
        return [*([to_json(block_line)] if new else []), to_json({**fields, "block": identity})]


def read(path: Path) -> Contents:
    """Read a file of records; a torn last line is left out and counted.

    Args:
        path: of the file; it need not exist.

    Raises:
        RecordError: another schema version, or a line before the last that is no record.
    """
    content = path.read_bytes() if path.exists() else b""
    lines = content.splitlines(keepends=True)
    torn = 0
    contents = Contents()
    for number, line in enumerate(lines, 1):
        fields = parsed(line)
        if fields is not None:
            contents.add(fields, f"line {number} of {path}")
        elif number == len(lines) and not line.endswith(b"\n"):
            torn = len(line)
        else:
            raise RecordError(
                f"line {number} of {path} must be a JSON object, got {line[:60]!r}; restore the file or delete it."
            )
    return dc.replace(contents, torn=torn)


def parsed(line: bytes) -> dict[str, Any] | None:
    """The object on a line; None if there is none, which no beginning of an object is.

    Args:
        line: any bytes.
    """
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return fields if isinstance(fields, dict) else None


class RecordStore:
    """A file of records open for appending, locked against a second run; a torn last line is cut off on opening.

    Args:
        path: of the file; it and its folder are made if missing.

    Raises:
        RecordError: another run has the file open; the file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = _lock_folder(path.parent)
        try:
            self._contents = read(path)
            self.repaired = _repair(path, self._contents.torn)
        except BaseException:
            self.close()
            raise

    @property
    def records(self) -> dict[str, Record]:
        """The latest record of each key."""
        return self._contents.records

    @property
    def environments(self) -> dict[str, dict[str, Any]]:
        """Environment lines by id."""
        return self._contents.environments

    def __enter__(self) -> RecordStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let other runs open the file."""
        if self._lock is not None:
            os.close(self._lock)

    def append(self, record: Record) -> None:
        """Write the record to disk; the latest record of a key is the one that counts."""
        self._write(self._contents.lines(record))
        self._contents.put(record)

    def add_environment(self, description: dict[str, Any]) -> str:
        """Write an environment line and return its id.

        Args:
            description: anything JSON can hold.
        """
        identity = content_hash(description)
        fields = {"schema_version": SCHEMA_VERSION, "record": "environment", "id": identity, **description}
        self._write([to_json(fields)])
        self.environments[identity] = fields
        return identity

    def compact(self) -> None:
        """Rewrite the file without superseded records and environments that no record names, if there are any."""
        used = {record.environment for record in self.records.values()}
        if not self._contents.superseded and used == set(self.environments):
            return
        environments = {name: fields for name, fields in self.environments.items() if name in used}
        kept = Contents(environments=environments)
        lines = [to_json(fields) for fields in environments.values()]
        for record in self.records.values():
            lines += kept.lines(record)
            kept.put(record)
        write_atomically(self.path, "".join(f"{line}\n" for line in lines).encode())
        self._contents = kept

    def _write(self, lines: Iterable[str]) -> None:
        """Whole lines in one write, on disk before this returns."""
        content = "".join(f"{line}\n" for line in lines).encode()
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            size = os.fstat(file).st_size
            written = os.write(file, content)
            if written < len(content):  # a full disk: nothing may follow half a line
                os.ftruncate(file, size)
                raise OSError(
                    f"{self.path}: only {written} of {len(content)} bytes could be written; is the disk full?"
                )
            os.fsync(file)
        finally:
            os.close(file)


def _lock_folder(folder: Path) -> int | None:
    """Lock against a second run, until the descriptor is closed or the process ends; not on Windows."""
    if sys.platform == "win32":
        return None
    # The folder is locked, not the file: the file is replaced when it is compacted.
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock)
        raise RecordError(
            f"{folder} must be written by one run at a time, got a second one; wait for the other run to end, or pass "
            "another --results folder."
        ) from error
    return lock


def _repair(path: Path, torn: int) -> str:
    """Cut off a torn last line, or end a whole one that lacks its line break; returns what was done, for the user."""
    if not path.exists() or path.stat().st_size == 0:
        return ""
    with path.open("r+b") as file:
        if torn:
            file.truncate(path.stat().st_size - torn)
            return f"{path}: cut off {torn} bytes of a torn last line that a killed run left."
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            file.write(b"\n")
            return f"{path}: ended the last line, whose line break a killed run did not write."
    return ""
