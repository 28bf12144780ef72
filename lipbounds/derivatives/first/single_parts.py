r"""The parts of formula bounds in float32, each without and with what its rounding can have taken off it.

A formula is evaluated twice on the few numbers of each head (`Rounded`), in float64. Where the second value is at most
5 % above the first it is the bound, elsewhere the block is evaluated in float64. Proof: docs/derivatives.md, sections
14 and 16.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from lipbounds.derivatives.first.single_covariance import column_norm, row_variance
from lipbounds.derivatives.first.single_norms import (
    as_computed,
    centred,
    gram_of,
    gram_through,
    norms_of_grams,
    norms_of_values_and_changes,
    through_lengths,
    tokens_norm,
    unbiased,
)
from lipbounds.derivatives.first.single_precision import (
    OWN_ROUNDING,
    Rounded,
    SingleMaps,
    SingleRows,
    known,
    map_norm_upper,
    single_maps,
    single_rows,
    wanted_in_single_precision,
)
from lipbounds.derivatives.first.single_softmax import largest_softmax_norm
from lipbounds.rounding import cast_up
from lipbounds.targets.attention import Attention


Details = dict[str, Tensor]


class SingleParts:
    """Rows, maps and norms of a block in float32, made at their first use.

    Args:
        block: with `has_single_precision`; on the CPU.
    """

    def __init__(self, block: Attention) -> None:
        self.block = block
        self.norms, self.scale = block.double.weight_norms, abs(block.scale_value)

    @cached_property
    def queries(self) -> SingleRows:
        return single_rows(self.block.x, self.norms, "w_q")

    @cached_property
    def keys(self) -> SingleRows:
        return single_rows(self.block.source_input, self.norms, "w_k")

    @cached_property
    def values(self) -> SingleRows:
        return single_rows(self.block.source_input, self.norms, "w_v")

    @cached_property
    def maps(self) -> SingleMaps:
        return single_maps(self.block, self.queries, self.keys)

    @cached_property
    def softmax_norm(self) -> Rounded:
        """max_i ||J(P_i)|| of each head."""
        return largest_softmax_norm(self.maps)

    @cached_property
    def tokens_norm(self) -> Rounded:
        """||X||, with an axis for the heads."""
        return tokens_norm(self.block.source_input)

    @cached_property
    def variance(self) -> Rounded:
        """tr C_i of the tokens under each row."""
        return row_variance(self.maps, self.block.source_input)

    @cached_property
    def mixing(self) -> Rounded:
        """||W_V|| ||P|| of each head, 0 where the memory does not move."""
        if not self.block.memory_moves:
            return known(torch.zeros_like(self.maps.error[..., 0]))
        return self.map_norm * self.norms.values

    @cached_property
    def map_norm(self) -> Rounded:
        """||P|| of each head."""
        return map_norm_upper(self.maps.weights, self.maps.sums, self.maps.error)

    def value_and_change(self, *, centre: bool = False) -> tuple[Rounded, Rounded]:
        """||V||, and s times the sum of ||K W_Q^T|| and ||Q W_K^T|| as far as queries and memory move.

        Args:
            centre: V and K less their mean over the tokens.
        """
        values, keys = (centred(self.values), centred(self.keys)) if centre else (self.values, self.keys)
        value_norm, change = norms_of_values_and_changes(self.block, values, self.queries, keys)
        return value_norm, change * self.scale

    @cached_property
    def rows_apart(self) -> tuple[Rounded, Rounded]:
        """||V|| of centred values, and s times the sum of ||W_Q|| ||K|| and ||W_K|| ||Q||, as far as these move."""
        grams, weights = [gram_of(centred(self.values))], []
        if self.block.query_moves:
            grams.append(gram_of(self.keys))
            weights.append(self.norms.queries)
        if self.block.memory_moves:
            grams.append(gram_of(self.queries))
            weights.append(self.norms.keys)
        value_norm, *norms = norms_of_grams(grams)
        parts = [norm * weight for norm, weight in zip(norms, weights, strict=True)]
        return value_norm, sum(parts[1:], parts[0]) * self.scale

    @cached_property
    def through_output(self) -> Rounded:
        """||V W_O|| of each head."""
        return norms_of_grams([gram_through(self.values, self.norms.output_factor, self.norms.outputs)])[0]

    def key_part(self, rows: Rounded) -> Rounded:
        """s sqrt( max_j sum_i P_ij |W_K q_i|^2 r_i ) of each head.

        Args:
            rows: r_i >= 0 of each row.
        """
        return column_norm(self.maps, self.query_lengths * self.query_lengths * rows) * self.scale

    @cached_property
    def query_lengths(self) -> Rounded:
        """|W_K q_i| of each row."""
        return through_lengths(self.queries, self.norms.key_factor, self.norms.keys)

    @cached_property
    def key_reach(self) -> Rounded:
        """max_j |W_Q k_j| of keys without their bias, with an axis for the rows."""
        keys = unbiased(self.keys, self.block.b_k)
        reach = through_lengths(keys, self.norms.query_factor, self.norms.queries).largest()
        return Rounded(reach.found.unsqueeze(-1), reach.upper.unsqueeze(-1))

    @cached_property
    def largest_value(self) -> Rounded:
        """max_j |v_j| of values without their bias."""
        values = unbiased(self.values, self.block.b_v)
        return Rounded(as_computed(values.rows), values.length + values.error).largest()

    def of_heads(self, heads: Rounded) -> Rounded:
        """||W_O|| sqrt(sum_h L_h^2).

        Args:
            heads: L_h.
        """
        return (
            Rounded(*(self.norms.output * number.norm(dim=-1) for number in (heads.found, heads.upper))) * OWN_ROUNDING
        )


def in_single_or_double(
    block: Attention,
    precision: str,
    single: Callable[[SingleParts], Rounded] | None,
    double: Callable[[Attention], tuple[Tensor, Details]],
) -> tuple[Tensor, Details]:
    """The value of a bound and its details: of float32 where its rounding adds under 5 %, else of float64.

    Args:
        block: of the bound.
        precision: `auto`, or `float64`.
        single: the formula, of parts in float32; None where float64 is as fast.
        double: the formula, of the block in float64.

    Raises:
        InvalidInput: `precision` is neither.
    """
    if wanted_in_single_precision(block, precision) and single is not None:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):  # which would make products of bfloat16 numbers
            found = single(SingleParts(block))
        if found.is_close():
            return found.result(block)
    value, details = double(block.double)
    return cast_up(value, block.dtype), {**details, "detail.bits": torch.full_like(value, 64)}
