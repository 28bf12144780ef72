"""`python -m bench gpu`: every kind of step on a device of its own; it goes on after a stop, and says what failed."""

from __future__ import annotations

import dataclasses as dc
import gzip
import json
import re
import struct
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.__main__ import main
from bench.gpu import command, robust
from bench.gpu import measurements as module
from bench.gpu.measurements import Measurement, Skipped, measurements
from bench.gpu.page import page
from bench.gpu.results import Results, place
from bench.robustness.settings import SETTINGS
from lipbounds.errors import InvalidInput


def run(folder: Path, *options: str, device: str = "pretend") -> int:
    return main(["gpu", "--device", device, "--quick", "--results", str(folder), *options])


def squeezed(page: Path) -> str:
    return re.sub(" +", " ", page.read_text())  # cells are padded


def written(folder: Path) -> tuple[str, list[dict[str, Any]]]:
    (page,), (lines,) = (folder / "quick").glob("gpu_*.md"), (folder / "quick").glob("gpu_*.jsonl")
    return squeezed(page), [json.loads(line) for line in lines.read_text().splitlines()]


def test_a_step_of_each_kind_runs_on_a_device_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("pretend:0")
    size = dc.replace(robust.QUICK, epochs=1, train=64, attacked=12)
    monkeypatch.setattr(robust, "QUICK", size)
    monkeypatch.setattr(robust, "autoattack", lambda model, images, *_, seed: images)  # thousands of small steps
    every = measurements(device, quick=True)
    parts = ["checks", "speed", "long maps", "tightness", "robust training"]
    assert [*dict.fromkeys(step.part for step in every)] == parts
    # The first of each kind; the Triton kernel among the long maps is skipped as among the checks.
    names = (
        "yudin2025.biased, small",
        "training step",
        "streaming_g1",
        "streaming_map_norm",
        "streaming_sharp_cheap",
        "torch-encoder",
        "no penalty",
    )
    some = [*every[:3], *(next(step for step in every if step.name.startswith(name)) for name in names)]
    monkeypatch.setattr(command, "measurements", lambda device, **_: some)
    monkeypatch.setattr(module, "peak_memory", lambda make, device: None)  # it collects garbage, for seconds
    assert run(tmp_path) == 0
    text, lines = written(tmp_path)
    assert [line["name"] for line in lines] == [step.name for step in some]
    assert not any("error" in line for line in lines)
    assert lines[0]["passed"]
    assert lines[1]["passed"]
    assert lines[-1]["clean"] >= lines[-1]["pgd"] == lines[-1]["autoattack"]
    assert lines[-1]["clean"] > 0  # there was something to attack
    assert lines[2]["skipped"].startswith("the kernel needs CUDA, got pretend")
    assert all(step.name.partition(", seed")[0] in text for step in some)  # seeds share a row
    assert "small sizes" in text
    assert run(tmp_path) == 0
    assert written(tmp_path) == (text, lines)  # nothing is measured twice


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
        command, "measurements", lambda device, **_: [told(s) for s in ("cannot", "breaks", "false", "right")]
    )
    assert run(tmp_path, device="cpu") == 1
    text, lines = written(tmp_path)
    assert len(lines) == 4
    for row in ("| cannot | skipped: no such card |", "| breaks | failed: RuntimeError: out of memory |"):
        assert row in text
    assert "| false | **failed**" in text
    assert "| right | passed" in text
    assert "breaks: RuntimeError: out of memory" in capsys.readouterr().err
    run(tmp_path, device="cpu")  # only what broke is made again
    assert [line["name"] for line in written(tmp_path)[1][4:]] == ["breaks"]


def test_when_the_time_is_over_the_page_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "measurements", lambda device, **_: [told("right")])
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


def fashion(folder: Path, images: int) -> Path:
    """Files like those of Fashion-MNIST, with random pixels."""
    for part in ("train", "t10k"):
        pixels = torch.randint(256, (images, 28, 28), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        labels = torch.arange(images, dtype=torch.uint8) % 10
        for kind, values in (("images-idx3", pixels), ("labels-idx1", labels)):
            header = bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
            (folder / f"{part}-{kind}-ubyte.gz").write_bytes(gzip.compress(header + bytes(values.flatten().tolist())))
    return folder


def test_fashion_mnist_is_read_and_checked(tmp_path: Path) -> None:
    data = robust.load(fashion(tmp_path, 20))
    assert [tuple(part.shape) for part in data.train] == [(20, 1, 28, 28), (20,)]
    assert data.test[0].max() == 1
    assert data.test[1].tolist() == [*range(10), *range(10)]
    model = robust.ImageViT(28, data.patch, 16, 1)
    assert model(data.train[0][:2]).shape == (2, 10)
    labels = tmp_path / "t10k-labels-idx1-ubyte.gz"
    labels.write_bytes(gzip.compress(bytes([0, 0, 8, 1, 0, 0, 0, 20]) + bytes(19) + bytes([10])))
    with pytest.raises(InvalidInput, match=r"labels below 10, got .* up to 10"):
        robust.load(tmp_path)
    labels.write_bytes(gzip.compress(bytes(8 + 19)))  # no header of an IDX file
    with pytest.raises(InvalidInput, match="must be an IDX file"):
        robust.load(tmp_path)
    (tmp_path / "train-images-idx3-ubyte.gz").unlink()
    with pytest.raises(InvalidInput, match="must hold train-images-idx3-ubyte"):
        robust.load(tmp_path)


def test_every_setting_is_trained_with_every_seed() -> None:
    every = [step for step in measurements(torch.device("cpu"), quick=False) if step.part == "robust training"]
    assert len({step.name for step in every}) == 5 * len(SETTINGS)
    assert all("seed 0" in step.name for step in every[: len(SETTINGS)])
    assert [robust.weight_of(SETTINGS[name]) for name in ("none", "jasmin", "spectral")] == [None, 0.003, 0.1]


def test_seeds_share_a_row(tmp_path: Path) -> None:
    def trained(seed: int) -> Measurement:
        numbers = {"clean": 0.9 + seed / 100, "fgsm": 0.5, "pgd": 0.4, "autoattack": 0.3, "constant": 2.0}
        return Measurement(part="robust training", name=f"no penalty, digits, seed {seed}", work=lambda: numbers)

    every = [trained(seed) for seed in range(3)]
    found = {(step.part, step.name): step.work() for step in every[:2]}
    text = re.sub(" +", " ", page(every, found, place(torch.device("cpu"), quick=True)))
    assert "| no penalty, digits | 2 of 3 | 0.905 [0.9, 0.91] | 0.5 [0.5, 0.5] |" in text


def test_a_step_that_takes_too_long_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Measurement(part="checks", name="slow", work=lambda: time.sleep(5) or {}, limit=0.05)
    monkeypatch.setattr(command, "measurements", lambda device, **_: [slow])
    assert run(tmp_path, device="cpu") == 1
    assert "no result within 0.05 s" in written(tmp_path)[0]
