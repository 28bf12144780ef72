"""Attacks on classifiers of images in [0, 1], each in a ball of the l_inf or the l2 norm of the pixels.

`within` brings what an attack found into the ball where a rounding put it outside: after it, distances measured in
float64 are at most eps. FGSM is `pgd` with one step of the whole radius and no random start.
"""

from __future__ import annotations

import dataclasses as dc
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from bench.attacks.ways import STANDARD, Way
from lipbounds.errors import InvalidInput


Norm = Literal["l_inf", "l2"]
NORMS: dict[Norm, str] = {"l_inf": "Linf", "l2": "L2"}  # with the names that AutoAttack has for them
STEP_SHARE = 2.5  # the steps of PGD together are that many radii long


@dc.dataclass(frozen=True, slots=True)
class Ball:
    """Where an attack may move an image.

    Args:
        norm: of the change of all pixels.
        eps: radius.
    """

    norm: Norm
    eps: float


def fgsm(
    model: nn.Module,
    images: Float[Tensor, "batch channels *rest"],
    labels: Int[Tensor, " batch"],
    ball: Ball,
) -> Float[Tensor, "batch channels *rest"]:
    """One step of the whole radius along the gradient of the loss (in l_inf along its sign).

    Args:
        model: the classifier.
        images: in [0, 1].
        labels: the right classes.
        ball: around each image.
    """
    return pgd(model, images, labels, ball, steps=1, step=ball.eps, generator=None)


def pgd(
    model: nn.Module,
    images: Float[Tensor, "batch channels *rest"],
    labels: Int[Tensor, " batch"],
    ball: Ball,
    *,
    steps: int,
    step: float | None = None,
    generator: torch.Generator | None,
) -> Float[Tensor, "batch channels *rest"]:
    """Projected gradient ascent of the cross-entropy; of all points on the way, for each image the one of largest loss.

    Args:
        model: the classifier.
        images: in [0, 1].
        labels: the right classes.
        ball: around each image.
        steps: number of steps.
        step: length of a step in the norm of the ball; by default 2.5 radii over the number of steps.
        generator: of the random start in the ball; None starts at the image.

    Raises:
        InvalidInput: an image is outside of [0, 1], the norm is unknown, eps or steps are not above 0, or eps is
            beyond the range of pixels.
    """
    check_ball(images, ball)
    if steps < 1:
        raise InvalidInput(f"steps must be at least 1, got steps={steps}.")
    length = STEP_SHARE * ball.eps / steps if step is None else step
    here = images if generator is None else _clip(images + _random(images, ball, generator), images, ball)
    best, best_loss = here, torch.full((len(images),), -torch.inf, dtype=images.dtype, device=images.device)
    for count in range(steps + 1):
        here = here.detach().requires_grad_(count < steps)
        loss = F.cross_entropy(model(here), labels, reduction="none")
        better = loss.detach() > best_loss
        best = torch.where(_wide(better, images), here.detach(), best)
        best_loss = torch.where(better, loss.detach(), best_loss)
        if count < steps:
            (gradient,) = torch.autograd.grad(loss.sum(), here)
            here = _clip(here.detach() + length * _steepest(gradient, ball.norm), images, ball)
    return within(images, best.double() - images.double(), ball)


def autoattack(
    model: nn.Module,
    images: Float[Tensor, "batch channels *rest"],
    labels: Int[Tensor, " batch"],
    ball: Ball,
    *,
    seed: int,
    way: Way = STANDARD,
) -> Float[Tensor, "batch channels *rest"]:
    """AutoAttack, by default in its standard version (APGD-CE, APGD-T, FAB-T, Square), with the package's defaults.

    Returned as the package leaves it, in the ball up to a rounding: see `within`. The caller's random state is left
    as it was.

    Args:
        model: the classifier.
        images: 4-dimensional, in [0, 1].
        labels: the right classes.
        ball: around each image.
        seed: of all that is random.
        way: package, attacks and targets.

    Raises:
        InvalidInput: pixels outside of [0, 1], to which the attack would move them without a word; other than four
            dimensions; fewer classes than it aims at, ten for the standard version.
    """
    check_ball(images, ball)
    if images.dim() != 4:
        raise InvalidInput(f"images must have four dimensions, got shape {tuple(images.shape)}.")
    with torch.no_grad():
        classes = model(images[:1]).shape[1]
    if classes < way.classes:
        raise InvalidInput(
            f"model must have at least {way.classes} classes for {way.name}, which aims at "
            f"{way.targets} others, got {classes}."
        )
    device = images.device
    cuda = [device] if device.type == "cuda" else []
    with _quiet(), torch.random.fork_rng(devices=cuda):
        return way.moved(model, images, labels, norm=NORMS[ball.norm], eps=ball.eps, seed=seed)


def distance(
    moved: Float[Tensor, "batch channels *rest"], images: Float[Tensor, "batch channels *rest"], norm: Norm
) -> Float[Tensor, " batch"]:
    """How far each image was moved, in float64.

    Args:
        moved: the images afterwards.
        images: the images before.
        norm: it is measured in.
    """
    difference = (moved.double() - images.double()).flatten(1)
    return torch.linalg.vector_norm(difference, ord=torch.inf if norm == "l_inf" else 2, dim=1)


def within(
    centres: Float[Tensor, "batch channels *rest"],
    change: Float[Tensor, "batch channels *rest"],
    ball: Ball,
) -> Float[Tensor, "batch channels *rest"]:
    """The centres moved by the change, which is shortened until the sum as rounded to their dtype is in the ball.

    Args:
        centres: of the balls.
        change: in float64.
        ball: around each centre.
    """
    for power in range(30, 0, -1):
        moved = (centres.double() + change).to(centres.dtype)
        outside = _wide(distance(moved, centres, ball.norm) > ball.eps, centres)
        if not bool(outside.any()):
            return moved
        size = _wide(distance(change, torch.zeros_like(change), ball.norm), centres)
        shorter = change * (size.clamp(max=ball.eps) * (1 - 2.0**-power) / size)
        change = torch.where(outside, shorter, change)
    # A radius that is lost in the rounding of the centres.
    moved = (centres.double() + change).to(centres.dtype)
    return torch.where(_wide(distance(moved, centres, ball.norm) > ball.eps, centres), centres, moved)


@torch.no_grad()
def right(
    model: nn.Module, images: Float[Tensor, "batch channels *rest"], labels: Int[Tensor, " batch"]
) -> Bool[Tensor, " batch"]:
    """Which images the model classifies right.

    Args:
        model: the classifier.
        images: to classify.
        labels: the right classes.
    """
    return model(images).argmax(1) == labels


def check_ball(images: Float[Tensor, "batch channels *rest"], ball: Ball) -> None:
    """Refuse images and balls that no attack takes.

    Args:
        images: at least one.
        ball: around each image.

    Raises:
        InvalidInput: an image is outside of [0, 1], the norm is unknown, or eps is not above 0 or beyond the range of
            pixels.
    """
    norm, eps = ball.norm, ball.eps
    if norm not in NORMS:
        raise InvalidInput(f"norm must be one of {sorted(NORMS)}, got {norm=}.")
    largest = 1.0 if norm == "l_inf" else math.sqrt(images[0].numel())
    if not 0 < eps <= largest:
        raise InvalidInput(
            f"eps must be above 0 and at most {largest:g}, beyond which the {norm} ball holds every image with pixels "
            f"in [0, 1], got {eps=}; is it in units of 1/255?"
        )
    low, high = float(images.min()), float(images.max())
    if not (low >= 0 and high <= 1):
        raise InvalidInput(
            f"images must have pixels in [0, 1], got pixels from {low:g} to {high:g}; for tokens and other inputs "
            "without such a range use bench.attacks.tokens."
        )


def _clip(moved: Tensor, images: Tensor, ball: Ball) -> Tensor:
    """Into the ball, then into [0, 1], which keeps it in the ball: the centres are in [0, 1]."""
    change, eps = moved - images, ball.eps
    if ball.norm == "l_inf":
        change = change.clamp(-eps, eps)
    else:
        size = _wide(torch.linalg.vector_norm(change.flatten(1), dim=1), images)
        change = change * (eps / size.clamp(min=eps))
    return (images + change).clamp(0, 1)


def _random(images: Tensor, ball: Ball, generator: torch.Generator) -> Tensor:
    """Uniform in the ball of l_inf; in l2 a uniform direction with a uniform length."""
    shape = {"size": images.shape, "generator": generator, "dtype": images.dtype, "device": generator.device}
    if ball.norm == "l_inf":
        return (ball.eps * (2 * torch.rand(**shape) - 1)).to(images.device)
    lengths = ball.eps * torch.rand(len(images), generator=generator, dtype=images.dtype, device=generator.device)
    return (_wide(lengths, images) * _steepest(torch.randn(**shape), "l2")).to(images.device)


def _steepest(gradient: Tensor, norm: Norm) -> Tensor:
    """The step of length 1 in `norm` along which the loss grows most."""
    if norm == "l_inf":
        return gradient.sign()
    size = torch.linalg.vector_norm(gradient.flatten(1), dim=1)
    return gradient / _wide(torch.where(size > 0, size, 1.0), gradient)


def _wide(values: Tensor, images: Tensor) -> Tensor:
    """One value per image, to be multiplied with images."""
    return values.reshape(-1, *[1] * (images.dim() - 1))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the notes that AutoAttack logs."""
    logging.disable(logging.INFO)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
