"""`python -m bench pretrained`: attention and tightness on pretrained models of installed packages."""

from __future__ import annotations

import argparse
from pathlib import Path

from bench.engine.answers import Shown
from bench.engine.machine import describe
from bench.engine.options import profile_of, progress_bar
from bench.engine.store import Store
from bench.engine.task import Showing, Task, Written
from bench.pretrained import tables
from bench.pretrained import task as pretrained
from lipbounds.files import write_atomically


def measure(options: argparse.Namespace, store: Store) -> Showing:
    """Answer what is missing.

    Args:
        options: the command line.
        store: the records.
    """
    profile = pretrained.PROFILES[profile_of(options)]
    with progress_bar(pretrained.pieces(profile)) as advance:
        pretrained.run(store, profile, force=options.force, advance=advance)
    return Showing(keys=store.asked)


def pages(found: Shown, folder: Path) -> Written:
    """Write the page; a bound below what it bounds is wrong.

    Args:
        found: the answers.
        folder: where it goes.
    """
    data = pretrained.shown(found)
    path = folder / "pretrained.md"
    text = tables.report(data, found.page.data["command"], found.store.path.name, [*map(describe, found.states)])
    write_atomically(path, text.encode())
    return Written(paths=[path], failures=pretrained.violations(data))


TASK = Task(
    name="pretrained",
    help="attention distributions and tightness on DINOv2, SmolLM2 and ALBERT, from installed packages",
    measure=measure,
    pages=pages,
    takes=frozenset({"quick", "full", "force", "results"}),
    versions={"": pretrained.VERSION},
)
