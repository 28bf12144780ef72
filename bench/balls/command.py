"""`python -m bench balls`: curves over the radius of a ball."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bench.balls import page as balls
from bench.balls import task as task
from bench.engine.answers import Shown
from bench.engine.store import Store
from bench.engine.task import Showing, Task, Written
from bench.engine.version_1 import Old, blocks, newest
from lipbounds.devices import device_named
from lipbounds.files import write_atomically


def measure(options: argparse.Namespace, store: Store) -> Showing:
    """Evaluate what is missing.

    Args:
        options: the command line.
        store: the records.
    """
    outcome = task.run(
        store,
        quick=options.quick,
        force=options.force,
        time_limit=options.time_limit,
        cluster=options.cluster,
        device=device_named(options.device),
        models=options.models,
        advance=lambda case: print(f"balls: {case.model}, layer {case.layer}", file=sys.stderr),
    )
    store.reused += outcome.reused
    return Showing(keys=outcome.keys)


def pages(found: Shown, folder: Path) -> Written:
    """Write the page and the figure; what failed or is refuted is wrong.

    Args:
        found: the records.
        folder: where the files go.
    """
    records = found.records
    blocks = balls.blocks(records)
    path = folder / "balls.md"
    text = balls.page(blocks, found.page.data["command"], found.store.path.name, found.states)
    write_atomically(path, text.encode())
    failed = [record for record in records if record.status in ("failed", "timeout")]
    wrong = [*balls.violations(blocks), *(f"{record.question.bound}: {record.error}" for record in failed)]
    return Written(paths=[path, *balls.draw(blocks, folder)], failures=wrong)


def migrated(old: Old) -> Showing:
    """What the page of a file of schema version 1 showed.

    Args:
        old: the file.
    """
    small = {(case.model, case.input): (case.model_hash, case.input_hash) for case, _ in task.cases(True, models=[])}
    found = blocks(old, small, (0.0, task.NAMED, *task.SMALL_RADII))
    names = (*task.UPPERS, task.LOWER)
    places = [(case.model, case.input, case.layer) for case, _ in task.cases(False)]
    order = {(*place, name): n for n, place in enumerate(places) for name in names}
    return Showing(keys=newest(found, order))


TASK = Task(
    name="balls",
    help="bounds on a ball as curves over its radius",
    measure=measure,
    pages=pages,
    takes=frozenset({"quick", "force", "results", "device", "ray", "gpus_per_job", "time_limit"}),
    by_default=True,
    migrate=migrated,
)
