"""Every registered bound against 10,000 blocks per property and a minute of ascent: writes results/nightly.{jsonl,md}.

    OMP_NUM_THREADS=1 python -m verify.nightly

About eight hours on two cores. Each finished check is a line of the file; a run that is killed goes on from there.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hypothesis
import torch
from hypothesis import Phase
from rich.console import Console
from rich.progress import track

from lipbounds import registry
from lipbounds.registry import BoundSpec
from lipbounds.targets.attention import Attention
from lipbounds.testing.contract import CHECKS, Refuted, checks_for, run_check
from lipbounds.testing.falsify import can_climb, falsify_widely
from lipbounds.testing.target_ascent import can_climb_target, climb_widely


RESULTS = Path(__file__).parents[1] / "results"
COMMAND = "OMP_NUM_THREADS=1 python -m verify.nightly"
PROFILE = "nightly search"
ASCENT = "ascent"
EXAMPLES = 10_000
ASCENT_SECONDS = 60.0
SEED = 0
JOBS = 2
Task = tuple[str, int, tuple[str, ...], str, int]  # bound, its version, what it supports, check, blocks per property
Row = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is not in the file yet, write the page, and return 1 if a bound was refuted."""
    parser = argparse.ArgumentParser(prog="python -m verify.nightly", description=__doc__)
    parser.add_argument("--examples", type=int, default=EXAMPLES, help="blocks per property (default: %(default)s)")
    parser.add_argument("--bound", action="append", metavar="NAME", help="only this one; repeatable (default: all)")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="default: results")
    options = parser.parse_args(arguments)
    path = options.results / "nightly.jsonl"
    wanted = tasks(options.examples)
    rows = read(path)
    todo = [task for task in wanted if task not in rows and (options.bound is None or task[0] in options.bound)]
    with multiprocessing.get_context("spawn").Pool(JOBS) as pool, path.open("a", encoding="utf-8") as file:
        results = pool.imap_unordered(attack, todo, chunksize=1)
        for row in track(results, "nightly", len(todo), console=Console(stderr=True)):
            file.write(json.dumps(row) + "\n")
            file.flush()
            rows[key(row)] = row
    pending = {task[0] for task in wanted if task not in rows}
    chosen = [rows[task] for task in wanted if task[0] not in pending]
    (options.results / "nightly.md").write_text(page(chosen, sorted(pending)), encoding="utf-8")
    return int(any(row["refuted"] for row in chosen))


def tasks(examples: int) -> list[Task]:
    """All checks of all bounds, `value` first, so that what is killed early has done what matters most."""
    specs = registry.standing()
    order = ["value", *(check for check in CHECKS if check != "value"), ASCENT]
    names = {spec.name: {*checks_for(spec), *([ASCENT] if _climbs(spec) else [])} for spec in specs}
    return [
        (spec.name, spec.version, tuple(sorted(spec.supports)), check, examples)
        for check in order
        for spec in specs
        if check in names[spec.name]
    ]


def attack(task: Task) -> Row:
    """One line of the file."""
    name, version, supports, check, examples = task
    torch.set_num_threads(1)
    hypothesis.settings.register_profile(
        PROFILE, max_examples=examples, database=None, deadline=None, phases=[Phase.generate, Phase.shrink]
    )
    hypothesis.settings.load_profile(PROFILE)
    spec = registry.get(name)
    row: Row = {"bound": name, "version": version, "supports": supports, "check": check, "examples": examples}
    row |= {"seed": SEED, "refuted": ""}
    begun = time.monotonic()
    if check == ASCENT:
        climb = falsify_widely if spec.target is Attention else climb_widely
        found = climb(spec, seed=SEED, seconds=ASCENT_SECONDS)
        row |= {"tried": found.starts, "worst_ratio": found.ratio, "refuted": repr(found) if found.refuted else ""}
    else:
        try:
            row["tried"] = run_check(spec, check, seed=SEED)
        except Refuted as refuted:
            row |= {"tried": refuted.examples or 0, "refuted": str(refuted)}
    environment = {"torch": torch.__version__, "hypothesis": hypothesis.__version__}
    return row | {"seconds": round(time.monotonic() - begun, 1), "environment": environment}


def read(path: Path) -> dict[Task, Row]:
    """The lines of the file by task; a torn last line is what a killed run left, and is cut off."""
    if not path.exists():
        return {}
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole, encoding="utf-8")
    rows = [json.loads(line) for line in whole.splitlines()]
    return {key(row): row for row in rows}


def key(row: Row) -> Task:
    """What a line is the answer to."""
    return row["bound"], row["version"], tuple(row["supports"]), row["check"], row["examples"]


def page(rows: list[Row], pending: Sequence[str] = ()) -> str:
    """The table in Markdown.

    Args:
        rows: of bounds that all of their checks attacked.
        pending: bounds that some check has not attacked yet.
    """
    if not rows:
        return "# Nightly: no bound has been attacked by all of its checks yet\n"
    bounds = list(dict.fromkeys(row["bound"] for row in rows))
    refuted = [row for row in rows if row["refuted"]]
    survivors = len(bounds) - len({row["bound"] for row in refuted})
    environment = rows[0]["environment"]
    lines = [
        "# Nightly: every registered bound and estimator under a long search",
        "",
        f"**{survivors} of {len(bounds)} survive.** Made by `{COMMAND}`: {rows[0]['examples']:,} blocks per property "
        "(each check takes the share that `lipbounds.testing.contract.CHECKS` gives it), "
        f"{ASCENT_SECONDS:.0f} s of ascent, seed {SEED}; {sum(row['tried'] for row in rows):,} blocks and starts, "
        f"{sum(row['seconds'] for row in rows) / 60:.0f} minutes of one core. torch {environment['torch']}, hypothesis "
        f"{environment['hypothesis']}, CPU.",
        "",
        *([f"Not attacked to the end yet: {', '.join(f'`{name}`' for name in pending)}.", ""] if pending else []),
        "The last column is the largest true / claimed norm that ascent found: 1 at most for a bound, and near 1 where",
        "somewhere it is tight. No search proves a bound; the proofs are with the formulas.",
        "",
        "| bound | checks | blocks | seconds | refuted by | true / claimed |",
        "|---|---:|---:|---:|---|---:|",
        *(_line(name, [row for row in rows if row["bound"] == name]) for name in bounds),
        *(f"\n## {row['bound']}: {row['check']}\n\n```\n{row['refuted']}\n```" for row in refuted),
    ]
    return "\n".join(lines) + "\n"


def _line(name: str, rows: list[Row]) -> str:
    by_search = [row for row in rows if row["check"] != ASCENT]
    tried, seconds = sum(row["tried"] for row in by_search), sum(row["seconds"] for row in rows)
    refuted = ", ".join(row["check"] for row in rows if row["refuted"]) or "nothing"
    ratio = next((f"{row['worst_ratio']:.9f}" for row in rows if row["check"] == ASCENT), "-")
    return f"| `{name}` | {len(by_search)} | {tried:,} | {seconds:.0f} | {refuted} | {ratio} |"


def _climbs(spec: BoundSpec) -> bool:
    return (can_climb(spec) or can_climb_target(spec)) and spec.role == "bound"


if __name__ == "__main__":
    sys.exit(main())
