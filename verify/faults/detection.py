"""Which check catches which planted fault: `python -m verify.faults.detection` writes results/detection.{md,json}."""

from __future__ import annotations

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

from verify.faults.catalogue import CONTROLS, FAULTS, NOT_EXPRESSIBLE
from verify.faults.hunt import DEEPER, MAX_EXAMPLES, SECONDS, SEED, SHORT_SECONDS, hunt


RESULTS = Path(__file__).parents[2] / "results"
COMMAND = "OMP_NUM_THREADS=1 python -m verify.faults.detection"
JOBS = 2  # processes, one thread each
CONTROL_EXAMPLES = 20


def main() -> None:
    """Hunt every fault and every control and write the two files."""
    begun = time.monotonic()
    with multiprocessing.get_context("spawn").Pool(JOBS) as pool:
        rows = pool.map(_row, [*FAULTS, *CONTROLS], chunksize=1)
    faults, controls = rows[: len(FAULTS)], rows[len(FAULTS) :]
    record = {
        "command": COMMAND,
        "environment": _environment(),
        "seed": SEED,
        "max_examples": MAX_EXAMPLES,
        "falsify_seconds": SECONDS,
        "control_examples": CONTROL_EXAMPLES,
        "seconds": round(time.monotonic() - begun, 1),
        "faults": faults,
        "controls": controls,
        "not_expressible": NOT_EXPRESSIBLE,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "detection.json").write_text(json.dumps(record, indent=1) + "\n")
    (RESULTS / "detection.md").write_text(_report(record))


def _row(name: str) -> dict[str, Any]:
    torch.set_num_threads(1)
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
        f"**{len(caught)} of {len(faults)} faults caught**, {sum(bool(row['caught_by']) for row in subtle)} of "
        f"{len(subtle)} subtle ones; {len(survived)} of {len(controls)} sound bounds survive (a false alarm is a bug).",
        "",
        "By check: " + ", ".join(f"{check} {count}" for check, count in checks.most_common()) + ".",
        "",
        f"Command: `{record['command']}`, {record['seconds']:.0f} s in all. Environment: "
        + ", ".join(f"{key} {value}" for key, value in record["environment"].items())
        + ".",
        "",
        f"Order: `value`, `tight`, `falsify` (ascent) for {SHORT_SECONDS:.0f} s, the other checks in the order of",
        f"`lipbounds.testing.contract.CHECKS`; for what survives `falsify` for {record['falsify_seconds']:.0f} s and",
        f"`value` with {DEEPER} times as many blocks. At most {record['max_examples']} blocks a check, seed "
        f"{record['seed']}, no shrinking.",
        "Examples: blocks that the catching check tried until the failure (for `falsify`: starting points), and in",
        "brackets those tried before it by others. Seconds: for all of it, wall time and CPU time; others used the",
        "machine, too.",
        "",
        "| fault | what is wrong | subtle | caught by | examples | seconds | CPU |",
        "|---|---|---|---|---:|---:|---:|",
        *(_line(row) for row in faults),
        "",
        "## Escaped",
        "",
        *([f"- {row['name']}: {row['what']}" for row in faults if not row["caught_by"]] or ["None."]),
        "",
        "## Sound bounds that must survive",
        "",
        "| bound | what it is | outcome | examples | seconds | CPU |",
        "|---|---|---|---:|---:|---:|",
        *(_control_line(row) for row in controls),
        "",
        "## Not expressible yet",
        "",
        *(f"- {what}: {why}." for what, why in record["not_expressible"].items()),
    ]
    return "\n".join(lines) + "\n"


def _line(row: dict[str, Any]) -> str:
    what = row["what"].replace("|", "\\|")
    examples = f"{row['examples']} ({row['before']})" if row["before"] else f"{row['examples']}"
    subtle = "yes" if row["subtle"] else ""
    caught_by = row["caught_by"] or "**escaped**"
    return f"| {row['name']} | {what} | {subtle} | {caught_by} | {examples} | {row['seconds']:.1f} | {row['cpu']:.1f} |"


def _control_line(row: dict[str, Any]) -> str:
    outcome = row["caught_by"] or "survives"
    return f"| {row['name']} | {row['what']} | {outcome} | {row['before']} | {row['seconds']:.1f} | {row['cpu']:.1f} |"


if __name__ == "__main__":
    main()
