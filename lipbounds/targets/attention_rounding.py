r"""How far computed logits and attention maps can be from those of exact arithmetic.

A bound promises something about the real function that the given floats define. Its evaluation goes through logits
computed in float64; with u = 2**-53, K = 2 D + d + 6 and |.| entrywise, each is off by at most

    eta_i = gamma(K) s ||[x_i 1]|| ||[W_Q; b_Q]||_F ||[W_K; b_K]||_F max_j ||[x_j 1]||  +  2 u max_j |B_ij|

(dot products: Higham 2002, section 3.1, then Cauchy-Schwarz; the maximum is over visible keys). A change of all
logits of a row by at most eta multiplies each weight exp(S_ij) by a factor in [e^-eta, e^eta], hence each P_ij by one
in [e^-2 eta, e^2 eta], a product of two of them and so g_1 and the spectral norm of J(P_i) by one in [e^-4 eta, e^4
eta].

Rotary positions: a rotation of norm rho multiplies the error so far by rho and adds sqrt(2) gamma(2) rho |q_i| (two
products and a sum in each entry of a pair, |.| Euclidean). Q is then off by gamma(D + 5) rho ||[x_i 1]|| ||[W_Q;
b_Q]||_F, K likewise, and eta_i has both rho as factors and 10 more roundings in K."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.rounding import UNIT_ROUNDOFF, gamma
from lipbounds.targets.attention import Attention
from lipbounds.targets.rotary import rotation_norm


@torch.no_grad()
def logit_error(block: Attention) -> Float[Tensor, "*batch heads n"]:
    """eta_i of each head and row, for logits computed in float64, without a gradient; see the top of this file.

    Args:
        block: in float64 (`block.double`).
    """
    operations = 2 * max(block.w_q.shape[-2], block.w_k.shape[-2]) + block.w_q.shape[-1] + 6
    norms = block.weight_norms
    query_size = _token_norms(block.x, block.b_q).unsqueeze(-2) * _weight_norm(norms.query_size, block.b_q)
    key_size = _token_norms(block.source_input, block.b_k).amax(-1)[..., None, None] * _weight_norm(
        norms.key_size, block.b_k
    )
    if block.query_rotation is not None:
        operations += 10
    sizes = query_size * key_size * rotation_norms(block).unsqueeze(-1)
    error = gamma(operations) * abs(block.scale_value) * sizes
    if block.mask is not None:
        visible = torch.where(block.mask.isneginf(), 0.0, block.mask).abs().amax(-1)
        error = error + 2 * UNIT_ROUNDOFF * visible
    return error * (1 + 1e-9)  # pays for the rounding in this very formula


@torch.no_grad()
def projection_error(
    tokens: Float[Tensor, "*batch one n dim"],
    weights: Float[Tensor, "*weights heads dim head_dim"],
    rotation: Float[Tensor, "*rotary n 2 pairs"] | None,
) -> Float[Tensor, "*out heads n"]:
    """How far computed queries or keys can be from exact ones in float64, as the Euclidean norm of each row.

    gamma(D + 5) rho |x_i| ||W||_F, see the top of this file; without a gradient.

    Args:
        tokens: as in `Attention.query_factors`, with a feature 1 where there is a bias.
        weights: the same, with the bias as one more row.
        rotation: of the queries or keys.
    """
    size = tokens.norm(dim=-1) * weights.norm(dim=(-2, -1)).unsqueeze(-1)
    norm = rotation_norm(rotation, size[..., 0]).unsqueeze(-1)
    return 2 * gamma(tokens.shape[-1] + 8) * size * norm


def rotation_norms(block: Attention) -> Float[Tensor, "*rotary one"]:
    """Product of the norms of the two rotations, rounded up; 1 without rotary positions.

    Args:
        block: in float64.
    """
    like = block.w_q[..., 0, 0]
    return rotation_norm(block.query_rotation, like) * rotation_norm(block.key_rotation, like)


def _token_norms(tokens: Tensor, bias: Tensor | None) -> Tensor:
    squares = tokens.square().sum(-1)
    return (squares if bias is None else squares + 1).sqrt()


def _weight_norm(squares: Tensor, bias: Tensor | None) -> Tensor:
    """Frobenius norm of each head's weights with the bias as one more row, shaped [*weights, heads, 1]."""
    return (squares if bias is None else squares + bias.square().sum(-1)).sqrt().unsqueeze(-1)
