"""Numbers for people: few digits, on the side on which the promise still holds."""

from __future__ import annotations

import math
from decimal import ROUND_CEILING, ROUND_FLOOR, ROUND_HALF_EVEN, Decimal

from lipbounds.claims import Kind


DIGITS = 3
SIDES = {"proved": ROUND_CEILING, "probable": ROUND_CEILING, "lower": ROUND_FLOOR, "estimate": ROUND_HALF_EVEN}


def rounded(value: float, kind: Kind, digits: int) -> Decimal:
    """A finite number with that many digits: upper bounds rounded up, lower bounds down, estimates to the nearest.

    Args:
        value: finite.
        kind: of the promise.
        digits: that count.
    """
    exact = Decimal(value)
    if not exact:
        return Decimal(0)
    short = exact.quantize(Decimal(1).scaleb(exact.adjusted() - digits + 1), rounding=SIDES[kind])
    # 9.996 became 10.00, which has a digit too many.
    return short.quantize(Decimal(1).scaleb(short.adjusted() - digits + 1))


def shown(value: float, kind: Kind, digits: int = DIGITS) -> str:
    """A number with a few digits, rounded to the side on which its promise still holds.

    Args:
        value: may be infinite.
        kind: of the promise.
        digits: that are shown.
    """
    if not math.isfinite(value):
        return str(value)
    short = rounded(value, kind, digits)
    if short and not 1e-3 <= abs(short) < 1e6:
        return f"{float(short):.{digits - 1}e}"
    return f"{int(short)}" if short == short.to_integral_value() and abs(short) >= 10 ** (digits - 1) else f"{short:f}"


def counted(number: int | None, what: str, many: str = "") -> str:
    """A number with its noun, in the plural unless it is 1: "1 image", "2 images".

    Args:
        number: of the things; None where it is not known.
        what: one of them.
        many: several of them, where that is not `what` with an s.
    """
    return f"{number} {what if number == 1 else many or what + 's'}"
