"""The search for small perturbations, on a linear classifier, whose smallest perturbation is known."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bench.attacks.smallest import Effort, Norm, _apgd, smallest_found


EFFORT = Effort(iterations=20, fab_targets=9, apgd_targets=3)


def linear() -> tuple[nn.Sequential, torch.Tensor, torch.Tensor]:
    """Ten classes, two images far from the ends of [0, 1]."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 10, bias=False))
    model[1].weight.data = torch.randn(10, 16, generator=generator)
    images = 0.45 + 0.1 * torch.rand(2, 1, 4, 4, generator=generator)
    return model, images, model(images).argmax(1)


def truth(model: nn.Sequential, images: torch.Tensor, labels: torch.Tensor, dual: float) -> torch.Tensor:
    weight, logits = model.get_parameter("1.weight").double(), model(images).double()
    found = []
    for row, label in zip(logits, labels, strict=True):
        others = torch.arange(10) != label
        slopes = torch.linalg.vector_norm((weight[label] - weight)[others], dual, dim=1)
        found.append(((row[label] - row[others]) / slopes).min())
    return torch.stack(found)


class Shift(nn.Module):
    """Makes the last class win."""

    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        return logits + torch.arange(10.0)


@pytest.mark.parametrize(("norm", "dual"), [("L2", 2.0), ("Linf", 1.0)])
def test_the_distance_to_a_plane_is_found_and_never_undercut(norm: Norm, dual: float) -> None:
    pytest.importorskip("pyautoattack")
    model, images, labels = linear()
    found, exact = smallest_found(model, images, labels, norm, EFFORT), truth(model, images, labels, dual)
    assert (found >= exact * (1 - 1e-4)).all()
    assert (found <= exact * 1.02).all()


@pytest.mark.parametrize(("norm", "dual"), [("L2", 2.0), ("Linf", 1.0)])
def test_apgd_keeps_to_the_radius_of_each_image(norm: Norm, dual: float) -> None:
    pytest.importorskip("pyautoattack")
    model, images, labels = linear()
    exact = truth(model, images, labels, dual)
    radii = exact * torch.tensor([1.2, 0.8])
    order = {"L2": 2, "Linf": float("inf")}[norm]
    fooled = torch.zeros(2, dtype=torch.bool)
    for moved in _apgd(model, images, labels, norm, radii, EFFORT):
        distances = torch.linalg.vector_norm((moved - images).flatten(1), order, dim=1)
        assert (distances <= radii * (1 + 1e-4)).all()
        fooled |= model(moved).argmax(1) != labels
    assert fooled.tolist() == [True, False]


def test_nothing_found_is_infinite() -> None:
    pytest.importorskip("pyautoattack")
    model, images, labels = linear()
    model.get_parameter("1.weight").data.zero_()
    model = nn.Sequential(model, Shift())
    found = smallest_found(model, images, torch.full_like(labels, 9), "L2", EFFORT)
    assert found.isinf().all()
