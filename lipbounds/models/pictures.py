"""Pictures on disk as tensors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from lipbounds.errors import InvalidInput


SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")


def pictures_in(folder: Path) -> list[Path]:
    """The pictures that lie in a folder itself, by name.

    Args:
        folder: a folder.
    """
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)


def picture(path: Path, channels: int, size: tuple[int, int] | None = None) -> Float[Tensor, "channels height width"]:
    """A picture with values in [0, 1], float32.

    Args:
        path: of a file that Pillow reads.
        channels: 1 for grey, 3 for colour.
        size: height and width in pixels to bring it to, whatever its shape; None leaves it as it is.

    Raises:
        InvalidInput: it cannot be read.
    """
    try:
        with Image.open(path) as opened:
            converted = opened.convert("L" if channels == 1 else "RGB")
            sized = converted if size is None else converted.resize((size[1], size[0]))
    except (UnidentifiedImageError, OSError) as error:
        raise InvalidInput(f"'{path}' must be a picture, but it cannot be read; take it out of the folder.") from error
    pixels = torch.from_numpy(np.array(sized, dtype=np.float32) / 255)
    return pixels.view(sized.height, sized.width, channels).permute(2, 0, 1).contiguous()
