"""`transformers.DeiTModel` from normalised pixels to the class token."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import DeiTModel

from lipbounds.adapters._modules import (
    activation,
    checked,
    image_tokens,
    linear,
    normalization,
    pre_norm_block,
    prepared,
)
from lipbounds.targets.layers import Pool, Sequence


def deit_network(model: DeiTModel, images: Float[Tensor, "batch channels height width"]) -> Sequence:
    """The model in float64 as a network, from images to the class token after the last normalisation.

    The unit of its input is that of `lipbounds.adapters.vit.vit_network`. The distillation token is one of the tokens;
    its own output is not part of the network.

    Args:
        model: the model.
        images: normalised, where the network is compared with the model.

    Raises:
        InvalidInput: another model.
        Unsupported: an activation without a bound, or another variant of the architecture.
    """
    x = images.double()
    wide, attention = prepared(model, DeiTModel, "deit_network", x)
    first = wide.embeddings
    tokens = torch.cat([first.cls_token, first.distillation_token], 1)[0].detach()
    layers = image_tokens(first.patch_embeddings.projection, tokens, first.position_embeddings[0].detach())
    for index, layer in enumerate(wide.layers):
        mlp = (linear(layer.mlp.fc1), activation(wide.config.hidden_act), linear(layer.mlp.fc2))
        block = pre_norm_block(layer.layernorm_before, attention[index], layer.layernorm_after, mlp)
        layers += [(f"layers.{index}.{name}", part) for name, part in block.named()]
    layers[-1:-1] = [("class token", Pool("first"))]
    layers.append(("norm", normalization(wide.layernorm)))
    return checked(layers, x, lambda images: wide(images).last_hidden_state[:, 0])
