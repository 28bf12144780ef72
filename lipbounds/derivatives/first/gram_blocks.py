"""Products J_i J_k^T of two block rows of the Jacobian of an attention block, from its factors (first/rows.py).

J itself is never formed: a product costs what its H d_v x H d_v entries and the two multiplications by W_O cost.
The products and their rounding: docs/derivatives.md, section 4.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.derivatives.first.rows import Rows
from lipbounds.rounding import gamma


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
            assert rows.logit_gradient is not None
            # (W_V^h)^T W_V^g as [*, h, v, g, w], and (W_V^h)^T u_gk as [*, k, h, v, g].
            self.values = torch.einsum("...hav,...gaw->...hvgw", rows.w_v, rows.w_v)
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

    def slack(self) -> Float[Tensor, "*batch n n"]:
        """Bound on the error of each product in Frobenius norm."""
        rows = self.rows
        operations = sum(rows.w_v.shape[-2:]) + self.output.shape[-2] + 3 * rows.w_o.shape[-1] + 64
        if rows.maps is not None:
            operations += rows.maps.shape[-1]
        if rows.query is not None:
            operations += rows.query.shape[-1]
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
        maps, deviations, logit_gradient, query = (
            self.rows.maps,
            self.rows.deviations,
            self.rows.logit_gradient,
            self.rows.query,
        )
        assert maps is not None
        assert deviations is not None
        assert logit_gradient is not None
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
        met = torch.einsum("...hva,...gka->...khvg", query_i, logit_gradient[..., others, :])
        deviations_k = deviations[..., others, :, :, :][..., own, :, :].squeeze(-3)
        core = torch.addcmul(core, met.unsqueeze(-1), deviations_k.unsqueeze(-3).unsqueeze(-3))
        at_k = maps[..., i, theirs].mT.unsqueeze(-1).unsqueeze(-1).unsqueeze(-1)  # [*, k, h, 1, 1, 1]
        core = torch.addcmul(core, at_k, self._turned(others))
        met = torch.einsum("...gkwa,...ha->...khgw", query_k, logit_gradient[..., i, :])
        return torch.addcmul(core, deviations[..., i, theirs, :, :].unsqueeze(-1).unsqueeze(-1), met.unsqueeze(-3))

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
