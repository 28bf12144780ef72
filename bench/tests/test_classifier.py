"""`python -m bench robustness --model NAME --images DIR`: a classifier of the user, on pictures from disk."""

from __future__ import annotations

import dataclasses as dc
import json
import shutil
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torch import Tensor, nn

from bench import __main__ as program
from bench.attacks import ways
from bench.attacks.images import Ball, autoattack, pgd
from bench.attacks.ways import STANDARD, Way
from bench.engine.machine import ROOT
from bench.robustness import attacked, proportions
from bench.robustness import classifier_command as command
from bench.robustness import classifier_task as classifier
from bench.robustness.classifier import check_classes, check_numbered, load_classifier
from bench.robustness.folder import read_classes, read_folder, read_images
from lipbounds.errors import InvalidInput
from lipbounds.models.digits_data import load_digits_split
from lipbounds.models.digits_vit import load_digits_vit
from lipbounds.models.image_input import ImageInput


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


def weak_attack(model: nn.Module, images: Tensor, labels: Tensor, ball: Ball, *, seed: int, way: Way) -> Tensor:
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
    (found,) = data["models"]
    assert found["clean"] == right.tolist()
    assert data["available"] == 12
    assert [row["eps"] for row in found["robust"]["l_inf"]] == [0.05, 0.2]
    for row in found["robust"]["l_inf"]:
        weakest = zip(found["clean"], row["fgsm"], row["pgd"], row["worst"], strict=True)
        assert all(worst <= min(others) for *others, worst in weakest)
    assert sum(found["robust"]["l_inf"][1]["worst"]) < sum(found["clean"])
    (measured,) = found["measured"]
    assert len(measured["layers"]) == 4
    assert measured["reached"] <= measured["constant"]
    # `constant` is what ten logits of one image have as a Jacobian: its norm by automatic differentiation.
    image = given.images[:1].double()
    jacobian = torch.autograd.functional.jacobian(load_digits_vit().double(), image).reshape(10, -1)
    assert measured["constant"] == pytest.approx(float(torch.linalg.matrix_norm(jacobian, ord=2)), rel=1e-9)
    page = (tmp_path / "classifier_digits_vit.md").read_text()
    assert "Images: 6 of 12 of" in page
    assert "of the 1 x 8 x 8 image that the model is given" in page
    assert "Compared with" not in page
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
    (found,) = data["models"]
    assert (len(data["names"]), found["classes"]) == (3, 10)
    assert [layer["module"] for layer in found["measured"][0]["layers"]]


def bright() -> nn.Module:
    """A linear model of ten classes, without attention."""
    return _linear(1)


def dark() -> nn.Module:
    """Another one."""
    return _linear(2)


def grey() -> nn.Module:
    """A third one."""
    return _linear(3)


def _linear(seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


@pytest.mark.usefixtures("small")
def test_models_stand_side_by_side_and_are_attacked_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [f"{__name__}:{name}" for name in ("bright", "dark", "grey")]
    both = ["robustness", "--images", "digits", "--count", "20", "--results", str(tmp_path), "--eps", "l_inf:8/255"]
    both += ["--model", names[0], "--model", names[1]]
    assert program.main(both) == 0
    (page,) = tmp_path.glob("classifier_*.md")
    text, data = page.read_text(), json.loads(page.with_suffix(".json").read_text())
    given = read_images(Path("digits"), 20, settings=None, classes={})
    with torch.no_grad():
        flags = [(model()(given.images).argmax(1) == given.labels).tolist() for model in (bright, dark)]
    assert [model["clean"] for model in data["models"]] == flags
    clean = data["summary"]["models"][0]["accuracies"]["clean"]
    exact = stats.binomtest(sum(flags[0]), 20).proportion_ci(method="exact")
    assert (clean["low"], clean["high"]) == pytest.approx((exact.low, exact.high))
    rows = {row["column"]: row for row in data["summary"]["comparisons"]}
    assert list(rows) == ["clean", "l_inf 8/255"]
    assert rows["clean"]["difference"] == pytest.approx((sum(flags[1]) - sum(flags[0])) / 20)
    assert "## Compared with" in text
    assert "in the norm l_inf (the largest change of a pixel) of pixels in [0, 1]" in text
    assert "the package `" in text
    assert "--eps l_inf:8/255" in text
    assert page.with_suffix(".png").stat().st_size > 1000

    # Another run goes on from what is known of each model; the page can be made again without one.
    capsys.readouterr()
    assert program.main([*both, "--model", names[2]]) == 0
    made, taken = (int(word) for word in capsys.readouterr().out.split() if word.isdecimal())
    assert made < taken
    before = page.read_bytes()
    page.unlink()
    assert program.main(["render", "--results", str(tmp_path)]) == 0
    assert page.read_bytes() == before


def test_without_a_package_of_autoattack_the_page_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "way_for", lambda classes: None)
    given = ["robustness", "--images", "digits", "--count", "5", "--eps", "l2:0.25", "--model", f"{__name__}:dark"]
    assert program.main([*given, "--results", str(tmp_path)]) == 0
    (page,) = tmp_path.glob("classifier_*.md")
    assert "FGSM and PGD-40 alone" in page.read_text()
    (row,) = json.loads(page.with_suffix(".json").read_text())["models"][0]["robust"]["l2"]
    assert row["worst"] == [min(pair) for pair in zip(row["fgsm"], row["pgd"], strict=True)]


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(InvalidInput, match=r"are of shape \(1, 8, 8\), but the model takes 3 x 8 x 8"):
        read_images(Path("digits"), 3, settings=ImageInput(channels=3, height=8, width=8), classes={})
    loaded = load_classifier(f"{__name__}:bright")
    given = read_images(Path("digits"), 3, settings=None, classes={})
    half = dc.replace(given, images=given.images / 2)
    assert "makes other pixels" in command.check_alike([loaded, loaded], [given, half])
    with pytest.raises(InvalidInput, match="must take images of one size, got 1 x 8 x 8"):
        command.check_alike([loaded, loaded], [given, dc.replace(given, images=torch.zeros(3, 3, 8, 8))])


def test_what_cannot_be_measured_is_refused_and_the_rest_is_there() -> None:
    image = torch.rand(1, 1, 8, 8, dtype=torch.float64)
    found = classifier._constants(nn.Sequential(nn.Flatten(), Reversed(), nn.Linear(64, 10)), image)
    assert (found["constant"], found["layers"]) == (None, [])
    assert found["refused"][0].startswith("the constant of the whole model: ")
    found = classifier._constants(nn.Sequential(nn.Flatten(), Single(), nn.Linear(64, 10)), image)
    assert found["refused"][0].startswith("constants, since the model does not run in float64: ")


class Single(nn.Module):
    """It names a dtype."""

    def forward(self, x: Tensor) -> Tensor:
        """The argument in float32."""
        return x.float()


class Reversed(nn.Module):
    """Its gradient is not its derivative."""

    def forward(self, x: Tensor) -> Tensor:
        """The argument."""
        return 2 * x.detach() - x


@pytest.mark.parametrize(("right", "count"), [(0, 7), (7, 7), (3, 7), (180, 200)])
def test_intervals_are_those_of_clopper_and_pearson(right: int, count: int) -> None:
    exact = stats.binomtest(right, count).proportion_ci(confidence_level=0.95, method="exact")
    assert proportions.clopper_pearson(right, count) == pytest.approx((exact.low, exact.high), abs=1e-12)


@pytest.mark.parametrize(("more", "fewer"), [(0, 0), (1, 0), (2, 9), (9, 2), (30, 31)])
def test_paired_comparisons_by_hand(more: int, fewer: int) -> None:
    known = 1.0 if more + fewer == 0 else stats.binomtest(more, more + fewer, 0.5).pvalue
    assert proportions.mcnemar(more, fewer) == pytest.approx(known)
    low, high = proportions.difference(more, fewer, 100)
    assert low < (more - fewer) / 100 < high
    assert proportions.difference(fewer, more, 100) == pytest.approx((-high, -low))


def test_the_interval_of_a_difference_covers() -> None:
    """Shares 0.7 and 0.6 on the same images, 0.2 and 0.1 of them right for one model only: 2000 draws."""
    draws = np.random.default_rng(0).multinomial(50, [0.2, 0.1, 0.7], size=2000)
    found = [proportions.difference(int(more), int(fewer), 50) for more, fewer, _ in draws]
    assert 0.94 < np.mean([low <= 0.1 <= high for low, high in found]) < 0.98


@pytest.fixture
def _installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The package of the authors of AutoAttack, which stands for it."""
    (tmp_path / "autoattack").mkdir()
    (tmp_path / "autoattack" / "__init__.py").write_text(AUTHORS)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("autoattack", None)


@pytest.mark.skipif(find_spec("autoattack") is not None, reason="the package of its authors is installed here")
def test_the_port_is_used_without_the_package_of_the_authors() -> None:
    assert ways.way_for(10) == STANDARD


@pytest.mark.usefixtures("_installed")
def test_the_package_of_the_authors_is_used_where_it_is_installed() -> None:
    way = ways.way_for(5)
    assert way is not None
    assert way == Way(package="autoattack", targets=4)
    assert ways.way_for(3) == Way(package="autoattack", attacks=("apgd-ce", "fab", "square"), targets=0)
    assert ways.version_of("autoattack").startswith("unknown version, content ")
    images = torch.full((2, 1, 2, 2), 0.5)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 5))
    moved = autoattack(model, images, torch.zeros(2, dtype=torch.long), Ball("l2", 0.5), seed=3, way=way)
    assert torch.equal(moved, images + 0.25)
    said = sys.modules["autoattack"].said
    assert said == ("L2", 0.5, 3, False, "standard", "cpu", ["apgd-ce", "apgd-t", "fab-t", "square"], 4, 4, 2)
    with pytest.raises(InvalidInput, match="at least 5 classes"):
        autoattack(nn.Flatten(), images, torch.zeros(2, dtype=torch.long), Ball("l2", 0.5), seed=3, way=way)


# Takes what AutoAttack of its authors takes, and returns what it returns.
AUTHORS = """
from types import SimpleNamespace

class AutoAttack:
    def __init__(self, model, norm="Linf", eps=0.3, seed=None, verbose=True, version="standard", device="cuda"):
        self.given = norm, eps, seed, verbose, version, device
        self.apgd_targeted, self.fab = SimpleNamespace(n_target_classes=9), SimpleNamespace(n_target_classes=9)

    def run_standard_evaluation(self, x_orig, y_orig, bs=250):
        global said
        said = *self.given, self.attacks_to_run, self.apgd_targeted.n_target_classes, self.fab.n_target_classes, bs
        return x_orig + 0.25
"""


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
        (["--model", "digits-vit", "--model", "digits-vit", "--images", "digits"], "must name each model once"),
        (["--model", "digits-vit", "--images", "digits", "--eps", "l_inf:8"], "is it in units of 1/255?"),
        (
            ["--model", "digits-vit", "--images", "digits", "--results", str(ROOT / "results")],
            "its results are left alone",
        ),
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
    assert program.main(["robustness", "--results", str(tmp_path), *given]) == 2
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
    assert program.main(["robustness", "--eps", "l2:0.5"]) == 2
    assert "--eps goes with the tasks classifier, got robustness" in capsys.readouterr().err
    for wrong in ("0.5", "l1:0.5", "l2:-1", "l2:1/0", "l2:x"):
        with pytest.raises(SystemExit):
            program.main(["robustness", "--model", "digits-vit", "--images", "digits", "--eps", wrong])
        assert "--eps must be NORM:RADIUS, such as l_inf:8/255" in capsys.readouterr().err


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
