"""What the adapters share: modules of a torch model as layers, and the check of the whole against the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lipbounds.capture import capture
from lipbounds.errors import InvalidInput, Unsupported
from lipbounds.targets.layers import (
    AttentionLayer,
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
from lipbounds.targets.module_copy import module_copy


TOLERANCE = 1e-9  # relative, between the network and the model, both in float64
# Names of activations in transformers configurations.
ACTIVATION_NAMES = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}
ACTIVATION_NAMES |= {"silu": "silu", "swish": "silu", "tanh": "tanh"}
Model = TypeVar("Model", bound=nn.Module)


def in_double(model: Model) -> Model:
    """A copy in float64 and evaluation mode; the model is left alone.

    Args:
        model: the model.
    """
    return module_copy(model, torch.float64)


def linear(module: nn.Module) -> Linear:
    """`torch.nn.Linear`, or the transposed `Conv1D` of GPT-2.

    Args:
        module: the module.
    """
    if isinstance(module, nn.Linear):
        bias = None if module.bias is None else module.bias.detach()
        return Linear(module.weight.detach(), bias)
    weight, bias = module.weight, module.bias
    assert isinstance(weight, Tensor)
    assert isinstance(bias, Tensor)
    return Linear(weight.detach().mT, bias.detach())


def normalization(module: nn.LayerNorm) -> Normalization:
    """`torch.nn.LayerNorm` over the features.

    Args:
        module: the module.
    """
    weight = None if module.weight is None else module.weight.detach()
    bias = None if module.bias is None else module.bias.detach()
    return Normalization(True, module.eps, weight, bias)


def activation(name: str) -> Pointwise:
    """The activation of that name in transformers.

    Args:
        name: such as `gelu_new`.

    Raises:
        Unsupported: no bound of it is known here.
    """
    if name not in ACTIVATION_NAMES:
        raise Unsupported(f"the activation must be one of {sorted(ACTIVATION_NAMES)}, got {name!r}.")
    return Pointwise(ACTIVATION_NAMES[name])


def prepared(model: nn.Module, kind: type, adapter: str, *args: Any, **kwargs: Any) -> tuple[Any, list[AttentionLayer]]:
    """A copy of the model in float64, and its attention layers at the inputs.

    Args:
        model: the model.
        kind: of the family of the adapter.
        adapter: its name.
        *args: inputs of the model, in float64.
        **kwargs: its keyword inputs.

    Raises:
        InvalidInput: the model is of another family.
        Unsupported: an attention block cannot be captured.
    """
    if not isinstance(model, kind):
        raise InvalidInput(f"{adapter} needs a {kind.__name__}, got {type(model).__name__}.")
    wide = in_double(model)
    return wide, attention_layers(wide, *args, **kwargs)


def attention_layers(model: nn.Module, *args: Any, **kwargs: Any) -> list[AttentionLayer]:
    """The attention blocks of a model, in the order of their calls.

    Args:
        model: in float64.
        *args: its inputs.
        **kwargs: its keyword inputs.
    """
    with torch.no_grad():
        return [AttentionLayer(found.attention) for found in capture(model, *args, **kwargs)]


def image_tokens(projection: nn.Conv2d, tokens: Tensor, positions: Tensor) -> list[tuple[str, Layer]]:
    """From an image to the tokens of a transformer: patches, their embedding, tokens in front, positions.

    Args:
        projection: of the patches.
        tokens: in front, such as the class token, one a row.
        positions: of all tokens.
    """
    bias = None if projection.bias is None else projection.bias.detach()
    height, width = projection.kernel_size
    down, right = projection.stride
    return [
        ("patches", Patches((height, width), (down, right))),
        ("embedding", Linear(projection.weight.detach().flatten(1), bias)),
        ("positions", Positions(tokens, positions)),
    ]


def pre_norm_block(
    norm_attention: nn.LayerNorm, attention: AttentionLayer, norm_mlp: nn.LayerNorm, mlp: tuple[Layer, ...]
) -> Sequence:
    """x + attention(norm(x)), then x + mlp(norm(x)).

    Args:
        norm_attention: before attention.
        attention: the attention block.
        norm_mlp: before the feed-forward layers.
        mlp: the feed-forward layers.
    """
    first = Residual(Sequence((normalization(norm_attention), attention), ("norm", "attention")))
    names = ("norm", *("feed-forward" if index == 0 else f"feed-forward {index}" for index in range(len(mlp))))
    second = Residual(Sequence((normalization(norm_mlp), *mlp), names))
    return Sequence((first, second), ("attention", "feed-forward"))


def vit_blocks(model: Any, attention: list[AttentionLayer]) -> list[tuple[str, Layer]]:
    """The encoder of `ViTModel` or `DeiTModel`, and the class token after the last normalisation.

    Args:
        model: in float64.
        attention: its attention layers.
    """
    layers: list[tuple[str, Layer]] = []
    for index, layer in enumerate(model.layers):
        mlp = (linear(layer.mlp.fc1), activation(model.config.hidden_act), linear(layer.mlp.fc2))
        block = pre_norm_block(layer.layernorm_before, attention[index], layer.layernorm_after, mlp)
        layers += [(f"layers.{index}.{name}", part) for name, part in block.named()]
    return [*read_at_class_token(layers), ("norm", normalization(model.layernorm))]


def read_at_class_token(layers: list[tuple[str, Layer]]) -> list[tuple[str, Layer]]:
    """The layers with all but the class token dropped before the last of them, which acts on every token alone.

    Args:
        layers: of an encoder; the last one is the feed-forward part of a block.
    """
    return [*layers[:-1], ("class token", Pool("first")), layers[-1]]


def checked(layers: list[tuple[str, Layer]], x: Tensor, model: Callable[[Tensor], Tensor]) -> Sequence:
    """The layers as a network, after its output at `x` was compared with the model's.

    Args:
        layers: in float64, with their names.
        x: the input, in float64.
        model: the model as a function of `x`, in float64.

    Raises:
        Unsupported: the two differ by more than rounding.
    """
    names, parts = zip(*layers, strict=True)
    network = Sequence(parts, names)
    with torch.no_grad():
        wanted, got = model(x), network(x).squeeze(-2)
        if wanted.shape != got.shape:
            raise Unsupported(f"the network must have the output of the model, {wanted.shape}, got {got.shape}.")
        residual = float((wanted - got).norm() / wanted.norm().clamp(min=torch.finfo(torch.float64).tiny))
    if not residual <= TOLERANCE:
        raise Unsupported(f"the network must agree with the model to {TOLERANCE:g}, got {residual=:.3g}.")
    return network
