"""`python -m bench tightness`: every bound on the blocks of all models."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bench.engine.options import command_of, folder_of, shown, told
from bench.engine.records import RecordError, without_infinities
from bench.engine.store import RecordStore
from bench.tightness import features, figures, tables
from bench.tightness import task as tightness
from bench.tightness.aggregate import aggregate
from bench.workloads.case import Case
from bench.workloads.models import Model
from lipbounds import registry
from lipbounds.cluster import Cluster
from lipbounds.files import write_atomically


def run(options: argparse.Namespace, models: Sequence[Model], cluster: Cluster | None = None) -> int:
    """Evaluate what is missing, write tables and figures; 1 if something failed or is refuted.

    Args:
        options: the command line.
        models: whose blocks are bounded.
        cluster: where evaluations are made; None for this process.
    """
    command = command_of(options, "tightness")
    with RecordStore(options.results / "tightness.jsonl") as store:
        if store.repaired:
            print(store.repaired, file=sys.stderr)
        with _progress(models, options.quick) as advance:
            outcome = tightness.run(
                store,
                models,
                quick=options.quick,
                force=options.force,
                time_limit=options.time_limit,
                command=command,
                cluster=cluster,
                advance=advance,
            )
        store.compact()
        records = [store.records[key] for key in outcome.keys]
        if not records:
            raise RecordError(f"no block could be bounded: {outcome.problems}.")
        aggregates = aggregate(
            records,
            store.environments,
            command=command,
            records_path=shown(store.path),
            problems=outcome.problems,
            refuted=tightness.refuted(),
        )
    paths = write(aggregates, folder_of(options))
    print(tables.short(aggregates))
    print(f"\n{outcome.evaluated} evaluations made, {outcome.reused} taken from {shown(store.path)}.")
    return told(paths, _troubles(aggregates))


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


def _troubles(aggregates: dict[str, Any]) -> Iterator[str]:
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
    """A progress bar on stderr; blocks count by what they are expected to cost, for a fair remaining time."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    total = sum(len(model.bounded) * model.count(quick) * model.seconds for model in models)
    with Progress(*columns, console=Console(stderr=True), speed_estimate_period=120) as progress:
        task = progress.add_task("starting", total=total)

        def advance(case: Case, seconds: float) -> None:
            progress.update(task, advance=seconds, description=f"{case.model}, {case.input}, layer {case.layer}")

        yield advance
