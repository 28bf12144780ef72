"""Norms of the softmax Jacobian J(p) = diag(p) - p p^T, as sound upper values in floating point.

| symbol | meaning |
|---|---|
| p_(1) >= p_(2) >= ... | order statistics of a row p, p_(n+1) = 0 |
| g_k(p) | p_(k) (1 - p_(k) + p_(k+1)) |
| lambda_k | k-th largest eigenvalue of J(p) |

lambda_k <= g_k (Yudin et al. 2025, Corollary 1, is the case k = 1). Rows given as probabilities rarely sum to exactly
1: for k = 1 the value is also at least the spectral norm of diag(p) - p p^T at the given floats. Proof:
docs/functions.md, section 1.

Numerics, for all functions here: float64 inside; relative slack of the order n * 2**-53 for sums of n terms, outwards
(see lipbounds.rounding); from logits also n * 2**-1022 absolute, where exp underflows; one cast upwards to the dtype.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.errors import InvalidInput
from lipbounds.ops._rows import SMALLEST_NORMAL, Rows, rows_from_logits, rows_from_probabilities
from lipbounds.rounding import cast_up, inflate


# Subsets are enumerated up to this length: 2**11 subset masses a row.
ENUMERATED_LENGTH = 12


def g_upper(probabilities: Float[Tensor, "*batch n"], k: int = 1) -> Float[Tensor, "*batch"]:
    """g_k of each row, rounded up: a proved upper bound of the k-th eigenvalue of J(p).

    Source: Yudin, Gaponov, Kudriashov, Rakhuba 2025 (arXiv 2507.07814), Corollary 1; proof at the top of this file.

    Args:
        probabilities: rows that sum to 1.
        k: which eigenvalue, 1 <= k <= n; k = 1 bounds the spectral norm.

    Raises:
        InvalidInput: rows that are no probabilities, or k out of range.
    """
    rows = rows_from_probabilities(probabilities)
    _check_rank(k, rows.length)
    top, where = rows.top(k + 1)
    # Both readings of 1 - p: they differ where the given row does not sum to exactly 1.
    complement = torch.maximum(rows.others_than(k, top, where), 1 - top[..., k - 1])
    value = top[..., k - 1] * (complement + top[..., k])
    return cast_up(inflate(value, rows.length + 4), probabilities.dtype)


def g_upper_from_logits(logits: Float[Tensor, "*batch n"], k: int = 1) -> Float[Tensor, "*batch"]:
    """g_k of softmax(logits), rounded up: a proved upper bound of the k-th eigenvalue of the softmax Jacobian.

    Accurate where the row is one-hot to all digits: g_1 of logits (0, -50) is 2 e^-50, not 0.

    Source: as `g_upper`.

    Args:
        logits: -inf marks a masked key.
        k: which eigenvalue, 1 <= k <= n.

    Raises:
        InvalidInput: NaN, +inf, a fully masked row, or k out of range.
    """
    rows = rows_from_logits(logits)
    _check_rank(k, rows.length)
    top, where = rows.top(k + 1)
    total = rows.total()
    value = (top[..., k - 1] / total) * ((rows.others_than(k, top, where) + top[..., k]) / total)
    return _finish_from_logits(value, rows, logits.dtype)


def g_all_upper_from_logits(logits: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
    """g_1, ..., g_n of softmax(logits) along the last axis, each rounded up; one sort a row.

    Source: as `g_upper`.

    Args:
        logits: -inf marks a masked key.

    Raises:
        InvalidInput: NaN, +inf or a fully masked row.
    """
    rows = rows_from_logits(logits)
    ordered = rows.weights.sort(-1, descending=True).values
    zero = torch.zeros_like(ordered[..., :1])
    before = torch.cat([zero, ordered.cumsum(-1)[..., :-1]], -1)
    after = torch.cat([ordered.flip(-1).cumsum(-1).flip(-1)[..., 1:], zero], -1)
    following = torch.cat([ordered[..., 1:], zero], -1)
    total = rows.total().unsqueeze(-1)
    return _finish_from_logits((ordered / total) * ((before + after + following) / total), rows, logits.dtype)


def l1_norm_upper(probabilities: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch"]:
    """Exact norm of J(p) from l1 to l1, and from l_inf to l_inf, rounded up: 2 p_(1) (1 - p_(1)).

    The l1 norm is the largest column sum of |J|, max_i 2 p_i (1 - p_i). The maximum is at i = 1: t (1 - t) grows up to
    t = 1/2, all entries but the first are at most 1/2, and 1 - p_(1) >= p_(2).

    Source: the column sums, derived here.

    Args:
        probabilities: rows that sum to 1.

    Raises:
        InvalidInput: rows that are no probabilities.
    """
    rows = rows_from_probabilities(probabilities)
    largest = rows.top(1)[0][..., 0]
    value = 2 * largest * torch.maximum(rows.others(1), 1 - largest)
    return cast_up(inflate(value, rows.length + 4), probabilities.dtype)


def l1_norm_upper_from_logits(logits: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch"]:
    """Exact l1 (and l_inf) norm of the softmax Jacobian at the logits, rounded up; see `l1_norm_upper`.

    Args:
        logits: -inf marks a masked key.

    Raises:
        InvalidInput: NaN, +inf or a fully masked row.
    """
    rows = rows_from_logits(logits)
    total = rows.total()
    value = 2 * (rows.top(1)[0][..., 0] / total) * (rows.others(1) / total)
    return _finish_from_logits(value, rows, logits.dtype)


def inf_to_one_norm_upper(probabilities: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch"]:
    """Norm of J(p) from l_inf to l1, theta(p) = 4 max_S m(S) (1 - m(S)), rounded up; m(S) is the mass of the subset S.

    Exact where p_(1) >= 1/2 (then S is the top entry: every other subset is further from mass 1/2) and up to
    12 entries (all subsets); otherwise the bound 1. The formula: a convex function of a vector in the cube is largest
    at a sign vector v, and |J v|_1 there is 4 m (1 - m) with m the mass of the positive entries.

    Source: Emadi 2026 (arXiv 2602.18849) names theta the balanced-mass factor; the closed form is derived here.

    Args:
        probabilities: rows that sum to 1.

    Raises:
        InvalidInput: rows that are no probabilities.
    """
    rows = rows_from_probabilities(probabilities)
    largest = rows.top(1)[0][..., 0]
    peaked = largest * torch.maximum(rows.others(1), 1 - largest)
    value = torch.where(largest >= 0.5, 4 * peaked, 4 * _balanced_mass(rows))
    return cast_up(inflate(value, 2 * rows.length + 6), probabilities.dtype)


def _balanced_mass(rows: Rows) -> Tensor:
    """max_S m(S) (1 - m(S)) by enumeration for short rows, else its upper bound 1/4."""
    if rows.length > ENUMERATED_LENGTH:
        return torch.full_like(rows.weights[..., 0], 0.25)
    # A subset and its complement have the same product: the last entry may stay outside.
    device = rows.weights.device
    numbers = torch.arange(2 ** (rows.length - 1), device=device).unsqueeze(-1)
    subsets = (numbers.bitwise_right_shift(torch.arange(rows.length, device=device)) & 1).double()
    inside = rows.weights @ subsets.mT
    outside = rows.weights @ (1 - subsets).mT
    # Both readings of "1 - mass", as for g_k.
    products = torch.maximum(inside * torch.maximum(outside, 1 - inside), outside * torch.maximum(inside, 1 - outside))
    return products.amax(-1)


def _finish_from_logits(value: Tensor, rows: Rows, dtype: torch.dtype) -> Tensor:
    """Slack for three factors of rounded weights and sums, and for what exp lost to underflow."""
    value = inflate(value, 3 * (rows.length + rows.roundings) + 8)
    return cast_up(value + rows.length * SMALLEST_NORMAL, dtype)


def _check_rank(k: int, n: int) -> None:
    if not 1 <= k <= n:
        raise InvalidInput(f"k must be between 1 and the row length, got k={k} for rows of length {n}.")
