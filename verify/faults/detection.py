"""Which check catches which planted fault: `python -m verify.faults.detection` writes results/detection.{md,json}.

Most of its time goes into sound bounds, which survive everything. `--new` hunts what the record lacks, `--again NAME`
what changed since; the page says which rows such a run made.
"""

from __future__ import annotations

import argparse
import dataclasses as dc
import json
import multiprocessing
import platform
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import hypothesis
import torch

from verify.draws import pin_draws
from verify.faults.catalogue import CONTROLS, FAULTS, NOT_EXPRESSIBLE
from verify.faults.hunt import DEEPER, MAX_EXAMPLES, SECONDS, SEED, SHORT_SECONDS, hunt


RESULTS = Path(__file__).parents[2] / "results"
COMMAND = "OMP_NUM_THREADS=1 python -m verify.faults.detection"
JOBS = 2  # processes, one thread each
CONTROL_EXAMPLES = 20


def main() -> None:
    """Hunt every fault and every control and write the two files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--new", action="store_true", help="hunt only faults and sound bounds that the record lacks")
    parser.add_argument("--again", nargs="+", metavar="NAME", help="hunt these anew, and what the record lacks")
    options = parser.parse_args()
    names = {fault.name: name for name, fault in (FAULTS | CONTROLS).items()}
    again = options.again or []
    if unknown := sorted(set(again) - names.keys()):
        parser.error(f"--again takes names of rows of results/detection.md, got {', '.join(unknown)}")
    begun = time.monotonic()
    new = bool(options.new or again)
    known = json.loads((RESULTS / "detection.json").read_text()) if new else {"faults": [], "controls": []}
    kept = {name: key for name, key in names.items() if name not in again}
    rows = {kept[row["name"]]: row for row in [*known["faults"], *known["controls"]] if row["name"] in kept}
    missing = [name for name in [*FAULTS, *CONTROLS] if name not in rows]
    with multiprocessing.get_context("spawn").Pool(JOBS) as pool:
        rows |= dict(zip(missing, pool.map(_row, missing, chunksize=1), strict=True))
    runs = [_run([rows[name]["name"] for name in missing], round(time.monotonic() - begun, 1))] if new else []
    faults, controls = [rows[name] for name in FAULTS], [rows[name] for name in CONTROLS]
    record = {
        "command": COMMAND,
        "environment": known.get("environment", _environment()),
        "added": [*_still(known.get("added", []), again), *runs],
        "seed": SEED,
        "max_examples": MAX_EXAMPLES,
        "falsify_seconds": SECONDS,
        "control_examples": CONTROL_EXAMPLES,
        "seconds": known.get("seconds", round(time.monotonic() - begun, 1)),
        "faults": faults,
        "controls": controls,
        "not_expressible": NOT_EXPRESSIBLE,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "detection.json").write_text(json.dumps(record, indent=1) + "\n")
    (RESULTS / "detection.md").write_text(_report(record))


def _row(name: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    pin_draws()  # as in the tests, which go by this record
    fault = FAULTS.get(name) or CONTROLS[name]
    begun = time.process_time()
    outcome = hunt(fault.spec, max_examples=MAX_EXAMPLES if name in FAULTS else CONTROL_EXAMPLES)
    cpu = round(time.process_time() - begun, 2)
    row = {"name": fault.name, "what": fault.what, "subtle": fault.subtle, **dc.asdict(outcome)}
    row |= {"seconds": round(outcome.seconds, 2), "cpu": cpu, "path": fault.spec.name.removesuffix(".spec")}
    sys.stderr.write(f"{fault.name}: {outcome.caught_by or 'survives'} after {outcome.seconds:.1f} s\n")
    return row


def _environment() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "hypothesis": hypothesis.__version__,
        "machine": f"{platform.machine()}, {platform.system()}, one thread",
    }


def _report(record: dict[str, Any]) -> str:
    faults, controls = record["faults"], record["controls"]
    caught = [row for row in faults if row["caught_by"]]
    subtle = [row for row in faults if row["subtle"]]
    survived = [row for row in controls if not row["caught_by"]]
    checks = Counter(row["caught_by"] for row in caught)
    lines = [
        "# Planted faults: what the verifier catches",
        "",
        "Each fault is a wrong bound that somebody could write in good faith: a right one with one mistake planted in "
        "it. The verifier gets it like any other bound and does not know about the mistake.",
        "",
        f"**{len(caught)} of {len(faults)} faults are caught**, among them "
        f"{sum(bool(row['caught_by']) for row in subtle)} of {len(subtle)} subtle ones. {len(survived)} of "
        f"{len(controls)} sound bounds survive; one that did not would be a false alarm, and a bug of the verifier.",
        "",
        "## Checks",
        "",
        *_table(["check", "faults that it was the first to catch"], [[n, str(c)] for n, c in checks.most_common()]),
        "",
        "## Escaped",
        "",
        *([f"- {row['name']}: {row['what']}" for row in faults if not row["caught_by"]] or ["None."]),
        "",
        *_how(record),
        "## All faults",
        "",
        '<details markdown="1">',
        f"<summary>{len(faults)} faults, and what catches each</summary>",
        "",
        *_table(
            ["fault", "what is wrong", "subtle", "caught by", "examples", "seconds", "CPU"],
            [_fault(row) for row in faults],
        ),
        "",
        "</details>",
        "",
        "## Sound bounds that must survive",
        "",
        *_table(["bound", "what it is", "outcome", "examples", "seconds", "CPU"], [_control(row) for row in controls]),
        "",
        "## Not expressible yet",
        "",
        *(f"- {what}: {why}." for what, why in record["not_expressible"].items()),
    ]
    return "\n".join(lines) + "\n"


def _run(names: list[str], seconds: float) -> dict[str, Any]:
    """What a later run with --new added, where and in how long."""
    return {"names": names, "seconds": seconds, "environment": _environment()}


def _still(runs: list[dict[str, Any]], again: list[str]) -> list[dict[str, Any]]:
    """The later runs, each with the rows of its own that no run since has made again."""
    left = [run | {"names": [name for name in run["names"] if name not in again]} for run in runs]
    return [run for run in left if run["names"]]


def _how(record: dict[str, Any]) -> list[str]:
    return [
        "## How it was measured",
        "",
        f"Made by `{record['command']}` in {record['seconds']:.0f} s. Environment: "
        + ", ".join(f"{key} {value}" for key, value in record["environment"].items())
        + ".",
        "",
        *_added(record["added"]),
        f"The checks run in this order: `value`, `tight`, `falsify` (gradient ascent) for {SHORT_SECONDS:.0f} s, then "
        "the others in the order of `lipbounds.testing.contract.CHECKS`. For what survives all of them, `falsify` runs "
        f"for {record['falsify_seconds']:.0f} s of processor time "
        f"and `value` with {DEEPER} times as many blocks. A check tries at most {record['max_examples']} blocks "
        f"({record['control_examples']} on a sound bound); the seed is {record['seed']}; blocks are not shrunk.",
        "",
        "Examples: the blocks that the catching check tried until it failed (for `falsify`: its starting points), and "
        "in brackets the blocks that other checks tried before it. Seconds: of the whole search, by the clock and in "
        "processor time; other programs ran on the machine at the same time.",
        "",
    ]


def _added(runs: list[dict[str, Any]]) -> list[str]:
    """Which rows a later run with --new added to those of the whole run."""
    lines: list[str] = []
    for run in runs:
        lines += [
            f"{len(run['names'])} rows are those of a later run of `{COMMAND}` (`--new` or `--again`), in "
            f"{run['seconds']:.0f} s: "
            + ", ".join(f"`{name}`" for name in run["names"])
            + ". The others are those of the whole run before; `verify/faults/test_faults.py` hunts every fault again.",
            "",
        ]
    return lines


def _table(titles: list[str], rows: list[list[str]]) -> list[str]:
    lines = [titles, ["---"] * len(titles), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def _fault(row: dict[str, Any]) -> list[str]:
    examples = f"{row['examples']} ({row['before']})" if row["before"] else f"{row['examples']}"
    return [
        *(row["name"], row["what"], "yes" if row["subtle"] else "", row["caught_by"] or "**escaped**", examples),
        *(f"{row['seconds']:.1f}", f"{row['cpu']:.1f}"),
    ]


def _control(row: dict[str, Any]) -> list[str]:
    outcome = row["caught_by"] or "survives"
    return [row["name"], row["what"], outcome, f"{row['before']}", f"{row['seconds']:.1f}", f"{row['cpu']:.1f}"]


if __name__ == "__main__":
    main()
