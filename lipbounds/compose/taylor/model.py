r"""A Taylor model: a value of the network as a function of the displacement h of the input, |h| <= r.

    X(x0 + h) = c + C h + sum_s T_s q_s(h),

c the value at the centre, C the exact Jacobian there, and for every nonlinear operation s before X what the operation
adds to its own linearisation, q_s(h), carried here by the exact Jacobian T_s of everything between. Nothing is dropped:
q_s is a function of h, and what is known of it over the ball is a `Range`. Linear maps act on c, C and T_s alike.

Reach of a view of X (an entry, a token, all of a head): |X - c - C h| <= sum_s min over what is known of q_s, of

    ||T_s|| |q_s|_2 ,   | |T_s| box_s |_2 ,   sum over groups g of ||T_s,g||_F |q_s,g|_2 ,

and |C h| <= r ||C||. Small inputs are followed to second order: one more coefficient D, and what is left of the
remainders beyond it (lipbounds.compose.taylor.second).
"""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.compose.taylor.ball import Ball
from lipbounds.compose.taylor.coefficient import Coefficient, Map, exact, norm_upper
from lipbounds.compose.taylor.norms import form_norms, view_norms
from lipbounds.compose.taylor.second import LARGEST_SQUARE, SECOND, no_second
from lipbounds.rounding import gamma, inflate, product


CENTRE, INPUT = "centre", "input"
Order = Literal[1, 2]  # to which every value is followed; margins are followed to the second in any case


class Value:
    """One value of the network as a Taylor model.

    Args:
        coefficients: its coefficients, by the name of what they multiply: 1, h, or the remainder of an operation.
    """

    def __init__(self, coefficients: dict[str, Coefficient]) -> None:
        self.coefficients = coefficients
        self._norms: dict[tuple[str, int], Tensor] = {}
        self._groups: dict[tuple[str, int], Tensor] = {}

    @property
    def centre(self) -> Float[Tensor, "*shape"]:
        """c, as computed."""
        return self.coefficients[CENTRE].matrix[0]

    @property
    def centre_error(self) -> Float[Tensor, "*shape"]:
        """Bound on how far c is from the exact value, entry by entry."""
        return self.coefficients[CENTRE].error

    @property
    def linear(self) -> Coefficient:
        """C."""
        return self.coefficients[INPUT]

    @property
    def terms(self) -> dict[str, Coefficient]:
        """T_s, by the names of the operations, and the second order."""
        return {name: part for name, part in self.coefficients.items() if name not in (CENTRE, INPUT)}

    @property
    def second(self) -> bool:
        """Whether the second order is a coefficient of its own, and remainders are what is beyond it."""
        return SECOND in self.coefficients

    @property
    def moves(self) -> bool:
        """Whether anything of it depends on the input; a value of a centre alone is a running error analysis."""
        return self.coefficients.keys() != {CENTRE}

    def each(self, change: Callable[[Coefficient], Coefficient]) -> Value:
        """The same linear change of every coefficient.

        Args:
            change: of one coefficient.
        """
        return Value({name: change(part) for name, part in self.coefficients.items()})

    def arranged(self, rearrange: Map) -> Value:
        """Entries moved, dropped or repeated; see `Coefficient.arranged`."""
        return self.each(lambda part: part.arranged(rearrange))

    def summed(self, weigh: Map, absolute: Map, terms: int) -> Value:
        """Sums of entries; see `Coefficient.summed`."""
        return self.each(lambda part: part.summed(weigh, absolute, terms))

    def shifted(self, constants: Tensor | None) -> Value:
        """Given floats added to the value.

        Args:
            constants: None: nothing.
        """
        if constants is None:
            return self
        return Value(self.coefficients | {CENTRE: self.coefficients[CENTRE].shifted(constants)})

    def plus(self, other: Value) -> Value:
        """The sum of two values.

        Args:
            other: of the same shape.
        """
        return Value(together(self.coefficients, other.coefficients))

    def with_outputs(self, name: str) -> Value:
        """The value with the remainder of the operation that made it; unchanged if it does not move.

        Args:
            name: of the operation.
        """
        if not self.moves:
            return self
        shape = self.centre.shape
        identity = torch.eye(shape.numel(), dtype=self.centre.dtype, device=self.centre.device)
        return self.with_term(name, exact(identity.reshape(-1, *shape)))

    def with_term(self, name: str, term: Coefficient) -> Value:
        """The value with the remainder of one more operation in it.

        Args:
            name: of the operation.
            term: its coefficient.
        """
        return Value(self.coefficients | {name: term})

    def norms(self, name: str, dims: int) -> Float[Tensor, "*lead"]:
        """Spectral norm, rounded up, of the coefficient restricted to each view: the last `dims` axes together.

        Args:
            name: of the coefficient.
            dims: 0: entries.
        """
        if (name, dims) not in self._norms:
            part = self.coefficients[name]
            forms = name == SECOND and dims == 0
            self._norms[name, dims] = form_norms(part) if forms else view_norms(part, dims)
        return self._norms[name, dims]

    def group_norms(self, name: str, groups: int) -> Float[Tensor, " groups *shape"]:
        """l2 norms of the parts of each row that belong to the groups of an operation's outputs.

        Args:
            name: of the coefficient.
            groups: how many groups, each of as many neighbouring columns.
        """
        if (name, groups) not in self._groups:
            part = self.coefficients[name]
            split = part.matrix.unflatten(0, (groups, -1)).movedim(1, -1)
            self._groups[name, groups] = inflate(norm_upper(split) + part.error, 2)
        return self._groups[name, groups]


def starting_value(x: Float[Tensor, "*shape"], order: Order = 2) -> Value:
    """The input itself.

    Args:
        x: float64.
        order: see `with_second`.
    """
    identity = torch.eye(x.numel(), dtype=x.dtype, device=x.device).reshape(-1, *x.shape)
    return with_second({CENTRE: exact(x.unsqueeze(0)), INPUT: exact(identity)}, order)


def with_second(coefficients: dict[str, Coefficient], order: Order = 2) -> Value:
    """A value that is linear in the input, followed to second order where the input is small enough.

    Args:
        coefficients: c and C.
        order: 1: to first order however small the input is.
    """
    inputs = len(coefficients[INPUT].matrix)
    if order == 2 and inputs <= LARGEST_SQUARE:
        coefficients = coefficients | {SECOND: no_second(inputs, coefficients[CENTRE].matrix[0])}
    return Value(coefficients)


def together(one: dict[str, Coefficient], other: dict[str, Coefficient]) -> dict[str, Coefficient]:
    """Sums of coefficients of the same name.

    Args:
        one: coefficients by name.
        other: of the same shape.
    """
    names = dict.fromkeys([*one, *other])
    return {
        name: one[name].plus(other[name]) if name in one and name in other else one.get(name, other.get(name))
        for name in names
    }  # pyright: ignore[reportReturnType]


@dc.dataclass(frozen=True, eq=False)
class Range:
    """What is known of the remainder q of an operation over the balls of K radii.

    Args:
        ball: on its l2 norm.
        box: on the absolute value of every output.
        groups: on the l2 norms of groups of as many neighbouring outputs.
        functional: bounds |v . q| for rows v known up to an error, `[radii, rows]`, or gives None.
    """

    ball: Float[Tensor, " radii"]
    box: Float[Tensor, "radii outputs"] | None = None
    groups: Float[Tensor, "radii groups"] | None = None
    functional: Callable[[Tensor, Tensor], Tensor | None] = lambda rows, error: None


class Ranges:
    """Balls of K radii, and the ranges of the operations met so far.

    Args:
        radii: of the balls of the input, rounded up.
        ball: their shape; None: Euclidean. `radii` are those of Euclidean balls around them, `own` their own.
    """

    def __init__(self, radii: Float[Tensor, " radii"], ball: Ball | None = None) -> None:
        self.ball, self.own = ball, radii
        self.radii = radii if ball is None else ball.euclidean(radii)
        self.known: dict[str, Range] = {SECOND: Range(ball=inflate(self.radii.square(), 2))}
        self.notes: dict[str, Any] = {}  # what operations keep for `beyond`
        self._entries: dict[tuple[Value, str], Tensor] = {}
        self._duals: dict[Value, Tensor] = {}

    def linear_and_rest(
        self, value: Value, dims: int
    ) -> tuple[Float[Tensor, " radii *lead"], Float[Tensor, " radii *lead"]]:
        """Bounds on |C h| and on |X - c - C h| of each view.

        Args:
            value: the value.
            dims: how many trailing axes a view has; 0: entries.
        """
        first = self.linear(value, dims)
        rest = torch.zeros_like(first)
        for name in value.terms:
            rest = rest + self._one(value, name, dims)
        return inflate(first, 4), inflate(rest, len(value.terms) + 8)

    def linear(self, value: Value, dims: int) -> Float[Tensor, " radii *lead"]:
        """Bound on |C h| of each view, by the Euclidean norm and by the dual one, entry by entry.

        Args:
            value: the value.
            dims: how many trailing axes a view has; 0: entries.
        """
        first = self.per_radius(self.radii, value.norms(INPUT, dims))
        if self.ball is None:
            return first
        if value not in self._duals:
            self._duals[value] = self.ball.of(value.linear)
        entries = self._duals[value]
        whole = entries if dims == 0 else norm_upper(entries.flatten(entries.dim() - dims))
        return torch.minimum(first, self.per_radius(self.own, whole))

    def total(self, value: Value, dims: int) -> Float[Tensor, " radii *lead"]:
        """Bound on |X - c| of each view.

        Args:
            value: the value.
            dims: how many trailing axes a view has; 0: entries.
        """
        first, rest = self.linear_and_rest(value, dims)
        return inflate(first + rest, 2)

    def _one(self, value: Value, name: str, dims: int) -> Tensor:
        entries = self.entry(value, name)
        whole = entries if dims == 0 else norm_upper(entries.flatten(entries.dim() - dims))
        ball = self.per_radius(self.known[name].ball, value.norms(name, dims))
        return torch.minimum(whole, ball)

    def entry(self, value: Value, name: str) -> Float[Tensor, " radii *shape"]:
        """What an operation can do to every entry of a value.

        Args:
            value: the value.
            name: of the operation.
        """
        if (value, name) not in self._entries:
            part, known = value.coefficients[name], self.known[name]
            best = self.per_radius(known.ball, value.norms(name, 0))
            if known.box is not None:
                flat = part.matrix.flatten(1).abs()
                boxed = inflate((known.box @ flat).unflatten(1, part.error.shape), flat.shape[0] + 4)
                best = torch.minimum(best, boxed + self.per_radius(norm_upper(known.box), part.error))
            if known.groups is not None:
                groups = value.group_norms(name, known.groups.shape[1])
                best = torch.minimum(best, torch.tensordot(known.groups, groups, 1) * (1 + gamma(4 * len(groups))))
            formed = known.functional(part.matrix.flatten(1).mT, part.error.flatten())
            if formed is not None:
                best = torch.minimum(best, formed.unflatten(1, part.error.shape))
            self._entries[value, name] = best.nan_to_num(nan=torch.inf)
        return self._entries[value, name]

    @staticmethod
    def per_radius(values: Float[Tensor, " radii"], norms: Float[Tensor, "*lead"]) -> Float[Tensor, " radii *lead"]:
        """Every number of a radius times every norm, 0 times infinity being 0.

        Args:
            values: one for each radius.
            norms: one for each view.
        """
        return product(values.reshape(-1, *[1] * norms.dim()), norms)
