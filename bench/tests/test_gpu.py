"""`python -m bench gpu`: every kind of step on a device of its own; it goes on after a stop, and says what failed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.__main__ import main
from bench.gpu import command
from bench.gpu.measurements import Measurement, Skipped, measurements
from bench.gpu.results import Results, place


def run(folder: Path, *options: str, device: str = "pretend") -> int:
    return main(["gpu", "--device", device, "--quick", "--results", str(folder), *options])


def squeezed(page: Path) -> str:
    return re.sub(" +", " ", page.read_text())  # cells are padded


def written(folder: Path) -> tuple[str, list[dict[str, Any]]]:
    (page,), (lines,) = (folder / "quick").glob("gpu_*.md"), (folder / "quick").glob("gpu_*.jsonl")
    return squeezed(page), [json.loads(line) for line in lines.read_text().splitlines()]


def test_a_step_of_each_kind_runs_on_a_device_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("pretend:0")
    every = measurements(device, quick=True)
    assert [*dict.fromkeys(step.part for step in every)] == ["checks", "speed", "long maps", "tightness"]
    # The first of each kind; the Triton kernel among the long maps is skipped as among the checks.
    names = (
        "yudin2025.biased, small",
        "training step",
        "streaming_g1",
        "streaming_map_norm",
        "torch-encoder",
        "shape of",
    )
    some = [*every[:3], *(next(step for step in every if step.name.startswith(name)) for name in names)]
    monkeypatch.setattr(command, "measurements", lambda device, quick: some)
    assert run(tmp_path) == 0
    page, lines = written(tmp_path)
    assert [line["name"] for line in lines] == [step.name for step in some]
    assert not any("error" in line for line in lines)
    assert lines[0]["passed"]
    assert lines[1]["passed"]
    assert lines[2]["skipped"].startswith("the kernel needs CUDA, got pretend")
    assert all(step.name in page for step in some)
    assert "small sizes" in page
    assert run(tmp_path) == 0
    assert written(tmp_path) == (page, lines)  # nothing is measured twice


def told(step: str) -> Any:
    def work() -> dict[str, Any]:
        if step == "cannot":
            raise Skipped("no such card")
        if step == "breaks":
            raise RuntimeError("out of memory\nand more")
        return {"passed": step != "false"}

    return Measurement(part="checks", name=step, work=work)


def test_what_fails_is_said_and_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        command, "measurements", lambda device, quick: [told(s) for s in ("cannot", "breaks", "false", "right")]
    )
    assert run(tmp_path, device="cpu") == 1
    page, lines = written(tmp_path)
    assert len(lines) == 4
    for row in ("| cannot | skipped: no such card |", "| breaks | failed: RuntimeError: out of memory |"):
        assert row in page
    assert "| false | **failed**" in page
    assert "| right | passed" in page
    assert "breaks: RuntimeError: out of memory" in capsys.readouterr().err
    run(tmp_path, device="cpu")  # only what broke is made again
    assert [line["name"] for line in written(tmp_path)[1][4:]] == ["breaks"]


def test_when_the_time_is_over_the_page_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "measurements", lambda device, quick: [told("right")])
    assert run(tmp_path, "--minutes", "0", device="cpu") == 0
    (page,) = (tmp_path / "quick").glob("gpu_*.md")
    assert "| right | not reached |" in squeezed(page)


def test_a_torn_line_costs_that_line(tmp_path: Path) -> None:
    here, path = place(torch.device("cpu"), quick=True), tmp_path / "gpu.jsonl"
    first = Results(path, here)
    first.keep("checks", "one", {"passed": True})
    with path.open("a") as file:
        file.write('{"part": "checks", "na')
    again = Results(path, here)
    again.keep("checks", "two", {"passed": True})
    assert set(Results(path, here).found) == {("checks", "one"), ("checks", "two")}
    assert not Results(path, {**here, "code": "other"}).found


def test_misuse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gpu", "--device", "abacus", "--results", str(tmp_path)]) == 2
    assert "device must be a device that is here" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["gpu", "--device", "cpu", "--results", str(tmp_path)])
    assert not any(tmp_path.iterdir())
