"""`lipbounds diff`: what got worse between two files of results, or two reports on a model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from lipbounds.cli.console import FOUND, OK, AsJson, output, print_json


if TYPE_CHECKING:
    from lipbounds.difference import Difference


def share(text: str) -> float:
    """`5%` or `0.05`, as 0.05.

    Args:
        text: a percentage, or a share.
    """
    number = text.strip().removesuffix("%")
    try:
        value = float(number) / (100 if number != text.strip() else 1)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise typer.BadParameter(f"must be a share such as 5% or 0.05, not below 0, got {text!r}")
    return value


def command(
    before: Annotated[
        Path,
        typer.Argument(help="Earlier: tightness.json, certified.json, *.jsonl, or a report as JSON."),
    ],
    after: Annotated[Path, typer.Argument(help="Results of the same structure, made later.")],
    fail_above: Annotated[
        Any, typer.Option(parser=share, metavar="SHARE", help="By how much a figure may be worse: 5% or 0.05.")
    ] = "5%",
    seconds: Annotated[bool, typer.Option("--seconds", help="Compare times, too; only on the same machine.")] = False,
    as_json: AsJson = False,
) -> None:
    """Say what is worse, missing or failing in the second of two files of results, such as reports before and after
    training.

    Exit status: 0 nothing, 1 something, 2 the files cannot be compared.
    """
    from lipbounds.difference import compare
    from lipbounds.results import read_results

    found = compare(read_results(before), read_results(after), tolerance=fail_above, with_seconds=seconds)
    if as_json:
        print_json({"before": str(before), "after": str(after), "fail_above": fail_above, **found.to_dict()})
    else:
        _print_difference(found, fail_above)
    raise typer.Exit(FOUND if found.regressed else OK)


def _print_difference(found: Difference, tolerance: float) -> None:
    if found.worse:
        table = Table("model", "method", "what", "before", "after", "worse by", "where", title="Worse")
        for change in found.worse:
            by = "infinitely" if math.isinf(change.factor) else f"{100 * (change.factor - 1):.3g}%"
            where = change.where + (f" and {change.places - 1} more" if change.places > 1 else "")
            numbers = (f"{change.before:.6g}", f"{change.after:.6g}", by)
            table.add_row(*(escape(cell) for cell in (change.model, change.method, change.what, *numbers, where)))
        output.print(table)
    if found.missing:
        table = Table("model", "method", "what", "places", title="Missing in the second file")
        for missing in found.missing:
            cells = (missing.model, missing.method, missing.what, str(missing.places))
            table.add_row(*(escape(cell) for cell in cells))
        output.print(table)
    if found.failures:
        table = Table("model", "method", "reason", title="Failing in the second file only")
        for failure in found.failures:
            table.add_row(escape(failure.model), escape(failure.method), escape(failure.reason))
        output.print(table)
    output.print(
        f"{found.compared} figures compared: {len(found.worse)} worse by more than {100 * tolerance:g}%, "
        f"{len(found.missing)} missing, {len(found.failures)} newly failing; {len(found.better)} better, "
        f"{found.new} new.",
        highlight=False,
        soft_wrap=True,
    )
