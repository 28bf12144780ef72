"""`python -m bench migrate`: a file of records of schema version 1 becomes one of this version."""

from __future__ import annotations

from pathlib import Path

from bench.engine.options import STANDARD, command_of_page, shown
from bench.engine.records import SCHEMA_VERSION
from bench.engine.store_file import Page, ResultsFile, content_of, parsed
from bench.engine.task import Task
from bench.engine.version_1 import OLD_VERSION, read_old
from lipbounds.files import write_atomically
from lipbounds.number_format import counted


def migrate(task: Task, results: Path) -> int:
    """Bring the records of a task to this version, if they are older; returns 0.

    Args:
        task: the task.
        results: the folder.

    Raises:
        RecordError: a line is none of version 1, or cannot be read.
    """
    path = task.path(results)
    first = parsed(content_of(path).partition(b"\n")[0])
    if task.migrate is None or (first is not None and first.get("schema_version") == SCHEMA_VERSION):
        return 0
    old = read_old(path)
    found = task.migrate(old)
    keys = [*found.keys]
    if not old.new.entries:
        return 0
    if keys:
        data = {"command": command_of_page(task.name), "profile": STANDARD, "name": "", **found.data}
        old.new.pages[STANDARD] = Page(keys=keys, data=data)
    lines = old.new.all_lines(ResultsFile())
    write_atomically(path, "".join(f"{line}\n" for line in lines).encode())
    print(
        f"{shown(path)}: {counted(len(old.lines), 'line')} of version {OLD_VERSION} made "
        f"{counted(len(old.new.entries), 'answer')}."
    )
    return 0
