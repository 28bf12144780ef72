r"""`sharp_cheap` at inputs whose attention maps are too long to be stored: O(n d + chunk m) numbers.

The formulas are those of the bound (docs/bounds/sharp_cheap.md) but for two norms that need n x m or m x m arrays:

- covariances come from second moments, C_i = sum_j p_ij v'_j k'_j^T - (sum_j p_ij v'_j) (sum_j p_ij k'_j)^T, with v'_j
  k'_j^T made for some keys at a time, in place of the Gram matrices of values and keys;
- the rest of the mixing part, (I - e e^T) P (I - f f^T), is bounded by its Frobenius norm and by ||P||
  (`streaming_map_norm`), in place of its Schatten norm.

So the value is a bound as `sharp_cheap` is, and as a rule a little above it. Rows are complete in their chunk, so that
the maps are those of `Attention.probabilities`, with the error of `map_error`. Second moments are sums of m products in
some order: `moment_error`, of which the trace takes no more than the Frobenius norm does, because every term that it
bounds is a product a b^T with trace and norm at most |a| |b|; the sum of the diagonal has `width` roundings beside it.
Cost: 2 n m d_v (d_k + d_v) for each head, where `sharp_cheap` takes n m^2.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.derivatives.first.covariance import map_error, moment_error
from lipbounds.derivatives.first.head_rows import HeadRows, change_error, change_under, largest_eigenvalue_upper
from lipbounds.derivatives.first.overlap_parts import OverlapParts
from lipbounds.derivatives.first.split_mixing import SplitMixing, put_together
from lipbounds.devices import waits_for
from lipbounds.errors import InvalidInput
from lipbounds.kernels import streaming
from lipbounds.kernels.streaming import PASSES, block_g_1, block_map_norm, logit_chunks, logits_of
from lipbounds.ops.spectral import root, vector_norm
from lipbounds.rounding import cast_up, gamma, inflate
from lipbounds.targets.attention import Attention


@torch.no_grad()
def streaming_sharp_cheap(
    block: Attention, *, passes: int = PASSES, chunk: int | None = None
) -> Float[Tensor, "*batch"]:
    """Upper bound on the norm of the Jacobian, proved, at a point, l2: `sharp_cheap` without the n x m map.

    Not differentiable. The norms of the weights are kept inside `keep_weight_norms()`, as those of the bound are.

    Args:
        block: any that `sharp_cheap` takes; rotary positions and QK-norm included.
        passes: as in `streaming_map_norm`.
        chunk: as in `streaming_g1`.

    Raises:
        InvalidInput: as `streaming_map_norm`.
    """
    if passes < 1:
        raise InvalidInput(f"passes must be at least 1, got passes={passes}.")
    return cast_up(_StreamedParts(block.double, passes, chunk).cheap, block.dtype)


class _StreamedParts(OverlapParts):
    """The parts of the differential from rows of the maps that are made when they are needed."""

    def __init__(self, block: Attention, passes: int, chunk: int | None) -> None:
        self.passes, self.chunk = passes, chunk
        super().__init__(block)

    def _covariances(self, values: HeadRows) -> StreamedCovariances:
        return StreamedCovariances(self.block, values, self.chunk)

    def _softmax_norms(self) -> Float[Tensor, "*batch heads n"]:
        return block_g_1(self.block, self.chunk)

    @cached_property
    def mixing(self) -> SplitMixing:
        """T1, split; of a block whose memory moves."""
        return _split_mixing(self.block, self.passes, self.chunk)


class StreamedCovariances:
    """Values and keys under rows of the maps that are not stored: in place of `GramMatrices`.

    Args:
        block: in float64.
        values: V'.
        chunk: rows at a time.
    """

    def __init__(self, block: Attention, values: HeadRows, chunk: int | None) -> None:
        self.block, self.values, self.chunk = block, values, chunk

    def cross(self, keys: HeadRows) -> Float[Tensor, "*batch heads n"]:
        """||V'^T J_i K'||_F of each row, rounded up.

        Args:
            keys: K'.
        """
        return self._frobenius(self._covariance_norms(keys)[0], keys)

    def largest_variance(self) -> Float[Tensor, "*batch heads n"]:
        """The largest eigenvalue of V'^T J_i V' of each row, rounded up."""
        values = self.values
        norms, traces = self._covariance_norms(values)
        keys, width = values.rows.shape[-2:]
        off = moment_error(self.block, values, values) + 4 * gamma(width) * values.size.square().unsqueeze(-1)
        frobenius = self._frobenius(norms, values)
        return largest_eigenvalue_upper(frobenius, traces, inflate(off, 8), rank=max(1, min(width, keys - 1)))

    def image(self, vector: Float[Tensor, "*batch m"]) -> Float[Tensor, "*batch heads n"]:
        """|V'^T J_i f| of each row, rounded up.

        Args:
            vector: f, of length at most 1 but for rounding.
        """
        found = torch.cat([change_under(maps, vector, self.values) for maps in _maps(self.block, self.chunk)], -1)
        return found + change_error(map_error(self.block), self.values)

    def _covariance_norms(self, other: HeadRows) -> tuple[Tensor, Tensor]:
        """Frobenius norm and trace of V'^T J_i Z of each row, as computed; the trace has a meaning where Z is V'."""
        norms, traces = [], []
        for maps in _maps(self.block, self.chunk):
            found = self._second_moments(maps, other)
            found -= (maps @ self.values.rows).unsqueeze(-1) * (maps @ other.rows).unsqueeze(-2)
            norms.append(vector_norm(found.flatten(-2)))
            traces.append(found.diagonal(dim1=-2, dim2=-1).sum(-1))
        return torch.cat(norms, -1), torch.cat(traces, -1)

    def _second_moments(
        self, maps: Float[Tensor, "*batch heads rows m"], other: HeadRows
    ) -> Float[Tensor, "*batch heads rows left right"]:
        """sum_j p_ij v'_j z_j^T, some keys at a time."""
        left, right = self.values.rows, other.rows
        size = left.shape[-1] * right.shape[-1]
        entries = streaming.ENTRIES_APART if waits_for(maps) else streaming.ENTRIES
        step = max(1, entries // (size * left[..., 0, 0].numel()))
        total = maps.new_zeros(*maps.shape[:-1], size)
        for start in range(0, maps.shape[-1], step):
            some = slice(start, start + step)
            pairs = left[..., some, :].unsqueeze(-1) * right[..., some, :].unsqueeze(-2)
            total += maps[..., some] @ pairs.flatten(-2)
        return total.unflatten(-1, (left.shape[-1], right.shape[-1]))

    def _frobenius(self, norms: Tensor, other: HeadRows) -> Tensor:
        """The norms with what rounding can have taken off them."""
        width = self.values.rows.shape[-1] * other.rows.shape[-1]
        return inflate(norms + moment_error(self.block, self.values, other), width + 16)


def _maps(block: Attention, chunk: int | None) -> Iterator[Float[Tensor, "*batch heads rows m"]]:
    """The attention maps, some rows after the other."""
    for logits, _ in logit_chunks(*logits_of(block), chunk):
        yield logits.softmax(-1)


def _split_mixing(block: Attention, passes: int, chunk: int | None) -> SplitMixing:
    """As lipbounds.derivatives.first.split_mixing, with other bounds on the norm of what is left of the maps."""
    rows, cols = block.tokens, block.source_input.shape[-2]
    even = rows**-0.5
    means, squares = _sums(block, chunk)
    means = means * even  # e^T P_h
    total = means.sum(-2)
    direction = total / total.norm(dim=-1, keepdim=True)
    along = (means * direction.unsqueeze(-2)).sum(-1)  # e^T P_h f
    across = means - along.unsqueeze(-1) * direction.unsqueeze(-2)
    rest, left = torch.zeros_like(squares), torch.zeros_like(squares)
    for maps in _maps(block, chunk):
        images = (maps @ direction[..., None, :, None]).squeeze(-1)  # P_h f
        apart = images - (along * even).unsqueeze(-1)  # (I - e e^T) P_h f
        rest = rest + apart.square().sum(-1)
        inner = maps - (means * even).unsqueeze(-2) - apart.unsqueeze(-1) * direction[..., None, None, :]
        left = left + inner.square().sum((-2, -1))
    off = 8 * gamma(rows + cols + 32) * squares.sqrt()
    off = inflate(off + vector_norm(map_error(block)), rows * cols + 16)
    largest = torch.minimum(inflate(root(left), rows * cols + 16) + off, block_map_norm(block, passes, chunk))
    sizes = across.norm(dim=-1) + off, inflate(root(rest), rows + 16) + off, largest
    return put_together(direction, along, off, sizes, block.weight_norms)


def _sums(block: Attention, chunk: int | None) -> tuple[Tensor, Tensor]:
    """The sum of the rows of each map, and the sum of the squares of all its entries."""
    parts = ((maps.sum(-2), maps.square().sum((-2, -1))) for maps in _maps(block, chunk))
    sums, squares = next(parts)
    for more, more_squares in parts:
        sums, squares = sums + more, squares + more_squares
    return sums, squares
