"""The study of robustness on images of 28 x 28 pixels: its parts, its page, and the curve over the weight of JaSMin."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bench import __main__ as program
from bench.attacks.ways import APGD, Way
from bench.robustness import attacked, figures, training
from bench.robustness import task as robustness
from bench.robustness.choice import choose
from bench.robustness.image_vit import ImageViT
from bench.robustness.profiles import LARGER_PROFILES, PROFILES
from bench.robustness.settings import ALL, BASELINE, CONTROL, CURVE, Pace, Profile, recipe
from bench.robustness.studies import study_of
from lipbounds.errors import InvalidInput


TINY = Profile(
    settings=(BASELINE, "jasmin 0.03", "jasmin 3", CONTROL),
    seeds=(0, 1),
    epochs=1,
    images=4,
    batch=4,
    eps={"l_inf": (0.05,)},
    blocks=1,
    weak_steps=1,
    pace=Pace(batch=64, rate=3e-3),
    tuning_epochs=2,
    way=APGD,
    standard=tuple((name, 0) for name in (BASELINE, "jasmin 0.03", "jasmin 3", CONTROL)),
)


def write(folder: Path, prefix: str, images: torch.Tensor, labels: torch.Tensor) -> None:
    folder.mkdir(exist_ok=True)
    for name, values in (("images-idx3", images), ("labels-idx1", labels)):
        header = bytes([0, 0, 8, values.dim()]) + struct.pack(f">{values.dim()}I", *values.shape)
        (folder / f"{prefix}-{name}-ubyte").write_bytes(header + values.to(torch.uint8).numpy().tobytes())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twenty images of each of ten classes, sorted by class, and fewer test images."""
    generator = torch.Generator().manual_seed(0)
    for prefix, count in (("train", 20), ("t10k", 3)):
        images = torch.randint(0, 256, (10 * count, 28, 28), generator=generator)
        write(tmp_path / "Fashion", prefix, images, torch.arange(10).repeat_interleave(count))
    return tmp_path / "Fashion"


def test_parts_are_apart_with_the_classes_in_equal_shares(folder: Path) -> None:
    study = study_of(folder)
    split = study.split
    assert study.name == "fashion"
    assert [len(split.train), len(split.validation), len(split.test)] == [180, 20, 30]
    assert split.validation.labels.bincount().tolist() == [2] * 10
    assert not {*split.train.indices.tolist()} & {*split.validation.indices.tolist()}
    assert len(split.test.labels[:10].unique()) > 3  # the first ones are attacked, and may not be of one class
    assert study.data == study_of(folder).data
    for name in ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"):
        (folder / name).unlink()
    alone = study_of(folder)
    parts = [alone.split.train, alone.split.validation, alone.split.test]
    assert [len(part) for part in parts] == [160, 20, 20]
    assert len({number for part in parts for number in part.indices.tolist()}) == 200
    assert alone.data != study.data
    model = study.make()
    assert isinstance(model, ImageViT)
    assert model(split.test.images[:2]).shape == (2, 10)


def test_other_images_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="--train-on must be mnist-5k"):
        study_of(tmp_path)
    write(tmp_path / "small", "train", torch.zeros(3, 8, 8), torch.zeros(3))
    with pytest.raises(InvalidInput, match="28 x 28"):
        study_of(tmp_path / "small")
    assert program.main(["attention", "--train-on", str(folder), "--results", str(tmp_path / "r")], []) == 2


def test_records_of_the_digits_keep_their_keys_and_others_have_keys_of_their_own() -> None:
    plain = recipe(ALL[BASELINE], None, epochs=1, seed=0)
    assert "data" not in plain.to_dict()
    assert recipe(ALL[BASELINE], None, epochs=1, seed=0, data="mnist").to_dict()["data"] == "mnist"
    assert not {*CURVE} & {name for profile in PROFILES.values() for name in profile.settings}


def test_a_model_is_trained_on_from_the_baseline_of_its_seed() -> None:
    found = TINY.recipe(ALL[CONTROL], None, 1)
    assert found.start == TINY.recipe(ALL[BASELINE], None, 1)
    assert found.start is not None
    assert (found.epochs, found.start.epochs) == (2, 1)
    assert found.pace == Pace(batch=64, rate=1e-3)
    assert found.to_dict()["start"] == found.start.to_dict()
    assert not {"pace", "start"} & PROFILES["standard"].recipe(ALL[BASELINE], None, 1).to_dict().keys()
    for profile in LARGER_PROFILES.values():
        places = {name: place for place, name in enumerate(profile.settings)}
        assert all(places.get(ALL[name].start or BASELINE, 99) <= places[name] for name in places)
        assert all(places.get(ALL[name].reference, 99) <= places[name] for name in places)


def test_a_weight_that_is_given_is_not_chosen() -> None:
    nothing: Any = None
    for name, setting in CURVE.items():
        assert choose(nothing, setting, TINY, lambda what: None) == {"weight": setting.weight, "rows": []}
        assert recipe(setting, setting.weight, epochs=1, seed=0).weight == float(name.split()[1])


def test_the_study_goes_on_and_its_page_is_rendered_without_the_images(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []

    def train(*parts: Any, seed: int, make: Any, **options: Any) -> nn.Module:
        made.append(seed)
        torch.manual_seed(seed + len(made))
        return make().eval()

    layer = {"module": "a", "constant": [1.0], "yudin2025.biased": [3.0], "sharp_fast": [2.0]}
    layers = [{**layer, "g_1_mean": 0.1, "g_1_largest": 0.2, "g_1_counts": [3, 1]}]
    monkeypatch.setattr(training, "train", train)
    attacks: list[tuple[str, ...]] = []

    def autoattack(model: nn.Module, images: torch.Tensor, *rest: Any, way: Way, **options: Any) -> torch.Tensor:
        attacks.append(way.attacks)
        return images

    monkeypatch.setattr(attacked, "autoattack", autoattack)
    monkeypatch.setattr(robustness, "blocks", lambda model, images: {"layers": layers})
    monkeypatch.setattr(figures, "_histograms", lambda data: None)
    monkeypatch.setitem(LARGER_PROFILES, "standard", TINY)
    results = tmp_path / "results"
    arguments = ["robustness", "--train-on", str(folder), "--results", str(results)]
    assert program.main(arguments, []) == 0
    assert made == [0] * 4 + [1] * 4
    page = (results / "robustness_fashion.md").read_text()
    assert "PGD-1, l_inf 0.05" in page
    assert "How the weights were chosen" not in page
    assert f"--train-on {folder}" in page
    assert (results / "robustness_fashion_weights.png").exists()
    assert not (results / "robustness.md").exists()
    models = {
        name: setting["models"]
        for name, setting in json.loads((results / "robustness_fashion.json").read_text())["settings"].items()
    }
    assert len(models["jasmin 3"][0]["weak"]["l_inf"]) == 1
    for baseline, tuned in zip(models[BASELINE], models[CONTROL], strict=True):
        assert tuned["weights"] == baseline["weights"]  # where it starts, as nothing moves it here
    assert [["standard" in model for model in setting] for setting in models.values()] == [[True, False]] * 4
    assert {*attacks} <= {APGD.attacks, Way().attacks}
    assert program.main(arguments, []) == 0
    assert len(made) == 8  # nothing is trained twice
    (results / "robustness_fashion.md").unlink()
    monkeypatch.setattr("bench.robustness.command.study_of", None)
    assert program.main(["render", "--results", str(results)], []) == 0
    assert (results / "robustness_fashion.md").read_text() == page
