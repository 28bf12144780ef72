"""Products J_i J_k^T of two block rows of the Jacobian of an attention block, from its factors (first/rows.py).

J itself is never formed: a product costs what its H d_v x H d_v entries and the two multiplications by W_O cost.
The products and their rounding: docs/derivatives.md, section 4.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lipbounds.derivatives.first.rows import Rows
from lipbounds.rounding import gamma


Tokens = slice | Int[Tensor, " some"]


def row_products(rows: Rows, squares_only: bool = False) -> RowProducts:
    """The products of the rows of a block: with gradients of the logits that depend on the key, or without.

    Args:
        rows: the factors.
        squares_only: as in `RowProducts`.
    """
    return RowProducts(rows, squares_only) if rows.pulled is None else PulledRowProducts(rows, squares_only)


class RowProducts:
    """J_i J_k^T / (scale_i scale_k unit^2) for ranges of k, one i after the other.

    Args:
        rows: the factors.
        squares_only: whether only J_i J_i^T will be asked for; then less is kept.
    """

    def __init__(self, rows: Rows, squares_only: bool = False) -> None:
        self.rows = rows
        self.output = rows.w_o.flatten(-3, -2)
        self.kept = None if squares_only or rows.maps is None or rows.query is None else self._turn(slice(None))
        if rows.maps is not None:
            # (W_V^h)^T W_V^g as [*, h, v, g, w], and (W_V^h)^T u_gk as [*, k, h, v, g].
            self.values = torch.einsum("...hav,...gaw->...hvgw", rows.w_v, rows.w_v)
        if rows.logit_gradient is not None:
            self.projected_gradients = torch.einsum("...hav,...gka->...khvg", rows.w_v, rows.logit_gradient)

    def __call__(self, i: int, start: int, stop: int) -> Float[Tensor, "*batch count out_dim out_dim"]:
        """The products of row i with the rows start, ..., stop - 1.

        Args:
            i: number of an output token.
            start: the first row that it is multiplied with.
            stop: the first row that is left out.
        """
        core = self._core(i, slice(start, stop)).flatten(-2).flatten(-3, -2)
        return self.output.mT.unsqueeze(-3) @ core @ self.output.unsqueeze(-3)

    @property
    def entries(self) -> int:
        """Numbers in the largest tensors that one product is made of."""
        return max(self.rows.w_o.shape[-1], self.output.shape[-2]) ** 2

    def slack(self) -> Float[Tensor, "*batch n n"]:
        """Bound on the error of each product in Frobenius norm."""
        rows = self.rows
        operations = sum(rows.w_v.shape[-2:]) + self.output.shape[-2] + 3 * rows.w_o.shape[-1] + 64
        if rows.maps is not None:
            operations += rows.maps.shape[-1]
        if rows.query is not None:
            operations += rows.query.shape[-1]
        if rows.w_k is not None:
            operations += 2 * sum(rows.w_k.shape[-2:])
        size, error = rows.size.unsqueeze(-1), rows.error.unsqueeze(-1)
        crossed = size * error.mT
        return 2 * gamma(2 * operations) * size * size.mT + crossed + crossed.mT + error * error.mT

    def _core(self, i: int, others: slice) -> Float[Tensor, "*batch count heads v heads w"]:
        rows = self.rows
        if rows.maps is None:
            return self._query_square(i, others)
        core = self._memory_part(i, others)
        if rows.query is None:
            return core
        core = self._add_query_part(core, i, others)
        return core + self._query_square(i, others) if others.start <= i < others.stop else core

    def _memory_part(self, i: int, others: slice) -> Tensor:
        maps, deviations, logit_gradient = self.rows.maps, self.rows.deviations, self.rows.logit_gradient
        assert maps is not None
        assert deviations is not None
        assert logit_gradient is not None
        map_i, maps_k = maps[..., i, :], maps[..., others, :]
        deviations_i, deviations_k = deviations[..., i, :, :, :], deviations[..., others, :, :, :]
        overlap = torch.einsum("...hj,...gkj->...khg", map_i, maps_k)
        core = overlap.unsqueeze(-2).unsqueeze(-1) * self.values.unsqueeze(-5)
        alike = torch.einsum("...ha,...gka->...khg", logit_gradient[..., i, :], logit_gradient[..., others, :])
        second = deviations_i.flatten(-2).mT.unsqueeze(-3) @ deviations_k.flatten(-2)
        second = second.unflatten(-2, deviations.shape[-2:]).unflatten(-1, deviations.shape[-2:])
        core = torch.addcmul(core, alike.unsqueeze(-2).unsqueeze(-1), second)
        mean_k = torch.einsum("...hj,...kjgw->...khgw", map_i, deviations_k)
        core = torch.addcmul(core, self.projected_gradients[..., others, :, :, :].unsqueeze(-1), mean_k.unsqueeze(-3))
        mean_i = torch.einsum("...jhv,...gkj->...khvg", deviations_i, maps_k)
        reached_i = self.projected_gradients[..., i, :, :, :].movedim(-1, -3)  # [*, h, g, w]
        return torch.addcmul(core, mean_i.unsqueeze(-1), reached_i.unsqueeze(-3).unsqueeze(-5))

    def _add_query_part(self, core: Tensor, i: int, others: slice) -> Tensor:
        maps, deviations, query = self.rows.maps, self.rows.deviations, self.rows.query
        assert maps is not None
        assert deviations is not None
        assert query is not None
        query_i, query_k = query[..., i, :, :], query[..., others, :, :]
        own, theirs = self.rows.tokens(slice(i, i + 1)), self.rows.tokens(others)
        # Z_hi times the part of row k at input i, then the part of row i at input k times Z_gk^T.
        turned_i = self._turned(slice(i, i + 1))[..., 0, :, :, :, :].movedim(
            (-2, -1), (-4, -3)
        )  # [*, h, v, g, w] of Z_hi W_V^g
        at_i = maps[..., others, :][..., own].squeeze(-1)
        at_i = at_i.mT.unsqueeze(-2).unsqueeze(-2).unsqueeze(-1)  # [*, k, 1, 1, g, 1]
        core = torch.addcmul(core, turned_i.unsqueeze(-5), at_i)
        met = self._met_at_own(query_i, own, others)
        deviations_k = deviations[..., others, :, :, :][..., own, :, :].squeeze(-3)
        core = torch.addcmul(core, met.unsqueeze(-1), deviations_k.unsqueeze(-3).unsqueeze(-3))
        at_k = maps[..., i, theirs].mT.unsqueeze(-1).unsqueeze(-1).unsqueeze(-1)  # [*, k, h, 1, 1, 1]
        core = torch.addcmul(core, at_k, self._turned(others))
        met = self._met_at_theirs(query_k, i, theirs)
        return torch.addcmul(core, deviations[..., i, theirs, :, :].unsqueeze(-1).unsqueeze(-1), met.unsqueeze(-3))

    def _met_at_own(self, query_i: Tensor, own: Tokens, others: slice) -> Float[Tensor, "*batch count heads v heads"]:
        """Z_hi u_gk, u_gk of the key of row i."""
        assert self.rows.logit_gradient is not None
        return torch.einsum("...hva,...gka->...khvg", query_i, self.rows.logit_gradient[..., others, :])

    def _met_at_theirs(self, query_k: Tensor, i: int, theirs: Tokens) -> Float[Tensor, "*batch count heads heads w"]:
        """Z_gk u_hi, u_hi of the key of row k."""
        assert self.rows.logit_gradient is not None
        return torch.einsum("...gkwa,...ha->...khgw", query_k, self.rows.logit_gradient[..., i, :])

    def _query_square(self, i: int, others: slice) -> Tensor:
        query = self.rows.query
        assert query is not None
        own = torch.einsum("...hva,...gwa->...hvgw", query[..., i, :, :], query[..., i, :, :]).unsqueeze(-5)
        before, after = i - others.start, others.stop - i - 1
        zeros = [own.new_zeros(*own.shape[:-5], count, *own.shape[-4:]) for count in (before, after)]
        return torch.cat([zeros[0], own, zeros[1]], -5)

    def _turned(self, which: slice) -> Float[Tensor, "*batch count heads v heads w"]:
        return self._turn(which) if self.kept is None else self.kept[..., which, :, :, :, :]

    def _turn(self, which: slice) -> Float[Tensor, "*batch count heads v heads w"]:
        """(W_V^h)^T Z_gk^T for some k."""
        query = self.rows.query
        assert query is not None
        return torch.einsum("...hav,...gkwa->...khvgw", self.rows.w_v, query[..., which, :, :])


class PulledRowProducts(RowProducts):
    """The same where the gradients of the logits are W_K^g t_gkj: sums over the keys are taken of the t_gkj."""

    def __init__(self, rows: Rows, squares_only: bool = False) -> None:
        super().__init__(rows, squares_only)
        if rows.w_k is not None:
            # [*, h, g, f, e]; one matrix stands for all where the heads are normalised together.
            self.keys = rows.w_k.mT.unsqueeze(-3) @ rows.w_k.unsqueeze(-4)
            self.values_keys = rows.w_v.mT.unsqueeze(-3) @ rows.w_k.unsqueeze(-4)  # [*, h, g, v, f]

    @property
    def entries(self) -> int:
        rows = self.rows
        if rows.pulled is None:
            return super().entries
        heads, keys, width = rows.w_v.shape[-3], *rows.pulled.shape[-2:]
        return max(super().entries, heads**2 * keys * max(width, rows.w_v.shape[-1]))

    def _memory_part(self, i: int, others: slice) -> Tensor:
        maps, deviations, pulled = self.rows.maps, self.rows.deviations, self.rows.pulled
        assert maps is not None
        assert deviations is not None
        assert pulled is not None
        # Axes k, h, g, then the key j beside a width: of row i with 1 for k and g, of the rows k with 1 for h.
        map_i = maps[..., i, :].unsqueeze(-2).unsqueeze(-4)
        maps_k = maps[..., others, :].transpose(-3, -2).unsqueeze(-3)
        x_i = deviations[..., i, :, :, :].transpose(-3, -2).unsqueeze(-3).unsqueeze(-5)
        x_k = deviations[..., others, :, :, :].transpose(-3, -2).unsqueeze(-4)
        pulled_i = pulled[..., i, :, :].unsqueeze(-3).unsqueeze(-5)
        pulled_k = pulled[..., others, :, :].transpose(-4, -3).unsqueeze(-4)
        core = (map_i * maps_k).sum(-1)[..., None, None] * self.values.transpose(-3, -2).unsqueeze(-5)
        alike = ((pulled_i @ self.keys.unsqueeze(-5)) * pulled_k).sum(-1)
        reached_i = pulled_i @ self.values_keys.transpose(-4, -3).mT.unsqueeze(-5)  # W_V^gT u_hij
        core = core + x_i.mT @ (alike.unsqueeze(-1) * x_k + maps_k.unsqueeze(-1) * reached_i)
        reached_k = self.values_keys.unsqueeze(-5) @ pulled_k.mT  # W_V^hT u_gkj
        core = core + (reached_k * map_i.unsqueeze(-2)) @ x_k
        return core.transpose(-3, -2)  # [*, k, h, v, g, w]

    def _met_at_own(self, query_i: Tensor, own: Tokens, others: slice) -> Tensor:
        pulled, w_k = self.rows.pulled, self.rows.w_k
        assert pulled is not None
        assert w_k is not None
        gradient = pulled[..., others, :, :][..., own, :].squeeze(-2) @ w_k.mT
        return torch.einsum("...hva,...gka->...khvg", query_i, gradient)

    def _met_at_theirs(self, query_k: Tensor, i: int, theirs: Tokens) -> Tensor:
        pulled, w_k = self.rows.pulled, self.rows.w_k
        assert pulled is not None
        assert w_k is not None
        gradient = pulled[..., i, :, :][..., theirs, :] @ w_k.mT
        return torch.einsum("...gkwa,...hka->...khgw", query_k, gradient)
