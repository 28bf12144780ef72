"""The curves over the radius of a ball: what is evaluated, taken from the records, written and called a violation."""

from __future__ import annotations

import dataclasses as dc
from pathlib import Path

import pytest

from bench.balls import page as balls
from bench.balls import task as task
from bench.engine.records import Record
from bench.engine.store import Store
from bench.tests.samples import tiny_case
from bench.workloads.case import Case
from bench.workloads.models import Model
from bench.workloads.radii import ONE, Multiple


RADII = (Multiple(0.01, ONE), Multiple(0.1, ONE))


@pytest.fixture
def few_blocks(monkeypatch: pytest.MonkeyPatch) -> Case:
    case = tiny_case()
    monkeypatch.setattr(task, "cases", lambda *_: iter([(case, RADII)]))
    return case


def run(path: Path) -> tuple[task.Outcome, list[Record]]:
    with Store(path) as store:
        outcome = task.run(store)
        return outcome, [store.entries[key].record for key in outcome.keys]


def test_every_block_gets_its_centre_and_every_method_at_every_radius(tmp_path: Path, few_blocks: Case) -> None:
    outcome, records = run(tmp_path / "balls.jsonl")
    asked = {(record.question.bound, record.radius) for record in records}
    methods = (*task.UPPERS, task.LOWER)
    assert asked == {("sharp_ball", 0.0)} | {(name, radius.count) for name in methods for radius in RADII}
    assert outcome.evaluated == len(asked)
    again, _ = run(tmp_path / "balls.jsonl")
    assert (again.evaluated, again.reused) == (0, len(asked))


def test_the_page_has_ratios_to_what_ascent_reached(tmp_path: Path, few_blocks: Case) -> None:
    _, records = run(tmp_path / "balls.jsonl")
    found = balls.blocks(records)
    (rows,) = found.values()
    assert [row["radius"] for row in rows] == [0.0, 0.01, 0.1]
    assert rows[1]["sharp_ball"] == min(rows[1][name] for name in ("taylor", "deviation", "direct", "theorem_3"))
    text = balls.page(found, "command", "records", [])
    assert f"| {rows[1]['radius']:g} " in text
    assert "Violations" not in text
    paths = balls.draw(found, tmp_path)
    assert [path.name for path in paths] == ["balls.png", "balls.svg"]
    assert all(path.stat().st_size > 1000 for path in paths)


def test_a_bound_below_what_ascent_reached_is_a_violation(tmp_path: Path, few_blocks: Case) -> None:
    _, records = run(tmp_path / "balls.jsonl")
    wrong = [
        dc.replace(record, value=record.value / 100)
        if record.question.bound == "sharp_ball" and record.value
        else record
        for record in records
    ]
    found = balls.violations(balls.blocks(wrong))
    assert len(found) == len(RADII)
    assert "sharp_ball claims" in found[0]
    assert "**Violations**" in balls.page(balls.blocks(wrong), "command", "records", [])


def test_models_give_the_chosen_layers_of_the_chosen_inputs() -> None:
    case = tiny_case()
    blocks = [dc.replace(case, layer=layer, input=f"input-{index}") for index in range(4) for layer in range(6)]
    model = Model(
        name="minilm", description="", layers=6, inputs=4, quick_inputs=1, seconds=1.0,
        cases=lambda count: iter(blocks[: 6 * count]),
    )  # fmt: skip
    for quick, inputs, layers in ((False, ("input-0", "input-2"), (0, 3, 5)), (True, ("input-0",), (3,))):
        found = [(case.input, case.layer) for case, _ in task.cases(quick, models=[model])][2:]
        assert found == [(name, layer) for name in inputs for layer in layers]


def test_small_blocks_come_first_and_models_only_with_their_layers() -> None:
    found = list(task.cases(True, models=[]))
    assert [case.model for case, _ in found] == ["small-random", "small-one-hot"]
    assert all(radius.count in task.SMALL_RADII for _, radii in found for radius in radii)
