"""`python -m bench scaling`: time of the same evaluations with Ray and without."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from tabulate import tabulate

from bench.engine.answers import Shown
from bench.engine.machine import describe
from bench.engine.options import write_page
from bench.engine.store import Store
from bench.engine.task import Showing, Task, Written
from bench.engine.version_1 import Old
from bench.speed import scaling_task as scaling
from bench.speed.task import place
from lipbounds.devices import device_named


def measure(options: argparse.Namespace, store: Store) -> Showing:
    """Measure what is missing.

    Args:
        options: the command line.
        store: the records.
    """
    cores = os.cpu_count() or 1
    blocks = 1 if options.quick else scaling.BLOCKS
    store.ask(
        {"task": "scaling", "version": scaling.VERSION, "blocks": blocks, "cores": cores},
        lambda: scaling.run(
            cores=cores,
            blocks=blocks,
            time_limit=options.time_limit,
            advance=lambda what: print(f"scaling: {what}", file=sys.stderr),
        ),
        rest=lambda: place(device_named("cpu")),
        force=options.force,
    )
    return Showing(keys=store.asked)


def pages(found: Shown, folder: Path) -> Written:
    """Write the page and the numbers.

    Args:
        found: the answers.
        folder: where the files go.
    """
    (state,) = found.states
    data = found.entries[0].answer
    text = report(data, found.page.data["command"], describe(state), state.get("cores") or 1)
    return Written(paths=write_page(folder, "scaling", text, {**data, "environment": state}))


def report(data: dict[str, Any], command: str, machine: str, cores: int) -> str:
    """The page.

    Args:
        data: what `bench.speed.scaling_task.run` returned.
        command: the command line it was made by.
        machine: where.
        cores: of that machine.
    """
    rounds = [*data["serial"]["rounds"], *(one for row in data["rows"] for one in row["rounds"])]
    loads = [one["load"] for one in rounds]
    serial = ["this process, no Ray", data["serial"]["seconds"], 1.0, "", "", ""]
    rows = [
        [
            f"Ray, {row['workers']} at a time",
            row["seconds"],
            row["speed_up"],
            f"{row['efficiency']:.0%}",
            f"{row['start']:.1f}",
            f"{row['first']:.1f}",
        ]
        for row in data["rows"]
    ]
    titles = ["where", "seconds", "speed-up", "efficiency", "seconds to start Ray", "seconds of the first round"]
    table = tabulate([serial, *rows], titles, tablefmt="pipe", floatfmt=".2f")
    return f"""# Scaling

Made by `{command}`; nothing here is written by hand. What it is, and how to run it: [docs](../docs/ray.md).

{data["evaluations"]} evaluations at {data["blocks"]} blocks of {data["model"]}, from the first question to the last \
record on disk; medians of {len(data["rows"][0]["rounds"])} rounds, of {len(data["serial"]["rounds"])} without Ray, \
which are spread between the others. Efficiency is the speed-up over the number of jobs at a time. In the first round \
workers import torch; it is not in the medians.

{table}

The load average of the machine, which counts the processes that want to run, was {min(loads):.1f} to {max(loads):.1f} \
during the rounds{_busy(min(loads), cores)}.

{machine}.
"""


def _busy(load: float, cores: int) -> str:
    if load <= cores:
        return ""
    return f", on {cores} cores: others kept it busy, and how far Ray scales has to be measured on an idle machine"


def migrated(old: Old) -> Showing:
    """The numbers of scaling.json, which had no file of records.

    Args:
        old: no lines.
    """
    numbers = old.numbers()
    if not numbers:
        return Showing(keys=[])
    state = numbers.pop("environment")
    question = {"task": "scaling", "version": scaling.VERSION, "blocks": numbers["blocks"], "cores": state["cores"]}
    question |= {"device": "cpu", "hardware": state["cpu"], "threads": state["threads"]}
    question |= {"torch": state["packages"]["torch"], "python": state["python"], "code": state["commit"]}
    return Showing(keys=[old.add(question, numbers, old.new.environment_lines({"environment": state})[0]).key])


TASK = Task(
    name="scaling",
    help="time of the same evaluations with Ray and without",
    measure=measure,
    pages=pages,
    takes=frozenset({"quick", "force", "results", "time_limit"}),
    versions={"": scaling.VERSION},
    migrate=migrated,
)
