"""How numbers and names are written, in tables and figures alike."""

from __future__ import annotations

import math
import re
from typing import Any

from tabulate import tabulate


KIND_TITLES = {
    "proved": "Proved upper bounds",
    "probable": "Probable upper bounds",
    "estimate": "Estimates",
    "lower": "Lower bounds",
}


def figure(value: float | None) -> str:
    """A number with about three digits; near and below 1, where the fourth matters, with more.

    Args:
        value: None is a dash.
    """
    if value is None:
        return "-"
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    if 0 < size < 1e-3 or size >= 1e7:
        return f"{value:.2e}"
    if size >= 1000:
        return f"{value:,.0f}"
    limits = ((0.99, 4), (1.0, 6), (2.0, 3), (10.0, 2), (100.0, 1), (1000.0, 0))
    decimals = next(decimals for limit, decimals in limits if size < limit)
    return f"{value:.{decimals}f}"


def summary_words(summary: str) -> str:
    """The first clause of a method's summary: up to a colon, a comma or the end of the sentence."""
    clause = re.split(r"[:;]\s|,\s(?=from|above)|\.(?:\s|$)", summary, maxsplit=1)[0]
    return clause[:1].upper() + clause[1:]


def module_words(row: dict[str, Any]) -> str:
    """The name of a row that is a layer: what tells it apart, if that is in words, or else its number.

    Args:
        row: with the keys `layer` and `module`.
    """
    return row["module"] if " " in row["module"] else str(row["layer"])


def length_words(row: dict[str, Any]) -> str:
    """The lengths of the inputs behind a row, such as "17 to 32".

    Args:
        row: with the key `tokens`, the smallest and the largest number.
    """
    return " to ".join(str(count) for count in dict.fromkeys(row["tokens"]))


def table(titles: list[str], rows: list[list[Any]]) -> str:
    """A table in Markdown; the one place where text is made to fit a cell.

    Args:
        titles: of the columns.
        rows: texts or numbers; line breaks and runs of spaces in a text become one space.
    """
    return tabulate(
        [[_cell(value) for value in row] for row in rows],
        [*map(_cell, titles)],
        tablefmt="github",
        disable_numparse=True,
    )


def _cell(value: Any) -> Any:
    return " ".join(value.split()).replace("|", "\\|") if isinstance(value, str) else value
