r"""The dense Jacobian of attention as a differentiable function of inputs and weights: what gradient ascent climbs.

With m_h = W_V^h W_O^h, u_hi = s W_K^h q_hi, differences of values v_jl = (x_j - x_l) m_h and their means
c_hij = sum_l P_hil v_jl, and k_hij likewise for s W_Q^h (K_hj - K_hl),

    dY_i/dx_j = sum_h P_hij m_h^T                                        (mixing: keys and values move)
              + sum_h P_hij c_hij u_hi^T                                 (softmax, through the keys)
    dY_i/dx_i = sum_h sum_j P_hij c_hij k_hij^T                          (softmax, through the queries).

Differences of tokens are taken before anything else, so one-hot rows keep their digits. Shares no code with bounds,
estimators, ops, or the oracle that has the last word (lipbounds.testing.extended). Rotary positions turn queries and
keys; then u_hij = s W_K^h R_j^T q_hi depends on the key too, and W_Q^h on the query. QK-norm puts the transposed
derivative of a normalised query or key by its token, r (W^h - c u^hT / D) w, for W_Q^h and W_K^h: with r = (mean k^2 +
eps)^(-1/2) of k = x W, u = r k and c = sum W u over what is normalised together.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.claims import Norm
from lipbounds.targets.attention import Attention


POWER_STEPS = 12
TINY = torch.finfo(torch.float64).tiny


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
    turn_queries, turn_keys = (_matrices(block, rotation) for rotation in (block.query_rotation, block.key_rotation))
    queries = queries if block.b_q is None else queries + block.b_q.unsqueeze(-2)
    queries, w_q = _normalised(block, queries, block.w_q, block.query_norm_weight)
    queries = _turned(turn_queries, queries)
    keys = source.unsqueeze(-3) @ block.w_k
    plain = turn_keys is None and block.norm_eps is None
    if block.b_k is not None and not plain:  # if it is, it moves all logits of a row alike
        keys = keys + block.b_k.unsqueeze(-2)
    keys, w_k = _normalised(block, keys, block.w_k, block.key_norm_weight)
    keys = _turned(turn_keys, keys)
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
        mixing = torch.einsum("...hij,...hdo->...iojd", maps, through)
        softmax = _through_keys(w_k, turn_keys, weighted, scale * queries)
    if block.moves != "memory":
        own = torch.einsum("...hijo,...hije->...hioe", weighted, scale * _key_apart(block, source, keys, maps))
        own = own if turn_queries is None else torch.einsum("...hioe,...ief->...hiof", own, turn_queries)
        own = (own @ w_q.mT).sum(-4)
        softmax = softmax + torch.einsum("...iod,ij->...iojd", own, torch.eye(n, dtype=own.dtype, device=own.device))
    shape = (*block.batch_shape, n * out_dim, (n if block.moves == "query" else m) * width)
    return mixing.reshape(shape), softmax.reshape(shape)


def _matrices(block: Attention, rotation: Tensor | None) -> Tensor | None:
    """The rotary matrix of each token, linear in the cosines and sines; None without rotary positions."""
    if rotation is None:
        return None
    pairs, width = rotation.shape[-1], block.w_q.shape[-1]
    basis = rotation.new_zeros(2, pairs, width, width)
    first = torch.arange(pairs)
    second = first + pairs
    basis[0, first, first, first] = basis[0, first, second, second] = 1.0
    basis[1, first, first, second], basis[1, first, second, first] = -1.0, 1.0
    rest = torch.diag((torch.arange(width, device=rotation.device) >= 2 * pairs).to(rotation.dtype))
    return torch.einsum("...ncp,cpef->...nef", rotation, basis) + rest


def _turned(matrices: Tensor | None, vectors: Tensor) -> Tensor:
    return vectors if matrices is None else torch.einsum("...nef,...hnf->...hne", matrices, vectors)


def _normalised(block: Attention, vectors: Tensor, weights: Tensor, gains: Tensor | None) -> tuple[Tensor, Tensor]:
    """Queries or keys after QK-norm, and their transposed derivatives by the token: one a token, or W for all."""
    if gains is None:
        return vectors, weights.unsqueeze(-3)
    assert block.norm_eps is not None
    together = (-3, -1) if block.norm_over == "all_heads" else (-1,)
    root = (vectors.square().mean(together, keepdim=True) + block.norm_eps) ** -0.5
    unit = root * vectors
    radial = torch.einsum("...hne,...hde->...hnd", unit, weights) / vectors.shape[-1]
    if block.norm_over == "all_heads":
        radial = radial.mean(-3, keepdim=True)
    derivative = weights.unsqueeze(-3) - radial.unsqueeze(-1) * unit.unsqueeze(-2)
    return unit * gains.unsqueeze(-2), root.unsqueeze(-1) * derivative * gains.unsqueeze(-2).unsqueeze(-2)


def _through_keys(w_k: Tensor, turn_keys: Tensor | None, weighted: Tensor, queries: Tensor) -> Tensor:
    """sum_h P_hij c_hij u_hij^T."""
    if turn_keys is not None:
        pulled = torch.einsum("...hie,...jef->...hijf", queries, turn_keys).unsqueeze(-2)
    else:
        pulled = queries.unsqueeze(-2).unsqueeze(-2)
    pulled = (pulled @ w_k.unsqueeze(-4).mT).squeeze(-2)
    return torch.einsum("...hijo,...hijd->...iojd", weighted, pulled.expand(*weighted.shape[:-1], -1))


def _key_apart(block: Attention, source: Tensor, keys: Tensor, maps: Tensor) -> Tensor:
    """sum_l P_hil (K_hj - K_hl)."""
    if block.key_rotation is None and block.norm_eps is None:
        apart = source.unsqueeze(-2) - source.unsqueeze(-3)
        return torch.einsum("...hil,...jld,...hde->...hije", maps, apart, block.w_k)
    return torch.einsum("...hil,...hjle->...hije", maps, keys.unsqueeze(-2) - keys.unsqueeze(-3))


def reached_norm(matrix: Float[Tensor, "*batch rows cols"], norm: Norm, n: int, m: int) -> Float[Tensor, "*batch"]:
    """A number that the norm of the matrix reaches (for `l2` and `linf` the norm), with the gradient of that norm.

    Args:
        matrix: Jacobian of n output tokens by m input tokens.
        norm: of input and output.
        n: output tokens.
        m: input tokens.
    """
    if norm == "l2":
        return spectral_norm(matrix)
    if norm == "linf":
        return matrix.abs().sum(-1).amax(-1)
    blocks = matrix.unflatten(-1, (m, -1)).unflatten(-3, (n, -1))
    if norm == "token_mean":
        return m / n * largest_block_sum(blocks.movedim((-2, -1), (-4, -3)))
    return largest_block_sum(blocks)


def largest_block_sum(
    blocks: Float[Tensor, "*batch out out_dim in in_dim"], starts: Float[Tensor, "..."] | None = None
) -> Float[Tensor, "*batch"]:
    """Largest sum_j |J_ij^T w| over output tokens i and the unit vectors w that a power method comes to.

    The starts are the left singular vectors of each row of blocks, and what is given. A step w <- sum_j J_ij v_j with
    v_j = J_ij^T w / |J_ij^T w| never lowers the sum. The gradient is that of the sum with w held fixed.

    Args:
        blocks: of a Jacobian.
        starts: more of them along the first axis, for each output token along the second.
    """
    rows = blocks.movedim(-4, 0)
    # Each row by its largest entry, exactly: squares of what is left at rows that rest on one key would underflow.
    largest = rows.detach().abs().amax((-3, -2, -1))
    scale = torch.ldexp(torch.ones_like(largest), largest.frexp().exponent.clamp(-1000, 1000))
    rows = rows / scale[..., None, None, None]
    with torch.no_grad():
        w = torch.linalg.svd(rows.flatten(-2), full_matrices=False).U.movedim(-1, 0)
        w = unit(w if starts is None else torch.cat([w, starts]))
        for _ in range(POWER_STEPS):
            pulled = torch.einsum("i...fmd,ki...f->ki...md", rows, w)
            w = unit(torch.einsum("i...fmd,ki...md->ki...f", rows, unit(pulled)))
    sums = torch.einsum("i...fmd,ki...f->ki...md", rows, w).norm(dim=-1).sum(-1)
    return (sums * scale).amax((0, 1))


def unit(vectors: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
    """Each vector divided by its length; 0 stays 0."""
    length = vectors.norm(dim=-1, keepdim=True)
    return torch.where(length > 0, vectors / length.clamp(min=TINY), 0.0)


def spectral_norm(matrix: Float[Tensor, "*batch rows cols"]) -> Float[Tensor, "*batch"]:
    """Largest singular value, with the gradient u v^T of the top singular pair."""
    with torch.no_grad():
        left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    return (left[..., :, :1].mT @ matrix @ right[..., :1, :].mT)[..., 0, 0]
