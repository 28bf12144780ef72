"""Layers and networks of layers, frozen: what lipbounds.compose bounds. A network is a tree.

Leaves are layers, `Residual` and `Sequence` put them together. Everything between the first layer and the last works on
tokens, tensors `[*batch, n, D]`; `Pool` leaves one token, and a classifier's logits are the features of that token.
Images `[*batch, channels, height, width]` become tokens by `Patches`; with a `Linear` after it that is a convolution.
A layer is constant in everything but its input: the mask and the positions of an `AttentionLayer` are part of it.
"""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from lipbounds.errors import InvalidInput
from lipbounds.number_format import counted
from lipbounds.ops.activations import ACTIVATIONS
from lipbounds.ops.normalization import normalize
from lipbounds.targets._attention_checks import FLOAT_DTYPES
from lipbounds.targets.attention import Attention


Kept = TypeVar("Kept", bound="Layer")


class Layer:
    """A function of one tensor whose Lipschitz constant can be bounded."""

    def __call__(self, x: Tensor) -> Tensor:
        """The output at `x`."""
        return self.function()(x)

    def function(self) -> Callable[[Tensor], Tensor]:
        """The layer as a plain function, for automatic differentiation."""
        raise NotImplementedError

    @property
    def description(self) -> str:
        """A few words for a table."""
        return type(self).__name__

    def to(self: Kept, target: torch.dtype | torch.device | str) -> Kept:
        """The same layer in another dtype or on another device."""
        changes = {f.name: _moved(getattr(self, f.name), target) for f in dc.fields(self)}  # pyright: ignore[reportArgumentType]
        return dc.replace(self, **changes)  # pyright: ignore[reportArgumentType, reportType]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.description})"


@dc.dataclass(frozen=True, eq=False, repr=False)
class Linear(Layer):
    """x -> x W^T + b on the features of every token, stored as torch.nn.Linear stores it.

    Args:
        weight: W.
        bias: b.

    Raises:
        InvalidInput: a tensor is not finite floating point, or of the wrong shape.
    """

    weight: Float[Tensor, "outputs inputs"]
    bias: Float[Tensor, " outputs"] | None = None

    def __post_init__(self) -> None:
        _check("weight", self.weight, 2)
        if self.bias is not None:
            _check("bias", self.bias, 1, self.weight.shape[:1])

    def function(self) -> Callable[[Tensor], Tensor]:
        return lambda x: functional.linear(x, self.weight, self.bias)

    @property
    def description(self) -> str:
        return f"linear {self.weight.shape[1]} to {self.weight.shape[0]}"


@dc.dataclass(frozen=True, eq=False, repr=False)
class Pointwise(Layer):
    """An activation function at every entry.

    Args:
        activation: a name in `lipbounds.ops.activations.ACTIVATIONS`.

    Raises:
        InvalidInput: no activation of that name.
    """

    activation: str

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise InvalidInput(f"activation must be one of {sorted(ACTIVATIONS)}, got activation={self.activation!r}.")

    def function(self) -> Callable[[Tensor], Tensor]:
        return ACTIVATIONS[self.activation].function

    @property
    def description(self) -> str:
        return self.activation


@dc.dataclass(frozen=True, eq=False, repr=False)
class Normalization(Layer):
    """LayerNorm or RMSNorm of every token: z = v / sqrt(|v|^2 / D + e), v the token, without its mean if `centred`.

    Args:
        centred: LayerNorm; otherwise RMSNorm.
        epsilon: e.
        weight: gamma, a factor for each feature; None: 1.
        bias: beta, added afterwards; None: 0.

    Raises:
        InvalidInput: `epsilon` is negative or not finite; a tensor is not finite floating point, or of the wrong shape.
    """

    centred: bool
    epsilon: float
    weight: Float[Tensor, " dim"] | None = None
    bias: Float[Tensor, " dim"] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.epsilon < float("inf"):
            raise InvalidInput(f"epsilon must be finite and >= 0, got epsilon={self.epsilon}.")
        if self.weight is not None:
            _check("weight", self.weight, 1)
        if self.bias is not None:
            _check("bias", self.bias, 1, None if self.weight is None else self.weight.shape)

    def function(self) -> Callable[[Tensor], Tensor]:
        def call(x: Tensor) -> Tensor:
            z = normalize(x, self.epsilon, centred=self.centred)
            z = z if self.weight is None else z * self.weight
            return z if self.bias is None else z + self.bias

        return call

    @property
    def description(self) -> str:
        return "LayerNorm" if self.centred else "RMSNorm"


def layer_norm(weight: Tensor | None = None, bias: Tensor | None = None, *, epsilon: float = 1e-5) -> Normalization:
    """LayerNorm.

    Args:
        weight: gamma.
        bias: beta.
        epsilon: added to the variance.
    """
    return Normalization(True, epsilon, weight, bias)


def rms_norm(weight: Tensor | None = None, *, epsilon: float = 1e-6) -> Normalization:
    """RMSNorm.

    Args:
        weight: gamma.
        epsilon: added to the mean square.
    """
    return Normalization(False, epsilon, weight)


@dc.dataclass(frozen=True, eq=False, repr=False)
class AttentionLayer(Layer):
    """Multi-head self-attention as a function of its tokens.

    Args:
        block: weights, mask and positions; its own input is not used. With `queries_at` the outputs are those of the
            tokens named, fewer than the inputs, whose number then is that of the block's own.

    Raises:
        InvalidInput: the block has a memory: then its input is not the only one.
    """

    block: Attention

    def __post_init__(self) -> None:
        if self.block.memory is not None:
            raise InvalidInput("block must be self-attention, got one with a memory; a network has one moving input.")

    def function(self) -> Callable[[Tensor], Tensor]:
        call, tokens = self.block.function(), self.block.x.shape[-2]
        if self.block.queries_at is None:
            return call

        def checked(x: Tensor) -> Tensor:
            if x.shape[-2] != tokens:
                raise InvalidInput(
                    f"attention with queries_at must get the {tokens} tokens of its block, got {x.shape[-2]}; name the "
                    "tokens of this input, in a block of as many."
                )
            return call(x)

        return checked

    @property
    def description(self) -> str:
        return f"attention, {counted(self.block.heads, 'head')}"


@dc.dataclass(frozen=True, eq=False, repr=False)
class Patches(Layer):
    """Windows of an image as tokens, read row by row as torch.nn.functional.unfold does.

    `Linear(weight.flatten(1), bias)` after it is a two-dimensional convolution.

    Args:
        size: height and width of a window.
        stride: between windows.
        padding: rows and columns of zeros added on each side.

    Raises:
        InvalidInput: a number is out of range.
    """

    size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        if min(self.size) < 1 or min(self.stride) < 1 or min(self.padding) < 0:
            raise InvalidInput(
                f"size and stride must be at least 1 and padding at least 0, got {self.size=}, {self.stride=}, "
                f"{self.padding=}."
            )

    @property
    def copies(self) -> int:
        """The largest number of windows that a pixel is in: ceil(size / stride) along each axis."""
        (height, width), (down, right) = self.size, self.stride
        return -(-height // down) * -(-width // right)

    def function(self) -> Callable[[Tensor], Tensor]:
        def call(x: Tensor) -> Tensor:
            flat = x.reshape(-1, *x.shape[-3:])
            windows = functional.unfold(flat, self.size, stride=self.stride, padding=self.padding).mT
            return windows.reshape(*x.shape[:-3], *windows.shape[-2:])

        return call

    @property
    def description(self) -> str:
        return f"{self.size[0]} x {self.size[1]} patches"


@dc.dataclass(frozen=True, eq=False, repr=False)
class Positions(Layer):
    """Constant tokens put in front, then constants added to all tokens: an isometry.

    Args:
        first: tokens put in front, such as a class token.
        added: positions of all tokens, those in front included.

    Raises:
        InvalidInput: a tensor is not finite floating point, or of the wrong shape.
    """

    first: Float[Tensor, "k dim"] | None = None
    added: Float[Tensor, "n dim"] | None = None

    def __post_init__(self) -> None:
        for name in ("first", "added"):
            if getattr(self, name) is not None:
                _check(name, getattr(self, name), 2)

    def function(self) -> Callable[[Tensor], Tensor]:
        def call(x: Tensor) -> Tensor:
            if self.first is not None:
                x = torch.cat([self.first.expand(*x.shape[:-2], *self.first.shape), x], -2)
            return x if self.added is None else x + self.added

        return call

    @property
    def description(self) -> str:
        return "positions"


@dc.dataclass(frozen=True, eq=False, repr=False)
class Pool(Layer):
    """One token from all: the first, the last or the mean.

    Args:
        how: which.

    Raises:
        InvalidInput: an unknown `how`.
    """

    how: Literal["first", "last", "mean"]

    def __post_init__(self) -> None:
        if self.how not in ("first", "last", "mean"):
            raise InvalidInput(f"how must be 'first', 'last' or 'mean', got how={self.how!r}.")

    def function(self) -> Callable[[Tensor], Tensor]:
        if self.how == "mean":
            return lambda x: x.mean(-2, keepdim=True)
        return (lambda x: x[..., :1, :]) if self.how == "first" else (lambda x: x[..., -1:, :])

    @property
    def description(self) -> str:
        return f"{self.how} token" if self.how != "mean" else "mean of the tokens"


@dc.dataclass(frozen=True, eq=False, repr=False)
class Flatten(Layer):
    """All tokens as one token with the features of all: an isometry."""

    def function(self) -> Callable[[Tensor], Tensor]:
        return lambda x: x.flatten(-2).unsqueeze(-2)

    @property
    def description(self) -> str:
        return "all tokens as one"


@dc.dataclass(frozen=True, eq=False, repr=False)
class Sequence(Layer):
    """Layers one after the other.

    Args:
        layers: in the order in which they act.
        names: for tables, one a layer; by default descriptions.

    Raises:
        InvalidInput: there is no layer, or not one name a layer.
    """

    layers: tuple[Layer, ...]
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        wrong = [type(layer).__name__ for layer in self.layers if not isinstance(layer, Layer)]
        if not self.layers or wrong:
            raise InvalidInput(f"layers must hold at least one Layer and nothing else, got {wrong or 'none'}.")
        if self.names and len(self.names) != len(self.layers):
            raise InvalidInput(f"names must hold one a layer, got {len(self.names)} for {len(self.layers)} layers.")

    def function(self) -> Callable[[Tensor], Tensor]:
        def call(x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

        return call

    def named(self) -> Iterator[tuple[str, Layer]]:
        """The layers with their names."""
        return zip(self.names or [layer.description for layer in self.layers], self.layers, strict=True)

    @property
    def description(self) -> str:
        return ", ".join(layer.description for layer in self.layers)


@dc.dataclass(frozen=True, eq=False, repr=False)
class Residual(Layer):
    """x -> skip(x) + body(x).

    Args:
        body: what is added; it keeps the shape of the tokens.
        skip: a map of every token, the identity if None.
    """

    body: Layer
    skip: Linear | None = None

    def function(self) -> Callable[[Tensor], Tensor]:
        return lambda x: self.joined(x, self.body(x))

    def joined(self, x: Tensor, added: Tensor) -> Tensor:
        """skip(x) + what the body returned.

        Args:
            x: the input of the skip connection.
            added: the output of the body.

        Raises:
            InvalidInput: the body did not keep the shape of the tokens.
        """
        through = x if self.skip is None else self.skip(x)
        if through.shape[-2:] != added.shape[-2:]:
            raise InvalidInput(
                "the body of a residual must keep the shape of the tokens of its input, got "
                f"{tuple(through.shape[-2:])} and {tuple(added.shape[-2:])}."
            )
        return through + added

    @property
    def description(self) -> str:
        return f"x + {self.body.description}" if self.skip is None else f"{self.skip.description} + ..."


def _moved(value: Any, target: torch.dtype | torch.device | str) -> Any:
    if isinstance(value, Tensor | Layer | Attention):
        return value.to(target)
    return tuple(_moved(entry, target) for entry in value) if isinstance(value, tuple) else value


def _check(name: str, tensor: Tensor, dimensions: int, shape: torch.Size | None = None) -> None:
    if not isinstance(tensor, Tensor) or tensor.dtype not in FLOAT_DTYPES:
        got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise InvalidInput(f"{name} must be a floating point tensor, got {got}.")
    if tensor.dim() != dimensions or tensor.numel() == 0 or (shape is not None and tensor.shape != shape):
        wanted = f"shape {tuple(shape)}" if shape is not None else f"{dimensions} dimensions and not be empty"
        raise InvalidInput(f"{name} must have {wanted}, got shape {tuple(tensor.shape)}.")
    bad = int((~tensor.detach().isfinite()).sum())
    if bad:
        raise InvalidInput(f"{name} must be finite, got {bad} of {tensor.numel()} entries that are not.")
