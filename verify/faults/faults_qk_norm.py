"""Wrong treatments of QK-norm."""

from __future__ import annotations

import dataclasses as dc

import torch
from torch import Tensor

from lipbounds.claims import FEATURES
from lipbounds.targets.attention import Attention
from verify.faults.fault import planted
from verify.faults.right import Formula, norm
from verify.faults.right_norms import RIGHT, normed


ALL = tuple(FEATURES)


def _without_norm(block: Attention) -> Attention:
    return block.replace(query_norm_weight=None, key_norm_weight=None, norm_eps=None, norm_over=None)


@planted(supports=ALL)
def norm_ignored(block: Attention) -> Tensor:
    """QK-norm is accepted and silently ignored."""
    return normed()(_without_norm(block))


@planted(supports=ALL)
def products_of_matrices_before_the_norm(block: Attention) -> Tensor:
    """||K W_Q^T|| and ||Q W_K^T|| of what is projected; the attention map is the right one."""
    return Formula()(block)


@planted(supports=ALL)
def norm_jacobian_left_out(block: Attention) -> Tensor:
    """Normalised queries and keys, which are taken to move with their tokens as though they were not normalised."""
    return normed(reach=lambda b, side: RIGHT(_without_norm(b), side))(block)


@planted(supports=ALL)
def norm_eps_left_out(block: Attention) -> Tensor:
    """The norm taken to be of no length along its own direction, as it would be with eps = 0."""
    return normed(reach=dc.replace(RIGHT, eps=lambda b: 1e-300))(block)


@planted(supports=ALL)
def norm_weights_left_out(block: Attention) -> Tensor:
    """The weights of the norm left out of its Jacobian."""
    return normed(reach=dc.replace(RIGHT, gain=torch.ones_like))(block)


@planted(supports=ALL)
def norm_weights_averaged(block: Attention) -> Tensor:
    """Their root mean square in place of the weights of the norm."""
    mean = lambda gain: gain.square().mean(-1, keepdim=True).sqrt().expand(gain.shape)  # noqa: E731
    return normed(reach=dc.replace(RIGHT, gain=mean))(block)


@planted(supports=ALL)
def norm_of_the_sum_of_squares(block: Attention) -> Tensor:
    """Queries and keys taken to be divided by their length, not by the root of the mean of their squares."""
    return normed(reach=dc.replace(RIGHT, mean=False))(block)


@planted(supports=ALL)
def norm_of_each_head_for_all_heads(block: Attention) -> Tensor:
    """The Jacobian of a norm of each head where all heads are normalised together."""
    return normed(reach=dc.replace(RIGHT, over=lambda b: "head"))(block)


@planted(supports=ALL)
def key_bias_left_out_of_normalised_keys(block: Attention) -> Tensor:
    """The key bias left out, as is right without a norm: normalised, it is no common row."""
    bare = lambda b: norm(b.replace(b_k=None).keys)  # noqa: E731
    return normed(keys=bare)(block)
