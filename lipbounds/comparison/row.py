"""One number of a comparison, beside the truth."""

from __future__ import annotations

import dataclasses as dc

from lipbounds.claims import Kind, Norm, Scope


Group = tuple[Kind, Scope, Norm, float | None]


@dc.dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One number of one bound, at one block.

    Args:
        input: its name, for people.
        layer: the number of the attention call in the run, from 0.
        module: that made the call.
        item: the number of the batch item.
        bound: its registered name, or `truth`.
        kind: of the promise.
        scope: of the promise.
        norm: of the promise.
        radius: of the ball in l2; None at a point.
        delta: allowed probability of failure of a probable bound.
        value: the number.
        truth: the constant at the point from above; None without one in this norm.
        truth_from_below: the same from below.
        seconds: that the evaluation took, for all batch items together.
    """

    input: str
    layer: int
    module: str
    item: int
    bound: str
    kind: Kind
    scope: Scope
    norm: Norm
    radius: float | None
    delta: float | None
    value: float
    truth: float | None
    truth_from_below: float | None
    seconds: float

    @property
    def ratio(self) -> float | None:
        """How many times the truth the value is: at most, for an upper bound; at least, for a lower one."""
        against = self.truth if self.kind == "lower" else self.truth_from_below
        return self.value / against if against else None

    @property
    def group(self) -> Group:
        return self.kind, self.scope, self.norm, self.radius
