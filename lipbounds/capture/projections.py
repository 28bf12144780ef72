"""The calls that multiply every token by one matrix, in one form."""

from __future__ import annotations

import dataclasses as dc
from typing import Any

import torch
from torch import Tensor

from lipbounds.capture import operations as ops
from lipbounds.capture.recorder import Recorder
from lipbounds.capture.replay import reindex


@dc.dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class Projection:
    """`tokens @ weight + bias`; the features of tokens and result lie along `feature_dim`.

    Args:
        tokens: what is projected, any number of dimensions.
        weight: one row an input feature, one column an output feature.
        bias: one entry an output feature.
        shape: of the result.
        feature_dim: the dimension of tokens and result that holds the features.
        constants: the model's own tensors that weight and bias were read from.
    """

    tokens: Tensor
    weight: Tensor
    bias: Tensor | None
    shape: torch.Size
    feature_dim: int = -1
    constants: tuple[Tensor, ...] = ()

    def rows(self, tensor: Tensor) -> Tensor:
        """A tensor of the shape of tokens or result as a matrix with one row a token."""
        return tensor.movedim(self.feature_dim, -1).reshape(-1, tensor.shape[self.feature_dim])

    def entry_index(self) -> Tensor:
        """For each entry of the result, the number of its token times that of all features, plus its feature."""
        lead = list(self.shape)
        del lead[self.feature_dim]
        index = torch.arange(self.shape.numel(), device=self.tokens.device)
        return index.view(*lead, self.shape[self.feature_dim]).movedim(-1, self.feature_dim)


def projection(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], shape: torch.Size) -> Projection | None:
    """The call as a projection with a result of this shape; None if it is of another form."""
    feature_dim = -1
    if function in ops.LINEAR:
        tokens, weight, bias = _bind(("input", "weight", "bias"), args, kwargs)
        matrix = weight.mT if weight.dim() == 2 else None
    elif function in ops.ADDMM:
        bias, tokens, weight = _bind(("input", "mat1", "mat2"), args, kwargs)
        plain = kwargs.get("alpha", 1) == 1 and kwargs.get("beta", 1) == 1 and bias.shape == weight.shape[1:]
        matrix = weight if plain else None
    elif function in ops.PRODUCT:
        (tokens, weight), bias = product_operands(args, kwargs), None
        matrix = weight if weight.dim() == 2 and tokens.dim() >= 2 else None
    elif function in ops.CONVOLUTION:
        feature_dim = 1
        tokens, weight, bias = _bind(("input", "weight", "bias"), args, kwargs)
        groups = _bind(("", "", "", "", "", "", "groups"), args, kwargs)[-1]
        matrix = _pointwise(tokens, weight, shape, 1 if groups is None else groups)
    else:
        return None
    if matrix is None:
        return None
    constants = (weight,) if bias is None else (weight, bias)
    return Projection(
        tokens=tokens, weight=matrix, bias=bias, shape=shape, feature_dim=feature_dim, constants=constants
    )


def product_operands(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The left and the right matrix of a product, whatever the second is called."""
    left, right = [*args, *(value for name, value in kwargs.items() if name != "out")][:2]
    return left, right


def _pointwise(tokens: Tensor, weight: Tensor, shape: torch.Size, groups: int) -> Tensor | None:
    """The matrix of a convolution whose window is one position; None for a wider window."""
    same_places = tokens.dim() == weight.dim() and tokens.shape[2:] == shape[2:]
    one_position = weight.shape[1:] == (tokens.shape[1] // groups, *[1] * (weight.dim() - 2))
    if not (same_places and one_position):
        return None
    return torch.block_diag(*weight.flatten(1).chunk(groups)).mT if groups > 1 else weight.flatten(1).mT


def unflattened(recorder: Recorder, found: Projection) -> Projection:
    """The projection with the batch dimensions that the model folded into one before it, as `addmm` needs."""
    whole, chain = recorder.trace_back(found.tokens, ("reindex",))
    if not chain or found.tokens.dim() != 2 or whole.shape[-1:] != found.tokens.shape[-1:]:
        return found
    numbers = torch.arange(whole.numel(), device=whole.device)
    folded = reindex(chain, numbers.view(whole.shape))
    if not torch.equal(folded.flatten(), numbers) or not recorder.has_values(whole):
        return found
    return dc.replace(found, tokens=whole)


def _bind(names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    return [args[i] if i < len(args) else kwargs.get(name) for i, name in enumerate(names)]
