"""Whole networks, capture, training and reports on a device of its own: the numbers of the CPU, on that device."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lipbounds import Attention
from lipbounds.adapters.digits_vit import digits_vit_network
from lipbounds.adapters.lipschitz_vit import lipschitz_vit_network
from lipbounds.capture import capture
from lipbounds.certify import certify
from lipbounds.compose import network_bound
from lipbounds.compose.joint import JointNetwork
from lipbounds.estimators.tokens import token_lower
from lipbounds.estimators.whole_model import whole_model_constant
from lipbounds.jasmin import JaSMin, jasmin_of
from lipbounds.kernels.streaming import streaming_g1, streaming_map_norm, streaming_theorem_3
from lipbounds.kernels.streaming_sharp import streaming_sharp_cheap
from lipbounds.models.digits_vit import DigitsViT
from lipbounds.models.lipschitz_vit import LipschitzViT
from lipbounds.report import measure
from lipbounds.targets.layers import Linear, Patches, Pool, Sequence
from lipbounds.testing import synchronisations
from verify.device.blocks import BLOCKS, DEVICE, assert_same, draw, tensors_in
from verify.unit.networks import Draw, transformer
from verify.unit.reported import tiny_input, tiny_model
from verify.unit.test_certify import classifier


pytestmark = pytest.mark.usefixtures("as_a_user_runs_it")
X = draw(2, 3, 4)
_FOUND = BLOCKS["biases"]
assert isinstance(_FOUND, Attention)
BLOCK: Attention = _FOUND


def network(**options: Any) -> Sequence:
    options = {"pre_norm": True, "centred": True, "activation": "gelu", "how": "mean"} | options
    return transformer(Draw(0), 3, 4, **options)


@pytest.mark.parametrize("method", ["joint", "product"])
def test_certified_radii(method: Any) -> None:
    model = classifier(Draw(0))
    labels = model(X).squeeze(1).argmax(1)
    labels[1] = (labels[1] + 1) % 4
    here = certify(model, X, labels, method=method, steps=2)
    assert here.radius[0] > 0
    assert_same(certify(model.to("pretend"), X.to(DEVICE), labels.to(DEVICE), method=method, steps=2), here)


@pytest.mark.parametrize("radius", [0.0, 0.05])
@pytest.mark.parametrize(
    "options",
    [{}, {"pre_norm": False, "activation": "relu", "how": "first"}, {"centred": False, "activation": "silu"}],
)
def test_networks(options: dict[str, Any], radius: float) -> None:
    model = network(**options)
    there = network_bound(model.to("pretend"), X.to(DEVICE), radius)
    assert_same(there.result, network_bound(model, X, radius).result)
    assert {tensor.device for _, tensor in tensors_in(there.layers)} == {DEVICE}


def test_images() -> None:
    draw_ = Draw(0)
    model = Sequence((Patches((2, 2), (2, 2)), Linear(draw_(3, 8)), Pool("mean"), Linear(draw_(2, 3))))
    images = draw_(2, 2, 4, 4)
    assert_same(
        network_bound(model.to("pretend"), images.to(DEVICE), 0.1).result, network_bound(model, images, 0.1).result
    )
    assert_same(
        JointNetwork(model.to("pretend"), images[0].to(DEVICE)).bound(0.1), JointNetwork(model, images[0]).bound(0.1)
    )


@pytest.mark.parametrize("rows", [None, torch.tensor([[1.0, -1.0]], dtype=torch.float64)])
def test_joint_networks(rows: Tensor | None) -> None:
    model = network()
    there = JointNetwork(model.to("pretend"), X[0].to(DEVICE))
    here = JointNetwork(model, X[0])
    assert there.output.device == DEVICE
    for radius in (0.0, 0.05):
        assert_same(there.bound(radius, None if rows is None else rows.to(DEVICE)), here.bound(radius, rows))


def test_adapters() -> None:
    torch.manual_seed(0)
    images = torch.rand(1, 1, 8, 8)
    for model, adapter in ((DigitsViT().eval(), digits_vit_network), (LipschitzViT().eval(), lipschitz_vit_network)):
        there = adapter(copy.deepcopy(model).to(DEVICE), images.to(DEVICE))  # pyright: ignore[reportArgumentType]
        assert_same(there, adapter(model, images))  # pyright: ignore[reportArgumentType]


def test_whole_models() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 3)).double()
    here = whole_model_constant(model, X, steps=20)
    assert_same(whole_model_constant(copy.deepcopy(model).to(DEVICE), X.to(DEVICE), steps=20), here)


def test_captured_blocks() -> None:
    model, x = tiny_model().double(), tiny_input(2).double()
    with torch.no_grad():
        here = [found.attention for found in capture(model, x)]
        there = [found.attention for found in capture(copy.deepcopy(model).to(DEVICE), x.to(DEVICE))]
    assert len(there) == 2
    assert_same(there, here)


@pytest.mark.parametrize("k", [0, 10])
def test_a_training_step_with_jasmin(k: int) -> None:
    def step(device: torch.device) -> list[Tensor | None]:
        model = tiny_model().double().to(device).train()
        optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
        with JaSMin(model, k=k) as reg:
            loss = model(tiny_input().double().to(device)).square().mean() + reg.penalty()
            loss.backward()
        optimiser.step()
        return [loss.detach(), *(p.grad for p in model.parameters()), *(p.detach() for p in model.parameters())]

    assert_same(step(DEVICE), step(torch.device("cpu")))


def test_jasmin_of_a_block() -> None:
    assert_same(jasmin_of(BLOCK.to("pretend")), jasmin_of(BLOCK))


def test_maps_that_are_not_stored() -> None:
    there = BLOCK.to("pretend")
    for streamed in (streaming_g1, streaming_map_norm):
        found = streamed(there.queries, there.keys, 0.5, causal=True, logit_bias=there.logit_bias, chunk=3)
        assert_same(found, streamed(BLOCK.queries, BLOCK.keys, 0.5, causal=True, logit_bias=BLOCK.logit_bias, chunk=3))
    for bound in (streaming_theorem_3, streaming_sharp_cheap):
        block = there.replace()
        with synchronisations() as seen:
            found = bound(block, chunk=3)
        assert len(seen) <= 2, seen
        assert_same(found, bound(BLOCK, chunk=3))


def test_pairs_of_tokens() -> None:
    block = BLOCKS["causal"]
    assert_same(token_lower(block.to("pretend")), token_lower(block))  # pyright: ignore[reportArgumentType]


def test_a_report() -> None:
    there = measure(tiny_model().to(DEVICE), tiny_input().to(DEVICE), radii=[], layers=[1])
    here = measure(tiny_model(), tiny_input(), radii=[], layers=[1])
    assert there.device == "pretend:0"
    assert len(there.inputs[0].layers) == len(here.inputs[0].layers) == 1
    for found, expected in zip(there.inputs[0].layers, here.inputs[0].layers, strict=True):
        assert numbers_of(found) == pytest.approx(numbers_of(expected), rel=1e-4)  # the model ran in float32


def numbers_of(value: Any) -> list[float]:
    """All the numbers in a part of a report, in order."""
    if isinstance(value, float):
        return [value]
    if isinstance(value, (list, tuple)):
        return [number for item in value for number in numbers_of(item)]
    if isinstance(value, dict):
        return [number for item in value.values() for number in numbers_of(item)]
    if hasattr(value, "__dataclass_fields__"):
        return [number for name in value.__dataclass_fields__ for number in numbers_of(getattr(value, name))]
    return []
