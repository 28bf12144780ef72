r"""How far computed logits and attention maps can be from those of exact arithmetic.

A bound promises something about the real function that the given floats define. Its evaluation goes through logits
computed in float64; with u = 2**-53, K = 2 D + d + 6 and |.| entrywise, each is off by at most

    eta_i = gamma(K) s ||[x_i 1]|| ||[W_Q; b_Q]||_F ||[W_K; b_K]||_F max_j ||[x_j 1]||  +  2 u max_j |B_ij|

(dot products: Higham 2002, section 3.1, then Cauchy-Schwarz; the maximum is over visible keys). A change of all
logits of a row by at most eta multiplies each weight exp(S_ij) by a factor in [e^-eta, e^eta], hence each P_ij by one
in [e^-2 eta, e^2 eta], a product of two of them and so g_1 and the spectral norm of J(P_i) by one in [e^-4 eta, e^4
eta]."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.rounding import UNIT_ROUNDOFF, gamma
from lipbounds.targets.attention import Attention


@torch.no_grad()
def logit_error(block: Attention) -> Float[Tensor, "*batch heads n"]:
    """eta_i of each head and row, for logits computed in float64, without a gradient; see the top of this file.

    Args:
        block: in float64 (`block.double`).
    """
    operations = 2 * max(block.w_q.shape[-2], block.w_k.shape[-2]) + block.w_q.shape[-1] + 6
    query_size = _token_norms(block.x, block.b_q).unsqueeze(-2) * _weight_norm(block.w_q, block.b_q)
    key_size = _token_norms(block.source_input, block.b_k).amax(-1)[..., None, None] * _weight_norm(
        block.w_k, block.b_k
    )
    error = gamma(operations) * abs(block.scale_value) * query_size * key_size
    if block.mask is not None:
        visible = torch.where(block.mask.isneginf(), 0.0, block.mask).abs().amax(-1)
        error = error + 2 * UNIT_ROUNDOFF * visible
    return error * (1 + 1e-9)  # pays for the rounding in this very formula


def _token_norms(tokens: Tensor, bias: Tensor | None) -> Tensor:
    squares = tokens.square().sum(-1)
    return (squares if bias is None else squares + 1).sqrt()


def _weight_norm(weights: Tensor, bias: Tensor | None) -> Tensor:
    """Frobenius norm of each head's weights with the bias as one more row, shaped [*weights, heads, 1]."""
    squares = weights.square().sum((-2, -1))
    return (squares if bias is None else squares + bias.square().sum(-1)).sqrt().unsqueeze(-1)
