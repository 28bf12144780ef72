"""`transformers.ViTForImageClassification` from pixels to logits."""

from __future__ import annotations

from collections.abc import Sequence as Numbers

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import ViTForImageClassification

from lipbounds.adapters._modules import checked, in_double, linear
from lipbounds.adapters.pixels import network_of_pixels
from lipbounds.adapters.vit import vit_network
from lipbounds.errors import InvalidInput
from lipbounds.targets.layers import Sequence


def vit_classifier_network(
    model: ViTForImageClassification,
    images: Float[Tensor, "batch channels height width"],
    *,
    mean: float | Numbers[float] = 0.0,
    std: float | Numbers[float] = 1.0,
) -> Sequence:
    """The model in float64 as a network, from pixels to the logits, the features of one token.

    Args:
        model: the model, which takes (images - mean) / std.
        images: where the network is compared with the model, in the unit that radii shall have: with the `image_mean`
            and `image_std` of the image processor as `mean` and `std`, pixels in [0, 1]; with the defaults, normalised.
        mean: of each channel, or of all.
        std: standard deviation of each channel, or of all; > 0.

    Raises:
        InvalidInput: another model, or `mean` and `std` are not one positive number per channel.
        Unsupported: an activation without a bound, or another variant of the architecture.
    """
    if not isinstance(model, ViTForImageClassification):
        raise InvalidInput(
            f"vit_classifier_network needs a ViTForImageClassification, got {type(model).__name__}; "
            "for a ViTModel without a head see vit_network."
        )
    wide, x = in_double(model), images.double()
    by_channel = [torch.as_tensor(values, dtype=x.dtype, device=x.device).reshape(-1, 1, 1) for values in (mean, std)]

    def normalised(pixels: Tensor) -> Tensor:
        return (pixels - by_channel[0]) / by_channel[1]

    trunk = vit_network(wide.vit, normalised(x))
    whole = Sequence((*trunk.layers, linear(wide.classifier)), (*trunk.names, "classifier"))
    folded = network_of_pixels(whole, mean, std)
    named = list(zip(folded.names, folded.layers, strict=True))
    return checked(named, x, lambda pixels: wide(normalised(pixels)).logits)
