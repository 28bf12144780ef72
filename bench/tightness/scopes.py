"""Aggregates of the promises about more than the input: balls, compact sets, other norms; and of refuted formulas.

Their truth, a supremum over a set, is not known. What is known is a lower bound of it: the norm of the Jacobian at the
input, or what a search of the set has reached. A ratio to that says how far above the truth a bound is at most.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from statistics import median
from typing import Any

from bench.engine.records import Record


EXACT = "exact"
UPPER_KINDS = ("proved", "probable")
# For each scope the scopes whose constants are never above its own, with the same norm and no larger a radius.
WITHIN = {
    "point": ("point",),
    "change": ("point", "change"),
    "ball": ("point", "change", "ball"),
    "compact": ("point", "compact"),
    "global": ("point", "change", "ball", "compact", "global"),
}
# How far, relatively, the norm of a block captured on one machine may be from that of the same block captured on
# another one: the tokens differ by the rounding of a forward pass in float32. Differences up to 3e-7 were seen.
OTHER_MACHINE = 1e-5
BlockId = tuple[int, str]  # layer and input


def block_of(record: Record) -> BlockId:
    """Where a record was evaluated, within its model."""
    return record.question.layer, record.question.input


def ratio(value: float, reference: float) -> float:
    """Value over reference; where the reference is 0, 1 for a 0 and infinity for the rest."""
    if reference > 0:
        return value / reference
    return 1.0 if value == reference else math.inf


def ratio_statistics(ratios: Sequence[float], kind: str) -> dict[str, Any]:
    """Median, worst, best and number of ratios; worst is the largest for upper bounds and the smallest for lower ones.

    Args:
        ratios: to the reference.
        kind: of the promise.
    """
    worst, best = (min(ratios), max(ratios)) if kind == "lower" else (max(ratios), min(ratios))
    return {"median": median(ratios), "worst": worst, "best": best, "count": len(ratios)}


def reached(promise: Record, measured: Iterable[Record]) -> Record | None:
    """The largest of the measured values that the constant of `promise` cannot be below; None if there is none.

    Args:
        promise: any record.
        measured: lower bounds and exact norms at the same block.
    """
    inside = [record for record in measured if _is_inside(record, promise) and record.value is not None]
    return max(inside, key=lambda record: record.value or 0.0, default=None)


def _is_inside(measured: Record, promise: Record) -> bool:
    if measured.question.norm != promise.question.norm or measured.scope not in WITHIN[promise.scope]:
        return False
    radius = math.inf if promise.scope == "global" else promise.radius or 0.0
    if promise.scope == "change" and radius == 0:  # no point but the centre: nothing is promised
        return False
    return (measured.radius or 0.0) <= radius


def sets(answered: Iterable[Record]) -> list[dict[str, Any]]:
    """One entry for each norm, scope and relative radius of one model, but for the norm l2 at a point.

    Args:
        answered: records with a value, of standing methods.
    """
    measured: dict[BlockId, list[Record]] = defaultdict(list)
    promises: dict[tuple[Any, ...], list[Record]] = defaultdict(list)
    for record in answered:
        if record.question.bound == EXACT or record.kind == "lower":
            measured[block_of(record)].append(record)
        if (record.question.norm, record.scope) != ("l2", "point"):
            promises[record.question.norm, record.scope, record.relative_radius].append(record)
    order = [*WITHIN]
    keys = sorted(promises, key=lambda key: (key[0] != "l2", key[0], order.index(key[1]), key[2] or 0.0))
    return [
        {"norm": norm, "scope": scope, "relative_radius": relative}
        | _compared(promises[norm, scope, relative], measured)
        for norm, scope, relative in keys
    ]


def _compared(promises: list[Record], measured: dict[BlockId, list[Record]]) -> dict[str, Any]:
    """The methods of one norm, scope and radius: their ratios where there is a reference, and their values."""
    values: dict[str, list[float]] = defaultdict(list)
    ratios: dict[str, list[float]] = defaultdict(list)
    names: dict[BlockId, str] = {}
    for record in promises:
        assert record.value is not None
        values[record.question.bound].append(record.value)
        reference = reached(record, measured[block_of(record)])
        if reference is not None and reference.value is not None:
            names[block_of(record)] = reference.question.bound
            ratios[record.question.bound].append(ratio(record.value, reference.value))
    kinds = {record.question.bound: record.kind for record in promises}
    rows = [
        {
            "bound": name,
            "kind": kinds[name],
            "ratio": ratio_statistics(ratios[name], kinds[name]) if name in ratios else None,
            "value": {"median": median(of), "smallest": min(of), "largest": max(of), "count": len(of)},
        }
        for name, of in values.items()
    ]
    rows.sort(key=lambda row: ((row["ratio"] or row["value"])["median"], row["bound"]))
    return {"references": dict(Counter(names.values())), "methods": rows}


def violations(answered: Iterable[Record], machines: Mapping[str, Hashable]) -> list[dict[str, Any]]:
    """Upper bounds below a lower bound of the same constant, or of a smaller one: one of the two is wrong.

    Two machines capture blocks that differ by the rounding of the model's forward pass. Where the two numbers are of
    different machines, only what is below by more than `OTHER_MACHINE` is a violation.

    Args:
        answered: records of one model with a value, of standing methods.
        machines: what tells machines apart, by the id of the environment of a record.
    """
    found = []
    for record, lower in _pairs(answered):
        if lower is None:
            continue
        same = machines.get(record.environment) == machines.get(lower.environment)
        room = 1.0 if same else 1 + OTHER_MACHINE
        if not (record.value or 0.0) * room >= (lower.value or 0.0):  # `not >=`: nan is a violation
            place = {"layer": record.question.layer, "input": record.question.input, "scope": record.scope}
            names = {"bound": record.question.bound, "kind": record.kind, "lower_bound": lower.question.bound}
            found.append({**place, **names, "value": record.value, "reached": lower.value})
    return found


def refutations(records: Iterable[Record], refuted: Iterable[str]) -> list[dict[str, Any]]:
    """Per refuted formula, at how many evaluations on this model it is below a lower bound, and by what factor at most.

    Args:
        records: of one model.
        refuted: names of the refuted formulas.
    """
    names, records = set(refuted), list(records)
    tried = Counter(record.question.bound for record in records if record.question.bound in names)
    answered = [record for record in records if record.value is not None]
    factors: dict[str, list[float]] = defaultdict(list)
    for record, lower in _pairs(answered):
        if record.question.bound in names and lower is not None:
            factors[record.question.bound].append(ratio(lower.value or 0.0, record.value or 0.0))
    return [
        {
            "bound": name,
            "evaluations": tried[name],
            "compared": len(factors[name]),
            "violated": sum(not factor <= 1 for factor in factors[name]),
            "worst": max(factors[name], default=None),
        }
        for name in sorted(tried)
    ]


def _pairs(answered: Iterable[Record]) -> list[tuple[Record, Record | None]]:
    """Each upper bound with the largest lower bound of its constant."""
    answered = list(answered)
    lowers: dict[BlockId, list[Record]] = defaultdict(list)
    for record in answered:
        if record.kind == "lower":
            lowers[block_of(record)].append(record)
    return [(record, reached(record, lowers[block_of(record)])) for record in answered if record.kind in UPPER_KINDS]
