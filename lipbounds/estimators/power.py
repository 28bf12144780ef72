"""The norm of the Jacobian by power iteration, from below."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.claims import Claim, Source
from lipbounds.estimators._operator import JacobianOperator, Target, sphere
from lipbounds.estimators._options import check_steps_and_seed
from lipbounds.estimators._rayleigh import attained
from lipbounds.registry import Terms, bound
from lipbounds.rounding import cast_down
from lipbounds.targets.attention import Attention
from lipbounds.targets.network import Network


@torch.no_grad()
def power_lower(target: Target, *, steps: int = 100, seed: int = 0) -> tuple[Float[Tensor, "*batch"], Terms]:
    """Lower bound on the spectral norm of the Jacobian, in the dtype of the input, and its relative residual.

    Promise: the value is ||J v|| / ||v|| for the last iterate v, rounded down, hence at most ||J||. For a `Network`
    that holds up to the rounding of its own arithmetic.

    Args:
        target: an `Attention`, a `Network` or any other target.
        steps: applications of J^T J.
        seed: of the random start.

    Raises:
        InvalidInput: `steps` or `seed` is out of range.
    """
    check_steps_and_seed(steps, seed)
    operator = JacobianOperator(target)
    vector = sphere(operator.batch_shape, operator.size, torch.Generator().manual_seed(seed), operator.device)
    for _ in range(steps):
        image = operator.gram(vector)
        length = torch.linalg.vector_norm(image, dim=-1, keepdim=True)
        # A zero operator leaves the vector where it is.
        vector = torch.where(length > 0, image / torch.where(length > 0, length, 1.0), vector)
    value, residual = attained(operator, vector)
    return cast_down(value, target.moving_input.dtype), {"detail.residual": residual}


@bound(
    name="power_iteration",
    claim=Claim(kind="lower", scope="point"),
    source=Source(
        title="Praktische Verfahren der Gleichungsauflösung",
        authors="von Mises and Pollaczek-Geiringer",
        year=1929,
        statement="power iteration with J^T J",
    ),
    supports=("heads", "biases", "mask", "cross", "rotary", "qk_norm", "some_queries"),
    cost="O(k H n (n + D) d), k steps",
    role="estimator",
    networks=True,
    version=2,
)
def power_iteration(block: Attention | Network, *, steps: int = 100, seed: int = 0) -> tuple[Tensor, Terms]:
    """Norm of the Jacobian by power iteration, from below: ||J v|| / ||v|| at the last iterate, rounded down.

    Promise: at most ||dY/dX||_2: the bounded rounding of J v is subtracted. Kept as the textbook method; `lanczos`
    comes closer at the same cost. `details["residual"]` is ||J^T J v - sigma^2 v|| / (sigma^2 ||v||).
    Numerics: float64 inside. Not differentiable.

    Args:
        block: the attention block, or a `Network`.
        steps: applications of J^T J.
        seed: of the random start.

    Raises:
        InvalidInput: `steps` or `seed` is out of range.
    """
    return power_lower(block, steps=steps, seed=seed)
