"""The ViT made to be certified (lipbounds.models.lipschitz_vit) from pixels to logits."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.adapters._modules import checked, linear, prepared
from lipbounds.models.lipschitz_vit import LipschitzViT
from lipbounds.targets.layers import Flatten, Layer, Linear, Patches, Pointwise, Positions, Residual, Sequence


def lipschitz_vit_network(model: LipschitzViT, images: Float[Tensor, "batch 1 side side"]) -> Sequence:
    """The model in float64 as a network, from images to the logits, the features of one token.

    Args:
        model: the model.
        images: where the network is compared with the model.

    Raises:
        InvalidInput: another model.
    """
    x = images.double()
    wide, attention = prepared(model, LipschitzViT, "lipschitz_vit_network", x)
    size, dim = model.shape.patch, model.shape.dim
    centre = Linear(torch.eye(dim, dtype=x.dtype, device=x.device) - 1 / dim)
    layers: list[tuple[str, Layer]] = [
        ("patches", Patches((size, size), (size, size))),
        *([] if wide.directions is None else [("directions", linear(wide.directions))]),
        ("embedding", linear(wide.patch_embedding)),
        ("positions", Positions(None, wide.positions[0].detach())),
    ]
    for index, block in enumerate(wide.blocks):
        first = Residual(Sequence((centre, attention[index]), ("centre", "attention")))
        # The centring goes into the first weight: two linear maps in a row would hide the feed-forward pattern.
        weight = block.mlp[0].weight.detach()
        into = Linear(weight - weight.mean(1, keepdim=True), block.mlp[0].bias.detach())
        second = Residual(Sequence((into, Pointwise("gelu"), linear(block.mlp[2])), ("in", "activation", "out")))
        layers += [(f"blocks.{index}.attention", first), (f"blocks.{index}.feed-forward", second)]
    layers += [("flat", Flatten()), ("head", linear(wide.head))]
    return checked(layers, x, wide)
