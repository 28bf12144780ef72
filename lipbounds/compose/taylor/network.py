"""A network at one input as a Taylor model: the layers in order, each changing one value.

Only what is read is followed: behind the last layer that mixes tokens, a `Pool` of the first or last token leaves one
row of everything before it, so that attention there has one query.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from lipbounds.compose.reading import ReadResidual, acts_by_token
from lipbounds.compose.rewrite import FeedForward, FoldedAttention, FoldedLinear, flat
from lipbounds.compose.taylor.activated import activated
from lipbounds.compose.taylor.bilinear import Bilinear
from lipbounds.compose.taylor.coefficient import Coefficient, Map
from lipbounds.compose.taylor.model import CENTRE, INPUT, Value
from lipbounds.compose.taylor.normalization import Normalize
from lipbounds.compose.taylor.operation import Operation
from lipbounds.compose.taylor.pointwise import pointwise
from lipbounds.compose.taylor.rounded import Rounded, needs_rounding
from lipbounds.compose.taylor.second import SECOND
from lipbounds.compose.taylor.softmax import Softmax
from lipbounds.errors import Unsupported
from lipbounds.rounding import inflate
from lipbounds.targets.layers import (
    AttentionLayer,
    Flatten,
    Layer,
    Linear,
    Normalization,
    Patches,
    Pointwise,
    Pool,
    Positions,
    Residual,
    Sequence,
)
from lipbounds.targets.rms_norm import RmsNorm
from lipbounds.targets.rotary import rotate, rotate_sizes


LARGEST_VALUE = 5e8  # floats in all coefficients of one value
Named = list[tuple[str, Layer]]


class Walk:
    """The layers applied one by one; collects the operations on the way.

    Args:
        largest: how many floats the coefficients of one value may have together.
    """

    def __init__(self, largest: float = LARGEST_VALUE) -> None:
        self.operations: list[Operation] = []
        self._largest = largest

    def through(self, layers: Named, value: Value, read: int | None) -> Value:
        """The value behind the layers.

        Args:
            layers: flat, with their paths.
            value: in front of them.
            read: the only token of the output that is read, 0 or -1; None: all are.
        """
        for (path, layer), wanted in zip(layers, _read_after(layers, read), strict=True):
            if wanted is not None and acts_by_token(layer):
                value = _only(value, wanted)
            value = self._apply(path, layer, value, wanted)
            name = self._name(path, "rounding")
            if self.rounds(name, value):
                value = self._add(Rounded(name, value))
        return value if read is None else _only(value, read)

    def rounds(self, name: str, value: Value) -> bool:
        """Whether the rounding of the value becomes an operation of its own, by this name."""
        return needs_rounding(value)

    def _apply(self, path: str, layer: Layer, value: Value, read: int | None) -> Value:
        if isinstance(layer, Sequence | Residual):
            body = layer.body if isinstance(layer, Residual) else layer
            inner = self.through(flat([(path, body)]), value, read)
            if not isinstance(layer, Residual):
                return inner
            if isinstance(layer, ReadResidual):
                value = _only(value, 0 if layer.read.how == "first" else -1)
            skip = value if read is None else _only(value, read)
            return (skip if layer.skip is None else _linear(layer.skip, skip)).plus(inner)
        if isinstance(layer, FeedForward):
            return self.through([(path, part) for part in (layer.first, layer.activation, layer.second)], value, read)
        if isinstance(layer, Linear):
            return _linear(layer, value)
        if isinstance(layer, AttentionLayer):
            return self._attend(path, layer, value, read)
        if isinstance(layer, Pointwise):
            return value if layer.activation == "identity" else self._activate(path, layer.activation, value)
        if isinstance(layer, Normalization):
            return self._normalize(path, layer, value)
        return _rearranged(layer, value)

    def _add(self, operation: Operation) -> Value:
        if operation.moves:
            self.operations.append(operation)
        return operation.output

    def _name(self, path: str, what: str = "") -> str:
        """The path, with a number where a coefficient has that name already: users name layers as they like."""
        name, taken = f"{path}.{what}" if what else path, {CENTRE, INPUT, SECOND}
        taken |= {other.name for other in self.operations}
        numbered = (f"{name}.{number}" for number in itertools.count(2))
        return name if name not in taken else next(other for other in numbered if other not in taken)

    def _activate(self, path: str, activation: str, value: Value) -> Value:
        if not value.moves:
            return Value({CENTRE: activated(activation, value)})
        return self._add(pointwise(self._name(path), activation, value))

    def _normalize(self, path: str, layer: Normalization, value: Value) -> Value:
        value = self._add(Normalize(self._name(path), value, layer.epsilon, centred=layer.centred))
        if layer.weight is not None:
            weight = layer.weight
            value = value.summed(lambda t: t * weight, lambda t: t * weight.abs(), 2)
        return value.shifted(layer.bias)

    def _attend(self, path: str, layer: AttentionLayer, value: Value, read: int | None) -> Value:
        block, lost = layer.block, layer.lost if isinstance(layer, FoldedAttention) else {}
        if block.w_q.dim() != 3:
            raise Unsupported(f"there is no Taylor model of attention with batched weights, at {path}.")
        # Rows of mask and rotation are those of the queries; of the tokens, those that have a query.
        rows = list(range(block.tokens if block.queries_at is not None else value.centre.shape[-2]))
        rows = rows if read is None else [rows[read]]
        tokens = rows if block.queries_at is None else [block.token_of(row) for row in rows]
        every = read is None and block.queries_at is None
        queries = value if every else value.arranged(lambda t: t[..., tokens, :])
        q, k, v = (
            _projected(tokens, getattr(block, f"w_{name}"), getattr(block, f"b_{name}"), lost, name)
            for tokens, name in ((queries, "q"), (value, "k"), (value, "v"))
        )
        _check_size(k, path, self._largest)
        q = self._normalised(self._name(path, "query norm"), q, block.query_norm)
        k = self._normalised(self._name(path, "key norm"), k, block.key_norm)
        rotation = block.query_rotation
        q = _turned(q, rotation if rotation is None or rotation.shape[-3] == 1 else rotation[..., rows, :, :])
        q, k = q.summed(*_scaled(block.scale_value), 1), _turned(k, block.key_rotation)
        logits = self._add(Bilinear(self._name(path, "logits"), q, k.arranged(lambda t: t.mT)))
        visible = None
        if block.mask is not None:
            mask = block.mask if block.mask.shape[-2] == 1 else block.mask[..., rows, :]
            mask = mask.expand(*mask.shape[:-2], len(rows), value.centre.shape[-2])
            mask = mask.reshape(-1, *mask.shape[-2:])
            visible = ~mask.isneginf()
            logits = logits.shifted(mask.masked_fill(~visible, 0.0))
        maps = self._add(Softmax(self._name(path, "softmax"), logits, visible))
        heads = self._add(Bilinear(self._name(path, "values"), maps, v))
        merged = heads.arranged(lambda t: t.transpose(-3, -2).flatten(-2))
        weight = block.w_o.flatten(0, 1)
        out = merged.summed(lambda t: t @ weight, lambda t: t @ weight.abs(), len(weight) + 2)
        return out.shifted(block.b_o)

    def _normalised(self, name: str, heads: Value, norm: RmsNorm | None) -> Value:
        """QK-norm: every head of a token, or all heads of a token, as one token of a normalisation."""
        if norm is None:
            return heads
        shape, weight = heads.centre.shape, norm.per_token
        if norm.over == "head":
            rows = heads.arranged(lambda t: t.flatten(-3, -2))
            unit = self._add(Normalize(name, rows, norm.eps, centred=False))
            unit = unit.arranged(lambda t: t.unflatten(-2, shape[:2]))
        else:
            rows = heads.arranged(lambda t: t.transpose(-3, -2).flatten(-2))
            unit = self._add(Normalize(name, rows, norm.eps, centred=False))
            unit = unit.arranged(lambda t: t.unflatten(-1, (shape[0], shape[2])).transpose(-3, -2))
        return unit.summed(lambda t: t * weight, lambda t: t * weight.abs(), 2)


def _read_after(layers: Named, read: int | None) -> list[int | None]:
    """For each layer, the only token of its output that is read later."""
    wanted: list[int | None] = []
    for _, layer in reversed(layers):
        wanted.append(read)
        if isinstance(layer, Pool) and layer.how != "mean":
            read = 0 if layer.how == "first" else -1
        elif not acts_by_token(layer):
            read = None
    return wanted[::-1]


def _only(value: Value, row: int) -> Value:
    return value.arranged(lambda t: t[..., [row], :]) if value.centre.shape[-2] > 1 else value


def _linear(layer: Linear, value: Value) -> Value:
    weight = layer.weight.mT
    summed = value.summed(lambda t: t @ weight, lambda t: t @ weight.abs(), len(weight) + 2)
    if isinstance(layer, FoldedLinear):
        off = layer.lost.mT
        summed = _known_up_to(summed, value, lambda t: t @ off, len(off))
    return summed.shifted(layer.bias)


def _known_up_to(output: Value, given: Value, weight_errors: Map, terms: int) -> Value:
    """The output of a linear map whose weights are known up to an error.

    Args:
        output: with the weights as they are.
        given: the input of the map.
        weight_errors: the map with the errors of its weights in place of the weights.
        terms: of its sums.
    """
    coefficients = {
        key: Coefficient(
            part.matrix,
            inflate(part.error + weight_errors(given.coefficients[key].sizes.unsqueeze(0)).squeeze(0), terms + 8),
        )
        for key, part in output.coefficients.items()
    }
    return Value(coefficients)


def _turned(heads: Value, rotation: Tensor | None) -> Value:
    """Rotary positions."""
    if rotation is None:
        return heads
    return heads.summed(lambda t: rotate(t, rotation), lambda t: rotate_sizes(t, rotation), 3)


def _projected(value: Value, weights: Tensor, bias: Tensor | None, lost: dict[str, Tensor], name: str) -> Value:
    heads, dim, width = weights.shape
    joined = weights.transpose(0, 1).reshape(dim, heads * width)

    def split(t: Tensor) -> Tensor:
        return t.unflatten(-1, (heads, width)).transpose(-3, -2)

    summed = value.summed(lambda t: split(t @ joined), lambda t: split(t @ joined.abs()), dim + 2)
    if f"w_{name}" in lost:
        off = lost[f"w_{name}"].transpose(0, 1).reshape(dim, heads * width)
        summed = _known_up_to(summed, value, lambda t: split(t @ off), dim)
    summed = summed.shifted(None if bias is None else bias.unsqueeze(-2))
    if f"b_{name}" in lost:
        centre = summed.coefficients[CENTRE]
        error = inflate(centre.error + lost[f"b_{name}"].unsqueeze(-2), 2)
        summed = Value(summed.coefficients | {CENTRE: Coefficient(centre.matrix, error)})
    return summed


def _scaled(factor: float):
    return (lambda t: t * factor), (lambda t: t * abs(factor))


def _rearranged(layer: Layer, value: Value) -> Value:
    """Layers that copy entries, add constants, or take a mean."""
    if isinstance(layer, Pool) and layer.how == "mean":
        return value.summed(layer.function(), layer.function(), value.centre.shape[-2] + 2)
    if isinstance(layer, Positions) and layer.first is not None:
        first = layer.first
        zeros = torch.zeros_like(first)
        moved = value.arranged(lambda t: torch.cat([zeros.expand(*t.shape[:-2], *zeros.shape), t], -2))
        centre = value.coefficients[CENTRE]
        constant = torch.cat([first, centre.matrix[0]], -2).unsqueeze(0)
        moved = Value(moved.coefficients | {CENTRE: Coefficient(constant, moved.centre_error)})
        return moved.shifted(layer.added)
    if isinstance(layer, Positions):
        return value.shifted(layer.added)
    if isinstance(layer, Pool | Flatten | Patches):
        return value.arranged(layer.function())
    raise Unsupported(f"method='taylor' has no rule for {type(layer).__name__}; use method='joint' or 'product'.")


def _check_size(value: Value, path: str, largest: float) -> None:
    size = sum(part.matrix.numel() for part in value.coefficients.values())
    if size > largest:
        raise Unsupported(
            f"method='taylor' needs coefficients of {size:.2g} numbers at {path}, more than {largest:g}; use "
            "method='joint', or 'product', which needs no matrices."
        )
