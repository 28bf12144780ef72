"""The lines of a file of results: what each kind holds, how it is read and checked, how it is written."""

from __future__ import annotations

import dataclasses as dc
import hashlib
import json
import stat
from functools import cached_property
from pathlib import Path
from typing import Any

from bench.engine.records import KEY_LENGTH, SCHEMA_VERSION, Record, RecordError, check_schema, content_hash, to_json


# What all answers about one attention block share, written once: of the question, and of the answer.
ASKED_OF_BLOCK = ("model", "model_hash", "layer", "input", "input_hash", "dtype", "device")
KNOWN_OF_BLOCK = ("module", "tokens", "heads")
DIGEST = ',"digest":"'
INFINITE = (b'"inf"', b'"-inf"', b'"nan"')


@dc.dataclass(frozen=True, kw_only=True)
class Entry:
    """A question and its answer.

    Args:
        question: all that the answer depends on, ready for JSON.
        answer: ready for JSON.
        environment: id of the line of the environment in which it was made; empty where that is not known.
    """

    question: dict[str, Any]
    answer: dict[str, Any]
    environment: str = ""

    @classmethod
    def of(cls, record: Record) -> Entry:
        """The entry of a record."""
        return cls(question=record.question.to_dict(), answer=record.to_dict(), environment=record.environment)

    @cached_property
    def key(self) -> str:
        """Content hash of the question."""
        return content_hash(self.question)

    @cached_property
    def flat(self) -> dict[str, Any]:
        """Key, question and answer in one, as pages take them."""
        return {"key": self.key, **self.question, **self.answer, "environment": self.environment}

    @cached_property
    def record(self) -> Record:
        """The entry as a record about an attention block.

        Raises:
            RecordError: it is none.
        """
        return Record.from_dict(self.question, self.answer, self.environment)


@dc.dataclass(frozen=True, kw_only=True)
class Page:
    """What a page shows.

    Args:
        keys: of the answers, in the order of the page.
        data: what it says beside them.
    """

    keys: list[str]
    data: dict[str, Any] = dc.field(default_factory=dict)


@dc.dataclass
class ResultsFile:
    """What a file of results holds.

    Args:
        entries: the latest of each key, in the order of the file.
        environments: environment lines by id.
        blocks: what entries about a block share, by id: parts of the question, parts of the answer.
        pages: by their names.
        torn: bytes at the end of the file that are no whole line: what a killed run left.
        superseded: number of entries and pages that a later one replaces.
    """

    entries: dict[str, Entry] = dc.field(default_factory=dict)
    environments: dict[str, dict[str, Any]] = dc.field(default_factory=dict)
    blocks: dict[str, tuple[dict[str, Any], dict[str, Any]]] = dc.field(default_factory=dict)
    pages: dict[str, Page] = dc.field(default_factory=dict)
    torn: int = 0
    superseded: int = 0

    @property
    def superfluous(self) -> bool:
        """Whether the file holds what nothing needs."""
        used = {entry.environment for entry in self.entries.values()} - {""}
        return bool(self.superseded) or not set(self.environments) <= used

    def add(self, fields: dict[str, Any], place: str) -> None:
        """Take in one line.

        Args:
            fields: the parsed line.
            place: where it stands, for messages.

        Raises:
            RecordError: no such line; a block that no earlier line describes.
        """
        try:
            match fields["record"]:
                case "environment":
                    self.environments[str(fields["id"])] = fields["line"]
                case "block":
                    self.blocks[str(fields["id"])] = dict(fields["question"]), dict(fields["answer"])
                case "answer":
                    asked, known = self.blocks[fields["block"]] if "block" in fields else ({}, {})
                    entry = Entry(
                        question={**fields["question"], **asked},
                        answer={**fields["answer"], **known},
                        environment=str(fields["environment"]),
                    )
                    entry.__dict__["key"] = str(fields["key"])  # the digest of the line covers it
                    self.put(entry)
                case "page":
                    self.superseded += str(fields["name"]) in self.pages
                    self.pages[str(fields["name"])] = Page(keys=list(fields["keys"]), data=dict(fields["data"]))
                case other:
                    raise KeyError(f"record={other!r}")
        except (KeyError, TypeError, ValueError) as error:
            raise RecordError(
                f"{place} must be an environment, a block, an answer that names a block of an earlier line, or a page, "
                f"got {type(error).__name__}: {str(error)[:80]}; restore the file."
            ) from error

    def put(self, entry: Entry) -> None:
        """Take in one entry; the latest of a key is the one that counts, and the order is that of the latest."""
        self.superseded += self.entries.pop(entry.key, None) is not None
        self.entries[entry.key] = entry

    def lines(self, entry: Entry) -> list[str]:
        """The lines to write for an entry: itself, and before it that of its block if it is new here."""
        fields: dict[str, Any] = {"record": "answer", "key": entry.key}
        asked, known, lines = {}, {}, []
        if "layer" in entry.question and "bound" in entry.question:
            asked = {name: entry.question[name] for name in ASKED_OF_BLOCK if name in entry.question}
            known = {name: entry.answer[name] for name in KNOWN_OF_BLOCK if name in entry.answer}
            identity = content_hash([asked, known])
            if identity not in self.blocks:
                self.blocks[identity] = asked, known
                lines.append(_line({"record": "block", "id": identity, "question": asked, "answer": known}))
            fields["block"] = identity
        fields["question"] = {name: value for name, value in entry.question.items() if name not in asked}
        fields["answer"] = {name: value for name, value in entry.answer.items() if name not in known}
        return [*lines, _line({**fields, "environment": entry.environment})]

    def environment_lines(self, description: dict[str, Any]) -> tuple[str, list[str]]:
        """Take in an environment; returns its id and the lines to write.

        Args:
            description: what the line says.
        """
        identity = content_hash(description)
        self.environments[identity] = description
        return identity, [_line({"record": "environment", "id": identity, "line": description})]

    def page_lines(self, place: str, page: Page) -> list[str]:
        """Take in what a page shows; returns the lines to write.

        Args:
            place: name of the page.
            page: what is shown.
        """
        self.superseded += place in self.pages
        self.pages[place] = page
        return [_line({"record": "page", "name": place, "keys": page.keys, "data": page.data})]

    def all_lines(self, kept: ResultsFile) -> list[str]:
        """All lines of a file that holds this and nothing superfluous.

        Args:
            kept: empty; it takes in what is written.
        """
        used = {entry.environment for entry in self.entries.values()}
        lines = []
        for name, line in self.environments.items():
            if name in used:
                kept.environments[name] = line
                lines.append(_line({"record": "environment", "id": name, "line": line}))
        for entry in self.entries.values():
            lines += kept.lines(entry)
            kept.put(entry)
        for place, page in self.pages.items():
            lines += kept.page_lines(place, page)
        return lines


def read(path: Path) -> ResultsFile:
    """Read a file of results; a torn last line is left out and counted.

    Args:
        path: of the file; it need not exist.

    Raises:
        RecordError: it is no regular file or cannot be read; a line is of another schema version, was edited, or is
            none, but for the last one.
    """
    held = ResultsFile()
    lines = content_of(path).splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        fields = parsed(line)
        if fields is not None:
            place = f"line {number} of {path}"
            check_schema(fields, place)
            _check_digest(line, fields, place)
            if isinstance(fields.get("answer"), dict) and any(name in line for name in INFINITE):
                fields["answer"] = with_infinities(fields["answer"])
            held.add(fields, place)
        elif number == len(lines) and not line.endswith(b"\n"):
            held.torn = len(line)
        else:
            raise RecordError(
                f"line {number} of {path} must be a JSON object, got {line[:60]!r}; restore the file or delete it."
            )
    return held


def content_of(path: Path) -> bytes:
    """The bytes of a file; none if it is missing.

    Args:
        path: of the file.

    Raises:
        RecordError: it is no regular file, or cannot be read.
    """
    try:
        if not path.exists() and not path.is_symlink():
            return b""
        if path.exists() and not stat.S_ISREG(path.stat().st_mode):
            raise OSError("it is no regular file")
        return path.read_bytes()
    except OSError as error:
        raise RecordError(
            f"{path} must be a file that can be read, got '{error.strerror or error}'; restore it or pass another "
            "--results folder."
        ) from error


def with_infinities(content: Any) -> Any:
    """The numbers that `lipbounds.files.without_infinities` made strings of, as numbers again."""
    if isinstance(content, dict):
        return {name: with_infinities(value) for name, value in content.items()}
    if isinstance(content, list):
        return [with_infinities(value) for value in content]
    return float(content) if content in ("inf", "-inf", "nan") else content


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


def _line(fields: dict[str, Any]) -> str:
    """A line with its schema version and digest."""
    text = to_json({"schema_version": SCHEMA_VERSION, **fields})
    return f'{text[:-1]}{DIGEST}{_digest(text.encode())}"}}'


def _digest(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()[:KEY_LENGTH]


def _check_digest(line: bytes, fields: dict[str, Any], place: str) -> None:
    """Refuse a line that says something else than what was written; spaces may differ."""
    wanted = fields.pop("digest", None)
    rest, _, end = line.rstrip().rpartition(DIGEST.encode())
    if end == f'{wanted}"}}'.encode() and _digest(rest + b"}") == wanted:
        return
    try:
        found = _digest(to_json(fields).encode())
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{place} must be a line of results, got {error}; restore the file.") from error
    if found != wanted:
        raise RecordError(
            f"{place} must have the digest of its content, {found}, got digest={wanted!r}; the line was edited: "
            "restore it, or delete it and run the same command again."
        )
