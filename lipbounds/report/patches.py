"""The picture behind the tokens of a vision transformer: where each patch lies, and its pixels for the page."""

from __future__ import annotations

import base64
import dataclasses as dc

import torch
from jaxtyping import Float
from torch import Tensor

from lipbounds.errors import InvalidInput


EXTRA_TOKENS = (1, 0, 2, 5)  # a class token; none; class and distillation; class and four registers


@dc.dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """An image as the page shows it.

    Args:
        width: in pixels.
        height: in pixels.
        rgb: three bytes per pixel, row by row, in base64.
    """

    width: int
    height: int
    rgb: str


@dc.dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Which tokens are patches of the picture: those after the first few, row by row.

    Args:
        first: number of tokens before the patches.
        rows: of patches.
        columns: of patches.
    """

    first: int
    rows: int
    columns: int


def picture_of(image: Float[Tensor, "channels height width"]) -> Picture:
    """The picture for the page.

    Args:
        image: values in [0, 1]; one channel is grey, three are red, green and blue.

    Raises:
        InvalidInput: another number of channels.
    """
    if image.dim() != 3 or image.shape[0] not in (1, 3):
        raise InvalidInput(f"picture must have 1 or 3 channels, height and width, got shape {tuple(image.shape)}.")
    pixels = (255 * image.detach().cpu().double().clamp(0, 1)).round().to(torch.uint8).expand(3, -1, -1)
    rgb = base64.b64encode(bytes(pixels.permute(1, 2, 0).flatten().tolist())).decode()
    return Picture(width=image.shape[-1], height=image.shape[-2], rgb=rgb)


def grid_of(tokens: int, picture: Picture) -> Grid | None:
    """The patches among that many tokens; None where no square patch gives their number.

    The number of tokens is all there is to tell from, so that a model with another order of its patches is shown wrong.

    Args:
        tokens: of a layer.
        picture: that the model was given.
    """
    for first in EXTRA_TOKENS:
        for side in range(1, min(picture.width, picture.height) + 1):
            rows, columns = picture.height // side, picture.width // side
            whole = rows * side == picture.height and columns * side == picture.width
            if whole and rows * columns > 1 and rows * columns == tokens - first:
                return Grid(first=first, rows=rows, columns=columns)
    return None


def labels_of(grid: Grid) -> tuple[str, ...]:
    """A label for each token: where a patch lies, counted from 1 at the top left."""
    before = ("class",) if grid.first == 1 else tuple(f"extra {number + 1}" for number in range(grid.first))
    patches = ((row, column) for row in range(1, grid.rows + 1) for column in range(1, grid.columns + 1))
    return (*before, *(f"row {row}, col {column}" for row, column in patches))
