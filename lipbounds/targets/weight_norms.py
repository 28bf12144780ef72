"""What bounds need of the weights of a block alone, computed once and kept from one input of the model to the next.

    with keep_weight_norms():
        for images in loader:
            for found in capture(model, images):
                bound(found.block)

Inside of the `with` block, a block whose weights are those of an earlier one, entry by entry, takes its norms from
there. The entries are compared at every use, with a private copy: weights that were changed in place, by an optimiser,
through `.data` or through memory that is shared with NumPy, are no longer equal and get norms of their own. (A counter
of changes such as torch's `_version` misses the last two.) Weights that take part in a gradient are never kept.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.errors import InvalidInput
from lipbounds.ops.spectral import Factor, product_norm_upper, spectral_norm_upper
from lipbounds.targets.head_factors import HeadFactors, Layout, head_factors
from lipbounds.targets.projection import affine_weights


Weights = dict[str, Tensor]  # by name, with those biases that there are
NAMES = ("w_q", "w_k", "w_v", "w_o", "b_q", "b_k", "b_v")
BLOCKS = 64  # whose norms are kept unless said otherwise: enough for the layers of most models
SAMPLED = 4  # entries that tell most blocks apart without comparing them
_kept: ContextVar[_Store | None] = ContextVar("kept weight norms", default=None)


class WeightNorms:
    """Norms of the weights of a block, each rounded up, and factors of their products; made at their first use.

    Over 150 lines, because each norm is a property that is kept for itself.

    Args:
        weights: `w_q`, `w_k`, `w_v`, `w_o` and those of `b_q`, `b_k`, `b_v` that there are, in float64.
    """

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        self.w_q, self.w_k, self.w_v, self.w_o = (weights[name] for name in NAMES[:4])
        self._factors: dict[tuple[str, Layout, int], HeadFactors] = {}
        self._products: dict[str, Tensor] = {}
        self._single: dict[str, tuple[Tensor, Tensor | None, Tensor]] = {}

    def factors(self, name: str, layout: Layout = "whitened", pairs: int = 0) -> HeadFactors:
        """The weights of each head as a basis times a small factor, and the overlaps of the heads.

        Args:
            name: `w_q`, `w_k`, `w_v` or `w_o`, of which the last is transposed.
            layout: see lipbounds.targets.head_factors.
            pairs: of features that rotary positions turn, for the layout `pairs`.
        """
        key = (name, layout, pairs)
        if key not in self._factors:
            weights = self.w_o.mT if name == "w_o" else self.weights[name]
            self._factors[key] = head_factors(weights, layout, pairs)
        return self._factors[key]

    def products(self, name: str) -> Float[Tensor, "*weights heads heads head_dim head_dim"]:
        """C_h^T C_g for all pairs of heads, C the weights as `factors` has them, each divided by its power of two.

        Args:
            name: `w_q` or `w_o`.
        """
        if name not in self._products:
            weights = self.w_o.mT if name == "w_o" else self.weights[name]
            columns = weights / self.factors(name).unit[..., None, None]
            self._products[name] = columns.mT.unsqueeze(-3) @ columns.unsqueeze(-4)
        return self._products[name]

    def single(
        self, name: str
    ) -> tuple[Float[Tensor, "*weights dim inner"], Float[Tensor, "*weights inner"] | None, Float[Tensor, "..."]]:
        """All heads side by side in float32, their biases, and ||[W; b]||_F of each head, rounded up.

        Args:
            name: `w_q`, `w_k` or `w_v`, whose entries float32 holds.
        """
        if name not in self._single:
            weights, bias = self.weights[name], self.weights.get(name.replace("w", "b"))
            squares = weights.square().sum((-2, -1))
            if bias is not None:
                squares = squares + bias.square().sum(-1)
            flat = weights.transpose(-3, -2).flatten(-2).float().contiguous()
            bias = None if bias is None else bias.flatten(-2).float()
            self._single[name] = (flat, bias, squares.sqrt() * (1 + 1e-9))
        return self._single[name]

    @cached_property
    def queries_jointly(self) -> Float[Tensor, "*weights"]:
        """||[W_Q^1 ... W_Q^H]||, the spectral norm of all heads side by side."""
        return spectral_norm_upper(self.w_q.transpose(-3, -2).flatten(-2))

    @cached_property
    def keys_jointly(self) -> Float[Tensor, "*weights"]:
        """||[W_K^1 ... W_K^H]||, likewise."""
        return spectral_norm_upper(self.w_k.transpose(-3, -2).flatten(-2))

    @cached_property
    def values_jointly(self) -> Float[Tensor, "*weights"]:
        """||[W_V^1 ... W_V^H]||, the spectral norm of all heads side by side."""
        return spectral_norm_upper(self.w_v.transpose(-3, -2).flatten(-2))

    @cached_property
    def through_jointly(self) -> Float[Tensor, "*weights"]:
        """||sum_h W_V^h W_O^h||."""
        return product_norm_upper(self.w_v.transpose(-3, -2).flatten(-2), self.w_o.flatten(-3, -2))

    @cached_property
    def inner(self) -> Float[Tensor, "*weights heads"]:
        """||L_V^hT L_O^h|| of the factors of values and outputs: W_V^h W_O^h is that between their bases."""
        values, outputs = self.factors("w_v"), self.factors("w_o")
        return product_norm_upper(values.factor.mT, outputs.factor) * (values.unit * outputs.unit)

    @cached_property
    def queries(self) -> Float[Tensor, "*weights heads"]:
        """||W_Q|| of each head."""
        return spectral_norm_upper(self.w_q)

    @cached_property
    def keys(self) -> Float[Tensor, "*weights heads"]:
        """||W_K|| of each head."""
        return spectral_norm_upper(self.w_k)

    @cached_property
    def values(self) -> Float[Tensor, "*weights heads"]:
        """||W_V|| of each head."""
        return spectral_norm_upper(self.w_v)

    @cached_property
    def outputs(self) -> Float[Tensor, "*weights heads"]:
        """||W_O|| of each head."""
        return spectral_norm_upper(self.w_o)

    @cached_property
    def output(self) -> Float[Tensor, "*weights"]:
        """||W_O||, the spectral norm of the whole output projection."""
        return spectral_norm_upper(self.w_o.flatten(-3, -2))

    @cached_property
    def logits(self) -> Float[Tensor, "*weights heads"]:
        """||W_Q W_K^T|| of each head."""
        return product_norm_upper(self.w_q, self.key_factor)

    @cached_property
    def through(self) -> Float[Tensor, "*weights heads"]:
        """||W_V W_O|| of each head."""
        return product_norm_upper(self.w_v, self.w_o)

    @cached_property
    def query_factor(self) -> Factor:
        """W_Q^T as the last factor of products."""
        return Factor(self.w_q.mT)

    @cached_property
    def key_factor(self) -> Factor:
        """W_K^T as the last factor of products."""
        return Factor(self.w_k.mT)

    @cached_property
    def output_factor(self) -> Factor:
        """W_O of each head as the last factor of products."""
        return Factor(self.w_o)

    @cached_property
    def affine_queries(self) -> Factor:
        """[W_Q; b_Q] as a factor of products, or W_Q without a bias."""
        return Factor(affine_weights(self.w_q, self.weights.get("b_q")))

    @cached_property
    def affine_keys(self) -> Factor:
        """[W_K; b_K] as a factor of products, or W_K without a bias."""
        return Factor(affine_weights(self.w_k, self.weights.get("b_k")))

    @cached_property
    def affine_values(self) -> Factor:
        """[W_V; b_V] as a factor of products, or W_V without a bias."""
        return Factor(affine_weights(self.w_v, self.weights.get("b_v")))

    @cached_property
    def query_size(self) -> Float[Tensor, "*weights heads"]:
        """Sum of the squares of W_Q of each head."""
        return self.w_q.square().sum((-2, -1))

    @cached_property
    def key_size(self) -> Float[Tensor, "*weights heads"]:
        """Sum of the squares of W_K of each head."""
        return self.w_k.square().sum((-2, -1))


class _Store:
    """Norms by the entries of the weights, those used last at the end."""

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self.entries: OrderedDict[int, tuple[tuple[object, ...], list[Tensor], WeightNorms]] = OrderedDict()
        self.made = 0

    def norms(self, weights: Weights) -> WeightNorms:
        given = [weight.detach() for weight in weights.values()]
        mark = (*weights, *_mark(given))
        for number, (known, copies, norms) in self.entries.items():
            if known == mark and all(torch.equal(new, old) for new, old in zip(given, copies, strict=True)):
                self.entries.move_to_end(number)
                return norms
        with torch.inference_mode(False), torch.no_grad():
            copies = [tensor.clone() for tensor in given]
            norms = WeightNorms({name: copy.double() for name, copy in zip(weights, copies, strict=True)})
        self.entries[self.made] = (mark, copies, norms)
        self.made += 1
        if len(self.entries) > self.blocks:
            self.entries.popitem(last=False)
        return norms


@contextmanager
def keep_weight_norms(*, blocks: int = BLOCKS) -> Iterator[None]:
    """Inside the `with` block, norms of weights are computed once for each block of a model; see the top of this file.

    Args:
        blocks: how many attention blocks are remembered, those used last; about four times the memory of their weights.

    Raises:
        InvalidInput: `blocks` is below 1.
    """
    if blocks < 1:
        raise InvalidInput(f"blocks must be at least 1, got blocks={blocks}; give the number of layers of the model.")
    token = _kept.set(_Store(blocks))
    try:
        yield
    finally:
        _kept.reset(token)


def norms_of(weights: Weights) -> WeightNorms:
    """The norms of these weights: kept ones where some are kept and no gradient is asked for, otherwise new ones.

    Args:
        weights: of a block, in any dtype.
    """
    store = _kept.get()
    if store is None or (torch.is_grad_enabled() and any(weight.requires_grad for weight in weights.values())):
        return WeightNorms({name: weight.double() for name, weight in weights.items()})
    return store.norms(weights)


def _mark(weights: list[Tensor]) -> tuple[object, ...]:
    """What is compared first: shapes, dtype, device and a few entries."""
    samples = torch.stack([weight[..., 0, 0].flatten()[:SAMPLED].sum().double() for weight in weights])
    return (*(weight.shape for weight in weights), weights[0].dtype, weights[0].device, *samples.tolist())
