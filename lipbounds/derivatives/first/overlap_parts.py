"""The three parts of the differential through the overlaps of heads: what `sharp_cheap` and `sharp_fast` are made of.

Formulas and proof: docs/bounds/sharp_cheap.md; those of `stacked_key` and `joint_query`: docs/bounds/sharp.md.
"""

from __future__ import annotations

from functools import cached_property
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.derivatives.first.covariance import centred_keys, centred_projection
from lipbounds.derivatives.first.head_rows import GramMatrices, HeadRows, through
from lipbounds.derivatives.first.split_mixing import SplitMixing, split_mixing
from lipbounds.derivatives.norms import row_g_1
from lipbounds.derivatives.rounding.logits import query_error
from lipbounds.derivatives.token_maps import key_maps, query_maps
from lipbounds.ops.mixture import mixture_norm_upper
from lipbounds.ops.spectral import root, spectral_norm_upper, vector_norm
from lipbounds.rounding import inflate, product
from lipbounds.targets.attention import Attention
from lipbounds.targets.head_factors import HeadFactors
from lipbounds.targets.rms_norm import RmsNorm
from lipbounds.targets.rotary import rotation_norm
from lipbounds.targets.weight_norms import WeightNorms


Side = tuple[HeadFactors, Float[Tensor, "..."]]  # factors, and the largest norm of the maps of the tokens of each head


@runtime_checkable
class Covariances(Protocol):
    """What is asked of V'^T J_i Z under each row of the attention maps."""

    values: HeadRows

    def cross(self, keys: HeadRows) -> Float[Tensor, "*batch heads n"]:
        """||V'^T J_i K'||_F of each row, rounded up."""
        ...

    def largest_variance(self) -> Float[Tensor, "*batch heads n"]:
        """The largest eigenvalue of V'^T J_i V' of each row, rounded up."""
        ...

    def image(self, vector: Float[Tensor, "*batch m"]) -> Float[Tensor, "*batch heads n"]:
        """|V'^T J_i f| of each row, rounded up."""
        ...


class OverlapParts:
    """Norms of the parts of the differential of a block, rounded up, each made at its first use.

    Args:
        block: in float64.
    """

    def __init__(self, block: Attention) -> None:
        self.block, self.norms = block, block.weight_norms
        self.values = centred_projection(block.source_input, block.w_v)
        outputs = self.norms.factors("w_o")
        self.grams = self._covariances(through(self.values.rows, self.values.error, outputs))
        self.softmax = self._softmax_norms()

    def _covariances(self, values: HeadRows) -> Covariances:
        return GramMatrices(self.block, values)

    def _softmax_norms(self) -> Float[Tensor, "*batch heads n"]:
        return row_g_1(self.block)

    @property
    def nothing(self) -> Float[Tensor, "*batch"]:
        """0, for a part whose input does not move."""
        return torch.zeros_like(self.softmax[..., 0, 0])

    @property
    def is_plain(self) -> bool:
        """Whether keys and queries are neither normalised nor turned."""
        return self.block.key_norm is None and self.block.key_rotation is None

    @cached_property
    def query(self) -> Float[Tensor, "*batch"]:
        """||T2||."""
        block, grams = self.block, self.grams
        if not block.query_moves:
            return self.nothing
        heads, gain = _side(block, self.norms, "w_q", block.query_norm, block.query_rotation)
        centred = centred_keys(block)
        keys = through(centred.rows, centred.error, heads)
        crude = self.softmax * (grams.values.norm * keys.norm).unsqueeze(-1)
        unit = abs(block.scale_value) * grams.values.unit * keys.unit
        weights = product(torch.minimum(grams.cross(keys), crude), unit.unsqueeze(-1)).mT
        outputs = self.norms.factors("w_o")
        found = root(mixture_norm_upper(weights, outputs.overlap, outputs.jointly))
        weights = inflate(weights * gain.square().unsqueeze(-2), 8)
        return inflate((found * root(mixture_norm_upper(weights, heads.overlap, heads.jointly))).amax(-1), 16)

    @property
    def cheap(self) -> Float[Tensor, "*batch"]:
        """The bound `sharp_cheap`: the parts that move, put together."""
        return inflate(self.joint_memory + self.query, 8).expand(self.block.batch_shape)

    @cached_property
    def joint_memory(self) -> Float[Tensor, "*batch"]:
        """||T1 + T3|| from the norms of both, or 0 where the memory does not move."""
        return self.memory(self.mixing.norm, self.key) if self.block.memory_moves else self.nothing

    @cached_property
    def mixing(self) -> SplitMixing:
        """T1, split; of a block whose memory moves."""
        return split_mixing(self.block, self.norms)

    @cached_property
    def softmax_value_norm(self) -> Float[Tensor, "*batch heads n"]:
        """a_hi >= ||V'^T J_hi||, in the units of V'."""
        by_variance = root(self.softmax) * root(self.grams.largest_variance())
        return inflate(torch.minimum(self.softmax * self.grams.values.norm.unsqueeze(-1), by_variance), 8)

    @cached_property
    def key(self) -> Float[Tensor, "*batch"]:
        """||T3||; of a block whose memory moves."""
        return self._key_part(self.softmax_value_norm)

    def memory(self, mixing: Float[Tensor, "*batch"], key: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
        """||T1 + T3|| from norms of both, with the direction f apart.

        Args:
            mixing: ||T1||.
            key: ||T3||.
        """
        along = key
        if self.is_plain:
            along = torch.minimum(key, self._key_part(self.grams.image(self.mixing.direction)))
        parts = torch.stack([self.mixing.along + along, self.mixing.across + key], -1)
        return torch.minimum(inflate(vector_norm(parts), 8), mixing + key)

    @cached_property
    def _keys(self) -> tuple[Side, HeadRows]:
        block = self.block
        side = _side(block, self.norms, "w_k", block.key_norm, block.key_rotation)
        return side, through(block.queries, query_error(block).amax(-1), side[0])

    def _key_part(self, softmax_value_norm: Float[Tensor, "*batch heads n"]) -> Float[Tensor, "*batch"]:
        side, queries = self._keys
        unit = abs(self.block.scale_value) * self.grams.values.unit * queries.unit
        return _over_heads(self.norms, side, product(_weighted(softmax_value_norm, queries), unit))


def _weighted(weights: Float[Tensor, "*batch heads n"], queries: HeadRows) -> Float[Tensor, "*batch heads"]:
    """|| diag(a_h) Q'_h ||, rounded up."""
    found = spectral_norm_upper(weights.unsqueeze(-1) * queries.rows)
    off = inflate(vector_norm(weights.detach()) * (queries.error + 2.0**-50 * queries.size), weights.shape[-1] + 16)
    return found + off


def _over_heads(norms: WeightNorms, side: Side, sizes: Float[Tensor, "*batch heads"]) -> Float[Tensor, "*batch"]:
    """||T3|| from the y_h."""
    (heads, gain), outputs = side, norms.factors("w_o")
    sizes = inflate(sizes, 8).unsqueeze(-2)
    own = sizes * gain.unsqueeze(-2)
    largest = own.detach().amax(-1, keepdim=True)
    unit = torch.where(largest > 0, largest, 1.0)
    squares = mixture_norm_upper((own / unit).square(), heads.overlap, heads.jointly)
    one = outputs.jointly.unsqueeze(-1) * root(squares) * unit.squeeze(-1)
    both = root(mixture_norm_upper(sizes, outputs.overlap, outputs.jointly))
    both = both * root(mixture_norm_upper(own * gain.unsqueeze(-2), heads.overlap, heads.jointly))
    return inflate(torch.minimum(one, both).squeeze(-1), 32)


def _side(block: Attention, norms: WeightNorms, name: str, norm: RmsNorm | None, rotation: Tensor | None) -> Side:
    """The factors of query or key weights and how much their tokens' maps can add to them."""
    like = (block.w_q if name == "w_q" else block.w_k)[..., 0, 0]
    if norm is not None:
        maps = query_maps(block) if name == "w_q" else key_maps(block)
        assert maps is not None
        return norms.factors(name, "plain" if norm.over == "head" else "together"), maps.norm
    if rotation is not None:
        gain = rotation_norm(rotation, like)
        return norms.factors(name, "pairs", rotation.shape[-1]), gain + torch.zeros_like(like)
    return norms.factors(name), torch.ones_like(like)
