"""The copy of the headline table in README.md, and the check that it is the current one."""

from __future__ import annotations

import json
from pathlib import Path

from bench.engine.records import RecordError, check_schema
from bench.tightness.aggregate import AGGREGATES_VERSION
from bench.tightness.tables import headline
from lipbounds.files import write_atomically


# Few enough for a page that is read in a minute; results/tightness.md has all of them.
BOUNDS = (
    "sharp",
    "sharp_fast",
    "sharp_cheap",
    "covariance.exact",
    "centred.products",
    "yudin2025.biased",
    "yudin2025.theorem3",
)
BEGIN = "<!-- tightness:begin -->"
END = "<!-- tightness:end -->"


def block(aggregates_path: Path) -> str:
    """What stands between the markers.

    Args:
        aggregates_path: `results/tightness.json`.

    Raises:
        RecordError: the file is missing or of another schema version.
    """
    if not aggregates_path.exists():
        raise RecordError(f"{aggregates_path} must exist, and does not; run `python -m bench` first.")
    aggregates = json.loads(aggregates_path.read_text(encoding="utf-8"))
    check_schema(aggregates, str(aggregates_path), AGGREGATES_VERSION)
    return headline(aggregates, bounds=BOUNDS).rstrip()


def insert(text: str, table: str) -> str:
    """`text` with `table` between the markers, in place of what was there.

    Raises:
        RecordError: the markers are not there exactly once, in order.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in before + after:
        raise RecordError(
            f"the README must hold {BEGIN} and after it {END}, each on its own line and once, got it without; add them "
            "where the table belongs."
        )
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def update(readme: Path, aggregates_path: Path, *, check: bool) -> bool:
    """Whether the README held the current table; writes it unless `check`.

    Args:
        readme: path of the README.
        aggregates_path: `results/tightness.json`.
        check: only look.

    Raises:
        RecordError: the README has no markers; there are no aggregates.
    """
    old = readme.read_text(encoding="utf-8")
    new = insert(old, block(aggregates_path))
    if new != old and not check:
        write_atomically(readme, new.encode())
    return new == old
