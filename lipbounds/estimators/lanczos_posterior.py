"""The norm of the Jacobian by Lanczos: an upper bound from what the run saw, which fails with a stated probability.

The Lanczos vectors are p_j(A) b, with p_0 = 1 and beta_j p_j(t) = (t - alpha_j) p_(j-1)(t) - beta_(j-1) p_(j-2)(t).
Outside of an event of probability delta

    p_0(lambda)^2 + ... + p_k(lambda)^2  <=  2 N / (pi delta^2),

and the sum grows above the largest Ritz value theta, so lambda is at most where it reaches the right side. The event
is about b alone: the run may stop at any step, for any reason.

| symbol | meaning |
|---|---|
| A, N, lambda, b | as in lipbounds.estimators.lanczos |
| alpha_j, beta_j | the entries of the tridiagonal matrix of the run |
| theta | the largest Ritz value, above all zeros of all p_j |

Rounding: an exhausted Krylov space has beta_k = 0, and what is computed there is rounding; 8 N u ||A v|| is taken for
beta_k where that is larger, which makes p_k smaller. Proof: docs/bounds/estimators.md, "The certificate from the run".

Source: van Dorsselaer, Hochstenbach, van der Vorst 2000 (SIAM J. Matrix Anal. Appl. 22) and Hochstenbach 2013 (J. Sci.
Comput., 10.1007/s10915-013-9716-x) have probabilistic bounds from Lanczos polynomials; recollected, derived again here.
"""

from __future__ import annotations

import math
from decimal import Decimal, localcontext

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.claims import Claim, Source
from lipbounds.devices import waits_for
from lipbounds.errors import InvalidInput
from lipbounds.estimators._fused import FusedOperator
from lipbounds.estimators._operator import JacobianOperator, Target, sphere
from lipbounds.estimators._options import check_steps_and_seed
from lipbounds.estimators._rayleigh import attained
from lipbounds.estimators.exact import exact_norm
from lipbounds.estimators.lanczos import lanczos_lower
from lipbounds.ops import eigen
from lipbounds.registry import Terms, bound
from lipbounds.rounding import UNIT_ROUNDOFF, cast_down, cast_up, inflate
from lipbounds.targets.attention import Attention


DIGITS = 40  # of the recurrence, whose last bits then do not matter
BISECTIONS = 44  # of the factor above theta
MUCH_LEFT = 0.1  # of the length of a vector: its part in the span is then off by ten roundings of the rest
CHECK_EVERY = 2  # steps between two looks at the bound
Coefficients = tuple[list[float], list[float]]  # alpha and beta of one run, of the same length
Runs = tuple[list[Coefficients], Tensor]  # those of each batch item, and the Lanczos vectors [*batch, steps, N]


@torch.no_grad()
def posterior_upper(
    target: Target, *, delta: float = 1e-9, steps: int = 60, within: float | None = None, seed: int = 0
) -> tuple[Float[Tensor, "*batch"], Terms]:
    """Upper bound on the spectral norm of the Jacobian that fails with probability at most `delta` for each batch item.

    Promise: over the random start, at least ||J|| with probability 1 - delta, by (1) at the top of this file. Numerics:
    float64; the bound is raised by 16 k N u, which pays for the roundings of Lanczos in the usual backward-error sense,
    and by a bound on the rounding of the products with J for an `Attention`; a `Network` is taken to be evaluated
    exactly. Up to N = `steps` the dense norm is returned, a proved bound.

    Args:
        target: an `Attention`, a `Network` or any other target.
        delta: allowed probability of failure, above 0 and below 1.
        steps: Lanczos steps at most.
        within: stop as soon as the bound is at most so many times the root of the Ritz value, for all batch items;
            above 1; None makes all steps.
        seed: of the random start.

    Returns:
        the value and its terms: `ritz`, the root of the Ritz value, and `relative_inflation`; the details say how many
        `steps` were made, and hold a `lower` bound: ||J v|| / ||v|| at the top Ritz vector v of the same run, as
        `lipbounds.estimators.lanczos.lanczos_lower` has it.

    Raises:
        InvalidInput: an option is out of range.
    """
    check_steps_and_seed(steps, seed)
    if not 0 < delta < 1:
        raise InvalidInput(f"delta must be above 0 and below 1, got delta={delta!r}.")
    if within is not None and not 1 < within < math.inf:
        raise InvalidInput(f"within must be above 1 and finite, got within={within!r}; 1.1 stops at 10 %.")
    operator = FusedOperator(target)
    details = {"detail.delta": torch.full_like(operator.scale, delta)}
    if operator.size <= steps:
        value = exact_norm(target)
        zero = torch.zeros_like(operator.scale)
        lower, _ = lanczos_lower(target, steps=steps, seed=seed)
        made = {"detail.steps": torch.full_like(zero, operator.size), "detail.lower": lower}
        return value, {"ritz": value.to(torch.float64), "relative_inflation": zero, **details, **made}
    limit = Decimal(delta) * Decimal(delta) * Decimal(math.pi * (1 - 1e-15)) / (2 * operator.size)
    factor = None if within is None else within * within
    runs, basis = _run(operator, steps, seed, limit, factor)
    # What the host made goes to the device at once.
    found = [[*_largest_eigenvalue(run, limit), len(run[0])] for run in runs]
    columns = torch.tensor(found, dtype=torch.float64, device=operator.device)
    ritz, upper, made = columns.mT.reshape(3, *operator.batch_shape)
    ritz, upper = ritz.sqrt(), upper.sqrt()
    raised = upper * (1 + 16 * len(runs[0][0]) * operator.size * UNIT_ROUNDOFF)
    value = inflate(raised + 3 * operator.norm_error(), 16) * operator.scale
    lower, _ = attained(operator, _top_vector(runs, basis))
    terms = {
        "ritz": ritz * operator.scale,
        "relative_inflation": torch.where(ritz > 0, upper / torch.where(ritz > 0, ritz, 1.0) - 1, 0.0),
        "detail.steps": made,
        "detail.lower": cast_down(lower, target.moving_input.dtype),
        **details,
    }
    return cast_up(value, target.moving_input.dtype), terms


def _run(operator: JacobianOperator, steps: int, seed: int, limit: Decimal, factor: float | None) -> Runs:
    """Lanczos with full re-orthogonalisation; the coefficients of a batch item end where its space did."""
    generator = torch.Generator().manual_seed(seed)
    size, batch = operator.size, operator.batch_shape
    vector = sphere(batch, size, generator, operator.device)
    basis = vector.new_zeros(*batch, steps, size)
    alphas, betas = vector.new_zeros(steps, *batch), vector.new_zeros(steps, *batch)
    ended = torch.full(batch, steps, dtype=torch.int64, device=vector.device)
    largest = vector.new_zeros(batch)
    made = steps
    for k in range(steps):
        basis[..., k, :] = vector
        image = operator.gram(vector)
        alphas[k] = (image * vector).sum(-1)
        length = torch.linalg.vector_norm(image, dim=-1)
        rest, coupling = _orthogonal_rest(image, basis[..., : k + 1, :])
        # Twice is enough (Kahan and Parlett), and once where little was taken off.
        if waits_for(rest) or not bool((coupling > MUCH_LEFT * length).all()):
            rest, coupling = _orthogonal_rest(rest, basis[..., : k + 1, :])
        largest = torch.maximum(largest, length)
        smallest = 8 * size * UNIT_ROUNDOFF * largest
        betas[k] = torch.maximum(coupling, smallest)
        ended = torch.where((coupling <= smallest) & (ended == steps), k + 1, ended)
        vector = rest / torch.where(coupling > 0, coupling, 1.0)[..., None]
        if factor is not None and k % CHECK_EVERY == 1:
            runs = _coefficients(alphas, betas, ended.clamp(max=k + 1))
            if all(_is_within(run, limit, factor) for run in runs):
                made = k + 1
                break
    return _coefficients(alphas, betas, ended.clamp(max=made)), basis


def _orthogonal_rest(vector: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """A vector less its part in the span of orthonormal rows, and the norm of what is left."""
    rest = vector - ((vector[..., None, :] @ known.mT) @ known).squeeze(-2)
    return rest, torch.linalg.vector_norm(rest, dim=-1)


def _coefficients(alphas: Tensor, betas: Tensor, ended: Tensor) -> list[Coefficients]:
    steps, flat = len(alphas), ended.reshape(1, -1).double()
    # All at once: the host waits for a device of its own each time it reads from it.
    columns = torch.cat([flat, alphas.reshape(steps, -1), betas.reshape(steps, -1)]).T.tolist()
    found = []
    for count, *both in columns:
        found.append((both[: int(count)], both[steps : steps + int(count)]))
    return found


def _top_vector(runs: list[Coefficients], basis: Tensor) -> Tensor:
    """The Ritz vector of the largest Ritz value, for each batch item."""
    places = torch.zeros(len(runs), basis.shape[-2], dtype=torch.float64, device="cpu")
    for place, run in zip(places, runs, strict=True):
        place[: len(run[0])] = eigen.eigen(_tridiagonal(run))[1][:, -1]
    places = places.to(basis.device).reshape(*basis.shape[:-1])
    return (places.unsqueeze(-2) @ basis).squeeze(-2)


def _tridiagonal(run: Coefficients) -> Tensor:
    alphas, betas = run
    matrix = torch.diag(torch.tensor(alphas, dtype=torch.float64, device="cpu"))
    coupled = torch.tensor(betas[:-1], dtype=torch.float64, device="cpu")
    return matrix + torch.diag(coupled, 1) + torch.diag(coupled, -1)


def _ritz_value(run: Coefficients) -> float:
    """theta, rounded up."""
    alphas = run[0]
    matrix = _tridiagonal(run)
    size = float(matrix.abs().sum(-1).amax())
    return float(eigen.largest_eigenvalue(matrix)) + 16 * len(alphas) * UNIT_ROUNDOFF * size


def _is_within(run: Coefficients, limit: Decimal, factor: float) -> bool:
    theta = _ritz_value(run)
    return theta == 0 or _is_too_large(run, Decimal(theta) * Decimal(factor), limit)


def _is_too_large(run: Coefficients, square: Decimal, limit: Decimal) -> bool:
    """Whether the sum of squares in (1) at `square`, at least theta, times t^2 is above 1: it is then no eigenvalue."""
    with localcontext() as context:
        context.prec = DIGITS
        allowed = (1 + Decimal(2) ** -60) / limit
        total = value = Decimal(1)
        before = coupled = Decimal(0)
        for alpha, beta in zip(*run, strict=True):
            if beta == 0:
                return True  # A v = theta v throughout: nothing but zeros
            value, before = ((square - Decimal(alpha)) * value - coupled * before) / Decimal(beta), value
            coupled = Decimal(beta)
            total += value * value
            if total > allowed:
                return True
    return False


def _largest_eigenvalue(run: Coefficients, limit: Decimal) -> tuple[float, float]:
    """theta, and the largest lambda that (1) allows, rounded up; infinity where it is beyond all floats."""
    theta = _ritz_value(run)
    if theta == 0:
        return 0.0, 0.0
    low, high = 0.0, 2.0**-40  # logarithms of the factor above theta
    while not _is_too_large(run, Decimal(theta) * Decimal(math.exp(high)), limit):
        low, high = high, 2 * high
        if high > 128:
            return theta, math.inf
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if _is_too_large(run, Decimal(theta) * Decimal(math.exp(middle)), limit):
            high = middle
        else:
            low = middle
        if high - low < 1e-6 * high:
            break
    return theta, theta * math.exp(high) * (1 + 4 * UNIT_ROUNDOFF)


@bound(
    name="lanczos_posterior",
    claim=Claim(kind="probable", scope="point"),
    source=Source(
        title="lipbounds",
        statement="Bessel's inequality for Lanczos polynomials, derived here; after Hochstenbach 2013, J. Sci. Comput.",
    ),
    supports=("heads", "biases", "mask", "cross", "rotary", "qk_norm", "some_queries"),
    cost="O(k H n (n + D) d + k^2 n D), k steps",
    role="estimator",
)
def lanczos_posterior(
    block: Attention, *, delta: float = 1e-9, steps: int = 60, within: float | None = None, seed: int = 0
) -> tuple[Tensor, Terms]:
    """Upper bound on the norm of the Jacobian from what Lanczos saw, wrong with probability <= delta.

    Promise: at least ||dY/dX||_2 with probability 1 - delta over the random start, for each batch item; see
    `posterior_upper`, which this is. A seed chosen after looking at the results voids the probability; stopping early
    does not.

    Args:
        block: the attention block.
        delta: allowed probability of failure.
        steps: Lanczos steps at most; with N <= steps the dense norm is returned.
        within: stop as soon as the bound is at most so many times the root of the Ritz value, such as 1.1; None makes
            all steps.
        seed: of the random start.

    Raises:
        InvalidInput: an option is out of range.
    """
    return posterior_upper(block, delta=delta, steps=steps, within=within, seed=seed)
