"""The files of answers of `certified` and `robustness`: one JSON line each, appended whole; a killed run goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.records import SCHEMA_VERSION, RecordError, content_hash


Answer = dict[str, Any]


class NotAnswered(RecordError):
    """A question whose answer is not in a file that is only to be read."""


class Answers:
    """Answers by the content of their question.

    Args:
        path: of the file; made if missing.
        only_read: make no answers.

    Raises:
        RecordError: a line that is not the last is no JSON, or of another schema version.
    """

    def __init__(self, path: Path, *, only_read: bool = False) -> None:
        self.path, self.only_read = path, only_read
        self.found: dict[str, Answer] = {}
        self.made = self.reused = 0
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        for number, line in enumerate(lines, 1):
            try:
                fields = json.loads(line)
            except json.JSONDecodeError as error:
                if number == len(lines):  # what a killed run left
                    path.write_text("".join(f"{kept}\n" for kept in lines[:-1]), encoding="utf-8")
                    break
                raise RecordError(f"{path}:{number} is no JSON; restore the file.") from error
            if fields.get("schema_version") != SCHEMA_VERSION:
                raise RecordError(f"{path}:{number} must have schema version {SCHEMA_VERSION}; move the file away.")
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
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(fields, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.found[key] = fields
        self.made += 1
        return fields
