"""Pictures on disk as tensors."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageOps
from torch import Tensor

from lipbounds.errors import InvalidInput
from lipbounds.models.image_input import ImageInput


SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
SIXTEEN_BITS = ("I;16", "I;16B", "I;16L", "I;16N")


def pictures_in(folder: Path) -> list[Path]:
    """The pictures that lie in a folder itself, by name; hidden files are none.

    Args:
        folder: a folder.

    Raises:
        InvalidInput: something that is named like a picture is no file: a folder, a pipe, a link that leads nowhere.
    """
    found = sorted(
        path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")
    )
    for path in found:
        if not path.is_file():
            raise InvalidInput(f"'{path}' must be a picture, got no ordinary file; take it out of the folder.")
    return found


def picture(path: Path, image: ImageInput | None = None) -> Float[Tensor, "channels height width"]:
    """A picture with values in [0, 1], float32, upright as its EXIF orientation says.

    Sixteen-bit grey values are scaled, not cut off; transparency is dropped.

    Args:
        path: of a file that Pillow reads.
        image: what the model takes; None leaves the picture as it is, in colour.

    Raises:
        InvalidInput: it cannot be read, has too many pixels or values of unknown range, or the model takes neither
            grey nor colour images.
    """
    channels = 3 if image is None else image.channels
    if channels not in (1, 3):
        raise InvalidInput(f"the model must take grey or colour images to be run on pictures, got {channels} channels.")
    return as_input(_upright(path), image)


def as_input(opened: Image.Image, image: ImageInput | None = None) -> Float[Tensor, "channels height width"]:
    """A picture of eight bits a channel with values in [0, 1], float32, as a model takes it.

    Args:
        opened: the picture.
        image: what the model takes; None leaves the picture as it is, in colour.
    """
    channels = 3 if image is None else image.channels
    opened = opened.convert("L" if channels == 1 else "RGB")
    if image is not None and image.prepare is not None:
        return image.prepare(opened).float().contiguous()
    sized = opened if image is None else opened.resize((image.width, image.height))
    pixels = torch.from_numpy(np.array(sized, dtype=np.float32) / 255)
    return pixels.view(sized.height, sized.width, channels).permute(2, 0, 1).contiguous()


def _upright(path: Path) -> Image.Image:
    """The picture, turned as it is meant, of eight bits a channel."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as opened:
                opened.load()
                found = ImageOps.exif_transpose(opened)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise InvalidInput(
            f"'{path}' must have at most {Image.MAX_IMAGE_PIXELS} pixels, as Pillow allows; scale it down, or take it "
            "out of the folder."
        ) from error
    except Exception as error:  # each format has errors of its own for a damaged file
        raise InvalidInput(f"'{path}' must be a picture, but it cannot be read; take it out of the folder.") from error
    if found.mode in SIXTEEN_BITS or (found.mode == "I" and opened.format == "PNG"):
        values = np.asarray(found).astype(np.float64)
        return Image.fromarray(np.rint(values * (255 / 65535)).astype(np.uint8))
    if found.mode in ("I", "F"):
        kind = "floating-point" if found.mode == "F" else "32-bit"
        raise InvalidInput(
            f"'{path}' must have 8 or 16 bits a channel, got {kind} values, whose range it does not say; convert it."
        )
    return found
