"""`transformers.ViTModel` from normalised pixels to the class token."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor
from transformers import ViTModel

from lipbounds.adapters._modules import checked, image_tokens, prepared, vit_blocks
from lipbounds.targets.layers import Sequence


def vit_network(model: ViTModel, images: Float[Tensor, "batch channels height width"]) -> Sequence:
    """The model in float64 as a network, from images to the class token after the last normalisation.

    The network takes what the model takes: pixels after the mean and the standard deviation of the image processor.
    Its constants and radii are in that unit; `lipbounds.adapters.pixels.network_of_pixels` turns them into pixels.

    Args:
        model: the model.
        images: normalised, where the network is compared with the model.

    Raises:
        InvalidInput: another model.
        Unsupported: an activation without a bound, or another variant of the architecture.
    """
    x = images.double()
    wide, attention = prepared(model, ViTModel, "vit_network", x)
    first = wide.embeddings
    positions = first.position_embeddings[0].detach()
    layers = image_tokens(first.patch_embeddings.projection, first.cls_token[0].detach(), positions)
    layers += vit_blocks(wide, attention)
    return checked(layers, x, lambda images: wide(images).last_hidden_state[:, 0])
