"""The nightly search: what it runs, how it resumes, what its page says."""

from __future__ import annotations

import json
from pathlib import Path

from lipbounds import registry
from verify import nightly


def row(bound: str = "a.bound", check: str = "value", **fields: object) -> nightly.Row:
    made: nightly.Row = {"bound": bound, "version": 1, "supports": ["heads"], "check": check, "examples": 50}
    made |= {"seed": 0, "refuted": ""}
    return made | {"tried": 50, "seconds": 1.5, "environment": {"torch": "2", "hypothesis": "6"}} | fields


def test_every_bound_is_attacked_and_the_values_come_first() -> None:
    wanted = nightly.tasks(50)
    assert {name for name, *_ in wanted} == {spec.name for spec in registry.standing()}
    values = [check == "value" for *_, check, _ in wanted]
    assert any(values)
    assert values == sorted(values, reverse=True)
    spec = registry.get("yudin2025.biased")
    assert (spec.name, spec.version, tuple(sorted(spec.supports)), nightly.ASCENT, 50) in wanted


def test_a_check_gives_a_line() -> None:
    found = nightly.attack(("exact", 1, ("heads",), "returns", 40))
    assert (found["bound"], found["check"], found["tried"], found["refuted"]) == ("exact", "returns", 10, "")


def test_a_killed_run_loses_the_line_in_flight_only(tmp_path: Path) -> None:
    path = tmp_path / "nightly.jsonl"
    path.write_text(json.dumps(row()) + "\n" + json.dumps(row(check="finite"))[:20])
    assert list(nightly.read(path)) == [nightly.key(row())]
    with path.open("a") as file:
        file.write(json.dumps(row(check="batch")) + "\n")
    assert len(nightly.read(path)) == 2


def test_the_page_counts_and_names_what_was_refuted() -> None:
    rows = [row(), row(check=nightly.ASCENT, worst_ratio=0.5), row("b.bound", refuted="too small\nby half")]
    page = nightly.page(rows)
    assert "**1 of 2 survive.**" in page
    assert "| `a.bound` | 1 | 50 | 3 | nothing | 0.500000000 |" in page
    assert "| `b.bound` | 1 | 50 | 2 | value | - |" in page
    assert "too small\nby half" in page


def test_the_page_names_what_was_not_attacked_to_the_end() -> None:
    page = nightly.page([row()], ["b.bound"])
    assert "**1 of 1 survive.**" in page
    assert "Not attacked to the end yet: `b.bound`." in page
    assert "b.bound" not in nightly.page([row()])
