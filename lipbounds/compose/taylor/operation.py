r"""What every nonlinear operation of a Taylor model answers.

An operation y = f(u) splits its output at u = c + C h + e, e the remainders before it, as

    f(u) = f(c) + f'(c) (u - c) + q(h),        q = B[h, h] + t(h),

B the quadratic part that C h alone makes, exact, and t the rest. With f'' the second derivative at c and e = sum_s T_s
q_s,

    t(h) = f''[e, C h] + (f''[e, e] / 2 + derivatives of third order) = sum_s X_s[q_s, h] + (the rest).

Four things are asked of an operation: a `Range` of q for what comes later; and for a functional v of its outputs the
matrices of v . B and of every v . X_s, which the margin adds up over all operations, and a bound on what v makes of the
rest (`beyond`). Where the second order is followed (lipbounds.compose.taylor.second), B goes into that coefficient of
the output instead, the remainder that goes by the name of the operation is t alone, and the range is that of t; D[h, h]
then is a part of e like the T_s t_s.
"""

from __future__ import annotations

import abc

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.compose.taylor.coefficient import Coefficient
from lipbounds.compose.taylor.model import Range, Ranges, Value
from lipbounds.compose.taylor.second import SECOND


class Operation(abc.ABC):
    """A nonlinear operation of the network; its remainder is the term of that name in later values.

    Args:
        name: unique in the network.
    """

    name: str
    output: Value

    @property
    def moves(self) -> bool:
        """Whether there is a remainder: not where the input of the operation does not move."""
        return self.name in self.output.coefficients

    @property
    def second(self) -> bool:
        """Whether the remainder is t: the second order is a coefficient of its own."""
        return self.output.second

    @abc.abstractmethod
    def bend(self) -> Coefficient | None:
        """B as a coefficient with a column for every pair of inputs; None: 0."""

    def bent(self, coefficients: dict[str, Coefficient]) -> Value:
        """The output before its own remainder: with B in the second order, where that is followed.

        Args:
            coefficients: of the linearisation, f(c) + f'(c) (u - c).
        """
        own = self.bend() if SECOND in coefficients else None
        if own is None:
            return Value(coefficients)
        return Value(coefficients | {SECOND: coefficients[SECOND].plus(own)})

    @abc.abstractmethod
    def measure(self, ranges: Ranges) -> Range:
        """Bounds on the remainder over the balls.

        Args:
            ranges: with those of all operations before.
        """

    @abc.abstractmethod
    def quadratic(
        self, rows: Float[Tensor, "rows outputs"], error: Float[Tensor, " rows"]
    ) -> tuple[Float[Tensor, "rows inputs inputs"], Float[Tensor, " rows"]]:
        """Matrices M with v . B[h, h] = h^T M h, and a bound on the Frobenius norm of their error.

        Args:
            rows: functionals v, as computed.
            error: of each, in l2.
        """

    @abc.abstractmethod
    def crossed(
        self, rows: Float[Tensor, "rows outputs"], error: Float[Tensor, " rows"]
    ) -> dict[str, tuple[Float[Tensor, "rows terms inputs"], Float[Tensor, " rows"]]]:
        """Matrices K_s with v . X_s[q, h] = q^T K_s h, by the name of s, and a bound on the error of each in the
        Frobenius norm.

        Args:
            rows: functionals v, as computed.
            error: of each, in l2.
        """

    @abc.abstractmethod
    def beyond(
        self, rows: Float[Tensor, "rows outputs"], error: Float[Tensor, " rows"], ranges: Ranges
    ) -> Float[Tensor, "radii rows"]:
        """Bound on what v makes of the rest over the balls.

        Args:
            rows: functionals v, as computed.
            error: of each, in l2.
            ranges: with those of this operation.
        """

    def functional(
        self, rows: Float[Tensor, "rows outputs"], error: Float[Tensor, " rows"], ranges: Ranges
    ) -> Float[Tensor, "radii rows"] | None:
        """Bound on |v . q| for many functionals at once, from the quadratic forms; None: too costly, or not better.

        Args:
            rows: functionals v, as computed.
            error: of each, in l2.
            ranges: with those of this operation.
        """
        return None


class WithoutSecondOrder(Operation):
    """An operation whose remainder is counted as a whole: B = 0 and t = q.

    Args:
        value: its input.
    """

    value: Value

    def bend(self) -> None:
        """None: there is no second order."""

    def quadratic(self, rows: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
        """Zeros."""
        inputs = len(self.value.linear.matrix)
        return rows.new_zeros(len(rows), inputs, inputs), torch.zeros_like(error)

    def crossed(self, rows: Tensor, error: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """None."""
        return {}
