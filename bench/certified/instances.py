"""Every radius of the page in one file of comma-separated values, for who wants to compare with it."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from lipbounds.files import write_atomically


COLUMNS = ("model", "model_hash", "image", "method", "radius", "norm", "kind", "correct", "delta", "seconds")


def write(data: dict[str, Any], folder: Path) -> Path:
    """Write `certified_instances.csv` and return its path.

    Args:
        data: what `bench.certified.task.shown` returned.
        folder: where the file goes.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for name, model in data["models"].items():
        for row in (*model["certificates"], *model["smoothing"]):
            method, delta = row.get("method", "smoothing"), row.get("delta", "")
            found = (row["radius"], row.get("norm", "l2"), row["kind"], row["correct"], delta, f"{row['seconds']:.2f}")
            writer.writerow((name, row["weights"], row["image"], method, *found))
    path = folder / "certified_instances.csv"
    write_atomically(path, text.getvalue().encode())
    return path
