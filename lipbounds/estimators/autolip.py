"""AutoLip (Virmaux and Scaman, NeurIPS 2018): the product of the norms of the layers of a feed-forward network.

    global:                Lip    <=  ||W_K|| l ||W_{K-1}|| l ... l ||W_1||
    at an input (ours):    ||J||  <=  ||W_K D_{K-1}|| ||D_{K-1} W_{K-1} D_{K-2}|| ... ||D_1 W_1||, for ReLU

| symbol | meaning |
|---|---|
| W_k | the weights of layer k |
| l | the Lipschitz constant of the activation |
| D_k | diagonal: 0 for a neuron that is known to be inactive at the input, 1 for the others |

A neuron is known to be inactive where its computed input is below 0 by more than its rounding error. Numerics: float64;
norms rounded up. A product that leaves the range of floats at its lower end stays a bound: it is kept at the smallest
normal float unless a norm is 0. Recollected, not read here. Proof: docs/bounds/estimators.md, "AutoLip".
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lipbounds.claims import Claim, Source
from lipbounds.errors import Unsupported
from lipbounds.ops.spectral import spectral_norm_upper
from lipbounds.registry import bound
from lipbounds.rounding import cast_up, gamma, inflate
from lipbounds.targets.mlp import Mlp


TITLE = "Lipschitz regularity of deep neural networks: analysis and efficient estimation"
AUTHORS = "Virmaux and Scaman"
TINY = torch.finfo(torch.float64).tiny


@bound(
    name="autolip",
    claim=Claim(kind="proved", scope="global"),
    source=Source(title=TITLE, authors=AUTHORS, year=2018, arxiv="1805.10965", statement="AutoLip, recollected"),
    cost="O(K D^3)",
    target=Mlp,
)
def autolip(block: Mlp) -> Tensor:
    """Product of the spectral norms of the layers and of the Lipschitz constants of the activations.

    Promise: at least the Lipschitz constant on all inputs, in l2; the same number for every batch item. Differentiable.

    Args:
        block: the network.
    """
    return cast_up(autolip_product(block.double), block.dtype).expand(block.batch_shape)


@bound(
    name="autolip_active",
    claim=Claim(kind="proved", scope="point"),
    source=Source(title="lipbounds", authors="after Virmaux and Scaman", year=2018, statement="active neurons, ours"),
    cost="O(K D^3)",
    target=Mlp,
)
def autolip_active(block: Mlp) -> Tensor:
    """Product of the spectral norms of what is active of each layer at the input, for relu networks.

    Promise: at least the norm of the Jacobian at the input, and of every element of the Clarke Jacobian where the input
    of a neuron is 0. Differentiable in the weights; constant in the input while no neuron changes its state.

    Args:
        block: the network, with the activation `relu`.

    Raises:
        Unsupported: another activation.
    """
    wide = block.double
    require_relu("autolip_active", wide)
    columns, norms = None, []
    for weight, rows in zip(wide.weights, _possibly_active(wide), strict=True):
        active = weight.expand(*wide.batch_shape, *weight.shape)
        active = active if columns is None else active * columns.unsqueeze(-2)
        active = active if rows is None else active * rows.unsqueeze(-1)
        norms.append(spectral_norm_upper(active))
        columns = rows
    return cast_up(product_upper(norms), block.dtype)


def autolip_product(network: Mlp) -> Float[Tensor, ""]:
    """The AutoLip bound in float64, rounded up.

    Args:
        network: in float64 (`network.double`).
    """
    norms = [spectral_norm_upper(weight) for weight in network.weights]
    return product_upper([norms[0], *(network.activation_rule.lipschitz * norm for norm in norms[1:])])


def product_upper(factors: Iterable[Float[Tensor, "*batch"]]) -> Float[Tensor, "*batch"]:
    """Product of non-negative numbers, rounded up, and above 0 unless one of them is 0.

    Args:
        factors: float64; each may carry two roundings of its own.
    """
    factors = list(factors)
    product = torch.ones_like(factors[0])
    for factor in factors:
        product = torch.where(factor > 0, (inflate(product, 4) * factor).clamp(min=TINY), 0.0)
    return product


def require_relu(name: str, network: Mlp) -> None:
    """Raise Unsupported unless the activation is relu."""
    if network.activation != "relu":
        raise Unsupported(f"{name} holds for activation='relu' only, got {network.activation!r}; use autolip.")


@torch.no_grad()
def _possibly_active(network: Mlp) -> list[Bool[Tensor, "*batch outputs"] | None]:
    """The neurons of each layer not known to be inactive; None for the outputs of the network."""
    states: list[Tensor | None] = []
    values, error = network.x, torch.zeros_like(network.x)
    for layer, weight in enumerate(network.weights[:-1]):
        computed = values @ weight.mT + network.bias(layer)
        size = (values.abs() + error) @ weight.abs().mT + network.bias(layer).abs()
        rounding = 2 * gamma(weight.shape[1] + 4) * size + TINY  # the last for products below the range of floats
        error = (error @ weight.abs().mT + rounding) * (1 + 1e-9)
        states.append(~(computed < -error))  # true for NaN
        values = computed.relu()
    return [*states, None]
