r"""The formula of `sharp_cheap` in the dtype of the block, without rounding and with norms as found: an estimate.

    ||T1 + T3|| with the direction f apart, plus ||T2||, each part by the formula of docs/bounds/sharp_cheap.md.

Where the bound takes upper bounds of norms (an eigensolver, a Schatten norm), this takes the stretch |M v| / |v| at a
vector v from squarings or the power method, which is at most the norm and is differentiated with v held fixed. So the
value is near that of `sharp_cheap`, mostly below it, and no bound of anything; its gradient is one of a penalty.
"""

from __future__ import annotations

import dataclasses as dc

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.errors import Unsupported
from lipbounds.ops.eigen import try_cholesky
from lipbounds.targets.attention import Attention


FLOOR = 1e-6  # of the trace, added to the diagonal of a Gram matrix of weights
SQUARINGS = 6  # of small Gram matrices: v has been multiplied 64 times
STEPS = 8  # of the power method on large matrices
SMALL = 128


@dc.dataclass(frozen=True, slots=True)
class _Side:
    """C_h = U_h L_h^T: the factors L_h, ||U_h^T U_g|| and ||[U_1 ... U_H]||."""

    factor: Float[Tensor, "*weights heads width width"]
    overlap: Float[Tensor, "*weights heads heads"]
    jointly: Float[Tensor, "*weights"]


def sharp_estimate(block: Attention) -> Float[Tensor, "*batch"]:
    """Estimate of what `sharp_cheap` gives, for each batch item; differentiable, and no bound.

    Args:
        block: self-attention with neither rotary positions nor QK-norm, in float32 or float64.

    Raises:
        Unsupported: the block is another one.
    """
    if block.memory is not None or block.query_rotation is not None or block.query_norm is not None:
        raise Unsupported(
            "sharp_estimate takes self-attention with neither rotary positions nor QK-norm; "
            "sharp_cheap with grad=True takes the others."
        )
    if block.queries_at is not None or block.dtype not in (torch.float32, torch.float64):
        raise Unsupported(
            "sharp_estimate takes float32 or float64 and queries of all tokens; cast or replace the block."
        )
    outputs, queries, keys, values = (_side(w) for w in (block.w_o.mT, block.w_q, block.w_k, block.w_v))
    maps, scale = block.probabilities, abs(block.scale_value)
    v = _centred(block.x.unsqueeze(-3) @ block.w_v) @ outputs.factor
    k = _centred(block.x.unsqueeze(-3) @ block.w_k) @ queries.factor
    q = block.queries @ keys.factor
    cross, spread = _covariances(maps, v, k)
    softmax, size = _g_1(maps), _norm(v).unsqueeze(-1)
    weights = scale * torch.minimum(cross, softmax * size * _norm(k).unsqueeze(-1))
    by_row = _root(_mixture(weights.mT, outputs)) * _root(_mixture(weights.mT, queries))
    reach = torch.minimum(softmax * size, _root(softmax * spread))
    along, across, mixing, direction = _mixing(block, maps, outputs, values)
    key = _key_part(reach, q, outputs, keys) * scale
    turned = (maps * direction[..., None, None, :]) @ v
    turned = turned - (maps @ direction[..., None, :, None]) * (maps @ v)
    key_along = torch.minimum(key, _key_part(turned.norm(dim=-1), q, outputs, keys) * scale)
    apart = _root((along + key_along).square() + (across + key).square())
    return torch.minimum(apart, mixing + key) + by_row.amax(-1)


def _covariances(maps: Tensor, v: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """||V'^T J_i K'||_F, and the largest eigenvalue of V'^T J_i V' from its trace and its Frobenius norm."""
    left, right = v @ v.mT, k @ k.mT
    images = maps @ torch.cat([left, right, left * right, left.square()], -1)
    through_left, through_right, crossed, squared = images.chunk(4, -1)
    weighted = maps * through_left
    inner = weighted.sum(-1)
    cross = (maps * crossed - 2 * weighted * through_right).sum(-1) + inner * (maps * through_right).sum(-1)
    frobenius = (maps * squared - 2 * weighted * through_left).sum(-1) + inner.square()
    trace = ((maps @ left.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)).squeeze(-1) - inner).clamp(min=0)
    rank = v.shape[-1]
    spread = trace / rank + _root((1 - 1 / rank) * (frobenius - trace.square() / rank))
    return _root(cross), torch.minimum(spread, trace)


def _mixing(block: Attention, maps: Tensor, outputs: _Side, values: _Side) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """T1 along and across the direction f, its norm, and f (lipbounds.derivatives.first.split_mixing)."""
    even = maps.shape[-2] ** -0.5
    means = maps.sum(-2) * even
    total = means.sum(-2)
    direction = total / total.norm(dim=-1, keepdim=True)
    along = (means * direction.unsqueeze(-2)).sum(-1)
    images = (maps @ direction[..., None, :, None]).squeeze(-1) - (along * even).unsqueeze(-1)
    across = means - along.unsqueeze(-1) * direction.unsqueeze(-2)
    inner = maps - (means * even).unsqueeze(-2) - images.unsqueeze(-1) * direction[..., None, None, :]
    middle = (along.amax(-1) + along.amin(-1)) / 2
    sizes = [(along - middle.unsqueeze(-1)).abs(), across.norm(dim=-1), images.norm(dim=-1), _norm(inner)]
    flat_v, flat_o = block.w_v.transpose(-3, -2).flatten(-2), block.w_o.flatten(-3, -2)
    own = torch.stack(sizes, -2)
    weights = own * _norm(values.factor.mT @ outputs.factor).unsqueeze(-2)
    by_head = _root(_mixture(weights, outputs)) * _root(_mixture(weights, values))
    jointly = (_norm(flat_v) * _norm(flat_o)).unsqueeze(-1) * own.amax(-1)
    apart, t12, t21, t22 = torch.minimum(by_head, jointly).unbind(-1)
    t11 = middle * _norm(flat_v @ flat_o) + apart
    first, second, product = t11.square() + t21.square(), t12.square() + t22.square(), t11 * t12 + t21 * t22
    norm = _root((first + second + _root((first - second).square() + 4 * product.square())) / 2)
    return _root(first), _root(second), norm, direction


def _key_part(reach: Float[Tensor, "*batch heads n"], queries: Tensor, outputs: _Side, keys: _Side) -> Tensor:
    """||T3|| over the scale of the logits."""
    sizes = _norm(reach.unsqueeze(-1) * queries).unsqueeze(-2)
    one = outputs.jointly.unsqueeze(-1) * _root(_mixture(sizes.square(), keys))
    both = _root(_mixture(sizes, outputs)) * _root(_mixture(sizes, keys))
    return torch.minimum(one, both).squeeze(-1)


def _side(weights: Float[Tensor, "*weights heads dim width"]) -> _Side:
    gram = weights.mT @ weights
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    unit = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    factor, _ = try_cholesky(gram + (FLOOR * trace + torch.finfo(gram.dtype).tiny) * unit)
    basis = torch.linalg.solve_triangular(factor, weights.mT, upper=False)  # U_h^T
    flat = basis.flatten(-3, -2)
    heads = basis.shape[-3]
    products = (flat @ flat.mT).unflatten(-1, (heads, -1)).unflatten(-3, (heads, -1)).transpose(-3, -2)
    return _Side(factor, _norm(products), _norm(flat))


def _mixture(weights: Float[Tensor, "*batch rows heads"], side: _Side) -> Float[Tensor, "*batch rows"]:
    """|| sum_h c_h U_h U_h^T || as lipbounds.ops.mixture bounds it."""
    largest = weights.amax(-1)
    with torch.no_grad():
        tiny = torch.finfo(largest.dtype).tiny
        unit = largest.clamp(min=tiny).unsqueeze(-1)
        vector = torch.ones_like(weights)
        for _ in range(4):
            vector = (weights / unit * vector) @ side.overlap
            vector = vector / vector.amax(-1, keepdim=True).clamp(min=tiny) + 1e-6
    ratio = ((weights * vector) @ side.overlap / vector).amax(-1)
    return torch.minimum(side.jointly.unsqueeze(-1).square() * largest, ratio)


def _g_1(maps: Float[Tensor, "*batch heads n m"]) -> Float[Tensor, "*batch heads n"]:
    largest, place = maps.max(-1, keepdim=True)
    rest = maps.scatter(-1, place, 0.0)
    return largest.squeeze(-1) * (rest.sum(-1) + rest.amax(-1))


def _norm(matrix: Float[Tensor, "*batch rows cols"]) -> Float[Tensor, "*batch"]:
    """|M v| at a unit vector v that is held fixed: at most the norm, and near it."""
    with torch.no_grad():
        vector = _vector(matrix)
    return (matrix @ vector).squeeze(-1).norm(dim=-1)


def _vector(matrix: Tensor) -> Float[Tensor, "*batch cols one"]:
    tiny = torch.finfo(matrix.dtype).tiny
    if matrix.shape[-1] <= SMALL:
        power = matrix.mT @ matrix
        for _ in range(SQUARINGS):
            power = power / power.abs().amax((-2, -1), keepdim=True).clamp(min=tiny)
            power = power @ power
        place = power.diagonal(dim1=-2, dim2=-1).argmax(-1)
        vector = power.take_along_dim(place[..., None, None], -1)
    else:
        vector = matrix.square().sum(-2).unsqueeze(-1).sqrt()
        for _ in range(STEPS):
            vector = matrix.mT @ (matrix @ vector)
            vector = vector / vector.abs().amax((-2, -1), keepdim=True).clamp(min=tiny)
    return vector / vector.norm(dim=-2, keepdim=True).clamp(min=tiny)


def _centred(rows: Tensor) -> Tensor:
    return rows - rows.mean(-2, keepdim=True)


def _root(squares: Tensor) -> Tensor:
    """Square root, with gradient 0 where the number is 0, or below by rounding."""
    positive = squares > 0
    return torch.where(positive, torch.where(positive, squares, 1.0).sqrt(), 0.0)
