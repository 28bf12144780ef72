"""Mistakes in balls about blocks whose queries and keys are turned by rotary positions or normalised."""

from __future__ import annotations

import torch
from torch import Tensor

from lipbounds.claims import FEATURES
from lipbounds.derivatives.ball.first import BallDerivatives, Centre
from lipbounds.derivatives.ball.logits import logit_change, theorem_3_on_ball
from lipbounds.derivatives.ball.reach import reaches
from lipbounds.derivatives.ball.rows import Queries, Rows, key_rows, query_rows
from lipbounds.derivatives.ball.turned_products import change_from_centre
from lipbounds.derivatives.ball.turned_rows import TurnedTokens
from lipbounds.derivatives.logit_changes import change_by_queries
from lipbounds.derivatives.norms import combine_heads, map_norm, value_norm
from lipbounds.targets.attention import Attention
from verify.faults.fault import UNNORMED, planted
from verify.faults.faults_sharp_ball import _cast


class _Plain(TurnedTokens):
    """Gradients W_Q k_j and W_K q_i of the logits: as though tokens moved queries and keys by their weights alone."""

    def keys(self, radius: Tensor) -> Rows:
        return key_rows(self.block)

    def queries(self, radius: Tensor) -> Queries:
        return query_rows(self.block)


def _direct(block: Attention, radius: float) -> Tensor:
    """The sum of the three parts over the ball, with these rows; the maps and how far they move are right."""
    centre = Centre(block.double)
    if centre.turned is not None:
        centre.turned = _Plain(block.double)
    return _cast(block, sum(BallDerivatives(centre, radius).first().values()))


@planted(scope="ball", supports=UNNORMED)
def rows_not_turned_back(block: Attention, radius: float) -> Tensor:
    """Gradients of the logits W_Q k_j and W_K q_i of turned keys and queries; the turn of the other token left out."""
    return _direct(block, radius)


@planted(scope="ball", supports=tuple(FEATURES))
def norm_jacobian_left_out_on_the_ball(block: Attention, radius: float) -> Tensor:
    """Normalised queries and keys move over the ball with their tokens as though they were not normalised."""
    return _direct(block, radius)


@planted(scope="ball", supports=tuple(FEATURES))
def norm_slope_at_the_centre(block: Attention, radius: float) -> Tensor:
    """Queries and keys stay on their ellipsoid, and move as fast as they do at the centre, wherever they are."""
    wide = block.double
    change = logit_change(wide, radius)
    if wide.query_norm is not None:
        change, (queries, keys) = torch.zeros_like(change), reaches(wide, 0.0)
        if wide.query_moves:
            change = change + queries.rate * keys.size * wide.logits.shape[-1] ** 0.5
        if wide.memory_moves:
            change = change + keys.rate * queries.size * wide.tokens**0.5
    return _cast(block, theorem_3_on_ball(wide, radius, change=change)[0])


@planted(scope="change", supports=tuple(feature for feature in FEATURES if feature not in ("cross", "some_queries")))
def norm_left_out_of_the_change(block: Attention, radius: float) -> Tensor:
    """Logits change from the centre as though queries and keys were not normalised; the map there is the right one."""
    wide = block.double
    bare = wide.replace(query_norm_weight=None, key_norm_weight=None, norm_eps=None, norm_over=None)
    logits = change_from_centre(bare, radius, change_by_queries(bare))
    values = value_norm(wide) + radius * wide.weight_norms.values
    mixing = wide.weight_norms.values * map_norm(wide)
    return _cast(block, combine_heads(wide, mixing + abs(wide.scale_value) / 2 * values * logits))
