"""The images that a model takes: their size, and how pixels are normalised."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


@dc.dataclass(frozen=True, kw_only=True)
class ImageInput:
    """What the images of a model look like.

    Args:
        channels: of an image.
        height: in pixels.
        width: in pixels.
        mean: subtracted from each channel of an image with values in [0, 1]; empty if nothing is.
        std: by which each channel is then divided; empty if it is not.
        prepare: makes of an 8-bit picture of Pillow, grey or RGB, an image with values in [0, 1]; None: it is resized
            to `height` and `width`.
    """

    channels: int
    height: int
    width: int
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    prepare: Callable[[Any], Tensor] | None = dc.field(default=None, compare=False, repr=False)

    def normalised(self, images: Float[Tensor, "*batch channels height width"]) -> Tensor:
        """The images as the model takes them, of the same shape.

        Args:
            images: values in [0, 1].
        """
        for values, apply in ((self.mean, torch.sub), (self.std, torch.div)):
            if values:
                images = apply(images, torch.tensor(values, dtype=images.dtype, device=images.device)[:, None, None])
        return images
