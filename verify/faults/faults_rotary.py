"""Wrong treatments of rotary positions."""

from __future__ import annotations

import torch
from torch import Tensor

from lipbounds.targets.attention import Attention
from verify.faults.fault import UNNORMED, planted
from verify.faults.right import Formula, norm, turned


ALL = UNNORMED


def _without(block: Attention, *sides: str) -> Attention:
    """The block with the rotation of these sides replaced by the identity."""
    identities = {}
    for side in sides:
        rotation = getattr(block, f"{side}_rotation")
        if rotation is not None:
            cos, sin = rotation.unbind(-2)
            identities[f"{side}_rotation"] = torch.stack([torch.ones_like(cos), torch.zeros_like(sin)], -2)
    return block.replace(**identities)


@planted(supports=ALL)
def rotation_ignored(block: Attention) -> Tensor:
    """Rotary positions are accepted and silently ignored."""
    return Formula()(_without(block, "query", "key"))


@planted(supports=ALL)
def rotation_of_keys_only(block: Attention) -> Tensor:
    """Keys are turned by their positions, queries are not."""
    return turned()(_without(block, "query"))


@planted(supports=ALL)
def products_of_unturned_matrices(block: Attention) -> Tensor:
    """||K W_Q^T|| and ||Q W_K^T|| as though there were no rotation between them; the attention map is the right one."""
    return Formula()(block)


@planted(supports=ALL)
def key_bias_left_out_of_turned_keys(block: Attention) -> Tensor:
    """The key bias left out, as is right without rotary positions: turned, it is no common row."""
    bare = lambda b: norm(b.replace(b_k=None).keys)  # noqa: E731
    return turned(keys=bare)(block)


@planted(supports=ALL, subtle=True)
def rotation_of_norm_one(block: Attention) -> Tensor:
    """The norm of a rotation taken as exactly 1; that of rounded cosines and sines may be above it."""
    return turned(length=lambda rotation: 1.0)(block)
