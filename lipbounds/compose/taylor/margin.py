r"""Lower bounds on the margins of a classifier over balls, from its Taylor model.

With the margin m_j = f_y - f_j as one more linear map, m_j(x0 + h) = m_j + g . h + sum_s v_s . q_s(h), v_s the row of
T_s. Splitting q_s = B_s + sum_p X_sp[q_p, .] + rest_s (lipbounds.compose.taylor.operation), over |h| <= r

    m_j(x0 + h) >= m_j - e_j + min ( g . h + h^T M h ) - sum_p sup |q_p^T K_p h| - sum_s sup |v_s . rest_s|,

M = sum_s v_s . B_s and K_p = sum_s v_s . X_sp. M is half the Hessian of the margin and K_p its mixed derivative by the
remainder of p and the input, both formed exactly, so that what operations do to each other cancels. The minimum is that
of lipbounds.compose.taylor.quadratic. For a network that begins with a linear map onto fewer numbers, h is of that
many (lipbounds.compose.taylor.narrow). Where the second order is followed (lipbounds.compose.taylor.second), M is that
of the margin, and p^T K h, p the products of pairs of inputs, is one of the q_p^T K_p h. The margin is also at least
m_j - e_j - r |g| - sum_s sup |v_s . q_s|.
"""

from __future__ import annotations

import dataclasses as dc
from functools import partial
from typing import TypeGuard

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.compose.one_input import network_of_input
from lipbounds.compose.taylor.ball import Ball, Norm
from lipbounds.compose.taylor.crossed import Crossed, Summed
from lipbounds.compose.taylor.model import CENTRE, INPUT, Order, Ranges, Value
from lipbounds.compose.taylor.narrow import narrow_start, whole_start
from lipbounds.compose.taylor.network import LARGEST_VALUE, Walk
from lipbounds.compose.taylor.operation import Operation
from lipbounds.compose.taylor.quadratic import Quadratic
from lipbounds.compose.taylor.relu import Relu
from lipbounds.compose.taylor.second import SECOND, as_matrices
from lipbounds.compose.taylor.smooth import SmoothPointwise
from lipbounds.compose.taylor.touching import Cases, Sum, Touching
from lipbounds.errors import InvalidInput, Unsupported
from lipbounds.rounding import inflate
from lipbounds.targets.layers import Layer


# Shares of a margin. Where less is proved than the first, activations are followed along the worst direction, which
# takes longer; not where as much is missing as the second.
LITTLE, HOPELESS = 0.25, -2.0
LARGEST_INPUT = 4096  # the Jacobian has a column for each


class TaylorMargin:
    """A classifier at one input, prepared for balls of any radius around it.

    Over 150 lines, because all lower bounds of a margin, of which the best counts, share the model and its forms.

    Args:
        network: in float64; one token of logits comes out.
        x: one input, without batch dimensions, in float64.
        label: the class whose margins are bounded.
        largest: how many floats the coefficients of one value may have together.
        norm: of the balls; see lipbounds.compose.taylor.ball.
        order: to which values are followed.

    Raises:
        InvalidInput: the output is not one token, or attention has batch dimensions.
        Unsupported: a layer without a rule, or too large.
    """

    @torch.no_grad()
    def __init__(
        self,
        network: Layer,
        x: Float[Tensor, "..."],
        label: int,
        *,
        largest: float = LARGEST_VALUE,
        norm: Norm = "l2",
        order: Order = 2,
    ) -> None:
        if x.numel() > LARGEST_INPUT:
            raise Unsupported(f"method='taylor' takes inputs of at most {LARGEST_INPUT} numbers, got {x.numel()}.")
        walk, network = Walk(largest), network_of_input(network)
        start = narrow_start(network, x, order) if norm == "l2" else whole_start(network, x, order)
        output = walk.through(start.layers, start.value, None)
        if output.centre.dim() != 2 or output.centre.shape[0] != 1:
            raise InvalidInput(f"the output must be one token of logits, got shape {tuple(output.centre.shape)}.")
        self.operations: list[Operation] = walk.operations
        self.output, self._stretch = output, start.stretch
        others = [index for index in range(output.centre.shape[1]) if index != label]

        def differences(logits: Tensor) -> Tensor:
            return logits[..., 0, [label]] - logits[..., 0, others]

        def sums(logits: Tensor) -> Tensor:
            return logits[..., 0, [label]] + logits[..., 0, others]

        self.margins: Value = output.summed(differences, sums, 2)
        self._ball = None if norm == "l2" else Ball(norm, x.numel())
        self._plain: Sum | None = None
        self._quadratic: Quadratic | None = None
        self._crossed: list[Crossed] = []

    @property
    def at_point(self) -> Float[Tensor, " others"]:
        """Lower bounds on the margins at the input, but for rounding that is a remainder of its own."""
        centre = self.margins.coefficients[CENTRE]
        return centre.matrix[0] - inflate(centre.error, 2)

    @property
    def slopes(self) -> Float[Tensor, " others"]:
        """Norms of the gradients of the margins at the input, dual to that of the balls, rounded up."""
        return self._moved(self.margins.norms(INPUT, 0)) if self._ball is None else self._ball.of(self.margins.linear)

    def _moved(self, lengths: Tensor) -> Tensor:
        """Lengths of h as lengths of what the coefficients multiply, rounded up (lipbounds.compose.taylor.narrow)."""
        return lengths if self._stretch == 1 else inflate(lengths * self._stretch, 2)

    def ranges(self, radii: Float[Tensor, " radii"]) -> Ranges:
        """What is known of every operation over the balls.

        Args:
            radii: of the balls.
        """
        ranges = Ranges(self._moved(radii), self._ball)
        for operation in self.operations:
            known = operation.measure(ranges)
            ranges.known[operation.name] = dc.replace(known, functional=partial(_functional, operation, ranges))
        return ranges

    def lower(self, radii: Float[Tensor, " radii"]) -> Float[Tensor, "radii others"]:
        """Proved lower bounds on the margins over the balls.

        Args:
            radii: of the balls, > 0.
        """
        return self.evaluate(radii)[0]

    @torch.no_grad()
    def evaluate(self, radii: Float[Tensor, " radii"]) -> tuple[Tensor, Float[Tensor, " radii"]]:
        """Proved lower bounds on the margins over the balls, and the radius that each ball proves.

        Inside a ball of radius R in which a margin may fall to 0, m - r |g| - (what the remainders do on R) is positive
        up to the radius r that is returned.

        Args:
            radii: of the balls, > 0.
        """
        ranges = self.ranges(radii)
        first, rest = ranges.linear_and_rest(self.margins, 0)
        simple = -inflate(first + rest, 4)
        inside = ((self.at_point - inflate(rest, 4)) / inflate(self.slopes, 4)).clamp(min=0)
        inside = inside.nan_to_num(nan=0.0) * (1 - 8 * torch.finfo(inside.dtype).eps)
        if self._quadratic is None:
            self._second_order()
        assert self._quadratic is not None
        curved = self._quadratic.lower(ranges.own, self._ball)
        others, entrywise = torch.zeros_like(curved), torch.zeros_like(curved)
        for crossed in self._crossed:
            others = others + crossed.upper(ranges)
        for operation in self.operations:
            beyond = operation.beyond(*self._rows(operation), ranges)
            if self._touchable(operation):
                entrywise = entrywise + beyond
            else:
                others = others + beyond
        terms = 2 * len(self.operations) + 4
        loss = torch.maximum(simple, curved - inflate(others + entrywise, terms))
        loss = torch.maximum(loss, self._touching(loss, ranges) - inflate(others, terms))
        ranges.known.clear()  # what is known refers back to the ranges, and these hold gigabytes
        lower = self.at_point + loss - 4 * torch.finfo(loss.dtype).eps * (self.at_point.abs() + loss.abs())
        inside = torch.where(lower >= 0, radii.unsqueeze(1), torch.minimum(inside, radii.unsqueeze(1)))
        return lower, inside.amin(1)

    def _touchable(self, operation: Operation) -> TypeGuard[SmoothPointwise | Relu]:
        """Parabolas of smooth activations bend, and are no good in balls whose corners are far away."""
        return isinstance(operation, Relu) or (isinstance(operation, SmoothPointwise) and self._ball is None)

    def _touching(self, loss: Tensor, ranges: Ranges) -> Tensor:
        """What activations and the second order make of the margins at most, where `loss` leaves little of them."""
        found = torch.full_like(loss, -torch.inf)
        activations = [each for each in self.operations if self._touchable(each)]
        proved, size = self.at_point + loss, self.at_point.abs()
        worth = (proved <= LITTLE * size) & (proved >= HOPELESS * size)
        balls, rows = worth.nonzero().unbind(1)
        if not activations or not len(balls):
            return found
        assert self._quadratic is not None
        assert self._plain is not None
        points = torch.stack([self._quadratic.smallest_at(radius, self._ball) for radius in ranges.own])[balls, rows]
        touching = Touching([(each, *self._rows(each)) for each in activations], ranges, self._plain)
        found[balls, rows] = touching.lower(Cases(balls, rows, points))
        return found

    def _rows(self, operation: Operation) -> tuple[Tensor, Tensor]:
        """The functionals v_s of the margins, and the error of each."""
        part = self.margins.coefficients[operation.name]
        return part.matrix.mT, part.error

    def _second_order(self) -> None:
        """Adds up the forms of all operations."""
        gradient = self.margins.coefficients[INPUT]
        rows, inputs = gradient.matrix.shape[1], len(gradient.matrix)
        total = Summed(gradient.matrix.new_zeros(rows, inputs, inputs))
        crossed: dict[str, Summed] = {}
        if self.margins.second:
            total.add(*as_matrices(self.margins.coefficients[SECOND]))
        for operation in self.operations:
            functionals = self._rows(operation)
            if not self.margins.second:
                total.add(*operation.quadratic(*functionals))
            for name, (matrix, error) in operation.crossed(*functionals).items():
                crossed.setdefault(name, Summed(torch.zeros_like(matrix))).add(matrix, error)
        self._plain = Sum(gradient.matrix.mT, total.matrix, gradient.error, total.error)
        self._quadratic = self._plain.quadratic()
        self._crossed = [Crossed(name, each.matrix, each.error) for name, each in crossed.items()]


def _functional(operation: Operation, ranges: Ranges, rows: Tensor, error: Tensor) -> Tensor | None:
    return operation.functional(rows, error, ranges)
