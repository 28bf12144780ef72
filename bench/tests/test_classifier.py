"""`python -m bench robustness --model NAME --images DIR`: a classifier of the user, on pictures from disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from bench import __main__ as program
from bench.attacks.images import Norm, pgd
from bench.robustness import attacked
from bench.robustness import classifier_task as classifier
from bench.robustness.classifier import check_classes, load_classifier
from bench.robustness.folder import read_folder
from lipbounds.errors import InvalidInput
from lipbounds.models.digits_data import load_digits_split
from lipbounds.models.digits_vit import load_digits_vit


SMALL = classifier.Profile(images=6, batch=4, blocks=1, eps={"l_inf": (0.05, 0.2), "l2": (0.25,)})


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first twelve test digits as pictures, a folder for each of the ten classes."""
    folder = tmp_path_factory.mktemp("digits")
    test = load_digits_split().test
    for digit in range(10):
        (folder / str(digit)).mkdir()
    for place in range(12):
        # Grey values are sixteenths, and 255 is no multiple of 16: what is read back differs a little.
        pixels = (test.images[place, 0].numpy() * 255).round().astype(np.uint8)
        Image.fromarray(pixels).save(folder / str(int(test.labels[place])) / f"{place:02d}.png")
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face classifier with ten classes whose names are not in the order of their numbers."""
    import transformers

    folder = tmp_path_factory.mktemp("vit")
    names = {place: str(9 - place) for place in range(10)}
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=8,
        patch_size=4,
        num_channels=1,
        id2label=names,
        label2id={name: place for place, name in names.items()},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.ViTForImageClassification(config).save_pretrained(folder)
    settings = {
        "image_processor_type": "ViTImageProcessor",
        "do_normalize": True,
        "image_mean": [0.5],
        "image_std": [0.5],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


def weak_attack(model: nn.Module, images: Tensor, labels: Tensor, norm: Norm, eps: float, *, seed: int) -> Tensor:
    """In place of AutoAttack, which takes a minute and has tests of its own."""
    return pgd(model, images, labels, norm, eps, steps=3, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A profile of seconds."""
    monkeypatch.setitem(classifier.PROFILES, "standard", SMALL)
    monkeypatch.setattr(attacked, "autoattack", weak_attack)


def run(folder: Path, model: str, images: Path, *more: str) -> int:
    return program.main(["robustness", "--model", model, "--images", str(images), "--results", str(folder), *more])


@pytest.mark.usefixtures("small")
def test_the_digits_vit_on_pictures_of_digits(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "digits-vit", digits) == 0
    data = json.loads((tmp_path / "classifier_digits_vit.json").read_text())
    given = read_folder(digits, 6, settings=load_classifier("digits-vit").image, classes={})
    with torch.no_grad():
        right = load_digits_vit()(given.images).argmax(1) == given.labels
    assert data["clean"] == float(right.double().mean())
    assert data["available"] == 12
    assert [row["eps"] for row in data["robust"]["l_inf"]] == [0.05, 0.2]
    assert all(row["worst"] <= min(row["fgsm"], row["pgd"], data["clean"]) for row in data["robust"]["l_inf"])
    assert data["robust"]["l_inf"][1]["worst"] < data["clean"]
    (measured,) = data["measured"]
    assert len(measured["layers"]) == 4
    assert measured["reached"] <= measured["constant"]
    # `constant` is what ten logits of one image have as a Jacobian: its norm by automatic differentiation.
    image = given.images[:1].double()
    jacobian = torch.autograd.functional.jacobian(load_digits_vit().double(), image).reshape(10, -1)
    assert measured["constant"] == pytest.approx(float(torch.linalg.matrix_norm(jacobian, ord=2)), rel=1e-9)
    page = (tmp_path / "classifier_digits_vit.md").read_text()
    assert "6 of 12 images (1 x 8 x 8" in page
    assert (tmp_path / "classifier_digits_vit.png").stat().st_size > 1000

    # Nothing is made a second time, and what a killed run did not write is made.
    capsys.readouterr()
    lines = (tmp_path / "classifier.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "classifier.jsonl").write_bytes(b"".join(lines[:-2]) + lines[-2][:20])
    assert run(tmp_path, "digits-vit", digits) == 0
    assert capsys.readouterr().out.startswith(f"2 answers made, {len(lines) - 2} taken from")
    again = json.loads((tmp_path / "classifier_digits_vit.json").read_text())
    assert {**again, "environments": 0} == {**data, "environments": 0}


def test_a_checkpoint_from_a_folder_knows_its_classes_and_its_normalisation(digits: Path, checkpoint: Path) -> None:
    import transformers

    found = load_classifier(str(checkpoint))
    given = read_folder(digits, 12, settings=found.image, classes=found.classes)
    assert sorted((name.split("/")[0], int(label)) for name, label in zip(given.names, given.labels, strict=True)) == [
        (str(9 - label), label) for label in sorted(given.labels.tolist(), reverse=True)
    ]
    model: Any = transformers.ViTForImageClassification.from_pretrained(checkpoint)
    with torch.no_grad():
        expected = model.eval()((given.images - 0.5) / 0.5).logits
        torch.testing.assert_close(found.module(given.images), expected)


@pytest.mark.usefixtures("small")
def test_a_whole_run_on_a_checkpoint(digits: Path, checkpoint: Path, tmp_path: Path) -> None:
    assert run(tmp_path, str(checkpoint), digits, "--count", "3") == 0
    (path,) = tmp_path.glob("classifier_*.json")
    data = json.loads(path.read_text())
    assert (data["images"], data["classes"]) == (3, 10)
    assert [layer["module"] for layer in data["measured"][0]["layers"]]


def test_folders_are_numbered_in_order_where_the_model_knows_no_names(tmp_path: Path) -> None:
    for name, value in (("b", 0), ("a", 255), ("c", 51)):
        (tmp_path / name).mkdir()
        Image.fromarray(np.full((4, 6, 3), value, dtype=np.uint8)).save(tmp_path / name / "one.PNG")
    given = read_folder(tmp_path, 10, settings=None, classes={"a": 7})
    assert given.labels.tolist() == [0, 1, 2]
    assert given.images.shape == (3, 3, 4, 6)
    assert given.images[:, 0, 0, 0].tolist() == pytest.approx([1.0, 0.0, 0.2])
    Image.fromarray(np.zeros((5, 6), dtype=np.uint8)).save(tmp_path / "a" / "two.png")
    with pytest.raises(InvalidInput, match="must be of one size"):
        read_folder(tmp_path, 10, settings=None, classes={})


def test_the_sample_is_the_same_every_time_and_spread_over_the_classes(digits: Path) -> None:
    settings = load_classifier("digits-vit").image
    first, second = (read_folder(digits, 8, settings=settings, classes={}) for _ in range(2))
    assert first.names == second.names
    assert len(set(first.names)) == 8
    assert len(set(first.labels.tolist())) > 4


def broken() -> nn.Module:
    """A model that returns no logits."""
    return nn.Identity()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "digits-vit"], "--model NAME and --images DIR go together"),
        (["--model", "minilm", "--images", "DIGITS"], "model must classify images, got 'minilm'"),
        (["--model", "digits-vit", "--images", "/nowhere"], "images must be a folder with a folder of pictures"),
        (["--model", "digits-vit", "--images", "DIGITS", "--count", "0"], "count must be at least 1"),
        (["--model", "digits-vit", "--images", "DIGITS", "--device", "cuda:77"], "must be a device that is here"),
        (["--model", f"{__name__}:broken", "--images", "DIGITS"], "model must return logits of shape"),
        (
            ["--model", "no/such-model", "--images", "DIGITS"],
            "name_or_path must be a folder with a complete checkpoint",
        ),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], message: str, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(digits) if word == "DIGITS" else word for word in arguments]
    assert program.main(["robustness", *given, "--results", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_more_folders_than_classes_are_refused(digits: Path, tmp_path: Path) -> None:
    for place in range(10, 12):
        (tmp_path / str(place)).mkdir()
    for digit in range(10):
        (tmp_path / str(digit)).symlink_to(digits / str(digit))
    loaded = load_classifier("digits-vit")
    given = read_folder(tmp_path, 4, settings=loaded.image, classes={})
    assert given.classes == 12
    with pytest.raises(InvalidInput, match="a folder for each of the 10 classes"):
        check_classes(loaded, given.images, given.labels, given.classes)


def test_options_of_a_classifier_go_with_robustness_only() -> None:
    with pytest.raises(SystemExit) as stopped:
        program.main(["speed", "--model", "digits-vit", "--images", "x"])
    assert stopped.value.code == 2
