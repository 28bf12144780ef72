r"""The norm of the second differential of a block at a point, row by row: about n Gram matrices a row, not n^2 / 2.

The blocks B_ijl of lipbounds.derivatives.second.norm, in three groups for each output token i and |a| = 1:

- one key, j = l (with j = i among them): |B_ijj| <= d_ij |a_j|^2, d_ij = t_ijj;
- two other keys, j /= l, neither of them i where the query moves: the sum is linear in the matrices a_j a_l^T side by
  side, whose Frobenius norm is at most |a|^2, so at most tau_i, tau_i^2 the norm of the sum of all B_ijl B_ijl^T;
- the own token and another, (i, l) and (l, i): likewise 2 o_i |a_i|, o_i^2 the norm of the sum over l of B_iil B_iil^T.

The vector of sum_j d_ij |a_j|^2 + tau_i is convex in the |a_j|^2, which sum to 1, so its norm is largest where one of
them is 1:

    ||d2F||  <=  max_j ( sum_i (d_ij + tau_i)^2 )^(1/2) + 2 max_i o_i.

Compared with the n x m^2 matrix there, what one key does is not summed over keys, and what two keys do is summed before
a norm is taken; what two keys do is summed over rows as though all rows could be at their worst in one direction.

tau_i in closed form, with sums over the keys j (P = 0, x = 0 where j is left out), U = <u_hi, u_gi>, s_hg = W_V^hT
u_gi, y_j = P_j x_j; for j /= l, B_ijl = - P_j P_l (<u, .> W_V^T + W_V^T <u, .>) - (P_j x_l + P_l x_j) <u, .><u, .>:

    sum B^h B^gT = 2 kappa (U W_V^hT W_V^g + s_hg s_gh^T) + 2 U (s_hg lambda_hg^T + lambda_gh s_gh^T) + U^2 mu,
    kappa  = (sum P^h P^g)^2 - sum (P^h P^g)^2,
    lambda_hg = 2 (sum P^h P^g) (sum P^h x^g) - 2 sum (P^h)^2 y^g,
    mu     = 2 (sum P^h P^g) (sum x^h x^gT) + 2 (sum P^g x^h) (sum P^h x^g)^T - 4 sum y^h y^gT.

Rounding: as there. With p = sum P^2 |u| ||W_V||_F and z = (sum P^2 sum |x|^2)^(1/2) |u|^2 of a head, the products above
are in absolute value at most 8 p_h p_g, 8 (p_h z_g + z_h p_g) and 8 z_h z_g, less than those of 3 (p + z).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.derivatives.cache import cached_per_block
from lipbounds.derivatives.second.gram_blocks import Factors, factors_of, pair_products, twice
from lipbounds.derivatives.second.norm import SQUARINGS, chunk_of, gram_norms, pair_norms, second_norm
from lipbounds.rounding import inflate
from lipbounds.targets.attention import Attention


def rows_work(block: Attention) -> int:
    """Multiplications and additions of `second_norm_by_rows` for one batch item, the large ones counted.

    Args:
        block: the attention block.
    """
    inner, out = block.heads * block.w_v.shape[-1], block.w_o.shape[-1]
    keys = block.logits.shape[-1] if block.memory_moves else 0
    products = 2 * inner * inner * block.moving_input.shape[-1]
    norm = inner * inner * out + inner * out * out + SQUARINGS * out**3
    return 2 * block.tokens * (2 * keys * products + (keys + 2) * norm)


@cached_per_block
def second_norm_by_rows(block: Attention) -> Float[Tensor, "*#batch"]:
    """Upper bound of the norm of the second differential at the block's input, rounded up; differentiable.

    Args:
        block: in float64, without rotary positions and QK-norm.
    """
    if not block.memory_moves:  # one Gram matrix a row is all there is
        return second_norm(block)
    factors = factors_of(block)
    apart = two_keys(block, factors)
    norms = torch.stack([one_key(block, factors, i) for i in range(block.tokens)], -2) + apart.unsqueeze(-1)
    # by the largest, so that squares do not overflow
    largest = norms.amax((-2, -1)).detach()
    finite = largest.isfinite() & (largest > 0)
    unit = torch.where(finite, largest, 1.0)
    value = (norms / unit[..., None, None]).square().sum(-2).amax(-1)
    value = torch.where(finite, torch.where(finite, value, 1.0).sqrt() * unit, largest)
    if block.query_moves and block.tokens > 1:
        own = torch.stack([own_and_another(block, factors, i) for i in range(block.tokens)], -1)
        value = value + 2 * own.amax(-1)
    value = inflate(value, block.tokens + 16) * factors.unit
    return torch.where(value.isnan(), torch.inf, value).expand(block.batch_shape)


def one_key(block: Attention, factors: Factors, i: int) -> Float[Tensor, "*#batch m"]:
    """d_ij of one i.

    Args:
        block: the attention block; its memory moves.
        factors: of the block.
        i: number of an output token.
    """
    keys = torch.arange(block.logits.shape[-1], device=block.device)
    return pair_norms(block, factors, i, keys, keys)


def own_and_another(block: Attention, factors: Factors, i: int) -> Float[Tensor, "*#batch"]:
    """o_i of one i.

    Args:
        block: the attention block; both inputs move, and there are two tokens or more.
        factors: of the block.
        i: number of an output token.
    """
    others = torch.arange(block.tokens, device=block.device)
    others, chunk = others[others != i], chunk_of(factors)
    gram = squares = torch.zeros_like(factors.error[..., :1, None])
    gram = gram[..., None, None, None]
    for k in range(0, others.numel(), chunk):
        second = others[k : k + chunk]
        products, size = pair_products(block, factors, i, torch.full_like(second, i), second)
        gram = gram + products.sum(-5, keepdim=True)
        squares = squares + size.square().sum(-2, keepdim=True)
    error = inflate(others.numel() ** 0.5 * factors.error[..., i : i + 1], 8)
    return gram_norms(factors, gram, squares.sqrt(), error).squeeze(-1)


def two_keys(block: Attention, factors: Factors) -> Float[Tensor, "*#batch n"]:
    """tau_i of every i.

    Args:
        block: the attention block; its memory moves.
        factors: of the block.
    """
    n, m = block.logits.shape[-2:]
    kept = torch.ones(n, m, dtype=factors.maps.dtype, device=block.device)
    if block.query_moves:
        kept = kept - torch.eye(n, dtype=kept.dtype, device=block.device)
    maps, spread = factors.maps * kept, factors.spread * kept.unsqueeze(-1)
    chunk = chunk_of(factors)
    error = inflate((m * max(m - 1, 0)) ** 0.5 * factors.error, 8)
    found = [
        gram_norms(
            factors,
            *_two_keys(factors, maps[..., k : k + chunk, :], spread[..., k : k + chunk, :, :], slice(k, k + chunk)),
            error[..., k : k + chunk],
        )
        for k in range(0, n, chunk)
    ]
    return torch.cat(found, -1)


def _two_keys(
    factors: Factors,
    maps: Float[Tensor, "*#batch heads i m"],
    spread: Float[Tensor, "*#batch heads i m v"],
    rows: slice,
) -> tuple[Float[Tensor, "*#batch i heads v heads w"], Float[Tensor, "*#batch i heads"]]:
    """Sums of B_ijl B_ijl^T over pairs of different keys of some rows, divided by the square of `size`; their sizes."""
    reach_unit, _, _, size = factors.units
    weight = (reach_unit / size)[..., None, None, None]
    spread = (reach_unit * (reach_unit / size))[..., None, None, None, None] * spread
    u = factors.reach[..., rows, :]
    inner = torch.einsum("...hia,...gia->...ihg", u, u)
    seen = torch.einsum("...hav,...gia->...ihvg", factors.w_v, u)
    values = torch.einsum("...hav,...gaw->...hvgw", factors.w_v, factors.w_v).unsqueeze(-5)
    weighted = maps.unsqueeze(-1) * spread

    alike = torch.einsum("...him,...gim->...ihg", maps, maps)
    kappa = weight.square() * (alike.square() - torch.einsum("...him,...gim->...ihg", maps.square(), maps.square()))
    met = torch.einsum("...gim,...himv->...ighv", maps, spread)
    lost = torch.einsum("...him,...gimw->...ihgw", maps.square(), weighted)
    lambda_ = 2 * (alike.unsqueeze(-1) * met - lost)
    mu = alike[..., :, None, :, None] * torch.einsum("...himv,...gimw->...ihvgw", spread, spread)
    mu = mu + met.transpose(-3, -2).transpose(-2, -1).unsqueeze(-1) * met.unsqueeze(-3)
    mu = 2 * mu - 4 * torch.einsum("...himv,...gimw->...ihvgw", weighted, weighted)

    wide = inner[..., :, None, :, None]
    crossed = seen.unsqueeze(-1) * seen.transpose(-3, -1).transpose(-2, -1).unsqueeze(-3)
    gram = 2 * kappa[..., :, None, :, None] * (wide * values + crossed)
    gram = gram + twice(2 * weight[..., None, None] * wide * seen.unsqueeze(-1) * lambda_.unsqueeze(-3))
    return gram + wide.square() * mu, _size(factors, maps, spread, u, weight.squeeze(-1))


@torch.no_grad()
def _size(factors: Factors, maps: Tensor, spread: Tensor, u: Tensor, weight: Tensor) -> Tensor:
    """Of each row and head, what the products are made of, in absolute value."""
    squares, length = maps.square().sum(-1), u.norm(dim=-1)  # heads x rows
    values = factors.w_v.norm(dim=(-2, -1)).unsqueeze(-1)
    size = weight * squares * length * values + squares.sqrt() * spread.norm(dim=(-2, -1)) * length.square()
    return 3 * size.mT
