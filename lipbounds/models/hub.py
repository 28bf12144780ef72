"""Any Hugging Face encoder or decoder, from its name or a folder, ready to have its attention read.

Whether the network may be used is left to Hugging Face's own switch: with HF_HUB_OFFLINE=1 only folders and the local
cache are read. Code that comes with a checkpoint is not run unless the caller says so; pickled weights are read with
`weights_only=True`, which runs none either.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lipbounds.errors import InvalidInput, LipboundsError, Unsupported


MOST_LAYERS = 10_000


def load_hub_model(
    name_or_path: str | Path, *, dtype: torch.dtype = torch.float32, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The body of a model (no task head), on the CPU, in evaluation mode, with PyTorch's fused attention.

    Safetensors files are preferred. A pooler that the checkpoint has no weights for is taken off, because its random
    numbers belong to no trained model; every other missing weight is an error.

    Args:
        name_or_path: a name on the Hugging Face hub such as "google/vit-base-patch16-224", or a folder.
        dtype: of all floating-point weights; float32 holds those stored in bfloat16 and float16 exactly.
        trust_remote_code: run the code that comes with the checkpoint.

    Raises:
        InvalidInput: nothing is found under that name, or the checkpoint is damaged or lacks weights.
        Unsupported: the checkpoint is of an unknown kind, needs its own code, or cannot use the fused attention.
    """
    return _load(AutoModel, name_or_path, trust_remote_code).to(dtype).eval()


def load_hub_classifier(
    name_or_path: str | Path, *, dtype: torch.dtype = torch.float32, trust_remote_code: bool = False
) -> PreTrainedModel:
    """An image model with its classification head, on the CPU, in evaluation mode, with PyTorch's fused attention.

    Args:
        name_or_path: a name on the Hugging Face hub such as "google/vit-base-patch16-224", or a folder.
        dtype: of all floating-point weights.
        trust_remote_code: run the code that comes with the checkpoint.

    Raises:
        InvalidInput: nothing is found under that name, or the checkpoint is damaged or lacks weights.
        Unsupported: the checkpoint is no image classifier, needs its own code, or cannot use the fused attention.
    """
    return _load(AutoModelForImageClassification, name_or_path, trust_remote_code).to(dtype).eval()


def load_hub_tokenizer(name_or_path: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a text model.

    Args:
        name_or_path: a name on the Hugging Face hub, or a folder.
        trust_remote_code: run the code that comes with the checkpoint.

    Raises:
        InvalidInput: no tokenizer is found under that name.
        Unsupported: the tokenizer is of an unknown kind or needs its own code.
    """
    with clear_errors(name_or_path, "a text model whose tokenizer transformers can build"):
        tokenizer = AutoTokenizer.from_pretrained(str(name_or_path), trust_remote_code=trust_remote_code)
    # Without vocabulary files transformers makes a tokenizer with special tokens and at most a bare space: it turns
    # every text into unknown tokens.
    if len(set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens)) < 2:
        raise InvalidInput(not_found(name_or_path, "there is no tokenizer vocabulary"))
    return tokenizer


def _load(kind: Any, name_or_path: str | Path, trust_remote_code: bool) -> Any:
    with clear_errors(
        name_or_path, f'a model that transformers can build with {kind.__name__} and attn_implementation="sdpa"'
    ):
        folder = Path(name_or_path)
        if folder.is_dir() and not (folder / "config.json").is_file():
            raise InvalidInput(not_found(name_or_path, "the folder has no config.json"))
        _check_layers(name_or_path, trust_remote_code)
        # Mismatched shapes are let through here to be refused below, with a shorter message.
        model, loading = kind.from_pretrained(
            str(name_or_path),
            attn_implementation="sdpa",
            trust_remote_code=trust_remote_code,
            weights_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    _refuse_random_weights(model, loading, name_or_path)
    return model


def _check_layers(name_or_path: str | Path, trust_remote_code: bool) -> None:
    """A number of layers that no model has would be built one by one, for hours, before weights are looked for."""
    config = AutoConfig.from_pretrained(str(name_or_path), trust_remote_code=trust_remote_code)
    waiting = [config.to_dict()]
    while waiting:
        part = waiting.pop()
        waiting.extend(value for value in part.values() if isinstance(value, dict))
        for name, value in part.items():
            if "layer" in str(name) and type(value) is int and value > MOST_LAYERS:
                reason = f"config.json must name at most {MOST_LAYERS} layers, got {name}={value}"
                raise InvalidInput(not_found(name_or_path, reason))


@contextmanager
def clear_errors(name_or_path: str | Path, supported: str) -> Iterator[None]:
    """What transformers and torch raise inside becomes one of the library's errors.

    Args:
        name_or_path: what is loaded.
        supported: what it must be, for the message.
    """
    try:
        yield
    except LipboundsError:
        raise
    except (OSError, SafetensorError) as error:
        raise InvalidInput(not_found(name_or_path, _first_line(error))) from error
    except (ValueError, ImportError) as error:
        raise Unsupported(
            f"name_or_path must be {supported} and without code from the checkpoint, "
            f"got name_or_path='{name_or_path}'; load it yourself and use the module. ({_first_line(error)})"
        ) from error
    except UnpicklingError as error:
        reason = "the weights are a pickle that is damaged or holds more than tensors; convert them to safetensors"
        raise InvalidInput(not_found(name_or_path, reason)) from error
    except Exception as error:  # a damaged config or pickle makes transformers and torch raise anything
        raise InvalidInput(not_found(name_or_path, f"{type(error).__name__}: {_first_line(error)}")) from error


def not_found(name_or_path: str | Path, reason: str) -> str:
    """The message for a checkpoint that is not there or damaged.

    Args:
        name_or_path: what was given.
        reason: what is wrong with it.
    """
    return (
        "name_or_path must be a folder with a complete checkpoint (config.json, weights, for texts a tokenizer) or a "
        f"name that is in the local cache or can be downloaded, got name_or_path='{name_or_path}'; where there is a "
        f"network run `hf download NAME` and pass the folder it prints. ({reason})"
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0]


def _refuse_random_weights(model: nn.Module, loading: dict[str, Any], name_or_path: str | Path) -> None:
    missing = {*loading["missing_keys"], *(entry[0] for entry in loading["mismatched_keys"])}
    needed = sorted(name for name in missing if not name.startswith("pooler."))
    if needed:
        raise InvalidInput(
            f"the checkpoint must hold every weight of {type(model).__name__} in its shape, "
            f"got name_or_path='{name_or_path}' with {len(needed)} missing or of another shape, such as {needed[0]}; "
            "they would be random: use a complete checkpoint with its own config.json."
        )
    if missing:
        # Architectures with an optional pooler hold None when they are built without one.
        model.pooler = None  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
