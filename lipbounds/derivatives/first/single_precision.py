r"""Rows, logits and maps of attention evaluated in float32, their rounding proved.

With u = 2^-24 and gamma(k) = k u / (1 - k u), rows of queries, keys and values from sums in chunks of c terms are off
by at most e_i = gamma(c + D/c + 2) ||[x_i 1]|| ||[W; b]||_F, and logits by

    eta_i = s ( e_qi (|k| + e_k) + |q_i| e_k + gamma(d + 4) |q_i| |k| ) + 112 u,      |k|, e_k the largest of all keys,

with the rows as computed, which are far shorter than ||x_i|| ||W||_F. The map then carries factors in [e^(-2 eta),
e^(2 eta)], g_1 in [e^(-4 eta), e^(4 eta)]. What underflow takes off a weight is at most 2^-126, and is added. Norms are
in lipbounds.derivatives.first.single_norms. Proof: docs/derivatives.md, section 14.

A value is of use where all that is added is a small share of it, which `Rounded` tells: elsewhere, for peaked attention
above all, float64 is the better choice.
"""

from __future__ import annotations

import dataclasses as dc
import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.derivatives.cache import is_tracked
from lipbounds.errors import InvalidInput
from lipbounds.rounding import cast_up
from lipbounds.targets.attention import Attention
from lipbounds.targets.weight_norms import WeightNorms


UNIT_SINGLE = 2.0**-24  # of float32
SMALLEST_SINGLE = 2.0**-126  # normal number of float32: what is below may be flushed to zero
CHUNK = 128  # terms of a sum of products that are added before the next ones are
OUT_OF_RANGE = 104.0  # exp of less is no float32
STEPS = 12  # of the power method for the norm of the map, at most
MET = 1e-3  # relative distance of its bounds at which it ends
SLACK = 1.05  # of a value that float32 gave, over what it was without the rounding that is added
Precision = Literal["auto", "float64"]
OWN_ROUNDING = 1 + 1e-9  # pays for the float64 arithmetic of the few numbers of each head


@dc.dataclass(frozen=True, slots=True)
class Rounded:
    """A number that float32 gave, without and with what its rounding can have taken off it; float64."""

    found: Tensor
    upper: Tensor

    def is_close(self) -> bool:
        """Whether rounding added under 5 % to all items, and each is finite."""
        return bool(((self.upper <= SLACK * self.found) & (self.found < torch.inf)).all())

    def result(self, block: Attention) -> tuple[Tensor, dict[str, Tensor]]:
        """The value of a bound in the dtype of the block, and its details.

        Args:
            block: of the bound.
        """
        value = self.upper.expand(block.batch_shape)
        added = (self.upper / self.found - 1).expand(block.batch_shape)
        return cast_up(value, block.dtype), {"detail.bits": torch.full_like(value, 32), "detail.added": added}

    def largest(self) -> Rounded:
        """The largest of the last dimension."""
        return Rounded(self.found.amax(-1), self.upper.amax(-1))

    def sum(self) -> Rounded:
        """Over the last dimension."""
        return Rounded(self.found.sum(-1), self.upper.sum(-1))

    def least(self, other: Rounded) -> Rounded:
        """The smaller one of each.

        Args:
            other: of the same shape.
        """
        return Rounded(torch.minimum(self.found, other.found), torch.minimum(self.upper, other.upper))

    def __mul__(self, other: Rounded | Tensor | float) -> Rounded:
        """Times another one, or an exact number; `OWN_ROUNDING` in the end pays for the products."""
        found, upper = (other.found, other.upper) if isinstance(other, Rounded) else (other, other)
        return Rounded(self.found * found, self.upper * upper)

    def __add__(self, other: Rounded) -> Rounded:
        return Rounded(self.found + other.found, self.upper + other.upper)


@dc.dataclass(frozen=True, slots=True)
class SingleRows:
    """Queries, keys or values in float32.

    Args:
        rows: as computed.
        length: at least the length of each row.
        error: at least the distance of each row to the exact one.
    """

    rows: Float[Tensor, "*batch heads n width"]
    length: Float[Tensor, "*batch heads n"]
    error: Float[Tensor, "*batch heads n"]


def has_single_precision(block: Attention) -> bool:
    """Whether the block can be evaluated so: floats of at most 32 bits, queries of all tokens, neither QK-norm nor
    rotary positions, no gradient, and products that torch makes of float32 (not of TF32 or bfloat16)."""
    plain = block.query_norm is None and block.query_rotation is None and block.queries_at is None
    short = block.dtype != torch.float64
    tracked = torch.is_grad_enabled() and is_tracked(block)
    return plain and short and not tracked and _products_are_single()


def wanted_in_single_precision(block: Attention, precision: str) -> bool:
    """Whether float32 is to be tried.

    Args:
        block: of the bound.
        precision: `auto` or `float64`.

    Raises:
        InvalidInput: it is neither.
    """
    if precision not in ("auto", "float64"):
        raise InvalidInput(f"precision must be auto or float64, got {precision!r}.")
    # Elsewhere than on the CPU the host would wait once more to learn which of the two it is.
    return precision == "auto" and block.device.type == "cpu" and has_single_precision(block)


def _products_are_single() -> bool:
    """Whether products of float32 matrices on the CPU are of float32 numbers, as far as torch says."""
    matmul = getattr(torch.backends.mkldnn, "matmul", None)  # not there before torch 2.9
    if getattr(matmul, "fp32_precision", "none") not in ("none", "ieee"):
        return False
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # it was set for some backends only, which torch cannot say in one word
        return False


def known(value: Tensor) -> Rounded:
    """A number from float64, whose rounding `OWN_ROUNDING` pays for."""
    return Rounded(value, value * OWN_ROUNDING)


def gamma_single(operations: int) -> float:
    """As `lipbounds.rounding.gamma`, for float32."""
    return operations * UNIT_SINGLE / (1 - operations * UNIT_SINGLE)


def lengths(rows: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch"]:
    """Lengths of float32 rows, rounded up; squares below 2^-126 may be lost."""
    width = rows.shape[-1]
    return torch.linalg.vector_norm(rows, dim=-1).double() * (1 + 2 * gamma_single(width + 8)) + 2.0**-62 * width**0.5


def single_rows(tokens: Float[Tensor, "*batch n dim"], norms: WeightNorms, name: str) -> SingleRows:
    """X W + b of all heads: each chunk of terms is a product of its own."""
    flat, bias, size = norms.single(name)
    heads, dim = size.shape[-1], tokens.shape[-1]
    tokens = tokens.float()
    total = None
    for start in range(0, dim, CHUNK):
        part = tokens[..., start : start + CHUNK] @ flat[..., start : start + CHUNK, :]
        total = part if total is None else total.add_(part)
    assert total is not None  # a block has features
    if bias is not None:
        total = total + bias.unsqueeze(-2)
    rows = total.unflatten(-1, (heads, -1)).movedim(-2, -3).contiguous()
    length = lengths(tokens)
    if bias is not None:
        length = (length.square() + 1).sqrt() * (1 + 1e-15)
    relative = gamma_single(min(CHUNK, dim) + math.ceil(dim / CHUNK) + 2)
    lost = 4 * (dim + 2) * SMALLEST_SINGLE * rows.shape[-1] ** 0.5
    error = relative * length.unsqueeze(-2) * size.unsqueeze(-1) + lost
    return SingleRows(rows, lengths(rows), error)


@dc.dataclass(frozen=True, slots=True)
class SingleMaps:
    """Attention maps in float32, before each row is divided by its sum.

    Args:
        weights: exp(S - max S).
        sums: of each row.
        tail: of each row without its largest weight, which is 1.
        second: the largest weight but that one.
        error: eta, of each row.
    """

    weights: Float[Tensor, "*batch heads n m"]
    sums: Float[Tensor, "*batch heads n"]
    tail: Float[Tensor, "*batch heads n"]
    second: Float[Tensor, "*batch heads n"]
    error: Float[Tensor, "*batch heads n"]

    @property
    def row_g_1(self) -> Rounded:
        """g_1(P_i) of each row, at most 1/2 with its rounding."""
        found, keys = ((self.tail + self.second) / (self.sums * self.sums)).double(), self.weights.shape[-1]
        slack = (1 + 8 * gamma_single(keys + 8)) * (4 * self.error).exp()
        return Rounded(found, ((found + 4 * (keys + 2) * SMALLEST_SINGLE) * slack).clamp(max=0.5))

    @property
    def g_1(self) -> Rounded:
        """max_i g_1(P_i) of each head."""
        return self.row_g_1.largest()


def single_maps(block: Attention, queries: SingleRows, keys: SingleRows) -> SingleMaps:
    """exp(S - max S) in float32, and how far it is off."""
    scale, width = abs(block.scale_value), queries.rows.shape[-1]
    longest, key_off = keys.length.amax(-1, keepdim=True), keys.error.amax(-1, keepdim=True)
    reach = queries.length * longest
    error = queries.error * (longest + key_off) + queries.length * key_off + gamma_single(width + 4) * reach
    error = scale * error + (width + 4) * (1 + scale) * SMALLEST_SINGLE
    logits = (queries.rows * block.scale_value) @ keys.rows.mT
    mask = None if block.mask is None else block.mask.float()
    if mask is not None:
        logits = logits + mask
        visible = torch.where(mask.isneginf(), 0.0, mask).abs().amax(-1).double()
        error = error + 2 * UNIT_SINGLE * (scale * reach + visible)
    error = (error + (OUT_OF_RANGE + 8) * UNIT_SINGLE) * OWN_ROUNDING  # the difference to the largest, and exp
    largest, place = logits.max(-1, keepdim=True)
    weights = logits.sub_(largest).exp_().scatter_(-1, place, 0.0)
    tail, second = weights.sum(-1), weights.amax(-1)
    weights.scatter_(-1, place, 1.0)
    return SingleMaps(weights, 1 + tail, tail, second, error)


def map_norm_upper(
    weights: Float[Tensor, "*batch heads n m"], sums: Float[Tensor, "*batch heads n"], error: Float[Tensor, "..."]
) -> Rounded:
    """||P||: Collatz and Wielandt's bound at the vectors of the power method, as in lipbounds.ops.nonnegative."""
    rows, cols = weights.shape[-2:]
    inverse = (1 / sums).unsqueeze(-2)
    again = inverse @ weights  # of the vector of ones, which P keeps
    best = again.amax((-2, -1))
    for _ in range(STEPS):
        vector = (again / again.amax(-1, keepdim=True)).clamp(min=1e-20)
        image = (vector @ weights.mT) * inverse
        again = (image * inverse) @ weights
        best = torch.minimum(best, ((again + rows * (cols + 2) * SMALLEST_SINGLE) / vector).amax((-2, -1)))
        lower = torch.linalg.vector_norm(image, dim=(-2, -1)) / torch.linalg.vector_norm(vector, dim=(-2, -1))
        if bool((best.sqrt() <= lower * (1 + MET)).all()):
            break
    found = best.double().sqrt()
    slack = (1 + 2 * gamma_single(2 * (rows + cols) + 24)) * (2 * error.amax(-1)).exp()
    upper = found * slack + rows * cols * SMALLEST_SINGLE
    return Rounded(found, upper.clamp(max=rows**0.5 * OWN_ROUNDING))
