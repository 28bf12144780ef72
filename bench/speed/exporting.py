"""The measured records in the format of pytest-benchmark, for its `compare` and dashboards that read it."""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lipbounds.files import write_atomically


VERSION = "5.1.0"  # of pytest-benchmark, whose format this is
UNKNOWN = ("min", "max", "mean", "stddev", "ops", "total")  # the records keep quartiles, and nothing is invented


def content(data: dict[str, Any], started: str) -> dict[str, Any]:
    """What the file holds: one benchmark for each method and size that was measured.

    Args:
        data: the content of speed.json.
        started: the time of the export, in ISO 8601.
    """
    rows = [row for row in data["rows"] if "cost" in row["answer"]]
    code = ", ".join(dict.fromkeys(row["answer"]["code"] for row in rows))
    return {
        "machine_info": {"node": "", "cpu": {"brand_raw": data["place"]["hardware"]}, **data["place"]},
        "commit_info": {"id": code, "dirty": False, "time": started, "branch": ""},
        "benchmarks": [_benchmark(row) for row in rows],
        "datetime": started,
        "version": VERSION,
    }


def _benchmark(row: dict[str, Any]) -> dict[str, Any]:
    answer = row["answer"]
    low, median, high = answer["cost"]
    shape = ", ".join(f"{name} = {value}" for name, value in answer["shape"].items())
    known = {"median": median, "q1": low, "q3": high, "iqr": high - low, "rounds": answer["repeats"], "iterations": 1}
    return {
        "group": shape,
        "name": row["method"],
        "fullname": f"bench speed::{row['method']}[{row['axis']}={row['value']}]",
        "params": None,
        "param": None,
        "options": {"timer": "processor time" if answer["device"] == "cpu" else "CUDA events"},
        "extra_info": {
            "ratio to a forward pass": answer["ratio"],
            "peak memory in MB": answer.get("megabytes"),
        },
        "stats": {
            **dict.fromkeys(UNKNOWN, math.nan),
            **known,
            "outliers": "-",
        },
    }


def export(numbers: Path, path: Path) -> None:
    """Write the file.

    Args:
        numbers: `speed.json`.
        path: of the file.
    """
    data = json.loads(numbers.read_text(encoding="utf-8"))
    started = datetime.now(UTC).isoformat()
    write_atomically(path, (json.dumps(content(data, started), indent=1) + "\n").encode())
