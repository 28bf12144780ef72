"""The task `certified`: answers are kept and found again, violations are seen, and the page says what the data says."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bench.certified import tables as certified_tables
from bench.certified import task as certified
from bench.engine.records import RecordError
from bench.engine.store import Store
from lipbounds.errors import InvalidInput


def row(image: int, radius: float, correct: bool = True) -> dict[str, Any]:
    return {"image": image, "radius": radius, "product_radius": radius / 9, "correct": correct, "seconds": 1.0}


DATA: dict[str, Any] = {
    "models": {
        "lipschitz-vit": {
            "certificates": [row(3, 0.3), row(5, 0.1), row(8, 0.0, False)],
            "attacks": [{"radius": 0.2, "distance": 0.2, "robust": [True, False, False]}],
        },
        "digits-vit": {"certificates": [row(3, 1e-5)], "attacks": []},
    },
    "whole": {
        "digits-vit": {
            **{"bound": 300.0, "joint": None, "constant": 10.2, "lower": 10.0},
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
    assert "image 3 is certified to 0.3" in found
    # An attack that went further than it was told is no witness.
    wrong["models"]["lipschitz-vit"]["attacks"][0]["distance"] = 0.4
    assert certified.violations(wrong) == []
    wrong["whole"]["digits-vit"]["lower"] = 301.0
    assert "below 301" in certified.violations(wrong)[0]


def test_the_page_and_the_figure(tmp_path: Path) -> None:
    page = certified_tables.report(DATA, "python -m bench certified", "a machine")
    assert "| 0.2      | 0.3333               | 0.3333" in page
    assert "| 0        | 0.6667" in page
    assert "| digits-vit | 300 " in page
    assert "`head`" in page
    paths = certified_tables.draw(DATA, tmp_path)
    assert [path.name for path in paths] == ["certified.png", "certified.svg"]
    before = paths[1].read_bytes()
    assert certified_tables.draw(DATA, tmp_path)[1].read_bytes() == before


@pytest.mark.parametrize(
    ("images", "classes", "message"),
    [
        (torch.full((1, 1, 2, 2), 1.5), 10, "pixels"),
        (torch.full((1, 4), 0.5), 10, "four dimensions"),
        (torch.full((1, 1, 2, 2), 0.5), 9, "at least ten"),
    ],
)
def test_what_the_attack_would_silently_change_is_refused(images: torch.Tensor, classes: int, message: str) -> None:
    pytest.importorskip("pyautoattack")
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, classes))
    with pytest.raises(InvalidInput, match=message):
        certified.attack(model, images, torch.zeros(1, dtype=torch.long), 0.1)


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
    assert all(certified.attack(model, images, labels, 0.98 * radius)["robust"])
    assert not all(certified.attack(model, images, labels, 1.05 * radius)["robust"])
