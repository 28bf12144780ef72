"""Rows of non-negative weights: the common form of softmax rows, from logits or from probabilities.

A row holds weights w_j >= 0 with p_j = w_j / sum(w). From logits S, w_j = exp(S_j - max S), so the largest weight is
exactly 1 and the small ones keep full relative accuracy; from probabilities, w_j = p_j.

Numerics. `1 - p_(1)` is never computed by subtraction alone: where a row is nearly one-hot the difference has no
correct digits. It is the sum of the other weights, a sum of non-negative numbers.
"""

from __future__ import annotations

import dataclasses as dc

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.devices import refuse
from lipbounds.errors import InvalidInput
from lipbounds.rounding import EXP_ULPS


SMALLEST_NORMAL = torch.finfo(torch.float64).tiny
# Roundings in one weight computed from logits: exp, the product with the correction, and the correction itself.
WEIGHT_ROUNDINGS = EXP_ULPS + 3


@dc.dataclass(frozen=True, slots=True)
class Rows:
    """Float64 weights of softmax rows and the number of roundings each weight carries."""

    weights: Float[Tensor, "*batch n"]
    roundings: int

    @property
    def length(self) -> int:
        return self.weights.shape[-1]

    def top(self, k: int) -> tuple[Tensor, Tensor]:
        """The k largest weights, descending and padded with zeros beyond the length, and where they are."""
        kept = min(k, self.length)
        values, indices = self.weights.topk(kept, dim=-1)
        padding = values.new_zeros(*values.shape[:-1], k - kept)
        return torch.cat([values, padding], -1), indices

    def others(self, k: int) -> Tensor:
        """Sum of all weights but the k-th largest: s (1 - p_(k)), without a subtraction."""
        return self.others_than(k, *self.top(k))

    def others_than(self, k: int, values: Tensor, indices: Tensor) -> Tensor:
        """The same, with the k largest weights or more, and where they are, given as `top` returns them."""
        kept = min(k, self.length)
        rest = self.weights.scatter(-1, indices[..., :kept], 0.0).sum(-1)
        return rest + values[..., : k - 1].sum(-1)

    def total(self) -> Tensor:
        return self.weights.sum(-1)


def rows_from_logits(logits: Float[Tensor, "*batch n"]) -> Rows:
    """Weights exp(S - max S); -inf logits (masked keys) get weight 0.

    Raises:
        InvalidInput: not a floating tensor with at least one entry a row; NaN or +inf; a row that is masked fully.
    """
    _check_float("logits", logits)
    working = logits.to(torch.float64)
    largest = working.amax(-1, keepdim=True).detach()
    refuse(
        (~(largest < torch.inf), _odd_logits),  # NaN is larger than everything
        (largest.isneginf(), lambda: _masked(int(largest.isneginf().sum()))),
    )
    shifted = working - largest
    with torch.no_grad():  # the rounding error of the subtraction, exactly (Knuth's two-sum)
        virtual = shifted - working
        error = (working - (shifted - virtual)) - (largest + virtual)
        correction = 1 + error.masked_fill(shifted.isneginf(), 0.0)
    return Rows(shifted.exp() * correction, WEIGHT_ROUNDINGS)


def rows_from_probabilities(probabilities: Float[Tensor, "*batch n"]) -> Rows:
    """The probabilities as weights, each exact.

    Raises:
        InvalidInput: not a floating tensor with at least one entry a row; an entry is negative or NaN; a row does not
            sum to 1 within (n + 32) machine epsilons of its dtype.
    """
    _check_float("probabilities", probabilities)
    working = probabilities.to(torch.float64)
    tolerance = (probabilities.shape[-1] + 32) * torch.finfo(probabilities.dtype).eps
    off = (working.sum(-1) - 1).abs()
    refuse((~(probabilities >= 0), _negative), (off > tolerance, lambda: _unequal(off.max().item())))
    return Rows(working, 0)


def _odd_logits() -> InvalidInput:
    return InvalidInput("logits must be finite or -inf, got NaN or +inf; check the queries and keys.")


def _masked(count: int) -> InvalidInput:
    return InvalidInput(f"every row needs a finite logit, got {count} fully masked rows; drop those rows.")


def _negative() -> InvalidInput:
    return InvalidInput("probabilities must be >= 0 and not NaN; pass logits to the *_from_logits function instead.")


def _unequal(worst: float) -> InvalidInput:
    return InvalidInput(f"each row of probabilities must sum to 1, got a row off by {worst:.3g}; normalise it.")


def _check_float(name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        raise InvalidInput(f"{name} must be a floating-point tensor, got {tensor.dtype}; cast it.")
    if tensor.dim() == 0 or tensor.numel() == 0:
        raise InvalidInput(f"{name} must have at least one row with one entry, got shape {tuple(tensor.shape)}.")
