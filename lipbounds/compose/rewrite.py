"""The same network written so that its parts can be bounded together."""

from __future__ import annotations

import dataclasses as dc

from torch import Tensor

from lipbounds.rounding import gamma, inflate
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


@dc.dataclass(frozen=True, eq=False, repr=False)
class FoldedAttention(AttentionLayer):
    """Attention on normalised tokens, with the scale and the shift of the normalisation in its weights.

    Args:
        block: with the folded weights, as computed.
        lost: how far they are from the exact ones, entry by entry, at most; by the names of the weights and biases.
    """

    lost: dict[str, Tensor]


@dc.dataclass(frozen=True, eq=False, repr=False)
class FoldedLinear(Linear):
    """The skip connection around such attention.

    Args:
        weight: as computed.
        bias: exact.
        lost: how far the weight is from the exact one, entry by entry, at most.
    """

    lost: Tensor = dc.field(kw_only=True)


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
    if isinstance(layer, Residual):
        return layer.skip is None and isinstance(layer.body, AttentionLayer) and _attends(layer.body)
    # Behind QK-norm there is no bound on what the rounding of folded weights does.
    return isinstance(layer, AttentionLayer) and "qk_norm" not in layer.block.features


def _folded(norm: Normalization, layer: Layer) -> Layer:
    """Attention (with its residual) after a normalisation, as a function of the normalised tokens z."""
    if isinstance(layer, AttentionLayer):
        return FoldedAttention(_folded_block(norm, layer.block), _lost_by_folding(norm, layer.block))
    assert isinstance(layer, Residual)
    assert isinstance(layer.body, AttentionLayer)
    dim = layer.body.block.x.shape[-1]
    like = layer.body.block.x
    weight = like.new_ones(dim) if norm.weight is None else norm.weight
    skip = weight.diag() - weight.unsqueeze(-1) / dim if norm.centred else weight.diag()
    # A quotient, a difference and the sizes themselves.
    lost = inflate(4 * gamma(3) * (weight.diag() + weight.unsqueeze(-1) / dim).abs(), 8) if norm.centred else 0 * skip
    return dc.replace(layer, body=_folded(norm, layer.body), skip=FoldedLinear(skip, norm.bias, lost=lost))


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


def _lost_by_folding(norm: Normalization, block: Attention) -> dict[str, Tensor]:
    """Bounds on the rounding of `_folded_block`, entry by entry: sums of at most D + 3 roundings."""
    lost: dict[str, Tensor] = {}
    dim = block.x.shape[-1]
    slack = 2 * gamma(dim + 8)
    for name in ("q", "k", "v"):
        weights, bias = getattr(block, f"w_{name}").abs(), getattr(block, f"b_{name}")
        scaled = weights if norm.weight is None else norm.weight.abs().unsqueeze(-1) * weights
        scaled = scaled + scaled.mean(-2, keepdim=True) if norm.centred else scaled
        lost[f"w_{name}"] = slack * scaled
        if norm.bias is not None:
            shift = (norm.bias.abs().unsqueeze(-2) @ weights).squeeze(-2)
            lost[f"b_{name}"] = slack * (shift if bias is None else shift + bias.abs())
    return lost
