"""The task `certified`: answers are kept and found again, violations are seen, and the page says what the data says."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bench.certified import command, instances, radii
from bench.certified import tables as certified_tables
from bench.certified import task as certified
from bench.certified.figure import draw
from bench.engine.answers import Shown
from bench.engine.records import RecordError
from bench.engine.store import Store
from lipbounds.errors import InvalidInput
from lipbounds.targets.layers import AttentionLayer, Pool, Sequence
from lipbounds.testing.recipes import Recipe, build


def row(image: int, radius: float, correct: bool = True, method: str = "taylor", norm: str = "l2") -> dict[str, Any]:
    shared = {"image": image, "correct": correct, "seconds": 1.0, "weights": "abc", "norm": norm, "kind": "proved"}
    return {**shared, "radius": radius, "method": method, "attacked": 0.1 if radius else None}


def smooth(image: int, radius: float) -> dict[str, Any]:
    found = row(image, radius) | {"kind": "probable", "sigma": 0.25, "samples": 1000, "delta": 1e-3}
    return {key: value for key, value in found.items() if key not in ("method", "norm", "attacked")}


def attack(radius: float, robust: list[bool]) -> dict[str, Any]:
    return {"radius": radius, "distance": radius, "robust": robust, "images": [3, 5, 8][: len(robust)]}


DATA: dict[str, Any] = {
    "models": {
        "lipschitz-vit": {
            "certificates": [row(3, 0.3), row(5, 0.1), row(8, 0.0, False), row(3, 0.05, method="joint")],
            "attacks": [attack(0.2, [True, False, False])],
            "smallest": [{"images": [3, 5, 8], "distances": [0.4, 0.15, 0.0]}],
            "smoothing": [smooth(3, 0.6)],
            "published": [],
        },
        "mnist-vit": {
            "certificates": [row(3, 1e-5), row(3, 0.02, norm="l_inf"), row(5, 0.04, norm="l_inf")],
            "attacks": [],
            "smallest": [],
            "smoothing": [],
            "published": [
                {"source": "A, B", "mean": 0.19, "median": 0.18, "smallest": 0.05, "largest": 0.29}
                | {"images": 100, "seconds": 8.2, "norm": norm}
                for norm in ("l2", "l_inf")
            ],
        },
    },
    "whole": {
        "digits-vit": {
            **{"bound": 300.0, "joint": None, "formed": 10.1, "constant": 10.2, "lower": 10.0},
            "layers": [
                {"path": "head", "description": "linear", "bound": 2.0, "reached": 1.0, "so_far": 300.0},
            ],
        }
    },
}


def test_answers_are_found_again(tmp_path: Path) -> None:
    path, question = tmp_path / "certified.jsonl", {"image": 3}
    made: list[int] = []

    def work() -> dict[str, Any]:
        made.append(1)
        return {"radius": 0.5}

    with Store(path) as first:
        assert first.ask(question, work)["radius"] == 0.5
    with Store(path) as again:
        assert again.ask(question, work)["radius"] == 0.5
        assert (len(made), again.reused, again.made) == (1, 1, 0)
        again.ask({"image": 4}, work)
        again.ask(question, work, force=True)
        again.ask(question, work, force=True)  # made in this run
    assert len(made) == 3
    assert len(Store(path, only_read=True).entries) == 2


def test_a_torn_last_line_is_dropped_and_others_are_errors(tmp_path: Path) -> None:
    path = tmp_path / "certified.jsonl"
    with Store(path) as store:
        store.ask({"image": 3}, lambda: {"radius": 0.5})
    whole = path.read_text()
    path.write_text(whole + '{"key": "half')
    with Store(path) as store:
        assert len(store.entries) == 1
    assert path.read_text() == whole
    path.write_text('{"key": "half\n' + whole)
    with pytest.raises(RecordError, match="must be a JSON object"):
        Store(path)
    path.write_text('{"schema_version": -1, "key": "a"}\n')
    with pytest.raises(RecordError, match="schema_version=-1"):
        Store(path)


def test_an_attack_inside_a_certified_radius_is_a_violation() -> None:
    assert certified.violations(DATA) == []
    wrong = copy.deepcopy(DATA)
    wrong["models"]["lipschitz-vit"]["attacks"][0]["robust"][0] = False
    (found,) = certified.violations(wrong)
    assert "image 3 is certified to 0.3 by taylor" in found
    # An attack that went further than it was told is no witness.
    wrong["models"]["lipschitz-vit"]["attacks"][0]["distance"] = 0.4
    assert certified.violations(wrong) == []
    far = copy.deepcopy(wrong)
    far["models"]["lipschitz-vit"]["certificates"] = [row(3, 0.9, norm="l1"), row(3, 0.1)]
    assert certified.violations(far) == []
    wrong["models"]["lipschitz-vit"]["smallest"][0]["distances"][0] = 0.299
    assert "is 0.299 away" in certified.violations(wrong)[0]
    wrong["models"]["lipschitz-vit"]["smallest"] = []
    wrong["models"]["lipschitz-vit"]["certificates"][3]["attacked"] = -1e-9
    assert "by joint, and the self-check" in certified.violations(wrong)[0]
    wrong["models"]["lipschitz-vit"]["certificates"][3]["attacked"] = 1.0
    wrong["whole"]["digits-vit"]["lower"] = 301.0
    assert "below 301" in certified.violations(wrong)[0]


def test_the_page_and_the_figure(tmp_path: Path) -> None:
    page = certified_tables.report(DATA, "python -m bench certified", "a machine")
    assert "python -m bench certified --deept DIR" in page
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines()]
    # At 0.2: one of three images by taylor, none of one by joint; AutoAttack and the nearest image found leave one.
    assert ["0.2", "0.3333", "0.0000", "0.3333", "0.3333"] in cells
    assert ["0", "0.6667", "1.000", "-", "0.6667"] in cells
    assert ["DeepT (A, B)", "published", "100", "0.1900", "0.1800", "0.0500", "0.2900", "8.20"] in cells
    assert ["taylor", "proved", "2", "0.0300", "0.0300", "0.0200", "0.0400", "1.000"] in cells
    assert ["taylor", "proved", "1", "1.00e-05", "1.00e-05", "1.00e-05", "1.00e-05", "1.000"] in cells
    assert page.count("| published ") == 2
    assert ["108/255", "0.0000", "-", "-"] in cells
    # Smoothing is in no table.
    (smoothing,) = [line for line in page.splitlines() if "median 0.6000" in line]
    assert smoothing.startswith("Smoothing, probable")
    assert "| digits-vit | 300 " in page
    assert "`head`" in page
    paths = draw(DATA, tmp_path)
    assert [path.name for path in paths] == ["certified.png", "certified.svg"]
    before = paths[1].read_bytes()
    assert draw(DATA, tmp_path)[1].read_bytes() == before


def test_every_radius_is_in_the_file_with_its_kind(tmp_path: Path) -> None:
    lines = instances.write(DATA, tmp_path).read_text().splitlines()
    assert lines[0] == "model,model_hash,image,method,radius,norm,kind,correct,delta,seconds"
    assert lines[1] == "lipschitz-vit,abc,3,taylor,0.3,l2,proved,True,,1.00"
    assert lines[5] == "lipschitz-vit,abc,3,smoothing,0.6,l2,probable,True,0.001,1.00"
    assert len(lines) == 9


@pytest.mark.parametrize(
    ("images", "classes", "message"),
    [
        (torch.full((1, 1, 2, 2), 1.5), 10, "pixels"),
        (torch.full((1, 4), 0.5), 10, "four dimensions"),
        (torch.full((1, 1, 2, 2), 0.5), 9, "at least 10 classes"),
    ],
)
def test_what_the_attack_would_silently_change_is_refused(images: torch.Tensor, classes: int, message: str) -> None:
    pytest.importorskip("pyautoattack")
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, classes))
    with pytest.raises(InvalidInput, match=message):
        radii.attack(model, images, torch.zeros(1, dtype=torch.long), 0.1)


def test_no_certified_image_falls_to_autoattack() -> None:
    """A linear classifier, whose certified radius is exact: the attack succeeds just outside, and never inside."""
    pytest.importorskip("pyautoattack")
    from lipbounds.certify import certify
    from lipbounds.targets.layers import Linear, Patches, Sequence

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(10, 64, generator=generator)
    images = 0.3 + 0.4 * torch.rand(1, 1, 8, 8, generator=generator)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10, bias=False))
    model[1].weight.data = weight
    labels = model(images).argmax(1)
    network = Sequence((Patches((8, 8), (8, 8)), Linear(weight)))
    radius = float(certify(network, images, labels).radius.min())
    assert all(radii.attack(model, images, labels, 0.98 * radius)["robust"])
    assert not all(radii.attack(model, images, labels, 1.05 * radius)["robust"])


def test_a_small_run_is_kept_and_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One image of the ViT made to be certified, by every method, with little smoothing and no attack."""
    monkeypatch.setitem(radii.SMOOTHING, "samples", 50)
    amounts = {"lipschitz-vit": radii.Amount(images=1, slower=1, smoothed=1)}
    profile = certified.Profile(amounts=amounts, whole=(), formed=())
    told: list[str] = []
    with Store(tmp_path / "certified.jsonl") as store:
        certified.run(store, profile, advance=told.append)
        page = store.show("standard", store.asked, command="python -m bench certified", profile="standard")
    assert len(told) == certified.pieces(profile) == 4
    data = certified.shown(Shown(Store(tmp_path / "certified.jsonl", only_read=True), page))
    by_method = {one["method"]: one["radius"] for one in data["models"]["lipschitz-vit"]["certificates"]}
    assert by_method["taylor"] > by_method["joint"] > by_method["product"] > 0
    assert certified.violations(data) == []


def test_a_run_without_the_folder_leaves_its_model_on_the_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Store(tmp_path / "certified.jsonl") as store:
        assert command.of_the_folder(store, "standard") == []
        own, other = (
            store.ask({"task": "certified", "model": name, "what": "published"}, dict)
            for name in ("mnist-vit", "digits-vit")
        )
        store.show("standard", store.asked)
        assert [store.entries[key].flat for key in command.of_the_folder(store, "standard")] == [own]
        assert own != other
        assert command.of_the_folder(store, "quick") == []
    assert "mnist-vit are shown as they were measured before; give --deept DIR" in capsys.readouterr().err


def test_the_layers_of_a_model_of_which_one_token_is_read_are_those_that_were_bounded() -> None:
    block = build(Recipe(seed=3, n=4, dim=3))
    found = certified._whole(Sequence((AttentionLayer(block), Pool("first"))), block.x[None])
    assert len(found["layers"]) == 1
    assert found["layers"][0]["reached"] <= found["layers"][0]["bound"] == pytest.approx(found["bound"])
