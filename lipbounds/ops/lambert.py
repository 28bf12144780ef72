r"""The inverse of phi(x) = x e^(x+1), the function in the constants of L2 attention, rounded up."""

from __future__ import annotations

import math

from lipbounds.errors import InvalidInput


# phi in floats is off by at most (x + 4) 2^-52 relative: the rounding of x + 1 becomes one of exp times x + 1, and
# math.exp is within an ulp or two. x stays below 50 for every number of tokens.
SLACK = 2.0**-45


def phi_inverse_upper(y: int) -> float:
    """The x >= 0 with x e^(x+1) = y, rounded up; in terms of Lambert's W it is W(y/e).

    Bisection: the upper end of the interval is a float at which phi is at least y for certain.

    Args:
        y: an integer from 0 to 2^53.

    Raises:
        InvalidInput: `y` is outside.
    """
    if not 0 <= y <= 2**53:
        raise InvalidInput(f"y must be an integer from 0 to 2^53, got y={y}.")
    if y == 0:
        return 0.0
    low, high = 0.0, 50.0  # phi(50) > 2^53
    while low < (middle := (low + high) / 2) < high:
        if middle * math.exp(middle + 1) * (1 - SLACK) >= y:
            high = middle
        else:
            low = middle
    return high
