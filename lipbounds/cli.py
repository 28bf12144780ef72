"""The command line: `lipbounds bounds` and `lipbounds verify`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from lipbounds import registry
from lipbounds.claims import SCOPE_WORDS
from lipbounds.errors import LipboundsError


app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)
output = Console()
messages = Console(stderr=True)

SOUND, COUNTEREXAMPLE, USAGE = 0, 1, 2


@app.command()
def bounds() -> None:
    """List the bounds and estimators: what each promises, and where it is from."""
    table = Table(Column("name", no_wrap=True), "kind", "scope", "norm", "supports", "source")
    for spec in registry.select():
        supports = ", ".join(sorted(spec.supports))
        table.add_row(spec.name, spec.claim.kind, spec.claim.scope, spec.claim.norm, supports, str(spec.source))
    output.print(table)


@app.command()
def verify(
    bound: Annotated[str, typer.Argument(help="package.module:attribute, or the name of a registered bound.")],
    seconds: Annotated[float, typer.Option(help="Time to spend.", min=0)] = 60.0,
    seed: Annotated[int, typer.Option(help="Of all searches.", min=0)] = 0,
    report: Annotated[Path | None, typer.Option(help="Write the report here as JSON.")] = None,
) -> None:
    """Attack a bound: random blocks with shrinking, invariances, gradient ascent.

    Exit status: 0 nothing found so far, 1 a counterexample (its snippet is printed), 2 the command cannot be run.
    """
    from lipbounds.testing import session
    from lipbounds.testing.loading import load_spec

    sys.path.insert(0, "")  # a bound in the working directory is found, as python -m would find it
    try:
        spec = load_spec(bound)
    except LipboundsError as error:
        messages.print(f"[red]error[/red]: {escape(str(error))}", highlight=False, soft_wrap=True)
        raise typer.Exit(USAGE) from error
    with _progress() as progress:
        task = progress.add_task(spec.name, total=1.0)
        found = session.verify(
            spec,
            seconds=seconds,
            seed=seed,
            progress=lambda what, share: progress.update(task, completed=share, description=f"{spec.name}: {what}"),
        )
    if report is not None:
        report.write_text(json.dumps(found.to_dict(), indent=2) + "\n", encoding="utf-8")
    _print_report(found)
    raise typer.Exit(SOUND if found.sound_so_far else COUNTEREXAMPLE)


def _progress() -> Progress:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    return Progress(*columns, console=messages, transient=True)


def _print_report(found: object) -> None:
    from lipbounds.testing.session import Report

    assert isinstance(found, Report)
    if not found.sound_so_far:
        output.print(f"[bold red]{found.name}: counterexample[/bold red], check {found.refuted_by!r}", highlight=False)
        output.print(found.message, highlight=False, markup=False, soft_wrap=True)
        output.print("\nRun this to see it:\n", highlight=False)
        print(found.snippet)  # noqa: T201 - to be piped into a file: no wrapping, no markup
        return
    tried = sum(found.examples.values())
    promise = f"{found.kind}, {SCOPE_WORDS[found.scope]}"
    output.print(f"[bold green]{found.name}: sound so far[/bold green] ({promise})", highlight=False)
    output.print(f"{tried} blocks in {len(found.examples)} checks, {found.seconds:.0f} s, seed {found.seed}.")
    if found.worst_ratio is not None:
        output.print(f"Largest true / claimed norm found by ascent: {found.worst_ratio:.6f}.", highlight=False)
    if found.comparisons:
        table = Table(
            "bound", "median times the truth", "worst", "blocks", title="Tightness on a fixed sample of blocks"
        )
        for row in found.comparisons:
            name = f"[bold]{row.name}[/bold]" if row.name == found.name else row.name
            table.add_row(name, f"{row.median:.2f}", f"{row.worst:.1f}", str(row.blocks))
        output.print(table)


def main() -> None:
    """Entry point of the console script."""
    app()


if __name__ == "__main__":
    main()
