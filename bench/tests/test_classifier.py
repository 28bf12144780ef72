"""`python -m bench robustness --model NAME --images DIR`: a classifier of the user, on pictures from disk."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from bench import __main__ as program
from bench.attacks.images import Ball, pgd
from bench.robustness import attacked
from bench.robustness import classifier_task as classifier
from bench.robustness.classifier import check_classes, check_numbered, load_classifier
from bench.robustness.folder import read_classes, read_folder, read_images
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
        "size": {"height": 8, "width": 8},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


def weak_attack(model: nn.Module, images: Tensor, labels: Tensor, ball: Ball, *, seed: int) -> Tensor:
    """In place of AutoAttack, which takes a minute and has tests of its own."""
    return pgd(model, images, labels, ball, steps=3, generator=torch.Generator().manual_seed(seed))


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
    lines = (tmp_path / "classifier.jsonl").read_bytes().splitlines(keepends=True)  # the last one is the page
    (tmp_path / "classifier.jsonl").write_bytes(b"".join(lines[:-3]) + lines[-3][:20])
    assert run(tmp_path, "digits-vit", digits) == 0
    assert capsys.readouterr().out.startswith(f"2 answers made, {len(lines) - 4} taken from")
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


def save(path: Path, pixels: Any) -> None:
    """A picture, in folders that are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels)).save(path)


def test_folders_called_by_numbers_are_read_as_numbers(tmp_path: Path) -> None:
    for number in range(12):
        save(tmp_path / str(number) / "one.PNG", np.full((4, 6, 3), 20 * number, dtype=np.uint8))
    for other in (".ipynb_checkpoints", "__MACOSX", "__pycache__"):
        (tmp_path / other).mkdir()
    (tmp_path / "3" / "._one.png").write_bytes(b"what archives of other systems leave behind")
    given = read_folder(tmp_path, 20, settings=None, classes={f"LABEL_{number}": number for number in range(12)})
    assert given.images.shape == (12, 3, 4, 6)
    expected = [round(20 * number / 255, 6) for number in given.labels.tolist()]
    assert given.images[:, 0, 0, 0].tolist() == pytest.approx(expected, abs=1e-6)
    assert sorted(given.labels.tolist()) == list(range(12))
    save(tmp_path / "3" / "two.png", np.zeros((5, 6), dtype=np.uint8))
    with pytest.raises(InvalidInput, match="must be of one size"):
        read_folder(tmp_path, 20, settings=None, classes={})


@pytest.mark.parametrize(
    ("names", "classes"),
    [
        (["a", "b", "c"], {}),  # in which order?
        (["a", "b"], {"A": 0, "B": 1}),
        (["0", "1", "2"], {"a": 0, "b": 1, "c": 2, "d": 3}),  # a subset, perhaps numbered anew
        (["1", "2", "3"], {}),
        (["0", "2"], {}),
        (["0", "00"], {}),
        (["0", "b"], {"a": 0, "b": 1}),
    ],
)
def test_names_of_folders_are_not_guessed(names: list[str], classes: dict[str, int], tmp_path: Path) -> None:
    for name in names:
        save(tmp_path / name / "one.png", np.zeros((2, 2, 3), dtype=np.uint8))
    with pytest.raises(InvalidInput, match=r"folders must be called .*pass --classes FILE"):
        read_folder(tmp_path, 9, settings=None, classes=classes)
    chosen = {name: 5 - place for place, name in enumerate(names)}
    (tmp_path / "classes.json").write_text(json.dumps(chosen))
    given = read_folder(tmp_path, 9, settings=None, classes=read_classes(tmp_path / "classes.json"))
    assert given.labels.tolist() == [chosen[Path(name).parts[0]] for name in given.names]


@pytest.mark.parametrize("content", ["", "[1]", "{}", '{"a": "b"}', '{"a": 1.5}', '{"a": true}'])
def test_a_mapping_that_is_none_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "classes.json").write_text(content)
    with pytest.raises(InvalidInput, match="classes must be a file with a JSON object"):
        read_classes(tmp_path / "classes.json")
    with pytest.raises(InvalidInput, match="classes must be a file with a JSON object"):
        read_classes(tmp_path / "nowhere.json")


def ten() -> nn.Module:
    """A model of ten classes that knows no names."""
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 10))


@pytest.mark.usefixtures("small")
def test_a_subset_of_numbers_needs_a_mapping(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("0", "1"):
        save(tmp_path / "images" / name / "one.png", np.zeros((2, 2, 3), dtype=np.uint8))
    assert run(tmp_path, f"{__name__}:ten", tmp_path / "images") == 2
    assert "must be 0 to 9, all classes" in capsys.readouterr().err
    (tmp_path / "c.json").write_text('{"0": 7, "1": 3}')
    assert run(tmp_path, f"{__name__}:ten", tmp_path / "images", "--classes", str(tmp_path / "nowhere.json")) == 2
    given = read_folder(tmp_path / "images", 2, settings=None, classes=read_classes(tmp_path / "c.json"))
    check_numbered(load_classifier(f"{__name__}:ten"), given)
    assert given.labels.tolist() == [7, 3]


def test_names_that_two_classes_share_stand_for_neither(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["id2label"] = {str(place): "crane" if place in (3, 5) else f"n{place}" for place in range(10)}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    classes = load_classifier(str(tmp_path / "model")).classes
    assert "crane" not in classes
    assert classes["n4"] == 4
    assert len(classes) == 8


def test_a_size_that_the_model_does_not_take_is_one_line(
    checkpoint: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(checkpoint, tmp_path / "model")
    settings = json.loads((tmp_path / "model" / "preprocessor_config.json").read_text())
    del settings["size"]  # 224 x 224, as transformers has it
    (tmp_path / "model" / "preprocessor_config.json").write_text(json.dumps(settings))
    assert run(tmp_path, str(tmp_path / "model"), digits) == 2
    assert "must run on the images, got shape (1, 224, 224)" in capsys.readouterr().err


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


def test_options_of_a_classifier_go_with_robustness_only(capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(["speed", "--model", "digits-vit", "--images", "x"]) == 2
    assert "--model goes with the tasks tightness, classifier, got speed" in capsys.readouterr().err


def test_images_of_a_data_set_and_pictures_with_their_class_in_the_name(tmp_path: Path) -> None:
    pixels = torch.arange(0, 240, 10, dtype=torch.uint8).repeat_interleave(64)
    header = bytes([0, 0, 8, 3]) + b"".join(size.to_bytes(4, "big") for size in (24, 8, 8))
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(header + pixels.numpy().tobytes())
    labels = bytes([0, 0, 8, 1, 0, 0, 0, 24]) + bytes(k % 10 for k in range(24))
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(labels)
    image = load_classifier("digits-vit").image
    given = read_images(tmp_path, 5, settings=image, classes={})
    assert (given.available, given.classes, given.numbered) == (24, 10, False)
    numbers = [int(name.rsplit(" ", 1)[1]) for name in given.names]
    assert given.labels.tolist() == [number % 10 for number in numbers]
    assert given.images[:, 0, 0, 0].mul(255).round().tolist() == [10 * number for number in numbers]
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, name in enumerate(("coat_0_4.png", "shoe_00_7.png")):
        Image.new("L", (8, 8), 100 * number).save(folder / name)
    given = read_images(folder, 5, settings=image, classes={})
    assert (given.names, given.labels.tolist()) == (["coat_0_4.png", "shoe_00_7.png"], [4, 7])
    Image.new("L", (8, 8)).save(folder / "boot.png")
    with pytest.raises(InvalidInput, match=r"such as shoe_00_7.png, got 1 others such as 'boot.png'"):
        read_images(folder, 5, settings=image, classes={})
