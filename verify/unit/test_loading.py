"""A model from what a user types: found, or refused with one clear error, and never by running foreign code."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, BertTokenizer, ViTConfig, ViTModel

from lipbounds.errors import InvalidInput, LipboundsError, Unsupported
from lipbounds.models.image_input import ImageInput
from lipbounds.models.loading import load_model


SMALL: dict[str, Any] = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "day"]


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def save_bert(folder: Path) -> BertModel:
    model = BertModel(BertConfig(vocab_size=len(WORDS), max_position_embeddings=16, **SMALL))
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return model


def save_vit(folder: Path, **settings: Any) -> None:
    ViTModel(ViTConfig(image_size=8, patch_size=4, num_channels=3, **SMALL)).save_pretrained(folder)
    if settings:
        settings = {"size": {"height": 8, "width": 8}, **settings}
        (folder / "preprocessor_config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize("name", ["digits-vit", "lipschitz-vit", "certified-vit", "certified-mnist-vit"])
def test_a_bundled_image_model_takes_images_of_the_stated_shape(name: str) -> None:
    found = load_model(name)
    assert (found.name, found.kind, found.tokenizer, found.module.training) == (name, "image", None, False)
    assert found.image is not None
    images = torch.full((2, found.image.channels, found.image.height, found.image.width), 0.5)
    assert found.module(found.image.normalised(images)).shape == (2, 10)


def test_minilm_comes_with_its_tokenizer() -> None:
    found = load_model("minilm")
    assert found.kind == "text"
    assert found.tokenizer is not None
    assert found.module(**found.tokenizer("a cat", return_tensors="pt")).last_hidden_state.shape == (1, 4, 384)


def test_a_text_model_in_a_folder(tmp_path: Path) -> None:
    saved = save_bert(tmp_path).eval()
    found = load_model(str(tmp_path))
    assert (found.kind, found.name) == ("text", str(tmp_path))
    assert found.tokenizer is not None
    tokens = found.tokenizer("good day", return_tensors="pt")
    torch.testing.assert_close(found.module(**tokens).last_hidden_state, saved(**tokens).last_hidden_state)


def test_an_image_model_in_a_folder_says_how_its_images_are_normalised(tmp_path: Path) -> None:
    save_vit(tmp_path, image_mean=[0.5, 0.25, 0.0], image_std=[0.5, 0.25, 1.0])
    image = load_model(str(tmp_path)).image
    assert image is not None
    assert image == ImageInput(channels=3, height=8, width=8, mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 1.0))
    assert image.normalised(torch.ones(3, 8, 8))[:, 0, 0].tolist() == [1.0, 3.0, 1.0]


@pytest.mark.parametrize("settings", [{}, {"do_normalize": False, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}])
def test_without_settings_pixels_go_in_as_they_are(settings: dict[str, Any], tmp_path: Path) -> None:
    save_vit(tmp_path, **settings)
    image = load_model(str(tmp_path)).image
    assert image is not None
    assert torch.equal(image.normalised(torch.ones(3, 8, 8)), torch.ones(3, 8, 8))


@pytest.mark.parametrize(
    "settings",
    [
        {"image_mean": [0.5], "image_std": [0.5] * 3},
        {"image_mean": [0.5] * 3, "image_std": [0.0] * 3},
        {"image_mean": ["x"] * 3, "image_std": [1.0] * 3},
        {"image_mean": 0.5, "image_std": 0.5},
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    save_vit(tmp_path, **settings)
    with pytest.raises(LipboundsError, match="name_or_path"):
        load_model(str(tmp_path))


# -- Python objects ---------------------------------------------------------------------------------------------------


@pytest.fixture
def my_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_models_here.py").write_text(
        "from torch import nn\n"
        "MODEL = nn.Linear(2, 3)\n"
        "make = lambda: nn.Linear(4, 5)\n"
        "def broken(): raise RuntimeError('no weights today')\n"
        "def needs(width): return nn.Linear(width, width)\n"
        "NUMBER = 3\n"
    )
    (tmp_path / "my_broken_module.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("my_models")
@pytest.mark.parametrize(("path", "width"), [("my_models_here:MODEL", 2), ("my_models_here:make", 4)])
def test_a_python_path_gives_a_module_or_what_its_function_returns(path: str, width: int) -> None:
    found = load_model(path)
    assert isinstance(found.module, nn.Linear)
    assert (found.name, found.kind, found.module.in_features, found.module.training) == (path, "tensor", width, False)


@pytest.mark.usefixtures("my_models")
@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("my_models_here:broken", "RuntimeError: no weights today"),
        ("my_models_here:needs", "without arguments.*TypeError"),
        ("my_models_here:NUMBER", "got int"),
        ("my_models_here:absent", "check the spelling"),
        ("my_broken_module:x", "ZeroDivisionError"),
        ("no_such_module_here:x", "check the spelling"),
        (":", "check the spelling"),
        ("..:x", "check the spelling"),
        ("a\0b:x", "check the spelling"),
    ],
)
def test_a_python_path_to_no_model_is_refused(path: str, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        load_model(path)


# -- what comes from outside is no code -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nobody/no-such-model", "", "x" * 5000, "a/b/c", "--", "né", "..", "a\0b", "a\nb"])
def test_a_name_that_is_no_model_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidInput, match="hf download"):
        load_model(name)


class Evil:
    """A pickle that makes a folder when it is read."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("new_format", [True, False])
def test_a_pickle_runs_no_code(new_format: bool, tmp_path: Path) -> None:
    checkpoint, made = tmp_path / "checkpoint", tmp_path / "made"
    weights = save_bert(checkpoint).state_dict()
    (checkpoint / "model.safetensors").unlink()
    content = {**weights, "evil": Evil(made)}
    file = checkpoint / "pytorch_model.bin"
    torch.save(content, file, _use_new_zipfile_serialization=new_format)
    with pytest.raises(LipboundsError, match="name_or_path"):
        load_model(str(checkpoint))
    assert not made.exists()
    # the trap works: a reader that trusts the file falls into it
    torch.load(file, weights_only=False)
    assert made.exists()


def test_a_pickle_of_weights_alone_is_read(tmp_path: Path) -> None:
    weights = save_bert(tmp_path).state_dict()
    (tmp_path / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "pytorch_model.bin")
    loaded = load_model(str(tmp_path)).module.state_dict()
    assert all(torch.equal(loaded[name], weight) for name, weight in weights.items())


OWN_CODE = "from transformers import BertConfig, BertModel\nfrom pathlib import Path\nPath({made!r}).touch()\n"


def save_with_code(folder: Path, made: Path) -> None:
    save_bert(folder)
    config = json.loads((folder / "config.json").read_text())
    own = {"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel"}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "own", "auto_map": own}))
    (folder / "own.py").write_text(
        OWN_CODE.format(made=str(made))
        + "class OwnConfig(BertConfig): model_type = 'own'\n"
        + "class OwnModel(BertModel): config_class = OwnConfig\n"
    )


def test_code_of_a_checkpoint_runs_only_if_the_user_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    checkpoint, made = tmp_path / "checkpoint", tmp_path / "made"
    save_with_code(checkpoint, made)
    with pytest.raises(Unsupported, match="without code from the checkpoint"):
        load_model(str(checkpoint))
    assert not made.exists()
    assert type(load_model(str(checkpoint), trust_remote_code=True).module).__name__ == "OwnModel"
    assert made.exists()


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"null", b"{", b"\xff\xfe", b'{"model_type": 3}', b'{"model_type": "bert", "hidden_size": "x"}'],
)
def test_a_damaged_config_is_refused(content: bytes, tmp_path: Path) -> None:
    save_bert(tmp_path)
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(LipboundsError, match="name_or_path"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("content", [b"", b"not a pickle", pickle.dumps(3), b"\x80\x02."])
def test_a_damaged_pickle_is_refused(content: bytes, tmp_path: Path) -> None:
    save_bert(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(LipboundsError, match="name_or_path"):
        load_model(str(tmp_path))
