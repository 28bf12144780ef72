"""A feed-forward network at one input: x -> W_K f(W_{K-1} ... f(W_1 x + b_1) ... + b_{K-1}) + b_K."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable
from functools import cached_property
from typing import Any

from jaxtyping import Float
from torch import Tensor

from lipbounds.claims import Feature
from lipbounds.errors import InvalidInput
from lipbounds.ops.activations import ACTIVATIONS, Activation
from lipbounds.targets._attention_checks import FLOAT_DTYPES, check_finite
from lipbounds.targets._tensor_target import TensorTarget


@dc.dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Mlp(TensorTarget):
    """A feed-forward network at one input, frozen. The activation stands between layers, not after the last.

    All tensors share one floating dtype and device. Leading dimensions of `x` are batch.

    Args:
        x: the input.
        weights: W_1 to W_K, each of shape [outputs, inputs] as torch.nn.Linear stores it.
        biases: b_1 to b_K; None in the place of a layer without one, or None for all.
        activation: f, a name in `lipbounds.ops.activations.ACTIVATIONS`.

    Raises:
        InvalidInput: a shape, dtype or device does not fit; an entry is NaN or infinite; an unknown activation.
    """

    x: Float[Tensor, "*batch inputs"]
    weights: tuple[Float[Tensor, "_ _"], ...]
    biases: tuple[Float[Tensor, " _"] | None, ...] | None = None
    activation: str = "relu"

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise InvalidInput(f"activation must be one of {sorted(ACTIVATIONS)}, got activation={self.activation!r}.")
        if not self.weights:
            raise InvalidInput("weights must hold at least one matrix, got none.")
        if self.biases is not None and len(self.biases) != len(self.weights):
            raise InvalidInput(
                f"biases must hold one entry a layer, got {len(self.biases)} for {len(self.weights)} weights; "
                "put None where a layer has no bias."
            )
        for name, tensor in self.tensors.items():
            _check_tensor(name, tensor, self.x)
        check_finite(self.tensors)
        _check_shapes(self)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name, those of a layer as `weights[0]` and `biases[0]`."""
        named = {"x": self.x} | {f"weights[{layer}]": weight for layer, weight in enumerate(self.weights)}
        return named | {f"biases[{i}]": bias for i, bias in enumerate(self.biases or ()) if bias is not None}

    @property
    def trailing(self) -> dict[str, int]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return {name: 2 if name.startswith("weights") else 1 for name in self.tensors}

    @property
    def moving_input(self) -> Tensor:
        """The input that the Lipschitz constant is about."""
        return self.x

    @cached_property
    def features(self) -> frozenset[Feature]:
        """None: every bound on a network of this kind holds for all of them, or raises for its activation."""
        return frozenset()

    @property
    def activation_rule(self) -> Activation:
        """The activation function and its Lipschitz constant."""
        return ACTIVATIONS[self.activation]

    def bias(self, layer: int) -> Float[Tensor, " outputs"]:
        """The bias of a layer, counted from 0; zeros where there is none."""
        given = None if self.biases is None else self.biases[layer]
        return self.weights[layer].new_zeros(self.weights[layer].shape[0]) if given is None else given

    def forward(self) -> Float[Tensor, "*batch outputs"]:
        """The output at `x`."""
        return self.function()(self.x)

    def function(self) -> Callable[[Tensor], Tensor]:
        """The network as a plain function of its input, for automatic differentiation."""

        def call(x: Tensor) -> Tensor:
            for layer, weight in enumerate(self.weights):
                x = x if layer == 0 else self.activation_rule.function(x)
                x = x @ weight.mT + self.bias(layer)
            return x

        return call

    def at(self, moving: Tensor) -> Mlp:
        """The same network at another input."""
        return self.replace(x=moving)

    def replace(self, **changes: Any) -> Mlp:
        """The same network with some fields replaced, or single tensors of layers by their names in `tensors`."""
        for field in ("weights", "biases"):
            layers = list(changes.get(field, getattr(self, field)) or ())
            named = {name for name in changes if name.startswith(f"{field}[")}
            for name in named:
                layers[int(name[len(field) + 1 : -1])] = changes.pop(name)
            if named:
                changes[field] = tuple(layers)
        return dc.replace(self, **changes)


def _check_tensor(name: str, tensor: Tensor, x: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise InvalidInput(f"{name} must be a torch tensor, got {type(tensor).__name__}; use torch.as_tensor.")
    if tensor.dtype not in FLOAT_DTYPES:
        allowed = [str(dtype).removeprefix("torch.") for dtype in FLOAT_DTYPES]
        raise InvalidInput(f"{name} must have one of the dtypes {allowed}, got {tensor.dtype}; cast it.")
    if tensor.dtype != x.dtype or tensor.device != x.device:
        raise InvalidInput(
            f"all tensors must share dtype and device, got x={x.dtype} on {x.device} and "
            f"{name}={tensor.dtype} on {tensor.device}; cast or move one."
        )
    if tensor.numel() == 0:
        raise InvalidInput(f"{name} must not be empty, got shape {tuple(tensor.shape)}.")


def _check_shapes(network: Mlp) -> None:
    if network.x.dim() < 1:
        raise InvalidInput("x must have at least one dimension, its features, got a number.")
    size = network.x.shape[-1]
    for layer, weight in enumerate(network.weights):
        if weight.dim() != 2 or weight.shape[1] != size:
            raise InvalidInput(
                f"weights[{layer}] must have the shape (outputs, {size}) to fit what comes before it, "
                f"got {tuple(weight.shape)}; weights are stored as in torch.nn.Linear."
            )
        size = weight.shape[0]
        if network.bias(layer).shape != (size,):
            raise InvalidInput(
                f"biases[{layer}] must have the shape ({size},), got {tuple(network.bias(layer).shape)}."
            )
