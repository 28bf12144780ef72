"""The file of answers of the task `certified`: one JSON line each, appended whole, so that a killed run goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.records import SCHEMA_VERSION, RecordError, check_schema, content_hash
from bench.store import parsed
from lipbounds.files import write_atomically


Answer = dict[str, Any]


class Answers:
    """Answers by the content of their question.

    Args:
        path: of the file; made if missing.

    Raises:
        RecordError: a line is of another schema version, or no answer; a torn last line is cut off.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
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
        """
        key = content_hash(question)
        if key in self.found and not force:
            self.reused += 1
            return self.found[key]
        fields = {"schema_version": SCHEMA_VERSION, "key": key, **question, **work()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(fields, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.found[key] = fields
        self.made += 1
        return fields
