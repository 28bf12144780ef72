r"""Lower bounds of margins that follow activations along the worst direction, where bounds entry by entry add up.

What a margin loses to an activation y = f(u), u = c + x + e with x = C h, is largest at another h for every entry. Here
each v_i rho_i(u_i), rho what f adds to the part that the margin follows exactly, is bounded below by a parabola in x
that is tight near x*_i = C_i h*, h* where the margin is expected to be smallest:

    v_i rho_i >= p_i + lambda_i (x_i - x*_i) - K_i (x_i - x*_i)^2 / 2 + kappa_i e_i - (what is left).

Summed over all entries and activations, p is a constant, lambda C joins the gradient, and C^T diag(K) C the Hessian of
the margin, whose minimum over the ball is bounded as before (lipbounds.compose.taylor.quadratic): it pays for an entry
only what the entry does in the direction that pays best for all. kappa . e is one functional of the remainders before.
Every h* is right; the minimiser of the last parabola is the next one.

Smooth f, a >= |x + e|: rho(d) = f(c + d) - f(c) - f'(c) d - f''(c) d^2 / 2, and by Taylor's theorem at x*, |x*| <= a,

    v rho(d) >= v rho(x*) + v rho'(x*) (d - x*) - K_0 (d - x*)^2 / 2,   K_0 = sup -v (f''(c + t) - f''(c)), |t| <= a,

and (x + e - x*)^2 <= (1 + eta) (x - x*)^2 + (1 + 1/eta) e^2 for any eta > 0.

For relu see lipbounds.compose.taylor.relu.
"""

from __future__ import annotations

import dataclasses as dc
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lipbounds.compose.taylor.coefficient import norm_upper
from lipbounds.compose.taylor.model import CENTRE, Ranges, Value
from lipbounds.compose.taylor.quadratic import Quadratic
from lipbounds.rounding import UNIT_ROUNDOFF, gamma, inflate


ROUNDS = 2  # parabolas tried for each margin and ball, each touching where the one before is smallest


@dc.dataclass(frozen=True, eq=False)
class Cases:
    """Pairs of a ball and a margin.

    Args:
        ball: the number of the ball.
        row: the number of the margin.
        points: h*, in the ball.
    """

    ball: Int[Tensor, " cases"]
    row: Int[Tensor, " cases"]
    points: Float[Tensor, "cases inputs"]

    def select(self, of_balls: Float[Tensor, " radii *shape"]) -> Float[Tensor, "cases entries"]:
        """For each case the numbers of its ball.

        Args:
            of_balls: numbers of every entry of a value for every ball.
        """
        return of_balls.flatten(1)[self.ball]

    def of_ball(self, ball: int) -> Tensor:
        """The cases of one ball."""
        return (self.ball == ball).nonzero().flatten()


@dc.dataclass(frozen=True, eq=False)
class Parabolas:
    """For each case, a lower bound of what an activation adds, as parabolas of x = C h of every entry.

    Args:
        value: whose entries they are.
        touch: x*, exact floats.
        heights: p, as computed.
        slopes: lambda, as computed.
        bends: K >= 0, rounded up.
        carried: kappa, as computed.
        lost: all that is left, and the rounding of the others, >= 0.
    """

    value: Value
    touch: Float[Tensor, "cases entries"]
    heights: Float[Tensor, "cases entries"]
    slopes: Float[Tensor, "cases entries"]
    bends: Float[Tensor, "cases entries"]
    carried: Float[Tensor, "cases entries"]
    lost: Float[Tensor, " cases"]


def finite(found: Parabolas) -> Parabolas:
    """The same parabolas; no parabola, and all lost, for cases with a number that is not finite.

    Args:
        found: may hold infinity and NaN.
    """
    every = torch.stack([found.touch, found.heights, found.slopes, found.bends, found.carried])
    known = (every.isfinite().all(0).all(1) & found.lost.isfinite()).unsqueeze(1)
    touch, heights, slopes, bends, carried = torch.where(known, every, 0.0)
    lost = torch.where(known.squeeze(1), found.lost, torch.inf)
    return Parabolas(found.value, touch, heights, slopes, bends, carried, lost)


@runtime_checkable
class Touchable(Protocol):
    """An activation with such lower bounds."""

    def touched(self, rows: Tensor, error: Tensor, cases: Cases, ranges: Ranges) -> Parabolas:
        """Parabolas below all that `beyond` of the operation bounds entry by entry.

        Args:
            rows: functionals v, one for each case.
            error: of each, in l2.
            cases: balls, margins and h*.
            ranges: with those of this operation.
        """
        ...


def remainders(parabolas: Parabolas, cases: Cases, ranges: Ranges) -> Float[Tensor, " cases"]:
    """Bound on |kappa . e|.

    Args:
        parabolas: of one activation.
        cases: balls and margins.
        ranges: of the balls.
    """
    weights = parabolas.carried
    if not bool(weights.any()):
        return torch.zeros_like(parabolas.lost)
    terms = weights.shape[1] + 2
    moving = Value({name: part for name, part in parabolas.value.coefficients.items() if name != CENTRE})
    carried = moving.summed(_weighed(weights), _weighed(weights.abs()), terms)
    _, rest = ranges.linear_and_rest(carried, 0)
    return rest[cases.ball, torch.arange(len(cases.ball), device=rest.device)]


def _weighed(weights: Tensor):
    """Sums over the entries of a value with the weights of each case; columns may stand in front."""

    def weigh(t: Tensor) -> Tensor:
        return t.flatten(1) @ weights.mT

    return weigh


class Sum:
    """The Hessian, gradient and constant of the margins of one ball, with parabolas added.

    Args:
        slopes: gradients of the margins.
        matrices: halves of their Hessians; only the symmetric part counts.
        slope_error: of each gradient, in l2.
        matrix_error: of each matrix, in the Frobenius norm.
    """

    def __init__(self, slopes: Tensor, matrices: Tensor, slope_error: Tensor, matrix_error: Tensor) -> None:
        self.slopes, self.matrices = slopes, matrices
        self.slope_error, self.matrix_error = slope_error, matrix_error
        self.constant = torch.zeros_like(slope_error)

    def of_rows(self, rows: Tensor) -> Sum:
        """The same of some of the margins.

        Args:
            rows: their numbers.
        """
        return Sum(self.slopes[rows], self.matrices[rows], self.slope_error[rows], self.matrix_error[rows])

    def add(self, parabolas: Parabolas, cases: Tensor) -> None:
        """Parabolas of one activation.

        Args:
            parabolas: of all cases.
            cases: those of this ball.
        """
        linear = parabolas.value.linear
        matrix, sizes = linear.matrix.flatten(1), linear.sizes.flatten()
        count = matrix.shape[1]
        touch, bends = parabolas.touch[cases], parabolas.bends[cases]
        tilt = bends * touch
        slopes = parabolas.slopes[cases] + tilt
        self.slopes = self.slopes + slopes @ matrix.mT
        weighed = (parabolas.slopes[cases].abs() + tilt.abs()) @ sizes
        self.slope_error = inflate(self.slope_error + gamma(count + 8) * (weighed + norm_upper(self.slopes)), 8)
        terms = parabolas.heights[cases], -parabolas.slopes[cases] * touch, -tilt * touch / 2
        total = self.constant + torch.stack([term.sum(1) for term in terms]).sum(0)
        off = torch.stack([term.abs().sum(1) for term in terms]).sum(0) + self.constant.abs() + total.abs()
        self.constant = total - inflate(parabolas.lost[cases] + gamma(count + 16) * off, count + 16)
        parts = []
        for row in bends:  # one margin at a time: most entries do not bend, and not the same ones
            kept = matrix[:, row > 0]
            parts.append((kept * row[row > 0]) @ kept.mT / 2)
        self.matrices = self.matrices - torch.stack(parts)
        bent = bends @ sizes.square() + 2 * norm_upper(self.matrices.flatten(1))
        self.matrix_error = inflate(self.matrix_error + gamma(count + 8) * bent, count + 16)

    def quadratic(self) -> Quadratic:
        """What the constant is added to."""
        return Quadratic(self.slopes, self.matrices, self.slope_error, self.matrix_error)


class Touching:
    """Lower bounds of some margins over some balls, by parabolas in place of what activations lose entry by entry.

    Args:
        operations: the activations, with the functionals of all margins on each and the error of each functional.
        ranges: of the balls.
        plain: the gradients and Hessians of all margins, without parabolas.
    """

    def __init__(self, operations: list[tuple[Touchable, Tensor, Tensor]], ranges: Ranges, plain: Sum) -> None:
        self._operations, self._ranges, self._plain = operations, ranges, plain

    def lower(self, cases: Cases) -> Float[Tensor, " cases"]:
        """The best of a few rounds.

        Args:
            cases: balls and margins, with points to begin with.
        """
        best = torch.full_like(cases.points[:, 0], -torch.inf)
        for _ in range(ROUNDS):
            found, points = self._round(cases)
            best, cases = torch.maximum(best, found), dc.replace(cases, points=points)
        return best

    def _round(self, cases: Cases) -> tuple[Tensor, Tensor]:
        """The bounds with parabolas near these points, and where they are smallest."""
        all_parabolas: list[Parabolas] = []
        carried = torch.zeros_like(cases.points[:, 0])
        for operation, rows, error in self._operations:
            parabolas = operation.touched(rows[cases.row], error[cases.row], cases, self._ranges)
            carried = carried + remainders(parabolas, cases, self._ranges)
            all_parabolas.append(parabolas)
        found, points = torch.zeros_like(carried), torch.zeros_like(cases.points)
        for ball in cases.ball.unique().tolist():
            own = cases.of_ball(ball)
            total = self._plain.of_rows(cases.row[own])
            for parabolas in all_parabolas:
                total.add(parabolas, own)
            quadratic, radius = total.quadratic(), self._ranges.own[[ball]]
            found[own] = total.constant + quadratic.lower(radius, self._ranges.ball)[0]
            points[own] = quadratic.smallest_at(radius[0], self._ranges.ball)
        off = inflate(carried, len(all_parabolas) + 2) + 4 * UNIT_ROUNDOFF * found.abs()
        return (found - off).nan_to_num(nan=-torch.inf), points
