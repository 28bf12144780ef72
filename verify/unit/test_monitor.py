"""The constants of the layers while a model is trained."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import lipbounds
from lipbounds import InvalidInput, LipschitzMonitor


X = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))


def model() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.5, batch_first=True)
        return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).train()


def test_numbers_bracket_the_truth_and_follow_the_weights() -> None:
    trained = model()
    monitor = LipschitzMonitor(trained, X, upper_every=2)
    first = monitor.step(0)
    with torch.no_grad():
        trained.layers[0].self_attn.out_proj.weight.mul_(3.0)  # pyright: ignore
    second = monitor.step(1)
    truths = [float(lipbounds.get("exact")(block).value.max()) for block in lipbounds.capture(trained.eval(), X)]
    assert [one.layer for one in first] == [0, 1]
    assert all(one.lower <= (one.upper or 0) for one in first)
    assert second[0].lower == pytest.approx(3.0 * first[0].lower, rel=1e-4)
    assert all(one.lower <= truth * (1 + 1e-6) for one, truth in zip(second, truths, strict=True))
    assert [one.upper for one in second] == [None, None]
    assert monitor.last == second
    assert monitor.summary() == {"lipschitz/lower": max(one.lower for one in second)}


def test_training_goes_on_as_if_nothing_had_looked() -> None:
    trained, seen = model(), []
    for watched in (False, True):
        torch.manual_seed(1)
        monitor = LipschitzMonitor(trained, X, every=1, upper_every=None)
        outputs = []
        for step in range(2):
            outputs.append(trained(X))
            if watched:
                monitor.step(step)
                assert all(module.training for module in trained.modules())
        seen.append(torch.stack(outputs))
    assert torch.equal(*seen)


def test_only_some_steps_are_watched_and_told() -> None:
    told: list[Any] = []
    monitor = LipschitzMonitor(model(), X, every=2, upper_every=4, tell=told.append)
    for step in range(5):
        monitor.step(step)
    assert [(one[0].step, one[0].upper is not None) for one in told] == [(0, True), (2, False), (4, True)]


def test_the_callback_of_the_trainer_measures_and_logs() -> None:
    monitor = LipschitzMonitor(model(), X, upper_every=1)
    callback = monitor.callback()

    class State:
        global_step = 3

    callback.on_step_end(None, State(), None)
    logs: dict[str, float] = {"loss": 1.0}
    callback.on_log(None, State(), None, logs=logs)
    assert logs == {"loss": 1.0, **monitor.summary()}
    assert set(logs) == {"loss", "lipschitz/lower", "lipschitz/upper"}


@pytest.mark.parametrize(
    "wrong", [{"every": 0}, {"every": 3, "upper_every": 4}, {"bound": "sharp_ball"}, {"bound": "lanczos"}]
)
def test_wrong_settings_are_told(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput):
        LipschitzMonitor(model(), X, **wrong)
