"""What a Hugging Face image processor does to pictures, by running it.

A processor moves pixels (resize, crop, with its own filters), then rescales and normalises them. The first part is run
as it is on every picture. The second is a scale and a shift for each channel, which attacks and bounds need as a
formula: it is read from the settings, and compared with what the processor makes of a picture. A processor that does
anything else is refused.
"""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, PreTrainedModel
from transformers.image_processing_base import ImageProcessingMixin

from lipbounds.errors import InvalidInput, Unsupported
from lipbounds.models.hub import clear_errors, not_found
from lipbounds.models.image_input import ImageInput


TOLERANCE = 1e-5  # some tens of roundings of float32


def image_input(name_or_path: str | Path, model: PreTrainedModel, *, trust_remote_code: bool = False) -> ImageInput:
    """Size of the images of a model, how its processor makes them of a picture, and how they are normalised.

    Without preprocessor_config.json pictures are brought to the `image_size` of the config, and pixels in [0, 1] go in
    as they are.

    Args:
        name_or_path: where the model is from.
        model: an image model whose config has an `image_size`.
        trust_remote_code: run the code that comes with the checkpoint.

    Raises:
        InvalidInput: the settings of the processor are damaged, or do not go with the model.
        Unsupported: the processor does something else than move pixels, rescale and normalise.
    """
    with clear_errors(name_or_path, "an image model with an image processor that transformers can build"):
        size: Any = model.config.image_size
        height, width = (int(side) for side in (size if isinstance(size, list | tuple) else (size, size)))
        channels = int(getattr(model.config, "num_channels", 3))
        try:
            settings = ImageProcessingMixin.get_image_processor_dict(str(name_or_path))[0]
        except OSError:
            return ImageInput(channels=channels, height=height, width=width)
        _check_settings(name_or_path, settings, channels)
        processor = AutoImageProcessor.from_pretrained(str(name_or_path), trust_remote_code=trust_remote_code)
        return _checked(name_or_path, processor, channels, (height, width))


def _check_settings(name_or_path: str | Path, settings: dict[str, Any], channels: int) -> None:
    """One line for what makes the processor raise, or divide by zero."""
    if not settings.get("do_normalize", True):
        return
    mean, std = (settings.get(key) for key in ("image_mean", "image_std"))
    for values in (mean, std):
        if values is not None and len(values) != channels:
            reason = f"preprocessor_config.json must hold {channels} means and as many standard deviations"
            raise InvalidInput(not_found(name_or_path, f"{reason}, got {mean} and {std}"))
    if std is not None and not all(float(value) > 0 for value in std):
        raise InvalidInput(
            not_found(name_or_path, f"preprocessor_config.json must hold positive standard deviations, got {std}")
        )


def _checked(name_or_path: str | Path, processor: Any, channels: int, size: tuple[int, int]) -> ImageInput:
    """What the settings say, if it is what the processor does with a picture of random pixels."""

    def moved(picture: Image.Image) -> Float[Tensor, "channels height width"]:
        """The pixels of a picture after resizing and cropping, in [0, 1]."""
        return _run(processor, picture, channels, do_rescale=False, do_normalize=False) / 255

    pixels = np.random.default_rng(0).integers(0, 256, (*size, channels), dtype=np.uint8)
    picture = Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
    before, after = moved(picture), _run(processor, picture, channels)
    scale = 255 * (float(processor.rescale_factor) if getattr(processor, "do_rescale", False) else 1.0)
    normalises = bool(getattr(processor, "do_normalize", False))
    mean, std = (
        [float(value) / scale for value in getattr(processor, name)] if normalises else [other / scale] * channels
        for name, other in (("image_mean", 0.0), ("image_std", 1.0))
    )
    image = ImageInput(
        channels=channels,
        height=before.shape[1],
        width=before.shape[2],
        mean=tuple(mean) if any(mean) else (),
        std=tuple(std) if any(value != 1 for value in std) else (),
        prepare=moved,
    )
    same = before.shape == after.shape
    worst = float((image.normalised(before) - after).abs().max() / after.abs().max()) if same else math.inf
    if not worst <= TOLERANCE:
        raise Unsupported(
            f"the image processor of '{name_or_path}' must resize, crop, rescale and normalise pictures and do nothing "
            f"else, since pixels are what attacks move; got one whose images differ by {worst:.3g} from that, relative "
            "to the largest value. Load the model yourself, and wrap it as a module that takes pixels in [0, 1]."
        )
    return image


def _run(processor: Any, picture: Image.Image, channels: int, **more: bool) -> Tensor:
    """The image that a processor makes of one picture."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that images are rescaled twice is guessed from their values
        made = processor(picture, return_tensors="pt", **more)
    tensors = {key: value for key, value in made.items() if isinstance(value, Tensor)}
    image = tensors.pop("pixel_values", None)
    if tensors or image is None or image.dim() != 4 or image.shape[:2] != (1, channels):
        got = {key: tuple(value.shape) for key, value in made.items() if isinstance(value, Tensor)}
        raise Unsupported(f"the image processor must return one image of {channels} channels a picture, got {got}.")
    return image[0]
