"""What all commands share: where output goes, exit statuses, progress, and errors in one line."""

from __future__ import annotations

import os
import sys
import time
import traceback
from contextlib import suppress
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from typer.core import TyperGroup

from lipbounds.errors import LipboundsError, install_advice
from lipbounds.files import json_text


OK, FOUND, USAGE, TOO_LITTLE, INTERRUPTED = 0, 1, 2, 3, 130
SECONDS_BETWEEN_LINES = 60.0

output = Console()
messages = Console(stderr=True)
remarks = Console(stderr=True)  # what --quiet leaves out

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]

# Packages that only an extra brings, with that extra; of several, the one for what is not about models.
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


def extra_of(error: ModuleNotFoundError) -> str:
    """The extra that brings a missing package: that of the models where one of them asked for it.

    Args:
        error: as raised, for a package in `EXTRAS`.
    """
    asking = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    return "models" if any(name.startswith("lipbounds.models.") for name in asking) else EXTRAS[str(error.name)]


# Some versions of Typer have a copy of click inside, others import it: this is the class of the one in use.
UsageError: Any = typer.BadParameter.__mro__[1]


class OneLineErrors(TyperGroup):
    """The commands; what a user can cause ends in one line on stderr and an exit status, never in a traceback."""

    def main(self, *args: Any, **extra: Any) -> Any:
        """Run, and leave the process with the exit status."""
        try:
            status = super().main(*args, **extra | {"standalone_mode": False})
            sys.stdout.flush()
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
            fail(f"this needs {error.name}, which is not installed; {install_advice(extra_of(error))}")
        except BrokenPipeError:  # the reader of stdout has seen enough, as `head` does
            status = OK
            _drop_output()
        except OSError as error:
            if error.strerror is None:
                raise
            status = USAGE
            where = "a file or the output" if error.filename is None else error.filename
            _drop_output()
            fail(f"{where}: {error.strerror}; pass another path, or make this one readable or writable.")
        sys.exit(status)

    def invoke(self, ctx: Any) -> Any:
        """Run the command; after Ctrl-C, say so."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            messages.print("Stopped. Files are written whole or not at all: what exists is valid.", highlight=False)
            raise typer.Exit(INTERRUPTED) from error


def print_version(wanted: bool) -> bool:
    """Print the version of this library and of torch, and leave.

    Args:
        wanted: whether --version was given.
    """
    if wanted:
        from importlib.metadata import version

        from lipbounds import __version__

        print(f"lipbounds {__version__}, torch {version('torch')}")  # noqa: T201
        raise typer.Exit()
    return wanted


def set_verbosity(*, quiet: bool, verbose: bool) -> None:
    """How much is said on stderr; libraries that load models are silent unless asked.

    Args:
        quiet: nothing but errors.
        verbose: also what those libraries say.

    Raises:
        BadParameter: both.
    """
    if quiet and verbose:
        raise typer.BadParameter("--quiet and --verbose exclude each other")
    remarks.quiet = quiet
    if not verbose:  # read by these libraries when they are imported
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _drop_output() -> None:
    """What could not be written to stdout is not tried again when Python ends, which would print a traceback."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


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


class LinePerMinute(Progress):
    """A progress bar on a terminal; elsewhere, such as in a log, a line when a minute has passed since the last."""

    def __init__(self, *columns: Any, **options: Any) -> None:
        super().__init__(*columns, **options)
        self._told = time.monotonic()

    def update(self, task_id: Any, **changes: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Move the bar, or print its line.

        Args:
            task_id: of the task.
            **changes: as rich has them.
        """
        super().update(task_id, **changes)
        if not self.console.is_terminal and time.monotonic() - self._told >= SECONDS_BETWEEN_LINES:
            self._told = time.monotonic()
            task = self.tasks[task_id]
            self.console.print(f"{task.description}: {task.percentage:.0f} %", highlight=False, soft_wrap=True)


def progress() -> Progress:
    """A progress bar on stderr, gone when it is done; without a terminal a line per minute. Callers add tasks."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    return LinePerMinute(*columns, console=remarks, transient=True, disable=not remarks.is_terminal or remarks.quiet)


def _explain(error: Any) -> None:
    """A wrong option or argument; the help that is shown where no command is given has printed itself."""
    message = error.format_message()
    if type(error).__name__ == "NoArgsIsHelpError":
        return
    command = "lipbounds" if error.ctx is None else error.ctx.command_path
    fail(f"{message.rstrip('.')}; see `{command} --help`.")
