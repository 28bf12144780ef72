"""Adapters: the network is the model, its bound is above what Lanczos finds, others are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lipbounds import InvalidInput, Unsupported
from lipbounds.adapters import _modules
from lipbounds.adapters.bert import bert_network
from lipbounds.adapters.deit import deit_network
from lipbounds.adapters.digits_vit import digits_vit_network
from lipbounds.adapters.dinov2 import dinov2_network
from lipbounds.adapters.gpt2 import gpt2_network
from lipbounds.adapters.vit import vit_network
from lipbounds.compose import network_bound
from lipbounds.estimators.whole_model import whole_model_constant
from lipbounds.models.digits_vit import DigitsViT
from lipbounds.targets.layers import Sequence
from verify.unit.networks import Draw


SMALL = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}


def bert() -> tuple[Any, nn.Module, torch.Tensor, Callable[[Any, torch.Tensor], torch.Tensor]]:
    from transformers import BertConfig, BertModel

    model = BertModel(BertConfig(vocab_size=5, **SMALL))
    return bert_network, model, Draw(0)(2, 5, 8), lambda m, x: m(inputs_embeds=x).last_hidden_state.mean(1)


def vit() -> tuple[Any, nn.Module, torch.Tensor, Callable[[Any, torch.Tensor], torch.Tensor]]:
    from transformers import ViTConfig, ViTModel

    model = ViTModel(ViTConfig(image_size=8, patch_size=4, **SMALL))
    return vit_network, model, Draw(1)(2, 3, 8, 8), lambda m, x: m(x).last_hidden_state[:, 0]


def deit() -> tuple[Any, nn.Module, torch.Tensor, Callable[[Any, torch.Tensor], torch.Tensor]]:
    from transformers import DeiTConfig, DeiTModel

    model = DeiTModel(DeiTConfig(image_size=8, patch_size=4, **SMALL))
    return deit_network, model, Draw(1)(2, 3, 8, 8), lambda m, x: m(x).last_hidden_state[:, 0]


def dinov2() -> tuple[Any, nn.Module, torch.Tensor, Callable[[Any, torch.Tensor], torch.Tensor]]:
    from transformers import Dinov2Config, Dinov2Model

    sizes = {name: size for name, size in SMALL.items() if name != "intermediate_size"}
    model = Dinov2Model(Dinov2Config(image_size=16, patch_size=4, mlp_ratio=2, layerscale_value=0.5, **sizes))
    return dinov2_network, model, Draw(1)(2, 3, 8, 8), lambda m, x: m(x).last_hidden_state[:, 0]


def gpt2() -> tuple[Any, nn.Module, torch.Tensor, Callable[[Any, torch.Tensor], torch.Tensor]]:
    from transformers import GPT2Config, GPT2Model

    model = GPT2Model(GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=5, bos_token_id=0, eos_token_id=0))
    return gpt2_network, model, Draw(2)(2, 5, 8), lambda m, x: m(inputs_embeds=x).last_hidden_state[:, -1]


def digits() -> tuple[Any, nn.Module, torch.Tensor, Callable[[Any, torch.Tensor], torch.Tensor]]:
    return digits_vit_network, DigitsViT(), Draw(3)(2, 1, 8, 8).sigmoid(), lambda m, x: m(x)


FAMILIES = {"bert": bert, "vit": vit, "deit": deit, "dinov2": dinov2, "gpt2": gpt2, "digits": digits}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_network_is_the_model_and_its_bound_is_above_its_constant(family: str) -> None:
    torch.manual_seed(0)
    adapter, model, x, output = FAMILIES[family]()
    for parameter in model.parameters():  # a start is nearly symmetric: gamma 1, beta and biases 0
        parameter.data += 0.1 * torch.randn_like(parameter)
    network = adapter(model.eval(), x)
    assert isinstance(network, Sequence)
    wide = _modules.in_double(model)
    for point in (x, x + 0.3 * Draw(9)(*x.shape)):
        with torch.no_grad():
            expected = output(wide, point)
        torch.testing.assert_close(network(point).squeeze(-2), expected, rtol=1e-6, atol=1e-9)
    truth = whole_model_constant(lambda x: output(wide, x), x)
    assert bool((truth.terms["lower"] <= truth.value).all())
    assert truth.kind == "probable"
    bound = network_bound(network, x)
    assert bool((truth.terms["lower"] <= bound.value).all())
    assert bool((network_bound(network, x, 1e-3).value >= truth.terms["lower"]).all())
    assert len({line.path for line in bound.layers}) == len(bound.layers)


def test_a_network_that_is_not_the_model_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter, model, x, _ = bert()
    monkeypatch.setitem(_modules.ACTIVATION_NAMES, "gelu", "gelu_tanh")
    with pytest.raises(Unsupported, match="agree with the model"):
        adapter(model, x)


def test_an_activation_without_a_bound_is_refused() -> None:
    from transformers import BertConfig, BertModel

    model = BertModel(BertConfig(vocab_size=5, hidden_act="mish", **SMALL))
    with pytest.raises(Unsupported, match="mish"):
        bert_network(model, Draw(0)(1, 3, 8))


@pytest.mark.usefixtures("as_a_user_runs_it")
@pytest.mark.parametrize("adapter", [bert_network, vit_network, gpt2_network, digits_vit_network])
def test_another_model_is_refused(adapter: Any) -> None:
    with pytest.raises(InvalidInput, match="got Linear"):
        adapter(nn.Linear(2, 2), torch.ones(1, 2, 2))


def test_the_constant_of_a_module_is_that_of_its_weights() -> None:
    module = nn.Linear(3, 200).float()
    result = whole_model_constant(module, torch.ones(2, 3))
    norm = torch.linalg.matrix_norm(module.weight.detach().double(), 2).expand(2)
    torch.testing.assert_close(result.value, norm, rtol=1e-9, atol=0)
    assert module.weight.dtype == torch.float32


def test_a_gate_in_the_feed_forward_layers_is_refused() -> None:
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(image_size=8, patch_size=4, hidden_size=8, num_hidden_layers=1, use_swiglu_ffn=True)
    config.num_attention_heads = 2
    with pytest.raises(Unsupported, match="must have no gate, got SwiGLU"):
        dinov2_network(Dinov2Model(config).eval(), Draw(0)(1, 3, 8, 8))
