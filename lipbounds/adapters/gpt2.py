"""`transformers.GPT2Model` from the embeddings of the tokens to the last token."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor
from transformers import GPT2Model

from lipbounds.adapters._modules import activation, checked, linear, normalization, pre_norm_block, prepared
from lipbounds.targets.layers import Layer, Pool, Positions, Sequence


def gpt2_network(model: GPT2Model, embeddings: Float[Tensor, "batch n dim"]) -> Sequence:
    """The model in float64 as a network, from token embeddings (before positions) to the last token's final state.

    Args:
        model: the model.
        embeddings: where the network is compared with the model; their number of tokens is part of the network.

    Raises:
        InvalidInput: another model.
        Unsupported: an activation without a bound, or another variant of the architecture.
    """
    x = embeddings.double()
    wide, attention = prepared(model, GPT2Model, "gpt2_network", inputs_embeds=x)
    layers: list[tuple[str, Layer]] = [("positions", Positions(None, wide.wpe.weight[: x.shape[-2]].detach()))]
    for index, layer in enumerate(wide.h):
        mlp = (linear(layer.mlp.c_fc), activation(wide.config.activation_function), linear(layer.mlp.c_proj))
        block = pre_norm_block(layer.ln_1, attention[index], layer.ln_2, mlp)
        layers += [(f"h.{index}.{name}", part) for name, part in block.named()]
    layers[-1:-1] = [("last token", Pool("last"))]
    layers.append(("norm", normalization(wide.ln_f)))
    return checked(layers, x, lambda embeddings: wide(inputs_embeds=embeddings).last_hidden_state[:, -1])
