"""Wrong norms of matrices, and wrong covariances."""

from __future__ import annotations

import torch
from torch import Tensor

from lipbounds.targets.attention import Attention
from verify.faults.fault import planted
from verify.faults.right import Covariance, Formula, covariance_of


# -- norms of matrices -----------------------------------------------------------------------------------------------


def _iterated(block: Attention, steps: int, added: float = 0.0) -> Tensor:
    """||W_V|| by power iteration from a fixed start, divided by the length plus a constant."""
    vector = torch.linspace(1, 2, block.w_v.shape[-1], dtype=torch.float64).expand(block.w_v.mT[..., 0].shape)
    for _ in range(steps):
        vector = vector / (torch.linalg.vector_norm(vector, dim=-1, keepdim=True) + added + 1e-300)
        vector = (block.w_v.mT @ (block.w_v @ vector.unsqueeze(-1))).squeeze(-1)
    vector = vector / (torch.linalg.vector_norm(vector, dim=-1, keepdim=True) + added + 1e-300)
    return torch.linalg.vector_norm(block.w_v @ vector.unsqueeze(-1), dim=(-2, -1))


@planted()
def single_power_step(block: Attention) -> Tensor:
    """||W_V|| by a single step of power iteration."""
    return Formula(value_weights=lambda b: _iterated(b, 1))(block)


@planted(subtle=True)
def power_iteration_stopped_early(block: Attention) -> Tensor:
    """||W_V|| by eight steps of power iteration, sold as an upper bound."""
    return Formula(value_weights=lambda b: _iterated(b, 8))(block)


@planted(subtle=True)
def power_iteration_with_small_constant(block: Attention) -> Tensor:
    """||W_V|| by 60 steps of power iteration that divides by the length plus 0.01."""
    return Formula(value_weights=lambda b: _iterated(b, 60, 0.01))(block)


@planted()
def largest_entry(block: Attention) -> Tensor:
    """The largest entry of |W_V| in place of its spectral norm."""
    return Formula(value_weights=lambda b: b.w_v.abs().amax((-2, -1)))(block)


@planted()
def longest_column(block: Attention) -> Tensor:
    """The longest column of W_V in place of its spectral norm."""
    return Formula(value_weights=lambda b: torch.linalg.vector_norm(b.w_v, dim=-2).amax(-1))(block)


@planted()
def largest_row_sum(block: Attention) -> Tensor:
    """The largest row sum of |W_V|, its norm from l_inf to l_inf, in place of the spectral norm."""
    return Formula(value_weights=lambda b: b.w_v.abs().sum(-1).amax(-1))(block)


# -- covariances -----------------------------------------------------------------------------------------------------


@planted()
def mean_subtracted_twice(block: Attention) -> Tensor:
    """Covariance as E[y z^T] - 2 E[y] E[z]^T."""

    def covariance(first: Tensor, second: Tensor, maps: Tensor) -> Tensor:
        left, right = (maps @ first).unsqueeze(-1), (maps @ second).unsqueeze(-2)
        return covariance_of(first, second, maps) - left @ right

    return Covariance(covariance=covariance)(block)


@planted()
def mean_added(block: Attention) -> Tensor:
    """Covariance with the wrong sign, E[y z^T] + E[y] E[z]^T: for two different matrices it can be too small."""

    def covariance(first: Tensor, second: Tensor, maps: Tensor) -> Tensor:
        left, right = (maps @ first).unsqueeze(-1), (maps @ second).unsqueeze(-2)
        return covariance_of(first, second, maps) + 2 * left @ right

    return Covariance(covariance=covariance)(block)


@planted()
def trace_over_width(block: Attention) -> Tensor:
    """The mean singular value of a covariance in place of the largest."""
    return Covariance(size=lambda matrix: torch.linalg.svdvals(matrix).mean(-1))(block)


@planted()
def own_row_only(block: Attention) -> Tensor:
    """The third covariance term for one query at a time: that many queries see the same key is forgotten."""
    return Covariance(columns=lambda maps, weights: (maps * weights.unsqueeze(-1)).amax((-2, -1)))(block)
