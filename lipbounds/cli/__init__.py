"""The command line: one file a command, registered in `lipbounds.cli.app`."""

from __future__ import annotations

import io
import sys

from lipbounds.allocator import keep_freed_memory
from lipbounds.errors import install_advice


def main() -> None:
    """Entry point of the console script and of `python -m lipbounds`."""
    keep_freed_memory()
    try:
        from lipbounds.cli.app import app

        for stream in (sys.stdout, sys.stderr):  # a terminal that lacks a letter gets its code instead of a traceback
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        app(prog_name="lipbounds")
    except ModuleNotFoundError as error:
        if error.name not in ("rich", "typer"):
            raise
        sys.exit(f"error: the command line needs {error.name}, got none; {install_advice('cli')}")
    except KeyboardInterrupt:  # while the command line itself was being imported
        sys.exit(130)
