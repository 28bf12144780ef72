"""`transformers.Dinov2Model` from normalised pixels to the class token."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor
from transformers import Dinov2Model

from lipbounds.adapters._modules import (
    activation,
    checked,
    image_tokens,
    linear,
    normalization,
    pre_norm_block,
    prepared,
    read_at_class_token,
)
from lipbounds.errors import Unsupported
from lipbounds.targets.layers import AttentionLayer, Linear, Sequence


def dinov2_network(model: Dinov2Model, images: Float[Tensor, "batch channels height width"]) -> Sequence:
    """The model in float64 as a network, from images to the class token after the last normalisation.

    The unit of its input is that of `lipbounds.adapters.vit.vit_network`. The factors for features after attention and
    after the feed-forward layers (LayerScale) go into the weights before them.

    Args:
        model: the model.
        images: normalised, where the network is compared with the model; their size decides how positions are
            interpolated.

    Raises:
        InvalidInput: another model.
        Unsupported: feed-forward layers with a gate (SwiGLU), an activation without a bound, or another variant of the
            architecture.
    """
    if isinstance(model, Dinov2Model) and model.config.use_swiglu_ffn:
        raise Unsupported("the feed-forward layers must have no gate, got SwiGLU: no rule for products is there.")
    x = images.double()
    wide, attention = prepared(model, Dinov2Model, "dinov2_network", x)
    first = wide.embeddings
    projection, token = first.patch_embeddings.projection, first.cls_token[0].detach()
    height, width = x.shape[-2:]
    size = (height // projection.kernel_size[0]) * (width // projection.kernel_size[1])
    like = token.new_zeros(1, size + 1, token.shape[-1])
    layers = image_tokens(projection, token, first.interpolate_pos_encoding(like, height, width)[0].detach())
    for index, layer in enumerate(wide.encoder.layer):
        mlp = (
            linear(layer.mlp.fc1),
            activation(wide.config.hidden_act),
            _scaled(linear(layer.mlp.fc2), layer.layer_scale2.lambda1.detach()),
        )
        attended = _scaled_attention(attention[index], layer.layer_scale1.lambda1.detach())
        block = pre_norm_block(layer.norm1, attended, layer.norm2, mlp)
        layers += [(f"encoder.layer.{index}.{name}", part) for name, part in block.named()]
    layers = [*read_at_class_token(layers), ("norm", normalization(wide.layernorm))]
    return checked(layers, x, lambda images: wide(images).last_hidden_state[:, 0])


def _scaled(layer: Linear, factors: Tensor) -> Linear:
    """The layer with a factor for each output feature."""
    return Linear(layer.weight * factors[:, None], None if layer.bias is None else layer.bias * factors)


def _scaled_attention(layer: AttentionLayer, factors: Tensor) -> AttentionLayer:
    block = layer.block
    b_o = None if block.b_o is None else block.b_o * factors
    return AttentionLayer(block.replace(w_o=block.w_o * factors, b_o=b_o))
