"""`python -m bench balls`: curves over the radius of a ball."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from bench.balls import page as balls
from bench.balls import task as task
from bench.engine.options import command_of, folder_of, shown, told
from bench.engine.store import RecordStore
from bench.workloads.models import Model
from lipbounds.cluster import Cluster
from lipbounds.files import write_atomically


def run(options: argparse.Namespace, models: Sequence[Model], cluster: Cluster | None = None) -> int:
    """Evaluate what is missing, write the page and the figure; 1 if something failed or is refuted.

    Args:
        options: the command line.
        models: of which some have blocks in the figure.
        cluster: where evaluations are made; None for this process.
    """
    command = command_of(options, "balls")
    with RecordStore(options.results / "balls.jsonl") as store:
        outcome = task.run(
            store,
            quick=options.quick,
            force=options.force,
            time_limit=options.time_limit,
            command=command,
            cluster=cluster,
            models=models,
            advance=lambda case: print(f"balls: {case.model}, layer {case.layer}", file=sys.stderr),
        )
        store.compact()
        records = [store.records[key] for key in outcome.keys]
        states = {record.environment for record in records}
        environments = [store.environments[state]["environment"] for state in sorted(states)]
    found = balls.blocks(records)
    path = folder_of(options) / "balls.md"
    write_atomically(path, balls.page(found, command, shown(store.path), environments).encode())
    paths = [path, *balls.draw(found, folder_of(options))]
    print(f"\n{outcome.evaluated} evaluations on balls made, {outcome.reused} taken from {shown(store.path)}.")
    failed = [record for record in records if record.status in ("failed", "timeout")]
    return told(paths, [*balls.violations(found), *(f"{record.question.bound}: {record.error}" for record in failed)])
