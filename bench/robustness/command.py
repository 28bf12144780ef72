"""`python -m bench robustness`: robust accuracy of models trained with and without penalties."""

from __future__ import annotations

import argparse
import dataclasses as dc
import shlex
from pathlib import Path
from typing import Any

from bench.engine.answers import Answered, Shown
from bench.engine.machine import describe
from bench.engine.options import command_of, copy_committed, keep_apart, profile_of, progress_bar, write_page
from bench.engine.records import NotAnswered
from bench.engine.store import Store
from bench.engine.task import Showing, Task, Written
from bench.engine.version_1 import Old
from bench.robustness import figures, tables
from bench.robustness import task as robustness
from bench.robustness.measures import LANCZOS
from bench.robustness.profiles import PROFILES
from bench.robustness.settings import LEFT_OUT, VERSION, Recipe, Setting
from bench.robustness.studies import profiles_of, study_of
from bench.robustness.summary import summarised
from bench.robustness.training import Workshop
from lipbounds.devices import device_named
from lipbounds.errors import InvalidInput


WEIGHTS = Path(".work") / "robustness"  # under the folder of results; git ignores it


def measure(options: argparse.Namespace, store: Store) -> Showing:
    """Train and attack what is missing.

    Args:
        options: the command line.
        store: the records.
    """
    own, study = tuple(options.own), study_of(options.train_on)
    profile = dc.replace(profiles_of(study.name)[profile_of(options)], own=own, data=study.data)
    device = device_named(options.device).type
    workshop = Workshop(store, options.results / WEIGHTS, study.split, options.force, device, study.make)
    with progress_bar(robustness.pieces(profile)) as advance:
        robustness.run(workshop, profile, jobs=options.jobs, cluster=options.cluster, advance=advance)
    data: dict[str, Any] = {"own": [dc.asdict(setting) for setting in own]} if own else {}
    if study.name:
        data["study"] = {"name": study.name, "about": study.about, "data": study.data}
    if not data:
        return Showing(keys=store.asked)
    return Showing(keys=store.asked, data={**data, "command": _command(options)}, name=study.name)


def prepare(options: argparse.Namespace) -> None:
    """Try the penalties and losses of a user, which are trained upon a copy of the records that are there.

    Args:
        options: the command line.

    Raises:
        InvalidInput: one breaks its contract, or no other folder than that of the repository is named.
    """
    options.own = []
    if not (options.penalty or options.loss):
        return
    keep_apart(options, "--penalty and --loss")
    from bench.robustness.own import loss_setting, penalty_setting  # loads a model: not to show a page

    options.own += [penalty_setting(path, options.weight or ()) for path in options.penalty or ()]
    options.own += [loss_setting(path) for path in options.loss or ()]
    names = [setting.name for setting in options.own]
    if len(set(names)) < len(names):
        raise InvalidInput(f"--penalty and --loss must name each function once, got {', '.join(names)}.")
    copy_committed(TASK.path(options.results).name, options.results)


def _command(options: argparse.Namespace) -> str:
    words = command_of(options, TASK.name).split()
    words += [] if options.train_on is None else ["--train-on", str(options.train_on)]
    for flag in ("penalty", "loss", "weight"):
        words += [word for value in getattr(options, flag) or () for word in (f"--{flag}", str(value))]
    return shlex.join(words)


def pages(found: Shown, folder: Path) -> Written:
    """Write the page, the numbers and the figures.

    Args:
        found: the answers.
        folder: where the files go.
    """
    data = numbers_of(found)
    summary = summarised(data)
    name = "_".join(filter(None, ("robustness", data.get("study", {"name": ""})["name"])))
    text = tables.report(data, summary, data["command"], name)
    written = write_page(folder, name, text, {**summary, **data})
    return Written(paths=[*written, *figures.draw(data, summary, folder, name)])


def numbers_of(found: Shown) -> dict[str, Any]:
    """What the page is made of, from the records alone.

    Args:
        found: the answers.
    """
    command, profile = (found.page.data[name] for name in ("command", "profile"))
    own = tuple(_setting(said) for said in found.page.data.get("own", ()))
    study = found.page.data.get("study", {"name": "", "about": "", "data": ""})
    asked = dc.replace(profiles_of(study["name"])[profile], own=own, data=study["data"])
    numbers = robustness.run(Workshop(found, found.store.path.parent / WEIGHTS), asked)
    data = {"command": command, "profile": profile, **numbers, "environments": [*map(describe, found.states)]}
    return {**data, "study": study} if study["name"] else data


def _setting(said: dict[str, Any]) -> Setting:
    """A setting of a user, as the records keep it."""
    return Setting(**{**said, "grid": tuple(said["grid"])})


def migrated(old: Old) -> Showing:
    """What the page of a file of schema version 1 showed: what the standard profile asks.

    Args:
        old: the file.
    """
    shared = ("task", "version", "what", "setting", "seed", "weights")
    asked = {
        "train": (*shared[:3], *(field.name for field in dc.fields(Recipe) if field.name not in LEFT_OUT)),
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
    takes=frozenset(
        {"quick", "full", "force", "results", "device", "ray", "jobs", "penalty", "loss", "weight", "train_on"}
    ),
    prepare=prepare,
    versions={"": VERSION},
    migrate=migrated,
)
