"""The same network written so that its parts can be bounded together."""

from __future__ import annotations

import dataclasses as dc

from torch import Tensor

from lipbounds.targets.attention import Attention
from lipbounds.targets.layers import AttentionLayer, Layer, Linear, Normalization, Pointwise, Residual, Sequence


@dc.dataclass(frozen=True, eq=False, repr=False)
class FeedForward(Layer):
    """linear, activation, linear: what a sequence is rewritten to where the three follow each other."""

    first: Linear
    activation: Pointwise
    second: Linear

    def function(self):
        return lambda x: self.second(self.activation(self.first(x)))

    @property
    def description(self) -> str:
        sizes = self.first.weight.shape
        return f"feed-forward {sizes[1]}, {sizes[0]}, {self.second.weight.shape[0]}, {self.activation.activation}"


def flat(layers: list[tuple[str, Layer]]) -> list[tuple[str, Layer]]:
    """Sequences inside sequences laid out in one line."""
    out: list[tuple[str, Layer]] = []
    for path, layer in layers:
        if isinstance(layer, Sequence):
            inner = [(f"{path}.{name}" if path else name, child) for name, child in layer.named()]
            out += flat(inner)
        else:
            out.append((path, layer))
    return out


def rewritten(layers: list[tuple[str, Layer]]) -> list[tuple[str, Layer]]:
    """The same function with normalisations folded into attention, and feed-forward layers put together.

    Args:
        layers: with their paths, flat.
    """
    out: list[tuple[str, Layer]] = []
    index = 0
    while index < len(layers):
        (path, layer), rest = layers[index], [following for _, following in layers[index + 1 : index + 3]]
        if (
            isinstance(layer, Linear)
            and len(rest) == 2
            and isinstance(rest[0], Pointwise)
            and isinstance(rest[1], Linear)
        ):
            out.append((path, FeedForward(layer, rest[0], rest[1])))
            index += 3
        elif isinstance(layer, Normalization) and rest and _attends(rest[0]):
            plain = Normalization(layer.centred, layer.epsilon)
            out += [(path, plain), (layers[index + 1][0], _folded(layer, rest[0]))]
            index += 2
        else:
            out.append((path, layer))
            index += 1
    return out


def _attends(layer: Layer) -> bool:
    return isinstance(layer, AttentionLayer) or (
        isinstance(layer, Residual) and layer.skip is None and isinstance(layer.body, AttentionLayer)
    )


def _folded(norm: Normalization, layer: Layer) -> Layer:
    """Attention (with its residual) after a normalisation, as a function of the normalised tokens z."""
    if isinstance(layer, AttentionLayer):
        return AttentionLayer(_folded_block(norm, layer.block))
    assert isinstance(layer, Residual)
    assert isinstance(layer.body, AttentionLayer)
    dim = layer.body.block.x.shape[-1]
    like = layer.body.block.x
    weight = like.new_ones(dim) if norm.weight is None else norm.weight
    skip = weight.diag() - weight.unsqueeze(-1) / dim if norm.centred else weight.diag()
    return Residual(AttentionLayer(_folded_block(norm, layer.body.block)), Linear(skip, norm.bias))


def _folded_block(norm: Normalization, block: Attention) -> Attention:
    changes: dict[str, Tensor] = {}
    for name in ("q", "k", "v"):
        weights, bias = getattr(block, f"w_{name}"), getattr(block, f"b_{name}")
        scaled = weights if norm.weight is None else norm.weight.unsqueeze(-1) * weights
        changes[f"w_{name}"] = scaled - scaled.mean(-2, keepdim=True) if norm.centred else scaled
        if norm.bias is not None:
            shift = (norm.bias.unsqueeze(-2) @ weights).squeeze(-2)
            changes[f"b_{name}"] = shift if bias is None else shift + bias
    return block.replace(**changes)
