r"""Is what autograd calls the Jacobian the derivative of the function? A comparison with difference quotients.

Autograd differentiates what was recorded, and that is another function wherever a model reverses or rescales its
gradients, cuts a factor off with `detach()`, or brings a backward rule of its own. So J v is compared, for a random
direction v, with the central quotient

    D(h) = (f(x + h v) - f(x - h v)) / (2 h).

The error of D(h) is not known in advance: it is the rounding of f, which grows as 1 / h, and the curvature and the
kinks of f between the two points, which fade with h. Both are measured. The two one-sided quotients D+ and D- differ
by exactly these effects,

    D+(h) - D-(h) = (f(x + h v) - 2 f(x) + f(x - h v)) / h,

except for those that are odd around x, which show in D(h) - D(h / 4) instead. Their sum, with one rounding of the
output, is the uncertainty of D(h). Where it is small, a difference between D(h) and J v is a difference between the
function and the Jacobian.

The first step tried is sqrt(eps) times the size of x, where rounding and curvature weigh about the same. An ordinary
model agrees there, and the check has cost four runs. Otherwise steps of all sizes are tried. The function is refused if
two small steps in a row show another derivative, each with an uncertainty far below that derivative, and no step shows
agreement. A derivative of 0 has no such size to compare with; it refutes J v in float64 alone, where a move that is
lost in the rounding of some layer is so small that larger steps have shown agreement before. What remains is
undecided, and said to be so. A direction shows a wrong part of the Jacobian in the proportion of that part to the
whole, in the Frobenius norm: parts below the tolerance are not seen.
"""

from __future__ import annotations

import dataclasses as dc
import math
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lipbounds.errors import Unsupported


STEP_RATIO = 4.0
SMALL = 0.1  # an uncertainty above this share of the derivative decides nothing
# Times the size of x. A larger step may show agreement, but never a difference: it may miss what is fine.
REFUTING_STEP = {torch.float64: 1e-3, torch.float32: 1e-2, torch.float16: 0.25, torch.bfloat16: 0.25}
CAUSES = (
    "reversed or rescaled gradients, detach() or torch.no_grad() on a part, hooks on gradients, or a custom backward "
    "rule; whatever trains in that way, pass a function whose gradient is its derivative"
)


def tolerance_of(dtype: torch.dtype) -> float:
    """The relative difference that is let pass: some tens of times sqrt(eps), which a good quotient reaches.

    Args:
        dtype: that the function is run in.
    """
    return min(30 * math.sqrt(torch.finfo(dtype).eps), SMALL)


def check_repeatable(first: Float[Tensor, "..."], second: Float[Tensor, "..."]) -> None:
    """Refuse a function that gives two results at one input.

    Differences of a thousand roundings pass: sums on a GPU may be taken in any order.

    Args:
        first: output of one run.
        second: output of another run at the same input.

    Raises:
        Unsupported: they differ.
    """
    distance = torch.linalg.vector_norm(first.double() - second.double())
    allowed = 1e3 * torch.finfo(first.dtype).eps * torch.linalg.vector_norm(first.double())
    if not bool(distance <= allowed):
        raise Unsupported(
            f"the function must give the same output whenever it is run at x, got two that differ by {distance:.3g}; "
            "turn off what is random (model.eval(), F.dropout with training=False), or fix its noise."
        )


def check_derivative(
    function: Callable[[Tensor], Tensor],
    x: Float[Tensor, "..."],
    v: Float[Tensor, "..."],
    derivative: Float[Tensor, "..."],
    *,
    batch_dims: int,
    causes: str = CAUSES,
) -> Bool[Tensor, "..."]:
    """Refuse a function whose difference quotients are not its Jacobian times `v`.

    Args:
        function: run at `x` and near it, in the dtype of `x`.
        x: the input.
        v: the direction, of the shape of `x`, in any float dtype; of any length but 0.
        derivative: J v, of the shape of the output, in any float dtype.
        batch_dims: number of leading dimensions that hold independent items; each has a verdict of its own.
        causes: what may be the reason and what to do, for the message.

    Returns:
        For each item whether the quotients agree; False where they are too uncertain to tell.

    Raises:
        Unsupported: two runs differ, or the quotients of an item are another derivative than `derivative`.
    """
    quotients = _Quotients(function, x, v, derivative, batch_dims)
    agrees = quotients.first_look()
    if bool(agrees.all()):
        return agrees
    refuted, before = torch.zeros_like(agrees), torch.zeros_like(agrees)
    found = torch.zeros_like(quotients.wanted_size)
    coarser = None
    for step in quotients.steps():
        quotient = quotients.at(step, coarser)
        agrees |= quotient.agrees
        differs = quotient.differs & (step <= REFUTING_STEP[x.dtype])
        found = torch.where(differs & before & ~refuted, quotient.size, found)
        refuted |= differs & before
        before, coarser = differs, quotient
    wrong = refuted & ~agrees
    if bool(wrong.any()):
        at = int(wrong.flatten().int().argmax())
        raise Unsupported(
            "the Jacobian by autograd must be the derivative of the function, got "
            f"|J v| / |v| = {quotients.wanted_size.flatten()[at]:.6g} where moving x by v changes the output by "
            f"{found.flatten()[at]:.6g} times the step. Found in such functions: {causes}."
        )
    return agrees


@dc.dataclass(frozen=True, eq=False)
class _Quotient:
    """D at one step: its l2 norm for each batch item, and what it says of J v there."""

    value: Tensor
    size: Tensor
    agrees: Tensor
    differs: Tensor


class _Quotients:
    """Difference quotients along the unit direction of `v`, and how far each is from J v, for each batch item.

    A step is a share of the length of the item of x; where that is 0, of the length that entries of 1 would give.
    """

    def __init__(
        self, function: Callable[[Tensor], Tensor], x: Tensor, v: Tensor, derivative: Tensor, batch_dims: int
    ) -> None:
        self._function, self._x, self._batch_dims = function, x, batch_dims
        self._tolerance, self._eps = tolerance_of(x.dtype), torch.finfo(x.dtype).eps
        self._centre = self._run(x)
        check_repeatable(self._centre, self._run(x))
        self._centre = self._centre.double()
        length = self._size_of(v.double())
        length = torch.where(length > 0, length, 1.0)
        self._v = v.double() / self._over_items(length, v)
        self._wanted = derivative.double() / self._over_items(length, derivative)
        self.wanted_size = self._size_of(self._wanted)
        size = self._size_of(x.double())
        self._at_zero = bool((size == 0).any())
        self._size = torch.where(size > 0, size, math.sqrt(x[(0,) * batch_dims].numel()))
        self._rounding = self._eps * self._size_of(self._centre)

    def steps(self) -> list[float]:
        """From the size of x down to its rounding; further where x is 0, which has none."""
        smallest = 1e-15 if self._at_zero else 8 * self._eps
        return [STEP_RATIO**-k for k in range(1 + math.ceil(-math.log(smallest, STEP_RATIO)))]

    def first_look(self) -> Bool[Tensor, "..."]:
        """Whether the central quotient is J v up to the tolerance where rounding and curvature are about the same."""
        value = self._at(math.sqrt(self._eps))[0]
        size = torch.maximum(self._size_of(value), self.wanted_size)
        return self._size_of(value - self._wanted) <= self._tolerance * size

    def at(self, step: float, coarser: _Quotient | None) -> _Quotient:
        """D at a step, judged with the help of the quotient at the step before."""
        value, uncertainty = self._at(step)
        if coarser is not None:
            uncertainty = uncertainty + 2 * self._size_of(value - coarser.value)
        size, distance = self._size_of(value), self._size_of(value - self._wanted)
        larger = torch.maximum(size, self.wanted_size)
        allowed = uncertainty + self._tolerance * larger
        vanishes = size <= uncertainty
        sure = uncertainty <= SMALL * torch.where(vanishes, larger, size)
        sure &= ~vanishes | (self._x.dtype == torch.float64)
        return _Quotient(
            value=value,
            size=size,
            agrees=(uncertainty <= SMALL * larger) & (distance <= allowed),
            differs=sure & (distance > 3 * allowed),
        )

    def _at(self, step: float) -> tuple[Tensor, Tensor]:
        """D at a step, and its uncertainty but for what the next larger step adds to it."""
        length = step * self._size
        move = self._over_items(length, self._x) * self._v
        ahead, behind = (self._run((self._x.double() + sign * move).to(self._x.dtype)).double() for sign in (1, -1))
        wide = self._over_items(length, ahead)
        uncertainty = self._size_of((ahead - 2 * self._centre + behind) / wide) + 4 * self._rounding / length
        return (ahead - behind) / (2 * wide), 2 * uncertainty

    def _size_of(self, tensor: Tensor) -> Tensor:
        """The l2 norm of each item."""
        shape = tensor.shape[: self._batch_dims]
        return torch.linalg.vector_norm(tensor.reshape(*shape, -1), dim=-1)

    def _over_items(self, value: Tensor, like: Tensor) -> Tensor:
        return value.reshape(*value.shape, *(1,) * (like.dim() - self._batch_dims))

    def _run(self, x: Tensor) -> Tensor:
        return self._function(x).detach()
