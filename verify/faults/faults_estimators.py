"""Wrong estimators: measured numbers sold as bounds, and bounds on the wrong side."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lipbounds.rounding import cast_down, cast_up
from lipbounds.targets.attention import Attention
from verify.faults.fault import planted
from verify.faults.right import dense_jacobian, exact, jacobian_error


def _gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _top(matrix: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(matrix, 2)


def _power(block: Attention, steps: int, added: float = 0.0) -> Tensor:
    """||J v|| after power iteration that divides by the length plus a constant."""
    jacobian = dense_jacobian(block)
    vector = _gaussian(jacobian.shape[-1]).expand(jacobian[..., 0, :].shape).unsqueeze(-1)
    for _ in range(steps):
        vector = vector / (torch.linalg.matrix_norm(vector, keepdim=True) + added + 1e-300)
        vector = jacobian.mT @ (jacobian @ vector)
    vector = vector / (torch.linalg.matrix_norm(vector, keepdim=True) + added + 1e-300)
    return torch.linalg.matrix_norm(jacobian @ vector)


# -- sold as upper bounds --------------------------------------------------------------------------------------------


@planted(estimator=True, subtle=True)
def early_stop(block: Attention) -> Tensor:
    """Power iteration on the Jacobian stopped after ten steps, sold as an upper bound."""
    return cast_up(_power(block, 10), block.dtype)


@planted(estimator=True, subtle=True)
def small_constant(block: Attention) -> Tensor:
    """Power iteration on the Jacobian that divides by the length plus 0.01, sold as an upper bound."""
    return cast_up(_power(block, 200, 0.01), block.dtype)


@planted(estimator=True)
def primal_for_tangent(block: Attention) -> Tensor:
    """The first output of jvp, the function itself, taken for the second, the directional derivative."""
    return cast_up(torch.linalg.matrix_norm(block.double.forward()), block.dtype)


@planted(estimator=True)
def random_directions(block: Attention) -> Tensor:
    """The largest ||J v|| over 64 random unit vectors, sold as a bound."""
    jacobian = dense_jacobian(block)
    vectors = _gaussian(jacobian.shape[-1], 64)
    vectors = vectors / torch.linalg.vector_norm(vectors, dim=0)
    return cast_up(torch.linalg.vector_norm(jacobian @ vectors, dim=-2).amax(-1), block.dtype)


@planted(estimator=True)
def own_token_only(block: Attention) -> Tensor:
    """The largest diagonal block dY_i/dx_i: how tokens move each other is left out."""
    jacobian = dense_jacobian(block)
    moving = block.moving_input
    blocks = jacobian.unflatten(-1, moving.shape[-2:]).unflatten(-3, (block.tokens, -1))
    count = min(block.tokens, moving.shape[-2])
    own = torch.stack([_top(blocks[..., i, :, i, :]) for i in range(count)]).amax(0)
    return cast_up(own, block.dtype)


@planted(estimator=True)
def largest_head_jacobian(block: Attention) -> Tensor:
    """The norms of the Jacobians of the heads combined by their maximum."""
    fields = ("w_q", "w_k", "w_v", "w_o")
    biases = [name for name in ("b_q", "b_k", "b_v") if getattr(block, name) is not None]
    norms = []
    for h in range(block.heads):
        parts = {name: getattr(block, name)[..., h : h + 1, :, :] for name in fields}
        parts |= {name: getattr(block, name)[..., h : h + 1, :] for name in biases}
        if block.logit_bias is not None and block.logit_bias.dim() > 2 and block.logit_bias.shape[-3] > 1:
            parts["logit_bias"] = block.logit_bias[..., h : h + 1, :, :]
        norms.append(_top(dense_jacobian(block.replace(**parts))).expand(block.batch_shape))
    return cast_up(torch.stack(norms).amax(0), block.dtype)


@planted(estimator=True, subtle=True)
def one_millionth_off(block: Attention) -> Tensor:
    """The exact norm less a millionth of it, a tolerance taken off on the wrong side."""
    return cast_up(exact(block.double) * (1 - 1e-6), block.dtype)


@planted(estimator=True, subtle=True)
def exact_cast_to_nearest(block: Attention) -> Tensor:
    """The exact norm cast to the dtype of the block to nearest."""
    return exact(block.double).to(block.dtype)


@planted(estimator=True, subtle=True)
def finite_differences(block: Attention) -> Tensor:
    """The Jacobian by central differences with step 0.01, sold as exact."""
    wide = block.double
    moving = wide.moving_input.expand(*block.batch_shape, *wide.moving_input.shape[-2:])
    size = moving.shape[-2] * moving.shape[-1]
    basis = torch.eye(size, dtype=torch.float64).reshape(size, *[1] * len(block.batch_shape), *moving.shape[-2:]) * 0.01
    ahead, behind = (wide.at(moving + sign * basis).forward() for sign in (1, -1))
    return cast_up(_top(((ahead - behind) / 0.02).flatten(-2).movedim(0, -1)), block.dtype)


# -- sold as lower bounds --------------------------------------------------------------------------------------------


@planted(kind="lower", estimator=True, subtle=True)
def lower_rounded_up(block: Attention) -> Tensor:
    """A lower bound cast upwards to the dtype of the block."""
    return cast_up(_power(block, 200), block.dtype)


@planted(kind="lower", estimator=True, subtle=True)
def ritz_value_raised(block: Attention) -> Tensor:
    """A Ritz value raised by a thousandth to make up for the last steps, still sold as a lower bound."""
    return cast_down(_power(block, 100) * 1.001, block.dtype)


@planted(kind="lower", estimator=True, subtle=True)
def residual_added(block: Attention) -> Tensor:
    """Rayleigh quotient plus residual: some singular value is below it, the largest need not be above."""
    jacobian = dense_jacobian(block)
    vector = _gaussian(jacobian.shape[-1]).unsqueeze(-1)
    gram = jacobian.mT @ jacobian
    vector = gram @ vector
    vector = vector / torch.linalg.matrix_norm(vector, keepdim=True).clamp(min=1e-300)
    quotient = vector.mT @ gram @ vector
    residual = torch.linalg.matrix_norm(gram @ vector - quotient * vector)
    return cast_down((quotient[..., 0, 0] + residual).sqrt(), block.dtype)


@planted(kind="lower", estimator=True)
def frobenius_norm_as_lower(block: Attention) -> Tensor:
    """The Frobenius norm of the Jacobian, an upper bound, sold as a lower one."""
    return cast_down(torch.linalg.matrix_norm(dense_jacobian(block)), block.dtype)


@planted(kind="lower", estimator=True)
def long_secant(block: Attention) -> Tensor:
    """Slopes of secants to random points nearby, sold as a lower bound at the point."""
    wide = block.double
    steps = _gaussian(16, *wide.moving_input.shape[-2:]) / 2
    steps = steps.reshape(16, *[1] * len(block.batch_shape), *wide.moving_input.shape[-2:])
    moved = wide.at(wide.moving_input.expand(*block.batch_shape, *wide.moving_input.shape[-2:]) + steps).forward()
    slopes = torch.linalg.matrix_norm(moved - wide.forward()) / torch.linalg.matrix_norm(steps)
    return cast_down(slopes.amax(0).expand(block.batch_shape), block.dtype)


@planted(kind="lower", estimator=True, subtle=True)
def unit_vector_too_long(block: Attention) -> Tensor:
    """||J v|| for a v that was normalised in float16, without dividing by its length."""
    jacobian = dense_jacobian(block)
    vector = torch.linalg.svd(jacobian, full_matrices=False).Vh[..., 0, :].half().double()
    return cast_down(torch.linalg.vector_norm((jacobian @ vector.unsqueeze(-1)).squeeze(-1), dim=-1), block.dtype)


# -- sold as bounds that rarely fail ---------------------------------------------------------------------------------


def certified(
    block: Attention, delta: float, steps: int, seed: int, raised: Callable[[float, int], float], start: str = "sphere"
) -> Tensor:
    """Ritz value after `steps` Lanczos steps times what `raised` makes of the exponent log(1.648 sqrt(N) / delta)."""
    jacobian = dense_jacobian(block)
    gram = (jacobian.mT @ jacobian).reshape(-1, jacobian.shape[-1], jacobian.shape[-1])
    size = gram.shape[-1]
    if size <= steps:
        return exact(block)
    vector = _gaussian(len(gram), size, 1, seed=seed)
    if start == "last":
        vector = torch.eye(size, dtype=torch.float64)[:, -1:].expand(len(gram), size, 1)
    basis = vector / torch.linalg.matrix_norm(vector, keepdim=True)
    for _ in range(steps - 1):
        image = gram @ basis[..., -1:]
        for _ in range(2):
            image = image - basis @ (basis.mT @ image)
        basis = torch.cat([basis, image / torch.linalg.matrix_norm(image, keepdim=True).clamp(min=1e-300)], -1)
    ritz = torch.linalg.eigvalsh(basis.mT @ gram @ basis)[..., -1].clamp(min=0).sqrt().reshape(block.batch_shape)
    factor = raised(math.log(1.648 * size**0.5 / delta), steps)
    return cast_up(ritz * factor + jacobian_error(block), block.dtype)


def sound_factor(exponent: float, steps: int) -> float:
    """1/sqrt(1 - e) with e = (exponent / (2k - 1))^2; infinite where k is too small."""
    error = (exponent / (2 * steps - 1)) ** 2
    return (1 - error) ** -0.5 if error < 1 else math.inf


@planted(kind="probable", estimator=True)
def ritz_value_as_certificate(block: Attention, *, delta: float = 1e-3, steps: int = 30, seed: int = 0) -> Tensor:
    """The Ritz value itself, sold as a bound that fails with probability delta."""
    return certified(block, delta, steps, seed, lambda exponent, k: 1.0)


@planted(kind="probable", estimator=True)
def one_per_cent_for_all(block: Attention, *, delta: float = 1e-3, steps: int = 30, seed: int = 0) -> Tensor:
    """The Ritz value times 1.01 whatever delta and the number of steps."""
    return certified(block, delta, steps, seed, lambda exponent, k: 1.01)


@planted(kind="probable", estimator=True, subtle=True)
def relative_error_halved(block: Attention, *, delta: float = 1e-3, steps: int = 30, seed: int = 0) -> Tensor:
    """e of Kuczynski and Wozniakowski halved."""
    return certified(block, delta, steps, seed, lambda exponent, k: sound_factor(exponent * 0.5**0.5, k))


@planted(kind="probable", estimator=True, subtle=True)
def exponent_doubled(block: Attention, *, delta: float = 1e-3, steps: int = 30, seed: int = 0) -> Tensor:
    """The exponent 4k - 2 in place of 2k - 1, as though each step counted twice."""
    return certified(block, delta, steps, seed, lambda exponent, k: sound_factor(exponent / 2, k))


@planted(kind="probable", estimator=True, subtle=True)
def dimension_forgotten(block: Attention, *, delta: float = 1e-3, steps: int = 30, seed: int = 0) -> Tensor:
    """sqrt(N) left out: the start is taken to have a fixed share in the top direction."""
    size = min(block.moving_input.shape[-2:].numel(), block.tokens * block.w_o.shape[-1])
    return certified(
        block, delta, steps, seed, lambda exponent, k: sound_factor(max(exponent - math.log(size) / 2, 0.0), k)
    )


@planted(kind="probable", estimator=True)
def start_that_is_not_random(block: Attention, *, delta: float = 1e-3, steps: int = 30, seed: int = 0) -> Tensor:
    """The right inequality from a fixed start, for which it does not hold."""
    return certified(block, delta, steps, seed, sound_factor, start="last")


@planted(kind="probable", estimator=True)
def mean_of_random_products(block: Attention, *, delta: float = 1e-3, seed: int = 0) -> Tensor:
    """The mean of ||J v|| over four random unit vectors, without the factor for N and delta that it needs."""
    jacobian = dense_jacobian(block)
    vectors = _gaussian(jacobian.shape[-1], 4, seed=seed)
    vectors = vectors / torch.linalg.vector_norm(vectors, dim=0)
    return cast_up(torch.linalg.vector_norm(jacobian @ vectors, dim=-2).mean(-1), block.dtype)


@planted(kind="probable", estimator=True)
def without_a_seed(block: Attention, *, delta: float = 1e-3) -> Tensor:
    """A probability is claimed, but nothing random can be set: the start is always the same."""
    return cast_up(_power(block, 30) * 1.05, block.dtype)
