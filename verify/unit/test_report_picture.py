"""The numbers in the picture of the documentation are those that the code gives today."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lipbounds import registry
from lipbounds.capture import capture
from lipbounds.models.loading import load_model
from lipbounds.report import from_json
from lipbounds.report.inputs import default_inputs
from lipbounds.report.schema import SCHEMA_VERSION
from lipbounds.report.summary import fragile_layer, summary


IMAGES = Path(__file__).parents[2] / "docs" / "images"


def test_the_picture_shows_what_the_code_gives() -> None:
    text = (IMAGES / "report.json").read_text()
    assert json.loads(text)["schema_version"] == SCHEMA_VERSION
    report = from_json(text)
    (run,) = report.inputs
    assert summary(run) == json.loads(text)["inputs"][0]["summary"]
    loaded = load_model(report.model)
    (given,) = default_inputs(loaded)
    place = fragile_layer(run)
    assert place is not None
    layer, found = run.layers[place], capture(loaded.module, *given.args)[place]
    block = found.attention.double
    block = block.replace(x=block.x[0])
    smallest = min(ball.radius or 0.0 for ball in layer.balls)
    for number in (*layer.proved, *(ball for ball in layer.balls if ball.radius == smallest)):
        radius = {} if number.radius is None else {"radius": number.radius}
        again = registry.get(number.method)(block, **radius)
        assert float(again) == pytest.approx(number.value, rel=1e-6), number.method
        assert again.kind == number.kind
