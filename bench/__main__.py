"""`python -m bench [all|tightness|balls|certified|speed|readme] [--quick] [--force]`: run, write tables and figures."""

from __future__ import annotations

import argparse
import dataclasses as dc
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bench import balls, certified_tables, features, figures, readme, speed_plan, speed_tables, tables
from bench.aggregate import aggregate
from bench.certified_data import Answers
from bench.evaluate import Case
from bench.machine import ROOT, describe, environment
from bench.models import Model, zoo
from bench.records import RecordError, without_infinities
from bench.store import RecordStore, write_atomically
from bench.tasks import balls as ball_task
from bench.tasks import certified, speed, tightness
from lipbounds import registry


STALE, INTERRUPTED = 1, 130


def main(arguments: Sequence[str] | None = None, models: Sequence[Model] | None = None) -> int:
    """Run and return the exit status: 0, 1 for failures or a stale README, 2 for misuse, 130 after an interrupt.

    Args:
        arguments: the command line; by default that of the process.
        models: by default the whole zoo.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.check and options.task != "readme":
        parser.error("--check goes with the task readme: python -m bench readme --check")
    if options.full and (options.task != "certified" or options.quick):
        parser.error("--full goes with the task certified, without --quick: python -m bench certified --full")
    if not options.time_limit > 0:
        parser.error(f"--time-limit must be above 0, got {options.time_limit:g}")
    try:
        if options.task == "readme":
            return _readme(options)
        if options.task == "certified":
            return _certified(options)
        if options.task == "speed":
            return _speed(options)
        chosen = zoo() if models is None else models
        status = _tightness(options, chosen) if options.task != "balls" else 0
        return status if options.task == "tightness" else max(status, _balls(options, chosen))
    except RecordError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "\nStopped. Everything finished so far is in the records; run the same command again to go on from there.",
            file=sys.stderr,
        )
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description="Compare all registered bounds on real models."
    )
    parser.add_argument(
        "task",
        nargs="?",
        default="all",
        choices=["all", "tightness", "balls", "certified", "speed", "readme"],
        help="tightness: tables and figures of tightness; balls: curves over the radius of a ball; all: these two; "
        "certified: certified radii beside an attack, and bounds of whole models; speed: time and memory beside a "
        "forward pass; readme: copy the headline table into README.md",
    )
    parser.add_argument(
        "--quick", action="store_true", help="few inputs; tables go to DIR/quick, records to the same file"
    )
    parser.add_argument("--full", action="store_true", help="certified: 120 images a model, and large models (hours)")
    parser.add_argument("--force", action="store_true", help="evaluate again what is in the records")
    parser.add_argument("--results", type=Path, default=ROOT / "results", metavar="DIR", help="default: results")
    parser.add_argument("--time-limit", type=float, default=120.0, metavar="S", help="seconds for one evaluation")
    parser.add_argument(
        "--check", action="store_true", help="readme: exit with 1 if the README is stale, write nothing"
    )
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", metavar="PATH", help="default: README.md")
    return parser


def _readme(options: argparse.Namespace) -> int:
    current = readme.update(options.readme, options.results / "tightness.json", check=options.check)
    if options.check and not current:
        print(f"{options.readme} is stale: run `python -m bench readme`.", file=sys.stderr)
        return STALE
    print(f"{options.readme} {'is current' if current else 'now holds the current table'}.")
    return 0


def _tightness(options: argparse.Namespace, models: Sequence[Model]) -> int:
    command = "python -m bench tightness" + (" --quick" if options.quick else "")
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
            records_path=_shown(store.path),
            problems=outcome.problems,
            refuted=tightness.refuted(),
        )
    paths = write(aggregates, options.results / "quick" if options.quick else options.results)
    print(tables.short(aggregates))
    print(f"\n{outcome.evaluated} evaluations made, {outcome.reused} taken from {_shown(store.path)}.")
    print("Written: " + ", ".join(_shown(path) for path in paths))
    return _status(aggregates)


def _certified(options: argparse.Namespace) -> int:
    profile = "quick" if options.quick else "full" if options.full else "standard"
    command = "python -m bench certified" + ("" if profile == "standard" else f" --{profile}")
    chosen = certified.PROFILES[profile]
    answers = Answers(options.results / "certified.jsonl")
    total = sum(chosen.certified.values()) + len(chosen.whole)
    total += sum(chosen.radii for count in chosen.attacked.values() if count)
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("starting", total=total + 1)

        def advance(what: str) -> None:
            progress.update(task, advance=1, description=what)

        data = certified.run(answers, chosen, force=options.force, advance=advance)
        progress.update(task, completed=total + 1, description="done")
    folder = options.results / "quick" if options.quick else options.results
    page, numbers = folder / "certified.md", folder / "certified.json"
    write_atomically(page, certified_tables.report(data, command, describe(environment())).encode())
    write_atomically(numbers, (json.dumps(without_infinities(data), indent=1, ensure_ascii=False) + "\n").encode())
    paths = [page, numbers, *certified_tables.draw(data, folder)]
    print(f"{answers.made} answers made, {answers.reused} taken from {_shown(answers.path)}.")
    print("Written: " + ", ".join(_shown(path) for path in paths))
    troubles = certified.violations(data)
    for trouble in troubles:
        print(trouble, file=sys.stderr)
    return 1 if troubles else 0


def _speed(options: argparse.Namespace) -> int:
    profile = "quick" if options.quick else "standard"
    command = "python -m bench speed" + (" --quick" if options.quick else "")
    answers = Answers(options.results / "speed.jsonl")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = speed.run(
        answers,
        dc.replace(speed_plan.PROFILES[profile], stop=options.time_limit),
        device=device,
        force=options.force,
        advance=lambda what: print(f"speed: {what}", file=sys.stderr),
    )
    folder = options.results / "quick" if options.quick else options.results
    page, numbers = folder / "speed.md", folder / "speed.json"
    write_atomically(page, speed_tables.report(data, command, describe(environment())).encode())
    write_atomically(numbers, (json.dumps(without_infinities(data), indent=1, ensure_ascii=False) + "\n").encode())
    paths = [page, numbers, *speed_tables.draw(data, folder)]
    print(f"{answers.made} answers made, {answers.reused} taken from {_shown(answers.path)}.")
    print("Written: " + ", ".join(_shown(path) for path in paths))
    return 0


def _balls(options: argparse.Namespace, models: Sequence[Model]) -> int:
    command = "python -m bench balls" + (" --quick" if options.quick else "")
    with RecordStore(options.results / "balls.jsonl") as store:
        outcome = ball_task.run(
            store,
            quick=options.quick,
            force=options.force,
            time_limit=options.time_limit,
            command=command,
            models=models,
            advance=lambda case: print(f"balls: {case.model}, layer {case.layer}", file=sys.stderr),
        )
        store.compact()
        records = [store.records[key] for key in outcome.keys]
        states = {record.environment for record in records}
        environments = [store.environments[state]["environment"] for state in sorted(states)]
    found = balls.blocks(records)
    folder = options.results / "quick" if options.quick else options.results
    path = folder / "balls.md"
    write_atomically(path, balls.page(found, command, _shown(store.path), environments).encode())
    paths = [path, *balls.draw(found, folder)]
    print(f"\n{outcome.evaluated} evaluations on balls made, {outcome.reused} taken from {_shown(store.path)}.")
    print("Written: " + ", ".join(_shown(path) for path in paths))
    troubles = balls.violations(found)
    troubles += [
        f"{record.question.bound}: {record.error}" for record in records if record.status in ("failed", "timeout")
    ]
    for trouble in troubles:
        print(trouble, file=sys.stderr)
    return 1 if troubles else 0


def write(aggregates: dict[str, Any], folder: Path) -> list[Path]:
    """Write the tables and figures and return their paths.

    Args:
        aggregates: what `bench.aggregate.aggregate` returned.
        folder: where they go; made if missing.
    """
    page, data = folder / "tightness.md", folder / "tightness.json"
    write_atomically(page, tables.report(aggregates).encode())
    write_atomically(data, (json.dumps(without_infinities(aggregates), indent=1, ensure_ascii=False) + "\n").encode())
    declared = folder / "bounds.md"
    write_atomically(declared, features.page(list(registry.registry)).encode())
    return [page, data, declared, *figures.draw(aggregates, folder)]


def _status(aggregates: dict[str, Any]) -> int:
    """1, with the reasons on stderr, if something failed or is refuted."""
    troubles = [f"{name} is incomplete: {reason}" for name, reason in aggregates["problems"].items()]
    for name, model in aggregates["models"].items():
        failed = [row for row in model["not_answered"] if row["status"] != "unsupported"]
        troubles += [
            f"{name}: {row['bound']} {row['status']} at {row['count']} blocks: {row['error']}" for row in failed
        ]
        troubles += [
            f"{name}, layer {row['layer']}, {row['input']}: {row['bound']} claims <= {row['value']:.6g}, but "
            f"{row['lower_bound']} reaches {row['reached']:.6g}"
            for row in model["violations"]
        ]
    for trouble in troubles:
        print(trouble, file=sys.stderr)
    return 1 if troubles else 0


@contextmanager
def _progress(models: Sequence[Model], quick: bool) -> Iterator[Any]:
    """A progress bar on stderr; blocks count by what they are expected to cost, for a fair remaining time."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    total = sum(len(model.bounded) * model.count(quick) * model.seconds for model in models)
    with Progress(*columns, console=console, speed_estimate_period=120) as progress:
        task = progress.add_task("starting", total=total)

        def advance(case: Case, seconds: float) -> None:
            progress.update(task, advance=seconds, description=f"{case.model}, {case.input}, layer {case.layer}")

        yield advance


def _shown(path: Path) -> str:
    """Relative to the repository if it is inside."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


if __name__ == "__main__":
    sys.exit(main())
