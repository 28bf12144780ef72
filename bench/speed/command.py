"""`python -m bench speed`: time and memory beside a forward pass."""

from __future__ import annotations

import argparse
import dataclasses as dc
import sys
from pathlib import Path

from bench.engine.answers import Shown
from bench.engine.machine import describe
from bench.engine.options import profile_of, write_page
from bench.engine.store import Store
from bench.engine.task import Showing, Task, Written
from bench.engine.version_1 import Old
from bench.speed import plan, tables
from bench.speed import task as speed
from bench.speed.task import HERE
from lipbounds.devices import device_named


def measure(options: argparse.Namespace, store: Store) -> Showing:
    """Measure what is missing.

    Args:
        options: the command line.
        store: the records.
    """
    speed.run(
        store,
        dc.replace(plan.PROFILES[profile_of(options)], stop=options.time_limit),
        device=device_named(options.device),
        force=options.force,
        advance=lambda what: print(f"speed: {what}", file=sys.stderr),
    )
    return Showing(keys=store.asked)


def pages(found: Shown, folder: Path) -> Written:
    """Write the page, the numbers and the figure.

    Args:
        found: the answers.
        folder: where the files go.
    """
    data = speed.shown(found, plan.PROFILES[found.page.data["profile"]])
    machines = "\n- ".join(map(describe, found.states))
    written = write_page(folder, "speed", tables.report(data, found.page.data["command"], machines), data)
    return Written(paths=[*written, *tables.draw(data, folder)])


def migrated(old: Old) -> Showing:
    """What the page of a file of schema version 1 showed: what speed.json holds.

    Args:
        old: the file.
    """
    place = old.named_by_page()
    asked = ("task", "version", "what", "method", "options", "shape", "kept", "tokens", *HERE)
    keys = {line["key"]: old.split(line, asked, place).key for line in old.lines}
    rows = [row for part in ("targets", "rows", "streamed") for row in old.numbers().get(part, [])]
    return Showing(keys=dict.fromkeys(keys[row["answer"]["key"]] for row in rows))


TASK = Task(
    name="speed",
    help="time and memory of every bound beside a forward pass",
    measure=measure,
    pages=pages,
    takes=frozenset({"quick", "force", "results", "device", "time_limit", "pytest_benchmark_json"}),
    versions={"": speed.VERSION},
    migrate=migrated,
)
