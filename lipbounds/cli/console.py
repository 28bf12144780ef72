"""What all commands share: where output goes, exit statuses, progress, and errors in one line."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from typer.core import TyperGroup

from lipbounds.errors import LipboundsError
from lipbounds.files import json_text


OK, FOUND, USAGE, INTERRUPTED = 0, 1, 2, 130

output = Console()
messages = Console(stderr=True)

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]

# Packages that only an extra brings, with that extra.
EXTRAS = {
    "PIL": "models",
    "hypothesis": "verify",
    "matplotlib": "bench",
    "numpy": "verify",
    "pytest": "verify",
    "safetensors": "models",
    "sklearn": "models",
    "transformers": "models",
}

# Some versions of Typer have a copy of click inside, others import it: this is the class of the one in use.
UsageError: Any = typer.BadParameter.__mro__[1]


class OneLineErrors(TyperGroup):
    """The commands; what a user can cause ends in one line on stderr and an exit status, never in a traceback."""

    def main(self, *args: Any, **extra: Any) -> Any:
        """Run, and leave the process with the exit status."""
        try:
            status = super().main(*args, **extra | {"standalone_mode": False})
        except UsageError as error:
            status = USAGE
            _explain(error)
        except LipboundsError as error:
            status = USAGE
            fail(str(error))
        except ModuleNotFoundError as error:
            if error.name not in EXTRAS:
                raise
            status = USAGE
            fail(
                f"this needs {error.name}, which is not installed; run `pip install 'lipbounds[{EXTRAS[error.name]}]'`."
            )
        except OSError as error:
            if error.filename is None:
                raise
            status = USAGE
            fail(f"{error.filename}: {error.strerror}; pass another path, or make this one readable or writable.")
        sys.exit(status)

    def invoke(self, ctx: Any) -> Any:
        """Run the command; after Ctrl-C, say so."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            messages.print("Stopped. Files are written whole or not at all: what exists is valid.", highlight=False)
            raise typer.Exit(INTERRUPTED) from error


def fail(message: str) -> None:
    """Print an error in one line on stderr.

    Args:
        message: what is wrong, and what to do.
    """
    messages.print(f"[red]error[/red]: {escape(' '.join(message.split()))}", highlight=False, soft_wrap=True)


def print_json(content: dict[str, Any]) -> None:
    """Print an object as JSON on stdout, without wrapping or colours.

    Args:
        content: what JSON can hold, and non-finite numbers.
    """
    print(json_text(content), end="")  # noqa: T201


def progress() -> Progress:
    """A progress bar on stderr, where that is a terminal, and gone when it is done; tasks are added by the caller."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    return Progress(*columns, console=messages, transient=True, disable=not messages.is_terminal)


def _explain(error: Any) -> None:
    """A wrong option or argument; the help that is shown where no command is given has printed itself."""
    message = error.format_message()
    if type(error).__name__ == "NoArgsIsHelpError":
        return
    command = "lipbounds" if error.ctx is None else error.ctx.command_path
    fail(f"{message.rstrip('.')}; see `{command} --help`.")
