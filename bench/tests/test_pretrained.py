"""The task `pretrained`: theta between its two sides, sinks, what hiding them leaves, resuming, and the page."""

from __future__ import annotations

import contextlib
import dataclasses as dc
import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import __main__ as program
from bench.engine.evaluate import TimeLimitReached, limited
from bench.engine.store_file import Entry
from bench.pretrained import balls, task
from bench.pretrained.balls_command import report
from bench.pretrained.measures import distribution, norms, sinks, theta_lower, theta_upper, without_sinks
from bench.pretrained.workloads import Pretrained, short_workloads, workloads
from bench.tests.samples import tiny_block
from bench.workloads.case import Case
from bench.workloads.random_blocks import random_blocks
from lipbounds.bound_spec import NOT_COVERED
from lipbounds.claims import FEATURES
from lipbounds.targets.attention import Attention


def theta(row: torch.Tensor) -> float:
    """The definition, over all sets of keys."""
    masses = [sum(chosen) for size in range(len(row) + 1) for chosen in itertools.combinations(row.tolist(), size)]
    return max(4 * mass * (1 - mass) for mass in masses)


@pytest.mark.parametrize("spread", [0.1, 1.0, 3.0, 10.0])
def test_theta_lies_between_its_two_sides(spread: float) -> None:
    logits = spread * torch.randn(20, 14, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    lower, upper = theta_lower(logits), theta_upper(logits)
    for row, low, high in zip(logits.softmax(-1), lower.tolist(), upper.tolist(), strict=True):
        exact = theta(row)
        assert low <= exact * (1 + 1e-12)
        assert exact <= high * (1 + 1e-12)
        if float(row.max()) >= 0.5:
            assert low == pytest.approx(exact, rel=1e-12, abs=1e-12)
            assert high == pytest.approx(exact, rel=1e-12, abs=1e-12)
        else:
            assert low >= 0.95


def test_theta_of_two_equal_keys_is_one_and_of_one_key_nothing() -> None:
    logits = torch.tensor([[0.0, 0.0, -torch.inf], [3.0, -torch.inf, -torch.inf]], dtype=torch.float64)
    assert theta_lower(logits).tolist() == [1.0, 0.0]


def peaked() -> Attention:
    """Causal; in the first head every row attends to the first key, in the second to no key above others."""
    block = tiny_block(tokens=5)
    bias = torch.zeros(2, 5, 5, dtype=torch.float64)
    bias[0, :, 0] = 20.0
    return block.replace(w_q=0 * block.w_q, b_q=None, causal=True, logit_bias=bias)


def test_a_sink_is_found_and_hidden_where_a_row_sees_another_key() -> None:
    block = peaked()
    found = sinks(block)
    assert (found["heads"], found["count"], found["first"], found["positions"]) == (2, 1, 1, [0])
    relative = block.values[0].norm(dim=-1)
    assert found["values"] == pytest.approx(float(relative[0] / relative.median()), rel=1e-5)
    hidden = without_sinks(block)
    assert hidden is not None
    assert hidden.probabilities[0, 1:, 0].max() == 0.0
    assert hidden.probabilities[0, 0, 0] == 1.0
    torch.testing.assert_close(hidden.probabilities[1], block.probabilities[1])
    assert without_sinks(hidden.replace(logit_bias=None, w_v=block.w_v)) is None
    for name, value in norms(hidden)["bounds"].items():
        assert value >= norms(hidden)["constant"] * (1 - 1e-9), name


def test_rows_that_see_one_key_are_left_out() -> None:
    found = distribution(peaked())
    assert found["rows"] == 8
    assert found["one_hot"] == 0.5
    assert found["theta_near_1"][0] <= found["theta_near_1"][1] <= 0.5


def test_the_packages_are_named_where_they_are_missing() -> None:
    names = [workload.name for workload in workloads()]
    assert len(set(names)) == len(names)
    for profile in task.PROFILES.values():
        assert {*profile.sharp, *profile.hidden} <= profile.inputs.keys() <= {*names}
    short = [workload.name for workload in short_workloads()]
    assert all(profile.layers.keys() <= {*short} for profile in balls.PROFILES.values())


class Fake(Pretrained):
    """Random blocks under the name of a pretrained model."""

    def cases(self, count: int) -> Iterator[Case]:
        return (dc.replace(case, model=self.name) for case in random_blocks(4, count) if case.layer < self.layers)


def test_a_run_goes_on_and_its_page_is_rendered_without_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fakes = [
        Fake(name="albert-rxn", model="albert-rxn", about="Fake", layers=4, first="the first", inputs=lambda count: [])
    ]
    monkeypatch.setattr(task, "workloads", lambda: fakes)
    profile = task.Profile(inputs={"albert-rxn": 2}, sharp={"albert-rxn": (0,)}, hidden={"albert-rxn": 2})
    monkeypatch.setitem(task.PROFILES, "standard", profile)
    place = tmp_path / "results"
    arguments: Any = ["pretrained", "--results", str(place)]
    assert program.main(arguments, []) == 0
    page, records = (place / "pretrained.md").read_text(), (place / "pretrained.jsonl").read_bytes()
    assert "| layer" in page
    assert "`sharp` at a few layers" in page
    assert program.main(arguments, []) == 0
    assert (place / "pretrained.jsonl").read_bytes() == records  # nothing was made twice
    (place / "pretrained.md").unlink()
    assert program.main(["render", "--results", str(place)], []) == 0
    assert (place / "pretrained.md").read_text() == page


def test_bounds_on_balls_stand_above_what_ascent_reached_and_refusals_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fakes = [
        Fake(name="albert-rxn", model="albert-rxn", about="Fake", layers=1, first="the first", inputs=lambda count: [])
    ]
    monkeypatch.setattr(balls, "short_workloads", lambda: fakes)
    monkeypatch.setitem(balls.PROFILES, "standard", balls.Profile(layers={"albert-rxn": (0,)}, relative=(1e-2,)))
    place = tmp_path / "results"
    arguments: Any = ["pretrained_balls", "--results", str(place)]
    assert program.main(arguments, []) == 0
    page, records = (place / "pretrained_balls.md").read_text(), (place / "pretrained_balls.jsonl").read_bytes()
    row = next(line for line in page.splitlines() if line.startswith("| albert-rxn"))
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    assert all(float(cell) >= 1 for cell in cells[6:9])
    assert program.main(arguments, []) == 0
    assert (place / "pretrained_balls.jsonl").read_bytes() == records  # nothing was made twice
    reached = {"value": 2.0, "tokens": 3, "radius": 0.5}
    at: dict[str, Any] = {balls.LOWER: reached, "sharp_ball": {"value": 1.0, "seconds": 1.0}}
    data = {"a": {"about": "A model", "balls": {(0, 0.1): at}}}
    assert len(balls.violations(data)) == 1
    at |= {name: {"refused": "It has biases."} for name in balls.UPPERS}
    assert balls.violations(data) == []
    assert "- a: It has biases.\n" in report(data, "command", "records", [])


@pytest.mark.parametrize(("name", "again"), [("yudin2025_ball.biased", True), ("hu2024.ball", False)])
def test_what_was_refused_for_a_feature_that_is_supported_by_now_is_asked_again(name: str, again: bool) -> None:
    told = "; ".join(f"{feature} ({FEATURES[feature]})" for feature in ("biases", "rotary"))
    refused = Entry(question={}, answer={"refused": f"{name} {NOT_COVERED} {told}; choose."}, environment="")
    assert balls._is_covered_now(refused, name) == again
    for answer in ({"value": 1.0}, {"refused": f"`{name}` had no result after 60 s of processor time."}):
        assert not balls._is_covered_now(Entry(question={}, answer=answer, environment=""), name)
    assert not balls._is_covered_now(None, name)


def test_a_bound_that_takes_too_long_is_named_with_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def over(seconds: float, *, of: str) -> Iterator[None]:
        assert (seconds, of) == (balls.TIME_LIMIT, "processor")
        raise TimeLimitReached
        yield

    monkeypatch.setattr(balls, "limited", over)
    found = balls._on_ball(next(random_blocks(4, 1)), "sharp_ball", 0.1)
    assert "value" not in found
    assert "60 s of processor time" in found["refused"]


def test_processor_time_is_limited_and_sleep_is_none() -> None:
    with limited(0.02, of="processor"):
        time.sleep(0.05)
    with pytest.raises(TimeLimitReached), limited(0.02, of="processor"):
        for _ in range(10**8):
            pass
