"""Wrong norms of Gram blocks: a product, a head, a side or a norm that is wrong or missing."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable

import torch
from torch import Tensor

from lipbounds.rounding import cast_up
from lipbounds.targets.attention import Attention
from verify.faults.fault import UNTURNED, planted
from verify.faults.right import ROUNDING, dense_jacobian, jacobian_error


ALL = tuple(UNTURNED)


def blocks_of(block: Attention) -> Tensor:
    """The Jacobian of each head by output token, feature, input token and feature: [*, H, n, a, m, b]."""
    wide = block.double
    found = []
    for head in range(wide.heads):
        chosen = torch.arange(wide.heads) == head
        dense = dense_jacobian(wide.replace(w_o=wide.w_o * chosen[:, None, None]))
        shape = wide.moving_input.shape[-2:]
        found.append(dense.unflatten(-1, shape).unflatten(-3, (wide.tokens, wide.w_o.shape[-1])))
    return torch.stack(found, -5)


def gram(jacobian: Tensor, other: Tensor | None = None) -> Tensor:
    """J_i J_k^T for all i, k: [*, n, n, a, a]."""
    other = jacobian if other is None else other
    return torch.einsum("...iajb,...kcjb->...ikac", jacobian, other)


def sizes(products: Tensor) -> Tensor:
    """Spectral norms."""
    return torch.linalg.matrix_norm(products, 2)


def norm_of_sizes(entries: Tensor) -> Tensor:
    """The norm of the matrix of norms."""
    return torch.linalg.matrix_norm(entries, 2)


@dc.dataclass(frozen=True, kw_only=True)
class GramBlocks:
    """The root of || ( ||J_i J_k^T|| )_ik ||; each part can be replaced."""

    products: Callable[[Tensor], Tensor] = lambda heads: gram(heads.sum(-5))
    sizes: Callable[[Tensor], Tensor] = sizes
    norm: Callable[[Tensor], Tensor] = norm_of_sizes

    def __call__(self, block: Attention) -> Tensor:
        """The bound at a block, in its dtype."""
        jacobian = blocks_of(block)
        unit = largest_entry(jacobian)
        squares = self.norm(self.sizes(self.products(jacobian / unit)))
        value = squares.clamp(min=0).sqrt() * unit.flatten(-5)[..., 0] * (1 + ROUNDING)
        return cast_up((value + jacobian_error(block)).expand(block.batch_shape), block.dtype).detach()


def largest_entry(jacobian: Tensor) -> Tensor:
    """Of all heads, so that squares of what is divided by it keep inside the range of floats."""
    return jacobian.abs().amax((-5, -4, -3, -2, -1), keepdim=True).clamp(min=1e-280)


def _own_rows_only(products: Tensor) -> Tensor:
    return sizes(products) * torch.eye(products.shape[-3])


@planted(supports=ALL)
def products_of_two_heads_left_out(block: Attention) -> Tensor:
    """J J^T as the sum over heads of J_h J_h^T: what one head adds to another is lost."""
    return GramBlocks(products=lambda heads: gram(heads).sum(-5))(block)


@planted(supports=ALL, subtle=True)
def one_pair_of_heads_left_out(block: Attention) -> Tensor:
    """One product of two heads, of the first and the last, is left out of J J^T."""

    def products(heads: Tensor) -> Tensor:
        whole = gram(heads.sum(-5))
        first, last = heads[..., 0, :, :, :, :], heads[..., -1, :, :, :, :]
        return whole if heads.shape[-5] == 1 else whole - gram(first, last) - gram(last, first)

    return GramBlocks(products=products)(block)


@planted(supports=ALL, subtle=True)
def blocks_transposed(block: Attention) -> Tensor:
    """sum_j J_ij^T J_kj in place of sum_j J_ij J_kj^T: columns of blocks for rows."""

    def products(heads: Tensor) -> Tensor:
        jacobian = heads.sum(-5)
        return torch.einsum("...iajb,...kajc->...ikbc", jacobian, jacobian)

    return GramBlocks(products=products)(block)


@planted(supports=ALL)
def products_of_different_rows_left_out(block: Attention) -> Tensor:
    """Only J_i J_i^T: that many outputs see the same input is forgotten."""
    return GramBlocks(sizes=_own_rows_only)(block)


@planted(supports=ALL)
def largest_block(block: Attention) -> Tensor:
    """The largest norm of a block in place of the norm of the matrix of norms."""
    return GramBlocks(norm=lambda entries: entries.amax((-2, -1)))(block)


@planted(supports=ALL, subtle=True)
def upper_triangle(block: Attention) -> Tensor:
    """Products of a row with later rows only: the matrix of norms is not completed by symmetry."""
    return GramBlocks(sizes=lambda products: sizes(products).triu())(block)


@planted(supports=ALL, subtle=True)
def largest_eigenvalue_of_a_block(block: Attention) -> Tensor:
    """The largest |eigenvalue| of J_i J_k^T in place of its norm: for i != k the block is not symmetric."""
    return GramBlocks(sizes=lambda products: torch.linalg.eigvals(products).abs().amax(-1))(block)


@planted(supports=ALL, subtle=True)
def mean_of_powers(block: Attention) -> Tensor:
    """Schatten norms with the mean over singular values in place of the sum."""

    def mean(products: Tensor) -> Tensor:
        values = torch.linalg.svdvals(products)
        return values.pow(8).mean(-1).pow(1 / 8)

    return GramBlocks(sizes=mean)(block)


@planted(supports=ALL, subtle=True)
def query_term_of_other_rows_left_out(block: Attention) -> Tensor:
    """T2 joins the products of a row with itself only; with the other rows that see its token it is left out."""
    wide = block.double
    if wide.moves != "self":
        return GramBlocks()(block)
    memory_only = wide.replace(memory=wide.x, moves="memory", causal=False, logit_bias=wide.mask)
    without = (blocks_of(memory_only) / largest_entry(blocks_of(block))).sum(-5)

    def products(heads: Tensor) -> Tensor:
        own = torch.eye(heads.shape[-4], dtype=torch.bool)[..., None, None]
        return torch.where(own, gram(heads.sum(-5)), gram(without))

    return GramBlocks(products=products)(block)


# -- the parts -------------------------------------------------------------------------------------------------------


@dc.dataclass(frozen=True, kw_only=True)
class Parts:
    """The mixing part by Gram blocks, from overlaps of attention maps that can be replaced; the rest exactly."""

    overlaps: Callable[[Tensor], Tensor] = lambda maps: torch.einsum("...hij,...gkj->...ikhg", maps, maps)

    def __call__(self, block: Attention) -> Tensor:
        """The bound at a block, in its dtype."""
        wide = block.double
        mixing = torch.zeros_like(wide.logits[..., 0, 0, 0])
        if wide.memory_moves:
            weights = wide.w_v @ wide.w_o
            size = weights.abs().amax((-3, -2, -1)).clamp(min=1e-280)
            scaled = weights / size[..., None, None, None]
            met = torch.einsum("...ikhg,...hba,...gbc->...ikac", self.overlaps(wide.probabilities), scaled, scaled)
            mixing = torch.linalg.matrix_norm(sizes(met), 2).sqrt() * size
        jacobian = dense_jacobian(wide)
        if wide.memory_moves:
            fixed = torch.einsum("...hij,...hba->...iajb", wide.probabilities, wide.w_v @ wide.w_o)
            jacobian = jacobian - fixed.flatten(-2).flatten(-3, -2)
        rest = torch.linalg.matrix_norm(jacobian, 2)
        value = (mixing + rest) * (1 + ROUNDING) + 4 * jacobian_error(block)
        return cast_up(value.expand(block.batch_shape), block.dtype).detach()


@planted(supports=ALL)
def overlaps_of_two_heads_left_out(block: Attention) -> Tensor:
    """In the mixing part P_h P_g^T of two different heads is taken as 0."""
    own = lambda maps: torch.einsum("...hij,...hkj->...ikh", maps, maps)  # noqa: E731
    return Parts(overlaps=lambda maps: own(maps).unsqueeze(-1) * torch.eye(maps.shape[-3]))(block)
