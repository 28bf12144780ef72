"""From records to the numbers of the tables: ratios to the reference, their medians, the gain of the paper."""

from __future__ import annotations

import dataclasses as dc
import math
from collections import Counter, defaultdict
from collections.abc import Collection, Hashable, Iterable, Mapping
from statistics import fmean, median
from typing import Any

from bench.engine.records import Record
from bench.tightness.scopes import (
    EXACT,
    UPPER_KINDS,
    BlockId,
    block_of,
    ratio,
    ratio_statistics,
    refutations,
    sets,
    violations,
)


AGGREGATES_VERSION = 1  # of the structure of tightness.json
# The bound with the paper's g_1 and its variants with other values for the softmax norm, for the paper's gain alone.
GAIN_FAMILIES = ("yudin2025.biased", "yudin2025.theorem3")


@dc.dataclass(frozen=True, kw_only=True)
class Reference:
    """What a bound at one block is compared with: the exact norm, or else the largest lower bound."""

    value: float
    name: str
    kind: str


def aggregate(
    records: Iterable[Record],
    environments: dict[str, dict[str, Any]],
    *,
    command: str,
    records_path: str,
    problems: dict[str, str] | None = None,
    refuted: dict[str, dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Everything the tables and figures show, ready for JSON.

    Args:
        records: of one run; several versions of one bound must not be mixed.
        environments: environment lines by id, at least those that the records name.
        command: that makes these tables again.
        records_path: where the records are, for the reader.
        problems: models that are incomplete, with the reason.
        refuted: declarations of the refuted formulas by name; their records are in no table but their own.
    """
    refuted = refuted or {}
    by_model: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        by_model[record.question.model].append(record)
    used = {record.environment for group in by_model.values() for record in group}
    lines = [line for name, line in environments.items() if name in used]
    methods: dict[str, Any] = {}
    descriptions: dict[str, str] = {}
    for line in lines:  # a later run describes what it used best
        methods |= line.get("methods", {})
        descriptions |= line.get("models", {})
    names = {record.question.bound for group in by_model.values() for record in group}
    machines = {name: _machine(line.get("environment", {})) for name, line in environments.items()}
    return {
        "schema_version": AGGREGATES_VERSION,
        "command": command,
        "records": records_path,
        "environments": [line.get("environment", {}) for line in lines],
        "methods": {name: methods[name] for name in sorted(names - refuted.keys())},
        "models": {
            name: _model(group, refuted.keys(), machines) | {"description": descriptions[name]}
            for name, group in by_model.items()
        },
        "refuted": refuted,
        "problems": problems or {},
    }


def _machine(environment: dict[str, Any]) -> Hashable:
    """What the last bits of a forward pass depend on."""
    packages = environment.get("packages", {})
    return environment.get("cpu"), packages.get("torch"), environment.get("platform"), environment.get("threads")


def references(records: Iterable[Record]) -> dict[BlockId, Reference]:
    """The reference of each block of one model; blocks where nothing measured the norm have none.

    Args:
        records: about the norm l2 at the input.
    """
    found: dict[BlockId, Reference] = {}
    for record in records:
        block, value = block_of(record), record.value
        if value is None or not (record.question.bound == EXACT or record.kind == "lower"):
            continue
        known = found.get(block)
        is_exact = record.question.bound == EXACT
        if known is None or is_exact or (known.name != EXACT and value > known.value):
            found[block] = Reference(value=value, name=record.question.bound, kind=record.kind)
    return found


def _model(records: list[Record], refuted: Collection[str], machines: Mapping[str, Hashable]) -> dict[str, Any]:
    standing = [record for record in records if record.value is not None and record.question.bound not in refuted]
    answered = [record for record in standing if (record.question.norm, record.scope) == ("l2", "point")]
    found = references(answered)
    ratios: dict[str, dict[BlockId, float]] = defaultdict(dict)
    kinds: dict[str, str] = {}
    for record in answered:
        block = block_of(record)
        if block in found and record.question.bound != found[block].name:
            assert record.value is not None
            ratios[record.question.bound][block] = ratio(record.value, found[block].value)
            kinds[record.question.bound] = record.kind
    scopes = {record.question.bound: record.scope for record in answered}
    return {
        "inputs": len({record.question.input for record in records}),
        "layers": len({record.question.layer for record in records}),
        "tokens": [min(record.tokens for record in records), max(record.tokens for record in records)],
        "references": dict(Counter(reference.name for reference in found.values())),
        "unmeasured": len({block_of(record) for record in records} - found.keys()),
        "bracket": _bracket(answered, found),
        "overall": [
            {"bound": name, "kind": kinds[name], "scope": scopes[name], **ratio_statistics([*of.values()], kinds[name])}
            for name, of in sorted(ratios.items(), key=lambda item: median(item[1].values()))
        ],
        "per_layer": _per_layer(records, found, ratios),
        "per_length": _per_length(records, ratios),
        "gain": [row for family in GAIN_FAMILIES for row in _gain(answered, family)],
        "not_answered": _not_answered(records),
        "sets": sets(standing),
        "refuted": refutations(records, refuted),
        "violations": violations(standing, machines),
    }


def _per_layer(
    records: list[Record], found: dict[BlockId, Reference], ratios: dict[str, dict[BlockId, float]]
) -> list[dict[str, Any]]:
    """Per layer the median of the reference and of each method's ratio to it."""
    modules = {record.question.layer: record.module for record in records}
    rows = []
    for layer in sorted(modules):
        values = [reference.value for block, reference in found.items() if block[0] == layer]
        medians = {
            name: median(chosen)
            for name, of in ratios.items()
            if (chosen := [value for block, value in of.items() if block[0] == layer])
        }
        rows.append(
            {
                "layer": layer,
                "module": modules[layer],
                "reference": median(values) if values else None,
                "median": medians,
            }
        )
    return rows


def _per_length(records: list[Record], ratios: dict[str, dict[BlockId, float]]) -> list[dict[str, Any]]:
    """Per class of input lengths, each twice as wide as the one before, the median of each method's ratio."""
    tokens = {block_of(record): record.tokens for record in records}
    rows = []
    for power in sorted({_power_of_two_from(count) for count in tokens.values()}):
        blocks = {block for block, count in tokens.items() if _power_of_two_from(count) == power}
        medians = {
            name: median(chosen) for name, of in ratios.items() if (chosen := [of[b] for b in of if b in blocks])
        }
        lengths = [tokens[block] for block in blocks]
        inputs = len({input_ for _, input_ in blocks})
        rows.append({"tokens": [min(lengths), max(lengths)], "inputs": inputs, "median": medians})
    return rows


def _power_of_two_from(count: int) -> int:
    """The smallest power of two that is not below `count`."""
    return 1 << (count - 1).bit_length()


def _bracket(answered: list[Record], found: dict[BlockId, Reference]) -> dict[str, Any] | None:
    """How well the truth is known: the largest ratio, over blocks, of the smallest upper bound to the reference.

    Its kind is `probable` if at any block the smallest upper bound is.
    """
    smallest: dict[BlockId, tuple[float, str]] = {}
    for record in answered:
        block = block_of(record)
        if record.kind in UPPER_KINDS and block in found and record.value is not None:
            smallest[block] = min((record.value, record.kind), smallest.get(block, (math.inf, "")))
    if not smallest:
        return None
    spans = [ratio(value, found[block].value) for block, (value, _) in smallest.items()]
    kinds = {kind for _, kind in smallest.values()}
    return {"ratio": max(spans), "kind": "probable" if "probable" in kinds else "proved"}


def _gain(answered: list[Record], family: str) -> list[dict[str, Any]]:
    """Per layer what the constants 1, 1/2, g_1 and the exact softmax norm make of one and the same bound.

    The gains are medians over inputs of ratios of bounds; `g_1` and `exact_norm` are means over heads and inputs of the
    largest value over the rows of the attention map.
    """
    tables: dict[str, dict[BlockId, Record]] = defaultdict(dict)
    for record in answered:
        tables[record.question.bound][block_of(record)] = record
    with_g, half, exact, one = (tables[family + ending] for ending in ("", "_half", "_exact", "_one"))
    rows = []
    for layer in sorted({block[0] for block in with_g}):
        blocks = [b for b in with_g if b[0] == layer and b in half and b in exact and b in one]
        if not blocks:
            continue
        row: dict[str, Any] = {"bound": family, "layer": layer, "module": with_g[blocks[0]].module}
        for name, (upper, lower) in {
            "one_over_half": (one, half),
            "half_over_g_1": (half, with_g),
            "half_over_exact": (half, exact),
            "g_1_over_exact": (with_g, exact),
        }.items():
            row[name] = median(ratio(upper[b].value or 0.0, lower[b].value or 0.0) for b in blocks)
        for name, table in {"g_1": with_g, "exact_norm": exact}.items():
            norms = [table[b].details["softmax_norm"] for b in blocks if "softmax_norm" in table[b].details]
            row[name] = fmean(norms) if norms else None
        rows.append(row)
    return rows


def _not_answered(records: list[Record]) -> list[dict[str, Any]]:
    """Each way in which an evaluation gave no number, with its count; nothing is dropped."""
    reasons = Counter((r.question.bound, r.status, r.error) for r in records if r.status != "ok")
    return [
        {"bound": bound, "status": status, "error": error, "count": count}
        for (bound, status, error), count in sorted(reasons.items())
    ]
