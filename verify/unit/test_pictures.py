"""Pictures as the checkpoint's own image processor makes them; odd files are scaled, turned or refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, ViTConfig, ViTModel

from lipbounds.errors import InvalidInput, Unsupported
from lipbounds.models.image_input import ImageInput
from lipbounds.models.image_processor import image_input
from lipbounds.models.loading import LoadedModel, load_model
from lipbounds.models.pictures import picture, pictures_in
from lipbounds.report.inputs import from_images


SIZE = {"height": 8, "width": 8}
SETTINGS: dict[str, dict[str, Any]] = {
    "as most": {"image_processor_type": "ViTImageProcessor", "size": SIZE},
    "not rescaled": {
        "image_processor_type": "ViTImageProcessor",
        "size": SIZE,
        "do_rescale": False,
        "image_mean": [127.5] * 3,
        "image_std": [127.5] * 3,
    },
    "rescaled to [0, 2]": {"image_processor_type": "ViTImageProcessor", "size": SIZE, "rescale_factor": 1 / 127.5},
    "bicubic, cropped": {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": 10},
        "crop_size": SIZE,
    },
    "nearest": {"image_processor_type": "ViTImageProcessor", "size": SIZE, "resample": 0},
    "box, no means": {
        "image_processor_type": "ViTImageProcessor",
        "size": SIZE,
        "resample": 4,
        "do_normalize": False,
    },
    "older name": {"feature_extractor_type": "ViTFeatureExtractor", "size": 8},
}


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def vit() -> ViTModel:
    return ViTModel(
        ViTConfig(
            image_size=8, patch_size=4, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
        )
    )


def saved(folder: Path, settings: dict[str, Any], vit: ViTModel) -> Path:
    vit.config.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("name", SETTINGS)
def test_images_are_what_the_image_processor_makes(name: str, vit: ViTModel, tmp_path: Path) -> None:
    image = image_input(saved(tmp_path, SETTINGS[name], vit), vit)
    pixels = np.random.default_rng(1).integers(0, 256, (31, 17, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    wanted = AutoImageProcessor.from_pretrained(tmp_path)(Image.open(tmp_path / "a.png"), return_tensors="pt")
    found = picture(tmp_path / "a.png", image)
    assert (image.channels, image.height, image.width) == (3, 8, 8)
    assert 0 <= float(found.min()) < float(found.max()) <= 1
    torch.testing.assert_close(image.normalised(found[None]), wanted["pixel_values"], rtol=1e-6, atol=1e-6)
    model = LoadedModel(name="vit", module=vit, kind="image", image=image)
    torch.testing.assert_close(from_images(model, tmp_path)[0].args[0], wanted["pixel_values"], rtol=1e-6, atol=1e-6)


def test_a_processor_that_does_more_is_refused(vit: ViTModel, tmp_path: Path) -> None:
    """ImageGPT makes numbers of colours."""
    settings = {"image_processor_type": "ImageGPTImageProcessor", "clusters": [[0.0] * 3, [1.0] * 3]}
    with pytest.raises(Unsupported, match="image processor"):
        image_input(saved(tmp_path, settings, vit), vit)


def test_without_settings_pixels_go_in_as_they_are(vit: ViTModel, tmp_path: Path) -> None:
    assert image_input(tmp_path, vit) == ImageInput(channels=3, height=8, width=8)


@pytest.mark.parametrize("end", [0, 65535])
def test_sixteen_bits_are_scaled(end: int, tmp_path: Path) -> None:
    values = np.array([[0, 257, 32768, 65535]], dtype=np.uint16)
    Image.fromarray(values if end else values[:, ::-1].copy()).save(tmp_path / "a.png")
    Image.fromarray(values if end else values[:, ::-1].copy()).save(tmp_path / "a.tiff")
    expected = torch.tensor([0.0, 1 / 255, 128 / 255, 1.0])
    for name in ("a.png", "a.tiff"):
        found = picture(tmp_path / name, ImageInput(channels=1, height=1, width=4))
        torch.testing.assert_close(found[0, 0], expected if end else expected.flip(0))


def test_a_picture_is_turned_as_its_orientation_says(tmp_path: Path) -> None:
    pixels = np.zeros((2, 3, 3), dtype=np.uint8)
    pixels[0, 0] = 255
    made = Image.fromarray(pixels)
    exif = made.getexif()
    exif[0x0112] = 6  # a quarter turn
    made.save(tmp_path / "a.png", exif=exif)
    found = picture(tmp_path / "a.png")
    assert found.shape == (3, 3, 2)
    assert found[0].argmax() == 1  # upper left has become upper right


@pytest.mark.parametrize("name", ["float", "32 bits", "damaged", "bomb"])
def test_pictures_of_unknown_range_or_size_are_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.tiff"
    if name == "float":
        Image.fromarray(np.full((2, 2), 0.5, dtype=np.float32)).save(path)
    elif name == "32 bits":
        Image.fromarray(np.full((2, 2), 70000, dtype=np.int32)).save(path)
    elif name == "damaged":
        path.write_bytes(b"II*\x00 and no more")
    else:
        Image.new("L", (40, 40)).save(path)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    message = {"float": "floating-point", "32 bits": "32-bit", "damaged": "cannot be read", "bomb": "at most 1000 pix"}
    with pytest.raises(InvalidInput, match=message[name]):
        picture(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with pytest.raises(InvalidInput):
        picture(path)


def test_what_is_no_file_is_named_and_nothing_hangs(tmp_path: Path) -> None:
    (tmp_path / ".hidden.png").write_bytes(b"")
    assert pictures_in(tmp_path) == []
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(InvalidInput, match=r"a.png' must be a picture, got no ordinary file"):
        pictures_in(tmp_path)
    (tmp_path / "a.png").unlink()
    (tmp_path / "b.png").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InvalidInput, match=r"b.png' must be a picture"):
        pictures_in(tmp_path)


def test_a_folder_with_a_colon_is_a_folder(vit: ViTModel, tmp_path: Path) -> None:
    folder = tmp_path / "run 12:30"
    vit.save_pretrained(folder)
    found = load_model(str(folder))
    assert (found.kind, found.name) == ("image", str(folder))
