"""Mistakes in balls about blocks whose queries and keys are turned by rotary positions or normalised."""

from __future__ import annotations

from torch import Tensor

from lipbounds.claims import FEATURES
from lipbounds.derivatives.ball.first import BallDerivatives, Centre
from lipbounds.derivatives.ball.rows import Queries, Rows, key_rows, query_rows
from lipbounds.derivatives.ball.turned_rows import TurnedTokens
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
