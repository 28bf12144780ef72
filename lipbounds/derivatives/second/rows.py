"""The norm of the second differential of a block at a point, row by row: about n Gram matrices a row, not n^2 / 2.

    ||d2F||  <=  max_j ( sum_i (d_ij + tau_i)^2 )^(1/2) + 2 max_i o_i,

d_ij what key j alone does to output token i, tau_i what two other keys do (in closed form), o_i what the own token does
together with another one. Proof and rounding: docs/derivatives.md, section 5, steps 4 and 5.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.derivatives.cache import cached_per_block
from lipbounds.derivatives.second.factors import Factors, factors_of
from lipbounds.derivatives.second.gram_blocks import pair_products, twice
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
    if block.query_moves and block.x.shape[-2] > 1:
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
    others, own = torch.arange(block.x.shape[-2], device=block.device), block.token_of(i)
    others, chunk = others[others != own], chunk_of(factors)
    gram = squares = torch.zeros_like(factors.error[..., :1, None])
    gram = gram[..., None, None, None]
    for k in range(0, others.numel(), chunk):
        second = others[k : k + chunk]
        products, size = pair_products(block, factors, i, torch.full_like(second, own), second)
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
        kept = kept - block.of_queries(torch.eye(m, dtype=kept.dtype, device=block.device))
    maps, deviations = factors.maps * kept, factors.deviations * kept.unsqueeze(-1)
    chunk = chunk_of(factors)
    error = inflate((m * max(m - 1, 0)) ** 0.5 * factors.error, 8)
    found = [
        gram_norms(
            factors,
            *_two_keys(factors, maps[..., k : k + chunk, :], deviations[..., k : k + chunk, :, :], slice(k, k + chunk)),
            error[..., k : k + chunk],
        )
        for k in range(0, n, chunk)
    ]
    return torch.cat(found, -1)


def _two_keys(
    factors: Factors,
    maps: Float[Tensor, "*#batch heads i m"],
    deviations: Float[Tensor, "*#batch heads i m v"],
    rows: slice,
) -> tuple[Float[Tensor, "*#batch i heads v heads w"], Float[Tensor, "*#batch i heads"]]:
    """Sums of B_ijl B_ijl^T over pairs of different keys of some rows, divided by the square of `size`; their sizes."""
    logit_gradient_unit, _, _, size = factors.units
    weight = (logit_gradient_unit / size)[..., None, None, None]
    deviations = (logit_gradient_unit * (logit_gradient_unit / size))[..., None, None, None, None] * deviations
    u = factors.logit_gradient[..., rows, :]
    inner = torch.einsum("...hia,...gia->...ihg", u, u)
    seen = torch.einsum("...hav,...gia->...ihvg", factors.w_v, u)
    values = torch.einsum("...hav,...gaw->...hvgw", factors.w_v, factors.w_v).unsqueeze(-5)
    weighted = maps.unsqueeze(-1) * deviations

    alike = torch.einsum("...him,...gim->...ihg", maps, maps)
    kappa = weight.square() * (alike.square() - torch.einsum("...him,...gim->...ihg", maps.square(), maps.square()))
    met = torch.einsum("...gim,...himv->...ighv", maps, deviations)
    lost = torch.einsum("...him,...gimw->...ihgw", maps.square(), weighted)
    lambda_ = 2 * (alike.unsqueeze(-1) * met - lost)
    mu = alike[..., :, None, :, None] * torch.einsum("...himv,...gimw->...ihvgw", deviations, deviations)
    mu = mu + met.transpose(-3, -2).transpose(-2, -1).unsqueeze(-1) * met.unsqueeze(-3)
    mu = 2 * mu - 4 * torch.einsum("...himv,...gimw->...ihvgw", weighted, weighted)

    wide = inner[..., :, None, :, None]
    crossed = seen.unsqueeze(-1) * seen.transpose(-3, -1).transpose(-2, -1).unsqueeze(-3)
    gram = 2 * kappa[..., :, None, :, None] * (wide * values + crossed)
    gram = gram + twice(2 * weight[..., None, None] * wide * seen.unsqueeze(-1) * lambda_.unsqueeze(-3))
    return gram + wide.square() * mu, _size(factors, maps, deviations, u, weight.squeeze(-1))


@torch.no_grad()
def _size(factors: Factors, maps: Tensor, deviations: Tensor, u: Tensor, weight: Tensor) -> Tensor:
    """Of each row and head, what the products are made of, in absolute value."""
    squares, length = maps.square().sum(-1), u.norm(dim=-1)  # heads x rows
    values = factors.w_v.norm(dim=(-2, -1)).unsqueeze(-1)
    size = weight * squares * length * values + squares.sqrt() * deviations.norm(dim=(-2, -1)) * length.square()
    return 3 * size.mT
