"""Records of schema version 1, read and taken into the format of this version, with the same numbers.

Version 1 had two formats: evaluations at blocks, whose keys held radii and drawn weights as the processor had rounded
them, and answers, which did not tell the question from the answer and mostly not where they were made. Pages were not
in the records: what a page showed is taken from the page's own numbers, and where an answer does not say on which
machine it was made, from the environment that its page names.
"""

from __future__ import annotations

import dataclasses as dc
import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from bench.engine.records import RecordError
from bench.engine.store_file import Entry, ResultsFile, content_of, parsed, with_infinities
from bench.workloads.hashes import VERSIONED, versions
from bench.workloads.radii import LARGEST, MEDIAN, ONE


OLD_VERSION = 1
ASKED = (
    *("task", "model", "model_hash", "layer", "input", "input_hash", "bound", "bound_version", "norm"),
    *("dtype", "device", "seed", "options"),
)
UNITS = {"ball": MEDIAN, "change": MEDIAN, "compact": LARGEST}
Line = dict[str, Any]


@dc.dataclass
class Old:
    """A file of version 1, and what it becomes.

    Args:
        path: of the file.
        lines: its evaluations or answers; those of blocks with what the line of the block says.
        environments: its environment lines by id.
        new: what it becomes.
    """

    path: Path
    lines: list[Line] = dc.field(default_factory=list)
    environments: dict[str, Line] = dc.field(default_factory=dict)
    new: ResultsFile = dc.field(default_factory=ResultsFile)

    def add(self, question: Line, answer: Line, environment: str = "") -> Entry:
        """Take in an answer.

        Args:
            question: all that it depends on.
            answer: the answer.
            environment: id of a line of `new`.
        """
        entry = Entry(question=question, answer=answer, environment=environment)
        self.new.put(entry)
        return entry

    def describe(self, description: str, **more: Any) -> str:
        """The id of the line of an environment of which only a description is known.

        Args:
            description: in words.
            **more: what else is known.
        """
        return self.new.environment_lines({"environment": {"description": description, **more}})[0]

    def split(self, line: Line, asked: Collection[str], environment: str, **more: Any) -> Entry:
        """Take in an answer of a line that does not tell question from answer.

        Args:
            line: the line.
            asked: names of the fields of the question.
            environment: id of a line of `new`.
            **more: what the question holds today besides.
        """
        left = {"schema_version", "key", "environment"}
        question = {name: line[name] for name in asked if name in line}
        answer = {name: value for name, value in line.items() if name not in {*asked, *left}}
        return self.add({**question, **more}, answer, environment)

    def numbers(self) -> Line:
        """The numbers of the page, from its JSON file; nothing if there is none."""
        path = self.path.with_suffix(".json")
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def named_by_page(self) -> str:
        """The id of the environment that the page names, for answers that do not say where they were made."""
        path = self.path.with_suffix(".md")
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        found = re.findall(r"^- (.*)$", text.partition("## Environment")[2], flags=re.MULTILINE)
        words = "; ".join(found) or "not recorded"
        return self.describe(words, source="the page that showed these answers when they were migrated")


def read_old(path: Path) -> Old:
    """Read a file of version 1; a torn last line is left out.

    Args:
        path: of the file; it need not exist.

    Raises:
        RecordError: a line is of another version, or cannot be read.
    """
    old, blocks = Old(path), {}
    lines = content_of(path).splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        fields = parsed(line)
        if fields is None and number == len(lines) and not line.endswith(b"\n"):
            break
        if fields is None or fields.pop("schema_version", None) != OLD_VERSION:
            raise RecordError(f"line {number} of {path} must be of schema version {OLD_VERSION}; restore the file.")
        try:
            match fields.pop("record", ""):
                case "environment":
                    old.environments[fields.pop("id")] = fields
                case "block":
                    blocks[fields.pop("id")] = fields
                case _:
                    shared = blocks[fields.pop("block")] if "block" in fields else {}
                    old.lines.append({**fields, **shared})
        except KeyError as error:
            raise RecordError(f"line {number} of {path} has no {error}; restore the file.") from error
    return old


def blocks(
    old: Old, drawn: Mapping[tuple[str, str], tuple[str, str]], as_they_are: Collection[float] = ()
) -> list[tuple[Line, str]]:
    """Take in evaluations at blocks; returns each old line with its new key.

    Args:
        old: the file.
        drawn: today's hashes of weights and input, by model and input, where both are drawn.
        as_they_are: radii that were chosen without a unit.
    """
    names = {}
    for name, line in old.environments.items():
        names[name] = old.new.environment_lines(line)[0]
    found = []
    for line in old.lines:
        fields = {name: value for name, value in line.items() if name not in ("key", "environment")}
        question = {name: fields.pop(name) for name in ASKED if name in fields}
        place = question["model"], question["input"]
        packages = old.environments.get(line["environment"], {}).get("environment", {}).get("packages", {})
        if place in drawn and {name: packages.get(name, "").partition("+")[0] for name in VERSIONED} == versions():
            question["model_hash"], question["input_hash"] = drawn[place]
        radius, relative = fields.get("radius"), fields.get("relative_radius")
        if radius is not None:
            bare = radius in as_they_are and (relative == radius or relative not in RELATIVE)
            question |= {"radius": radius, "unit": ONE} if bare else {"radius": relative, "unit": UNITS[line["scope"]]}
        question = {name: value for name, value in question.items() if value not in (None, {}, "")}
        entry = old.add(question, with_infinities(fields), names.get(line["environment"], ""))
        found.append((line, entry.key))
    return found


RELATIVE = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


def newest(found: list[tuple[Line, str]], order: Mapping[tuple[str, str, int, str], int]) -> list[str]:
    """Keys of what a page shows: the newest version of each bound, block by block.

    Args:
        found: what `blocks` returned.
        order: numbers of what is shown, by model, input, layer and bound.
    """
    latest: dict[str, int] = {}
    for line, _ in found:
        latest[line["bound"]] = max(line["bound_version"], latest.get(line["bound"], 0))
    keys: dict[str, tuple[int, int]] = {}
    for number, (line, key) in enumerate(found):
        place = order.get((line["model"], line["input"], line["layer"], line["bound"]))
        if place is not None and line["bound_version"] == latest[line["bound"]]:
            keys[key] = place, number
    return sorted(keys, key=keys.__getitem__)
