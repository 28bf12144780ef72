"""Compare, verify and use local Lipschitz bounds of transformers."""

from __future__ import annotations

import typer

from lipbounds.cli import bench, bounds, compare, diff, report, train_digits, verify
from lipbounds.cli.console import OneLineErrors


app = typer.Typer(
    cls=OneLineErrors, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__
)

# One line a command. Its file imports torch and what an extra brings inside the function: --help waits for neither.
app.command("bounds")(bounds.command)
app.command("compare")(compare.command)
app.command("report", cls=report.WithRay)(report.command)
app.command("verify")(verify.command)
app.command("bench", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(bench.command)
app.command("diff")(diff.command)
app.command("train-digits")(train_digits.command)
