"""Certificates of one's own classifier: the network is the model, and the radius is in the unit that it names."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lipbounds import InvalidInput, Unsupported
from lipbounds.adapters.pixels import network_of_pixels
from lipbounds.adapters.vit_classifier import vit_classifier_network
from lipbounds.certify import certify
from lipbounds.targets.layers import Flatten, Linear, Patches, Pool, Sequence
from verify.unit.networks import Draw


MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
X = Draw(0)(2, 2, 3)
LABELS = torch.tensor([0, 0])


class Own(nn.Module):
    """A linear classifier, in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 3)
        self.head.weight.data, self.head.bias.data = Draw(1)(3, 6).float(), torch.tensor([50.0, 0.0, 0.0])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x.flatten(1))


def network_of(model: Own) -> Sequence:
    return Sequence((Flatten(), Linear(model.head.weight.detach(), model.head.bias.detach())))


def test_a_network_that_is_the_model_passes_with_the_same_radius() -> None:
    network = network_of(model := Own())
    alone = certify(network, X, LABELS)
    for given in (model, lambda x: SimpleNamespace(logits=model.double()(x))):
        found = certify(network, X, LABELS, model=given)
        assert torch.equal(found.radius, alone.radius)
        assert bool((found.radius > 0).all())
    assert model.head.weight.dtype == torch.float64  # of the callable; a module itself is copied


def test_a_module_is_left_alone() -> None:
    model = Own().train()
    certify(network_of(model), X, LABELS, model=model)
    assert model.training
    assert model.head.weight.dtype == torch.float32


def test_other_logits_are_refused_with_the_residual() -> None:
    model = Own()
    weight = model.head.weight.detach().double().clone()
    weight[0, 0] += 1e-6
    network = Sequence((Flatten(), Linear(weight, model.head.bias.detach().double())))
    with pytest.raises(Unsupported, match=r"reproduce the logits of model to 1e-09 .* got residual=\d\.\d+e-0[78] at"):
        certify(network, X, LABELS, model=model)


def test_logits_that_agree_at_the_input_alone_are_refused() -> None:
    model, x = Own(), X[:1]
    weight, bias = (t.detach().double() for t in (model.head.weight, model.head.bias))
    half = weight / 2  # has a radius twice as large
    network = Sequence((Flatten(), Linear(half, bias + (weight - half) @ x.flatten())))
    with pytest.raises(Unsupported, match="here J is the Jacobian of network"):
        certify(network, x, LABELS[:1], model=model)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            lambda x: x.flatten(1)[:, :2],
            r"return the logits \[batch, classes\] of network, \(2, 3\), got \(2, 2\)",
        ),
        (lambda x: {"scores": x}, "must return a tensor of logits, .* got dict"),
        (nn.Linear(7, 3), r"must run on x, float64 of shape \(2, 2, 3\), got RuntimeError"),
    ],
)
def test_a_model_without_such_logits_is_refused(given: Any, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        certify(network_of(Own()), X, LABELS, model=given)


def test_the_unit_is_named() -> None:
    network = network_of(Own())
    assert certify(network, X, LABELS).unit == "the input of the network, as passed"
    assert certify(network, X, LABELS, unit="pixels in [0, 1]").unit == "pixels in [0, 1]"


@pytest.mark.parametrize("bias", [None, Draw(4)(5)])
def test_the_radius_of_a_linear_classifier_in_pixels_is_exact(bias: torch.Tensor | None) -> None:
    draw = Draw(3)
    inner = Sequence(
        (Patches((2, 2), (2, 2)), Linear(draw(5, 12), bias), Pool("mean"), Linear(draw(2, 5))), ("a", "b", "c", "d")
    )
    mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (MEAN, STD))
    network, pixels = network_of_pixels(inner, MEAN, STD), draw(1, 3, 4, 4).sigmoid()
    assert network.names == inner.names
    logits = inner((pixels - mean) / std).flatten()
    torch.testing.assert_close(network(pixels).flatten(), logits, rtol=1e-12, atol=1e-12)
    (slope,) = torch.autograd.functional.jacobian(lambda p: inner((p - mean) / std).flatten().diff(), pixels)
    exact = float(logits.diff().abs() / slope.norm())
    label = logits.argmax(keepdim=True)
    found = certify(network, pixels, label, largest=1e3, model=lambda p: inner((p - mean) / std).squeeze(1))
    assert exact * (1 - 1e-6) <= float(found.radius) <= exact
    with pytest.raises(Unsupported, match="or pass x as the model takes it"):  # the network of normalised pixels
        certify(inner, pixels, label, model=lambda p: inner((p - mean) / std).squeeze(1))


@pytest.mark.usefixtures("as_a_user_runs_it")
@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        ((0.5, 0.5), 1.0, r"mean must be one number, or one per channel \(3\)"),
        (0.5, (0.5, "x", 0.5), "std must be one number, or one per channel"),
        (0.5, 0.0, r"std must be positive, got \[0.0, 0.0, 0.0\]"),
        (float("nan"), 1.0, "mean must be finite"),
    ],
)
def test_a_mean_or_std_that_is_none_is_refused(mean: Any, std: Any, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        network_of_pixels(Sequence((Patches((2, 2), (2, 2)), Linear(Draw(0)(5, 12)))), mean, std)


def test_padding_is_refused_since_it_is_not_normalised() -> None:
    padded = Sequence((Patches((2, 2), (2, 2), (1, 1)), Linear(Draw(0)(5, 12))))
    for network in (padded, Sequence((Linear(Draw(0)(5, 12)),))):
        with pytest.raises(Unsupported, match="begin with Patches without padding and then a Linear"):
            network_of_pixels(network, 0.5, 0.5)


@pytest.mark.usefixtures("as_a_user_runs_it")  # another model is refused by the library, not by the shape checks
def test_a_classifier_of_transformers_in_pixels() -> None:
    from transformers import ViTConfig, ViTForImageClassification, ViTModel

    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_labels=3, **size)).eval()
    pixels = Draw(5)(2, 3, 8, 8).sigmoid()
    network = vit_classifier_network(model, pixels, mean=MEAN, std=STD)
    mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (MEAN, STD))
    other = Draw(6)(2, 3, 8, 8).sigmoid()
    with torch.no_grad():
        wanted = model.double()((other - mean) / std).logits
    torch.testing.assert_close(network(other).squeeze(1), wanted, rtol=1e-9, atol=1e-12)
    plain = vit_classifier_network(model, (other - mean) / std)
    torch.testing.assert_close(plain((other - mean) / std).squeeze(1), wanted, rtol=1e-9, atol=1e-12)
    with pytest.raises(InvalidInput, match="needs a ViTForImageClassification, got ViTModel"):
        vit_classifier_network(ViTModel(ViTConfig(image_size=8, patch_size=4, **size)), pixels)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("method", ["taylor", "joint", "product"])
def test_a_certificate_says_how_rounding_is_covered(method: Any) -> None:
    assert certify(network_of(Own()), X, LABELS, method=method, steps=1).rounding.startswith("proved")
