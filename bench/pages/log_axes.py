"""Logarithmic axes with few ticks and plain labels, which are cheap to draw: a tick is five artists and each mathtext
label is parsed and laid out."""

from __future__ import annotations

import math

from matplotlib.axis import Axis
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator


_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
PLAIN = range(-3, 5)  # exponents of ten whose numbers are written out


def log_scale(axis: Axis, base: int = 10) -> None:
    """Make an axis logarithmic, with ticks at the powers of the base alone, or at 1, 2 and 5 times them in two decades.

    Call it once the data are drawn: the ticks are chosen for the limits that the axis has then.

    Args:
        axis: `axes.xaxis` or `axes.yaxis`.
        base: 2, or 10.
    """
    (axis.axes.set_xscale if axis is axis.axes.xaxis else axis.axes.set_yscale)("log")
    low, high = sorted(axis.get_view_interval())
    few = base == 10 and high < 100 * low
    axis.set_major_locator(LogLocator(base=base, subs=(1.0, 2.0, 5.0) if few else (1.0,)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: label(value)))


def label(value: float) -> str:
    """A number of few digits as a label: written out, or as a power of ten.

    Args:
        value: > 0.
    """
    exponent = math.floor(math.log10(value) + 1e-9)
    if exponent in PLAIN:
        return f"{value:g}"
    digits = value / 10.0**exponent
    power = f"10{str(exponent).translate(_RAISED)}"
    return power if math.isclose(digits, 1) else f"{digits:g}·{power}"
