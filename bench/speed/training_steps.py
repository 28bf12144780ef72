"""Training steps with a penalty beside the same without, on models of several sizes."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bench.speed.plan import JASMIN_LIMIT, SHARP_LIMIT
from bench.speed.timing import side_by_side
from bench.workloads.architectures import image
from lipbounds.models.digits_data import load_digits_split
from lipbounds.models.digits_vit import DigitsViT


WEIGHT = 1e-3
START_SEED = 0


@dc.dataclass(frozen=True, kw_only=True)
class Trained:
    """What is trained.

    Args:
        title: for the table.
        model: in its random start.
        inputs: a batch.
        loss: of the model at the batch.
    """

    title: str
    model: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]
    loss: Callable[..., Tensor]


def _vit(**sizes: int) -> Callable[[], nn.Module]:
    def model() -> nn.Module:
        import transformers

        arguments: Any = {**sizes, "attn_implementation": "sdpa"}
        return transformers.ViTModel(transformers.ViTConfig(**arguments))

    return model


def _digits() -> tuple[Tensor, ...]:
    train = load_digits_split().train
    return train.images[:64], train.labels[:64]


def _size(model: Any, images: Tensor) -> Tensor:
    return model(images).last_hidden_state.square().mean()


def _cross_entropy(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(images), labels)


MODELS = {
    "digits-vit": Trained(
        title="digits ViT (4 layers, 17 tokens, 64 features), 64 images",
        model=DigitsViT,
        inputs=_digits,
        loss=_cross_entropy,
    ),
    "vit-s-16": Trained(
        title="ViT-S/16 (12 layers, 197 tokens, 384 features, 6 heads), 4 images",
        model=_vit(hidden_size=384, num_attention_heads=6, intermediate_size=1536),
        inputs=lambda: (torch.cat([image(seed) for seed in range(4)]),),
        loss=_size,
    ),
    "vit-b-16": Trained(
        title="ViT-B/16 (12 layers, 197 tokens, 768 features, 12 heads), 1 image",
        model=_vit(),
        inputs=lambda: (image(0),),
        loss=_size,
    ),
}


@dc.dataclass(frozen=True, kw_only=True)
class Penalised:
    """A penalty that is added to the loss of one of the models.

    Args:
        title: for the table.
        limit: of a step with it, in steps without.
        models: names of `MODELS` that it is measured on.
        collect: what collects the penalty of a model inside a `with` block.
    """

    title: str
    limit: float
    models: tuple[str, ...]
    collect: Callable[[Any], Any]


def _jasmin(model: nn.Module) -> Any:
    from lipbounds.jasmin import JaSMin  # its imports take seconds

    return JaSMin(model)


def _sharp(inputs: int | None = None) -> Callable[[Any], Any]:
    def collect(model: Any) -> Any:
        from lipbounds.sharp_penalty import SharpPenalty

        layers = model.layers if hasattr(model, "layers") else model.encoder.layer
        return SharpPenalty([layer.attention for layer in layers], inputs=inputs)

    return collect


JASMIN = "JaSMin"
PENALTIES = {
    JASMIN: Penalised(title="", limit=JASMIN_LIMIT, models=tuple(MODELS), collect=_jasmin),
    "SharpPenalty": Penalised(
        title=", one layer drawn", limit=SHARP_LIMIT, models=("vit-s-16", "vit-b-16"), collect=_sharp()
    ),
    "SharpPenalty(inputs=1)": Penalised(
        title=", one layer and one image drawn",
        limit=SHARP_LIMIT,
        models=("vit-s-16",),
        collect=_sharp(inputs=1),
    ),
}


def measured(name: str, *, repeats: int, enough: float, device: torch.device, penalty: str = JASMIN) -> dict[str, Any]:
    """Cost of a step of SGD with the penalty (its defaults) by that of one without, in turns.

    Args:
        name: of `MODELS`.
        repeats: how many times each is timed at most.
        enough: seconds of the cost of all repeats, after which no further one is begun.
        device: where it runs.
        penalty: of `PENALTIES`.
    """
    trained, collect = MODELS[name], PENALTIES[penalty].collect
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(START_SEED)
        model = trained.model().train().to(device)
    inputs = tuple(tensor.to(device) for tensor in trained.inputs())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)

    def plain() -> None:
        optimizer.zero_grad()
        trained.loss(model, *inputs).backward()
        optimizer.step()

    def penalised() -> None:
        optimizer.zero_grad()
        with collect(model) as reg:
            loss = trained.loss(model, *inputs) + WEIGHT * reg.penalty()
            loss.backward()
        optimizer.step()

    return side_by_side(lambda: penalised, lambda: plain, repeats=repeats, enough=enough, device=device)
