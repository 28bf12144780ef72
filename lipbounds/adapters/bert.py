"""`transformers.BertModel` (MiniLM among them) from the embeddings of the tokens to the mean of the last states."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor
from transformers import BertModel

from lipbounds.adapters._modules import activation, checked, linear, normalization, prepared
from lipbounds.targets.layers import Layer, Pool, Positions, Residual, Sequence


def bert_network(model: BertModel, embeddings: Float[Tensor, "batch n dim"]) -> Sequence:
    """The model in float64 as a network, from word embeddings (before positions) to the mean of the last states.

    All tokens are seen and averaged: there is no padding. Token types are 0.

    Args:
        model: the model.
        embeddings: where the network is compared with the model; their number of tokens is part of the network.

    Raises:
        InvalidInput: another model.
        Unsupported: an activation without a bound, or another variant of the architecture.
    """
    x = embeddings.double()
    wide, attention = prepared(model, BertModel, "bert_network", inputs_embeds=x)
    first = wide.embeddings
    added = first.position_embeddings.weight[: x.shape[-2]] + first.token_type_embeddings.weight[0]
    layers: list[tuple[str, Layer]] = [
        ("positions", Positions(None, added.detach())),
        ("norm", normalization(first.LayerNorm)),
    ]
    for index, layer in enumerate(wide.encoder.layer):
        mlp = (
            linear(layer.intermediate.dense),
            activation(wide.config.hidden_act),
            linear(layer.output.dense),
        )
        layers += [
            (f"layer.{index}.attention", Residual(attention[index])),
            (f"layer.{index}.attention.norm", normalization(layer.attention.output.LayerNorm)),
            (f"layer.{index}.feed-forward", Residual(Sequence(mlp, ("in", "activation", "out")))),
            (f"layer.{index}.feed-forward.norm", normalization(layer.output.LayerNorm)),
        ]
    layers.append(("mean", Pool("mean")))
    return checked(layers, x, lambda embeddings: wide(inputs_embeds=embeddings).last_hidden_state.mean(-2))
