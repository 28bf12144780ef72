"""The norm of the Jacobian by Lanczos: a lower bound, and an upper bound that fails with a stated probability.

For b uniform on the sphere and 0 < e < 1

    P( xi < (1 - e) lambda )  <=  1.648 sqrt(N) exp(-sqrt(e) (2k - 1)),

so xi / (1 - e) is below lambda with at most that probability (Kuczynski and Wozniakowski 1992, Theorem 4.2).

| symbol | meaning |
|---|---|
| A | J^T J or J J^T, whichever acts on the smaller dimension N |
| lambda | the largest eigenvalue of A, ||J||^2 |
| b, k | the start vector, the number of steps |
| xi | the largest Rayleigh quotient of A on the Krylov space span(b, A b, ..., A^(k-1) b) |

Proof: docs/bounds/estimators.md, "The certificate".
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.claims import Claim, Source
from lipbounds.errors import InvalidInput
from lipbounds.estimators._krylov import largest_ritz_pair
from lipbounds.estimators._operator import JacobianOperator, Target
from lipbounds.estimators._options import check_steps_and_seed
from lipbounds.estimators._rayleigh import attained
from lipbounds.estimators.exact import exact_norm
from lipbounds.registry import Terms, bound
from lipbounds.rounding import UNIT_ROUNDOFF, cast_down, cast_up, inflate
from lipbounds.targets.attention import Attention
from lipbounds.targets.network import Network


CONSTANT = 1.648
SOURCE = Source(
    title="Estimating the largest eigenvalue by the power and Lanczos algorithms with a random start",
    authors="Kuczynski and Wozniakowski",
    year=1992,
    statement="SIAM J. Matrix Anal. Appl. 13(4), Theorem 4.2",
)


@torch.no_grad()
def lanczos_lower(target: Target, *, steps: int = 60, seed: int = 0) -> tuple[Float[Tensor, "*batch"], Terms]:
    """Lower bound on the spectral norm of the Jacobian, in the dtype of the input, and its relative residual.

    Promise: the value is ||J v|| / ||v|| for the top Ritz vector v, evaluated afresh and rounded down, hence at most
    ||J|| whatever the iteration did. For a `Network` that holds up to the rounding of its own arithmetic.

    Args:
        target: an `Attention`, a `Network` or any other target.
        steps: Lanczos steps; capped at the smaller side of the Jacobian.
        seed: of the random start.

    Raises:
        InvalidInput: `steps` or `seed` is out of range.
    """
    check_steps_and_seed(steps, seed)
    operator = JacobianOperator(target)
    _, vector = largest_ritz_pair(operator, steps, seed)
    value, residual = attained(operator, vector)
    return cast_down(value, target.moving_input.dtype), {"detail.residual": residual}


@torch.no_grad()
def lanczos_upper(
    target: Target, *, delta: float = 1e-9, steps: int = 60, seed: int = 0
) -> tuple[Float[Tensor, "*batch"], Terms]:
    """Upper bound on the spectral norm of the Jacobian that fails with probability at most `delta` for each batch item.

    Promise: over the random start, at least ||J|| with probability 1 - delta, by the inequality above. Numerics: the
    Ritz value is raised by 16 k N u, which pays for the roundings of Lanczos in the usual backward-error sense, and by
    a bound on the rounding of the products with J for an `Attention`; a `Network` is taken to be evaluated exactly, so
    give it in float64 where the last digits matter. Up to N = `steps` the dense norm is returned, a proved bound.

    Args:
        target: an `Attention`, a `Network` or any other target.
        delta: allowed probability of failure, above 0 and below 1.
        steps: k, the Lanczos steps.
        seed: of the random start.

    Returns:
        the value and its terms: `ritz`, the root of the Ritz value, and `relative_inflation`, 1/sqrt(1 - e) - 1.

    Raises:
        InvalidInput: an option is out of range; too few steps for a bound, with the number that is needed.
    """
    check_steps_and_seed(steps, seed)
    if not 0 < delta < 1:
        raise InvalidInput(f"delta must be above 0 and below 1, got delta={delta!r}.")
    operator = JacobianOperator(target)
    details = {"detail.delta": torch.full_like(operator.scale, delta)}
    dtype = target.moving_input.dtype
    if operator.size <= steps:
        value = exact_norm(target)
        zero = torch.zeros_like(operator.scale)
        return value, {"ritz": value.to(torch.float64), "relative_inflation": zero, **details}
    deflation = (1 - _relative_error(operator.size, steps, delta)) ** 0.5
    square, _ = largest_ritz_pair(operator, steps, seed)
    ritz = (square * (1 + 16 * steps * operator.size * UNIT_ROUNDOFF)).sqrt()
    # A computed Jacobian off by d moves the root of its Ritz value by less than 3 d / sqrt(1 - e) if ||J|| is at most
    # the value returned: xi <= ritz^2 + 2 ||J|| d + d^2, solved for the root of xi.
    value = inflate((ritz + 3 * operator.norm_error() / deflation) / deflation, 16) * operator.scale
    terms = {
        "ritz": ritz * operator.scale,
        "relative_inflation": torch.full_like(ritz, 1 / deflation - 1),
        **details,
    }
    return cast_up(value, dtype), terms


def _relative_error(size: int, steps: int, delta: float) -> float:
    """e, the relative error of the Ritz value that is exceeded with probability at most delta, rounded up."""
    exponent = math.log(CONSTANT * math.sqrt(size) / delta) * (1 + 1e-14)
    if exponent >= 2 * steps - 1:
        needed = min(size, math.floor((exponent + 1) / 2) + 1)
        raise InvalidInput(
            f"a bound with delta={delta:g} in dimension {size} needs at least steps={needed}, got steps={steps}; "
            "more steps make it tighter: three times as many leave an excess of about 6 %."
        )
    return (exponent / (2 * steps - 1)) ** 2 * (1 + 1e-14)


@bound(
    name="lanczos",
    claim=Claim(kind="lower", scope="point"),
    source=Source(
        title="An iteration method for the solution of the eigenvalue problem",
        authors="Lanczos",
        year=1950,
        statement="largest singular value by Krylov subspaces of J^T J",
    ),
    supports=("heads", "biases", "mask", "cross", "rotary", "qk_norm", "some_queries"),
    cost="O(k H n (n + D) d + k^2 n D), k steps",
    role="estimator",
    networks=True,
    version=2,
)
def lanczos(block: Attention | Network, *, steps: int = 60, seed: int = 0) -> tuple[Tensor, Terms]:
    """Norm of the Jacobian by Lanczos, from below: ||J v|| / ||v|| at the top Ritz vector, rounded down.

    Promise: at most ||dY/dX||_2, whatever the iteration did: the bounded rounding of J v is subtracted.
    `details["residual"]` is ||J^T J v - sigma^2 v|| / (sigma^2 ||v||): some singular value squared is that close.
    Numerics: float64 inside, full re-orthogonalisation. Not differentiable.

    Args:
        block: the attention block, or a `Network`.
        steps: Lanczos steps; capped at the smaller side of the Jacobian.
        seed: of the random start.

    Raises:
        InvalidInput: `steps` or `seed` is out of range.
    """
    return lanczos_lower(block, steps=steps, seed=seed)


@bound(
    name="lanczos_certificate",
    claim=Claim(kind="probable", scope="point"),
    source=SOURCE,
    supports=("heads", "biases", "mask", "cross", "rotary", "qk_norm", "some_queries"),
    cost="O(k H n (n + D) d + k^2 n D), k steps",
    role="estimator",
    networks=True,
    version=2,
)
def lanczos_certificate(
    block: Attention | Network, *, delta: float = 1e-9, steps: int = 60, seed: int = 0
) -> tuple[Tensor, Terms]:
    """Upper bound on the norm of the Jacobian, above the Ritz value by a factor that fails with probability <= delta.

    Promise: at least ||dY/dX||_2 with probability 1 - delta over the random start, for each batch item; see
    `lanczos_upper`, which this is. A seed chosen after looking at the results voids the probability.

    Args:
        block: the attention block, or a `Network`.
        delta: allowed probability of failure.
        steps: k, the Lanczos steps; with N <= k the dense norm is returned.
        seed: of the random start.

    Raises:
        InvalidInput: an option is out of range; too few steps for a bound.
    """
    return lanczos_upper(block, delta=delta, steps=steps, seed=seed)
