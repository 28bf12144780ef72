"""What a user brings to the benchmark: a model, and bounds that are not registered here."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.workloads.capturing import captured
from bench.workloads.hashes import tensors_hash
from bench.workloads.models import SENTENCES, Model
from lipbounds.capture import capture
from lipbounds.errors import InvalidInput
from lipbounds.imports import import_object
from lipbounds.models.image_data import ImageData, is_image_data, read_image_data
from lipbounds.models.loading import LoadedModel, load_model
from lipbounds.registry import BoundSpec, registry
from lipbounds.report.inputs import default_inputs, from_file, from_images, from_texts
from lipbounds.report.measure import ModelInput


TEXTS, IMAGES, QUICK = 8, 8, 1  # inputs of a run


def model_of(name: str, data: Path | None) -> Model:
    """A user's model with its inputs.

    Args:
        name: as `lipbounds.load_model` takes it.
        data: texts, one per line, or a tensor whose items are run one by one; for a model of images also a folder of
            pictures, of which the first eight are taken, or one of IDX files, or `mnist-5k`, of which eight are taken
            in equal distances; None: sentences of this repository for a text model, a digit for the bundled models of
            images.

    Raises:
        InvalidInput: there is no such model, or it needs inputs of its own.
        Unsupported: no attention is found that `capture` can express.
    """
    loaded = load_model(name)
    runs = _runs(loaded, data)
    with torch.no_grad():
        layers = [found.index for found in capture(loaded.module, *runs[0].args, **runs[0].kwargs)]
    inputs = [(run.name[:60], _hash(run), functools.partial(_captured, run)) for run in runs]
    weights = tensors_hash(loaded.module.state_dict().items())
    return Model(
        name=name,
        description=f"{type(loaded.module).__name__}, given by --model",
        layers=len(layers),
        inputs=len(runs),
        quick_inputs=min(QUICK, len(runs)),
        seconds=2.0,
        cases=lambda count: captured(name, lambda: loaded.module, weights, inputs[:count], layers),
    )


def register(path: str) -> BoundSpec:
    """Register a user's bound for this process.

    Args:
        path: `package.module:ATTRIBUTE`, where a `BoundSpec` lies.

    Raises:
        InvalidInput: there is none, or its name is taken by another one.
    """
    if ":" not in path:
        raise InvalidInput(
            f"--bounds must be package.module:ATTRIBUTE of a bound of yours, got {path!r}; all registered bounds are "
            "measured without it."
        )
    spec = import_object(path, "a bound")
    if not isinstance(spec, BoundSpec):
        raise InvalidInput(f"{path} must be a BoundSpec, got {type(spec).__name__}.")
    if spec.name not in {known.name for known in registry} or registry.get(spec.name) is not spec:
        registry.add(spec)
    return spec


def _runs(loaded: LoadedModel, data: Path | None) -> Sequence[ModelInput]:
    if data is not None and loaded.kind == "image" and is_image_data(data):
        return _of_data(loaded, read_image_data(data))
    if data is not None:
        return from_images(loaded, data)[:IMAGES] if data.is_dir() else from_file(loaded, data)
    if loaded.kind == "text":
        return from_texts(loaded, SENTENCES.read_text(encoding="utf-8").splitlines()[:TEXTS])
    return default_inputs(loaded)


def _of_data(loaded: LoadedModel, data: ImageData) -> list[ModelInput]:
    settings = loaded.image
    assert settings is not None  # of a model of images
    count = min(IMAGES, len(data))
    numbers = [k * len(data) // count for k in range(count)]  # they may lie sorted by their class
    planes = {number: data.image(number, settings) for number in numbers}
    return [
        ModelInput(name=f"{data.name}, image {number}", args=(settings.normalised(image[None]),), picture=image)
        for number, image in planes.items()
    ]


def _captured(run: ModelInput, model: nn.Module) -> Any:
    return capture(model, *run.args, **run.kwargs)


def _hash(run: ModelInput) -> str:
    tensors = [*((str(index), value) for index, value in enumerate(run.args)), *run.kwargs.items()]
    return tensors_hash([(name, value) for name, value in tensors if isinstance(value, Tensor)])
