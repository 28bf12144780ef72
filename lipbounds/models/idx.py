"""Labelled images in IDX files, the format of MNIST and Fashion-MNIST: read as data, every number checked.

A file begins with two zero bytes, 8 for unsigned bytes and the number of dimensions, then the dimensions as 32-bit
numbers, most significant byte first, then the values; the whole may be packed by gzip.
Source: Y. LeCun, C. Cortes, C. Burges, The MNIST database of handwritten digits, "File formats".
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from io import BufferedIOBase
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from lipbounds.errors import InvalidInput


Part = Literal["train", "test"]
PREFIXES: dict[Part, str] = {"train": "train", "test": "t10k"}
UNSIGNED_BYTES = 8
LARGEST = 2**30  # values: far above MNIST (4.7e7), far below what a forged header can ask for


def has_idx_files(folder: Path, part: Part = "test") -> bool:
    """Whether a folder holds IDX files of images of that part.

    Args:
        folder: any path.
        part: `train` or `test`.
    """
    return _find(folder, part, "images", 3) is not None


def read_idx_folder(
    folder: Path, part: Part = "test"
) -> tuple[UInt8[Tensor, "n height width"], Int[Tensor, " n"], list[Path]]:
    """Images and labels of one part, and the two files they come from.

    Args:
        folder: with `t10k-images-idx3-ubyte` and `t10k-labels-idx1-ubyte` (or `train-...`), with or without `.gz`, or
            with a dot before `idx`.
        part: `train` or `test`.

    Raises:
        InvalidInput: a file is missing or damaged, or there is not one label for each image.
    """
    paths = []
    for what, dimensions in (("images", 3), ("labels", 1)):
        path = _find(folder, part, what, dimensions)
        if path is None:
            raise InvalidInput(
                f"the folder must hold {PREFIXES[part]}-{what}-idx{dimensions}-ubyte or that name with .gz, got "
                f"'{folder}' without; copy the files of MNIST or Fashion-MNIST there."
            )
        paths.append(path)
    images, labels = read_idx(paths[0], 3), read_idx(paths[1], 1)
    if len(images) != len(labels) or not images.numel():
        raise InvalidInput(
            f"'{folder}' must hold a label for each image, and an image, got {len(images)} images and {len(labels)} "
            "labels; the two files are of different data sets."
        )
    return images, labels.long(), paths


def read_idx(path: Path, dimensions: int) -> UInt8[Tensor, "*shape"]:
    """The values of an IDX file of unsigned bytes.

    Args:
        path: the file, packed by gzip where its name ends in `.gz`.
        dimensions: that it must have.

    Raises:
        InvalidInput: the file is not such a file, or is shorter or longer than it says.
    """
    try:
        with _opened(path) as file:
            shape = _shape(file, path, dimensions)
            size = math.prod(shape)
            values = bytearray(file.read(size + 1))  # one more shows what is too long, without unpacking all of it
    except (OSError, EOFError, zlib.error) as error:
        raise InvalidInput(f"'{path}' must be an IDX file, but it cannot be read: {error}.") from error
    if len(values) != size:
        found = "more" if len(values) > size else f"{len(values)}"
        raise InvalidInput(f"'{path}' must hold {size} values, as its header says, got {found}; copy it again.")
    if not size:
        return torch.empty(shape, dtype=torch.uint8)
    return torch.frombuffer(values, dtype=torch.uint8).reshape(shape)


def _opened(path: Path) -> BufferedIOBase:
    return gzip.GzipFile(path, "rb") if path.suffix == ".gz" else path.open("rb")


def _shape(file: BufferedIOBase, path: Path, dimensions: int) -> tuple[int, ...]:
    header = file.read(4)
    if header != bytes([0, 0, UNSIGNED_BYTES, dimensions]):
        raise InvalidInput(
            f"'{path}' must be an IDX file of unsigned bytes with {dimensions} dimension(s), which begins with "
            f"{bytes([0, 0, UNSIGNED_BYTES, dimensions]).hex()}, got {header.hex() or 'no byte'}."
        )
    sizes = file.read(4 * dimensions)
    if len(sizes) < 4 * dimensions:
        raise InvalidInput(f"'{path}' must be an IDX file, got one that ends in its header; copy it again.")
    shape = struct.unpack(f">{dimensions}I", sizes)
    if math.prod(shape) > LARGEST:
        raise InvalidInput(f"'{path}' must hold at most {LARGEST} values, got a header that says {shape}.")
    return shape


def _find(folder: Path, part: Part, what: str, dimensions: int) -> Path | None:
    names = [f"{PREFIXES[part]}-{what}{mark}idx{dimensions}-ubyte{end}" for mark in "-." for end in ("", ".gz")]
    return next((folder / name for name in names if (folder / name).is_file()), None)
