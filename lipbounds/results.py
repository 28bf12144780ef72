"""Files of results as figures that can be compared between two of them.

Four structures are known: what `lipbounds bench` leaves in results/, which are the tables of tightness
(tightness.json), the certified radii (certified.json) and files of records, one evaluation per line (tightness.jsonl,
balls.jsonl); and reports on a model (`lipbounds report --json`), such as those before and after training.
"""

from __future__ import annotations

import dataclasses as dc
import json
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any, Literal

from lipbounds.errors import InvalidInput
from lipbounds.files import refuse_pipe


SCHEMA_VERSION = 1  # of tables, and of the records of versions up to 0.1
RECORDS_VERSION = 2
Better = Literal["lower", "higher"]
BETTER: dict[str, Better] = {"proved": "lower", "probable": "lower", "estimate": "lower", "lower": "higher"}
SECONDS = "seconds, median"


@dc.dataclass(frozen=True, order=True)
class Row:
    """What a figure is about.

    Args:
        model: its name.
        method: the bound, estimator or task.
        what: is measured.
        where: the place in the model or data; empty for a figure about all of it.
    """

    model: str
    method: str
    what: str
    where: str = ""

    def __post_init__(self) -> None:
        if not all(isinstance(part, str) for part in dc.astuple(self)):
            raise TypeError(f"names must be strings, got {self}")


@dc.dataclass(frozen=True)
class Figure:
    """A number, and which of two such numbers is the better one."""

    value: float
    better: Better


@dc.dataclass(frozen=True, kw_only=True)
class Results:
    """What a file holds.

    Args:
        structure: the name of what the file holds; only files of the same structure can be compared.
        figures: by what they are about.
        failures: what gave no number although it should, or a wrong one, the reason in `what`.
        inputs: number of inputs by model, where figures are medians over them.
    """

    structure: str
    figures: dict[Row, Figure]
    failures: frozenset[Row] = frozenset()
    inputs: dict[str, int] = dc.field(default_factory=dict)


def read_results(path: Path) -> Results:
    """The figures in a file.

    Args:
        path: of the file.

    Raises:
        InvalidInput: there is no such file, it is damaged, or its structure or schema version is unknown.
    """
    refuse_pipe(path)
    try:
        text = path.read_text(encoding="utf-8")
        content = _parsed(text)
        reader = _reader(content)
        if reader is not None:
            return reader(content)
    except OSError as error:
        raise InvalidInput(f"{path} must be a file of results, got {error.strerror}; check the path.") from error
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, OverflowError, RecursionError) as error:
        raise InvalidInput(
            f"{path} must be a whole file of results as `lipbounds bench` or `lipbounds report --json` write it, "
            f"got one that cannot be read ({type(error).__name__}: {_short(error)}); make it again."
        ) from error
    raise InvalidInput(
        f"{path} must be tightness.json, certified.json, a report of schema version {SCHEMA_VERSION} or a file of "
        f"records of schema version {SCHEMA_VERSION} or {RECORDS_VERSION}, got a file of another structure; only these "
        "can be compared."
    )


def _short(error: Exception) -> str:
    text = str(error)
    return text if len(text) < 80 else text[:80] + "..."


def _parsed(text: str) -> Any:
    """The JSON object, or the list of the objects on the lines."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        # The last line may be torn: what a killed run left. The benchmark cuts it off when it goes on.
        lines = text.split("\n")
        return [json.loads(line) for line in (lines if text.endswith("\n") else lines[:-1]) if line]


def _reader(content: Any) -> Callable[[Any], Results] | None:
    if isinstance(content, list) and content and all(isinstance(line, dict) for line in content):
        versions = {line.get("schema_version") for line in content}
        if versions == {RECORDS_VERSION}:
            return _answers
        return _records if versions == {SCHEMA_VERSION} else None
    if isinstance(content, dict) and {"methods", "models", "environments"} <= content.keys():
        return _tightness if content.get("schema_version") == SCHEMA_VERSION else None
    if isinstance(content, dict) and {"models", "whole"} <= content.keys():
        return _certified
    if isinstance(content, dict) and {"inputs", "words", "lipbounds"} <= content.keys():
        from lipbounds.report.schema import SCHEMA_VERSION as REPORT_VERSION

        return _report if content.get("schema_version") == REPORT_VERSION else None
    return None


def _tightness(content: dict[str, Any]) -> Results:
    figures: dict[Row, Figure] = {}
    failures = {Row(name, "", f"incomplete: {reason}") for name, reason in content["problems"].items()}
    for model, table in content["models"].items():
        for row in table["overall"]:
            figures |= _ratios(model, row, row, "at a point")
        for group in table["sets"]:
            words = f"{group['scope']}, {group['norm']}"
            words += "" if group["relative_radius"] is None else f", radius {group['relative_radius']:g}"
            for row in group["methods"]:
                if row["ratio"] is not None:
                    figures |= _ratios(model, row, row["ratio"], words)
                what = f"{row['kind']}, {words}: value, median"
                value = Figure(float(row["value"]["median"]), BETTER[row["kind"]])
                figures[Row(model, row["bound"], what)] = value
        failed = (row for row in table["not_answered"] if row["status"] != "unsupported")
        failures |= {Row(model, row["bound"], f"{row['status']}: {row['error']}") for row in failed}
        failures |= {
            Row(model, row["bound"], f"below {row['lower_bound']} in layer {row['layer']} at {row['input']}")
            for row in table["violations"]
        }
    inputs = {model: int(table["inputs"]) for model, table in content["models"].items()}
    return Results(structure="tightness", figures=figures, failures=frozenset(failures), inputs=inputs)


def _ratios(model: str, row: dict[str, Any], ratios: dict[str, Any], words: str) -> Iterator[tuple[Row, Figure]]:
    """Median and worst ratio to the truth; an estimate is the better the nearer it is to 1, on whichever side."""
    for name in ("median", "worst"):
        value = float(ratios[name])
        if row["kind"] == "estimate":
            value = max(value, 1 / value) if value > 0 else float("inf")
        what = f"{row['kind']}, {words}: ratio to the truth, {name}"
        yield Row(model, row["bound"], what), Figure(value, BETTER[row["kind"]])


def _certified(content: dict[str, Any]) -> Results:
    figures: dict[Row, Figure] = {}
    seconds: dict[Row, list[float]] = defaultdict(list)
    failures = set()
    for model, found in content["models"].items():
        for row in found["certificates"]:
            where = f"image {row['image']}"
            figures[Row(model, row["method"], "certified radius", where)] = Figure(float(row["radius"]), "higher")
            seconds[Row(model, row["method"], SECONDS)].append(float(row["seconds"]))
    for model, row in content["whole"].items():
        for name in ("bound", "joint"):
            if row[name] is not None:
                figures[Row(model, row["attention"], f"whole model, {name}")] = Figure(float(row[name]), "lower")
        if not float(row["lower"]) <= float(row["bound"]):
            failures.add(Row(model, row["attention"], f"the bound is below {row['lower']}, which is reached"))
    return Results(structure="certified", figures=figures | _medians(seconds), failures=frozenset(failures))


def _report(content: dict[str, Any]) -> Results:
    """The numbers of a report, whatever the model is called: a smaller constant is the better one, of every kind."""
    figures: dict[Row, Figure] = {}
    for run in content["inputs"]:
        for layer in run["layers"]:
            where = f"layer {int(layer['layer'])} ({layer['module']}), {run['name']}"
            for number in (*layer["proved"], layer["constant"], layer["lower"], *layer["balls"]):
                if number is not None:
                    radius = "" if number["radius"] is None else f", radius {number['radius']:g}"
                    what = f"{number['kind']}, {number['scope']}, {number['norm']}{radius}: value"
                    row = Row("the model", number["method"], what, where)
                    figures[row] = Figure(float(number["value"]), "lower")
    return Results(structure="report", figures=figures)


def _answers(lines: list[dict[str, Any]]) -> Results:
    """Records of today: the question and the answer in fields of their own."""
    blocks = {line["id"]: {**line["question"], **line["answer"]} for line in lines if line["record"] == "block"}
    found = [line for line in lines if line["record"] == "answer"]
    return _records(
        [{"record": "block", "id": name, **block} for name, block in blocks.items()]
        + [{**line["question"], **line["answer"], "block": line["block"]} for line in found]
    )


def _records(lines: list[dict[str, Any]]) -> Results:
    figures: dict[Row, Figure] = {}
    failures: dict[Row, str] = {}
    seconds: dict[Row, dict[str, float]] = defaultdict(dict)
    blocks = {line["id"]: line for line in lines if line.get("record") == "block"}
    evaluations = [line for line in lines if "record" not in line]
    # Of several records about one thing the highest version of the bound counts, and of these the latest.
    for line in sorted(evaluations, key=lambda line: int(line["bound_version"])):
        block = blocks[line["block"]]
        where = f"layer {int(block['layer'])}, {block['input']}, {block['dtype']}, {block['device']}"
        radius = "" if line.get("relative_radius") is None else f", radius {line['relative_radius']:g}"
        what = f"{line['kind']}, {line['scope']}, {line['norm']}{radius}: value"
        row = Row(block["model"], line["bound"], what, where)
        figures.pop(row, None)
        failures.pop(row, None)
        if line["status"] == "ok":
            figures[row] = Figure(float(line["value"]), BETTER[line["kind"]])
            seconds[Row(block["model"], line["bound"], SECONDS)][f"{where} {what}"] = float(line["seconds"])
        elif line["status"] != "unsupported":
            failures[row] = f"{line['status']}: {line['error']}"
    reasons = frozenset(Row(row.model, row.method, reason) for row, reason in failures.items())
    times = _medians({row: of.values() for row, of in seconds.items()})
    return Results(structure="records", figures=figures | times, failures=reasons)


def _medians(seconds: Mapping[Row, Collection[float]]) -> dict[Row, Figure]:
    return {row: Figure(median(times), "lower") for row, times in seconds.items()}
