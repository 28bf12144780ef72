"""The command line: one file a command, registered in `lipbounds.cli.app`."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point of the console script and of `python -m lipbounds`."""
    try:
        from lipbounds.cli.app import app
    except ModuleNotFoundError as error:
        if error.name not in ("rich", "typer"):
            raise
        sys.exit(
            f"error: the command line needs {error.name}, which is not installed; run `pip install 'lipbounds[cli]'`."
        )
    app(prog_name="lipbounds")
