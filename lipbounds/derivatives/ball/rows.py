"""Keys, values and queries of all heads as rows in the space of tokens, at the centre of a ball, with their rounding.

A row W k, W the weights of the head towards the tokens (s W_Q for keys, W_O^T for values), is written B z with ||B|| <=
1 and |z| = |W k|: z = L^T k with W^T W + tau = L L^T. What W - B L^T leaves is added to the rounding error of the rows.
Symbols and proof: docs/derivatives.md, sections 1 and 6.
"""

from __future__ import annotations

import dataclasses as dc

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.derivatives.rounding.logits import projection_error
from lipbounds.ops.eigen import try_cholesky
from lipbounds.ops.spectral import power_of_two, product_norm_upper, spectral_norm_upper, vector_norm
from lipbounds.rounding import gamma, inflate
from lipbounds.targets.attention import Attention


REGULARISATION = 2.0**-40  # tau, relative to the squared Frobenius norm of the weights
OWN_ROUNDING = 1 + 1e-9  # pays for the rounding of error bounds themselves: sums of fewer than a million positive terms


@dc.dataclass(frozen=True, slots=True)
class Rows:
    """Keys or values of all heads seen from the tokens of the block: w or v of the table above, at the centre.

    Args:
        reduced: z without its mean, as computed, `[*batch, heads, m, width]`.
        factor_norm: ||B_h||, rounded up.
        joint: ||[B_1 ... B_H]||.
        error: of a row, after B.
        change: ||G_h|| or ||M_h||: how far a row moves with its token.
        reduced_change: the same for z.
        change_error: what B times the move of z leaves of the move of a row.
        joint_change: ||G|| or ||M||, for all heads together.
    """

    reduced: Float[Tensor, "*#batch_heads_rows m width"]
    factor_norm: Float[Tensor, "*#batch heads"]
    joint: Float[Tensor, "*#batch"]
    error: Float[Tensor, "*#batch heads"]
    change: Float[Tensor, "*#batch heads"]
    reduced_change: Float[Tensor, "*#batch heads"]
    change_error: Float[Tensor, "*#batch heads"]
    joint_change: Float[Tensor, "*#batch"]

    def less_mean(self, maps: Float[Tensor, "*#batch heads n m"]) -> Float[Tensor, "*#batch heads n m width"]:
        """z of every key less the mean of z under every row of a map.

        Args:
            maps: the map.
        """
        return self.reduced.unsqueeze(-3) - (maps @ self.reduced).unsqueeze(-2)

    def moments(
        self, maps: Float[Tensor, "*#batch heads n m"]
    ) -> tuple[Float[Tensor, "*#batch heads n"], Float[Tensor, "*#batch heads n"]]:
        """Means of |z|^2 under the rows of a map, and squares of the means of z.

        Args:
            maps: the map.
        """
        squares = (maps @ self.reduced.square().sum(-1, keepdim=True)).squeeze(-1)
        return squares, (maps @ self.reduced).square().sum(-1)

    def largest(self) -> Float[Tensor, "*#batch heads"]:
        """The largest |z|, without a gradient."""
        return self.reduced.detach().norm(dim=-1).amax(-1)


class TurnedRows(Rows):
    """Keys that the queries see turned, each row of the map in its own way: z has an axis for the rows before m."""

    __slots__ = ()

    def less_mean(self, maps: Tensor) -> Tensor:
        return self.reduced - maps.unsqueeze(-2) @ self.reduced

    def moments(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        squares = (maps * self.reduced.square().sum(-1)).sum(-1)
        return squares, (maps.unsqueeze(-2) @ self.reduced).squeeze(-2).square().sum(-1)

    def largest(self) -> Tensor:
        return self.reduced.detach().norm(dim=-1).amax((-2, -1))


def key_rows(block: Attention) -> Rows:
    """w_hj = s W_Q^h k_hj.

    Args:
        block: in float64, without rotary positions.
    """
    error = projection_error(*block.key_factors, None).amax(-1)
    return _rows(block.keys, error, abs(block.scale_value) * block.w_q, block.w_k.mT)


def value_rows(block: Attention) -> Rows:
    """v_hj = W_O^hT times the value j of head h.

    Args:
        block: in float64.
    """
    error = projection_error(*block.value_factors, None).amax(-1)
    return _rows(block.values, error, block.w_o.mT, block.w_v.mT)


def _rows(
    tokens: Float[Tensor, "*#batch heads m width"],
    error: Float[Tensor, "*#batch heads"],
    weights: Float[Tensor, "*#batch heads dim width"],
    moving: Float[Tensor, "*#batch heads width memory_dim"],
) -> Rows:
    """Rows `weights` times a token of a head that is `moving` times a token of the block, plus a constant.

    Args:
        tokens: keys or values.
        error: of each, largest of a head.
        weights: W.
        moving: W_K^T or W_V^T.
    """
    change = product_norm_upper(weights, moving)
    joint_change = torch.minimum(*joint_norms(weights, moving))
    basis = factored(weights)
    centred = tokens - tokens.mean(-2, keepdim=True)
    with torch.no_grad():
        lost = basis.error(tokens.norm(dim=-1).amax(-1), error, tokens.shape[-2])
        change_error = basis.rest * basis.own_unit * moving.square().sum((-2, -1)).sqrt() * OWN_ROUNDING
    reduced_change = basis.unit * product_norm_upper(basis.triangle.mT, moving)
    reduced = centred @ basis.triangle * basis.unit[..., None, None]
    return Rows(reduced, basis.norm, basis.joint, lost, change, reduced_change, change_error, joint_change)


@dc.dataclass(frozen=True, slots=True, kw_only=True)
class Basis:
    """Weights W of each head as B L^T with ||B|| <= 1 and L small.

    Args:
        triangle: L, divided by `own_unit`.
        norm: ||B_h||, rounded up.
        joint: ||[B_1 ... B_H]||.
        own_unit: a power of two, of the size of W.
        unit: the same; 0 where W is 0.
        rest: norm of what W - B L^T leaves, divided by `own_unit`, without a gradient.
    """

    triangle: Float[Tensor, "*#batch heads width width"]
    norm: Float[Tensor, "*#batch heads"]
    joint: Float[Tensor, "*#batch"]
    own_unit: Float[Tensor, "*#batch heads"]
    unit: Float[Tensor, "*#batch heads"]
    rest: Float[Tensor, "*#batch heads"]

    @torch.no_grad()
    def error(
        self, largest: Float[Tensor, "*#batch heads"], error: Float[Tensor, "*#batch heads"], rows: int
    ) -> Float[Tensor, "*#batch heads"]:
        """Of a row B z, for z = L^T times a token less the mean of the tokens; without a gradient.

        Args:
            largest: norm of a token as computed.
            error: of a token.
            rows: how many the mean is taken of.
        """
        length = self.triangle.square().sum((-2, -1)).sqrt()
        # The mean may be any row, but the difference is rounded; then the product with L.
        off = 2 * error + 4 * gamma(rows + self.triangle.shape[-1] + 16) * largest
        return (self.norm * length * off + 2 * self.rest * largest) * self.own_unit * OWN_ROUNDING


def factored(weights: Float[Tensor, "*#batch heads dim width"]) -> Basis:
    """B and L of the weights of each head; see the top of this file.

    Args:
        weights: W, float64.
    """
    width = weights.shape[-1]
    unit = power_of_two(weights.detach())  # so that squares neither overflow nor vanish
    weights = weights / unit
    size = weights.detach().square().sum((-2, -1))
    identity = torch.eye(width, dtype=weights.dtype, device=weights.device)
    tau = REGULARISATION * torch.where(size > 0, size, 1.0)
    triangle, _ = try_cholesky(weights.mT @ weights + tau[..., None, None] * identity)
    factor = torch.linalg.solve_triangular(triangle.mT, weights, upper=True, left=False)
    joint, norm = spectral_norm_upper(factor.movedim(-3, -2).flatten(-2)), spectral_norm_upper(factor)
    with torch.no_grad():
        length = triangle.square().sum((-2, -1)).sqrt()
        rest = (weights - factor @ triangle.mT).square().sum((-2, -1)).sqrt()
        rest = rest + 2 * gamma(width + 4) * factor.square().sum((-2, -1)).sqrt() * length
    # Where W is 0, so are its rows: z of the size of tau would count in how much each head weighs.
    kept = torch.where(size > 0, unit[..., 0, 0], 0.0)
    return Basis(triangle=triangle, norm=norm, joint=joint, own_unit=unit[..., 0, 0], unit=kept, rest=rest)


def joint_norms(
    left: Float[Tensor, "*#batch heads rows inner"], right: Float[Tensor, "*#batch heads inner cols"]
) -> tuple[Float[Tensor, "*#batch"], Float[Tensor, "*#batch"]]:
    """Norms of all L_h R_h side by side and stacked: sup sqrt(sum_h <x, L_h R_h y>^2) over unit x, y is at most either.

    Args:
        left: L_h, float64.
        right: R_h, float64.
    """
    products = left @ right
    sizes = left.square().sum((-2, -1)) * right.square().sum((-2, -1))
    error = 2 * gamma(left.shape[-1] + 4) * sizes.sum(-1).sqrt().detach()
    beside = spectral_norm_upper(products.movedim(-3, -2).flatten(-2))
    stacked = spectral_norm_upper(products.flatten(-3, -2))
    return beside + error, stacked + error


@dc.dataclass(frozen=True, slots=True)
class Queries:
    """u_hi = s W_K^h q_hi, norms and inner products between heads, the error of a row; ||G_h|| and ||G|| as in Rows.

    Where keys are turned u depends on the key: then `sizes` is the largest over visible keys, and `rows` is None.
    """

    rows: Float[Tensor, "*#batch heads n dim"] | None
    inner: Float[Tensor, "*#batch n #m heads heads"]
    sizes: Float[Tensor, "*#batch heads n"]
    error: Float[Tensor, "*#batch heads"]
    slack: Float[Tensor, "*#batch n"]
    change: Float[Tensor, "*#batch heads"]
    joint_change: Float[Tensor, "*#batch"]


def query_rows(block: Attention) -> Queries:
    """The queries of all heads seen from the tokens of the keys.

    Args:
        block: in float64, without rotary positions.
    """
    scale = abs(block.scale_value)
    rows = scale * block.queries @ block.w_k.mT
    beside = rows.movedim(-3, -2)  # heads x D for each token
    with torch.no_grad():
        size = block.queries.norm(dim=-1).amax(-1)
        off = projection_error(*block.query_factors, None).amax(-1) + 2 * gamma(block.w_k.shape[-1] + 8) * size
        error = scale * block.w_k.square().sum((-2, -1)).sqrt() * off * OWN_ROUNDING
        slack = 2 * gamma(rows.shape[-1] + 4) * beside.square().sum(-1).amax(-1)
    sizes = inflate(vector_norm(rows), rows.shape[-1] + 8)
    change = scale * product_norm_upper(block.w_q, block.w_k.mT)
    joint_change = torch.minimum(*joint_norms(scale * block.w_q, block.w_k.mT))
    return Queries(rows, (beside @ beside.mT).unsqueeze(-3), sizes, error, slack, change, joint_change)
