"""`python -m bench claims`: the claims of the papers, each with its effect on the models that were measured."""

from __future__ import annotations

import argparse
from pathlib import Path

from bench.claims import rows, tables
from bench.engine.answers import Shown
from bench.engine.store import Store
from bench.engine.task import Showing, Task, Written
from lipbounds.files import write_atomically


def measure(options: argparse.Namespace, store: Store) -> Showing:
    """Nothing is measured: the page is made of the records of other tasks.

    Args:
        options: the command line.
        store: holds the page alone.
    """
    return Showing(keys=())


def pages(found: Shown, folder: Path) -> Written:
    """Write the page.

    Args:
        found: no answers; the records of the other tasks lie beside its file.
        folder: where it goes.
    """
    results = found.store.path.parent
    claims = [
        *rows.of_attention(results),
        *rows.of_robustness(results),
        *rows.of_pretrained(results),
        rows.NOT_TESTED,
    ]
    path = folder / "claims.md"
    write_atomically(path, tables.report(claims, found.page.data["command"]).encode())
    return Written(paths=[path], declared=[path])


TASK = Task(
    name="claims",
    help="what papers claim of attention and robustness, held against the records of the other tasks",
    measure=measure,
    pages=pages,
    takes=frozenset({"quick", "force", "results"}),
)
