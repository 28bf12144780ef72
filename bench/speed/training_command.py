"""`python -m bench training`: what penalties add to a training step."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from bench.engine.answers import Shown
from bench.engine.machine import describe
from bench.engine.options import profile_of, write_page
from bench.engine.store import Store
from bench.engine.task import Showing, Task, Written
from bench.engine.version_1 import Old
from bench.pages.formatting import table
from bench.speed import training_task as training
from bench.speed.tables import target_rows
from bench.speed.task import HERE
from lipbounds.devices import device_named
from lipbounds.number_format import counted


def measure(options: argparse.Namespace, store: Store) -> Showing:
    """Measure what is missing.

    Args:
        options: the command line.
        store: the records.
    """
    training.run(
        store,
        profile_of(options),
        device=device_named(options.device),
        force=options.force,
        advance=lambda what: print(f"training: {what}", file=sys.stderr),
    )
    return Showing(keys=store.asked)


def pages(found: Shown, folder: Path) -> Written:
    """Write the page and the numbers.

    Args:
        found: the answers.
        folder: where the files go.
    """
    data = training.shown(found)
    machines = "\n- ".join(map(describe, found.states))
    return Written(paths=write_page(folder, "training", _report(data, found.page.data["command"], machines), data))


def _report(data: dict[str, Any], command: str, state: str) -> str:
    here = data["place"]
    costs = (
        "processor time, which counts nothing while other programs run"
        if here["device"] == "cpu"
        else "time between events on the card"
    )
    rows = target_rows(data["rows"])
    parts = [
        "# Training steps with a penalty",
        f"Made by `{command}`; nothing here is written by hand.",
        "A step of SGD in float32, forward and backward, with the penalty at its defaults, by one without, in turns "
        f"in one process: median, and in brackets the quartiles, of the ratio of costs ({costs}), on "
        f"{here['hardware']} with {counted(here['threads'], 'thread')}.",
        "JaSMin is the penalty of Yudin et al. 2025. `SharpPenalty` is an estimate of the mean of `sharp_cheap` over "
        "layers and inputs, from those that are drawn at each step: no bound.",
        table(["model", "name", "target", "ratio", "met", "seconds"], rows),
        "## Environment",
        f"- {state}",
    ]
    return "\n\n".join(parts) + "\n"


def migrated(old: Old) -> Showing:
    """What the page of a file of schema version 1 showed: what training.json holds.

    Args:
        old: the file.
    """
    place = old.named_by_page()
    asked = ("task", "version", "model", "repeats", "enough", *HERE)
    keys = {line["key"]: old.split(line, asked, place).key for line in old.lines}
    return Showing(keys=[keys[row["answer"]["key"]] for row in old.numbers().get("rows", [])])


TASK = Task(
    name="training",
    help="what penalties add to a training step",
    measure=measure,
    pages=pages,
    takes=frozenset({"quick", "force", "results", "device"}),
    versions={"": training.VERSION},
    migrate=migrated,
)
