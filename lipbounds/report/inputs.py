"""What a loaded model is run on: texts, images, files of tensors, or a small default."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lipbounds.errors import InvalidInput
from lipbounds.models.loading import LoadedModel
from lipbounds.report.measure import ModelInput
from lipbounds.targets.given import odd_kind


SENTENCE = "The movie was surprisingly good, but the ending felt rushed."
TENSORS = (".pt", ".npy", ".safetensors")


def default_inputs(loaded: LoadedModel) -> list[ModelInput]:
    """One short sentence, or one digit.

    Args:
        loaded: the model.

    Raises:
        InvalidInput: the model takes neither.
    """
    if loaded.kind == "text":
        return from_texts(loaded, [SENTENCE])
    image = loaded.image
    if image is not None and (image.channels, image.height, image.width) == (1, 8, 8):
        from lipbounds.models.digits_data import load_digits_split

        test = load_digits_split().test
        name = f"a digit {int(test.labels[0])} of the test images"
        return [ModelInput(name=name, args=(test.images[:1],), picture=test.images[0])]
    wanted = "--images DIR" if loaded.kind == "image" else "--data FILE with a tensor (.pt, .npy, .safetensors)"
    raise InvalidInput(f"{loaded.name} needs inputs of its own, got none; pass {wanted}.")


def from_texts(loaded: LoadedModel, texts: Sequence[str]) -> list[ModelInput]:
    """One input per text.

    Args:
        loaded: a text model.
        texts: not empty.

    Raises:
        InvalidInput: the model takes no texts; a text is empty, or longer than the model allows.
    """
    tokenizer: Any = loaded.tokenizer
    if tokenizer is None:
        raise InvalidInput(f"text needs a text model, but {loaded.name} takes an input of kind {loaded.kind}.")
    found = []
    for text in texts:
        if not text.strip():
            raise InvalidInput("text must not be empty; pass a sentence.")
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise InvalidInput(f"text must be Unicode, got bytes that are none in {text!a}; pass it in UTF-8.")
        encoded = dict(tokenizer(text, return_tensors="pt"))
        ids = encoded["input_ids"][0]
        if len(ids) > tokenizer.model_max_length:
            raise InvalidInput(
                f"a text may have at most {tokenizer.model_max_length} tokens for {loaded.name}, got {len(ids)}; "
                "shorten it."
            )
        labels = tuple(_decoded(tokenizer, number) for number in ids.tolist())
        found.append(ModelInput(name=text, kwargs=encoded, labels=labels))
    return found


def _decoded(tokenizer: Any, number: int) -> str:
    """A token as text; as the tokenizer writes it inside where it is a part of a letter, or nothing but spaces."""
    text = str(tokenizer.decode([number])).strip()
    return text if text and "\ufffd" not in text else str(tokenizer.convert_ids_to_tokens(number))


def from_file(loaded: LoadedModel, path: Path) -> list[ModelInput]:
    """One input per line of a text file, or per item of the tensor in a file.

    Args:
        loaded: the model.
        path: a text file, or a tensor as .pt, .npy or .safetensors whose first dimension counts the inputs.

    Raises:
        InvalidInput: there is no such file, or it does not hold that.
    """
    if not path.is_file():
        what = "is none" if path.exists() else "is not there"
        raise InvalidInput(f"data must be a file, got '{path}', which {what}; check the path.")
    if path.suffix in TENSORS:
        tensor = _tensor(path)
        if tensor.dim() < 2 or not len(tensor):
            raise InvalidInput(
                f"'{path}' must hold a tensor whose first dimension counts inputs, got {_shape(tensor)}."
            )
        return [ModelInput(name=f"{path.name}, item {i}", args=(tensor[i : i + 1],)) for i in range(len(tensor))]
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise InvalidInput(
            f"data must be a text in UTF-8, or a tensor in a file named {', '.join(TENSORS)}, got '{path}'."
        ) from error
    texts = [line for line in lines if line.strip()]
    if not texts:
        raise InvalidInput(f"data must hold a text a line, got '{path}' without any.")
    return from_texts(loaded, texts)


def from_images(loaded: LoadedModel, folder: Path) -> list[ModelInput]:
    """One input per picture of a folder, brought to the size of the model; in the order of their names.

    Args:
        loaded: an image model.
        folder: with pictures that Pillow reads.

    Raises:
        InvalidInput: the model takes no images, or there are none.
    """
    from lipbounds.models.pictures import SUFFIXES, picture, pictures_in

    settings = loaded.image
    if settings is None or settings.channels not in (1, 3):
        raise InvalidInput(f"images needs a model of grey or colour images; {loaded.name} is none.")
    paths = pictures_in(folder) if folder.is_dir() else []
    if not paths:
        raise InvalidInput(f"images must be a folder with pictures ({', '.join(SUFFIXES)}), got '{folder}'.")
    found = []
    for path in paths:
        planes = picture(path, settings)
        name = path.name.encode(errors="backslashreplace").decode()  # names of files may be no Unicode
        found.append(ModelInput(name=name, args=(settings.normalised(planes[None]),), picture=planes))
    return found


def placed(runs: Sequence[ModelInput], device: torch.device, dtype: torch.dtype) -> list[ModelInput]:
    """The inputs on a device, those with floating-point numbers in a dtype.

    Args:
        runs: the inputs.
        device: of the model.
        dtype: of the weights.
    """

    def move(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(device, dtype if value.is_floating_point() else value.dtype)

    return [
        dc.replace(
            run, args=tuple(map(move, run.args)), kwargs={name: move(value) for name, value in run.kwargs.items()}
        )
        for run in runs
    ]


@torch.no_grad()
def check_runs(loaded: LoadedModel, runs: Sequence[ModelInput]) -> None:
    """Run the model on each input before hours are spent: what a wrong shape makes torch say becomes one line.

    Args:
        loaded: the model.
        runs: placed where it is.

    Raises:
        InvalidInput: the model cannot be run on one.
    """
    for run in runs:
        try:
            loaded.module(*run.args, **run.kwargs)
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, AssertionError) as error:
            given = ", ".join(_shape(value) for value in run.args if isinstance(value, Tensor))
            given = given or f"the {len(run.labels)} tokens of {run.name[:40]!r}"
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise InvalidInput(
                f"{loaded.name} must run on the input, got {given}, on which it raised: {reason}; pass inputs of its "
                "shape."
            ) from error


def _tensor(path: Path) -> Tensor:
    """The tensor in a file, read without running code."""
    try:
        if path.suffix == ".pt":
            found = torch.load(path, weights_only=True, map_location="cpu")
        elif path.suffix == ".npy":
            import numpy as np

            found = torch.from_numpy(np.load(path, allow_pickle=False))
        else:
            from safetensors.torch import load_file

            tensors = [*load_file(path).values()]
            found = tensors[0] if len(tensors) == 1 else tensors
    except Exception as error:  # each format has errors of its own for a damaged file
        raise InvalidInput(f"'{path}' must hold one tensor, but it cannot be read ({type(error).__name__}).") from error
    if not isinstance(found, Tensor):
        raise InvalidInput(f"'{path}' must hold one tensor, got {type(found).__name__}; save a single one.")
    odd = _odd(found)
    if odd is not None:
        raise InvalidInput(f"'{path}' must hold a plain tensor with real, finite numbers, got {odd}; save it as such.")
    return found


def _odd(tensor: Tensor) -> str | None:
    """What is unusual about a tensor that no model takes as its input."""
    found = odd_kind(tensor)
    if found is None and not bool(tensor.isfinite().all()):
        return f"{int((~tensor.isfinite()).sum())} numbers that are not finite"
    return found


def _shape(tensor: Tensor) -> str:
    return f"a tensor of shape {tuple(tensor.shape)}"
