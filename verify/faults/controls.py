"""Sound bounds that must survive: the right versions, and a change that looks wrong and is not."""

from __future__ import annotations

import torch
from torch import Tensor

from lipbounds.claims import FEATURES
from lipbounds.rounding import cast_down, cast_up
from lipbounds.targets.attention import Attention
from verify.faults.fault import UNNORMED, planted
from verify.faults.faults_estimators import certified, sound_factor
from verify.faults.faults_pulled import Differential
from verify.faults.faults_sharp import GramBlocks, Parts
from verify.faults.right import (
    CENTRED,
    Covariance,
    Formula,
    dense_jacobian,
    exact,
    input_norm,
    jacobian_error,
    literal,
    map_norm,
    norm,
    output,
    turned,
)
from verify.faults.right_ball import Ball
from verify.faults.right_norms import normed


@planted()
def theorem3_with_biases(block: Attention) -> Tensor:
    """Right: the formula of `right.Formula`."""
    return Formula()(block)


@planted(supports=("heads", "mask"))
def theorem3_as_printed(block: Attention) -> Tensor:
    """Right: Theorem 3 without biases."""
    return literal()(block)


@planted()
def theorem3_centred(block: Attention) -> Tensor:
    """Right: keys and values without their mean rows."""
    return CENTRED(block)


@planted()
def key_and_value_bias_left_out(block: Attention) -> Tensor:
    """Right although it looks wrong: softmax rows sum to 1, so constant rows of keys and values drop out."""
    parts = Formula(
        values=lambda b: norm(b.source_input.unsqueeze(-3), b.w_v),
        key_side=lambda b: norm(b.source_input.unsqueeze(-3), b.w_k, b.w_q.mT),
    )
    return parts(block)


@planted(supports=("heads", "mask"))
def whole_matrices_for_heads(block: Attention) -> Tensor:
    """Right although it looks wrong: norms of the whole matrices, as though all heads were one.

    The multi-head formula of Newhouse et al. as coded misses a factor in the RMS norm of tokens. In the l2 norm none
    is missing: with V_h and K_h at most ||V|| and ||K||, sum_h ||dX W_Q^h K_h^T||^2 <= ||K||^2 ||dX W_Q||^2, and
    likewise for the other terms.
    """

    def together(weights: Tensor) -> Tensor:
        return norm(weights.movedim(-3, -2).flatten(-2))

    wide = block.double
    inputs = input_norm(wide).squeeze(-1).square() * together(wide.w_q) * together(wide.w_k) * abs(wide.scale_value)
    value = together(wide.w_v) * (map_norm(wide).amax(-1) + 2 * inputs * Formula().softmax(wide).amax(-1))
    return cast_up((value * output(wide)).expand(block.batch_shape), block.dtype)


@planted()
def covariance(block: Attention) -> Tensor:
    """Right: the covariance form."""
    return Covariance()(block)


@planted()
def gram_blocks(block: Attention) -> Tensor:
    """Right: the norm of the matrix of norms of J_i J_k^T."""
    return GramBlocks()(block)


@planted()
def mixing_by_gram_blocks(block: Attention) -> Tensor:
    """Right: Gram blocks of the mixing part, beside the norm of the rest."""
    return Parts()(block)


@planted(supports=UNNORMED)
def turned_queries_and_keys(block: Attention) -> Tensor:
    """Right: the norms of turned queries and keys, apart from those of the weights."""
    return turned()(block)


@planted(supports=UNNORMED)
def differential_with_a_gradient_for_each_key(block: Attention) -> Tensor:
    """Right: the norm of the three parts of the differential, each query pulled back by the turn of each key."""
    return Differential()(block)


@planted(supports=tuple(FEATURES))
def normalised_queries_and_keys(block: Attention) -> Tensor:
    """Right: the norms of normalised and turned queries and keys, and of their derivatives by the token."""
    return normed()(block)


@planted(scope="ball")
def ball(block: Attention, radius: float) -> Tensor:
    """Right: every part bounded over the ball."""
    return Ball()(block, radius)


@planted(estimator=True)
def dense(block: Attention) -> Tensor:
    """Right: the norm of the dense Jacobian, rounded up."""
    return exact(block)


@planted(kind="lower", estimator=True)
def frobenius_from_below(block: Attention) -> Tensor:
    """Right: the Frobenius norm over the root of the rank, less the rounding."""
    jacobian = dense_jacobian(block)
    mean = torch.linalg.matrix_norm(jacobian) / min(jacobian.shape[-2:]) ** 0.5
    return cast_down((mean * (1 - 1e-12) - jacobian_error(block)).clamp(min=0), block.dtype)


@planted(kind="probable", estimator=True)
def lanczos_certificate(block: Attention, *, delta: float = 1e-3, steps: int = 30, seed: int = 0) -> Tensor:
    """Right: the inequality of Kuczynski and Wozniakowski, of which several faults are variants."""
    return certified(block, delta, steps, seed, sound_factor)
