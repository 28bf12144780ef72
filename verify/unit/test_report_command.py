"""`lipbounds report`: what it reads, what it writes, and what it says where that is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel

from lipbounds.errors import InvalidInput
from lipbounds.models.loading import LoadedModel, load_model
from lipbounds.report import from_json
from lipbounds.report.inputs import from_file, from_images, from_texts
from lipbounds.report.summary import summary
from verify.unit.reported import Elements, tiny_input


# -- inputs of the command ----------------------------------------------------------------------------------------

TENSOR_MODEL = LoadedModel(name="mine", module=nn.Identity(), kind="tensor")


def test_a_file_of_tensors_is_one_input_an_item(tmp_path: Path) -> None:
    torch.save(tiny_input(2), tmp_path / "x.pt")
    runs = from_file(TENSOR_MODEL, tmp_path / "x.pt")
    assert [run.name for run in runs] == ["x.pt, item 0", "x.pt, item 1"]
    assert torch.equal(runs[1].args[0], tiny_input(2)[1:])


def test_files_that_hold_no_inputs_are_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.npy").write_bytes(b"no array")
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    torch.save([1, 2], tmp_path / "list.pt")
    for name, message in {
        "missing.txt": "is not there",
        "broken.npy": "must hold one tensor",
        "list.pt": "must hold one tensor, got list",
        "empty.txt": "a text a line",
        "binary.txt": "a text in UTF-8",
    }.items():
        with pytest.raises(InvalidInput, match=message):
            from_file(TENSOR_MODEL, tmp_path / name)


def test_texts_and_images_need_a_model_for_them(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="text needs a text model"):
        from_texts(TENSOR_MODEL, ["a"])
    with pytest.raises(InvalidInput, match="images needs a model"):
        from_images(TENSOR_MODEL, tmp_path)


def test_a_picture_is_brought_to_the_size_of_the_model(tmp_path: Path) -> None:
    from PIL import Image

    from lipbounds.models.image_input import ImageInput

    Image.new("RGB", (20, 30), (255, 0, 51)).save(tmp_path / "b.png")
    (tmp_path / "notes.txt").write_text("no picture")
    image = ImageInput(channels=3, height=4, width=6, mean=(0.5, 0.0, 0.0), std=(0.5, 1.0, 2.0))
    model = LoadedModel(name="mine", module=nn.Identity(), kind="image", image=image)
    (run,) = from_images(model, tmp_path)
    assert run.name == "b.png"
    expected = torch.tensor([1.0, 0.0, 0.1])[None, :, None, None].expand(1, 3, 4, 6)
    torch.testing.assert_close(run.args[0], expected)


# -- the command --------------------------------------------------------------------------------------------------


def command(*arguments: str) -> int:
    from lipbounds.cli.app import app

    with pytest.raises(SystemExit) as left:
        app(["report", *arguments], prog_name="lipbounds")
    return int(left.value.code or 0)


def test_the_command_writes_the_page_and_the_same_numbers_as_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(tiny_input(), tmp_path / "x.pt")
    out, numbers = tmp_path / "r.html", tmp_path / "r.json"
    status = command(
        "verify.unit.reported:tiny_model",
        "--data",
        str(tmp_path / "x.pt"),
        "--output",
        str(out),
        "--json",
        str(numbers),
        "--eps",
        "0.5",
        "--layers",
        "1",
    )
    printed = capsys.readouterr().out
    assert status == 0
    report = from_json(numbers.read_text())
    assert json.loads(Elements(out.read_text()).texts["data"]) == json.loads(numbers.read_text())
    assert summary(report.inputs[0]) in printed
    assert [number.radius for number in report.inputs[0].layers[0].balls] == 4 * [0.5]


def test_a_bound_that_is_refused_is_said_on_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(tiny_input(), tmp_path / "x.pt")
    data = ["--data", str(tmp_path / "x.pt"), "--output", str(tmp_path / "r.html")]
    only = ["--bounds", "yudin2025.theorem3", "--layers", "0", "--eps", "0.5"]
    assert command("verify.unit.reported:tiny_model", *data, *only) == 0
    assert "Layer 0: yudin2025.theorem3 does not cover a block with biases" in capsys.readouterr().err


def test_token_ids_need_no_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_tokenizer(*_: object, **options: object) -> None:
        raise InvalidInput("there is no tokenizer vocabulary.")

    config = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    BertModel(BertConfig(vocab_size=11, **config)).save_pretrained(tmp_path / "bert")
    monkeypatch.setattr("lipbounds.models.hub.load_hub_tokenizer", no_tokenizer)
    loaded = load_model(str(tmp_path / "bert"))
    torch.save(torch.tensor([[1, 2, 3]]), tmp_path / "ids.pt")
    (given,) = from_file(loaded, tmp_path / "ids.pt")
    assert loaded.module(*given.args).last_hidden_state.shape == (1, 3, 8)
    with pytest.raises(InvalidInput, match=r"no tokenizer vocabulary\. Or pass token ids"):
        from_texts(loaded, ["a text"])


def test_a_sentence_is_the_default_of_a_text_model(tmp_path: Path) -> None:
    numbers = tmp_path / "r.json"
    status = command(
        "minilm", "--max-seconds", "1e-9", "--output", str(tmp_path / "r.html"), "--json", str(numbers), "--layers", "3"
    )
    assert status == 0
    (layer,) = from_json(numbers.read_text()).inputs[0].layers
    assert layer.queries[:3] == ("[CLS]", "the", "movie")
    assert len(layer.heads) == 12
    assert any("limit of 1e-09 seconds" in note for note in layer.notes)


WRONG = {
    "eps": (["--eps", "-1"], "radii (eps) must be finite and above 0"),
    "bound": (["--bounds", "yudin2025.biasd"], "did you mean"),
    "no inputs": ([], "pass --data FILE"),
    "a folder": (["--output", "{folder}"], "a file must be written"),
    "both": (["--text", "a", "--images", "."], "must come from one of --text, --data and --images"),
    "dtype": (["--dtype", "int8"], "must be one of float64"),
    "device": (["--data", "{x}", "--device", "moon"], "must be a device that is here"),
    "shape": (["--data", "{wrong}"], "must run on the input, got a tensor of shape (1, 6, 5)"),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG.values(), ids=WRONG.keys())
def test_what_is_wrong_is_told_in_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(tiny_input(), tmp_path / "x.pt")
    torch.save(torch.zeros(1, 6, 5), tmp_path / "wrong.pt")
    given = [a.format(x=tmp_path / "x.pt", wrong=tmp_path / "wrong.pt", folder=tmp_path) for a in arguments]
    status = command("verify.unit.reported:tiny_model", "--output", str(tmp_path / "r.html"), *given)
    error = capsys.readouterr().err
    assert status == 2
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "r.html").exists()
