"""`transformers.DeiTModel` from normalised pixels to the class token."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import DeiTModel

from lipbounds.adapters._modules import checked, image_tokens, prepared, vit_blocks
from lipbounds.targets.layers import Sequence


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
    layers += vit_blocks(wide, attention)
    return checked(layers, x, lambda images: wide(images).last_hidden_state[:, 0])
