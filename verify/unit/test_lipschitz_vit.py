"""The model made to be certified: its constraints hold, it is accurate, and no attack beats its certificate."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

from lipbounds import InvalidInput
from lipbounds.adapters.lipschitz_vit import lipschitz_vit_network
from lipbounds.certify import certify
from lipbounds.models.digits_data import LabelledImages, load_digits_split
from lipbounds.models.lipschitz_vit import (
    BENDING,
    CERTIFIED,
    DIGITS,
    WEIGHTS,
    LipschitzViT,
    Shape,
    constrain,
    load_lipschitz_vit,
    release,
)
from lipbounds.models.train_certified import loss_under_attack, moved_against
from lipbounds.models.train_lipschitz import train
from verify.unit.networks import Draw
from verify.unit.test_certify import attacked


def norms(model: nn.Module) -> list[float]:
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return [float(torch.linalg.matrix_norm(module.weight.detach().double(), 2)) for module in linear]


@pytest.mark.parametrize(("path", "shape"), [(WEIGHTS, DIGITS), (CERTIFIED, BENDING)], ids=["plain", "certified"])
def test_no_linear_map_of_the_committed_models_stretches_more_than_it_may(path: Path, shape: Shape) -> None:
    model = load_lipschitz_vit(path, shape)
    assert max(norms(model)) <= shape.gain * (1 + 1e-5)
    of_logits = [norms(part)[0] for name, part in model.named_modules() if name.endswith((".query", ".key"))]
    assert max(of_logits) <= shape.logit_gain * (1 + 1e-5)
    assert path.stat().st_size < 500_000


def test_constraints_hold_while_training_and_after_it() -> None:
    torch.manual_seed(0)
    model = LipschitzViT()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.data *= 10
    constrain(model)
    x = Draw(1)(2, 1, 8, 8).float()
    expected = model(x)
    assert max(norms(model)) <= 1 + 1e-5
    release(model)
    assert max(norms(model)) <= 1 + 1e-5
    torch.testing.assert_close(model(x), expected)
    assert sorted(model.state_dict()) == sorted(LipschitzViT().state_dict())


def test_the_committed_model_is_accurate_and_certified() -> None:
    split, model = load_digits_split().test, load_lipschitz_vit()
    with torch.no_grad():
        right = model(split.images).argmax(1) == split.labels
    assert float(right.double().mean()) > 0.95
    chosen = right.nonzero()[:1, 0]
    images, labels = split.images[chosen], split.labels[chosen]
    network = lipschitz_vit_network(model, images)
    torch.testing.assert_close(
        network(images.double()).squeeze(1).float(), model(images).detach(), rtol=1e-4, atol=1e-5
    )
    found = certify(network, images, labels, steps=8)
    radius = float(found.radius)
    assert radius > 0.05
    assert attacked(network, images[0].double(), int(labels), radius, steps=10, starts=2) >= 0


def test_training_against_an_attack_gives_wider_margins_in_the_image() -> None:
    """Margin over slope, at the point, which no radius exceeds by much; the clean accuracy is a little lower."""
    part = load_digits_split().test
    wide = []
    for path, shape in ((WEIGHTS, DIGITS), (CERTIFIED, BENDING)):
        model, x = load_lipschitz_vit(path, shape), part.images.clone().requires_grad_()
        logits = model(x)
        accuracy = float((logits.detach().argmax(1) == part.labels).double().mean())
        assert accuracy >= 0.92
        own = logits.gather(1, part.labels[:, None])
        rest = logits.scatter(1, part.labels[:, None], -torch.inf).max(1).values
        margin = own.squeeze(1) - rest
        (slope,) = torch.autograd.grad(margin.sum(), x)
        wide.append(float((margin.detach() / slope.flatten(1).norm(dim=1)).median()))
    assert wide[1] > 1.5 * wide[0]


def test_a_step_of_training_moves_images_by_the_reach(tmp_path: Path) -> None:
    part = load_digits_split().train
    torch.manual_seed(0)
    moved = moved_against(LipschitzViT(), part.images[:4], part.labels[:4], 0.6, 12.0, torch.Generator().manual_seed(0))
    torch.testing.assert_close((moved - part.images[:4]).flatten(1).norm(dim=1), torch.full((4,), 0.6))
    few = LabelledImages(part.images[:40], part.labels[:40], part.indices[:40])
    losses = loss_under_attack(sharpness=2.0, radius=0.3, epochs=1)
    one, two = (train(few, seed=1, epochs=1, console=Console(quiet=True), loss_of=losses).head.weight for _ in range(2))
    assert torch.equal(one, two)


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="not there"):
        load_lipschitz_vit(tmp_path / "none.safetensors")
    with pytest.raises(InvalidInput, match="tensors of LipschitzViT"):
        load_lipschitz_vit(WEIGHTS.parent / "digits_vit.safetensors")
