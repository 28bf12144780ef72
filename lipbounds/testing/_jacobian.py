r"""The dense Jacobian of attention as a differentiable function of inputs and weights: what gradient ascent climbs.

With m_h = W_V^h W_O^h, u_hi = s W_K^h q_hi, differences of values v_jl = (x_j - x_l) m_h and their means
c_hij = sum_l P_hil v_jl, and k_hij likewise for s W_Q^h (K_hj - K_hl),

    dY_i/dx_j = sum_h P_hij m_h^T                                        (mixing: keys and values move)
              + sum_h P_hij c_hij u_hi^T                                 (softmax, through the keys)
    dY_i/dx_i = sum_h sum_j P_hij c_hij k_hij^T                          (softmax, through the queries).

Differences of tokens are taken before anything else, so one-hot rows keep their digits. Shares no code with bounds,
estimators, ops, or the oracle that has the last word (lipbounds.testing.extended).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.targets.attention import Attention


def jacobian_parts(
    block: Attention, moving: Float[Tensor, "*batch moving dim"]
) -> tuple[Float[Tensor, "*batch outputs inputs"], Float[Tensor, "*batch outputs inputs"]]:
    """Mixing and softmax part of the Jacobian, flattened output by flattened moving input; their sum is the Jacobian.

    Args:
        block: the block; its moving input is not used.
        moving: the moving input at which the Jacobian is taken, for instance another point of a ball.
    """
    x = block.x if block.moves == "memory" else moving
    source = block.source_input if block.moves == "query" else moving
    queries = x.unsqueeze(-3) @ block.w_q
    queries = queries if block.b_q is None else queries + block.b_q.unsqueeze(-2)
    keys = source.unsqueeze(-3) @ block.w_k  # a key bias moves all logits of a row alike: it drops out
    scale = block.scale_value
    logits = scale * queries @ keys.mT
    maps = (logits if block.mask is None else logits + block.mask).softmax(-1)

    through = block.w_v @ block.w_o
    apart = source.unsqueeze(-2) - source.unsqueeze(-3)  # x_j - x_l
    centred = torch.einsum("...hil,...jld,...hdo->...hijo", maps, apart, through)
    weighted = maps.unsqueeze(-1) * centred
    n, m, out_dim, width = x.shape[-2], source.shape[-2], through.shape[-1], moving.shape[-1]
    mixing = softmax = moving.new_zeros(*block.batch_shape, n, out_dim, moving.shape[-2], width)
    if block.moves != "query":
        pull = scale * queries @ block.w_k.mT
        mixing = torch.einsum("...hij,...hdo->...iojd", maps, through)
        softmax = torch.einsum("...hijo,...hid->...iojd", weighted, pull)
    if block.moves != "memory":
        key_apart = torch.einsum("...hil,...jld,...hde->...hije", maps, apart, block.w_k)
        own = torch.einsum("...hijo,...hije,...hde->...iod", weighted, scale * key_apart, block.w_q)
        softmax = softmax + torch.einsum("...iod,ij->...iojd", own, torch.eye(n, dtype=own.dtype, device=own.device))
    shape = (*block.batch_shape, n * out_dim, (n if block.moves == "query" else m) * width)
    return mixing.reshape(shape), softmax.reshape(shape)


def spectral_norm(matrix: Float[Tensor, "*batch rows cols"]) -> Float[Tensor, "*batch"]:
    """Largest singular value, with the gradient u v^T of the top singular pair."""
    with torch.no_grad():
        left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    return (left[..., :, :1].mT @ matrix @ right[..., :1, :].mT)[..., 0, 0]
