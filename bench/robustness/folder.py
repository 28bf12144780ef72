"""Labelled images: a folder with a folder for each class, pictures with their class in the name, or a data set."""

from __future__ import annotations

import dataclasses as dc
import json
import random
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bench.workloads.hashes import tensors_hash
from lipbounds.errors import InvalidInput
from lipbounds.models.digits_data import load_digits_split
from lipbounds.models.image_data import is_image_data, read_image_data
from lipbounds.models.image_input import ImageInput
from lipbounds.models.pictures import SUFFIXES, picture, pictures_in


SAMPLE_SEED = 0
CLASS_IN_NAME = re.compile(r"_([0-9]{1,9})$")
DIGITS = "digits"  # the bundled test images, where no folder has that name


@dc.dataclass(frozen=True, kw_only=True)
class LabelledFolder:
    """Images of a folder, or of the bundled digits.

    Args:
        images: in [0, 1].
        labels: the right classes.
        names: their paths in the folder.
        classes: number of class folders.
        available: number of images there are.
        numbered: whether the names of the class folders are the numbers of the classes.
        source: where a data set comes from, and its licence; empty for folders of pictures.
    """

    images: Float[Tensor, "n channels height width"]
    labels: Int[Tensor, " n"]
    names: list[str]
    classes: int
    available: int
    numbered: bool
    source: str = ""

    def hash(self) -> str:
        """Of pixels and labels."""
        return tensors_hash([("images", self.images), ("labels", self.labels)])


def read_images(where: Path, count: int, *, settings: ImageInput | None, classes: Mapping[str, int]) -> LabelledFolder:
    """A sample of the images of a data set or of a folder, drawn as in `read_folder`.

    Args:
        where: `digits`, the test images of the digits in this package; `mnist-5k`; a folder with the IDX files of MNIST
            or Fashion-MNIST, of which the test images are taken; a folder of pictures whose names end in an underscore
            and the number of the class (`shoe_00_7.png`); or one as `read_folder` takes it.
        count: of images; fewer if there are fewer.
        settings: what the model takes.
        classes: the number of each class by its name, where folders are called by names.

    Raises:
        InvalidInput: there is no such data set or folder, or what it holds is damaged.
        LipboundsError: the package of a data set is not installed.
    """
    if count < 1:
        raise InvalidInput(f"count must be at least 1, got {count}.")
    if str(where) == DIGITS and not where.exists():
        return _digits(count, settings, classes)
    if is_image_data(where):
        data = read_image_data(where)
        numbers = _sample([*range(len(data))], count)
        return LabelledFolder(
            images=torch.stack([data.image(number, settings) for number in numbers]),
            labels=data.labels[numbers],
            names=[f"{data.name}, image {number}" for number in numbers],
            classes=len(data.labels.unique()),
            available=len(data),
            numbered=False,
            source=data.source,
        )
    pictures = pictures_in(where) if where.is_dir() else []
    if not pictures:
        return read_folder(where, count, settings=settings, classes=classes)
    chosen = _sample(labelled_by_name(pictures), count)
    return LabelledFolder(
        images=_read([path for path, _ in chosen], where, settings),
        labels=torch.tensor([number for _, number in chosen]),
        names=[path.name for path, _ in chosen],
        classes=len({number for _, number in chosen}),
        available=len(pictures),
        numbered=False,
    )


def _digits(count: int, settings: ImageInput | None, classes: Mapping[str, int]) -> LabelledFolder:
    test = load_digits_split().test
    shape = tuple(test.images.shape[1:])
    if settings is not None and (settings.channels, settings.height, settings.width) != shape:
        raise InvalidInput(
            f"--images {DIGITS} are of shape {shape}, but the model takes {settings.channels} x {settings.height} x "
            f"{settings.width}; pass a folder of pictures by --images DIR."
        )
    chosen = _sample([*range(len(test))], count)
    numbers = class_numbers([str(digit) for digit in range(10)], classes)
    return LabelledFolder(
        images=test.images[chosen],
        labels=torch.tensor([numbers[str(int(test.labels[place]))] for place in chosen]),
        names=[f"{DIGITS}/{int(test.indices[place])}" for place in chosen],
        classes=len(numbers),
        available=len(test),
        numbered=not classes,
        source="test digits of this package (scikit-learn's digits)",
    )


def labelled_by_name(pictures: list[Path]) -> list[tuple[Path, int]]:
    """Pictures with the class that their names end in.

    Args:
        pictures: such as `shoe_00_7.png`, of class 7.

    Raises:
        InvalidInput: a name does not end so.
    """
    found = [(path, CLASS_IN_NAME.search(path.stem)) for path in pictures]
    without = [path.name for path, match in found if match is None]
    if without:
        raise InvalidInput(
            "pictures must lie in a folder for each class, or end in an underscore and the number of their class, such "
            f"as shoe_00_7.png, got {len(without)} others such as {without[0]!r}."
        )
    return [(path, int(match[1])) for path, match in found if match is not None]


def read_folder(folder: Path, count: int, *, settings: ImageInput | None, classes: Mapping[str, int]) -> LabelledFolder:
    """A sample of the images of a folder: drawn evenly without replacement with a fixed seed, then sorted by name.

    The class of a folder is what `classes` says of its name. Where no folder has such a name, they may be called by the
    numbers of all classes, from 0. Hidden folders and those that archives leave behind (__MACOSX) are passed over.

    Args:
        folder: holds one folder a class, and these hold pictures.
        count: of images; fewer if there are fewer.
        settings: what the model takes: pictures are prepared for it; None leaves them as they are, in colour.
        classes: the number of each class by its name, where the model or the user knows names.

    Raises:
        InvalidInput: there is no such folder, it holds no pictures in folders, the class of one is not known, a picture
            cannot be read, or they are of several sizes.
    """
    if count < 1:
        raise InvalidInput(f"count must be at least 1, got {count}.")
    inner = folder.iterdir() if folder.is_dir() else []
    folders = sorted(path for path in inner if path.is_dir() and not path.name.startswith((".", "__")))
    numbers = class_numbers([path.name for path in folders], classes)
    found = [(path, numbers[part.name]) for part in folders for path in pictures_in(part)]
    if not found:
        raise InvalidInput(
            f"images must be a folder with a folder of pictures ({', '.join(SUFFIXES)}) for each class, got '{folder}'."
        )
    chosen = _sample(found, count)
    return LabelledFolder(
        images=_read([path for path, _ in chosen], folder, settings),
        labels=torch.tensor([number for _, number in chosen]),
        names=[path.relative_to(folder).as_posix() for path, _ in chosen],
        classes=len(folders),
        available=len(found),
        numbered=not any(path.name in classes for path in folders),
    )


def _sample(found: list[Any], count: int) -> list[Any]:
    """Some of them, drawn evenly with a fixed seed, in order."""
    return sorted(random.Random(SAMPLE_SEED).sample(found, min(count, len(found))))


def _read(paths: list[Path], folder: Path, settings: ImageInput | None) -> Tensor:
    read = [picture(path, settings) for path in paths]
    if len({image.shape for image in read}) > 1:
        raise InvalidInput(f"the pictures in '{folder}' must be of one size, got several; resize them.")
    return torch.stack(read)


def class_numbers(names: list[str], classes: Mapping[str, int]) -> dict[str, int]:
    """The class of each folder; nothing is guessed from the order of names.

    Args:
        names: of the folders.
        classes: the number of each class by its name.

    Raises:
        InvalidInput: a name is none of the classes, and they are not the numbers of all classes.
    """
    unknown = [name for name in names if name not in classes]
    if not unknown:
        return {name: classes[name] for name in names}
    numbers = {name: int(name) for name in names if name.isascii() and name.isdecimal()}
    count = len(set(classes.values())) or len(names)
    if len(numbers) == len(names) and sorted(numbers.values()) == list(range(count)):
        return numbers
    known = f"such as {', '.join(map(repr, list(classes)[:3]))}" if classes else "of which it says none"
    raise InvalidInput(
        f"the folders must be called as the model names its classes ({known}), or 0 to {count - 1}, got "
        f"{len(unknown)} other names such as {unknown[0]!r}; pass --classes FILE, a JSON object with the number of the "
        "class of each folder by its name."
    )


def read_classes(path: Path) -> dict[str, int]:
    """The number of the class of each folder by its name, from a JSON object.

    Args:
        path: the file.

    Raises:
        InvalidInput: there is no such file, or it holds something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except ValueError as error:
        raise InvalidInput(f"classes must be a file with a JSON object, got '{path}', which holds none.") from error
    if not isinstance(found, dict) or not found or not all(type(number) is int for number in found.values()):
        raise InvalidInput(
            f'classes must be a file with a JSON object such as {{"cat": 3}}, the number of the class of each folder '
            f"by its name, got '{path}'."
        )
    return found
