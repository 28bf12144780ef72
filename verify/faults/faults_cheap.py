"""Wrong sums over heads: overlaps, covariances from Gram matrices, the split mixing part, with the rest exact."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable

import torch
from torch import Tensor

from lipbounds.rounding import cast_up
from lipbounds.targets.attention import Attention
from verify.faults.fault import UNTURNED, planted
from verify.faults.right import FAR, ROUNDING, dense_jacobian, frobenius, g_1, logit_error, sorted_rows


ALL = tuple(UNTURNED)
RANK = 1e-7  # singular values below this part of the largest are taken for zero


def norms(matrices: Tensor) -> Tensor:
    """Spectral norms."""
    return torch.linalg.matrix_norm(matrices, 2)


def bases(columns: Tensor) -> tuple[Tensor, Tensor]:
    """U with orthonormal columns (or zero ones) and L with U L^T the given D x d matrix of each head."""
    left, values, right = torch.linalg.svd(columns, full_matrices=False)
    kept = values > RANK * values[..., :1]
    return left * kept.unsqueeze(-2), right.mT * values.unsqueeze(-2)


def mixture(weights: Tensor, basis: Tensor) -> Tensor:
    """|| sum_h c_h U_h U_h^T || from the norms of U_h^T U_g."""
    overlap = norms(basis.mT.unsqueeze(-3) @ basis.unsqueeze(-4))
    roots = weights.clamp(min=0).sqrt()
    return norms(overlap.unsqueeze(-3) * roots.unsqueeze(-1) * roots.unsqueeze(-2))


def squared_covariance(p: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """||V'^T J(p) K'||_F^2 of each row of maps from Gram matrices."""
    gram, other = first @ first.mT, second @ second.mT
    both = ((p @ (gram * other)) * p).sum(-1)
    mean = ((p @ gram) * p).sum(-1) * ((p @ other) * p).sum(-1)
    room = (first.square().sum(-1).amax(-1) * second.square().sum(-1).amax(-1)).unsqueeze(-1)
    return both - 2 * ((p @ gram) * (p @ other) * p).sum(-1) + mean + ROUNDING * room


def root(squares: Tensor) -> Tensor:
    return squares.clamp(min=0).sqrt()


def exact_parts(block: Attention) -> tuple[Tensor, Tensor, Tensor]:
    """T1, T2 and J as dense matrices."""
    wide = block.double
    jacobian = dense_jacobian(wide)
    flat = lambda t: t.flatten(-2).flatten(-3, -2)  # noqa: E731
    mixing = query = torch.zeros_like(jacobian)
    if wide.memory_moves:
        mixing = flat(torch.einsum("...hij,...hba->...iajb", wide.probabilities, wide.w_v @ wide.w_o))
    if wide.query_moves:
        centred = wide.values - wide.values.mean(-2, keepdim=True)
        keys = wide.keys - wide.keys.mean(-2, keepdim=True)
        means = (wide.probabilities @ centred).unsqueeze(-1) * (wide.probabilities @ keys).unsqueeze(-2)
        cov = torch.einsum("...hij,...hjv,...hjk->...hivk", wide.probabilities, centred, keys) - means
        own = wide.scale_value * torch.einsum("...hva,...hivk,...hbk->...iab", wide.w_o, cov, wide.w_q)
        query = flat(own.unsqueeze(-2) * torch.eye(wide.tokens).double()[:, None, :, None])
    return mixing.expand_as(jacobian), query.expand_as(jacobian), jacobian


def finished(block: Attention, part: Tensor, rest: Tensor) -> Tensor:
    """A part by its formula and the norm of the rest of the Jacobian, with room for rounding."""
    wide = block.double
    values, keys = frobenius(wide.value_factors[0]), frobenius(wide.key_factors[0]) * frobenius(wide.key_factors[1])
    change = torch.zeros_like(wide.logits[..., 0, 0])
    if wide.query_moves:
        change = change + abs(wide.scale_value) * values * keys * frobenius(wide.w_q)
    if wide.memory_moves:
        queries = frobenius(wide.query_factors[0]) * frobenius(wide.query_factors[1])
        change = change + 1 + abs(wide.scale_value) * values * queries * frobenius(wide.w_k)
    sizes = change * frobenius(wide.value_factors[1]) * frobenius(wide.w_o)
    growth = (8 * logit_error(wide)).clamp(max=FAR).exp() - 1
    room = (sizes * (ROUNDING + growth)).sum(-1) * wide.tokens**0.5
    value = (part + norms(rest)) * (1 + ROUNDING) + room
    return cast_up(value.expand(block.batch_shape), block.dtype).detach()


@dc.dataclass(frozen=True, kw_only=True)
class QueryPart:
    """T2 by overlaps; each ingredient can be replaced."""

    mixture: Callable[[Tensor, Tensor], Tensor] = mixture
    squares: Callable[[Tensor, Tensor, Tensor], Tensor] = squared_covariance
    values: Callable[[Tensor, Tensor], Tensor] = torch.matmul
    rows: Callable[[Tensor], Tensor] = lambda sizes: sizes.amax(-1)

    def __call__(self, block: Attention) -> Tensor:
        """The bound at a block, in its dtype."""
        wide = block.double
        _, query, jacobian = exact_parts(block)
        if not wide.query_moves:
            return finished(block, torch.zeros_like(wide.logits[..., 0, 0, 0]), jacobian)
        (outputs, left), (queries, right) = bases(wide.w_o.mT), bases(wide.w_q)
        values = self.values(wide.values - wide.values.mean(-2, keepdim=True), left)
        keys = (wide.keys - wide.keys.mean(-2, keepdim=True)) @ right
        weights = abs(wide.scale_value) * root(self.squares(wide.probabilities, values, keys)).mT
        found = (self.mixture(weights, outputs) * self.mixture(weights, queries)).sqrt()
        return finished(block, self.rows(found), jacobian - query)


@dc.dataclass(frozen=True, kw_only=True)
class KeyPart:
    """T3 by overlaps, with the norm of V'^T J_hi that can be replaced."""

    reach: Callable[[Tensor, Tensor], Tensor] = lambda softmax, largest: (softmax * largest).sqrt()
    largest: Callable[[Tensor], Tensor] = lambda cov: torch.linalg.eigvalsh(cov)[..., -1].clamp(min=0)
    heads: Callable[[Tensor, Tensor, Tensor], Tensor] = lambda y, u, z: (mixture(y, u) * mixture(y, z)).sqrt()

    def __call__(self, block: Attention) -> Tensor:
        """The bound at a block, in its dtype."""
        wide = block.double
        mixing, query, jacobian = exact_parts(block)
        key = jacobian - mixing - query
        if not wide.memory_moves:
            return finished(block, torch.zeros_like(wide.logits[..., 0, 0, 0]), jacobian)
        (outputs, left), (keys, right) = bases(wide.w_o.mT), bases(wide.w_k)
        values = (wide.values - wide.values.mean(-2, keepdim=True)) @ left
        means = wide.probabilities @ values
        second = torch.einsum("...hij,...hjv,...hjw->...hivw", wide.probabilities, values, values)
        largest = self.largest(second - means.unsqueeze(-1) * means.unsqueeze(-2))
        reach = self.reach(g_1(sorted_rows(wide.logits)), largest)
        sizes = abs(wide.scale_value) * norms(reach.unsqueeze(-1) * (wide.queries @ right)).unsqueeze(-2)
        return finished(block, self.heads(sizes, outputs, keys).squeeze(-1), jacobian - key)


@planted(supports=ALL)
def heads_taken_as_orthogonal(block: Attention) -> Tensor:
    """The largest c_h in place of || sum_h c_h U_h U_h^T ||: that heads write to the same features is forgotten."""
    return QueryPart(mixture=lambda weights, basis: weights.amax(-1))(block)


@planted(supports=ALL)
def values_not_seen_through_the_output(block: Attention) -> Tensor:
    """V in place of V L_O: the size of the output weights is lost with their basis."""
    return QueryPart(values=lambda values, factor: values)(block)


@planted(supports=ALL)
def product_of_means_left_out(block: Attention) -> Tensor:
    """The last of the three sums of ||V'^T J K'||_F^2 is left out."""

    def squares(p: Tensor, first: Tensor, second: Tensor) -> Tensor:
        gram, other = first @ first.mT, second @ second.mT
        return squared_covariance(p, first, second) - ((p @ gram) * p).sum(-1) * ((p @ other) * p).sum(-1)

    return QueryPart(squares=squares)(block)


@planted(supports=ALL)
def products_of_two_heads_left_out_of_the_query_part(block: Attention) -> Tensor:
    """||T2_i||_F^2 as the sum over heads of their own squares, without the pairs of two different heads."""
    wide = block.double
    _, query, jacobian = exact_parts(block)
    if not wide.query_moves:
        return finished(block, torch.zeros_like(wide.logits[..., 0, 0, 0]), jacobian)
    values = (wide.values - wide.values.mean(-2, keepdim=True)) @ wide.w_o
    keys = (wide.keys - wide.keys.mean(-2, keepdim=True)) @ wide.w_q.mT
    squares = squared_covariance(wide.probabilities, values, keys).clamp(min=0).sum(-2)
    return finished(block, abs(wide.scale_value) * squares.amax(-1).sqrt(), jacobian - query)


@planted(supports=ALL)
def mean_row_of_the_query_part(block: Attention) -> Tensor:
    """The mean over rows of the norms of the blocks of T2 in place of the largest."""
    return QueryPart(rows=lambda sizes: sizes.mean(-1))(block)


@planted(supports=ALL)
def mean_eigenvalue_for_the_largest(block: Attention) -> Tensor:
    """trace / rank in place of the bound of the largest eigenvalue: the root is left out."""
    return KeyPart(largest=lambda cov: cov.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=0))(block)


@planted(supports=ALL)
def softmax_norm_without_its_root(block: Attention) -> Tensor:
    """g_1 sqrt(lambda) for the norm of V'^T J in place of sqrt(g_1 lambda)."""
    return KeyPart(reach=lambda softmax, largest: softmax * largest.sqrt())(block)


@planted(supports=ALL)
def key_part_of_the_mean_head(block: Attention) -> Tensor:
    """The mean of the y_h in place of the norm over heads of T3."""
    return KeyPart(heads=lambda sizes, outputs, keys: sizes.mean(-1))(block)


# -- the split of the mixing part ------------------------------------------------------------------------------------


@dc.dataclass(frozen=True, kw_only=True)
class Split:
    """T1 for one value of all heads' products, by the mean over outputs and a direction over inputs."""

    norm: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] = lambda a, b, c, d: norms(
        torch.stack([torch.stack([a, b], -1), torch.stack([c, d], -1)], -2)
    )
    spread: Callable[[Tensor], Tensor] = lambda along: along - along.mean(-1, keepdim=True)

    def __call__(self, block: Attention) -> Tensor:
        """The bound at a block, in its dtype."""
        wide = block.double
        mixing, _, jacobian = exact_parts(block)
        if not wide.memory_moves:
            return finished(block, torch.zeros_like(wide.logits[..., 0, 0, 0]), jacobian)
        maps, products = wide.probabilities, wide.w_v @ wide.w_o
        even = maps.new_full((wide.tokens,), wide.tokens**-0.5)
        means = even @ maps
        f = torch.nn.functional.normalize(means.sum(-2), dim=-1)[..., None, :]
        along = (means * f).sum(-1)
        rest = (maps @ f.unsqueeze(-1)).squeeze(-1) - along.unsqueeze(-1) * even
        inner = maps - even[:, None] * means.unsqueeze(-2) - rest.unsqueeze(-1) * f.unsqueeze(-2)
        by_head = lambda sizes: (sizes * norms(products)).sum(-1)  # noqa: E731
        t11 = norms(along.mean(-1)[..., None, None] * products.sum(-3)) + by_head(self.spread(along).abs())
        t12, t21 = by_head((means - along.unsqueeze(-1) * f).norm(dim=-1)), by_head(rest.norm(dim=-1))
        return finished(block, self.norm(t11, t12, t21, by_head(norms(inner))), jacobian - mixing)


@planted(supports=ALL)
def split_mixing_by_its_diagonal(block: Attention) -> Tensor:
    """The larger of the two diagonal entries in place of the norm of the 2 x 2 matrix."""
    return Split(norm=lambda t11, t12, t21, t22: torch.maximum(t11, t22))(block)
