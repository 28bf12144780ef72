r"""Sound bounds written once more, plainly, from replaceable parts: planted faults are made by replacing one.

Shares no code with lipbounds.bounds: torch.linalg on the matrices of an `Attention`, in float64. `Formula` is Theorem 3
of Yudin et al. 2025 with biases, for each head

    L = ||W_V|| ||P|| + ||V|| max_i g_1(P_i) |s| ( ||K W_Q^T|| + ||Q W_K^T|| ),      ||W_O|| sqrt( sum_h L_h^2 ).

Rounding: products carry 1e-13 of their Frobenius norms, and what depends on the logits their error as an exponent.
"""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.rounding import cast_up
from lipbounds.targets.attention import Attention


Part = Callable[[Attention], Tensor]  # of each head, [*batch heads]
RowNorm = Callable[[Tensor], Tensor]  # of sorted rows of probabilities, largest first, one zero at the end
ROUNDING = 1e-13
UNIT = 2.0**-53
FAR = 400.0  # as an exponent: more than any norm here, and no infinity that a zero would turn into NaN


def norm(*matrices: Tensor) -> Float[Tensor, "*batch"]:
    """Spectral norm of a product, and its rounding."""
    product, size = matrices[0], frobenius(matrices[0])
    for matrix in matrices[1:]:
        product, size = product @ matrix, size * frobenius(matrix)
    return torch.linalg.matrix_norm(product, 2) + ROUNDING * size


def frobenius(matrix: Tensor) -> Float[Tensor, "*batch"]:
    """Frobenius norm of the last two axes."""
    return torch.linalg.matrix_norm(matrix)


def logit_error(block: Attention) -> Float[Tensor, "*batch heads"]:
    """How far the logits of a head can be from exact ones."""
    sizes = [row_size(block, side) for side in ("query", "key")]
    operations = 2 * (block.x.shape[-1] + block.source_input.shape[-1] + block.w_q.shape[-1] + 8)
    error = operations * UNIT * abs(block.scale_value) * sizes[0] * sizes[1]
    if block.mask is not None:
        error = error + 2 * UNIT * torch.where(block.mask.isneginf(), 0.0, block.mask).abs().amax()
    return error.expand(block.logits.shape[:-2])


def row_size(block: Attention, side: str) -> Float[Tensor, "*batch heads"]:
    """What the rounding of queries or keys is relative to; a norm magnifies it by its largest weight and 1 / RMS."""
    tokens, weights = getattr(block, f"{side}_factors")
    size = _longest(tokens) * frobenius(weights)
    gain = getattr(block, f"{side}_norm_weight")
    if gain is None:
        return size
    vectors = tokens @ weights
    if block.norm_over == "all_heads":
        size = torch.linalg.vector_norm(size, dim=-1, keepdim=True)
        vectors = vectors.movedim(-3, -2).flatten(-2).unsqueeze(-3)
    root = (vectors.square().mean(-1) + block.norm_eps).rsqrt().amax(-1)
    return gain.abs().amax(-1) * (root * size + vectors.shape[-1] ** 0.5)


def _longest(tokens: Tensor) -> Tensor:
    return torch.linalg.vector_norm(tokens, dim=-1).amax(-1)


def sorted_rows(logits: Float[Tensor, "*batch m"]) -> Float[Tensor, "*batch more"]:
    """Softmax rows sorted downwards, with a zero at the end that stands for what a short row lacks."""
    ordered = logits.sort(-1, descending=True).values
    weights = (ordered - ordered[..., :1]).exp()
    rows = weights / weights.sum(-1, keepdim=True)
    return torch.cat([rows, rows.new_zeros(*rows.shape[:-1], 2)], -1)


def g_1(rows: Tensor) -> Tensor:
    """p_(1) (1 - p_(1) + p_(2)), without the difference."""
    return rows[..., 0] * (rows[..., 1:].sum(-1) + rows[..., 1])


def largest(row_norm: RowNorm, *, of: Callable[[Attention], Tensor] = lambda block: block.logits) -> Part:
    """The largest row, rounding of the logits included; never above 1/2."""

    def part(block: Attention) -> Tensor:
        values, error = row_norm(sorted_rows(of(block))).amax(-1), logit_error(block)
        # Where the logits are not known at all, neither is the row: 0 times infinity is not 0.
        known = error < 1
        factor = (4 * torch.where(known, error, 0.0)).exp() * (1 + ROUNDING)
        return torch.where(known, (values * factor).clamp(max=0.5), 0.5)

    return part


def map_norm(block: Attention) -> Float[Tensor, "*batch heads"]:
    """||P||."""
    error = logit_error(block)
    known = error < 1
    factor = (2 * torch.where(known, error, 0.0)).exp() * (1 + ROUNDING)
    found = torch.linalg.matrix_norm(block.probabilities, 2) * factor
    return torch.where(known, found, block.logits.shape[-2] ** 0.5)  # ||P||^2 <= ||P||_1 ||P||_inf <= n


def value_weights(block: Attention) -> Float[Tensor, "*batch heads"]:
    """||W_V||."""
    return norm(block.w_v)


def values(block: Attention) -> Float[Tensor, "*batch heads"]:
    """||V||."""
    return norm(*block.value_factors)


def key_side(block: Attention) -> Float[Tensor, "*batch heads"]:
    """||K W_Q^T||: how the logits move with the queries."""
    return norm(*block.key_factors, block.w_q.mT)


def query_side(block: Attention) -> Float[Tensor, "*batch heads"]:
    """||Q W_K^T||: how the logits move with the keys."""
    return norm(*block.query_factors, block.w_k.mT)


def output(block: Attention) -> Float[Tensor, "*batch"]:
    """||W_O||, all heads together."""
    return norm(block.w_o.flatten(-3, -2))


def length(heads: Float[Tensor, "*batch heads"]) -> Float[Tensor, "*batch"]:
    """sqrt( sum_h L_h^2 )."""
    size = heads.detach().amax(-1, keepdim=True).clamp(min=1e-300)  # the square of 1e-200 is 0
    return torch.linalg.vector_norm(heads / size, dim=-1) * size[..., 0]


LARGEST_G_1 = largest(g_1)


@dc.dataclass(frozen=True, kw_only=True)
class Formula:
    """Theorem 3 with biases; each part can be replaced."""

    softmax: Part = LARGEST_G_1
    maps: Part = map_norm
    value_weights: Part = value_weights
    values: Part = values
    key_side: Part = key_side
    query_side: Part = query_side
    scale: Callable[[Attention], float | Tensor] = lambda block: abs(block.scale_value)
    terms: Callable[[Tensor, Tensor], Tensor] = torch.add
    heads: Callable[[Tensor], Tensor] = length
    output: Part = output
    cast: Callable[[Tensor, torch.dtype], Tensor] = cast_up

    def __call__(self, block: Attention) -> Tensor:
        """The bound at a block, in its dtype."""
        wide = block.double
        change = mixing = torch.zeros_like(wide.logits[..., 0, 0])
        if wide.query_moves:
            change = change + self.key_side(wide)
        if wide.memory_moves:
            change = change + self.query_side(wide)
            mixing = self.value_weights(wide) * self.maps(wide)
        heads = self.terms(mixing, self.scale(wide) * self.values(wide) * self.softmax(wide) * change)
        value = self.output(wide) * self.heads(heads) * (1 + ROUNDING)
        return self.cast(value.expand(block.batch_shape), block.dtype)


def input_norm(block: Attention) -> Float[Tensor, "*batch 1"]:
    """||X||."""
    return norm(block.x).unsqueeze(-1)


def literal(
    *, inputs: Part = input_norm, product: Part = lambda block: norm(block.w_q, block.w_k.mT), **parts: Part
) -> Formula:
    """Theorem 3 as printed, ||W_V|| ( ||P|| + 2 ||X||^2 ||A|| max_i g_1 ): no biases, no cross-attention."""
    side = lambda block: inputs(block) * product(block)  # noqa: E731
    own = {"values": lambda block: inputs(block) * value_weights(block), "key_side": side, "query_side": side}
    return Formula(**{**own, **parts})


# -- rotary positions: `centred.weights`, without its centred values ---------------------------------------------------


def _rotation_norm(rotation: Tensor) -> float | Tensor:
    """The largest norm of a token's rotation, for all heads; at least 1, for features that are left alone."""
    return torch.linalg.vector_norm(rotation, dim=-2).amax((-2, -1)).clamp(min=1).unsqueeze(-1) * (1 + ROUNDING)


def turned(
    *,
    keys: Part = lambda block: norm(block.keys),
    queries: Part = lambda block: norm(block.queries),
    length: Callable[[Tensor], float | Tensor] = _rotation_norm,
) -> Formula:
    """`Formula` with ||K|| ||W_Q|| and ||Q|| ||W_K||, Q and K turned, which rotary positions leave valid."""

    def key_side(block: Attention) -> Tensor:
        rounding = ROUNDING * frobenius(block.key_factors[0]) * frobenius(block.key_factors[1])
        return (keys(block) + rounding) * norm(block.w_q) * length_of(block.query_rotation)

    def query_side(block: Attention) -> Tensor:
        rounding = ROUNDING * frobenius(block.query_factors[0]) * frobenius(block.query_factors[1])
        return (queries(block) + rounding) * norm(block.w_k) * length_of(block.key_rotation)

    def length_of(rotation: Tensor | None) -> float | Tensor:
        return 1.0 if rotation is None else length(rotation)

    return Formula(key_side=key_side, query_side=query_side)


# -- centred: `centred.products`, tighter, for the controls ------------------------------------------------------------


def centred(factors: tuple[Tensor, Tensor], *last: Tensor) -> Tensor:
    """Norm of a product whose first factor has lost its mean row."""
    tokens, weights = factors
    middle = tokens - tokens.mean(-2, keepdim=True)
    rounding = ROUNDING * frobenius(tokens) * frobenius(weights)
    for matrix in last:
        rounding = rounding * frobenius(matrix)
    return norm(middle, weights, *last) + rounding


CENTRED = Formula(
    values=lambda block: centred(block.value_factors),
    key_side=lambda block: centred(block.key_factors, block.w_q.mT),
)


# -- covariances: `covariance.exact` -----------------------------------------------------------------------------------


def covariance_of(first: Tensor, second: Tensor, maps: Tensor) -> Float[Tensor, "*batch heads n d e"]:
    """Covariance of the rows of two matrices under each row of the attention map."""
    left = first.unsqueeze(-3) - (maps @ first).unsqueeze(-2)
    right = second.unsqueeze(-3) - (maps @ second).unsqueeze(-2)
    return left.mT @ (maps.unsqueeze(-1) * right)


def over_columns(maps: Tensor, weights: Tensor) -> Float[Tensor, "*batch heads"]:
    """max_j sum_i P_ij w_i."""
    return (maps.mT @ weights.unsqueeze(-1)).squeeze(-1).amax(-1)


@dc.dataclass(frozen=True, kw_only=True)
class Covariance:
    """||W_V|| ||P|| + |s| max_i ||Cov_i(V, K) W_Q^T|| + sqrt( max_j sum_i P_ij |u_i|^2 ||Cov_i(V, V)|| )."""

    covariance: Callable[[Tensor, Tensor, Tensor], Tensor] = covariance_of
    size: Callable[[Tensor], Tensor] = lambda matrix: torch.linalg.matrix_norm(matrix, 2)
    columns: Callable[[Tensor, Tensor], Tensor] = over_columns

    def __call__(self, block: Attention) -> Tensor:
        """The bound at a block, in its dtype."""
        wide, scale = block.double, abs(block.scale_value)
        tokens = wide.source_input.unsqueeze(-3)
        tokens = tokens - tokens.mean(-2, keepdim=True)
        found, keys, maps = tokens @ wide.w_v, tokens @ wide.w_k, wide.probabilities
        total = torch.zeros_like(wide.logits[..., 0, 0])
        moved, source = torch.zeros_like(total), frobenius(wide.source_input).unsqueeze(-1)
        if wide.query_moves:
            moved = moved + scale * frobenius(wide.w_q) * source.square() * frobenius(wide.w_k) * frobenius(wide.w_v)
            cross = self.covariance(found, keys, maps) @ wide.w_q.mT.unsqueeze(-3)
            total = total + scale * self.size(cross).amax(-1)
        if wide.memory_moves:
            moved = moved + frobenius(wide.w_v)
            reach = torch.linalg.vector_norm(scale * wide.queries @ wide.w_k.mT, dim=-1).square()
            squares = self.columns(maps, reach * self.size(self.covariance(found, found, maps)))
            total = total + torch.where(squares > 0, squares.clamp(min=1e-300).sqrt(), 0.0)
            total = total + value_weights(wide) * map_norm(wide)
        products = scale * frobenius(wide.queries) * frobenius(keys)
        sizes = source * frobenius(wide.w_q) * frobenius(wide.w_k) * scale
        room = 1e-12 * (products + sizes * frobenius(tokens) + 1) * moved
        heads = (total + room) * (8 * logit_error(wide)).clamp(max=FAR).exp()
        return cast_up((output(wide) * length(heads) * (1 + ROUNDING)).expand(block.batch_shape), block.dtype)


# -- the Jacobian itself ---------------------------------------------------------------------------------------------


def dense_jacobian(block: Attention) -> Float[Tensor, "*batch outputs inputs"]:
    """The Jacobian, column by column, in float64."""
    wide = block.double
    moving = wide.moving_input
    size = moving.shape[-2] * moving.shape[-1]
    basis = torch.eye(size, dtype=torch.float64).reshape(size, *[1] * len(block.batch_shape), *moving.shape[-2:])
    images = wide.jvp(basis.expand(size, *block.batch_shape, *moving.shape[-2:]))
    return images.flatten(-2).movedim(0, -1).detach()


def jacobian_error(block: Attention) -> Float[Tensor, "*batch"]:
    """How far the computed Jacobian may be from the exact one, in the spectral norm."""
    wide = block.double
    sizes = frobenius(wide.source_input).unsqueeze(-1) * frobenius(wide.key_factors[1])
    products = abs(wide.scale_value) * frobenius(wide.query_factors[0]) * frobenius(wide.query_factors[1]) * sizes
    values = frobenius(wide.value_factors[0]) * frobenius(wide.value_factors[1]) * abs(wide.scale_value)
    through = torch.zeros_like(products)  # only what moves: the rest has other units
    if wide.query_moves:
        keys = frobenius(wide.key_factors[0]) * frobenius(wide.key_factors[1])
        through = through + values * frobenius(wide.w_q) * keys
    if wide.memory_moves:
        queries = frobenius(wide.query_factors[0]) * frobenius(wide.query_factors[1])
        through = through + frobenius(wide.w_v) + values * frobenius(wide.w_k) * queries
    growth = (8 * logit_error(wide)).clamp(max=FAR).exp() - 1
    return ((1e-13 * (1 + products) + growth) * through * frobenius(wide.w_o)).sum(-1) * wide.tokens**0.5


def exact(block: Attention) -> Tensor:
    """The norm of the Jacobian, rounded up: the constant itself."""
    value = torch.linalg.matrix_norm(dense_jacobian(block), 2)
    return cast_up(value * (1 + ROUNDING) + jacobian_error(block), block.dtype)
