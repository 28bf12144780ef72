"""The local Lipschitz constant of a whole model at an input, bracketed by Lanczos."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from lipbounds.claims import BoundResult, Claim
from lipbounds.errors import LipboundsError, Unsupported
from lipbounds.estimators._krylov import largest_ritz_pair
from lipbounds.estimators._operator import JacobianOperator
from lipbounds.estimators._rayleigh import attained
from lipbounds.estimators.lanczos import lanczos_upper
from lipbounds.rounding import cast_down
from lipbounds.targets.derivative_check import CAUSES, check_derivative
from lipbounds.targets.given import given_tensor
from lipbounds.targets.module_copy import module_copy
from lipbounds.targets.network import Network, detached_call, plain_kernels


DTYPE_CAUSES = (
    "layers whose function changes with the dtype, such as nn.RMSNorm(eps=None): give it the eps of the dtype that the "
    f"model runs in; {CAUSES}"
)


def whole_model_constant(
    function: nn.Module | Callable[[Tensor], Tensor],
    x: Float[Tensor, "..."] | Any,
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

    The Jacobian is compared with difference quotients: of the float64 function in a random direction and, for a module
    in another dtype, of the module as it is, in that direction and in the one that is stretched most.
    `details["derivative_checked"]` is False for the items where these are too uncertain to tell, as at a kink.

    Args:
        function: a module, which is copied to float64 and evaluation mode, or any callable that takes float64.
        x: the input, a tensor, a NumPy array, or a list; evaluated in float64.
        batch_dims: number of its leading dimensions that are batch; each output item must depend on its own item alone.
        delta: allowed probability of failure for each batch item, above 0 and below 1.
        steps: Lanczos steps; up to that dimension the dense norm is returned.
        seed: of the random start; chosen after looking at results it voids the probability.

    Raises:
        InvalidInput: an option is out of range; too few steps for a bound; see `Network` for the function.
        Unsupported: the function cannot be differentiated twice; its gradient is not its derivative, or it is another
            function in float64; two runs differ; a module cannot be copied, or its copy cannot run in float64.
    """
    x = given_tensor("x", x)
    wide = module_copy(function, torch.float64) if isinstance(function, nn.Module) else function
    network = Network(wide, x.detach().double(), batch_dims=batch_dims)
    checked = first_use(network)
    value, terms = lanczos_upper(network, delta=delta, steps=steps, seed=seed)
    with torch.no_grad():
        operator = JacobianOperator(network)
        _, vector = largest_ritz_pair(operator, min(steps, operator.size), seed)
        lower, _ = attained(operator, vector)
        if isinstance(function, nn.Module):
            stretched = vector if operator.size == operator.in_size else operator.vjp(vector)
            checked = checked & same_in_its_own_dtype(function, network, x, stretched.reshape(x.shape))
    details = {name.removeprefix("detail."): term for name, term in terms.items() if name.startswith("detail.")}
    return BoundResult(
        name="whole_model_constant",
        value=value,
        claim=Claim(kind="probable", scope="point"),
        terms={"lower": cast_down(lower, torch.float64), "ritz": terms["ritz"]},
        details={**details, "relative_inflation": terms["relative_inflation"], "derivative_checked": checked},
        delta=delta,
    )


def first_use(network: Network) -> Bool[Tensor, "*batch"]:
    """Record and check the function; what it raises in float64 is told as that.

    Args:
        network: in float64.
    """
    try:
        return network.derivative_checked
    except LipboundsError:
        raise
    except (RuntimeError, TypeError, ValueError) as error:
        raise Unsupported(
            f"the function must run on x in float64, got {type(error).__name__}: {str(error).splitlines()[0]} "
            "Convert inside the function what it keeps in another dtype or on another device, and check the shape of x."
        ) from error


def same_in_its_own_dtype(module: nn.Module, network: Network, x: Tensor, stretched: Tensor) -> Bool[Tensor, "*batch"]:
    """Compare the Jacobian with the module as the user runs it, if that is not in float64.

    Args:
        module: as given.
        network: the same in float64.
        x: the input as given.
        stretched: the direction in which it is compared, beside a random one.
    """
    dtypes = [tensor.dtype for tensor in (*module.parameters(), x) if tensor.is_floating_point()]
    checked = torch.ones(network.batch_shape, dtype=torch.bool, device=x.device)
    if dtypes[0] == torch.float64:
        return checked
    own = detached_call(module_copy(module))
    generator = torch.Generator().manual_seed(1)
    random = torch.randn(x.shape, generator=generator, dtype=torch.float64, device=generator.device).to(x.device)
    with plain_kernels():
        for v in (random, stretched):
            checked = checked & check_derivative(
                own,
                x.detach().to(dtypes[0]),
                v,
                network.jvp(v),
                batch_dims=network.batch_dims,
                causes=DTYPE_CAUSES,
            )
    return checked
