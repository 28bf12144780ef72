"""How far QK-norm and its Jacobian, computed in float64, can be from exact ones.

The relative error of the inverse root mean square r is at most that of the mean square, t, where t <= 1/2; for larger t
all that is taken is 0 < r <= eps^(-1/2). Everything else is multilinear. Proof: docs/derivatives.md, section 12.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.derivatives.rounding.matrices import OWN_ROUNDING, Pair
from lipbounds.rounding import gamma
from lipbounds.targets.rms_norm import RmsNorm


UNDERFLOW = 2.0**-1000  # squares of numbers below 2**-511 may be lost


class NormRoundoff:
    """Sizes and errors of a norm and of its Jacobian at one input.

    Args:
        norm: the norm.
        computed: what is projected, z', as computed in float64.
        projected: its size and error.
    """

    def __init__(self, norm: RmsNorm, computed: Float[Tensor, "*batch heads n head_dim"], projected: Pair) -> None:
        self.norm = norm
        self.weight = Pair(norm.per_token.abs())
        self.root = _inverse_root(norm, computed, projected)
        unit = projected * self.root
        assert unit.error is not None  # both are computed
        largest = norm.width**0.5 * OWN_ROUNDING
        self.unit = Pair(unit.size.clamp(max=largest), unit.error.clamp(max=2 * largest))

    @property
    def normalised(self) -> Pair:
        """N(z), the rounding of the last products included."""
        pair = self.unit * self.weight
        assert pair.error is not None
        return Pair(pair.size, (pair.error + 2 * gamma(8) * pair.size) * OWN_ROUNDING)

    def jvp(self, tangent: Pair) -> Pair:
        """Of dN; the roundings of this product are left to the caller to count.

        Args:
            tangent: of dz.
        """
        return self._without_radial(tangent) * self.weight

    def vjp(self, cotangent: Pair) -> Pair:
        """Of the transposed Jacobian times a covector, likewise.

        Args:
            cotangent: of the covector.
        """
        return self._without_radial(cotangent * self.weight)

    def _without_radial(self, change: Pair) -> Pair:
        radial = (self.unit * change).sum(self.norm.axes, keepdim=True)
        share = Pair(radial.size.new_full((), 1 / self.norm.width))
        return self.root * (change + self.unit * (radial * share))


def _inverse_root(norm: RmsNorm, computed: Tensor, projected: Pair) -> Pair:
    """r; see the top of the file."""
    assert projected.error is not None
    error = projected.error
    found = norm.total(computed.square()) / norm.width + norm.eps
    moved = norm.total(error * (2 * computed.abs() + error)) / norm.width + UNDERFLOW
    relative = (moved / found) * OWN_ROUNDING + 2 * gamma(norm.width + 16)
    known = relative < 0.5
    root = norm.inverse_root(computed)
    size = torch.where(known, root * (1 + 2 * relative), norm.eps**-0.5) * OWN_ROUNDING
    return Pair(size, torch.where(known, root * relative * OWN_ROUNDING, size))
