r"""The third differential of a block, all heads jointly, bounded over a ball.

Notation: lipbounds.derivatives.ball.first. Derivatives of means under a row of the map are cumulants: with v_a =
M_h^T a_j for the change of the values and S_aa = 2 <a_i, G_h a_j> for the second change of the logits,

    d3F[a, a, a]_i = sum_h 3 k(v_a, S_aa) + 3 k(v_a, S_a, S_a) + 3 k(v, S_aa, S_a) + k(v, S_a, S_a, S_a),

k the covariance, the third central moment, and k(v, S, S, S) = E[v~ S~^3] - 3 E[v~ S~] E[S~^2]. The norm of a symmetric
trilinear map on a Hilbert space is that of its diagonal (Banach 1938), so it is enough to take |a| = 1 there. S_a = q +
k, q_j = <a_i, w_hj> by the query, k_j = <u_hi, a_j> by the keys, and

    |q~_j| <= far^w_j |a_i| <= F^w |a_i|,    Var(q) <= s_w^2 |a_i|^2,   s_w = sup ||Cov_hi(w)||^(1/2), s_v alike;
    |k~_j| <= sqrt(2) |u|, as keys differ by at most that,    Var(k) <= |u|^2 / 2 (Popoviciu).

|b| = 1 for the output, v_b = <v~, b>, s_b its standard deviation. With tau_ij(f) of the second differential, sum_h f_h
Var(S_aa) <= 4 |a_i|^2 sum_j tau_ij(f) |a_j|^2. Then, with sums over heads by Cauchy-Schwarz (shares c_h, 1/c_h):

- 3 k(v_a, S_aa): |J(P) S|^2 <= g_1 Var(S), so at most 6 ||M|| sqrt( max_ij tau_ij(g_1) ).
- 3 k(v_a, S, S) = 3 sum_hj (J(P_hi) S~^2)_j M_h^T a_j, and |J(P) (x y)|^2 <= g_1 E[x^2 y^2], so at most 3 ||M|| ( max_i
  K_i(w, far_w^2, g_1) + 2 sqrt( max_ij L_ij(g_1 F_w^2) ) + sqrt( max_j sum_i L_ij(2 g_1 |u|^2) ) ).
- 3 k(v, S_aa, q) <= 3 sum_h sqrt(E[v_b^2 q~^2]) sqrt(Var S_aa), so at most 6 max_ij min( K_i(v, far_w^2, 1/c), K_i(w,
  far_v^2, 1/c) ) sqrt(tau_ij(c)); 3 k(v, S_aa, k) at most 6 max_ij sg_i(1/c) sqrt(tau_ij(2 c |u|^2)).
- k(v, q, q, q) = E[v_b q~ (q~^2 - 3 Var q)], |q~^2 - 3 Var q| <= f_j |a_i|^2 with f = max(far_w^2, 3 s_w^2), so at most
  max_i K_i(v, f, 1/c) K_i(w, f, c).
- 3 k(v, q, q, k) = 3 E[v_b k~ (q~^2 - Var q)] - 6 E[v_b q~] E[q~ k~] <= 3 sd(k) |a_i|^2 ( sqrt(E[m^2 v_b^2]) + 2 s_w^2
  s_b ), m = max(far_w^2, s_w^2), so at most 3 max_ij K_i(v, (m + 2 s_w^2)^2, 1/c) sqrt(L_ij(c)).
- 3 k(v, q, k, k) = 3 E[v_b q~ (k~^2 - Var k)] - 6 E[v_b k~] E[q~ k~]. With sd(k~^2) <= sqrt(2) |u| sd(k) and sd(k) <=
  |u| / sqrt(2) it is at most 3 sqrt(2) |u| sd(k) ( sqrt(E[v_b^2 q~^2]) + s_w |a_i| s_b ), so at most 3 max_ij K_i(v,
  (far_w + s_w)^2, 1/c) sqrt(L_ij(2 c |u|^2)).
- k(v, k, k, k) = E[v_b k~ (k~^2 - 3 Var k)] <= 2 |u|^2 s_b sd(k), so at most sqrt( max_j sum_i sg_i(1/c)^2 L_ij(4 c
  |u|^4) ); also <= ( sqrt(2) F_v |u| + (3 / sqrt(2)) s_v |u| ) Var(k), so at most max_j sqrt( sum_i L_ij(.)^2 ).

Sums over i of |b_i| |a_i| sqrt( sum_j t_ij^2 |a_j|^2 ) are at most max_ij t_ij, as there. Where only the query moves,
k(v, q, q, q) remains; where only the memory moves, the terms with neither q nor S_aa.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.derivatives.ball.first import BallParts
from lipbounds.derivatives.ball.suprema import Spread
from lipbounds.ops.spectral import root
from lipbounds.rounding import inflate


class BallThird(BallParts):
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
        return {name: inflate(term, self._operations + 64) for name, term in terms.items()}

    def _by_keys(self) -> dict[str, Tensor]:
        size = self._query_size
        twice = self._reach(2 * self._norms * size.square())
        terms = {"values_key_key": 3 * self._mixing_weight * root(twice.sum(-2).amax(-1))}
        by_deviation = torch.minimum(
            *(
                root((rows.square().unsqueeze(-1) * self._reach(_up(c) * 4 * size.pow(4))).sum(-2).amax(-1))
                for rows, c in zip(self._value_rows, self.centre.query_shares, strict=True)
            )
        )
        values = self._deviation(self._values.plain).unsqueeze(-1)
        by_distance = self._reach((2**0.5 * self._farthest + 3 * 0.5**0.5 * values) * size)
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
        terms["values_query_key"] = 6 * weight * root(_largest(self._reach(norms * farthest.square())))
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
        once = self._values.weighted((torch.maximum(far.square(), variance) + 2 * variance).square())
        terms["query_query_key"] = 3 * torch.minimum(
            *(
                self._crossed(once.joint(1 / c), reached)
                for c, reached in zip(self.centre.query_shares, self._reached, strict=True)
            )
        )
        both = self._values.weighted((far + deviation).square())
        terms["query_key_key"] = 3 * self._least(
            lambda c: self._crossed(both.joint(1 / c), self._reach(_up(c) * twice))
        )
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
        queries = self.centre.queries
        moved = self._query_radius.unsqueeze(-1) * queries.change + queries.error
        return inflate(queries.sizes + moved.unsqueeze(-1), 8).unsqueeze(-1)

    def _deviation(self, spread: Spread) -> Float[Tensor, "*#batch heads n"]:
        """Largest ||Cov_hi||^(1/2), of keys or values of one head."""
        norm = spread.rows.factor_norm.unsqueeze(-1)
        return inflate(norm * spread.alone() + root(spread.total) * spread.error, 8)

    def _least(self, of_shares: Callable[[Tensor], Tensor]) -> Tensor:
        return torch.minimum(*(of_shares(c) for c in self.centre.query_shares))

    def _crossed(self, by_row: Float[Tensor, "*#batch n"], squares: Float[Tensor, "*#batch n m"]) -> Tensor:
        """max_ij of what is known by row times the root of what is known by row and key."""
        return _largest(by_row.unsqueeze(-1) * root(squares))


def _largest(entries: Float[Tensor, "*#batch n m"]) -> Float[Tensor, "*#batch"]:
    return entries.amax((-2, -1))


def _up(share: Float[Tensor, "*#batch heads n"]) -> Float[Tensor, "*#batch heads n 1"]:
    return share.unsqueeze(-1)
