"""The file of answers of the task `certified`: one JSON line each, appended whole, so that a killed run goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.records import SCHEMA_VERSION, RecordError, content_hash


Answer = dict[str, Any]


class Answers:
    """Answers by the content of their question.

    Args:
        path: of the file; made if missing.

    Raises:
        RecordError: a line that is not the last is no JSON, or of another schema version.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
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
