"""What got worse from one file of results to another."""

from __future__ import annotations

import dataclasses as dc
import math
from collections import defaultdict
from typing import Any

from lipbounds.errors import InvalidInput
from lipbounds.results import SECONDS, Figure, Results, Row


@dc.dataclass(frozen=True, kw_only=True)
class Change:
    """A figure that changed, at the place where it changed most.

    Args:
        model: its name.
        method: the bound, estimator or task.
        what: is measured.
        where: the place of the largest change; empty for a figure about the whole model.
        before: the figure there, in the first file.
        after: the same in the second.
        factor: by which it is worse; below 1 it is better.
        places: number of places where it changed so.
    """

    model: str
    method: str
    what: str
    where: str
    before: float
    after: float
    factor: float
    places: int


@dc.dataclass(frozen=True, kw_only=True)
class Missing:
    """A figure that only the first file has.

    Args:
        model: its name.
        method: the bound, estimator or task.
        what: is measured.
        places: number of places where it is missing.
    """

    model: str
    method: str
    what: str
    places: int


@dc.dataclass(frozen=True, kw_only=True)
class Failure:
    """What gives no number, or a wrong one, in the second file only."""

    model: str
    method: str
    reason: str


@dc.dataclass(frozen=True, kw_only=True)
class Difference:
    """Two files side by side.

    Args:
        compared: number of figures in both.
        new: number of figures in the second file only.
        worse: figures worse by more than the tolerance, the worst first.
        better: figures better by more than it, the best first.
        missing: figures in the first file only.
        failures: in the second file only.
    """

    compared: int
    new: int
    worse: list[Change]
    better: list[Change]
    missing: list[Missing]
    failures: list[Failure]

    @property
    def regressed(self) -> bool:
        """Something is worse, missing or failing."""
        return bool(self.worse or self.missing or self.failures)

    def to_dict(self) -> dict[str, Any]:
        """For JSON, with a schema version."""
        return {"schema_version": 1, "regressed": self.regressed, **dc.asdict(self)}


def compare(before: Results, after: Results, *, tolerance: float, with_seconds: bool = False) -> Difference:
    """Match the figures of two files, and tell what got worse.

    Args:
        before: the first file.
        after: the second.
        tolerance: share by which a figure may be worse, such as 0.05.
        with_seconds: compare times as well.

    Raises:
        InvalidInput: the files are of different structure, or hold medians over different numbers of inputs; nothing
            can be matched.
    """
    _check_alike(before, after)
    old, new = _figures(before, with_seconds), _figures(after, with_seconds)
    factors = {row: worse_by(old[row], new[row]) for row in old if row in new}
    if not factors:
        raise InvalidInput("the two files must have a figure in common, got none; compare runs of the same command.")
    limit = 1 + tolerance
    missing: dict[Row, int] = defaultdict(int)
    for row in old.keys() - new.keys():
        missing[dc.replace(row, where="")] += 1
    worse = {row: factor for row, factor in factors.items() if factor > limit}
    better = {row: factor for row, factor in factors.items() if factor < 1 / limit}
    return Difference(
        compared=len(factors),
        new=len(new.keys() - old.keys()),
        worse=sorted(_changes(worse, old, new), key=lambda change: -change.factor),
        better=sorted(_changes(better, old, new), key=lambda change: change.factor),
        missing=[
            Missing(model=row.model, method=row.method, what=row.what, places=count)
            for row, count in sorted(missing.items())
        ],
        failures=[
            Failure(model=row.model, method=row.method, reason=row.what)
            for row in sorted(after.failures - before.failures)
        ],
    )


def worse_by(before: Figure, after: Figure) -> float:
    """The factor by which the second figure is worse: 1 for equal ones, infinity for what is no number any more.

    Args:
        before: the first figure.
        after: the second; figures are not negative.
    """
    small, large = (before.value, after.value) if before.better == "lower" else (after.value, before.value)
    if before.value == after.value or (math.isnan(before.value) and math.isnan(after.value)):
        return 1.0
    if math.isnan(after.value):
        return math.inf
    if math.isnan(before.value) or large == 0 or math.isinf(small):
        return 0.0
    return math.inf if small == 0 else large / small


def _figures(results: Results, with_seconds: bool) -> dict[Row, Figure]:
    return {row: figure for row, figure in results.figures.items() if with_seconds or row.what != SECONDS}


def _check_alike(before: Results, after: Results) -> None:
    if before.structure != after.structure:
        raise InvalidInput(
            f"both files must be of the same structure, got {before.structure} and {after.structure}; compare two "
            "files of the same name."
        )
    for model in before.inputs.keys() & after.inputs.keys():
        if before.inputs[model] != after.inputs[model]:
            raise InvalidInput(
                f"medians must be over the same inputs, got {before.inputs[model]} inputs of {model} in the first file "
                f"and {after.inputs[model]} in the second; compare two full runs or two with --quick."
            )


def _changes(factors: dict[Row, float], old: dict[Row, Figure], new: dict[Row, Figure]) -> list[Change]:
    """One for each model, method and measure."""
    groups: dict[Row, list[Row]] = defaultdict(list)
    for row in factors:
        groups[dc.replace(row, where="")].append(row)
    changes = []
    for rows in groups.values():
        most = max(rows, key=lambda row: abs(math.log(factors[row])) if factors[row] > 0 else math.inf)
        changes.append(
            Change(
                **dc.asdict(most),
                before=old[most].value,
                after=new[most].value,
                factor=factors[most],
                places=len(rows),
            )
        )
    return changes
