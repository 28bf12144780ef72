"""Ticks and labels of logarithmic axes."""

from __future__ import annotations

import pytest
from matplotlib.figure import Figure

from bench.pages.figure_files import arrange
from bench.pages.log_axes import label, log_scale


@pytest.mark.parametrize(
    ("value", "expected"),
    [(1.0, "1"), (0.001, "0.001"), (0.0005, "5·10⁻⁴"), (50.0, "50"), (1e4, "10000"), (1e5, "10⁵"), (2e-12, "2·10⁻¹²")],
)
def test_labels_say_the_number_without_mathtext(value: float, expected: str) -> None:
    assert label(value) == expected


@pytest.mark.parametrize(
    ("values", "base", "expected"),
    [
        ((1, 5000), 10, ["1", "10", "100", "1000"]),
        ((2, 60), 10, ["2", "5", "10", "20", "50"]),
        ((4, 16), 2, ["4", "8", "16"]),
    ],
)
def test_ticks_are_few(values: tuple[int, int], base: int, expected: list[str]) -> None:
    axes = Figure().subplots()
    axes.plot(values, values)
    log_scale(axes.yaxis, base)
    low, high = axes.get_ylim()
    ticks = zip(axes.yaxis.get_majorticklocs(), axes.yaxis.get_majorticklabels(), strict=True)
    assert [text.get_text() for place, text in ticks if low <= place <= high] == expected
    assert not len(axes.yaxis.get_minorticklocs())


def test_margins_are_round() -> None:
    canvas = Figure()
    canvas.subplots().set_title("a title")
    arrange(canvas)
    assert 0 < canvas.subplotpars.left == round(canvas.subplotpars.left, 4)
    assert canvas.get_layout_engine() is None
