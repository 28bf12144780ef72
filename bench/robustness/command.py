"""`python -m bench robustness`: robust accuracy of models trained with and without penalties."""

from __future__ import annotations

import argparse
import dataclasses as dc
from pathlib import Path

from bench.engine.answers import Answered, Shown
from bench.engine.machine import describe
from bench.engine.options import profile_of, progress_bar, write_page
from bench.engine.records import NotAnswered
from bench.engine.store import Store
from bench.engine.task import Showing, Task, Written
from bench.engine.version_1 import Old
from bench.robustness import figures, tables
from bench.robustness import task as robustness
from bench.robustness.measures import LANCZOS
from bench.robustness.settings import PROFILES, VERSION, Recipe
from bench.robustness.summary import summarised
from bench.robustness.training import Workshop
from lipbounds.devices import device_named
from lipbounds.models.digits_data import load_digits_split


WEIGHTS = Path(".work") / "robustness"  # under the folder of results; git ignores it


def measure(options: argparse.Namespace, store: Store) -> Showing:
    """Train and attack what is missing.

    Args:
        options: the command line.
        store: the records.
    """
    profile = PROFILES[profile_of(options)]
    device = device_named(options.device).type
    workshop = Workshop(store, options.results / WEIGHTS, load_digits_split(), options.force, device)
    with progress_bar(robustness.pieces(profile)) as advance:
        robustness.run(workshop, profile, jobs=options.jobs, cluster=options.cluster, advance=advance)
    return Showing(keys=store.asked)


def pages(found: Shown, folder: Path) -> Written:
    """Write the page, the numbers and the figures.

    Args:
        found: the answers.
        folder: where the files go.
    """
    command, profile = (found.page.data[name] for name in ("command", "profile"))
    numbers = robustness.run(Workshop(found, folder / WEIGHTS), PROFILES[profile])
    data = {"command": command, "profile": profile, **numbers, "environments": [*map(describe, found.states)]}
    summary = summarised(data)
    written = write_page(folder, "robustness", tables.report(data, summary, command), {**summary, **data})
    return Written(paths=[*written, *figures.draw(data, summary, folder)])


def migrated(old: Old) -> Showing:
    """What the page of a file of schema version 1 showed: what the standard profile asks.

    Args:
        old: the file.
    """
    shared = ("task", "version", "what", "setting", "seed", "weights")
    asked = {
        "train": (*shared[:3], *(field.name for field in dc.fields(Recipe))),
        "choice": (*shared, "norm", "eps", "steps"),
        "network": (*shared, "images"),
        "blocks": (*shared, "images", "bins", "bounds", *LANCZOS),
        "gradient attacks": (*shared, "images", "steps", "attack"),
        "autoattack": (*shared, "images", "attack"),
    }
    for line in old.lines:
        old.split(line, asked[line["what"]], old.describe(line["environment"]), device="cpu")
    everything = Answered(list(old.new.entries.values()))
    try:
        robustness.run(Workshop(everything, old.path.parent / WEIGHTS), PROFILES["standard"])
    except NotAnswered:
        return Showing(keys=[])
    return Showing(keys=everything.asked)


TASK = Task(
    name="robustness",
    help="robust accuracy of models trained with and without penalties",
    measure=measure,
    pages=pages,
    takes=frozenset({"quick", "full", "force", "results", "device", "ray", "jobs"}),
    versions={"": VERSION},
    migrate=migrated,
)
