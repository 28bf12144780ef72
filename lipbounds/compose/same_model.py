"""Is a network made of layers the model that it stands for? Their logits and their derivatives at the inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lipbounds.errors import InvalidInput, Unsupported
from lipbounds.targets.derivative_check import check_derivative
from lipbounds.targets.layers import Layer
from lipbounds.targets.module_copy import module_copy
from lipbounds.targets.network import Network, plain_kernels


RESIDUAL = 1e-9  # relative, of the logits of one input, both in float64
CAUSES = (
    "networks that meet the model at the inputs alone, such as another weight made up for by a bias, a branch of the "
    "model that depends on its input, or x that the model normalises; here J is the Jacobian of network, and the "
    "function is model"
)


def check_same(network: Layer, model: Callable[..., Any], x: Float[Tensor, "batch ..."]) -> None:
    """Refuse a network whose logits or derivatives at `x` are not the model's.

    Difference quotients of the model along one random direction at each input are compared with the Jacobian of the
    network. They see a part that differs in the proportion of that part to the whole; two functions that agree to
    first order at every input pass.

    Args:
        network: in float64; returns one token per input.
        model: a module, which is copied to float64 and evaluation mode, or any callable that takes `x` in float64;
            returns logits [batch, classes], or an object that has them as `logits`.
        x: the inputs, in float64.

    Raises:
        InvalidInput: the model does not run on `x`, or does not return logits of the shape of the network's.
        Unsupported: the logits of an input, or the derivatives, differ; two runs of the model differ; the module cannot
            be copied to float64.
    """
    wide = module_copy(model, torch.float64) if isinstance(model, nn.Module) else model
    with plain_kernels(), torch.no_grad():
        wanted, got = _logits(wide, x), network(x).squeeze(-2)
    if wanted.shape != got.shape:
        raise InvalidInput(
            f"model must return the logits [batch, classes] of network, {tuple(got.shape)}, got {tuple(wanted.shape)}."
        )
    tiny = torch.finfo(torch.float64).tiny
    residuals = (wanted - got).norm(dim=1) / wanted.norm(dim=1).clamp(min=tiny)
    if not bool((residuals <= RESIDUAL).all()):
        at = int(residuals.nan_to_num(torch.inf).argmax())
        raise Unsupported(
            f"network must reproduce the logits of model to {RESIDUAL:g} of their l2 norm, in float64, got "
            f"residual={float(residuals[at]):.3g} at input {at}; mend the network (weights, mask, epsilon), "
            "or pass x as the model takes it (pixels, or normalised pixels)."
        )
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(x.shape, generator=generator, dtype=torch.float64, device=generator.device).to(x.device)
    slope = Network(lambda z: network(z).squeeze(-2), x, batch_dims=1).jvp(v)
    with plain_kernels(), torch.no_grad():
        check_derivative(lambda z: _logits(wide, z), x, v, slope, batch_dims=1, causes=CAUSES)


def _logits(model: Callable[..., Any], x: Tensor) -> Tensor:
    try:
        with torch.no_grad():
            output = model(x)
    except (RuntimeError, TypeError, ValueError) as error:
        raise InvalidInput(
            f"model must run on x, float64 of shape {tuple(x.shape)}, got {type(error).__name__}: "
            f"{(str(error).splitlines() or [''])[0]}"
        ) from error
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        raise InvalidInput(
            f"model must return a tensor of logits, or an object that has `logits`, got {type(output).__name__}."
        )
    return logits.detach().double()
