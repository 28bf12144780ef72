"""The tables in Markdown, from the aggregates alone."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

from tabulate import tabulate

from bench.engine.machine import describe
from bench.pages.formatting import KIND_TITLES, figure, length_words, module_words, summary_words, table
from bench.pages.page import bullets, folded, page
from bench.tightness.answer import TRAINED, sentences
from bench.tightness.scope_tables import refuted_section, set_sections
from bench.tightness.scopes import OTHER_MACHINE
from lipbounds.claims import KINDS, SCOPES
from lipbounds.number_format import counted


Aggregates = dict[str, Any]
Row = dict[str, Any]


def report(aggregates: Aggregates) -> str:
    """The page of results.

    Args:
        aggregates: what `bench.tightness.aggregate.aggregate` returned.
    """
    parts = [
        "# Tightness: how far above the true local Lipschitz constant each bound is",
        *_violations(aggregates),
        "![How many times above the truth each bound is, layer by layer](tightness.png)",
        bullets(sentences(aggregates)),
        headline(aggregates),
        f"Made by `{aggregates['command']}` from `{aggregates['records']}`; nothing here is written by hand. What each "
        "bound promises is in [a table of its own](bounds.md).",
        "## How to read the numbers",
        folded("Ratios, references, kinds, scopes", *_explanation(aggregates)),
        "## All models in one table",
        folded("Proved upper bounds at a point, in the norm l2", headline(aggregates, list(aggregates["models"]))),
        "The sections up to the gain are about the scope `point` in the norm `l2`; other scopes and norms follow in "
        "sections of their own.",
    ]
    for name, model in aggregates["models"].items():
        parts += _model(name, model, aggregates)
    parts += ["## What the attention distribution gains", *_gain(aggregates)]
    parts += [*set_sections(aggregates), *refuted_section(aggregates)]
    parts += ["## Methods", folded("What was evaluated", _methods(aggregates))]
    parts += ["## What gave no number", *_not_answered(aggregates)]
    parts += ["## Environment", bullets(describe(state) for state in aggregates["environments"])]
    if len(aggregates["environments"]) > 1:
        parts.append(
            "Machines differ by the rounding of the model's forward pass, so by the last digits of the blocks that are "
            f"bounded. A bound is held against a lower bound of another machine with a room of {OTHER_MACHINE:g}."
        )
    return page(parts)


def headline(aggregates: Aggregates, models: list[str] | None = None, bounds: Collection[str] | None = None) -> str:
    """The proved bounds at a point against all chosen models: median and worst ratio to the reference.

    Args:
        aggregates: what `bench.tightness.aggregate.aggregate` returned.
        models: the columns; by default the trained models.
        bounds: the rows; all if None, or if none of them is there.
    """
    chosen = models or [name for name in TRAINED if name in aggregates["models"]] or list(aggregates["models"])
    cells: dict[str, dict[str, Row]] = {}
    for name in chosen:
        for row in aggregates["models"][name]["overall"]:
            if row["kind"] == "proved":
                cells.setdefault(row["bound"], {})[name] = row
    cells = {bound: of for bound, of in cells.items() if bounds is None or bound in bounds} or cells
    # A bound that costs much is evaluated at fewer blocks: its numbers are of another sample, and say so.
    whole = {name: max((r["count"] for r in aggregates["models"][name]["overall"]), default=0) for name in chosen}
    order = sorted(cells, key=lambda bound: [cells[bound].get(name, {}).get("median", math.inf) for name in chosen])
    rows = [
        [
            f"`{bound}`",
            summary_words(aggregates["methods"][bound]["summary"]),
            *(_median_and_worst(cells[bound].get(name), whole[name]) for name in chosen),
        ]
        for bound in order
    ]
    caption = (
        "Value over the true constant, median (worst) over layers and inputs; proved upper bounds on the norm of the "
        "Jacobian at the input. A dash: the bound does not hold there. With n: at n blocks only, for its cost."
    )
    return f"{caption}\n\n{table(['bound', 'in words', *chosen], rows)}"


def short(aggregates: Aggregates) -> str:
    """The headline without words, narrow enough for a terminal."""
    names = list(aggregates["models"])
    rows = [
        [row["kind"], row["bound"], name, figure(row["median"]), figure(row["worst"])]
        for name in names[:1]
        for kind in KIND_TITLES
        for row in aggregates["models"][name]["overall"]
        if row["kind"] == kind
    ]
    return tabulate(rows, ["kind", "bound", "model", "median ratio", "worst"], disable_numparse=True)


def _median_and_worst(row: Row | None, blocks: int) -> str:
    if row is None:
        return "-"
    sample = "" if row["count"] == blocks else f", n = {row['count']}"
    return f"{figure(row['median'])} ({figure(row['worst'])}{sample})"


def _explanation(aggregates: Aggregates) -> list[str]:
    scopes = sorted({row["scope"] for model in aggregates["models"].values() for row in model["overall"]})
    return [
        "Unless a section says otherwise, every number is a ratio: the value of a method over the reference at the "
        "same attention block and the same input. The norm is the Euclidean one of all entries (Frobenius), on both "
        "sides. The reference is `exact`, the norm of the dense Jacobian, at small blocks, and the largest lower "
        "bound, mostly from `lanczos`, at large ones; each section says which, and how far it can be from the truth. "
        "Kinds are never ranked in one table:",
        bullets(f"{kind}: {meaning}." for kind, meaning in KINDS.items()),
        *(f"Scope `{scope}`: {SCOPES[scope]}." for scope in scopes),
    ]


def _methods(aggregates: Aggregates) -> str:
    columns = ["kind", "scope", "norm", "version", "source", "cost"]
    rows = [
        [f"`{name}`", summary_words(m["summary"]), *(m[c] for c in columns)]
        for name, m in aggregates["methods"].items()
    ]
    return table(["name", "in words", *columns], rows)


def _model(name: str, model: Row, aggregates: Aggregates) -> list[str]:
    tokens = " to ".join(str(count) for count in dict.fromkeys(model["tokens"]))
    used = ", ".join(
        f"`{method}` ({aggregates['methods'][method]['kind']}) at {counted(count, 'block')}"
        for method, count in model["references"].items()
    )
    parts = [
        f"## {name}",
        f"{model['description']}; {counted(model['layers'], 'layer')}, "
        f"{counted(model['inputs'], 'input')}, {tokens} tokens. Reference: {used or 'none'}.{_bracket(model)}",
    ]
    details = []
    for kind, title in KIND_TITLES.items():
        rows = [row for row in model["overall"] if row["kind"] == kind]
        if not rows:
            continue
        body = [
            [f"`{r['bound']}`", *(figure(r[c]) for c in ("median", "worst", "best")), r["count"], r["kind"], r["scope"]]
            for r in rows
        ]
        details += [
            f"### {title} on {name}",
            table(["method", "median ratio", "worst", "best", "blocks", "kind", "scope"], body),
            _per_layer(model["per_layer"], [row["bound"] for row in rows]),
        ]
        if kind == "proved" and len(model["per_length"]) > 1:
            details.append(_per_length(model["per_length"], [row["bound"] for row in rows]))
    return [*parts, folded(f"All bounds on {name}, overall and layer by layer", *details)] if details else parts


def _per_layer(rows: list[Row], names: list[str]) -> str:
    body = [
        [module_words(row), figure(row["reference"]), *(figure(row["median"].get(name)) for name in names)]
        for row in rows
    ]
    return "Median ratio, layer by layer:\n\n" + table(["layer", "reference", *(f"`{name}`" for name in names)], body)


def _per_length(rows: list[Row], names: list[str]) -> str:
    body = [[length_words(row), row["inputs"], *(figure(row["median"].get(name)) for name in names)] for row in rows]
    return "Median ratio by length of the input:\n\n" + table(["tokens", "inputs", *(f"`{n}`" for n in names)], body)


def _gain(aggregates: Aggregates) -> list[str]:
    parts = [
        "The same bound with four values for the norm of the softmax Jacobian: 1, the constant 1/2, the paper's g_1 of "
        "the attention rows, and the exact norm. Each gain is the median over inputs of one bound over another. The "
        "last columns are the largest value over the rows of an attention map, averaged over heads and inputs."
    ]
    details = []
    columns = ["one_over_half", "half_over_g_1", "half_over_exact", "g_1_over_exact", "g_1", "exact_norm"]
    titles = ["1 over 1/2", "1/2 over g_1", "1/2 over exact", "g_1 over exact", "largest g_1", "largest exact norm"]
    for name, model in aggregates["models"].items():
        for bound in dict.fromkeys(row["bound"] for row in model["gain"]):
            rows = [row for row in model["gain"] if row["bound"] == bound]
            body = [[module_words(row), *(figure(row[column]) for column in columns)] for row in rows]
            details += [f"`{bound}` on {name}:", table(["layer", *titles], body)]
    if not details:
        return ["The bounds of the paper gave no numbers here."]
    return [*parts, folded("Gains by model, bound and layer", *details)]


def _not_answered(aggregates: Aggregates) -> list[str]:
    rows = [
        [name, f"`{row['bound']}`", row["status"], row["count"], row["error"]]
        for name, model in aggregates["models"].items()
        for row in model["not_answered"]
    ]
    reasons = table(["model", "method", "status", "blocks", "reason"], rows)
    parts = [folded(counted(len(rows), "reason"), reasons) if rows else "Every evaluation gave a number."]
    unmeasured = {name: m["unmeasured"] for name, m in aggregates["models"].items() if m["unmeasured"]}
    parts += [
        f"{counted(count, 'block')} of {name} {'has' if count == 1 else 'have'} no reference and "
        f"{'is' if count == 1 else 'are'} in no table."
        for name, count in unmeasured.items()
    ]
    return parts + [
        f"**{name} is incomplete**: {' '.join(reason.split())}" for name, reason in aggregates["problems"].items()
    ]


def _violations(aggregates: Aggregates) -> list[str]:
    rows = [
        [
            *(name, r["layer"], r["input"], f"`{r['bound']}`", r["kind"], r["scope"]),
            *(r["value"], f"`{r['lower_bound']}`", r["reached"]),
        ]
        for name, model in aggregates["models"].items()
        for r in model["violations"]
    ]
    if not rows:
        return []
    titles = ["model", "layer", "input", "upper bound", "kind", "scope", "value", "lower bound", "reached"]
    return ["**Upper bounds below a lower bound. One of the two is wrong:**", table(titles, rows)]


def _bracket(model: Row) -> str:
    """A sentence on how far the truth can be from the reference, with the kind of promise that this is."""
    bracket = model["bracket"]
    if bracket is None:
        return " No upper bound says how far above it the truth can be."
    if bracket["kind"] == "proved" and bracket["ratio"] <= 1:
        return " It is itself a proved upper bound on the truth."
    above = 100 * (bracket["ratio"] - 1)
    return f" By the smallest upper bounds ({bracket['kind']}), the truth is at most {above:.3g} % above it."
