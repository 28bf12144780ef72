"""How the logits of a softmax move over balls; the symbols are those of lipbounds.compose.taylor.softmax."""

from __future__ import annotations

import dataclasses as dc

from torch import Tensor


@dc.dataclass(frozen=True, eq=False)
class Movement:
    """What is known of the rows over the balls; shapes [radii, heads, n, m], without m for w.

    Args:
        first: U, of the centred logits.
        rest: W.
        upper: up.
        deviation: D.
        variance: w.
        own: s, the part of the deviation that C h makes.
    """

    first: Tensor
    rest: Tensor
    upper: Tensor
    deviation: Tensor
    variance: Tensor
    own: Tensor
