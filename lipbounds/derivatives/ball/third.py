"""The third differential of a block, all heads jointly, bounded over a ball.

    d3F[a, a, a]_i = sum_h 3 k(v_a, S_aa) + 3 k(v_a, S_a, S_a) + 3 k(v, S_aa, S_a) + k(v, S_a, S_a, S_a),

with cumulants k of the change of the values, v_a, and of the logits, S_a, under each row; each is split into what the
query and what the keys move. Symbols, the terms and their proof: docs/derivatives.md, sections 1 and 8.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.derivatives.ball.first import BallDerivatives
from lipbounds.derivatives.ball.norm_bends import NormBends
from lipbounds.derivatives.ball.suprema import DeviationBound
from lipbounds.ops.spectral import root
from lipbounds.rounding import inflate


class BallThirdDerivative(BallDerivatives):
    """The parts on a ball, and the third differential there."""

    def third(self) -> dict[str, Float[Tensor, "*#batch"]]:
        """Upper bounds of the terms of the third differential, as far as they occur."""
        self._prepare()
        terms: dict[str, Tensor] = {}
        if self.block.memory_moves:
            terms |= self._by_keys()
        if self.block.query_moves:
            terms["query_query_query"] = self._by_queries()
        if self.block.moves == "self":
            terms |= self._by_both()
        if self._bends is not None:
            terms |= self._by_norm(self._bends)
        return {name: inflate(term, self._operations + 64) for name, term in terms.items()}

    def _by_keys(self) -> dict[str, Tensor]:
        size = self._query_size
        twice = self._logit_gradient_moment(2 * self._norms * size.square())
        terms = {"values_key_key": 3 * self._mixing_weight * root(twice.sum(-2).amax(-1))}
        by_deviation = torch.minimum(
            *(
                root(
                    (rows.square().unsqueeze(-1) * self._logit_gradient_moment(_up(c) * 4 * size.pow(4)))
                    .sum(-2)
                    .amax(-1)
                )
                for rows, c in zip(self._value_rows, self.centre.query_shares, strict=True)
            )
        )
        values = self._deviation(self._values.plain).unsqueeze(-1)
        by_distance = self._logit_gradient_moment((2**0.5 * self._farthest + 3 * 0.5**0.5 * values) * size)
        by_distance = root(by_distance.square().sum(-2).amax(-1))
        return terms | {"key_key_key": torch.minimum(by_deviation, by_distance)}

    def _by_queries(self) -> Tensor:
        variance = self._deviation(self._keys.plain).square().unsqueeze(-1)
        factors = torch.maximum(self._keys.far.square(), 3 * variance)
        keys, values = self._keys.weighted(factors), self._values.weighted(factors)
        found = [(keys.joint(c) * values.joint(1 / c)).amax(-1) for c in self.centre.key_shares]
        return torch.minimum(*found)

    def _by_both(self) -> dict[str, Tensor]:
        far, size, norms = self._keys.far, self._query_size, self._norms
        farthest = torch.where(self.maps.upper > 0, far, 0.0).amax(-1, keepdim=True)
        deviation = self._deviation(self._keys.plain).unsqueeze(-1)
        variance = deviation.square()
        weight = self._mixing_weight
        own = self._keys.weighted(far.square()).joint(norms.squeeze(-1)).amax(-1)
        terms = {"values_logits": 6 * weight * root(_largest(self._turned(norms)))}
        terms["values_query_query"] = 3 * weight * own
        terms["values_query_key"] = 6 * weight * root(_largest(self._logit_gradient_moment(norms * farthest.square())))
        terms["logits_query"] = 6 * torch.minimum(
            *(
                self._crossed(rows, self._turned(_up(c)))
                for rows, c in zip(self._crossed_rows, self.centre.query_shares, strict=True)
            )
        )
        twice = 2 * size.square()
        terms["logits_key"] = 6 * torch.minimum(
            *(
                self._crossed(rows, self._turned(_up(c) * twice))
                for rows, c in zip(self._value_rows, self.centre.query_shares, strict=True)
            )
        )
        # A sum of two roots of means: the mean of the squared sum of what stands in them would be less, not more.
        values = self._values.weighted(torch.maximum(far.square(), variance).square())
        spread = variance.squeeze(-1)
        terms["query_query_key"] = 3 * torch.minimum(
            *(
                self._crossed(values.joint(1 / c) + self._sg.joint(4 * spread.square() / c), reached)
                for c, reached in zip(self.centre.query_shares, self._logit_gradient_moments, strict=True)
            )
        )
        terms["query_key_key"] = 3 * self._least(
            lambda c: self._crossed(
                self._values_by_distance.joint(1 / c) + self._sg.joint(spread / c),
                self._logit_gradient_moment(_up(c) * twice),
            )
        )
        return terms

    def _by_norm(self, bends: NormBends) -> dict[str, Tensor]:
        """What the second and third derivatives of QK-norm add; `bent` is a second derivative of the logits by one."""
        own, other = self.block.query_moves, self.block.memory_moves
        terms: dict[str, Tensor] = {}
        if own:
            shares = self.centre.key_shares
            terms["twisted_query"] = torch.minimum(
                *(self._sg.joint(1 / c) * bends.of_queries(c, 3) for c in shares)
            ).amax(-1)
            terms["bent_query_query"] = 3 * torch.minimum(
                *(self._values_by_distance.joint(1 / c) * bends.of_queries(c) for c in shares)
            ).amax(-1)
        if not other:
            return terms
        weight, norms, twice = self._mixing_weight, self._norms.squeeze(-1), 2 * self._query_size.squeeze(-1).square()
        terms["values_bent_key"] = 3 * weight * root(bends.of_keys(norms).sum(-2).amax(-1))
        terms["bent_key_key"] = 3 * self._bent_keys(bends, twice, 2)
        terms["twisted_key"] = self._bent_keys(bends, self.centre.even, 3)
        if own:
            pairs = [*zip(self._value_rows, self._crossed_rows, self.centre.query_shares, strict=True)]
            terms["values_bent_query"] = 3 * weight * bends.of_queries(norms).amax(-1)
            terms["bent_query_key"] = 3 * torch.minimum(
                *((v * bends.of_queries(c * twice)).amax(-1) for v, _, c in pairs)
            )
            terms["bent_key_query"] = 3 * torch.minimum(*(self._crossed(x, bends.of_keys(c)) for _, x, c in pairs))
            for order in (1, 2):
                found = [self._crossed(v, bends.crossed(c, order)) for v, _, c in pairs]
                terms[f"bent_crossed_{order}"] = 3 * torch.minimum(*found)
        return terms

    # -- what they share ----------------------------------------------------------------------------------------

    @property
    def _mixing_weight(self) -> Float[Tensor, "*#batch"]:
        """||M||."""
        return self.centre.values.joint_change

    @property
    def _norms(self) -> Float[Tensor, "*#batch heads n 1"]:
        """g_1 of each row."""
        return self.maps.softmax_norm.unsqueeze(-1)

    @property
    def _query_size(self) -> Float[Tensor, "*#batch heads n 1"]:
        """Largest |u_hi|."""
        queries = self.queries
        moved = self._query_radius.unsqueeze(-1) * queries.change + queries.error
        return inflate(queries.sizes + moved.unsqueeze(-1), 8).unsqueeze(-1)

    def _deviation(self, deviation: DeviationBound) -> Float[Tensor, "*#batch heads n"]:
        """Largest ||Cov_hi||^(1/2), of keys or values of one head."""
        norm = deviation.rows.factor_norm.unsqueeze(-1)
        return inflate(norm * deviation.alone() + root(deviation.total) * deviation.error, 8)

    def _least(self, of_shares: Callable[[Tensor], Tensor]) -> Tensor:
        return torch.minimum(*(of_shares(c) for c in self.centre.query_shares))

    def _crossed(self, by_row: Float[Tensor, "*#batch n"], squares: Float[Tensor, "*#batch n m"]) -> Tensor:
        """max_ij of what is known by row times the root of what is known by row and key."""
        return _largest(by_row.unsqueeze(-1) * root(squares))


def _largest(entries: Float[Tensor, "*#batch n m"]) -> Float[Tensor, "*#batch"]:
    return entries.amax((-2, -1))


def _up(share: Float[Tensor, "*#batch heads n"]) -> Float[Tensor, "*#batch heads n 1"]:
    return share.unsqueeze(-1)
