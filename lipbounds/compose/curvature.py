r"""How fast the Jacobian of attention turns: a bound on the second derivative over a ball.

One head, row i, P_i = softmax(S_i), A = s W_Q W_K^T, u_i = s W_K q_i (here for the query, not for a direction). For
directions X -> U and X -> W, a_ij = dS_ij[U], b_ij = dS_ij[W], c_ij = d2S_ij[U, W] = w_i A u_j^T + u_i A w_j^T:

    d2Y_i[U, W] = Cov_i(b, U W_V) + Cov_i(a, W W_V) + Cov_i(c, V) + kappa_i(a, b, V),

covariances under P_i and kappa_i = sum_j P_ij (a_j - a)(b_j - b)(v_j - v) with means a, b, v (the derivative of the
covariance of softmax is its third cumulant). With m_i(U)^2 = sum_j P_ij |u_j|^2, standard deviations under P_i

    sd_i(a) <= alpha_i |u_i| + nu_i m_i(U),   alpha_i = s ||Cov_i(K)^1/2 W_Q^T||,   nu_i = |s W_K q_i|,
    sd_i(c) <= ||A|| ( |w_i| m_i(U) + |u_i| m_i(W) ),

and with R_i at least the distance of any v_j from the mean v, beta_i = ||Cov_i(V)||^1/2, Cauchy-Schwarz gives

    |d2Y_i[U, W]| <= ||W_V|| (sd_i(b) m_i(U) + sd_i(a) m_i(W)) + beta_i sd_i(c) + R_i sd_i(a) sd_i(b)
                   = (x1_i |w_i| + x2_i m_i(W)) m_i(U) + (y1_i |w_i| + y2_i m_i(W)) |u_i|,
    x1 = ||W_V|| alpha + ||A|| beta + R nu alpha,   x2 = 2 ||W_V|| nu + R nu^2,   y1 = R alpha^2,   y2 = x1.

For |W|_F = |U|_F = 1 the norm over rows is at most the sum of

- (sum_i x1_i^2 |w_i|^2 m_i(U)^2)^1/2 <= max_i x1_i mu_i with mu_i^2 = max_j P_ij >= m_i(U)^2,
- (sum_i x2_i^2 m_i(W)^2 m_i(U)^2)^1/2 <= max_j (sum_i P_ij^2 x2_i^2)^1/2, since sum_i x2_i^2 P_ij P_ik, a positive
  semidefinite matrix, has its largest entry on the diagonal,
- max_i (y1_i + y2_i mu_i).

Over the ball: P between the ends of its interval (bounds.yudin2025_ball), nu_i grows by ||A|| eps, R is the diameter of
the values and grows by sqrt(2) ||W_V|| eps, and Cov'_i(Z') <= sum_j upper_ij (z_j - c)(z_j - c)^T around the mean c at
the centre (Loewner), to whose root moving Z by dZ adds ||J(P_i)||^1/2 ||dZ|| <= (1/2)^1/2 ||dZ||.

Heads: ||W_O|| (sum_h H_h^2)^1/2, since this bounds the stacked heads for the same U and W. So on the ball
||J(X) - J(X0)|| <= eps H: the segment between the two stays in the ball.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.bounds.yudin2025_ball import logit_radius
from lipbounds.derivatives.norms import combine_heads
from lipbounds.ops.interval import softmax_interval
from lipbounds.ops.spectral import product_norm_upper, spectral_norm_upper
from lipbounds.rounding import gamma, inflate
from lipbounds.targets.attention import Attention


SLACK = 1e-11  # relative, for sums of up to 40 000 products of positive terms, of which there are few in a row


def supports_curvature(block: Attention) -> bool:
    """Whether the bound holds for this block: self-attention without rotary positions and QK-norm.

    Args:
        block: the block.
    """
    return block.moves == "self" and block.features.isdisjoint(("rotary", "qk_norm"))


@torch.no_grad()
def curvature(block: Attention, radius: float) -> Float[Tensor, "*batch"]:
    """Upper bound on the norm of the second derivative over the ball of that radius: |D2 Y[U, W]| <= H |U| |W|.

    Args:
        block: in float64, with `supports_curvature`.
        radius: eps, Frobenius norm.
    """
    interval = softmax_interval(block.logits, logit_radius(block, radius))
    upper = interval.upper
    scale = abs(block.scale_value)
    value_weights = spectral_norm_upper(block.w_v).unsqueeze(-1)
    product = scale * product_norm_upper(block.w_q, block.w_k.mT).unsqueeze(-1)
    keys, values = _rows(block, "k"), _rows(block, "v")
    alpha = scale * product_norm_upper(_centred(keys, upper, block), block.w_q.mT.unsqueeze(-3))
    alpha = (alpha + 0.5**0.5 * radius * product) * (1 + SLACK) + scale * _row_error(block, "k") * block.w_q.norm(
        dim=(-2, -1)
    ).unsqueeze(-1)
    beta = spectral_norm_upper(_centred(values, upper, block))
    beta = (beta + 0.5**0.5 * radius * value_weights) * (1 + SLACK) + _row_error(block, "v")
    reach = (block.queries @ block.w_k.mT).norm(dim=-1)
    reach_error = _row_error(block, "q") * block.w_k.norm(dim=(-2, -1)).unsqueeze(-1)
    nu = (scale * (reach + reach_error) + radius * product) * (1 + SLACK)
    distance = torch.cdist(values, values, compute_mode="donot_use_mm_for_euclid_dist").amax((-2, -1)).unsqueeze(-1)
    diameter = (distance + 2**0.5 * radius * value_weights) * (1 + SLACK) + 2 * _row_error(block, "v")
    x1 = value_weights * alpha + product * beta + diameter * nu * alpha
    x2 = 2 * value_weights * nu + diameter * nu.square()
    largest = upper.amax(-1).sqrt()
    columns = (upper.square() * x2.square().unsqueeze(-1)).sum(-2).amax(-1).sqrt()
    heads = (x1 * largest).amax(-1) + columns + (diameter * alpha.square() + x1 * largest).amax(-1)
    return inflate(combine_heads(block, heads * (1 + SLACK)), 64)


def _rows(block: Attention, which: str) -> Float[Tensor, "*batch heads n width"]:
    return block.keys if which == "k" else block.values


def _row_error(block: Attention, which: str) -> Float[Tensor, "*batch heads 1"]:
    """How far computed queries, keys or values can be from exact ones, the norm of all rows together; twice over."""
    tokens, weights = {"q": block.query_factors, "k": block.key_factors, "v": block.value_factors}[which]
    operations = tokens.shape[-1] + weights.shape[-1] + 8
    size = tokens.norm(dim=(-2, -1)) * weights.norm(dim=(-2, -1))
    return (4 * gamma(operations) * size).unsqueeze(-1)


def _centred(
    rows: Float[Tensor, "*batch heads m width"], upper: Float[Tensor, "*batch heads n m"], block: Attention
) -> Float[Tensor, "*batch heads n m width"]:
    """F_i with F_i^T F_i = sum_j upper_ij (z_j - c_i)(z_j - c_i)^T, c_i the mean of the rows at the centre."""
    means = block.probabilities @ rows
    return upper.sqrt().unsqueeze(-1) * (rows.unsqueeze(-3) - means.unsqueeze(-2))
