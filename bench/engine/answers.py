"""The files of answers of `certified` and `robustness`: one JSON line each, appended whole; a killed run goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.engine.records import SCHEMA_VERSION, RecordError, check_schema, content_hash
from bench.engine.store import parsed
from lipbounds.files import write_atomically


Answer = dict[str, Any]


class NotAnswered(RecordError):
    """A question whose answer is not in a file that is only to be read."""


class Answers:
    """Answers by the content of their question.

    Args:
        path: of the file; made if missing.
        only_read: make no answers.

    Raises:
        RecordError: a line is of another schema version, or no answer; a torn last line is cut off.
    """

    def __init__(self, path: Path, *, only_read: bool = False) -> None:
        self.path, self.only_read = path, only_read
        self.found: dict[str, Answer] = {}
        self.made = self.reused = 0
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        for number, line in enumerate(lines, 1):
            fields = parsed(line)
            if fields is None and number == len(lines) and not line.endswith(b"\n"):  # what a killed run left
                write_atomically(path, b"".join(lines[:-1]))
                break
            if fields is None:
                raise RecordError(f"line {number} of {path} is no JSON object; restore the file.")
            check_schema(fields, f"line {number} of {path}")
            if not isinstance(fields.get("key"), str):
                raise RecordError(f"line {number} of {path} must have a key; restore the file.")
            self.found[fields["key"]] = fields

    def ask(self, question: Answer, work: Callable[[], Answer], *, force: bool = False) -> Answer:
        """The answer to a question: from the file, or made now and appended.

        Args:
            question: all that the answer depends on, ready for JSON.
            work: makes the answer.
            force: make it again.

        Raises:
            NotAnswered: it is not in the file, which is only read.
        """
        key = content_hash(question)
        if key in self.found and not force:
            self.reused += 1
            return self.found[key]
        if self.only_read:
            raise NotAnswered(f"{self.path} has no answer to {question}.")
        fields = {"schema_version": SCHEMA_VERSION, "key": key, **question, **work()}
        self.keep(fields)
        return fields

    def keep(self, fields: Answer) -> None:
        """Append an answer that was made now.

        Args:
            fields: all of its line.
        """
        line = (json.dumps(fields, ensure_ascii=False) + "\n").encode()
        with self.path.open("ab", buffering=0) as file:  # one write, whole even if other processes append, too
            file.write(line)
            os.fsync(file.fileno())
        self.found[fields["key"]] = fields
        self.made += 1
