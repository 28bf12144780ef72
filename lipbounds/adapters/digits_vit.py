"""The digits ViT (lipbounds.models.digits_vit) from pixels to logits."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from lipbounds.adapters._modules import checked, linear, normalization, pre_norm_block, prepared
from lipbounds.models.digits_vit import PATCH_SIZE, DigitsViT
from lipbounds.targets.layers import Layer, Patches, Pointwise, Pool, Positions, Sequence


def digits_vit_network(model: DigitsViT, images: Float[Tensor, "batch 1 8 8"]) -> Sequence:
    """The model in float64 as a network, from images to the logits, the features of one token.

    The class token is taken before the last normalisation, which gives the same logits: only its own deviation counts.

    Args:
        model: the model.
        images: where the network is compared with the model.

    Raises:
        InvalidInput: another model.
    """
    x = images.double()
    wide, attention = prepared(model, DigitsViT, "digits_vit_network", x)
    layers: list[tuple[str, Layer]] = [
        ("patches", Patches((PATCH_SIZE, PATCH_SIZE), (PATCH_SIZE, PATCH_SIZE))),
        ("embedding", linear(wide.patch_embedding)),
        ("positions", Positions(wide.class_token[0].detach(), wide.positions[0].detach())),
    ]
    for index, block in enumerate(wide.blocks):
        mlp = (linear(block.mlp[0]), Pointwise("gelu"), linear(block.mlp[2]))
        layers.append((f"blocks.{index}", pre_norm_block(block.norm_attention, attention[index], block.norm_mlp, mlp)))
    last = layers[-1][1]
    assert isinstance(last, Sequence)
    # Everything after the last attention acts on tokens one by one, and the head reads the class token alone.
    layers[-1:] = [
        (f"{layers[-1][0]}.attention", last.layers[0]),
        ("class token", Pool("first")),
        (f"{layers[-1][0]}.feed-forward", last.layers[1]),
    ]
    layers += [("norm", normalization(wide.norm)), ("head", linear(wide.head))]
    return checked(layers, x, wide)
