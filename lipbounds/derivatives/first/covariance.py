"""Covariances of keys and values under each row of an attention map, with their rounding.

Cov_i(Y, Z) = Y^T J(P_i) Z. It does not change when a constant row is taken off Y or Z, so both are centred first, by
their mean over the keys. The slack for rounding carries no gradient. Proof: docs/derivatives.md, section 3.
"""

from __future__ import annotations

import dataclasses as dc
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.derivatives.rounding.logits import key_error, logit_error
from lipbounds.rounding import EXP_ULPS, UNIT_ROUNDOFF, gamma, inflate
from lipbounds.targets.attention import Attention


@dc.dataclass(frozen=True, slots=True)
class CentredRows:
    """Rows without their mean: values, the largest norm of a row, and the largest rounding error of a row."""

    rows: Float[Tensor, "*batch heads m width"]
    size: Float[Tensor, "*batch heads"]
    error: Float[Tensor, "*batch heads"]


@runtime_checkable
class Rows(Protocol):
    """Rows of each head: the largest norm of a row and the largest rounding error of one."""

    @property
    def rows(self) -> Float[Tensor, "*batch heads m width"]: ...

    @property
    def size(self) -> Float[Tensor, "*batch heads"]: ...

    @property
    def error(self) -> Float[Tensor, "*batch heads"]: ...


def centred_projection(
    tokens: Float[Tensor, "*batch m dim"], weights: Float[Tensor, "*weights heads dim width"]
) -> CentredRows:
    """X W without its mean row, for each head; a bias would drop out.

    Args:
        tokens: float64.
        weights: float64.
    """
    projected = tokens.unsqueeze(-3) @ weights
    rows = projected - projected.mean(-2, keepdim=True)
    largest = tokens.norm(dim=-1).amax(-1, keepdim=True)
    error = 4 * gamma(tokens.shape[-1] + tokens.shape[-2] + 8) * largest * weights.norm(dim=(-2, -1))
    return CentredRows(rows, rows.norm(dim=-1).amax(-1), error)


def centred_keys(block: Attention) -> CentredRows:
    """K without its mean row, for each head; if keys are normalised or turned, after that and with their bias.

    Args:
        block: in float64.
    """
    if block.key_rotation is None and block.key_norm is None:
        return centred_projection(block.source_input, block.w_k)
    rows = block.keys - block.keys.mean(-2, keepdim=True)
    error = key_error(block).amax(-1)
    largest = block.keys.norm(dim=-1).amax(-1)
    # As in `centred_projection`: the mean has the errors of the rows and its own, the difference one rounding.
    error = 2 * error + 4 * gamma(block.keys.shape[-2] + 8) * largest
    return CentredRows(rows, rows.norm(dim=-1).amax(-1), error)


def centred_tokens(tokens: Float[Tensor, "*batch m dim"]) -> CentredRows:
    """X without its mean row, as one head.

    Args:
        tokens: float64.
    """
    rows = (tokens - tokens.mean(-2, keepdim=True)).unsqueeze(-3)
    error = 8 * UNIT_ROUNDOFF * tokens.norm(dim=-1).amax(-1, keepdim=True)
    return CentredRows(rows, rows.norm(dim=-1).amax(-1), error)


@torch.no_grad()
def map_error(block: Attention) -> Float[Tensor, "*batch heads n"]:
    """Largest sum over j of |computed P_ij - P_ij| of each row, without a gradient.

    Args:
        block: in float64.
    """
    relative = torch.expm1(2 * logit_error(block)) + (block.source_input.shape[-2] + 16) * UNIT_ROUNDOFF
    return relative.clamp(max=2.0)


def map_upper(block: Attention) -> Float[Tensor, "*batch heads n m"]:
    """Each P_ij rounded up: never above 1, and 0 where the key is hidden.

    In logarithms, so that it holds also where the rounding of large logits leaves nothing of P: log P is off by at most
    2 eta, 4 u |log P| of the log-softmax, and m + 16 roundings; its gradient is that of P where it is below 1.

    Args:
        block: in float64.
    """
    hidden = block.logits.isneginf()
    logs = torch.where(hidden, 0.0, block.logits.log_softmax(-1))
    with torch.no_grad():
        error = 2 * logit_error(block).unsqueeze(-1) + 4 * UNIT_ROUNDOFF * logs.abs()
        error = error + (logs.shape[-1] + 16) * UNIT_ROUNDOFF
    return torch.where(hidden, 0.0, inflate((logs + error).clamp(max=0.0).exp(), EXP_ULPS).clamp(max=1.0))


def row_covariance(
    block: Attention, left: CentredRows, right: CentredRows
) -> tuple[Float[Tensor, "*batch heads n left right"], Float[Tensor, "*batch heads n"]]:
    """Cov_i(left, right) for every row i, and a bound on its rounding error in Frobenius norm.

    Forms m x left x right numbers a head, never n x m x width ones.

    Args:
        block: in float64.
        left: keys or values of the block, centred.
        right: the same.
    """
    maps = block.probabilities
    pairs = (left.rows.unsqueeze(-1) * right.rows.unsqueeze(-2)).flatten(-2)
    second = (maps @ pairs).unflatten(-1, (left.rows.shape[-1], right.rows.shape[-1]))
    means = (maps @ left.rows).unsqueeze(-1) * (maps @ right.rows).unsqueeze(-2)
    return second - means, moment_error(block, left, right)


def row_variance(block: Attention, centred: CentredRows) -> Float[Tensor, "*batch heads n"]:
    """tr Cov_i(rows, rows) for every row i, rounded up; O(n m) numbers.

    Args:
        block: in float64.
        centred: the rows.
    """
    maps = block.probabilities
    squares = (maps @ centred.rows.square().sum(-1, keepdim=True)).squeeze(-1)
    variance = squares - (maps @ centred.rows).square().sum(-1)
    error = moment_error(block, centred, centred) + 4 * gamma(centred.rows.shape[-1]) * squares
    return variance.clamp(min=0) + error


@torch.no_grad()
def moment_error(block: Attention, left: Rows, right: Rows) -> Float[Tensor, "*batch heads n"]:
    """How far `second - means` of `row_covariance` can be off in Frobenius norm, without a gradient.

    Args:
        block: in float64.
        left: rows whose covariance it is.
        right: the others.
    """
    relative = 4 * gamma(block.source_input.shape[-2] + 8) + 4 * map_error(block)
    rows = 2 * (left.error * right.size + right.error * left.size + left.error * right.error)
    return relative * (left.size * right.size).unsqueeze(-1) + rows.unsqueeze(-1)
