"""What a task of the benchmark declares, and how any of them is run and rendered: measure, keep, show, write."""

from __future__ import annotations

import argparse
import dataclasses as dc
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from bench.engine.answers import Shown
from bench.engine.options import QUICK, STANDARD, command_of, folder_of, profile_of, shown, told
from bench.engine.store import Store
from bench.engine.version_1 import Old
from bench.pages.stale import marked, older_bounds, older_code
from lipbounds.errors import InvalidInput
from lipbounds.files import write_atomically
from lipbounds.number_format import counted


@dc.dataclass(frozen=True, kw_only=True)
class Showing:
    """What a run found, for its page.

    Args:
        keys: of the answers, in the order of the page.
        data: what the page says beside them, ready for JSON.
        name: of the page, where the task has several.
    """

    keys: Iterable[str]
    data: dict[str, Any] = dc.field(default_factory=dict)
    name: str = ""


@dc.dataclass(frozen=True, kw_only=True)
class Written:
    """What was written.

    Args:
        paths: of pages and figures.
        declared: pages that hold no answers of the records.
        failures: what is wrong with the numbers: violations of bounds, failures.
    """

    paths: list[Path]
    declared: list[Path] = dc.field(default_factory=list)
    failures: list[str] = dc.field(default_factory=list)


@dc.dataclass(frozen=True, kw_only=True)
class Task:
    """A task of the benchmark.

    Args:
        name: on the command line, and of its file of records.
        help: what it is about, in a few words.
        measure: answers what is missing; returns what the page shows.
        pages: writes pages, numbers and figures from what the page shows, and nothing else.
        takes: names of the options that it takes; every other one is refused.
        versions: of the code, by the kind of an answer (`what` of its question), "" for the kinds that are not named.
        by_default: whether `python -m bench` measures what is missing; the page is rendered there in any case.
        prepare: called before the records are opened.
        migrate: brings the lines of a file of schema version 1, and what else its page was made of, to this one; None
            if there never was such a file.
    """

    name: str
    help: str
    measure: Callable[[argparse.Namespace, Store], Showing]
    pages: Callable[[Shown, Path], Written]
    takes: frozenset[str]
    versions: Mapping[str, int] = dc.field(default_factory=dict)
    by_default: bool = False
    migrate: Callable[[Old], Showing] | None = None
    prepare: Callable[[argparse.Namespace], None] = lambda options: None

    def path(self, results: Path) -> Path:
        """Where its records are."""
        return results / f"{self.name}.jsonl"

    def run(self, options: argparse.Namespace) -> int:
        """Measure what is missing and write the page; returns 1 if something is wrong with the numbers.

        Args:
            options: the command line.
        """
        self.prepare(options)
        command = command_of(options, self.name)
        with Store(self.path(options.results), started_by=command) as store:
            if store.repaired:
                print(store.repaired, file=sys.stderr)
            found = self.measure(options, store)
            data = {"command": command, "profile": profile_of(options), "name": found.name, **found.data}
            page = store.show(f"{QUICK if options.quick else STANDARD} {found.name}".strip(), found.keys, **data)
            store.compact()
            written = self._write(Shown(store, page), folder_of(options))
        made = f"{counted(store.made, 'answer')} made, {store.reused} taken from {shown(store.path)}."
        return told(made, written.paths, written.failures)

    def render(self, options: argparse.Namespace) -> int:
        """Write the page again from the records alone; returns 1 if something is wrong with the numbers.

        Args:
            options: the command line.
        """
        store = Store(self.path(options.results), only_read=True)
        chosen = [page for page in store.pages.values() if (page.data["profile"] == QUICK) == options.quick]
        if not chosen:
            return told(f"{self.name}: not measured yet.", [], [])
        statuses = []
        for page in chosen:
            written = self._write(Shown(store, page), folder_of(options))
            statuses.append(told(f"{self.name}: {counted(len(page.keys), 'answer')}.", written.paths, written.failures))
        return max(statuses)

    def _write(self, found: Shown, folder: Path) -> Written:
        """Write the pages, and mark on them what older versions measured."""
        written = self.pages(found, folder)
        questions = [entry.question for entry in found.entries]
        bounds, code = older_bounds(questions), older_code(questions, self.versions)
        for path in written.paths:
            if path.suffix == ".md" and path not in written.declared and (bounds or code):
                text = path.read_text(encoding="utf-8")
                write_atomically(path, marked(text, bounds, code, found.page.data["command"]).encode())
        return written


def file_of(results: Path, name: str) -> Store:
    """The records of another task, to be read.

    Args:
        results: the folder.
        name: of the task.

    Raises:
        RecordError: as `Store`.
    """
    return Store(results / f"{name}.jsonl", only_read=True)


def refuse(
    options: argparse.Namespace,
    defaults: argparse.Namespace,
    takes: Mapping[str, Collection[str]],
    apart: Iterable[tuple[str, str]],
    together: Mapping[str, str],
) -> None:
    """The one rule about options: each must be among those that the task takes, and go with the others.

    Args:
        options: the command line.
        defaults: the same without any option.
        takes: names of the options that each task takes.
        apart: pairs of options of which one at most may be given.
        together: options with the one that each needs.

    Raises:
        InvalidInput: an option does not go with the task, or with another option.
    """
    given = [name for name in vars(defaults) if name != "task" and getattr(options, name) != getattr(defaults, name)]
    for name in given:
        if name not in takes[options.task]:
            having = ", ".join(task for task, names in takes.items() if name in names)
            raise InvalidInput(f"{_flag(name)} goes with the tasks {having}, got {options.task}; leave it out.")
        if name in together and together[name] not in given:
            raise InvalidInput(f"{_flag(name)} goes with {_flag(together[name])}; pass both or none.")
    for one, other in apart:
        if one in given and other in given:
            raise InvalidInput(f"{_flag(one)} and {_flag(other)} do not go together; leave one out.")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
