"""Compare, verify and use local Lipschitz bounds of transformers."""

from __future__ import annotations

from typing import Annotated

import typer

from lipbounds.cli import bench, bounds, cite, compare, diff, report, train_digits, verify
from lipbounds.cli.console import OneLineErrors, print_version, set_verbosity


app = typer.Typer(
    cls=OneLineErrors, no_args_is_help=True, add_completion=True, pretty_exceptions_enable=False, help=__doc__
)


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version, and stop.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress and no remarks on stderr, only errors.")] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Also show what the libraries that load models have to say.")
    ] = False,
) -> None:
    """Compare, verify and use local Lipschitz bounds of transformers."""
    set_verbosity(quiet=quiet, verbose=verbose)


# One line a command. Its file imports torch and what an extra brings inside the function: --help waits for neither.
app.command("bounds")(bounds.command)
app.command("compare")(compare.command)
app.command("report", cls=report.WithRay)(report.command)
app.command("verify")(verify.command)
app.command("bench", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(bench.command)
app.command("diff")(diff.command)
app.command("cite")(cite.command)
app.command("train-digits")(train_digits.command)
