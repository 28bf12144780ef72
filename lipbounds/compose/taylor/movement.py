"""How the logits of a softmax move over balls; the symbols are those of lipbounds.compose.taylor.softmax."""

from __future__ import annotations

import dataclasses as dc

from jaxtyping import Float
from torch import Tensor


FAR = 760.0  # e^-760 is below the smallest float


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


def row_error(logits: Float[Tensor, "*rows keys"], error: Float[Tensor, "*rows keys"]) -> Float[Tensor, "*rows 1"]:
    """Bound on the error of the logits of a row, without keys of no weight: many masks hide keys by huge logits.

    What is left out has a weight below the smallest normal float in every case, and 0 as computed.

    Args:
        logits: as computed; -infinity hides a key.
        error: of each.
    """
    top = logits.argmax(-1, keepdim=True)
    below = logits - logits.gather(-1, top) + (error + error.gather(-1, top)) * (1 + 1e-9)
    hidden = (below < -FAR) & ~logits.isneginf()
    return error.masked_fill(hidden, 0.0).amax(-1, keepdim=True)
