"""Captured attention blocks of Hugging Face transformers, random and pretrained."""

from __future__ import annotations

import pytest
import torch
import transformers

from lipbounds.models.minilm import minilm_folder
from verify.unit.capture_models import (
    HUB,
    close,
    hub_inputs,
    hub_model,
    run,
)
from verify.unit.capture_models import float64_and_seed as float64_and_seed


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("name", "padded"), [(name, p) for name in HUB for p in (False, True) if name != "ViT" or not p]
)
def test_every_layer_of_a_transformers_model_is_found(name: str, implementation: str, padded: bool) -> None:
    model, outputs = hub_model(name, implementation), []
    for i in range(3):
        projection = model.get_submodule(HUB[name][2].format(i))
        projection.register_forward_hook(lambda *call: outputs.append(call[-1]))
    found = run(model, **hub_inputs(name, padded))
    assert len(found) == (5 if name == "T5" else 3)
    # ViT's written-out attention rounds its maps to float32.
    tolerance = 1e-6 if (name, implementation) == ("ViT", "eager") else 1e-12
    for i, (block, output) in enumerate(zip(found[:3], outputs, strict=True)):
        assert block.module == (HUB[name][1] or "layers.{}.attention").format(i)
        torch.testing.assert_close(block.attention.forward(), output, rtol=tolerance, atol=tolerance)
        assert block.residual < tolerance


def test_a_batch_of_one_stays_a_batch_in_spite_of_a_flat_projection() -> None:
    assert run(hub_model("GPT2"), torch.randint(3, 50, (1, 7)))[0].attention.x.shape == (1, 7, 24)


@pytest.mark.parametrize("name", ["Bert", "GPT2"])
def test_written_out_attention_gives_the_same_blocks(name: str) -> None:
    model, inputs = hub_model(name), hub_inputs(name, padded=True)
    calls = run(model, **inputs)
    model.set_attn_implementation("eager")
    for call, written in zip(calls, run(model, **inputs), strict=True):
        close(call.attention.probabilities, written.attention.probabilities)
        assert all(
            getattr(call.attention, w).equal(getattr(written.attention, w)) for w in ("w_q", "w_k", "w_v", "w_o")
        )


@pytest.mark.parametrize(("dtype", "largest"), [(torch.float64, 1e-13), (torch.float32, 5e-6)])
def test_a_pretrained_encoder_is_captured_with_its_own_weights(dtype: torch.dtype, largest: float) -> None:
    model = transformers.BertModel.from_pretrained(minilm_folder(), dtype=dtype)
    found = run(model, torch.randint(1000, 2000, (2, 9)))
    assert [block.module for block in found] == [f"encoder.layer.{i}.attention.self" for i in range(6)]
    assert max(block.residual for block in found) < largest
    for block, layer in zip(found, model.encoder.layer, strict=True):
        assert block.attention.w_k.equal(layer.attention.self.key.weight.view(12, 32, 384).mT)
        assert block.attention.dtype == dtype


def test_capturing_does_not_change_the_output_of_the_model() -> None:
    model, outputs = hub_model("Bert"), []
    model.register_forward_hook(lambda *call: outputs.append(call[-1].last_hidden_state))
    run(model, **(inputs := hub_inputs("Bert", padded=True)))
    with torch.no_grad():
        model(**inputs)
    assert outputs[0].equal(outputs[1])
