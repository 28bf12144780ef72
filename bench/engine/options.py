"""What the tasks of the command line share."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.engine.machine import ROOT
from bench.engine.records import without_infinities
from lipbounds.cli.console import LinePerMinute
from lipbounds.cluster import Cluster, connect
from lipbounds.errors import InvalidInput
from lipbounds.files import write_atomically


QUICK, STANDARD, FULL = "quick", "standard", "full"


def profile_of(options: argparse.Namespace) -> str:
    """How much is measured."""
    return QUICK if options.quick else FULL if options.full else STANDARD


def command_of(options: argparse.Namespace, task: str) -> str:
    """The command line that a page is made by."""
    profile = profile_of(options)
    device = "" if options.device == "cpu" else f" --device {options.device}"
    return f"python -m bench {task}" + ("" if profile == STANDARD else f" --{profile}") + device


def command_of_page(task: str) -> str:
    """The command line that makes the committed page of a task."""
    return f"python -m bench {task}"


@contextmanager
def cluster_of(options: argparse.Namespace) -> Iterator[Cluster | None]:
    """The Ray cluster that the options name; None without --ray."""
    if options.ray is None:
        yield None
        return
    with connect(options.ray or None, gpus_per_job=options.gpus_per_job) as cluster:
        yield cluster


def folder_of(options: argparse.Namespace) -> Path:
    """Where pages go: those of the quick profile beside the others."""
    return options.results / "quick" if options.quick else options.results


def check_folder(results: Path) -> None:
    """Refuse what cannot be the folder of records and pages, before anything is measured.

    Args:
        results: as given; it need not exist yet.

    Raises:
        InvalidInput: there is something else in its place, or in that of a folder above it.
    """
    for path in (results, *results.parents):
        if path.is_dir():
            return
        if path.is_symlink() or path.exists():
            kind = "a link to nothing" if not path.exists() else "no folder"
            raise InvalidInput(
                f"--results must be a folder, got '{results}', where '{path}' is {kind}; pass another, or remove it."
            )


def keep_apart(options: argparse.Namespace, what: str) -> None:
    """Refuse to write what is not of this repository into its results.

    Args:
        options: the command line.
        what: the options that bring it.

    Raises:
        InvalidInput: no other folder is named.
    """
    if committed(options):
        raise InvalidInput(
            f"{what} measure what is not of this repository, and its results are left alone; pass another folder by "
            "--results DIR."
        )


def committed(options: argparse.Namespace) -> bool:
    """Whether results go where those of this repository are.

    Args:
        options: the command line.
    """
    return options.results.resolve() == (ROOT / "results").resolve()


def copy_committed(name: str, results: Path) -> None:
    """Put a copy of the records of this repository where there are none yet: what is known is not measured again.

    Args:
        name: of the file.
        results: the folder.
    """
    source, records = ROOT / "results" / name, results / name
    if not records.exists() and source.exists():
        results.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, records)


def write_page(folder: Path, name: str, text: str, data: dict[str, Any]) -> list[Path]:
    """Write a page and its numbers; returns their paths.

    Args:
        folder: where they go.
        name: of both, without suffix.
        text: of the page, in Markdown.
        data: the numbers; those that are not finite are written as strings.
    """
    page, numbers = folder / f"{name}.md", folder / f"{name}.json"
    write_atomically(page, text.encode())
    write_atomically(numbers, (json.dumps(without_infinities(data), indent=1, ensure_ascii=False) + "\n").encode())
    return [page, numbers]


def shown(path: Path) -> str:
    """Relative to the repository if it is inside."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


@contextmanager
def progress_bar(pieces: int) -> Iterator[Callable[[str], None]]:
    """A progress bar on stderr, without a terminal a line per minute; called before each piece with its name."""
    with LinePerMinute(console=Console(stderr=True)) as progress:
        task = progress.add_task("starting", total=pieces + 1)
        yield lambda what: progress.update(task, advance=1, description=what)
        progress.update(task, completed=pieces + 1, description="done")


def told(made: str, paths: Iterable[Path], failures: Iterable[str]) -> int:
    """Say what was made and written, and on stderr what is wrong; 1 if something is."""
    print(made)
    written = ", ".join(shown(path) for path in paths)
    if written:
        print(f"Written: {written}")
    failures = list(failures)
    for failure in failures:
        print(failure, file=sys.stderr)
    return 1 if failures else 0
