"""`lipbounds verify`: attack a bound."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from lipbounds.cli.console import FOUND, OK, TOO_LITTLE, AsJson, output, print_json, progress
from lipbounds.cli.options import Seed
from lipbounds.files import check_writable, json_text, write_atomically


if TYPE_CHECKING:
    from lipbounds.testing.difficulty import Difficulty
    from lipbounds.testing.session import Report


def command(
    bound: Annotated[str, typer.Argument(help="package.module:attribute, or the name of a registered bound.")],
    seconds: Annotated[float, typer.Option(help="Processor time to spend.", min=0)] = 60.0,
    seed: Seed = 0,
    report: Annotated[Path | None, typer.Option(help="Write the report here as JSON, too.")] = None,
    as_json: AsJson = False,
) -> None:
    """Attack a bound: random blocks with shrinking, invariances, gradient ascent.

    Exit status: 0 nothing found so far, 1 a counterexample (its snippet is printed), 2 the command cannot be run,
    3 nothing found, but not enough searched: give it more --seconds.
    """
    from lipbounds.testing import session
    from lipbounds.testing.loading import load_spec

    if report is not None:
        check_writable(report)
    sys.path.insert(0, "")  # a bound in the working directory is found, as python -m would find it
    spec = load_spec(bound)
    with progress() as bar:
        task = bar.add_task(escape(spec.name), total=1.0)
        found = session.verify(
            spec,
            seconds=seconds,
            seed=seed,
            progress=lambda what, share: bar.update(task, completed=share, description=f"{escape(spec.name)}: {what}"),
        )
    if report is not None:
        write_atomically(report, json_text(found.to_dict()).encode())
    if as_json:
        print_json(found.to_dict())
    else:
        _print_report(found)
    raise typer.Exit(FOUND if found.refuted_by else TOO_LITTLE if found.missing else OK)


def _difficulty(found: Difficulty) -> str:
    from lipbounds.number_format import counted

    columns = {
        "weight of the largest key": found.largest_weight,
        "offset of the keys": found.key_offset,
        "norm of A": found.logit_weights,
    }
    parts = (f"{name} {' / '.join(f'{value:.2g}' for value in values)}" for name, values in columns.items())
    return f"Difficulty of {counted(found.blocks, 'block')} (10 % / median / 90 %): {', '.join(parts)}."


def _print_report(found: Report) -> None:
    from lipbounds.claims import SCOPE_WORDS
    from lipbounds.number_format import counted

    name = escape(found.name)
    if found.refuted_by:
        output.print(f"[bold red]{name}: counterexample[/bold red], check {found.refuted_by!r}", highlight=False)
        output.print(found.message, highlight=False, markup=False, soft_wrap=True)
        if found.snippet:
            output.print("\nRun this to see it:\n", highlight=False)
            print(found.snippet)  # noqa: T201 - to be piped into a file: no wrapping, no markup
        return
    tried = sum(found.examples.values())
    promise = f"{found.kind}, {SCOPE_WORDS[found.scope]}"
    if found.missing:
        output.print(f"[bold yellow]{name}: not enough searched[/bold yellow] ({promise})", highlight=False)
        output.print(f"Nothing found in {found.missing}: give it more --seconds.", highlight=False)
    else:
        output.print(f"[bold green]{name}: sound so far[/bold green] ({promise})", highlight=False)
    output.print(
        f"{counted(tried, 'block')} in {counted(len(found.examples), 'check')} and {counted(found.rounds, 'round')}, "
        f"{counted(found.starts or 0, 'start')} of ascent, {found.seconds:.0f} s, seed {found.seed}."
    )
    if found.difficulty is not None:
        output.print(_difficulty(found.difficulty), highlight=False)
    if found.worst_ratio is not None:
        output.print(f"Largest true / claimed norm found by ascent: {found.worst_ratio:.6f}.", highlight=False)
    if found.comparisons:
        table = Table(
            "bound", "median times the truth", "worst", "blocks", title="Tightness on a fixed sample of blocks"
        )
        for row in found.comparisons:
            style = "bold" if row.name == found.name else ""
            table.add_row(Text(row.name, style), f"{row.median:.2f}", f"{row.worst:.1f}", str(row.blocks))
        output.print(table)
