"""Bounds of single layers over the inputs that reach them."""

from __future__ import annotations

import dataclasses as dc
import math

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.compose.folding import folding_change
from lipbounds.compose.propagated_set import PropagatedSet, Rules, Step, identity, mixing, per_token
from lipbounds.compose.rewrite import FeedForward
from lipbounds.errors import InvalidInput
from lipbounds.ops.activations import slope_interval
from lipbounds.ops.enclosure import Enclosure, diagonal, matrix, only_norm, then
from lipbounds.ops.normalization import normalization_jacobian, normalization_range
from lipbounds.ops.spectral import spectral_norm_upper, vector_norm
from lipbounds.rounding import UNIT_ROUNDOFF, gamma, inflate, product
from lipbounds.targets.attention import Attention
from lipbounds.targets.layers import (
    AttentionLayer,
    Flatten,
    Layer,
    Linear,
    Normalization,
    Patches,
    Pointwise,
    Positions,
)


MATRIX_ENTRIES = 2**24  # of all matrices a token of one layer; beyond it norms alone are kept
HIDDEN_ENTRIES = 2**26  # of the scaled weights a token of one feed-forward layer; beyond it tokens share one matrix


def leaf_step(layer: Layer, inputs: PropagatedSet, rules: Rules) -> Step:
    """A layer without parts.

    Args:
        layer: the layer.
        inputs: that can reach it.
        rules: how attention is bounded.
    """
    y = layer(inputs.x)
    if isinstance(layer, Patches):
        norm = torch.full_like(inputs.radius, math.sqrt(layer.copies) * (1 + 4 * UNIT_ROUNDOFF))
        step = mixing(norm, inputs, y)
        # No window holds a pixel twice.
        return Step(
            step.jacobians,
            False,
            PropagatedSet(y, step.outputs.radius, inputs.radius.unsqueeze(-1).expand(y.shape[:-1])),
        )
    if isinstance(layer, Flatten):
        return mixing(torch.ones_like(inputs.radius), inputs, y)
    if isinstance(layer, Positions):
        return _positions_step(layer, inputs, y)
    if isinstance(layer, AttentionLayer):
        off = folding_change(layer, inputs.x, inputs.radius)
        return mixing(inflate(_attention_norm(layer.block, inputs, rules) + off, 2), inputs, y)
    if isinstance(layer, Linear):
        return per_token(matrix(layer.weight, inputs.token_radii[..., :1]), inputs, y)
    if isinstance(layer, Pointwise):
        return per_token(_pointwise(layer, inputs, rules), inputs, y)
    if isinstance(layer, Normalization):
        return _normalization_step(layer, inputs, y)
    if isinstance(layer, FeedForward):
        return per_token(_feed_forward(layer, inputs, rules), inputs, y)
    raise InvalidInput(f"network must be built of the layers of lipbounds.targets.layers, got {type(layer).__name__}.")


def _positions_step(layer: Positions, inputs: PropagatedSet, y: Tensor) -> Step:
    tokens = inputs.token_radii
    if layer.first is None:
        return Step(identity(inputs), True, PropagatedSet(y, inputs.radius, tokens))
    still = tokens.new_zeros(*tokens.shape[:-1], len(layer.first))
    return Step(
        only_norm(torch.ones_like(inputs.radius)),
        False,
        PropagatedSet(y, inputs.radius, torch.cat([still, tokens], -1)),
    )


def _normalization_step(layer: Normalization, inputs: PropagatedSet, y: Tensor) -> Step:
    radii, dim = inputs.token_radii, inputs.x.shape[-1]
    known = normalization_range(inputs.x, radii, layer.epsilon, centred=layer.centred)
    if radii.numel() * dim**2 > MATRIX_ENTRIES:
        jacobians = only_norm(known.norm)
    else:
        centre = normalization_jacobian(inputs.x, layer.epsilon, centred=layer.centred)
        jacobians = Enclosure(limit=known.norm, centre=centre, deviation=known.deviation, tight=True)
    largest = torch.ones_like(radii[..., :1])
    if layer.weight is not None:
        largest = largest * layer.weight.abs().amax()
        jacobians = then(jacobians, diagonal(layer.weight, radii[..., :1]))
    own = inflate(product(known.norm, largest), 2)
    jacobians = dc.replace(jacobians, limit=torch.minimum(jacobians.limit, own))
    step = per_token(jacobians, inputs, y, own.amax(-1))
    sphere = inflate(2 * math.sqrt(dim) * largest, 4)
    return dc.replace(
        step, outputs=PropagatedSet(y, step.outputs.radius, torch.minimum(step.outputs.token_radii, sphere))
    )


def _middle(low: Tensor, high: Tensor, at_point: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """A point of each interval, its middle or that of the slopes at the centre; and the distance to the farther end."""
    middle = (low + high) / 2 if at_point is None else (at_point[0] + at_point[1]) / 2
    half = torch.maximum(high - middle, middle - low).clamp(min=0)
    return middle, (half + 4 * UNIT_ROUNDOFF * (low.abs() + high.abs())) * (1 + 4 * UNIT_ROUNDOFF)


def _pointwise(layer: Pointwise, inputs: PropagatedSet, rules: Rules) -> Enclosure:
    radii = inputs.token_radii.unsqueeze(-1)
    low, high = slope_interval(layer.activation, inputs.x - radii, inputs.x + radii)
    limit = torch.maximum(low.abs(), high.abs()).amax(-1)
    if inputs.x.numel() * inputs.x.shape[-1] > MATRIX_ENTRIES:
        return only_norm(limit)
    middle, half = _middle(
        low, high, slope_interval(layer.activation, inputs.x, inputs.x) if rules.centre_at_point else None
    )
    return Enclosure(limit=limit, centre=torch.diag_embed(middle), deviation=half.amax(-1))


def _feed_forward(layer: FeedForward, inputs: PropagatedSet, rules: Rules) -> Enclosure:
    first, second = layer.first.weight, layer.second.weight
    size = first.shape[1]
    rows = inflate(vector_norm(first), size + 4)
    bias = 0.0 if layer.first.bias is None else layer.first.bias.abs()
    lengths = inflate(vector_norm(inputs.x), size + 4).unsqueeze(-1)
    error = 2 * gamma(size + 4) * (rows * lengths + bias)
    moved = inflate(product(rows, inputs.token_radii.unsqueeze(-1)) + error, 4)
    hidden = layer.first(inputs.x)
    low, high = slope_interval(layer.activation.activation, hidden - moved, hidden + moved)
    if inputs.token_radii.numel() * max(first.numel(), second.numel()) > HIDDEN_ENTRIES:
        low, high = low.amin(-2, keepdim=True), high.amax(-2, keepdim=True)
    at_point = slope_interval(layer.activation.activation, hidden, hidden) if rules.centre_at_point else None
    middle, half = _middle(low, high, at_point)
    centre = (second * middle.unsqueeze(-2)) @ first
    sizes = inflate(first.norm() * second.norm(), first.numel() + second.numel() + 8)
    rounding = 2 * gamma(first.shape[0] + 8) * sizes * torch.maximum(low.abs(), high.abs()).amax(-1)
    if bool((half.amax(-1) * sizes <= 1e-11 * sizes).all()):
        return Enclosure(
            limit=torch.full_like(rounding, torch.inf), centre=centre, deviation=half.amax(-1) * sizes + rounding
        )
    deviation = inflate(_split_norm(first, half, second) + rounding, 4)
    limit = _split_norm(first, torch.maximum(low.abs(), high.abs()), second)
    return Enclosure(limit=limit, centre=centre, deviation=deviation)


def _split_norm(first: Tensor, slopes: Tensor, second: Tensor) -> Tensor:
    """||W2 diag(d)^1/2|| ||diag(d)^1/2 W1||, rounded up: at least ||W2 diag(s) W1|| for all |s| <= d."""
    root = inflate(slopes.sqrt(), 4)
    return inflate(
        spectral_norm_upper(second * root.unsqueeze(-2)) * spectral_norm_upper(root.unsqueeze(-1) * first), 8
    )


def _attention_norm(block: Attention, inputs: PropagatedSet, rules: Rules) -> Float[Tensor, "*batch"]:
    """The smallest of the chosen bounds; on balls one call for each batch item, whose radii differ."""
    block = block.at(inputs.x)
    rules.calls += 1
    values = []
    for spec in rules.attention:
        if not spec.needs_radius:
            values.append(spec(block, grad=True).value.expand(inputs.radius.shape))
            continue
        each = [
            spec(item, radius=radius, grad=True).value if radius < math.inf else inputs.radius.new_full((), math.inf)
            for item, radius in zip(block_items(block), inputs.radius.flatten().tolist(), strict=True)
        ]
        values.append(torch.stack(each).view(inputs.radius.shape))
    return torch.stack(values).amin(0)


def block_items(block: Attention) -> list[Attention]:
    """The batch items of a block, each without batch dimensions.

    Args:
        block: its own input has all of them.
    """
    trailing = {"x": 2, "w_q": 3, "w_k": 3, "w_v": 3, "w_o": 3, "b_q": 2, "b_k": 2, "b_v": 2, "b_o": 1}
    trailing |= {"query_rotation": 3, "key_rotation": 3, "logit_bias": 3}
    trailing |= {"query_norm_weight": 2, "key_norm_weight": 2}
    batch = block.x.shape[:-2]
    named = {name: getattr(block, name) for name in trailing if getattr(block, name) is not None}
    flat = {}
    for name, tensor in named.items():
        own = tensor.shape[max(tensor.dim() - trailing[name], 0) :]
        lead = tensor.shape[: max(tensor.dim() - trailing[name], 0)]
        flat[name] = tensor.expand(*batch, *own).reshape(-1, *own) if math.prod(lead) != 1 or name == "x" else tensor
    count = math.prod(batch)
    return [
        block.replace(
            **{
                n: t[i] if t is not named[n] or n == "x" else t.reshape(t.shape[max(t.dim() - trailing[n], 0) :])
                for n, t in flat.items()
            }
        )
        for i in range(count)
    ]
