"""Attacks on models whose worst case is known, the ball they must stay in, and inputs they must refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.attacks.images import Ball, Norm, autoattack, distance, fgsm, pgd, right, within
from bench.attacks.tokens import TokensAsImages, attack_tokens
from lipbounds.errors import InvalidInput


NORMS: tuple[Norm, ...] = ("l_inf", "l2")
DUAL = {"l_inf": 1, "l2": 2}


def linear(size: int, classes: int, seed: int = 0) -> Any:
    layer = nn.Linear(size, classes, bias=False)
    layer.weight.data = torch.randn(classes, size, generator=torch.Generator().manual_seed(seed))
    return nn.Sequential(nn.Flatten(), layer)


def margin(model: nn.Module, images: Tensor) -> Tensor:
    logits = model(images).detach()
    return logits[:, 0] - logits[:, 1]


@pytest.mark.parametrize("norm", NORMS)
def test_on_two_linear_classes_the_optimum_is_found(norm: Norm) -> None:
    """The margin falls by eps times the dual norm of the difference of the two rows, and no attack does better."""
    model, eps = linear(16, 2), 0.1
    images = 0.3 + 0.4 * torch.rand(5, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    labels = torch.zeros(5, dtype=torch.long)
    weight = model[1].weight.detach()
    fall = eps * torch.linalg.vector_norm(weight[0] - weight[1], DUAL[norm])
    best = margin(model, images) - fall
    torch.testing.assert_close(margin(model, fgsm(model, images, labels, Ball(norm, eps))), best, rtol=0, atol=1e-5)
    straight = pgd(model, images, labels, Ball(norm, eps), steps=40, generator=None)
    torch.testing.assert_close(margin(model, straight), best, rtol=0, atol=1e-5)
    generator = torch.Generator().manual_seed(2)
    found = margin(model, pgd(model, images, labels, Ball(norm, eps), steps=40, generator=generator))
    assert bool((found >= best - 1e-5).all())
    # In l2 steps of eps / 16 turn towards the optimum along the sphere: of a right angle, 40 of them leave 0.173, and
    # 1 - cos 0.173 < 0.02.
    assert bool((found <= best + (0.02 * fall if norm == "l2" else 1e-5)).all())


@pytest.mark.parametrize("norm", NORMS)
def test_attacks_keep_to_the_ball_and_to_the_pixels(norm: Norm) -> None:
    model, eps = linear(16, 3), 0.3
    images = torch.rand(8, 1, 4, 4, generator=torch.Generator().manual_seed(1)).round(decimals=1)
    labels = torch.arange(8) % 3
    state = torch.random.get_rng_state()
    found = [
        pgd(model, images, labels, Ball(norm, eps), steps=7, generator=torch.Generator().manual_seed(3))
        for _ in range(2)
    ]
    assert torch.equal(found[0], found[1])
    assert torch.equal(torch.random.get_rng_state(), state)
    for moved in (found[0], fgsm(model, images, labels, Ball(norm, eps))):
        assert float(distance(moved, images, norm).max()) <= eps
        assert float(moved.min()) >= 0
        assert float(moved.max()) <= 1
        assert float(distance(moved, images, norm).min()) > 0.5 * eps


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1.0, 1e3])
def test_within_leaves_nothing_outside_and_what_is_inside_alone(norm: Norm, dtype: torch.dtype, size: float) -> None:
    generator = torch.Generator().manual_seed(0)
    centres = size * torch.randn(6, 3, 5, generator=generator, dtype=torch.float64).to(dtype)
    change = torch.randn(6, 3, 5, generator=generator, dtype=torch.float64)
    eps = 0.1
    length = distance(change, torch.zeros_like(change), norm)
    # Far outside, outside by a rounding, on the edge, inside, nowhere.
    factors = eps / length * torch.tensor([9.0, 1 + 1e-9, 1.0, 1.0, 0.5, 0.0], dtype=torch.float64)
    change = change * factors[:, None, None]
    moved = within(centres, change, Ball(norm, eps))
    assert moved.dtype == dtype
    assert float(distance(moved, centres, norm).max()) <= eps
    assert torch.equal(moved[4:], (centres.double() + change).to(dtype)[4:])
    assert float(distance(moved, centres, norm)[:4].min()) > 0.98 * eps


def test_an_eps_below_the_rounding_of_the_centre_moves_nothing() -> None:
    centres = torch.full((1, 1, 2), 1e8)
    moved = within(centres, torch.full((1, 1, 2), 100.0, dtype=torch.float64), Ball("l_inf", 1e-3))
    assert torch.equal(moved, centres)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.full((1, 1, 2, 2), 1.5)}, "pixels in"),
        ({"images": torch.full((1, 1, 2, 2), torch.nan)}, "pixels in"),
        ({"norm": "l1"}, "norm must be one of"),
        ({"eps": 0.0}, "eps must be above 0"),
        ({"eps": float("nan")}, "eps must be above 0"),
    ],
)
def test_bad_arguments_are_refused(change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"images": torch.full((1, 1, 2, 2), 0.5), "norm": "l2", "eps": 0.1} | change
    model, labels = linear(4, 10), torch.zeros(1, dtype=torch.long)
    with pytest.raises(InvalidInput, match=message):
        # Beartype would refuse an unknown norm before the function sees it.
        getattr(pgd, "__wrapped__", pgd)(
            model, given["images"], labels, Ball(given["norm"], given["eps"]), steps=1, generator=None
        )
    pytest.importorskip("pyautoattack")
    with pytest.raises(InvalidInput, match=message):
        getattr(autoattack, "__wrapped__", autoattack)(
            model, given["images"], labels, Ball(given["norm"], given["eps"]), seed=0
        )


@pytest.mark.parametrize("norm", NORMS)
def test_autoattack_on_tokens_keeps_eps_in_their_own_coordinates(norm: Norm) -> None:
    """A linear classifier, tokens far from [0, 1]: a radius just above the known one suffices to change every class."""
    pytest.importorskip("pyautoattack")
    model = linear(12, 10)
    tokens = 7 + 5 * torch.randn(4, 3, 4, generator=torch.Generator().manual_seed(1))
    labels = model(tokens).argmax(1)
    weight, logits = model[1].weight.detach(), model(tokens).detach()
    for item, label in enumerate(labels.tolist()):
        others = [c for c in range(10) if c != label]
        gaps = logits[item, label] - logits[item, others]
        radius = float((gaps / torch.linalg.vector_norm(weight[label] - weight[others], DUAL[norm], dim=1)).min())
        one, eps = tokens[item : item + 1], 1.02 * radius
        moved = attack_tokens(model, one, labels[item : item + 1], Ball(norm, eps), seed=0)
        assert float(distance(moved, one, norm)) <= eps
        assert not bool(right(model, moved, labels[item : item + 1]))


def test_no_point_of_the_ball_is_clamped_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """An attack that goes to a corner of the ball, at the largest and the smallest entry, arrives there."""
    tokens = torch.tensor([[[-3.0, 11.0], [0.0, 5.0]]])

    def to_the_corner(model: nn.Module, images: Tensor, labels: Tensor, ball: Ball, *, seed: int) -> Tensor:
        torch.testing.assert_close(model.double()(images.double()), tokens.double(), rtol=0, atol=1e-5)
        corner = images + ball.eps * torch.tensor([[[[-1.0, 1.0], [1.0, -1.0]]]])
        assert float(corner.min()) >= -1e-6
        assert float(corner.max()) <= 1 + 1e-6
        return corner.clamp(0, 1)

    monkeypatch.setattr("bench.attacks.tokens.autoattack", to_the_corner)
    moved = attack_tokens(nn.Identity(), tokens, torch.zeros(1, dtype=torch.long), Ball("l_inf", 2.0), seed=0)
    expected = tokens + 2 * torch.tensor([[[-1.0, 1.0], [1.0, -1.0]]])
    torch.testing.assert_close(moved, expected, rtol=0, atol=1e-5)
    assert float(distance(moved, tokens, "l_inf")) <= 2.0
    assert TokensAsImages(nn.Identity(), -1.0, 4.0)(torch.ones(1, 1, 2, 2)).equal(torch.full((1, 2, 2), 3.0))


@pytest.mark.parametrize(
    ("tokens", "classes", "eps", "message"),
    [
        (torch.full((1, 2, 2), torch.inf), 10, 0.1, "finite"),
        (torch.full((1, 2, 2), 1e8), 10, 0.1, "rounding of the tokens"),
        (torch.zeros(1, 2, 2), 10, 0.0, "eps must be above 0"),
        (torch.zeros(1, 2, 2), 9, 0.1, "at least 10 classes"),
    ],
)
def test_tokens_that_cannot_be_attacked_are_refused(tokens: Tensor, classes: int, eps: float, message: str) -> None:
    pytest.importorskip("pyautoattack")
    with pytest.raises(InvalidInput, match=message):
        attack_tokens(linear(4, classes), tokens, torch.zeros(1, dtype=torch.long), Ball("l2", eps), seed=0)


@pytest.mark.parametrize(("norm", "eps"), [("l_inf", 8.0), ("l_inf", 1.01), ("l2", 4.1)])
def test_a_radius_beyond_the_range_of_pixels_is_refused(norm: Norm, eps: float) -> None:
    images = torch.full((2, 1, 4, 4), 0.5)
    with pytest.raises(InvalidInput, match="in units of 1/255"):
        pgd(nn.Flatten(), images, torch.zeros(2, dtype=torch.long), Ball(norm, eps), steps=1, generator=None)
