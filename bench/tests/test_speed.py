"""The task `speed`: questions tell what is measured, answers are kept, and the page says what the data says."""

from __future__ import annotations

import dataclasses as dc
import itertools
import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench.engine.answers import Shown
from bench.engine.store import Store
from bench.speed import card, timing
from bench.speed import tables as speed_tables
from bench.speed import task as speed
from bench.speed.exporting import export
from bench.speed.plan import PROFILES, Profile, Shape, Target
from bench.speed.timing import exponent, peak_memory, quartiles, side_by_side


CPU = torch.device("cpu")
OTHER = {"tokens": 1, "width": 2, "heads": 1, "batch": 2, "dtype": "float64", "biases": True}
TINY = dc.replace(
    PROFILES["quick"],
    axes={"tokens": 2, "width": 1, "heads": 1, "batch": 2, "dtype": 2},
    methods=("yudin2025.biased", "havens2024.change"),
    limit=60.0,
    patience=60.0,
    enough=0.01,
    repeats=2,
    streaming=(8,),
)


def test_times_are_taken_in_turns_and_the_ratio_is_of_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count()
    order: list[str] = []
    monkeypatch.setattr(timing.time, "process_time", lambda: float(next(clock)) * 0.5)

    def call(name: str, ticks: int) -> Any:
        def run() -> None:
            order.append(name)
            for _ in range(ticks):
                next(clock)

        return lambda: run

    found = side_by_side(call("own", 5), call("base", 1), repeats=3, enough=60.0, device=CPU)
    assert order == ["base", *["own", "base"] * 4]
    assert found["ratio"] == [3.0, 3.0, 3.0]  # (5 + 1) / (1 + 1) ticks
    assert found["cost"][1] == 3.0
    assert found["repeats"] == 3


def test_on_cuda_the_card_takes_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through a stand-in for `torch.cuda`: events around each call, read after the card is done, clocks noted."""
    order: list[str] = []
    ticks = itertools.count()

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: str) -> None:
            assert stream == "that of cuda:1"
            order.append("event")
            self.at = next(ticks)

        def elapsed_time(self, other: Event) -> float:  # in milliseconds
            assert order[-1] == "synchronise"
            return 1000.0 * (other.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: order.append("synchronise"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"that of {device}")
    clocks = iter(({"sm_clock": 1980.0}, {"sm_clock": 1600.0}))
    monkeypatch.setattr(timing, "card", lambda device: next(clocks))
    device = torch.device("cuda:1")

    def slow() -> None:
        order.append("call")
        next(ticks)

    found = timing.seconds_of(lambda: order.append("call"), device)
    assert order == ["synchronise", "event", "call", "event", "synchronise"]
    assert found.cost(device) == found.events == 1.0
    found = side_by_side(lambda: slow, lambda: lambda: None, repeats=2, enough=60.0, device=device)
    assert found["ratio"] == [2.0, 2.0, 2.0]
    assert found["card"] == {"before": {"sm_clock": 1980.0}, "after": {"sm_clock": 1600.0}}


def test_the_state_of_a_card_is_what_nvidia_smi_says(monkeypatch: pytest.MonkeyPatch) -> None:
    def told(command: list[str], **_: Any) -> SimpleNamespace:
        assert command[:2] == ["nvidia-smi", "--id=GPU-abc"]
        return SimpleNamespace(stdout="1980, 1980, 2619, [N/A], 41, 81559, 5\n")

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="abc"))
    monkeypatch.setattr(card.subprocess, "run", told)
    state = card.card(torch.device("cuda"))
    assert state is not None
    assert (state["sm_clock"], state["power"], state["memory"], state["temperature"]) == (1980.0, None, 81559.0, 41.0)
    monkeypatch.setattr(card.subprocess, "run", lambda *_, **__: (_ for _ in ()).throw(FileNotFoundError()))
    assert card.card(torch.device("cuda")) is None
    assert card.card(CPU) is None
    assert card.noted(None, None) == {}


def test_a_slow_call_is_made_once() -> None:
    calls: list[int] = []
    found = side_by_side(lambda: lambda: calls.append(1), lambda: lambda: None, repeats=9, enough=0.0, device=CPU)
    assert (len(calls), found["repeats"]) == (1, 1)


def test_spread_is_quartiles() -> None:
    assert quartiles([3.0]) == [3.0, 3.0, 3.0]
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == [2.0, 3.0, 4.0]


@pytest.mark.skipif(not timing.CLEAR.exists(), reason="the peak of the resident set is reset by Linux alone")
def test_the_peak_is_that_of_the_call() -> None:
    size = 48 * 2**17  # 48 MB of float64

    def twice() -> None:
        first = torch.ones(size, dtype=torch.float64)
        (first * 2).sum()

    before = peak_memory(lambda: lambda: None, CPU)
    found = peak_memory(lambda: twice, CPU)
    assert before is not None
    assert found is not None
    assert before < 8
    assert 90 < found < 120


def test_growth_exponents() -> None:
    points = [(n, 3e-9 * n**2 + (1.0 if n == 8 else 0.0)) for n in (8, 16, 32, 64, 128)]
    fitted = exponent(points)
    assert fitted is not None
    assert fitted["slope"] == pytest.approx(2)
    assert fitted["between"] == pytest.approx([2, 2])
    assert fitted["sizes"] == [16, 128]
    assert exponent(points[:2]) is None


def test_questions_differ_where_times_may() -> None:
    here = speed.place(CPU)
    target = Target(title="", method="sharp_fast")
    changed = [
        target,
        dc.replace(target, method="sharp"),
        dc.replace(target, kept=False),
        dc.replace(target, options={"steps": 3}),
        *(dc.replace(target, shape=dc.replace(Shape(), **{name: value})) for name, value in OTHER.items()),
    ]
    questions = [repr(speed.question(one)) for one in changed]
    assert len(set(questions)) == len(questions)
    assert {"code", "hardware", "device"} <= here.keys()


def test_blocks_have_the_shape_they_are_asked_for() -> None:
    block = Shape(tokens=5, width=8, heads=4, batch=3, dtype="bfloat16", biases=True).block(CPU)
    assert block.x.shape == (3, 5, 8)
    assert block.w_q.shape == (4, 8, 2)
    assert (block.dtype, block.features) == (torch.bfloat16, {"heads", "biases"})
    assert torch.equal(Shape().block(CPU).x, Shape().block(CPU).x)


def test_a_method_is_measured() -> None:
    answer = speed.measured(Target(title="", method="havens2024.change", shape=Shape(tokens=8, width=8)), TINY, CPU)
    assert "error" not in answer, answer
    assert answer["repeats"] >= 1
    assert all(answer[name][1] > 0 for name in ("seconds", "baseline_seconds", "cost", "ratio"))


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """All that a run finds, with times that are made up."""
    count = itertools.count(1)

    def times(*_: Any) -> dict[str, Any]:
        cost = [float(next(count))] * 3
        return {"seconds": cost, "cost": cost, "ratio": cost, "repeats": 2, "megabytes": cost[0]}

    monkeypatch.setattr(speed, "_both", times)
    path = tmp_path / "speed.jsonl"
    with Store(path) as store:
        return path, speed.run(store, TINY, device=CPU)


def test_answers_are_kept_and_the_page_has_them(data: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    path, found = data
    with Store(path) as again:
        repeated = speed.run(again, TINY, device=CPU)
        page = Shown(again, again.show("quick", again.asked))
    assert again.made == 0
    assert repeated["rows"] == found["rows"]
    shown = speed.shown(page, TINY)
    assert all(shown[name] == found[name] for name in ("rows", "stopped", "streamed", "targets"))
    assert {row["method"] for row in found["rows"]} == set(TINY.methods or ())
    page = speed_tables.report(found, "python -m bench speed", "a machine")
    answer = next(row for row in found["rows"] if row["method"] == "yudin2025.biased")["answer"]
    assert f"| {speed_tables.figure(answer['ratio'][1])} " in page
    assert "Everything was measured at every size." in page
    assert "streaming_g1" in page
    assert "Targets" not in page
    paths = speed_tables.draw(found, tmp_path)
    assert [one.name for one in paths] == ["speed.png", "speed.svg"]
    first = paths[1].read_bytes()
    assert speed_tables.draw(found, tmp_path)[1].read_bytes() == first


@pytest.mark.usefixtures("data")
def test_a_dear_method_stops_and_is_listed(tmp_path: Path) -> None:
    profile: Profile = dc.replace(TINY, methods=("havens2024.change",), limit=0.0, streaming=())
    with Store(tmp_path / "other.jsonl") as store:
        found = speed.run(store, profile, device=CPU)
    assert {row["axis"]: row["value"] for row in found["stopped"]} == {"tokens": 64, "batch": 1, "dtype": "float32"}
    assert "| `havens2024.change` | n = 64 (" in speed_tables.report(found, "command", "a machine")


def test_an_error_is_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ValueError("this | that")

    monkeypatch.setattr(speed, "_both", broken)
    answer = speed.measured(Target(title="", method="sharp_fast"), TINY, CPU)
    assert answer == {"error": "ValueError: this | that"}


def test_targets_that_are_missed_are_told(data: tuple[Path, dict[str, Any]]) -> None:
    def target(ratio: float, limit: float | None) -> dict[str, Any]:
        answer = {"ratio": [ratio] * 3, "cost": [0.5] * 3, "repeats": 3}
        return {"title": f"r{ratio}", "method": "m", "limit": limit, "options": {}, "answer": answer}

    error = {**target(1.0, 2.0), "title": "broken", "answer": {"error": "a|b"}}
    targets = [target(1.2, 1.3), target(1.4, 1.3), target(9.0, None), error]
    page = speed_tables.report({**data[1], "targets": targets}, "command", "a machine")
    cells = [[cell.strip() for cell in line.split("|")] for line in page.splitlines() if line.startswith("| r")]
    assert {row[1]: row[5] for row in cells} == {"r1.2": "yes", "r1.4": "missed", "r9.0": "-"}
    assert "a\\|b" in page


def test_pytest_benchmark_reads_what_is_exported(data: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """By its own command: medians and quartiles; what the records do not hold is no number."""
    (tmp_path / "speed.json").write_text(json.dumps(data[1]))
    export(tmp_path / "speed.json", tmp_path / "times.json")
    found = json.loads((tmp_path / "times.json").read_text())
    measured = [row for row in data[1]["rows"] if "cost" in row["answer"]]
    assert [one["stats"]["median"] for one in found["benchmarks"]] == [row["answer"]["cost"][1] for row in measured]
    assert all(math.isnan(one["stats"]["min"]) for one in found["benchmarks"])
    arguments = ["compare", str(tmp_path / "times.json"), "--columns=median,iqr,rounds", "--sort=name"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest_benchmark", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert all(one["name"] in done.stdout for one in found["benchmarks"])
