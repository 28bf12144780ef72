"""The task `claims`: verdicts from the numbers, the page from the records of others, and the pages that quote it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench import __main__ as program
from bench.claims import quoting, rows
from bench.engine.machine import ROOT
from bench.pages.page import markers


BEGIN, END = markers("claims")


def compared(**changes: Any) -> dict[str, Any]:
    row = {"setting": "jasmin", "reference": "none", "measure": "l2 0.5 worst", "family": "accuracies"}
    return {**row, "mean": 0.1, "half": 0.05, "p": 0.001, "corrected": 0.01, **changes}


@pytest.mark.parametrize(
    ("row", "sign", "expected"),
    [
        (compared(), 1, "holds"),
        (compared(mean=-0.1), 1, "contradicted"),
        (compared(corrected=0.2), 1, "does not show"),
        (compared(half=None, p=None), 1, "not tested (one seed)"),
        (compared(measure="clean", mean=-0.1), 0, "contradicted"),
        (compared(measure="clean", corrected=0.2), 0, "holds"),
        (compared(measure="clean", mean=0.0, corrected=0.2), 0, "open: the interval allows a loss"),
        (compared(measure="blocks", family="constants", mean=-0.3), -1, "holds"),
        (compared(measure="blocks", family="constants", mean=0.3), -1, "contradicted"),
    ],
)
def test_a_verdict_follows_the_corrected_test_and_the_claimed_sign(
    row: dict[str, Any], sign: int, expected: str
) -> None:
    assert rows._verdict(row, sign) == expected


def test_effects_have_their_intervals_and_verdicts_that_differ_are_counted() -> None:
    assert rows._effect(compared()) == "+10.0 [+5.0, +15.0] points"
    assert rows._effect(compared(half=None)) == "+10.0 points"
    assert rows._effect(compared(family="constants", mean=0.0, half=None)) == "x 1.000"
    assert rows._together(["holds", "holds"]) == "holds"
    assert rows._together(["holds", "contradicted", "holds"]) == "mixed: holds in 2, contradicted in 1"


def test_a_reported_rise_is_judged_under_the_weak_attack_beside_the_worst_case() -> None:
    titles, words = {"jasmin": "JaSMin"}, {"measure": "l_inf 0.05 weak"}
    worst = compared(measure="l_inf 0.05 worst", mean=-0.02, half=0.01)
    for (mean, half), verdict in {
        (0.15, 0.04): "reproduced",
        (0.01, 0.05): "not reproduced",
        (0.05, 0.06): "open: 10 points are possible",
    }.items():
        (found,) = rows._reported([compared(**words, mean=mean, half=half), worst], "ViT", "page.md", titles)
        assert found.verdict == verdict
        assert "worst case -2.0 [-3.0, -1.0] points" in found.effect
    assert rows._reported([worst], "ViT", "page.md", titles) == []


def test_theta_is_judged_by_the_share_of_rows_from_below_and_above() -> None:
    def claim(low: float, high: float) -> str:
        block = {"rows": 10, "theta_near_1": [low, high], "theta_mean": [low, high], "layer": 0}
        return rows._theta({"model": [block]}, "page.md").verdict

    assert claim(0.99, 1.0) == "holds"
    assert claim(0.5, 0.6) == "holds for a part of the rows"
    assert claim(0.0, 0.01) == "contradicted"


def test_pages_quote_the_table_with_their_own_links(tmp_path: Path) -> None:
    results, docs = tmp_path / "results", tmp_path / "docs"
    results.mkdir()
    docs.mkdir()
    (results / "claims.md").write_text(f"# Claims\n\n{BEGIN}\n[a](a.md)\n{END}\n")
    page, bare = docs / "page.md", docs / "bare.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    bare.write_text("nothing\n")
    assert quoting.update([page, bare], results, check=True) == [page]
    assert "old" in page.read_text()
    assert quoting.update([page, bare], results, check=False) == [page]
    assert page.read_text() == f"before\n{BEGIN}\n[a](../results/a.md)\n{END}\nafter\n"
    assert quoting.update([page, bare], results, check=True) == []
    assert bare.read_text() == "nothing\n"


def test_where_nothing_was_measured_only_what_was_not_tested_is_listed(tmp_path: Path) -> None:
    assert program.main(["claims", "--results", str(tmp_path)], []) == 0
    table = (tmp_path / "claims.md").read_text()
    assert table.count("not tested") == 2  # in both tables
    assert "Yudin et al. 2025" not in table.partition("Made by")[0]


def test_the_pages_of_this_repository_quote_the_current_table() -> None:
    assert quoting.update([ROOT / "README.md", *program.QUOTING], ROOT / "results", check=True) == []
