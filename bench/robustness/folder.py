"""Labelled images from a folder with a folder for each class, as CIFAR and ImageNet are laid out on disk."""

from __future__ import annotations

import dataclasses as dc
import random
from collections.abc import Mapping
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bench.workloads.models import tensors_hash
from lipbounds.errors import InvalidInput
from lipbounds.models.loading import ImageInput
from lipbounds.models.pictures import SUFFIXES, picture, pictures_in


SAMPLE_SEED = 0


@dc.dataclass(frozen=True, kw_only=True)
class LabelledFolder:
    """Images of a folder.

    Args:
        images: in [0, 1].
        labels: the right classes.
        names: their paths in the folder.
        classes: number of class folders.
        available: number of images in the folder.
    """

    images: Float[Tensor, "n channels height width"]
    labels: Int[Tensor, " n"]
    names: list[str]
    classes: int
    available: int

    def hash(self) -> str:
        """Of pixels and labels."""
        return tensors_hash([("images", self.images), ("labels", self.labels)])


def read_folder(folder: Path, count: int, *, settings: ImageInput | None, classes: Mapping[str, int]) -> LabelledFolder:
    """A sample of the images of a folder: drawn evenly without replacement with a fixed seed, then sorted by name.

    Args:
        folder: holds one folder a class, and these hold pictures.
        count: of images; fewer if there are fewer.
        settings: what the model takes: pictures are brought to that size; None leaves them as they are, in colour.
        classes: the number of each class by its name, where the model knows names; a folder that is none of them makes
            all folders be numbered in the order of their names.

    Raises:
        InvalidInput: there is no such folder, it holds no pictures in folders, one cannot be read, or they are of
            several sizes.
    """
    if count < 1:
        raise InvalidInput(f"count must be at least 1, got {count}.")
    folders = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    known = all(path.name in classes for path in folders)
    numbers = {path: classes[path.name] if known else place for place, path in enumerate(folders)}
    found = [(path, number) for inner, number in numbers.items() for path in pictures_in(inner)]
    if not found:
        raise InvalidInput(
            f"images must be a folder with a folder of pictures ({', '.join(SUFFIXES)}) for each class, got '{folder}'."
        )
    chosen = sorted(random.Random(SAMPLE_SEED).sample(found, min(count, len(found))))
    channels, size = (3, None) if settings is None else (settings.channels, (settings.height, settings.width))
    read = [picture(path, channels, size) for path, _ in chosen]
    if len({image.shape for image in read}) > 1:
        raise InvalidInput(f"the pictures in '{folder}' must be of one size, got several; resize them.")
    return LabelledFolder(
        images=torch.stack(read),
        labels=torch.tensor([number for _, number in chosen]),
        names=[path.relative_to(folder).as_posix() for path, _ in chosen],
        classes=len(folders),
        available=len(found),
    )
