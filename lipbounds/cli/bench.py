"""`lipbounds bench`: the comparison tables, from a copy of the repository."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

import lipbounds
from lipbounds.cli.console import INTERRUPTED
from lipbounds.errors import LipboundsError, install_advice


NEEDED = ("matplotlib", "pyautoattack", "scipy", "tabulate", "transformers")


def command(
    arguments: Annotated[
        list[str] | None, typer.Argument(help="For the benchmark; `lipbounds bench -- --help` lists them.")
    ] = None,
) -> None:
    """Make the comparison tables and figures: `python -m bench`, found from inside a copy of the repository.

    Exit status: that of the benchmark; 0 done, 1 something failed, 2 it cannot be run, 130 interrupted.
    """
    root = checkout()
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise LipboundsError(f"the benchmark needs {', '.join(missing)}; {install_advice('bench')}")
    path = os.pathsep.join(part for part in (str(root), os.environ.get("PYTHONPATH", "")) if part)
    environment = {**os.environ, "PYTHONPATH": path}
    status = _run([sys.executable, "-m", "bench", *(arguments or [])], environment)
    raise typer.Exit(status)


def checkout() -> Path:
    """The copy of the repository around the working directory, or else around this package.

    Raises:
        LipboundsError: there is none.
    """
    for folder in _folders():
        if (folder / "bench" / "__main__.py").is_file() and (folder / "lipbounds" / "registry.py").is_file():
            return folder
    raise LipboundsError(
        f"the benchmark must be run from a copy of the repository, got {Path.cwd()}; "
        "clone it with git, and run `tox -e bench` there."
    )


def _folders() -> Iterator[Path]:
    here = Path.cwd()
    yield from (here, *here.parents)
    yield from (Path(folder).parent for folder in lipbounds.__path__)


def _run(command: list[str], environment: dict[str, str]) -> int:
    """The exit status; after Ctrl-C, which reaches the benchmark as well, it is left the time to finish its files."""
    with subprocess.Popen(command, env=environment) as process:
        while True:
            try:
                status = process.wait()
                return INTERRUPTED if status == -2 else status if status >= 0 else 1
            except KeyboardInterrupt:
                continue
