"""The parts of the first and the second differential of a block, all heads jointly, bounded over a ball.

    (dF y)_i = sum_h E_hi[ M_h^T y_j + S~_y v~_hj ],
    (d2F a y)_i = sum_h E_hi[ S~_a M_h^T y_j + S~_y M_h^T a_j + S_ay v~_hj + S~_a S~_y v~_hj ],

a mixing part, a query part and a key part; each is bounded by Cauchy-Schwarz over heads and keys together, with shares
c_h of the heads. Symbols and proof: docs/derivatives.md, sections 1 and 7.
"""

from __future__ import annotations

from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.derivatives.ball.norm_bends import NormBends
from lipbounds.derivatives.ball.reach import reaches
from lipbounds.derivatives.ball.rows import Queries, Rows, joint_norms, key_rows, query_rows, value_rows
from lipbounds.derivatives.ball.suprema import (
    DeviationBound,
    Maps,
    RowDeviations,
    balance,
    head_sizes,
    logit_gradient_moment,
    maps_on_ball,
    rounding_of_maps,
    stacked_queries,
)
from lipbounds.derivatives.ball.turned_rows import TurnedTokens, is_turned
from lipbounds.derivatives.cache import cached_per_block, copy_of, is_tracked
from lipbounds.ops.spectral import root, spectral_norm_upper, vector_norm
from lipbounds.rounding import inflate
from lipbounds.targets.attention import Attention


class Centre:
    """What does not depend on the radius, of a block in float64."""

    def __init__(self, block: Attention) -> None:
        self.block = block
        self.turned = TurnedTokens(block) if is_turned(block) else None
        self.values: Rows = value_rows(block)
        self.zero = torch.zeros_like(block.logits[..., 0, 0, 0])
        self.even = torch.ones_like(block.logits[..., 0])
        sizes = head_sizes(block, self.values)
        if block.query_moves:
            self.keys = self.keys_on(self.zero)
            self.key_shares = (self.even, balance(sizes, head_sizes(block, self.keys)))
        if block.memory_moves:
            self.queries = self.queries_on(self.zero)
            self.mixing_weights = joint_norms(block.w_v, block.w_o)
            self.query_shares = (self.even, balance(sizes, self.queries.sizes))

    def keys_on(self, radius: Float[Tensor, "*#batch"]) -> Rows:
        """The keys at the centre, and how far they move on the ball of that radius.

        Args:
            radius: of the ball.
        """
        return key_rows(self.block) if self.turned is None else self.turned.keys(radius)

    def queries_on(self, radius: Float[Tensor, "*#batch"]) -> Queries:
        """The same for the queries.

        Args:
            radius: of the ball.
        """
        return query_rows(self.block) if self.turned is None else self.turned.queries(radius)


@cached_per_block
def centre_of(block: Attention) -> Centre:
    """What does not depend on the radius, made once for all balls about the input of a block.

    Args:
        block: in float64.
    """
    # Of a copy, as what is kept for a block must not keep that block alive.
    tracked = torch.is_grad_enabled() and is_tracked(block)
    return Centre(block if tracked else copy_of(block))


class BallDerivatives:
    """Bounds of the parts on a ball; each property is an upper bound of what its name says.

    Over 150 lines, because the bounds share suprema, each made at its first use.

    Args:
        centre: of the ball.
        radius: eps, Frobenius norm; of several balls all is made at once, and each result has the balls in front.
    """

    def __init__(self, centre: Centre, radius: float | Float[Tensor, " balls"]) -> None:
        self.centre, self.block = centre, centre.block
        radii = torch.as_tensor(radius, dtype=centre.zero.dtype, device=centre.zero.device)
        self.radius = radii.reshape((*radii.shape, *[1] * centre.zero.dim()))
        still = torch.zeros_like(self.radius)
        self._memory_radius = self.radius if self.block.memory_moves else still
        self._query_radius = self.radius if self.block.query_moves else still
        self._operations = sum(self.block.logits.shape[-2:]) + 32
        self._prepared = False
        self.maps: Maps = maps_on_ball(self.block, self.radius)
        self._values = RowDeviations(self.block, centre.values, self.maps, self._memory_radius)
        if self.block.query_moves:
            self.keys = centre.keys if centre.turned is None else centre.keys_on(self.radius)
            self._keys = RowDeviations(self.block, self.keys, self.maps, self._memory_radius)
        if self.block.memory_moves:
            self.queries = centre.queries if centre.turned is None else centre.queries_on(self.radius)

    # -- the first differential ---------------------------------------------------------------------------------

    def first(self) -> dict[str, Float[Tensor, "*#batch"]]:
        """Mixing, query part and key part, as far as they occur."""
        parts = {}
        if self.block.memory_moves:
            parts["mixing"] = self._mixing()
        if self.block.query_moves:
            products = [self._om.joint(c) * self._sg.joint(1 / c) for c in self.centre.key_shares]
            parts["query_part"] = torch.minimum(*products).amax(-1)
        if self.block.memory_moves:
            norms = self.maps.softmax_norm
            products = [
                root((rows.square().unsqueeze(-1) * reached).sum(-2).amax(-1))
                for rows, reached in zip(self._value_rows, self._logit_gradient_moments, strict=True)
            ]
            together = [
                stacked_queries(self.queries, self._query_radius, rows.unsqueeze(-2).square() * c * norms)
                for rows, c in zip(self._value_rows, self.centre.query_shares, strict=True)
                if self.queries.rows is not None
            ]
            parts["key_part"] = torch.stack(torch.broadcast_tensors(*products, *together)).amin(0)
        return {name: inflate(part, self._operations) for name, part in parts.items()}

    def _mixing(self) -> Tensor:
        maps, upper, centre = self.block.probabilities, self.maps, self.centre
        lost = _frobenius(rounding_of_maps(self.block))
        by_rate = self.radius * sum(self._map_change.values()) + lost
        moved = torch.where(self.radius > 0, torch.minimum(_frobenius(upper.away), by_rate), lost)
        by_columns = upper.upper.sum(-2).amax(-1)
        together = (maps.movedim(-3, -2).flatten(-2), maps.flatten(-3, -2))
        joint = [
            weights * torch.minimum(spectral_norm_upper(stack) + moved, root(by_columns.sum(-1)))
            for stack, weights in zip(together, centre.mixing_weights, strict=True)
        ]
        apart = vector_norm(upper.away.flatten(-2))
        alone = torch.minimum(
            spectral_norm_upper(maps) + inflate(apart, upper.away.shape[-2:].numel()), root(by_columns)
        )
        return torch.minimum(torch.minimum(*joint), (alone * centre.values.change).sum(-1))

    # -- the second differential --------------------------------------------------------------------------------

    def second(self) -> dict[str, Float[Tensor, "*#batch"]]:
        """How fast mixing, query part and key part change, as far as they occur."""
        self._prepare()
        weights = self.centre.values.joint_change
        changes = {name: weights * change for name, change in self._map_change.items()}
        parts = {}
        if self.block.memory_moves:
            parts["mixing"] = sum(changes.values())
            parts["key_part"] = changes["keys"] + root(
                self._logit_gradient_moment(self._farthest).square().sum(-2).amax(-1)
            )
        if self.block.query_moves:
            parts["query_part"] = self._two_queries
        bends = self._bends
        if bends is not None and self.block.query_moves:
            bent = [self._sg.joint(1 / c) * bends.of_queries(c) for c in self.centre.key_shares]
            parts["query_part"] = parts["query_part"] + torch.minimum(*bent).amax(-1)
        if bends is not None and self.block.memory_moves:
            parts["key_part"] = parts["key_part"] + self._bent_keys(bends, self.centre.even, 2)
        if self.block.moves == "self":
            both = self._logits + self._query_and_key
            parts["query_part"] = parts["query_part"] + changes["queries"] + both
            parts["key_part"] = parts["key_part"] + both
        return {name: inflate(part, self._operations) for name, part in parts.items()}

    @cached_property
    def _map_change(self) -> dict[str, Tensor]:
        """||dP||_F over all heads for a unit change, by queries and by keys (D_q and D_k)."""
        norms, changes = self.maps.softmax_norm, {}
        if self.block.query_moves:
            changes["queries"] = (self._om.joint(self.centre.even) * root(norms.amax(-2))).amax(-1)
        if self.block.memory_moves:
            changes["keys"] = root(self._logit_gradient_moment(norms.unsqueeze(-1)).sum(-2).amax(-1))
        return changes

    @cached_property
    def _two_queries(self) -> Tensor:
        far = self._keys.far
        keys, values = self._keys.weighted(far), self._values.weighted(far)
        return torch.minimum(*(keys.joint(c) * values.joint(1 / c) for c in self.centre.key_shares)).amax(-1)

    @cached_property
    def _logits(self) -> Tensor:
        pairs = zip(self._value_rows, self.centre.query_shares, strict=True)
        found = [(rows.unsqueeze(-1) * root(self._turned(c.unsqueeze(-1)))).amax((-2, -1)) for rows, c in pairs]
        return torch.minimum(*found)

    @cached_property
    def _query_and_key(self) -> Tensor:
        pairs = zip(self._crossed_rows, self._logit_gradient_moments, strict=True)
        return torch.minimum(*((crossed.unsqueeze(-1) * root(reached)).amax((-2, -1)) for crossed, reached in pairs))

    @cached_property
    def _bends(self) -> NormBends | None:
        """What QK-norm adds; None without it."""
        if self.centre.turned is None or self.block.query_norm is None:
            return None
        found = reaches(self.block, self.radius)
        return NormBends(self.block, self.maps, found, (self._query_radius, self._memory_radius))

    def _bent_keys(self, bends: NormBends, factor: Tensor, order: int) -> Float[Tensor, "*#batch"]:
        """max_j sqrt( sum_i sg_i(1/c)^2 g_ij ) with g_ij that of the bends of keys, times a factor of each row."""
        found = [
            root((rows.square().unsqueeze(-1) * bends.of_keys(c * factor, order)).sum(-2).amax(-1))
            for rows, c in zip(self._value_rows, self.centre.query_shares, strict=True)
        ]
        return torch.minimum(*found)

    # -- what they share ----------------------------------------------------------------------------------------

    @cached_property
    def _om(self) -> DeviationBound:
        return self._keys.plain

    @cached_property
    def _sg(self) -> DeviationBound:
        return self._values.plain

    @cached_property
    def _logit_gradient_moments(self) -> list[Float[Tensor, "*#batch n m"]]:
        """L_ij(c) of the shares of queries."""
        return [self._logit_gradient_moment(c.unsqueeze(-1)) for c in self.centre.query_shares]

    @cached_property
    def _value_rows(self) -> list[Float[Tensor, "*#batch n"]]:
        """sg_i(1/c) of the shares of queries."""
        return [self._sg.joint(1 / c) for c in self.centre.query_shares]

    @cached_property
    def _crossed_rows(self) -> list[Float[Tensor, "*#batch n"]]:
        """min( K_i(v, far_w^2, 1/c), K_i(w, far_v^2, 1/c) ) of the shares of queries."""
        values, keys = self._values_by_distance, self._keys.weighted(self._values.far.square())
        return [torch.minimum(values.joint(1 / c), keys.joint(1 / c)) for c in self.centre.query_shares]

    @cached_property
    def _values_by_distance(self) -> DeviationBound:
        """K_i(v, far_w^2, .)."""
        return self._values.weighted(self._keys.far.square())

    def _prepare(self) -> None:
        """What the second differential needs of rows in the ball: sqrt(Var(S)) <= eps (sup om_h + sup |u| sqrt(pi))."""
        if self._prepared:
            return
        self._prepared = True
        logit_deviation = torch.zeros_like(self.maps.softmax_norm)
        if self.block.query_moves:
            norm = self.keys.factor_norm.unsqueeze(-1)
            logit_deviation = logit_deviation + norm * self._om.alone() + root(self._om.total) * self._om.error
        if self.block.memory_moves:
            queries = self.queries
            moved = (self._query_radius.unsqueeze(-1) * queries.change + queries.error).unsqueeze(-1)
            logit_deviation = logit_deviation + (queries.sizes + moved) * root(self.maps.pairs.amax(-1))
        logit_deviation = inflate(self.radius[..., None, None] * logit_deviation, self._operations)
        rounding = rounding_of_maps(self.block)
        self._values.move(logit_deviation, rounding)
        if self.block.query_moves:
            self._keys.move(logit_deviation, rounding)

    @cached_property
    def _farthest(self) -> Float[Tensor, "*#batch heads n 1"]:
        """Largest distance of the values of visible keys from their mean."""
        return torch.where(self.maps.upper > 0, self._values.far, 0.0).amax(-1, keepdim=True)

    def _turned(self, factors: Float[Tensor, "*#batch heads n 1"]) -> Float[Tensor, "*#batch n m"]:
        """tau_ij: bound of sum_h f_hi pi_hij <x, G_h y>^2 over unit x and y."""
        keys = self.keys
        weights = self.maps.pairs * factors
        apart = (weights * keys.change.square()[..., None, None]).sum(-3)
        return torch.minimum(apart, weights.amax(-3) * keys.joint_change.square()[..., None, None])

    def _logit_gradient_moment(self, factors: Float[Tensor, "*#batch heads n one"]) -> Float[Tensor, "*#batch n m"]:
        return logit_gradient_moment(self.queries, self._query_radius, self.maps.pairs * factors)


def _frobenius(entries: Float[Tensor, "*#batch heads n m"]) -> Float[Tensor, "*#batch"]:
    return inflate(vector_norm(entries.flatten(-3)), entries.shape[-3:].numel() + 8)
