"""`python -m bench scaling`: time of the same evaluations with Ray and without."""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import Any

from tabulate import tabulate

from bench.engine.machine import describe, environment
from bench.engine.options import command_of, folder_of, told
from bench.speed import scaling_task as scaling
from lipbounds.files import write_atomically


def run(options: argparse.Namespace) -> int:
    """Measure, and write the page and the numbers.

    Args:
        options: the command line.
    """
    data = scaling.run(
        cores=os.cpu_count() or 1,
        blocks=1 if options.quick else scaling.BLOCKS,
        time_limit=options.time_limit,
        advance=lambda what: print(f"scaling: {what}", file=sys.stderr),
    )
    state = environment()
    folder = folder_of(options)
    page, numbers = folder / "scaling.md", folder / "scaling.json"
    write_atomically(page, report(data, command_of(options, "scaling"), describe(state)).encode())
    write_atomically(numbers, (json.dumps({**data, "environment": state}, indent=1) + "\n").encode())
    return told([page, numbers], [])


def report(data: dict[str, Any], command: str, machine: str) -> str:
    """The page.

    Args:
        data: what `bench.speed.scaling_task.run` returned.
        command: the command line it was made by.
        machine: where.
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
during the rounds{_busy(min(loads))}.

{machine}.
"""


def _busy(load: float) -> str:
    cores = os.cpu_count() or 1
    if load <= cores:
        return ""
    return f", on {cores} cores: others kept it busy, and how far Ray scales has to be measured on an idle machine"
