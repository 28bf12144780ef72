r"""Rounding as a remainder of its own: a value whose coefficients are exact, plus one more term.

A value with c, C, T_s known up to e, e_C, e_s (row by row) is c + C h + sum_s T_s q_s + rho with the computed floats as
its coefficients, exactly, and |rho_j| <= e_j + r e_C,j + sum_s |q_s| e_s,j for every entry j. rho is a remainder like
any other: later layers carry it by the exact Jacobian, where errors carried entry by entry grow with |W| instead of W,
by orders of magnitude in every block.
"""

from __future__ import annotations

from torch import Tensor

from lipbounds.compose.taylor.coefficient import exact, norm_upper
from lipbounds.compose.taylor.model import CENTRE, INPUT, Range, Ranges, Value
from lipbounds.compose.taylor.operation import WithoutSecondOrder
from lipbounds.rounding import inflate


LARGEST_ERROR = 1e-9  # of the value at the centre, relative: beyond it the errors become a term


class Rounded(WithoutSecondOrder):
    """The same value with exact coefficients and the rounding as a term.

    Args:
        name: of the operation.
        value: with errors.
    """

    def __init__(self, name: str, value: Value) -> None:
        self.name, self.value = name, value
        self.output = value.each(lambda part: exact(part.matrix)).with_outputs(name)

    def measure(self, ranges: Ranges) -> Range:
        """See the top of this file."""
        coefficients = self.value.coefficients
        box = coefficients[CENTRE].error + ranges.per_radius(ranges.radii, coefficients[INPUT].error)
        for name, part in self.value.terms.items():
            box = box + ranges.per_radius(ranges.known[name].ball, part.error)
        box = inflate(box, 2 * len(coefficients) + 8).flatten(1)
        return Range(ball=norm_upper(box), box=box)

    def beyond(self, rows: Tensor, error: Tensor, ranges: Ranges) -> Tensor:
        """sum |v_j| |rho_j|."""
        box = ranges.known[self.name].box
        assert box is not None
        return inflate(box @ rows.abs().mT + norm_upper(box).unsqueeze(1) * error, box.shape[1] + 8)


def needs_rounding(value: Value) -> bool:
    """Whether the errors have grown so far that a term of their own pays for itself."""
    return value.moves and bool(value.centre_error.amax() > LARGEST_ERROR * value.centre.abs().amax())
