"""The tables of the promises about sets and in other norms, and that of the refuted formulas, from the aggregates."""

from __future__ import annotations

from itertools import groupby
from typing import Any, cast

from bench.pages.formatting import KIND_TITLES, figure, summary_words, table
from bench.pages.page import folded
from bench.tightness.scopes import UPPER_KINDS
from bench.workloads.radii import INPUTS, SEARCHED_INPUTS
from lipbounds.claims import NORMS, SCOPES, Norm, Scope


REFUTED_PAGE = "../docs/bounds/refuted.md"
RADIUS_WORDS = {
    "ball": "Radii of balls are {} times the median norm of the tokens of the input.",
    "change": "Radii of balls are {} times the median norm of the tokens of the input.",
    "compact": "The radius is {} times the largest norm of a token of the input, rounded up: the set holds the input.",
}
INPUT_WORDS = (
    f"Bounds are evaluated at the first {INPUTS} inputs of each model; estimators, which search the set, at the first "
    f"{SEARCHED_INPUTS} of the models with small blocks."
)
Aggregates = dict[str, Any]
Row = dict[str, Any]


def set_sections(aggregates: Aggregates) -> list[str]:
    """One section for each norm and scope but l2 at a point, with one table a kind.

    Args:
        aggregates: what `bench.tightness.aggregate.aggregate` returned.
    """
    entries = [(name, entry) for name, model in aggregates["models"].items() for entry in model["sets"]]
    entries.sort(key=lambda item: _place(item[1]))  # stable: models keep their order
    parts = []
    for (_, scope, norm), grouped in groupby(entries, key=lambda item: _place(item[1])):
        parts += _section(scope, norm, list(grouped), aggregates)
    return parts


def _place(entry: Row) -> tuple[bool, str, str]:
    return entry["norm"] != "l2", entry["scope"], entry["norm"]


def _section(scope: str, norm: str, entries: list[tuple[str, Row]], aggregates: Aggregates) -> list[str]:
    radii = sorted({entry["relative_radius"] for _, entry in entries if entry["relative_radius"] is not None})
    listed = ", ".join(f"{radius:g}" for radius in radii)
    references = sorted({name for _, entry in entries for name in entry["references"]})
    described = [f"Scope `{scope}`: {SCOPES[cast(Scope, scope)]}. Norm `{norm}`: {NORMS[cast(Norm, norm)]}."]
    if radii:
        described += [RADIUS_WORDS[scope].format(listed), INPUT_WORDS]
    described += [_reference_words(scope, references)]
    parts = [f"## Scope `{scope}`, norm `{norm}`", " ".join(described)]
    for kind, title in KIND_TITLES.items():
        rows = _rows(kind, entries, radii)
        if rows:
            columns = [f"radius {radius:g}" for radius in radii] or ["value"]
            parts += [
                f"### {title}, scope `{scope}`, norm `{norm}`",
                _caption(kind, bool(references)),
                folded("By model and method", table(["model", "method", "blocks", *columns], rows)),
            ]
    return parts


def _reference_words(scope: str, references: list[str]) -> str:
    if not references:
        return "Nothing measures the constant in this norm: values are listed, and no ratio."
    names = ", ".join(f"`{name}`" for name in references)
    at_point = "" if scope == "point" else ": the constant on the set is at least the norm of the Jacobian at a point"
    return (
        f"The truth is not known. The reference is the largest lower bound of it that was measured ({names}){at_point}."
    )


def _caption(kind: str, has_reference: bool) -> str:
    if not has_reference:
        return "Value, median (smallest to largest) over layers and inputs:"
    if kind in UPPER_KINDS:
        return "At most so many times above the truth, median (worst) over layers and inputs; the truth may be closer:"
    return "Value over the reference, median (worst) over layers and inputs; the truth may be larger than both:"


def _rows(kind: str, entries: list[tuple[str, Row]], radii: list[float]) -> list[list[Any]]:
    """A row a model and method, a column a radius; ordered by the first radius within each model."""
    cells: dict[tuple[str, str], dict[float | None, Row]] = {}
    for model, entry in entries:
        for method in entry["methods"]:
            if method["kind"] == kind:
                cells.setdefault((model, method["bound"]), {})[entry["relative_radius"]] = method
    return [
        [model, f"`{bound}`", max(row["value"]["count"] for row in of.values())]
        + [_ratio_or_value(of.get(radius)) for radius in radii or [None]]
        for (model, bound), of in cells.items()
    ]


def _ratio_or_value(row: Row | None) -> str:
    if row is None:
        return "-"
    if row["ratio"] is not None:
        return f"{figure(row['ratio']['median'])} ({figure(row['ratio']['worst'])})"
    value = row["value"]
    return f"{figure(value['median'])} ({figure(value['smallest'])} to {figure(value['largest'])})"


def refuted_section(aggregates: Aggregates) -> list[str]:
    """The published formulas that are no bounds, and whether that shows on the models of the benchmark.

    Args:
        aggregates: what `bench.tightness.aggregate.aggregate` returned.
    """
    refuted = aggregates["refuted"]
    if not refuted:
        return []
    rows = [
        [
            f"`{name}`",
            summary_words(formula["summary"]),
            formula["source"],
            f"{formula['scope']}, {formula['norm']}, {formula['target']}",
            *_seen(name, aggregates),
        ]
        for name, formula in refuted.items()
    ]
    return [
        "## Refuted formulas",
        "Published as upper bounds, and false: for each a counterexample is kept in `verify/golden/witnesses.py` and "
        f"explained in [{REFUTED_PAGE.removeprefix('../')}]({REFUTED_PAGE}). Here is whether it shows on these "
        "models: the number of evaluations at which the formula is below a lower bound of what it claims to bound, "
        "and the largest lower bound over claim. None found here does not make a formula right.",
        table(["formula", "in words", "source", "claim", "violated", "of", "worst true over claimed"], rows),
    ]


def _seen(name: str, aggregates: Aggregates) -> list[Any]:
    found = [row for model in aggregates["models"].values() for row in model["refuted"] if row["bound"] == name]
    compared = sum(row["compared"] for row in found)
    if not compared:
        evaluated = sum(row["evaluations"] for row in found)
        return ["-", "nothing measures its norm" if evaluated else "no block that it is about", "-"]
    worst = max(row["worst"] for row in found if row["worst"] is not None)
    return [sum(row["violated"] for row in found), compared, figure(worst)]
