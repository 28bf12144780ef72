"""The task `robustness`: its statistics, its losses, going on after a kill, and the page."""

from __future__ import annotations

import copy
import dataclasses as dc
import functools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from bench import __main__ as program
from bench.attacks.images import Ball
from bench.attacks.ways import Way
from bench.engine.answers import Shown
from bench.engine.records import NotAnswered, RecordError
from bench.engine.store import Store
from bench.engine.store_file import Page
from bench.robustness import attacked, choice, figures, measures, penalties, settings, tables, training
from bench.robustness import task as robustness
from bench.robustness.choice import best, tried
from bench.robustness.own import loss_setting, penalty_setting
from bench.robustness.penalties import loss_of
from bench.robustness.profiles import PROFILES
from bench.robustness.settings import SETTINGS, Profile, recipe
from bench.robustness.statistics import holm, interval, paired, worst_case
from bench.robustness.summary import summarised, verdict
from bench.robustness.training import Workshop
from lipbounds.capture import capture
from lipbounds.errors import InvalidInput
from lipbounds.estimators.exact import exact_norm
from lipbounds.models.digits_data import DigitsSplit, LabelledImages, load_digits_split
from lipbounds.models.digits_vit import DigitsViT, load_digits_vit


TINY = Profile(
    settings=("none", "jasmin"),
    seeds=(0, 1),
    epochs=1,
    images=4,
    batch=3,
    eps={"l_inf": (0.01, 0.05), "l2": (0.1,)},
    blocks=1,
    largest_grid=2,
)


@pytest.fixture(scope="module")
def split() -> DigitsSplit:
    """With few validation images: weights are chosen with all of them."""
    whole = load_digits_split()
    few = whole.validation
    return dc.replace(whole, validation=LabelledImages(few.images[:8], few.labels[:8], few.indices[:8]))


# -- statistics -----------------------------------------------------------------------------------------------------


def test_an_image_stands_only_if_every_attack_up_to_that_radius_failed() -> None:
    clean = [True, True, True, False]
    runs = {0.2: [[True, True, False, True]], 0.1: [[True, False, True, True], [True, True, True, True]]}
    found = worst_case(clean, runs)
    assert found == {0.1: [True, False, True, False], 0.2: [True, False, False, False]}


def test_the_interval_is_the_one_of_student() -> None:
    found = interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert found["mean"] == 3.0
    # t(0.975, 4) = 2.776445, and the standard error is sqrt(2.5 / 5).
    assert found["half"] == pytest.approx(2.776445 * math.sqrt(0.5), rel=1e-6)
    assert interval([2.0])["half"] is None


def test_the_paired_test_by_hand() -> None:
    """Differences 1 to 5: t = 3 / sqrt(0.5) = 4.2426 with 4 degrees of freedom, p = 0.013236."""
    values, reference = [2.0, 4.0, 6.0, 8.0, 10.0], [1.0, 2.0, 3.0, 4.0, 5.0]
    found = paired(values, reference)
    assert found["mean"] == 3.0
    assert found["p"] == pytest.approx(0.0132356, rel=1e-4)
    assert found["p"] == pytest.approx(stats.ttest_rel(values, reference).pvalue, rel=1e-9)
    assert paired([1.0, 2.0], [1.0, 2.0])["p"] == 1.0
    assert paired([1.0], [0.5])["p"] is None


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


# -- the choice of a weight -----------------------------------------------------------------------------------------


def test_the_most_robust_of_the_accurate_weights_is_chosen() -> None:
    rows = [
        {"weight": 0.1, "clean": 0.97, "robust": 0.5},
        {"weight": 0.3, "clean": 0.96, "robust": 0.6},
        {"weight": 0.6, "clean": 0.96, "robust": 0.6},
        {"weight": 1.0, "clean": 0.90, "robust": 0.9},
    ]
    assert best(rows, 0.97)["weight"] == 0.3
    assert best(rows, 0.99)["weight"] == 0.1
    assert tried((1.0, 2.0, 3.0), 1) == (2.0,)
    assert tried((1.0, 2.0, 3.0, 4.0), 2) == (2.0, 3.0)
    assert tried((1.0, 2.0), 0) == (1.0, 2.0)


# -- losses ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SETTINGS)
def test_gradients_are_finite_and_the_penalty_reaches_the_queries(name: str, split: DigitsSplit) -> None:
    setting = SETTINGS[name]
    model: Any = load_digits_vit()
    images, labels = split.train.images[:4], split.train.labels[:4]
    gradients = []
    for weight in (0.0, 1.0):
        used = dc.replace(recipe(setting, 1.0 if setting.grid else None, epochs=1, seed=0), weight=weight)
        model.zero_grad()
        loss_of(used)(model, images, labels, torch.Generator().manual_seed(0)).backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        assert all(bool(parameter.grad.isfinite().all()) for parameter in model.parameters())
        gradients.append(model.blocks[0].attention.query.weight.grad.clone())
    assert torch.equal(*gradients) == (not setting.penalty)


def test_every_way_to_train_is_declared_in_order() -> None:
    assert set(penalties.PENALTIES) == {setting.penalty for setting in SETTINGS.values() if setting.penalty}
    for profile in PROFILES.values():
        places = {name: place for place, name in enumerate(profile.settings)}
        assert profile.settings[0] == settings.BASELINE
        assert all(places[SETTINGS[name].reference] <= places[name] for name in places)
        assert all(list(radii) == sorted(radii) for radii in profile.eps.values())


def test_the_projected_jacobian_is_right_in_the_mean() -> None:
    model: Any = nn.Sequential(nn.Flatten(), nn.Linear(4, 10))
    weight = model[1].weight.detach()
    _, found = penalties.jacobian(model, torch.rand(20_000, 1, 2, 2), torch.Generator().manual_seed(0))
    assert float(found.detach()) == pytest.approx(float(weight.square().sum() / 2), rel=0.02)


def test_the_spectral_penalty_is_a_mean_of_norms() -> None:
    model: Any = load_digits_vit()
    _, found = penalties.spectral(model, torch.zeros(1, 1, 8, 8), torch.Generator())
    norms = [
        float(torch.linalg.svdvals(getattr(block.attention, part).weight.detach())[0])
        for block in model.blocks
        for part in ("query", "key", "value")
    ]
    assert float(found.detach()) == pytest.approx(sum(norms) / len(norms), rel=1e-5)


# -- measures -------------------------------------------------------------------------------------------------------


def test_constants_are_those_of_the_jacobian(split: DigitsSplit) -> None:
    model, image = copy.deepcopy(load_digits_vit()).double(), split.test.images[:2].double()
    found, logits = measures.network_constants(model, image)
    one: Any = torch.autograd.functional.jacobian(lambda x: model(x[None])[0], image[1])
    assert float(found[1]) == pytest.approx(float(torch.linalg.matrix_norm(one.reshape(10, 64), ord=2)), rel=1e-9)
    assert torch.allclose(logits, model(image).detach())


def test_blocks_are_measured_between_truth_and_bounds(split: DigitsSplit) -> None:
    model, image = load_digits_vit().double(), split.test.images[:1].double()
    layers = measures.blocks(model, image)["layers"]
    with torch.no_grad():
        block = capture(model, image)[2].attention
    truth = float(exact_norm(block))
    assert len(layers) == 4
    assert truth * (1 - 1e-6) <= layers[2]["constant"][0] <= 1.05 * truth
    assert layers[2]["sharp_fast"][0] >= truth
    assert all(sum(layer["g_1_counts"]) == 17 * 4 for layer in layers)
    assert all(0 < layer["g_1_mean"] <= layer["g_1_largest"] <= 0.5 for layer in layers)


# -- a whole run ----------------------------------------------------------------------------------------------------


class Killed(Exception):
    pass


class Fakes:
    """Stands for training, AutoAttack and the measures of blocks; every call counts, and one of them kills the run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        self.fatal = -1
        monkeypatch.setattr(training, "train", self.train)
        monkeypatch.setattr(attacked, "autoattack", self.autoattack)
        monkeypatch.setattr(robustness, "blocks", self.blocks)
        monkeypatch.setattr(attacked, "PGD_STEPS", 2)
        monkeypatch.setattr(choice, "CHOICE_STEPS", 1)

    def count(self, what: str) -> None:
        if len(self.calls) == self.fatal:
            self.fatal = -1
            raise Killed
        self.calls.append(what)

    def train(self, *parts: Any, seed: int, loss: Any, after_epoch: Any, **options: Any) -> DigitsViT:
        """The committed weights, shaken."""
        self.count(f"train {seed}")
        model, generator = copy.deepcopy(trained()), torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.01 * torch.randn(parameter.shape, generator=generator)
        after_epoch(0.5, 1.0)
        return model

    def autoattack(
        self, model: nn.Module, images: Tensor, labels: Tensor, ball: Ball, *, seed: int, way: Way
    ) -> Tensor:
        self.count(f"attack {ball.norm} {ball.eps}")
        noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
        return (images + ball.eps * noise).clamp(0, 1)

    def blocks(self, model: nn.Module, images: Tensor) -> dict[str, Any]:
        self.count("blocks")
        value = float(next(model.parameters()).sum().abs()) + 1.0
        layer = {"module": "a", "constant": [value], "yudin2025.biased": [3 * value], "sharp_fast": [2 * value]}
        return {"layers": [{**layer, "g_1_mean": 0.1, "g_1_largest": 0.2, "g_1_counts": [3, 1]}]}


@functools.cache
def trained() -> DigitsViT:
    return load_digits_vit()


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "robustness.jsonl").read_text().splitlines()]


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Fakes:
    return Fakes(monkeypatch)


def workshop(folder: Path, split: DigitsSplit, **options: Any) -> Workshop:
    """The file is let go where it was open before, as when a process ends."""
    path = folder / "robustness.jsonl"
    if path in OPEN:
        OPEN.pop(path).close()
    store = Store(path, **options)
    OPEN[path] = store
    return Workshop(store, folder / ".work", split)


OPEN: dict[Path, Store] = {}


def test_a_killed_run_goes_on_where_it_was(fakes: Fakes, split: DigitsSplit, tmp_path: Path) -> None:
    places: list[str] = []
    whole = robustness.run(workshop(tmp_path / "whole", split), TINY, advance=places.append)
    assert len(places) == robustness.pieces(TINY)
    expected = fakes.calls
    for fatal in (3, len(expected) // 2):
        fakes.calls, fakes.fatal = [], fatal
        folder = tmp_path / str(fatal)
        with pytest.raises(Killed):
            robustness.run(workshop(folder, split), TINY)
        again = workshop(folder, split)
        assert robustness.run(again, TINY) == whole
        assert fakes.calls == expected, "something was made twice"
        keys = [line["key"] for line in lines_of(folder) if line["record"] == "answer"]
        assert len(keys) == len(set(keys)) == len(again.answers.entries)
    fakes.calls = []
    forced = workshop(folder, split)
    forced.force = True
    assert robustness.run(forced, TINY) == whole
    assert fakes.calls == expected, "something was not made again, or made twice"
    # All of it is there: nothing is made, not even a model loaded.
    fakes.calls = []
    closed = workshop(tmp_path / "whole", split, only_read=True)
    assert robustness.run(closed, TINY) == whole
    assert fakes.calls == []
    # A page needs neither images nor hashes.
    page = Shown(closed.store, Page(keys=list(closed.store.asked)))
    assert robustness.run(Workshop(page, tmp_path), TINY) == whole


@pytest.mark.usefixtures("_one_thread")
def test_several_processes_make_the_same_answers(split: DigitsSplit, tmp_path: Path) -> None:
    profile = dc.replace(TINY, settings=("none",), eps={"l_inf": (1.0,)}, images=2)  # where FGSM fools all
    places: list[str] = []
    alone, together = workshop(tmp_path / "alone", split), workshop(tmp_path / "together", split)
    whole = robustness.run(alone, profile)
    assert robustness.run(together, profile, jobs=2, advance=places.append) == whole
    assert len(places) == robustness.pieces(profile)
    assert together.store.made == alone.store.made == len(together.store.entries)
    assert together.store.reused == alone.store.reused == 0
    assert list(together.store.asked) == list(alone.store.asked)
    keys = [line["key"] for line in lines_of(tmp_path / "together") if line["record"] == "answer"]
    assert sorted(keys) == sorted(together.store.entries)


def squeezed(model: nn.Module, images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A penalty as a user writes it."""
    logits = model(images)
    return logits, logits.square().mean()


def smoothed(model: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    """A loss as a user writes it."""
    return nn.functional.cross_entropy(model(images), labels, label_smoothing=0.1)


OWN = ["--penalty", f"{__name__}:squeezed", "--weight", "0.5", "--loss", f"{__name__}:smoothed"]


def test_functions_of_a_user_are_what_is_minimised(split: DigitsSplit) -> None:
    model: Any = load_digits_vit()
    images, labels = split.train.images[:4], split.train.labels[:4]
    logits, generator = model(images), torch.Generator()
    plain = nn.functional.cross_entropy(logits, labels)
    given = penalty_setting(f"{__name__}:squeezed", [0.5, 2.0])
    assert given.grid == (0.5, 2.0)
    used = recipe(given, 0.5, epochs=1, seed=0)
    found = loss_of(used)(model, images, labels, generator)
    torch.testing.assert_close(found, plain + 0.5 * logits.square().mean())
    other = recipe(loss_setting(f"{__name__}:smoothed"), None, epochs=1, seed=0)
    expected = smoothed(model, images, labels, generator)
    torch.testing.assert_close(loss_of(other)(model, images, labels, generator), expected)
    # What tells it from other code is kept with its answers, and the answers of other settings stay as they are.
    assert {"code", "loss"} & set(used.to_dict()) == {"code"}
    assert not {"code", "loss"} & set(recipe(SETTINGS["jasmin"], 0.1, epochs=1, seed=0).to_dict())


def test_settings_of_a_user_stand_beside_the_others(
    fakes: Fakes, split: DigitsSplit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = dc.replace(TINY, settings=("none",), eps={"l2": (0.1,)}, images=2)
    monkeypatch.setitem(PROFILES, "standard", few)
    monkeypatch.setattr(figures, "draw", lambda *parts: [])
    monkeypatch.setattr("bench.engine.options.ROOT", tmp_path)  # no records are copied
    monkeypatch.setattr("bench.robustness.studies.load_digits_split", lambda: split)
    mine = tmp_path / "mine"
    assert program.main(["robustness", *OWN, "--results", str(mine)]) == 0
    page, data = (mine / "robustness.md").read_bytes(), json.loads((mine / "robustness.json").read_text())
    names = [*data["settings"]]
    assert names[0] == "none"
    assert [name.rsplit("-", 1)[-1] for name in names[1:]] == ["squeezed", "smoothed"]
    assert all(len(setting["models"]) == len(TINY.seeds) for setting in data["settings"].values())
    assert data["settings"][names[1]]["choice"]["weight"] == 0.5
    assert data["settings"][names[2]]["choice"]["weight"] is None
    compared = {(row["setting"], row["reference"]) for row in data["comparisons"]}
    assert {(name, "none") for name in names[1:]} == compared
    assert f"{__name__}:squeezed".encode() in page
    assert b"--penalty" in page
    # The page can be made again without the functions, and nothing is made twice.
    monkeypatch.delattr(f"{__name__}.smoothed")
    (mine / "robustness.md").unlink()
    assert program.main(["render", "--results", str(mine)]) == 0
    assert (mine / "robustness.md").read_bytes() == page


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda model, images: None, "raised TypeError"),
        (lambda model, images, generator: model(images).mean(), "must return the pair .*, got a tensor of shape"),
        (lambda model, images, generator: (model(images), model(images)), r"got \(a tensor of shape \(4, 10\)"),
        (lambda model, images, generator: (model(images)[:2], model(images).mean()), "logits of shape \\(4, 10\\)"),
        (lambda model, images, generator: (model(images), torch.tensor(1.0)), "without a gradient"),
        (lambda model, images, generator: (model(images), images.mean().requires_grad_()), "must return a finite"),
        (lambda model, images, generator: (model(images), model(images).mean() / 0), "must return a finite"),
        ("no function", "must be a function, got str"),
    ],
)
def test_a_function_that_breaks_the_contract_is_refused(
    function: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{__name__}.squeezed", function)
    with pytest.raises(InvalidInput, match=message):
        penalty_setting(f"{__name__}:squeezed")


def test_autoattack_sees_only_images_that_still_stand(fakes: Fakes, split: DigitsSplit, tmp_path: Path) -> None:
    place = workshop(tmp_path, split)
    robustness.run(place, TINY)
    rows = [entry.flat for entry in place.store.entries.values()]
    for row in (row for row in rows if row["what"] == "autoattack"):
        same = [other for other in rows if all(other.get(key) == row[key] for key in ("setting", "seed", "weights"))]
        (first,) = (
            other
            for other in same
            if other["what"] == "gradient attacks"
            and other["attack"] == row["attack"]
            and set(row["images"]) <= set(other["images"])
        )
        fallen = {
            image
            for image, one, many in zip(first["images"], first["fgsm"], first["pgd"], strict=True)
            if not (one and many)
        }
        assert not fallen & set(row["images"])
    assert any(row["what"] == "autoattack" for row in rows)


def test_other_weights_than_those_of_the_records_are_an_error(fakes: Fakes, split: DigitsSplit, tmp_path: Path) -> None:
    given = recipe(SETTINGS["none"], None, epochs=1, seed=0)
    model = workshop(tmp_path, split).trained(given)
    path = model.workshop.path(given)
    path.unlink()
    assert workshop(tmp_path, split).trained(given).model() is not None
    assert fakes.calls == ["train 0", "train 0"]
    path.write_bytes(b"torn")
    assert workshop(tmp_path, split).trained(given).model() is not None
    changed = copy.deepcopy(trained())
    changed.head.bias.data += 1
    path.unlink()
    fakes.train = lambda *parts, **options: changed  # type: ignore[method-assign]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "train", fakes.train)
        with pytest.raises(RecordError, match="must have the hash"):
            workshop(tmp_path, split).trained(given).model()


def test_records_that_are_only_read_are_not_added_to(fakes: Fakes, split: DigitsSplit, tmp_path: Path) -> None:
    with pytest.raises(NotAnswered):
        robustness.run(workshop(tmp_path, split, only_read=True), TINY)
    assert fakes.calls == []


def test_the_page_says_what_the_numbers_say(fakes: Fakes, split: DigitsSplit, tmp_path: Path) -> None:
    data = {**robustness.run(workshop(tmp_path, split), TINY), "environments": ["here"]}
    for place, setting in enumerate(data["settings"].values()):
        for seed, model in enumerate(setting["models"]):
            model["constants"] = [(2.0 - place) * (1 + 1e-3 * seed * (1 + place))] * 4
            model["clean"] = 0.9
            for row in model["robust"]["l_inf"] + model["robust"]["l2"]:
                row["worst"] = 0.5 + 0.2 * place + 0.01 * seed * place
    summary = summarised(data)
    page = tables.report(data, summary, "python -m bench robustness", "robustness")
    assert "| no penalty" in page
    assert "| JaSMin, k = 10 | 90.0 ± 0.0 | 70.5 ± 6.4" in " ".join(page.split())
    rows = {row["measure"]: row for row in summary["comparisons"]}
    assert verdict(rows["network"]) == "lower"
    assert rows["network"]["mean"] == pytest.approx(math.log(0.5), abs=1e-3)
    assert verdict(rows["clean"]) == "no significant difference"
    assert verdict({"p": None}) == "not tested"
    assert "lower (local constant of the network" in page
    assert "x 0.500" in page
    paths = figures.draw(data, summary, tmp_path, "robustness")
    assert {path.suffix for path in paths} == {".png", ".svg"}
    assert all(path.stat().st_size > 1000 for path in paths)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["robustness", "--full", "--quick"], "--quick and --full do not go together"),
        (["balls", "--full"], "--full goes with the tasks certified, pretrained, robustness, got balls"),
        (["robustness", "--jobs", "0"], "--jobs is a number from 1"),
        (["robustness", "--penalty", "a:b"], "its results are left alone"),
        (["robustness", "--penalty", "no.such:function", "--results", "mine"], "must be given as package.module"),
        (["robustness", "--weight", "1", "--results", "mine"], "--weight goes with --penalty"),
        (["robustness", "--penalty", "a:b", "--weight", "-1"], "--weight must be a number of at least 0"),
        (["balls", "--jobs", "2"], "--jobs goes with the tasks robustness, got balls"),
        (["robustness", "--jobs", "2", "--model", "a", "--images", "b"], "--jobs goes with the tasks robustness, got"),
    ],
)
def test_the_command_refuses_what_makes_no_sense(
    capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    try:
        status = program.main(arguments)
    except SystemExit as left:  # the parser's own
        status = left.code
    assert status == program.MISUSE
    assert said in capsys.readouterr().err
