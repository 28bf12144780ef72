"""The local Lipschitz constant of a whole model at an input, bracketed by Lanczos."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lipbounds.claims import BoundResult, Claim
from lipbounds.estimators._krylov import largest_ritz_pair
from lipbounds.estimators._operator import JacobianOperator
from lipbounds.estimators._rayleigh import attained
from lipbounds.estimators.lanczos import lanczos_upper
from lipbounds.rounding import cast_down
from lipbounds.targets.network import Network


def whole_model_constant(
    function: nn.Module | Callable[[Tensor], Tensor],
    x: Float[Tensor, "..."],
    *,
    batch_dims: int = 1,
    delta: float = 1e-9,
    steps: int = 60,
    seed: int = 0,
) -> BoundResult:
    """Norm of the Jacobian of a whole model at `x`: an upper bound that fails with probability at most `delta` an item.

    Promise: as `lipbounds.estimators.lanczos.lanczos_upper` (Kuczynski and Wozniakowski 1992), for the function as
    float64 evaluates it. `terms["lower"]` is ||J v|| / ||v|| at the top Ritz vector, from below: the truth lies between
    the two. Says nothing about neighbours of `x`.

    Args:
        function: a module, which is copied to float64 and evaluation mode, or any callable that takes float64.
        x: the input; evaluated in float64.
        batch_dims: number of its leading dimensions that are batch; each output item must depend on its own item alone.
        delta: allowed probability of failure for each batch item, above 0 and below 1.
        steps: Lanczos steps; up to that dimension the dense norm is returned.
        seed: of the random start; chosen after looking at results it voids the probability.

    Raises:
        InvalidInput: an option is out of range; too few steps for a bound; see `Network` for the function.
        Unsupported: the function cannot be differentiated twice.
    """
    if isinstance(function, nn.Module):
        function = copy.deepcopy(function).double().eval()
    network = Network(function, x.detach().double(), batch_dims=batch_dims)
    value, terms = lanczos_upper(network, delta=delta, steps=steps, seed=seed)
    with torch.no_grad():
        operator = JacobianOperator(network)
        _, vector = largest_ritz_pair(operator, min(steps, operator.size), seed)
        lower, _ = attained(operator, vector)
    details = {name.removeprefix("detail."): term for name, term in terms.items() if name.startswith("detail.")}
    return BoundResult(
        name="whole_model_constant",
        value=value,
        claim=Claim(kind="probable", scope="point"),
        terms={"lower": cast_down(lower, torch.float64), "ritz": terms["ritz"]},
        details={**details, "relative_inflation": terms["relative_inflation"]},
        delta=delta,
    )
