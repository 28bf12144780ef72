"""The pretrained models whose weights lie in packages, with their inputs.

They are no part of the zoo (`bench.workloads.models`), whose pages anybody can make from this repository alone.
"""

from __future__ import annotations

import dataclasses as dc
import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.workloads.capturing import captured
from bench.workloads.case import Case
from bench.workloads.hashes import tensors_hash
from bench.workloads.models import SENTENCES
from lipbounds.capture import capture


REACTIONS = SENTENCES.parent / "reactions.txt"
PICTURES = "pip install --no-deps foolbox==3.3.4"
SHORT_REACTION, SHORT_TEXT = "CCBr.[OH-]>>CCO.[Br-]", "The sky is blue."
SHORTEST = 8  # tokens of a sentence: of fewer, sinks and shares of rows say little


@dc.dataclass(frozen=True, kw_only=True)
class Pretrained:
    """A model at a kind of input.

    Args:
        name: of the workload, unique.
        model: as `lipbounds.load_model` takes it.
        about: one sentence for the reader of a table.
        layers: number of attention blocks.
        first: what the first token is.
        inputs: name, content hash, and what is passed to the model, for that many inputs.
    """

    name: str
    model: str
    about: str
    layers: int
    first: str
    inputs: Callable[[int], list[tuple[str, str, dict[str, Tensor]]]]

    def cases(self, count: int) -> Iterator[Case]:
        """The blocks of that many inputs, in the order of the inputs.

        Args:
            count: of inputs.

        Raises:
            LipboundsError: the package with the weights, or with the inputs, is not installed.
        """
        module = functools.partial(_module, self.model)
        ways = [(name, identity, functools.partial(_run, given=given)) for name, identity, given in self.inputs(count)]
        return captured(self.name, module, _weights(self.model), ways, range(self.layers))


@functools.lru_cache(maxsize=1)
def _loaded(model: str) -> Any:
    from lipbounds.models.loading import load_model

    return load_model(model)


def _module(model: str) -> nn.Module:
    return _loaded(model).module


@functools.cache
def _weights(model: str) -> str:
    return tensors_hash(_module(model).state_dict().items())


def _run(model: nn.Module, *, given: dict[str, Any]) -> Any:
    return capture(model, **given)


def _texts(model: str, path: Path, count: int) -> list[tuple[str, str, dict[str, Tensor]]]:
    """The first texts of a file that are long enough."""
    found = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines()):
        given = dict(_loaded(model).tokenizer(text, return_tensors="pt"))
        if given["input_ids"].shape[-1] >= SHORTEST:
            found.append((f"text-{number + 1:02d}", hashlib.sha256(text.encode()).hexdigest()[:12], given))
    return found[:count]


def _images(pixels: int, count: int) -> list[tuple[str, str, dict[str, Tensor]]]:
    """The first sample images of ImageNet, of that many pixels a side."""
    from lipbounds.models.packages import package_file
    from lipbounds.models.pictures import picture

    folder = package_file("foolbox", "data", model="dinov2-s", install=PICTURES, what="the images")
    settings = dc.replace(_loaded("dinov2-s").image, height=pixels, width=pixels, prepare=None)
    found = []
    for path in sorted(folder.glob("imagenet_*.jpg"))[:count]:
        given = settings.normalised(picture(path, settings))[None]
        found.append((path.stem, tensors_hash([("image", given)]), {"pixel_values": given.to(torch.float32)}))
    return found


def _text(model: str, text: str, count: int) -> list[tuple[str, str, dict[str, Tensor]]]:
    """One text, whatever the count."""
    del count
    return [
        (
            text,
            hashlib.sha256(text.encode()).hexdigest()[:12],
            dict(_loaded(model).tokenizer(text, return_tensors="pt")),
        )
    ]


def _dinov2(pixels: int) -> Pretrained:
    tokens = (pixels // 14) ** 2 + 1
    return Pretrained(
        name=f"dinov2-s at {pixels} px",
        model="dinov2-s",
        about=f"DINOv2 ViT-S/14 on sample images of ImageNet, {pixels} x {pixels} pixels, {tokens} tokens",
        layers=12,
        first="the class token",
        inputs=functools.partial(_images, pixels),
    )


def short_workloads() -> Sequence[Pretrained]:
    """Inputs of few tokens, for what takes long; nothing is loaded before the first case is asked for."""
    return [
        Pretrained(
            name="albert-rxn",
            model="albert-rxn",
            about=f"ALBERT on the chemical reaction `{SHORT_REACTION}`, one set of weights in all layers",
            layers=12,
            first="[CLS]",
            inputs=functools.partial(_text, "albert-rxn", SHORT_REACTION),
        ),
        _dinov2(56),
        Pretrained(
            name="smollm2-135m",
            model="smollm2-135m",
            about=f'SmolLM2-135M-Instruct, causal, on the text "{SHORT_TEXT}"',
            layers=30,
            first="the first token of the text",
            inputs=functools.partial(_text, "smollm2-135m", SHORT_TEXT),
        ),
    ]


def workloads() -> Sequence[Pretrained]:
    """All of them but the short ones; nothing is loaded before the first case is asked for."""
    return [
        *map(_dinov2, (112, 224)),
        Pretrained(
            name="smollm2-135m",
            model="smollm2-135m",
            about="SmolLM2-135M-Instruct, causal, on English texts",
            layers=30,
            first="the first token of the text",
            inputs=functools.partial(_texts, "smollm2-135m", SENTENCES),
        ),
        Pretrained(
            name="albert-rxn",
            model="albert-rxn",
            about="ALBERT on chemical reactions, one set of weights in all layers",
            layers=12,
            first="[CLS]",
            inputs=functools.partial(_texts, "albert-rxn", REACTIONS),
        ),
    ]
