r"""Gram matrices of the blocks of the second differential, from the factors of a block of attention.

Notation, and what the blocks B_ijl are: lipbounds.derivatives.second.norm. B_ijl is a sum of five terms linear in the
matrix a_j a_l^T; the inner products of each with each need inner products of the factors alone, so B_ijl, of D^2
entries for each of H d_v numbers, is never formed.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.derivatives.second.factors import Factors, wide
from lipbounds.targets.attention import Attention


def pair_products(
    block: Attention, factors: Factors, i: int, first: Tensor, second: Tensor
) -> tuple[Float[Tensor, "*#batch count heads v heads w"], Float[Tensor, "*#batch count heads"]]:
    """B_ijl B_ijl^T for pairs (j, l), divided by the square of `size`, and the sum of the norms of what makes them up.

    Args:
        block: the attention block; its memory moves.
        factors: of the block.
        i: number of a row of the output.
        first: numbers of the tokens j; where one of the two is that of the row and the query moves, it is this one.
        second: numbers of the tokens l.
    """
    logit_gradient_unit, query_unit, key_unit, size = factors.units
    same = (first == second).to(factors.maps.dtype)
    p_j, p_l = factors.maps[..., i, first], factors.maps[..., i, second]  # heads x pairs
    x_j, x_l = factors.deviations[..., i, first, :], factors.deviations[..., i, second, :]
    u = factors.logit_gradient[..., i, :]
    weight = wide(logit_gradient_unit / size, 2) * p_j * (same - p_l)
    left = right = (weight.unsqueeze(-1) * u.unsqueeze(-2)).movedim(-3, -2)  # pairs x heads x D
    z = same.unsqueeze(-1) * x_j - p_j.unsqueeze(-1) * x_l - p_l.unsqueeze(-1) * x_j
    z = wide(logit_gradient_unit * (logit_gradient_unit / size), 3) * z
    own = (first == block.token_of(i)).to(factors.maps.dtype) * (1 + same) if block.query_moves else None
    if own is None or not bool(own.any()):
        z = z.movedim(-3, -2)  # pairs x heads x v, of turned = z u^T
        with torch.no_grad():
            length = z.norm(dim=-1) * u.norm(dim=-1).unsqueeze(-2)
        gram = _products(factors, left, right, u, _of_rank_one(factors, left, z, u))
        return gram, _size(factors, left, right, length, u)
    turned = (z.unsqueeze(-1) * u[..., None, None, :]).movedim(-4, -3)  # pairs x heads x v x D
    away = factors.away[..., i, second, :]
    keys = wide(query_unit / size, 3) * (p_l.unsqueeze(-1) * away) @ factors.to_query.mT
    keys = keys.movedim(-3, -2)
    left = left + (own > 0).to(keys.dtype)[:, None, None] * keys
    right = right + (own > 1).to(keys.dtype)[:, None, None] * keys
    moments = x_l.unsqueeze(-1) * away.unsqueeze(-2) - p_l[..., None, None] * factors.cross[..., i, :, :].unsqueeze(-3)
    moments = wide(query_unit * (logit_gradient_unit / size), 4) * moments @ factors.to_query.mT.unsqueeze(-3)
    turned = turned + own[:, None, None, None] * moments.movedim(-4, -3)
    crossed = wide(query_unit * (key_unit / size), 3) * own.unsqueeze(-1) * x_l
    crossed = crossed.movedim(-3, -2)  # pairs x heads x v
    gram = _products(factors, left, right, u, _of_turned(factors, left, turned))
    gram = gram + _with_logits(factors, left, right, turned, u, crossed)
    total = _size(factors, left, right, turned.detach().norm(dim=(-2, -1)), u)
    total = total + crossed.detach().norm(dim=-1) * _logit_size(factors).unsqueeze(-2)
    if not bool((own > 1).any()):
        return gram, total
    at, both = (own > 1).nonzero()[0, 0], (own > 1).to(gram.dtype)
    square = own_square(factors, i) + _own_products(
        factors, i, left[..., at, :, :], right[..., at, :, :], turned[..., at, :, :, :], u, crossed[..., at, :, :]
    )
    gram = gram + both[:, None, None, None, None] * square.unsqueeze(-5)
    return gram, total + both.unsqueeze(-1) * own_size(factors, i).unsqueeze(-2)


@torch.no_grad()
def _size(factors: Factors, left: Tensor, right: Tensor, turned: Tensor, u: Tensor) -> Tensor:
    """Of each pair and head, the norms of the parts in `_products`, from those of E."""
    values = factors.w_v.norm(dim=(-2, -1)).unsqueeze(-2)
    return (left.norm(dim=-1) + right.norm(dim=-1)) * values + turned * u.norm(dim=-1).unsqueeze(-2)


@torch.no_grad()
def _logit_size(factors: Factors) -> Float[Tensor, "*#batch heads"]:
    return factors.to_query.norm(dim=(-2, -1)) * factors.to_key.norm(dim=(-2, -1))


@torch.no_grad()
def own_size(factors: Factors, i: int) -> Float[Tensor, "*#batch heads"]:
    """The norm of each head of the same, term by term.

    Args:
        factors: of the block; its query moves.
        i: number of an output token.
    """
    deviations, keys = _own(factors, i)
    return (deviations.norm(dim=-1) * keys.square().sum(-1)).sum(-1)


def twice(half: Float[Tensor, "*#batch heads v heads w"]) -> Tensor:
    """A matrix of parts plus its transpose."""
    return half + half.transpose(-4, -2).transpose(-3, -1)


def _products(
    factors: Factors,
    left: Float[Tensor, "*#batch pairs heads dim"],
    right: Float[Tensor, "*#batch pairs heads dim"],
    u: Float[Tensor, "*#batch heads dim"],
    turned: tuple[Tensor, Tensor, Tensor],
) -> Float[Tensor, "*#batch pairs heads v heads w"]:
    """Of < r, . > W_V^T, W_V^T < r', . > and E . < u, . >, each with each; `turned` is what E gives."""
    w_v = factors.w_v
    values = torch.einsum("...hav,...gaw->...hvgw", w_v, w_v).unsqueeze(-5)
    alike = torch.einsum("...kha,...kga->...khg", left, left) + torch.einsum("...kha,...kga->...khg", right, right)
    gram = values * alike.unsqueeze(-1).unsqueeze(-3)
    met, through, squares = turned
    seen = torch.einsum("...hav,...ga->...hvg", w_v, u).unsqueeze(-4)
    half = met.unsqueeze(-3) * seen.unsqueeze(-1)
    half = half + through * torch.einsum("...kha,...ga->...khg", right, u).unsqueeze(-1).unsqueeze(-3)
    left_v, right_v = (torch.einsum("...kha,...gaw->...khgw", side, w_v) for side in (left, right))
    half = half + left_v.unsqueeze(-3) * right_v.transpose(-3, -2).movedim(-1, -2).unsqueeze(-1)
    inner = torch.einsum("...ha,...ga->...hg", u, u)[..., None, :, None, :, None]
    return gram + twice(half) + squares * inner


def _of_turned(
    factors: Factors, left: Float[Tensor, "*#batch pairs heads dim"], turned: Float[Tensor, "*#batch pairs heads v dim"]
) -> tuple[Tensor, Tensor, Tensor]:
    """E r, W_V^T E^T and E E^T of all heads with all."""
    met = torch.einsum("...kha,...kgwa->...khgw", left, turned)
    through = torch.einsum("...hav,...kgwa->...khvgw", factors.w_v, turned)
    return met, through, torch.einsum("...khva,...kgwa->...khvgw", turned, turned)


def _of_rank_one(
    factors: Factors,
    left: Float[Tensor, "*#batch pairs heads dim"],
    z: Float[Tensor, "*#batch pairs heads v"],
    u: Float[Tensor, "*#batch heads dim"],
) -> tuple[Tensor, Tensor, Tensor]:
    """The same for E = z u^T."""
    met = torch.einsum("...kha,...ga->...khg", left, u).unsqueeze(-1) * z.unsqueeze(-3)
    seen = torch.einsum("...hav,...ga->...hvg", factors.w_v, u).unsqueeze(-4)
    inner = torch.einsum("...ha,...ga->...hg", u, u)[..., None, :, None, :, None]
    squares = inner * z[..., None, None] * z[..., None, None, :, :]
    return met, seen.unsqueeze(-1) * z[..., None, None, :, :], squares


def _with_logits(
    factors: Factors,
    left: Float[Tensor, "*#batch pairs heads dim"],
    right: Float[Tensor, "*#batch pairs heads dim"],
    turned: Float[Tensor, "*#batch pairs heads v dim"],
    u: Float[Tensor, "*#batch heads dim"],
    crossed: Float[Tensor, "*#batch pairs heads v"],
) -> Float[Tensor, "*#batch pairs heads v heads w"]:
    """Of x < ., G . > with itself and with the other three."""
    w_v, to_query, to_key = factors.w_v, factors.to_query, factors.to_key
    seen_q = torch.einsum("...hav,...gad->...hvgd", w_v, to_query)
    seen_k = torch.einsum("...hav,...gad->...hvgd", w_v, to_key)
    left_q = torch.einsum("...kha,...gad->...khgd", left, to_query)
    right_k = torch.einsum("...kha,...gad->...khgd", right, to_key)
    found = torch.einsum("...khgd,...hvgd->...khvg", left_q, seen_k)
    found = found + torch.einsum("...khgd,...hvgd->...khvg", right_k, seen_q)
    half = found.unsqueeze(-1) * crossed[..., None, None, :, :]
    gradient_k = torch.einsum("...had,...ga->...hgd", to_key, u)
    turned_q = torch.einsum("...kgwa,...had->...khgwd", turned, to_query)
    found = torch.einsum("...khgwd,...hgd->...khgw", turned_q, gradient_k)
    half = half + crossed[..., None, None] * found.unsqueeze(-3)
    queries = torch.einsum("...had,...gae->...hgde", to_query, to_query)
    keys = torch.einsum("...had,...gae->...hgde", to_key, to_key)
    inner = (queries * keys).sum((-2, -1))[..., None, :, None, :, None]
    return twice(half) + inner * crossed[..., None, None] * crossed[..., None, None, :, :]


def own_square(factors: Factors, i: int) -> Float[Tensor, "*#batch heads v heads w"]:
    """Gram matrix of sum_p x_ip < w~_ip, . >^2, divided by the square of `size`.

    Args:
        factors: of the block; its query moves.
        i: number of an output token.
    """
    deviations, keys = _own(factors, i)
    inner = torch.einsum("...hpa,...gqa->...hpgq", keys, keys).square()
    return torch.einsum("...hpv,...hpgq,...gqw->...hvgw", deviations, inner, deviations)


def _own(factors: Factors, i: int) -> tuple[Float[Tensor, "*#batch heads m v"], Float[Tensor, "*#batch heads m dim"]]:
    _, query_unit, _, size = factors.units
    deviations = wide(query_unit * (query_unit / size), 3) * factors.deviations[..., i, :, :]
    return deviations, factors.away[..., i, :, :] @ factors.to_query.mT


def _own_products(
    factors: Factors,
    i: int,
    left: Float[Tensor, "*#batch heads dim"],
    right: Float[Tensor, "*#batch heads dim"],
    turned: Float[Tensor, "*#batch heads v dim"],
    u: Float[Tensor, "*#batch heads dim"],
    crossed: Float[Tensor, "*#batch heads v"],
) -> Float[Tensor, "*#batch heads v heads w"]:
    """Of sum_p x_ip < w~_ip, . >^2 with the other four, of the pair (i, i)."""
    deviations, keys = _own(factors, i)
    by_value = torch.einsum("...hpa,...gaw->...hpgw", keys, factors.w_v)
    sides = torch.einsum("...hpa,...ga->...hpg", keys, left + right)
    found = sides.unsqueeze(-1) * by_value
    by_gradient = torch.einsum("...hpa,...ga->...hpg", keys, u)
    found = found + by_gradient.unsqueeze(-1) * torch.einsum("...hpa,...gwa->...hpgw", keys, turned)
    by_query = torch.einsum("...hpa,...gad->...hpgd", keys, factors.to_query)
    by_key = torch.einsum("...hpa,...gad->...hpgd", keys, factors.to_key)
    logits = (by_query * by_key).sum(-1)
    found = found + logits.unsqueeze(-1) * crossed[..., None, None, :, :]
    return twice(torch.einsum("...hpv,...hpgw->...hvgw", deviations, found))
