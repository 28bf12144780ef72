"""The leaderboard of the site, from the numbers of results/tightness.json; run by mkdocs alone."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files


NUMBERS = Path(__file__).parents[1] / "results" / "tightness.json"
URI = "results/leaderboard.md"
COLUMNS = ("bound", "model", "kind", "scope", "norm", "radius", "median", "worst", "blocks", "source")
PAGE = """---
hide:
  - toc
---

# Leaderboard

Every method on every model of the benchmark. **Median** and **worst** are multiples of the largest lower bound of the
true constant that was measured, over layers and inputs. A bound with ratio 1 is exact. Choose one kind, one scope and
one norm before you compare: numbers of different kinds, scopes or norms promise different things. The radius is that
of the set, as a multiple of the norm of the tokens. Click on the title of a column to sort by it.

{table}

The numbers, with what each method promises, are on the pages [tightness](tightness.md) and [what each bound
promises](bounds.md). A new bound comes into this table when the benchmark has run with it: [add a
bound](../add_a_bound.md).
"""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the page; without numbers it says how to make them."""
    made = NUMBERS.exists()
    table = (
        _table(rows(json.loads(NUMBERS.read_text(encoding="utf-8")))) if made else "Not made: run `python -m bench`."
    )
    files.append(File.generated(config, URI, content=PAGE.format(table=table)))
    return files


def rows(aggregates: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for each method, model and set on which its ratio to the truth is known; best first.

    Args:
        aggregates: the content of results/tightness.json.
    """
    found = []
    for model, numbers in aggregates["models"].items():
        for row in numbers["overall"]:
            found.append(_row(aggregates, model, row, row, scope=row["scope"], norm="l2", radius=None))
        for entry in numbers["sets"]:
            place = {"scope": entry["scope"], "norm": entry["norm"], "radius": entry["relative_radius"]}
            found += [_row(aggregates, model, row, row["ratio"], **place) for row in entry["methods"] if row["ratio"]]
    return sorted(found, key=lambda row: float(row["median"]))


def _row(aggregates: dict[str, Any], model: str, row: dict[str, Any], ratio: dict[str, Any], **place: Any) -> Any:
    source = aggregates["methods"][row["bound"]]["source"]
    numbers = {"median": float(ratio["median"]), "worst": float(ratio["worst"]), "blocks": ratio["count"]}
    return {"bound": row["bound"], "model": model, "kind": row["kind"], **place, **numbers, "source": source}


def _table(found: list[dict[str, Any]]) -> str:
    """In HTML, which the script of the page sorts and filters; without scripts it is a plain table."""
    heads = "".join(f'<th data-column="{name}">{name}</th>' for name in COLUMNS)
    body = "\n".join(f"<tr>{''.join(_cell(name, row[name]) for name in COLUMNS)}</tr>" for row in found)
    return f'<table id="leaderboard-table">\n<thead><tr>{heads}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>'


def _cell(column: str, value: Any) -> str:
    if isinstance(value, float | int):
        shown = f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
        return f'<td data-value="{value!r}">{shown}</td>'
    text = html.escape("-" if value is None else str(value))
    return f"<td><code>{text}</code></td>" if column == "bound" else f"<td>{text}</td>"
