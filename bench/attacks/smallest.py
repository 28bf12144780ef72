"""Small perturbations that change the class of an image, found with the attacks of AutoAttack: above the smallest one.

For each image, in this order: FAB, which minimises the norm, at each of the most probable other classes; APGD on the
cross-entropy and at the most probable other classes inside radii below the best so far, by bisection, each image with
its own radius; the point on the segment from the image to what was found at which the class changes. Pixels stay in
[0, 1]. What is returned is the distance of an image of another class, so the smallest perturbation is at most that.
"""

from __future__ import annotations

import dataclasses as dc
import logging
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn


Norm = Literal["L2", "Linf"]
SEED = 0
HALVINGS = 24  # of the segment


@dc.dataclass(frozen=True, kw_only=True)
class Effort:
    """How hard the attacks search.

    Args:
        iterations: of each run of FAB and APGD; AutoAttack-standard takes 100.
        fab_targets: number of the most probable other classes that FAB aims at.
        apgd_targets: likewise for APGD.
        rounds: of bisection.
        lowest: the first radius interval of the bisection starts at this multiple of what FAB found.
    """

    iterations: int = 50
    fab_targets: int = 9
    apgd_targets: int = 3
    rounds: int = 1
    lowest: float = 0.9


def smallest_found(model: nn.Module, images: Tensor, labels: Tensor, norm: Norm, effort: Effort) -> Tensor:
    """Distance to the nearest image of another class that was found, float64, infinite if none was.

    Args:
        model: the classifier, with at least four classes.
        images: 4-dimensional, in [0, 1], all of them classified right.
        labels: their classes.
        norm: of the distance.
        effort: how hard to search.
    """
    found = images.clone()
    best = torch.full((len(images),), torch.inf, dtype=torch.float64, device=images.device)
    # The attacks draw on the CPU and move what they drew; the seed is that of every device.
    with torch.random.fork_rng(devices=[images.device] if images.device.type == "cuda" else []):
        torch.manual_seed(SEED)
        for moved in _fab(model, images, labels, norm, effort):
            _keep(model, images, labels, norm, moved, found, best)
        reached = best.isfinite()
        low, high = effort.lowest * best, best.clone()
        for _ in range(effort.rounds if bool(reached.any()) else 0):
            middle = (low + high) / 2
            for moved in _apgd(model, images[reached], labels[reached], norm, middle[reached], effort):
                everywhere = images.clone()
                everywhere[reached] = moved
                _keep(model, images, labels, norm, everywhere, found, best)
            success = best <= middle
            high, low = torch.where(success, best, high), torch.where(success, low, middle)
            low = torch.minimum(low, high)
    _keep(model, images, labels, norm, _segment(model, images, labels, found), found, best)
    return best


def _fab(model: nn.Module, images: Tensor, labels: Tensor, norm: Norm, effort: Effort) -> Iterator[Tensor]:
    from pyautoattack.fab_pt import FABAttack_PT  # pyright: ignore[reportMissingImports]

    device = str(images.device)
    attack = FABAttack_PT(model, norm=norm, n_iter=effort.iterations, targeted=True, device=device, eps=1.0)
    for rank in range(2, effort.fab_targets + 2):
        attack.target_class = rank  # counted from the most probable class, which is 1
        yield attack.attack_single_run(images, labels, is_targeted=True)


def _apgd(
    model: nn.Module, images: Tensor, labels: Tensor, norm: Norm, radii: Tensor, effort: Effort
) -> Iterator[Tensor]:
    from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted  # pyright: ignore[reportMissingImports]

    shared = {"n_iter": effort.iterations, "norm": norm, "eps": radii.float().reshape(-1, 1, 1, 1), "seed": SEED}
    shared |= {"device": str(images.device), "logger": logging.getLogger("auto-attack")}
    plain = APGDAttack(model, loss="ce", **shared)
    plain.init_hyperparam(images)
    yield plain.attack_single_run(images, labels)[3]
    aimed = APGDAttack_targeted(model, **shared)
    aimed.init_hyperparam(images)
    with torch.no_grad():
        order = model(images).argsort(dim=1)
    for rank in range(2, effort.apgd_targets + 2):
        aimed.y_target = order[:, -rank]
        yield aimed.attack_single_run(images, labels)[3]


@torch.no_grad()
def _segment(model: nn.Module, images: Tensor, labels: Tensor, found: Tensor) -> Tensor:
    """The point of another class nearest to the image that bisection meets on the segment to what was found."""
    low = torch.zeros_like(images[:, :1, :1, :1])
    high = torch.ones_like(low)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        changed = (model(images + middle * (found - images)).argmax(1) != labels).reshape(-1, 1, 1, 1)
        high, low = torch.where(changed, middle, high), torch.where(changed, low, middle)
    return images + high * (found - images)


@torch.no_grad()
def _keep(
    model: nn.Module, images: Tensor, labels: Tensor, norm: Norm, moved: Tensor, found: Tensor, best: Tensor
) -> None:
    """Take over, in place, what has another class, pixels in [0, 1], and is nearer than what was found before."""
    moved = moved.detach()
    inside = (moved.flatten(1).amin(1) >= 0) & (moved.flatten(1).amax(1) <= 1)
    order = 2 if norm == "L2" else float("inf")
    distance = torch.linalg.vector_norm((moved.double() - images.double()).flatten(1), order, dim=1)
    nearer = inside & (model(moved).argmax(1) != labels) & (distance < best)
    found[nearer] = moved[nearer]
    best[nearer] = distance[nearer]
