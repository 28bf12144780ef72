"""Robust training where a GPU makes it a matter of minutes: a ViT on Fashion-MNIST, or on digits where there is none.

Each setting and seed is one result: a model trained, its accuracy, and what FGSM, PGD-40 and AutoAttack-standard leave
of it in one l_inf ball. AutoAttack sees the images that the others left. Weights of penalties are the middle ones of
their grids (bench/robustness/settings.py), not chosen on validation data; the model is that of the last epoch.
"""

from __future__ import annotations

import copy
import dataclasses as dc
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from bench.attacks.images import Ball, autoattack, fgsm, pgd, right, within
from bench.robustness.attacked import ATTACK_SEED, PGD_STEPS
from bench.robustness.choice import tried
from bench.robustness.image_vit import ImageViT
from bench.robustness.measures import network_constants
from bench.robustness.settings import SETTINGS, Setting, recipe
from lipbounds.errors import InvalidInput
from lipbounds.models.digits_data import load_digits_split
from lipbounds.models.digits_vit import CLASSES
from lipbounds.models.idx import Part, read_idx_folder
from lipbounds.models.training import share_of_peak_rate


EPS = 0.1
PEAK_LEARNING_RATE = 1e-3
CONSTANTS = 32  # test images at which the local constant is measured


@dc.dataclass(frozen=True, kw_only=True)
class Size:
    """How much is done for a model.

    Args:
        seeds: one model each.
        settings: names.
        epochs: passes over the training images.
        batch: images of a step.
        train: training images, the first ones.
        attacked: test images, the first ones.
        dim: features of a token.
        depth: number of blocks.
    """

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    settings: tuple[str, ...] = tuple(SETTINGS)
    epochs: int = 10
    batch: int = 256
    train: int = 60_000
    attacked: int = 500
    dim: int = 64
    depth: int = 4


# Trained enough that some images are right, and there is something to attack.
QUICK = Size(seeds=(0,), settings=("none", "jasmin"), epochs=10, batch=32, train=1000, attacked=4, dim=64, depth=1)


@dc.dataclass(frozen=True, eq=False, kw_only=True)
class Data:
    """Images in [0, 1] with their classes, on the CPU.

    Args:
        name: of the data.
        train: images and classes.
        test: likewise.
        patch: side of the patches of the model.
    """

    name: str
    train: tuple[Float[Tensor, "n 1 side side"], Int[Tensor, " n"]]
    test: tuple[Float[Tensor, "k 1 side side"], Int[Tensor, " k"]]
    patch: int


def load(folder: Path | None) -> Data:
    """Fashion-MNIST from its four files, or the digits of scikit-learn.

    Args:
        folder: as `lipbounds.models.idx.read_idx_folder` reads it, both parts; None for the digits.

    Raises:
        InvalidInput: a file is missing or damaged, or holds other images.
    """
    if folder is None:
        split = load_digits_split()
        parts = ((part.images, part.labels) for part in (split.train, split.test))
        train, test = parts
        return Data(name="digits 8 x 8", train=train, test=test, patch=2)
    train, test = (_images(folder, part) for part in get_args(Part))
    return Data(name="Fashion-MNIST", train=train, test=test, patch=4)


def _images(folder: Path, part: Part) -> tuple[Tensor, Tensor]:
    images, labels, _ = read_idx_folder(folder, part)
    if images.shape[1:] != (28, 28) or int(labels.max()) >= CLASSES:
        raise InvalidInput(
            f"data must hold images of 28 x 28 pixels with labels below {CLASSES}, got {tuple(images.shape[1:])} "
            f"pixels and labels up to {int(labels.max())} in '{folder}'."
        )
    return images.unsqueeze(1).float() / 255, labels


def weight_of(setting: Setting) -> float | None:
    """The middle weight of the grid of a setting; None where it has none.

    Args:
        setting: the setting.
    """
    return tried(setting.grid, 1)[0] if setting.grid else None


def measured(name: str, seed: int, data: Data, size: Size, device: torch.device) -> dict[str, Any]:
    """Clean and robust accuracy of one model, and its mean local constant in l2.

    Args:
        name: of the setting.
        seed: of all that is random.
        data: the images.
        size: how much is done.
        device: where.
    """
    model = trained(name, seed, data, size, device)
    images, labels = (part[: size.attacked].to(device) for part in data.test)
    with torch.enable_grad():
        found = _attacked(model, images, labels)
        constants, _ = network_constants(copy.deepcopy(model).double(), images[:CONSTANTS].double())
    return {"data": data.name, "setting": name, "seed": seed, "weight": weight_of(SETTINGS[name]), "eps": EPS} | {
        "images": len(images),
        "constant": float(constants.mean()),
        **found,
    }


def trained(name: str, seed: int, data: Data, size: Size, device: torch.device) -> nn.Module:
    """The model of a setting after the last epoch, its parameters without gradient.

    Args:
        name: of the setting.
        seed: of the first weights, the order of the images, adversary and penalty.
        data: the images.
        size: how much is done.
        device: where.
    """
    from bench.robustness.penalties import loss_of  # its imports take seconds

    setting = SETTINGS[name]
    how = recipe(setting, weight_of(setting), epochs=size.epochs, seed=seed)
    images, labels = (part[: size.train].to(device) for part in data.train)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        model = ImageViT(images.shape[-1], data.patch, size.dim, size.depth).to(device).train()
    generator, steps = torch.Generator().manual_seed(seed), size.epochs * math.ceil(len(labels) / size.batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LEARNING_RATE, weight_decay=how.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: share_of_peak_rate(step, steps))
    loss = loss_of(how)
    with torch.enable_grad():
        for _ in range(size.epochs):
            order = torch.randperm(len(labels), generator=generator).to(device)
            for chosen in order.split(size.batch):
                value = loss(model, images[chosen], labels[chosen], generator)
                optimizer.zero_grad()
                value.backward()
                optimizer.step()
                schedule.step()
    return model.eval().requires_grad_(False)


def _attacked(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, float]:
    """The share of the images that is right, as they are and after each attack and all before it."""
    ball, standing = Ball("l_inf", EPS), right(model, images, labels)
    found = {"clean": float(standing.double().mean())}
    generator = torch.Generator().manual_seed(ATTACK_SEED)
    attacks: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "fgsm": lambda x, y: fgsm(model, x, y, ball),
        "pgd": lambda x, y: pgd(model, x, y, ball, steps=PGD_STEPS, generator=generator),
        "autoattack": lambda x, y: within(
            x, autoattack(model, x, y, ball, seed=ATTACK_SEED).double() - x.double(), ball
        ),
    }
    for name, attack in attacks.items():
        places = standing.nonzero()[:, 0]
        if len(places):
            x, y = images[places], labels[places]
            standing = standing.clone()
            standing[places] = right(model, attack(x, y), y)
        found[name] = float(standing.double().mean())
    return found
