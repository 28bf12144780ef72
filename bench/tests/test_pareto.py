"""Which bound for which budget: the front, and what the page says of what has no number."""

from __future__ import annotations

from typing import Any

from bench.speed.pareto import BLOCKS, methods, points
from bench.speed.pareto_tables import costs_and_ratios, front, section


def row(method: str | None, cost: float = 1.0, value: float = 2.0, **answer: Any) -> dict[str, Any]:
    return {"block": "b", "method": method, "answer": answer or {"ratio": [cost] * 3, "value": value}}


ROWS = [row(None), row("slow", 9.0, 2.2), row("cheap", 1.5, 8.0), row("worse", 3.0, 9.0), row("no", error="too long")]


def test_what_a_cheaper_bound_undercuts_is_not_on_the_front() -> None:
    found = costs_and_ratios(ROWS, "b")
    assert [name for name, _, _ in found] == ["cheap", "worse", "slow"]
    assert front(found) == [("cheap", 1.5, 4.0), ("slow", 9.0, 1.1)]


def test_the_page_names_the_front_and_what_has_no_number() -> None:
    text = "\n".join(section(ROWS))
    assert "**b**: `cheap` 1.500 passes, 4.00x; `slow` 9.00 passes, 1.100x." in text
    assert "`no`: too long" in text
    assert section([]) == []


def test_every_block_gets_its_truth_first_and_every_bound() -> None:
    asked = list(points())
    assert [point.method for point in asked[: len(BLOCKS)]] == [None] * len(BLOCKS)
    assert len(asked) == len(BLOCKS) * (1 + len(methods()))
    assert {"sharp", "sharp_cheap", "yudin2025.biased", "lanczos_posterior"} <= set(methods())
