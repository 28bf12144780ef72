"""The constant of a whole network at a point, proved: the norm of its Jacobian, with all rounding."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.claims import BoundResult, Claim, check_result
from lipbounds.compose.joint import JointNetwork
from lipbounds.compose.one_input import network_of_input
from lipbounds.errors import InvalidInput
from lipbounds.rounding import cast_up
from lipbounds.targets.given import given_tensor
from lipbounds.targets.layers import Layer


@torch.no_grad()
def proved_constant(network: Layer, x: Float[Tensor, "batch ..."] | Any) -> BoundResult:
    """Upper bound on the norm of the Jacobian of a network at each input, above the truth by what rounding may do.

    Promise: proved, at the point, in the l2 norm, for the function that the floats of the network define in real
    arithmetic. The Jacobian is formed layer by layer as a matrix, and its norm taken. Its distance to the exact one is
    bounded by what lipbounds.compose.joint bounds on a ball of radius 0: the rounding of every product, and, by the
    curvature of the layers, that of the inputs that they got. `terms["rounding"]` bounds how far the output at `x`, as
    computed, is from the exact one.

    Args:
        network: no layer may have more than 4096 inputs or outputs in all tokens together.
        x: inputs, one batch dimension; a tensor, a NumPy array, or a list.

    Raises:
        InvalidInput: `x` has no batch dimension, or does not fit.
        Unsupported: the network is too large, or has a layer without a rule; `lipbounds.estimators.whole_model` has a
            probable bound for any.
    """
    x = given_tensor("x", x)
    if x.dim() < 3 or len(x) == 0:
        raise InvalidInput(f"x must hold inputs with one batch dimension, at least one, got shape {tuple(x.shape)}.")
    networks = [network_of_input(network, index, len(x)) for index in range(len(x))]
    found = [JointNetwork(own, item).bound(0.0) for own, item in zip(networks, x, strict=True)]
    value = torch.stack([one.norm for one in found])
    value = cast_up(value, x.dtype if x.dtype.is_floating_point else torch.float64)
    check_result("proved_constant", value, torch.Size([len(x)]))
    lost = torch.stack([one.lost for one in found])
    claim = Claim(kind="proved", scope="point")
    return BoundResult(name="proved_constant", value=value, claim=claim, terms={"rounding": lost})
