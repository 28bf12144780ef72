"""Captured attention blocks of Hugging Face transformers, random and pretrained."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from lipbounds.capture import CapturedAttention, capture
from lipbounds.errors import Unsupported
from lipbounds.models.minilm import minilm_folder
from verify.unit.capture_hub_models import HUB, IDS, PAIR, hub_inputs, hub_model
from verify.unit.capture_models import close, run
from verify.unit.capture_models import float64_and_seed as float64_and_seed


PADDED = ("Bert", "DistilBert", "GPT2", "Mistral", "Roberta", "T5")
CASES = [(name, way, padded) for name, hub in HUB.items() for way in hub.captured for padded in (False, name in PADDED)]
CASES = [*dict.fromkeys(CASES)]
# Whose turned or normalised queries or whose maps transformers rounds to float32, whatever the rest is in.
TURNED_IN_FLOAT32 = {"Cohere", "Esm", "ModernBert"}
NORMALISED_IN_FLOAT32 = {"Gemma3Text", "Olmo2", "Qwen3"}
MAPS_IN_FLOAT32 = {
    *{
        "Beit",
        "Bloom",
        "CLIPText",
        "CLIPVision",
        "DeiT",
        "GPTJ",
        "GPTNeo",
        "GPTNeoX",
        "Gemma",
        "Glm",
        "Llama",
        "Mistral",
        "OPT",
    },
    *{"Phi", "Phi3", "Qwen2", "SiglipVision", "StableLm", "Swin", "ViT", "XLM"},
}
MODULES = {
    "Bert": "encoder.layer.{}.attention.self",
    "DistilBert": "transformer.layer.{}.attention",
    "GPT2": "h.{}.attn",
    "Roberta": "encoder.layer.{}.attention.self",
    "T5": "encoder.block.{}.layer.0.SelfAttention",
    "ViT": "layers.{}.attention",
}


def tolerance(name: str, way: str) -> float:
    """How far what transformers computes in float64 may be from what the captured weights say."""
    rounded = name in TURNED_IN_FLOAT32 | NORMALISED_IN_FLOAT32 or (way == "eager" and name in MAPS_IN_FLOAT32)
    return 3e-6 if rounded else 1e-12


class Calls:
    """The first input and the output of every call of a module that has the form of a block or a layer."""

    def __init__(self, model: nn.Module, tolerance: float) -> None:
        self.calls: list[tuple[Tensor, Tensor]] = []
        self.tolerance = tolerance
        for module in model.modules():
            module.register_forward_hook(self._note)

    def _note(self, module: nn.Module, given: tuple[Any, ...], result: Any) -> None:
        output = result[0] if isinstance(result, tuple) else result
        if given and isinstance(given[0], Tensor) and isinstance(output, Tensor):
            self.calls.append((given[0], output))

    def into(self, value: Tensor) -> Tensor:
        """The model's own tensor of this value, which was given to a module."""
        return next(given for given, _ in self.calls if given.equal(value))

    def out_of(self, value: Tensor) -> Tensor:
        """The model's own tensor of this value, up to rounding, which a module returned."""
        return next(
            output
            for _, output in self.calls
            if output.shape == value.shape and torch.allclose(output, value, rtol=self.tolerance, atol=self.tolerance)
        )


def check_derivative(found: CapturedAttention, calls: Calls) -> None:
    """The derivative of the block is what autograd finds between two tensors of the model itself."""
    block, cotangent = found.attention, torch.randn_like(found.attention.forward())
    tokens, output = calls.into(block.x), calls.out_of(block.forward())
    (expected,) = torch.autograd.grad(output, tokens, cotangent, retain_graph=True)
    largest = calls.tolerance
    torch.testing.assert_close(block.vjp(cotangent), expected, rtol=largest, atol=largest * float(expected.norm()))


@pytest.mark.usefixtures("as_a_user_runs_it")  # shape checks at every recorded call would triple the time
@pytest.mark.parametrize(("name", "way", "padded"), CASES)
def test_every_block_of_a_transformers_model_is_found_with_its_derivative(name: str, way: str, padded: bool) -> None:
    model = hub_model(name, way)
    calls = Calls(model, tolerance(name, way))
    found = capture(model, **hub_inputs(name, padded))
    assert [block.index for block in found] == list(range(HUB[name].blocks))
    for block in found:
        assert block.residual < calls.tolerance
        if way == HUB[name].captured[0]:
            check_derivative(block, calls)
    assert tuple(block.index for block in found if block.attention.moves == "query") == HUB[name].crossed
    if name in MODULES:
        assert [block.module for block in found[:2]] == [MODULES[name].format(i) for i in range(2)]


@pytest.mark.parametrize("name", [name for name, hub in HUB.items() if hub.refused])
def test_what_no_attention_can_express_is_refused_with_module_and_reason(name: str) -> None:
    for way in ["sdpa"] * HUB[name].sdpa + ["eager"]:
        with pytest.raises(Unsupported, match=rf"the attention in '.+' cannot be captured: .*{HUB[name].refused}"):
            run(hub_model(name, way), **hub_inputs(name))


@pytest.mark.parametrize(
    ("name", "way"), [("GPT2", "sdpa"), ("Llama", "sdpa"), ("Mistral", "sdpa"), ("Falcon", "eager")]
)
def test_padding_on_the_left_is_left_out(name: str, way: str) -> None:
    model = hub_model(name, way)
    calls, inputs = Calls(model, tolerance(name, way)), hub_inputs(name, padded=True, left=True)
    found = capture(model, **inputs)
    assert [(one.index, one.items, one.tokens) for one in found[:2]] == [(0, (0,), None), (0, (1,), (2, 3, 4, 5, 6))]
    assert len(found) == 2 * HUB[name].blocks
    for one in found:
        assert one.residual < calls.tolerance
    # The derivative of the rows that count, by the tokens that are there, is that of the model.
    block, other = found[1].attention, found[0].attention
    given = next(g for g, _ in calls.calls if g.shape[0] == 2 and g[:1].equal(other.x) and g[1:, 2:].equal(block.x))
    output = next(
        o
        for _, o in calls.calls
        if o.shape == (2, 7, block.w_o.shape[-1])
        and torch.allclose(o[:1], other.forward(), rtol=calls.tolerance, atol=calls.tolerance)
    )
    cotangent = torch.randn_like(block.forward())
    (expected,) = torch.autograd.grad(output, given, F.pad(cotangent, (0, 0, 2, 0, 1, 0)), retain_graph=True)
    close_enough = {"rtol": calls.tolerance, "atol": calls.tolerance * float(expected.norm())}
    torch.testing.assert_close(block.vjp(cotangent), expected[1:, 2:], **close_enough)
    assert float(expected[1, :2].norm()) == 0.0


def test_one_sort_of_layer_that_is_refused_does_not_cost_the_others() -> None:
    config = transformers.LEDConfig(
        **PAIR, **IDS, attention_window=4, max_encoder_position_embeddings=24, max_decoder_position_embeddings=24
    )
    model = transformers.LEDModel(config).eval()
    ids = torch.randint(3, 50, (2, 8))
    with pytest.raises(Unsupported, match=r"encoder\.layers\.0\.self_attn"):
        run(model, input_ids=ids, decoder_input_ids=ids[:, :5])
    found = run(model, input_ids=ids, decoder_input_ids=ids[:, :5], on_unsupported="skip")
    assert [one.index for one in found] == [2, 3, 4, 5]
    assert [one.index for one in found.skipped] == [0, 1]
    assert all("encoder.layers" in one.module and "softmax" in one.reason for one in found.skipped)


def test_grouped_weights_are_those_of_the_model_once_for_each_query_head() -> None:
    (found, _) = run(model := hub_model("Llama"), **hub_inputs("Llama"))
    keys = model.layers[0].self_attn.k_proj.weight.view(2, 8, 32).mT
    assert found.attention.w_k.equal(keys.repeat_interleave(2, 0))
    assert found.attention.causal


def test_a_batch_of_one_stays_a_batch_in_spite_of_a_flat_projection() -> None:
    assert run(hub_model("GPT2"), torch.randint(3, 50, (1, 7)))[0].attention.x.shape == (1, 7, 32)


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


@pytest.mark.parametrize("name", ["Bert", "GPT2"])
def test_what_a_model_writes_for_minus_infinity_is_that(name: str) -> None:
    """The most negative float32 in a mask that is added, also in blocks that are read in float64."""
    model, inputs = hub_model(name).float(), hub_inputs(name, padded=True)
    calls = run(model, **inputs)
    model.set_attn_implementation("eager")
    for call, written in zip(calls, run(model, **inputs), strict=True):
        masks = [block.attention.mask for block in (call, written)]
        assert masks[0] is not None
        assert masks[1] is not None
        assert bool(masks[0].isneginf().any())
        assert masks[1].masked_fill(masks[1].isneginf(), 0.0).abs().max() == 0


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
