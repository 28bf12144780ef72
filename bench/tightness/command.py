"""`python -m bench tightness`: every bound on the blocks of all models."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bench.engine.answers import Shown
from bench.engine.options import committed, copy_committed, keep_apart
from bench.engine.records import RecordError, without_infinities
from bench.engine.reference import LOWER
from bench.engine.store import Store
from bench.engine.task import Showing, Task, Written
from bench.engine.version_1 import Old, blocks, newest
from bench.tightness import features, figures, tables
from bench.tightness import task as tightness
from bench.tightness.aggregate import aggregate
from bench.workloads.case import Case
from bench.workloads.models import Model, drawn_hashes, zoo
from lipbounds import registry
from lipbounds.cli.console import LinePerMinute
from lipbounds.devices import device_named
from lipbounds.errors import InvalidInput
from lipbounds.files import write_atomically


def measure(options: argparse.Namespace, store: Store) -> Showing:
    """Evaluate what is missing.

    Args:
        options: the command line.
        store: the records.

    Raises:
        RecordError: no block could be bounded.
    """
    models = _brought(options) or options.models
    with _progress(models, options.quick) as advance:
        outcome = tightness.run(
            store,
            models,
            quick=options.quick,
            force=options.force,
            time_limit=options.time_limit,
            cluster=options.cluster,
            device=device_named(options.device),
            advance=advance,
        )
    store.reused += outcome.reused
    if not outcome.keys:
        raise RecordError(f"no block could be bounded: {outcome.problems}.")
    return Showing(keys=outcome.keys, data={"problems": outcome.problems})


def _brought(options: argparse.Namespace) -> list[Model]:
    """The models of --model, once the bounds of --bounds are registered."""
    from bench.workloads.of_user import model_of, register  # loads what models need: not to show a page

    for path in options.bounds or ():
        register(path)
    return [model_of(name, options.data) for name in options.model or ()]


def prepare(options: argparse.Namespace) -> None:
    """What is not of this repository is measured in another folder, upon a copy of the records that are there.

    Args:
        options: the command line.

    Raises:
        InvalidInput: a model or bound is brought, or registered by another package, but no other folder is named.
    """
    foreign = [spec.name for spec in registry.registry if not spec.compute.__module__.startswith("lipbounds.")]
    if committed(options) and foreign:
        raise InvalidInput(
            f"the results of this repository hold its own bounds, and other packages have registered "
            f"{', '.join(foreign)}; pass another folder by --results DIR, or set LIPBOUNDS_NO_PLUGINS=1."
        )
    if not (options.model or options.bounds):
        return
    keep_apart(options, "--model and --bounds")
    copy_committed(TASK.path(options.results).name, options.results)


def pages(found: Shown, folder: Path) -> Written:
    """Write tables and figures; what failed or is refuted is wrong.

    Args:
        found: the records.
        folder: where the files go.
    """
    aggregates = aggregate(
        found.records,
        found.store.environments,
        command=found.page.data["command"],
        records_path=found.store.path.name,
        problems=found.page.data["problems"],
        refuted=tightness.refuted(),
    )
    paths = write(aggregates, folder)
    print(tables.short(aggregates))
    return Written(paths=paths, declared=[folder / "bounds.md"], failures=[*_failures(aggregates)])


def migrated(old: Old) -> Showing:
    """What the page of a file of schema version 1 showed: the newest version of each bound at the blocks of the zoo.

    Args:
        old: the file.
    """
    found = blocks(old, drawn_hashes())
    order = {}
    tokens = {(line["model"], line["input"]): line["tokens"] for line in old.lines}
    for model in zoo():
        inputs: dict[str, None] = {}
        for case in model.cases(model.inputs):
            inputs[case.input] = None
            case.known_tokens = tokens.get((case.model, case.input), 0)
            names = [spec.name for spec in [*registry.select(), *registry.refuted()]]
            if case.known_tokens:
                names = [name for name in names if tightness.affordable(case, registry.get(name), len(inputs))]
            for name in [*names, LOWER]:
                order[case.model, case.input, case.layer, name] = len(order)
    return Showing(keys=newest(found, order), data={"problems": {}})


def write(aggregates: dict[str, Any], folder: Path) -> list[Path]:
    """Write the tables and figures and return their paths.

    Args:
        aggregates: what `bench.tightness.aggregate.aggregate` returned.
        folder: where they go; made if missing.
    """
    page, data = folder / "tightness.md", folder / "tightness.json"
    write_atomically(page, tables.report(aggregates).encode())
    write_atomically(data, (json.dumps(without_infinities(aggregates), indent=1, ensure_ascii=False) + "\n").encode())
    declared = folder / "bounds.md"
    write_atomically(declared, features.page(list(registry.registry)).encode())
    return [page, data, declared, *figures.draw(aggregates, folder)]


def _failures(aggregates: dict[str, Any]) -> Iterator[str]:
    """What failed or is refuted."""
    yield from (f"{name} is incomplete: {reason}" for name, reason in aggregates["problems"].items())
    for name, model in aggregates["models"].items():
        for row in model["not_answered"]:
            if row["status"] != "unsupported":
                yield f"{name}: {row['bound']} {row['status']} at {row['count']} blocks: {row['error']}"
        for row in model["violations"]:
            yield (
                f"{name}, layer {row['layer']}, {row['input']}: {row['bound']} claims <= {row['value']:.6g}, but "
                f"{row['lower_bound']} reaches {row['reached']:.6g}"
            )


@contextmanager
def _progress(models: Sequence[Model], quick: bool) -> Iterator[Any]:
    """A progress bar on stderr, or a line per minute; blocks count by their expected cost, for the remaining time."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    total = sum(len(model.bounded) * model.count(quick) * model.seconds for model in models)
    with LinePerMinute(*columns, console=Console(stderr=True), speed_estimate_period=120) as progress:
        task = progress.add_task("starting", total=total)

        def advance(case: Case, seconds: float) -> None:
            progress.update(task, advance=seconds, description=f"{case.model}, {case.input}, layer {case.layer}")

        yield advance


TASK = Task(
    name="tightness",
    help="how far above the truth every bound is: tables and figures",
    measure=measure,
    pages=pages,
    takes=frozenset(
        {"quick", "force", "results", "device", "ray", "gpus_per_job", "time_limit", "model", "bounds", "data"}
    ),
    prepare=prepare,
    by_default=True,
    migrate=migrated,
)
