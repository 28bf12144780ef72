"""The digits model: its data, its committed weights and its training."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lipbounds.errors import InvalidInput
from lipbounds.models import train_digits, training
from lipbounds.models.digits_data import DigitsSplit, LabelledImages, load_digits_split
from lipbounds.models.digits_vit import WEIGHTS, DigitsViT, SelfAttention, load_digits_vit


@pytest.fixture(scope="module")
def split() -> DigitsSplit:
    return load_digits_split()


@pytest.fixture(scope="module")
def vit() -> DigitsViT:
    return load_digits_vit()


def read_history(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["training"])


# -- digits: data ---------------------------------------------------------------------------------------------------


def test_the_three_parts_are_disjoint_and_cover_all_digits(split: DigitsSplit) -> None:
    parts = [split.train, split.validation, split.test]
    assert [len(part) for part in parts] == [1197, 240, 360]
    assert torch.cat([part.indices for part in parts]).sort().values.equal(torch.arange(1797))
    assert len(torch.cat([part.images for part in parts]).unique(dim=0)) == 1797, "an image is there twice"


def test_each_part_has_the_digits_in_equal_shares(split: DigitsSplit) -> None:
    parts = [split.train, split.validation, split.test]
    total = torch.stack([part.labels.bincount(minlength=10) for part in parts]).sum(0)
    for part in parts:
        assert (part.labels.bincount(minlength=10) - total * len(part) / 1797).abs().max() <= 1


def test_pixels_are_sixteenths_between_zero_and_one(split: DigitsSplit) -> None:
    for part in (split.train, split.validation, split.test):
        assert part.images.dtype == torch.float32
        assert (part.images.min(), part.images.max()) == (0, 1)
        assert (part.images * 16).frac().eq(0).all()


def test_the_split_never_changes(split: DigitsSplit) -> None:
    """Another split would judge the committed weights on images they were trained on."""
    digest = hashlib.sha256(json.dumps(split.test.indices.tolist()).encode()).hexdigest()
    assert digest == "9f682b80f7670c11a0990696d9ffc9d1363b2b6352f4f6d09195a23e397eb0ec"


# -- digits: model --------------------------------------------------------------------------------------------------


def test_committed_weights_reach_97_percent_on_test_images(vit: DigitsViT, split: DigitsSplit) -> None:
    accuracy, _ = training.evaluate(vit, split.test)
    assert accuracy >= 0.97
    history = read_history(WEIGHTS)
    # Another machine rounds differently: at most one image may change sides.
    assert history["test_accuracy"] == pytest.approx(accuracy, abs=1.01 / 360)
    assert history["command"] == "python -m lipbounds.models.train_digits --seed 0 --epochs 60"
    assert WEIGHTS.stat().st_size < 2e6


def test_the_model_is_small_in_evaluation_mode_and_trainable(vit: DigitsViT) -> None:
    assert sum(parameter.numel() for parameter in vit.parameters()) == 136_138
    assert all(parameter.requires_grad and parameter.device.type == "cpu" for parameter in vit.parameters())
    assert not vit.training


def test_forward_is_deterministic_and_treats_images_alone(vit: DigitsViT, split: DigitsSplit) -> None:
    images = split.test.images[:8]
    state = torch.random.get_rng_state()
    again = load_digits_vit()
    assert torch.random.get_rng_state().equal(state)
    assert torch.equal(vit(images), again(images))
    torch.testing.assert_close(vit(images)[3:4], vit(images[3:4]))
    torch.testing.assert_close(again.double()(images.double()), vit(images).double(), rtol=0, atol=1e-4)


def test_each_patch_becomes_its_own_token_row_by_row(vit: DigitsViT) -> None:
    blank = torch.zeros(1, 1, 8, 8)
    for row, column in [(0, 0), (1, 2), (3, 7), (6, 1), (7, 7)]:
        image = blank.clone()
        image[0, 0, row, column] = 1
        change = (vit.embed(image) - vit.embed(blank))[0]
        token = 1 + 4 * (row // 2) + column // 2
        expected = torch.zeros(17, 64)
        expected[token] = vit.patch_embedding.weight[:, 2 * (row % 2) + column % 2]
        torch.testing.assert_close(change, expected)


def test_attention_is_the_formula(vit: DigitsViT, split: DigitsSplit) -> None:
    attention = vit.blocks[0].attention
    assert isinstance(attention, SelfAttention)
    x = vit.embed(split.test.images[:2])
    expected = attention.output.bias.expand(2, 17, 64)
    for head in range(4):
        part = slice(16 * head, 16 * (head + 1))
        query, key, value = (
            x @ layer.weight[part].T + layer.bias[part] for layer in (attention.query, attention.key, attention.value)
        )
        mixed = (query @ key.mT / 4).softmax(-1) @ value
        expected = expected + mixed @ attention.output.weight[:, part].T
    torch.testing.assert_close(attention(x), expected)


def test_missing_weights_get_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"nowhere\.safetensors.*train_digits"):
        load_digits_vit(tmp_path / "nowhere.safetensors")


@pytest.mark.parametrize("change", ["missing", "shape", "unknown"])
def test_weights_of_another_model_get_a_clear_error(change: str, vit: DigitsViT, tmp_path: Path) -> None:
    weights = dict(vit.state_dict())
    if change == "missing":
        del weights["head.bias"]
    else:
        weights["head.bias" if change == "shape" else "tail"] = torch.zeros(11)
    save_file(weights, tmp_path / "other.safetensors")
    name = "tail" if change == "unknown" else "head.bias"
    with pytest.raises(InvalidInput, match=f"1 missing, unknown.*such as {name}"):
        load_digits_vit(tmp_path / "other.safetensors")


# -- digits: training -----------------------------------------------------------------------------------------------


def first(part: LabelledImages, count: int) -> LabelledImages:
    return LabelledImages(part.images[:count], part.labels[:count], part.indices[:count])


def train_briefly(split: DigitsSplit, seed: int, epochs: int = 1) -> dict[str, Tensor]:
    console = Console(file=io.StringIO())
    parts = first(split.train, 128), first(split.validation, 32)
    return train_digits.train(*parts, seed=seed, epochs=epochs, console=console).state_dict()


def test_the_same_seed_gives_the_same_weights(split: DigitsSplit) -> None:
    state = torch.random.get_rng_state()
    one, torch_drew = train_briefly(split, seed=3), torch.rand(1)
    two, other = train_briefly(split, seed=3), train_briefly(split, seed=4)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["head.weight"], other["head.weight"])
    torch.random.set_rng_state(state)
    assert torch.equal(torch_drew, torch.rand(1)), "training moved the caller's random state"


def test_the_epoch_that_is_best_on_validation_images_is_kept(
    split: DigitsSplit, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([(0.5, 1.0), (0.9, 1.0), (0.9, 0.8), (0.9, 0.9), (0.7, 0.1)])
    seen: list[Tensor] = []

    def evaluate(model: DigitsViT, part: LabelledImages) -> tuple[float, float]:
        assert part.indices.equal(split.validation.indices[:32])
        seen.append(model.head.bias.detach().clone())
        return next(scores)

    monkeypatch.setattr(train_digits, "evaluate", evaluate)
    kept = train_briefly(split, seed=0, epochs=5)["head.bias"]
    assert [torch.equal(kept, bias) for bias in seen] == [False, False, True, False, False]


def centres_and_masses(images: Tensor) -> tuple[Tensor, Tensor]:
    place = torch.arange(8) - 3.5
    mass = images.sum((1, 2, 3))
    return torch.stack([images.sum((1, 3)) @ place, images.sum((1, 2)) @ place]) / mass, mass


@pytest.fixture
def blobs() -> Tensor:
    images = torch.zeros(300, 1, 8, 8)
    images[:, :, 3:5, 3:5] = 1
    return images


def test_shifts_are_random_and_at_most_half_a_pixel(blobs: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "LARGEST_STRETCH", 0)
    moved = training.distorted(blobs, torch.Generator().manual_seed(0))
    centres, masses = centres_and_masses(moved)
    assert masses == pytest.approx(4, rel=1e-4)
    for distance in centres:
        assert 0.48 < distance.abs().max() <= 0.5 + 1e-5
        assert distance.std() == pytest.approx(0.5 / 3**0.5, rel=0.1)
    assert centres.corrcoef()[0, 1].abs() < 0.2


def test_stretches_are_random_and_leave_the_centre(blobs: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "LARGEST_SHIFT", 0)
    centres, masses = centres_and_masses(training.distorted(blobs, torch.Generator().manual_seed(0)))
    assert centres.abs().max() < 1e-5
    # The area grows by at most 1 / det, with the determinant at least 0.85 * 0.85 - 0.15 * 0.15.
    assert 0.2 < masses.std() < masses.max() - 4 < 4 / 0.7 - 4 + 0.5


def test_the_command_writes_weights_with_their_history(
    split: DigitsSplit, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    judged_on: list[Tensor] = []
    evaluate = train_digits.evaluate

    def recorded(model: DigitsViT, part: LabelledImages) -> tuple[float, float]:
        judged_on.append(part.indices)
        return evaluate(model, part)

    monkeypatch.setattr(train_digits, "evaluate", recorded)
    path = tmp_path / "new" / "weights.safetensors"
    train_digits.main(["--epochs", "1", "--seed", "5", "--output", str(path)])
    history = read_history(path)
    assert history["command"] == "python -m lipbounds.models.train_digits --seed 5 --epochs 1"
    assert (history["seed"], history["torch"]) == (5, torch.__version__)
    assert [part.tolist() for part in judged_on] == [split.validation.indices.tolist(), split.test.indices.tolist()]
    accuracy, _ = evaluate(load_digits_vit(path), split.test)
    assert history["test_accuracy"] == round(accuracy, 4)
    out, err = capsys.readouterr()
    assert out == ""
    assert f"test accuracy {accuracy:.4f}" in err


def test_no_epochs_is_refused() -> None:
    with pytest.raises(SystemExit):
        train_digits.main(["--epochs", "0"])


def test_importing_the_models_package_needs_torch_only() -> None:
    code = (
        "import sys, lipbounds.models, lipbounds.models.digits_vit\n"
        "print({'transformers', 'safetensors', 'sklearn', 'rich'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "set()\n"
