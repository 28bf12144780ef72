"""What a study trains and attacks: images with their three parts, and the model that is drawn for them."""

from __future__ import annotations

import dataclasses as dc
import functools
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from bench.robustness.image_vit import ImageViT
from bench.robustness.profiles import LARGER_PROFILES, PROFILES
from bench.robustness.settings import Profile
from bench.workloads.hashes import tensors_hash
from lipbounds.errors import InvalidInput
from lipbounds.models.digits_data import DigitsSplit, LabelledImages, load_digits_split
from lipbounds.models.digits_vit import CLASSES, DigitsViT
from lipbounds.models.image_data import ImageData, is_image_data, read_image_data


SIDE, PATCH, DIM, DEPTH = 28, 7, 64, 4
SPLIT_SEED = 0
HELD_OUT = 0.1  # share of the training images that weights and epochs are chosen with, and of one part that is judged


@dc.dataclass(frozen=True, kw_only=True)
class Study:
    """Images and the model that is trained on them.

    Args:
        name: of the page; empty for the digits.
        about: images, parts and model, for the reader of the page.
        data: images and architecture, as recipes hold them; empty for the digits.
        split: the images.
        make: draws a model from torch's global generator.
    """

    name: str = ""
    about: str = ""
    data: str = ""
    split: DigitsSplit
    make: Callable[[], nn.Module] = DigitsViT


def profiles_of(name: str) -> Mapping[str, Profile]:
    """The profiles of a study.

    Args:
        name: of the study.
    """
    return LARGER_PROFILES if name else PROFILES


def study_of(where: Path | None) -> Study:
    """The study of these images.

    Args:
        where: `mnist-5k`, or a folder with the four IDX files of MNIST or Fashion-MNIST; None for the digits.

    Raises:
        InvalidInput: there are no such images, or they are no grey ones of 28 x 28 pixels in ten classes.
        LipboundsError: the package that holds `mnist-5k` is not installed.
    """
    if where is None:
        return Study(split=load_digits_split())
    if not is_image_data(where, "train"):
        raise InvalidInput(
            "--train-on must be mnist-5k, or a folder with the IDX files of MNIST or Fashion-MNIST (train-images-idx3-"
            f"ubyte and the other three, each with or without .gz), got '{where}'."
        )
    split, first = _split(where)
    name = re.sub(r"\W+", "_", first.name).strip("_").lower() or "images"
    counts = ", ".join(
        f"{len(part)} {what}" for part, what in ((split.train, "to train"), (split.validation, "to choose"))
    )
    return Study(
        name=name,
        about=(
            f"{first.source}; {counts} and {len(split.test)} to test; ViT with patches of {PATCH} x {PATCH} pixels, "
            f"{DIM} features, {DEPTH} blocks"
        ),
        data=f"{first.name} {_hash(split)}, ViT {SIDE} {PATCH} {DIM} {DEPTH}",
        split=split,
        make=functools.partial(ImageViT, SIDE, PATCH, DIM, DEPTH),
    )


def _split(where: Path) -> tuple[DigitsSplit, ImageData]:
    """Three parts with the classes in equal shares; the test files where there are some, and else a share held out."""
    first = _checked(read_image_data(where, "train"))
    rest = torch.arange(len(first))
    if is_image_data(where, "test") and where.is_dir():
        test = _part(_checked(read_image_data(where, "test")))
    else:
        rest, held = _apart(first.labels, rest)
        test = _part(first, held)
    kept, chosen = _apart(first.labels, rest)
    return DigitsSplit(_part(first, kept), _part(first, chosen), test), first


def _checked(data: ImageData) -> ImageData:
    if tuple(data.pixels.shape[1:]) != (SIDE, SIDE) or int(data.labels.max()) >= CLASSES:
        raise InvalidInput(
            f"--train-on must hold images of {SIDE} x {SIDE} pixels with labels below {CLASSES}, got "
            f"{tuple(data.pixels.shape[1:])} and labels up to {int(data.labels.max())}."
        )
    return data


def _apart(labels: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Most of these images, and `HELD_OUT` of each class, both in an order drawn with a fixed seed."""
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    drawn = numbers[torch.randperm(len(numbers), generator=generator)]
    of_class = torch.nn.functional.one_hot(labels[drawn], CLASSES)
    place = (of_class.cumsum(0) - 1).gather(1, labels[drawn].unsqueeze(1)).squeeze(1)  # among those of its class
    held = place < HELD_OUT * of_class.sum(0)[labels[drawn]]
    return drawn[~held], drawn[held]


def _part(data: ImageData, numbers: Tensor | None = None) -> LabelledImages:
    """Images by number; by default all of them, in an order drawn with a fixed seed: files may be sorted by class."""
    if numbers is None:
        numbers = torch.randperm(len(data), generator=torch.Generator().manual_seed(SPLIT_SEED))
    return LabelledImages(data.pixels[numbers].unsqueeze(1).float() / 255, data.labels[numbers], numbers)


def _hash(split: DigitsSplit) -> str:
    parts = {"train": split.train, "validation": split.validation, "test": split.test}
    return tensors_hash(
        (f"{name} {what}", values)
        for name, part in parts.items()
        for what, values in (("images", part.images), ("labels", part.labels))
    )
