"""The command line with inputs that are no plain texts, tensors or files: one line with the fix, and nothing hangs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lipbounds.errors import InvalidInput, Unsupported
from lipbounds.files import write_atomically
from lipbounds.models.loading import LoadedModel, load_model
from lipbounds.report.inputs import check_runs, from_file, from_texts
from lipbounds.report.measure import ModelInput


MODEL = LoadedModel(name="mine", module=nn.Identity(), kind="tensor")
TWO = [torch.zeros(3, 8), torch.zeros(4, 8)]
needs_dev_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")


@pytest.fixture(autouse=True)
def _no_waiting() -> Iterator[None]:
    """A pipe without another end would wait for ever."""
    signal.alarm(120)
    yield
    signal.alarm(0)


ODD: dict[str, tuple[Callable[[], torch.Tensor], str]] = {
    "sparse": (lambda: torch.eye(3).to_sparse(), "layout torch.sparse_coo"),
    "meta": (lambda: torch.empty(2, 3, device="meta"), "device meta"),
    "nested": (lambda: torch.nested.nested_tensor(TWO), "a nested one"),
    "jagged": (lambda: torch.nested.nested_tensor(TWO, layout=torch.jagged), "a nested one"),
    "complex": (lambda: torch.zeros(2, 3, dtype=torch.cfloat), "complex numbers"),
    "nan": (lambda: torch.tensor([[1.0, torch.nan]]), "1 numbers that are not finite"),
    "infinite": (lambda: torch.tensor([[torch.inf, 0.0]]), "1 numbers that are not finite"),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("name", ODD)
def test_tensors_that_no_model_takes_are_named(name: str, tmp_path: Path) -> None:
    make, message = ODD[name]
    torch.save(make(), tmp_path / "x.pt")
    with pytest.raises(InvalidInput, match=message):
        from_file(MODEL, tmp_path / "x.pt")


@pytest.mark.parametrize("name", ["x.pt", "x.txt"])
def test_a_pipe_is_no_file(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(InvalidInput, match=r"data must be a file, got '.*', which is none"):
        from_file(MODEL, tmp_path / name)


def test_a_text_that_is_no_unicode_is_refused() -> None:
    with pytest.raises(InvalidInput, match=r"got bytes that are none in '\\udcff good'"):
        from_texts(load_model("minilm"), ["good", "\udcff good"])


def test_every_input_is_tried_before_the_work_begins() -> None:
    loaded = LoadedModel(name="mine", module=nn.Linear(3, 3), kind="tensor")
    runs = [ModelInput(name=str(size), args=(torch.zeros(1, size),)) for size in (3, 4)]
    check_runs(loaded, runs[:1])
    with pytest.raises(InvalidInput, match=r"mine must run on the input, got a tensor of shape \(1, 4\)"):
        check_runs(loaded, runs)


def report(*arguments: str) -> int:
    from lipbounds.cli.app import app

    with pytest.raises(SystemExit) as left:
        app(["report", "verify.unit.reported:tiny_model", *arguments], prog_name="lipbounds")
    return int(left.value.code or 0)


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert len(lines) == 1, lines
    return lines[0]


@needs_dev_full
@pytest.mark.parametrize("option", ["--output", "--json"])
def test_a_full_disk_is_one_line(option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from verify.unit.reported import tiny_input

    torch.save(tiny_input(), tmp_path / "x.pt")
    other = [] if option == "--output" else ["--output", str(tmp_path / "r.html")]
    given = ["--data", str(tmp_path / "x.pt"), "--layers", "1", "--bounds", "exact", *other, option, "/dev/full"]
    assert report(*given) == 2
    assert "/dev/full: No space left on device; pass another path" in one_line(capsys)


def test_a_pipe_without_a_reader_and_a_device_without_numbers_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "x.npy", np.zeros((1, 2, 3)))
    os.mkfifo(tmp_path / "r.html")
    with pytest.raises(OSError, match="No such device") as raised:
        write_atomically(tmp_path / "r.html", b"a page")
    assert raised.value.filename == str(tmp_path / "r.html")
    assert report("--data", str(tmp_path / "x.npy"), "--device", "meta") == 2
    assert "meta tensors have no numbers" in one_line(capsys)


def test_results_from_a_pipe_are_refused(tmp_path: Path) -> None:
    from lipbounds.results import read_results

    os.mkfifo(tmp_path / "before.json")
    with pytest.raises(InvalidInput, match="named pipe"):
        read_results(tmp_path / "before.json")


@needs_dev_full
def test_output_that_cannot_be_written_is_one_line() -> None:
    with Path("/dev/full").open("w") as full:
        found = subprocess.run(
            [sys.executable, "-m", "lipbounds", "bounds"], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert (found.returncode, len(found.stderr.splitlines())) == (2, 1), found.stderr
    assert "No space left on device" in found.stderr


SMALL: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


def test_a_config_with_millions_of_layers_is_refused_at_once(tmp_path: Path) -> None:
    import transformers

    transformers.BertConfig(**SMALL | {"num_hidden_layers": 10_000_000}).save_pretrained(tmp_path)
    with pytest.raises(InvalidInput, match="at most 10000 layers, got num_hidden_layers=10000000"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("kind", ["t5", "clip"])
def test_models_of_two_halves_say_which_to_take(kind: str, tmp_path: Path) -> None:
    import transformers

    if kind == "t5":
        config = transformers.T5Config(vocab_size=7, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        transformers.T5Model(config).save_pretrained(tmp_path)
    else:
        text, vision = {"vocab_size": 7, **SMALL}, {"image_size": 8, "patch_size": 4, **SMALL}
        both = transformers.CLIPConfig(text_config=text, vision_config=vision)
        transformers.CLIPModel(both).save_pretrained(tmp_path)
    part = {"t5": "encoder", "clip": "text_model"}[kind]
    with pytest.raises(Unsupported, match=rf"returns one part, such as its `{part}`"):
        load_model(str(tmp_path))
