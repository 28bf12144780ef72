"""The logits of a network with a bound on the rounding of its forward pass: a Taylor model in which nothing moves."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.compose.rewrite import flat
from lipbounds.compose.taylor.coefficient import exact
from lipbounds.compose.taylor.model import CENTRE, Value
from lipbounds.compose.taylor.network import Walk
from lipbounds.targets.layers import Layer


@torch.no_grad()
def forward_with_error(
    network: Layer, x: Float[Tensor, "..."]
) -> tuple[Float[Tensor, "tokens features"], Float[Tensor, "tokens features"]]:
    """The output as computed, and a bound on how far each entry is from that of real arithmetic.

    Args:
        network: in float64.
        x: one input, without batch dimensions, in float64.

    Raises:
        Unsupported: a layer whose rounding is not analysed.
    """
    output = Walk().through(flat([("", network)]), Value({CENTRE: exact(x.unsqueeze(0))}), None)
    return output.centre, output.centre_error
