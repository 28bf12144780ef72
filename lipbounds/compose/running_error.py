"""Running error analysis of the forward pass: how far what a layer returned is from its exact value at the same floats.

The layers are walked once more as a Taylor model that does not move (lipbounds.compose.taylor.network): every value has
a bound on its error, entry by entry, and the sum rules of lipbounds.compose.taylor.coefficient (Higham 2002, section
3.1) carry it. What was returned is compared with the floats of that walk, so nothing is assumed of how it was computed.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.compose.primitives import block_items
from lipbounds.compose.rewrite import FoldedAttention, flat
from lipbounds.compose.taylor.coefficient import exact, norm_upper
from lipbounds.compose.taylor.model import CENTRE, Value
from lipbounds.compose.taylor.network import Walk
from lipbounds.rounding import inflate
from lipbounds.targets.layers import AttentionLayer, Layer


@torch.no_grad()
def lost_by(layer: Layer, x: Float[Tensor, "..."], y: Float[Tensor, "..."], dimensions: int) -> Float[Tensor, "*batch"]:
    """Upper bound on |y - layer(x)| in the Frobenius norm, layer(x) in real arithmetic, for each batch item.

    Args:
        layer: the layer, in float64.
        x: its input, float64.
        y: its output as computed.
        dimensions: of one input: 3 for images, else 2.
    """
    batch = x.shape[: x.dim() - dimensions]
    inputs = x.reshape(-1, *x.shape[len(batch) :])
    outputs = y.reshape(len(inputs), *y.shape[len(batch) :])
    layers = _items(layer, x) if isinstance(layer, AttentionLayer) else [layer] * len(inputs)
    lost = [_lost(*item) for item in zip(layers, inputs, outputs, strict=True)]
    return torch.stack(lost).reshape(batch)


def _lost(layer: Layer, x: Tensor, y: Tensor) -> Tensor:
    infinite = torch.full((), torch.inf, dtype=x.dtype, device=x.device)
    if not bool(x.isfinite().all() & y.isfinite().all()):
        return infinite
    value = Walk(torch.inf).through(flat([("", layer)]), Value({CENTRE: exact(x.unsqueeze(0))}), None)
    apart = (y - value.centre).abs()
    return norm_upper(inflate(apart + value.centre_error, 4).flatten()).nan_to_num(nan=torch.inf)


def _items(layer: AttentionLayer, x: Tensor) -> list[Layer]:
    """The layer of every batch item, with its own mask, positions and weights."""
    blocks = block_items(layer.block.at(x))
    if not isinstance(layer, FoldedAttention):
        return [AttentionLayer(block) for block in blocks]
    own = {name: 3 if name.startswith("w") else 2 for name in layer.lost}
    lost = {name: t.reshape(-1, *t.shape[t.dim() - own[name] :]) for name, t in layer.lost.items()}
    return [
        FoldedAttention(block, {name: t[index if len(t) > 1 else 0] for name, t in lost.items()})
        for index, block in enumerate(blocks)
    ]
