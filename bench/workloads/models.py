"""The models whose attention blocks are bounded, each yielding its blocks one by one."""

from __future__ import annotations

import dataclasses as dc
import functools
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.workloads.architectures import ARCHITECTURES, Architecture
from bench.workloads.capturing import captured
from bench.workloads.case import Case
from bench.workloads.hashes import recipe_hash, tensors_hash
from bench.workloads.random_blocks import LOGIT_SCALES, random_blocks
from lipbounds.capture import capture
from lipbounds.claims import Feature


SENTENCES = Path(__file__).parent / "data" / "sentences.txt"
MODEL_SEED = 0


@dc.dataclass(frozen=True, kw_only=True)
class Model:
    """A model with its inputs.

    Args:
        name: unique.
        description: one sentence for the reader of a table.
        layers: number of attention blocks.
        inputs: number of inputs of a full run.
        quick_inputs: number of inputs of a quick run; they are the first ones of the full run.
        cases: yields the blocks of that many inputs, lazily.
        seconds: expected for all evaluations at one block, for the estimate of the remaining time only.
        chosen: the layers that are bounded, where all would take too long; all if empty.
        trained: whether its weights are; those of the others are drawn.
    """

    name: str
    description: str
    layers: int
    inputs: int
    quick_inputs: int
    cases: Callable[[int], Iterator[Case]]
    seconds: float
    chosen: tuple[int, ...] = ()
    trained: bool = False

    @property
    def bounded(self) -> tuple[int, ...]:
        """The numbers of the layers that are bounded."""
        return self.chosen or tuple(range(self.layers))

    def count(self, quick: bool) -> int:
        """Number of inputs of a run."""
        return self.quick_inputs if quick else self.inputs


def zoo() -> list[Model]:
    """All models of the benchmark; nothing is loaded before the first case is asked for."""
    return [
        Model(
            name="minilm",
            description="Pretrained sentence encoder all-MiniLM-L6-v2: 384 features, 12 heads, on English texts",
            layers=6,
            inputs=32,
            quick_inputs=3,
            seconds=1.6,
            trained=True,
            cases=functools.partial(_minilm, "minilm", False),
        ),
        Model(
            name="minilm-without-biases",
            description="MiniLM without biases: the same blocks and inputs, query, key and value biases set to zero as "
            "the theorem as printed needs; no real model computes these",
            layers=6,
            inputs=8,
            quick_inputs=1,
            seconds=1.8,
            trained=True,
            cases=functools.partial(_minilm, "minilm-without-biases", True),
        ),
        Model(
            name="digits-vit",
            description="Vision transformer trained on digits: 8 x 8 pixels, 64 features, 4 heads, on test images",
            layers=4,
            inputs=12,
            quick_inputs=2,
            seconds=1.2,
            trained=True,
            cases=_digits,
        ),
        Model(
            name="torch-encoder",
            description="torch.nn.TransformerEncoderLayer at its start: 64 features, 4 heads, on Gaussian tokens",
            layers=3,
            inputs=4,
            quick_inputs=1,
            seconds=1.0,
            cases=_torch_encoder,
        ),
        *architectures(),
        *(
            Model(
                name=f"random-{heads}-head{'s' if heads > 1 else ''}",
                description=f"Random blocks without biases: {heads} head{'s' if heads > 1 else ''}, 32 features, on "
                "Gaussian tokens; the layers differ in the standard deviation of the logits",
                layers=len(LOGIT_SCALES),
                inputs=4,
                quick_inputs=1,
                seconds=0.3,
                cases=functools.partial(random_blocks, heads),
            )
            for heads in (1, 4)
        ),
    ]


def architectures() -> list[Model]:
    """Transformers of common shapes, at their random start: no pretrained weights are reachable offline."""
    return [
        Model(
            name=name,
            description=found.description,
            layers=found.layers,
            chosen=found.chosen,
            inputs=1,
            quick_inputs=1,
            seconds=found.seconds,
            cases=functools.partial(_architecture, name, found),
        )
        for name, found in ARCHITECTURES.items()
    ]


def drawn_hashes(count: int = 16) -> dict[tuple[str, str], tuple[str, str]]:
    """Hashes of weights and input by the names of model and input, of the models whose weights are drawn.

    Args:
        count: of inputs of each.
    """
    drawn = [model for model in zoo() if not model.trained]
    return {
        (case.model, case.input): (case.model_hash, case.input_hash) for model in drawn for case in model.cases(count)
    }


def interleaved(count: int) -> list[int]:
    """0 .. count - 1, bits reversed: the first few of a sorted list are spread over all of it, and so is the time."""
    bits = max(1, (count - 1).bit_length())
    return [index for number in range(2**bits) if (index := int(f"{number:0{bits}b}"[::-1], 2)) < count]


@functools.cache
def _load_minilm() -> tuple[nn.Module, Any]:
    from transformers.utils import logging

    from lipbounds.models.minilm import load_minilm

    logging.disable_progress_bar()
    return load_minilm()


@functools.cache
def _minilm_hash() -> str:
    return tensors_hash(_load_minilm()[0].state_dict().items())


def _minilm(name: str, without_biases: bool, count: int) -> Iterator[Case]:
    texts = SENTENCES.read_text(encoding="utf-8").splitlines()

    def run(text: str, model: nn.Module) -> Any:
        found = capture(model, **_load_minilm()[1](text, return_tensors="pt"))
        if not without_biases:
            return found
        bare = {"b_q": None, "b_k": None, "b_v": None}
        return [dc.replace(each, attention=each.attention.replace(**bare)) for each in found]

    inputs = [
        (
            f"sentence-{index + 1:02d}",
            hashlib.sha256(texts[index].encode()).hexdigest()[:12],
            functools.partial(run, texts[index]),
        )
        for index in interleaved(len(texts))[:count]
    ]
    features = frozenset[Feature]({"heads"} if without_biases else {"biases", "heads"})
    model = lambda: _load_minilm()[0]  # noqa: E731
    return captured(name, model, _minilm_hash(), inputs, range(6), width=384, block_features=features)


def digits_inputs(count: int) -> list[tuple[str, str, Callable[[nn.Module], Any]]]:
    """The first test images of the digits, as `captured` takes inputs.

    Args:
        count: of images.
    """
    from lipbounds.models.digits_data import load_digits_split

    test = load_digits_split().test
    return [
        (
            f"image-{int(test.indices[index])}",
            tensors_hash([("image", image)]),
            functools.partial(_captured_at, image),
        )
        for index in range(count)
        for image in [test.images[index : index + 1]]
    ]


def _captured_at(given: Tensor, model: nn.Module) -> Any:
    return capture(model, given)


def _digits(count: int) -> Iterator[Case]:
    from lipbounds.models.digits_vit import load_digits_vit

    model = load_digits_vit()
    known: dict[str, Any] = {"width": 64, "block_features": frozenset({"biases", "heads"})}
    weights = tensors_hash(model.state_dict().items())
    return captured("digits-vit", lambda: model, weights, digits_inputs(count), range(4), **known)


def _architecture(name: str, found: Architecture, count: int) -> Iterator[Case]:
    inputs = [
        (f"seed-{seed}", found.input_hash(seed), lambda model, seed=seed: capture(model, found.input(seed)))
        for seed in range(count)
    ]
    known: dict[str, Any] = {"width": found.width, "block_features": found.features}
    return captured(name, functools.cache(found.model), found.model_hash(), inputs, found.chosen, **known)


def _torch_encoder_model() -> nn.Module:
    # nn.TransformerEncoder would copy one random layer; these are independent.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(MODEL_SEED)
        layers = [nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True) for _ in range(3)]
    return nn.Sequential(*layers).eval()


def _torch_encoder(count: int) -> Iterator[Case]:
    def run(seed: int, model: nn.Module) -> Any:
        return capture(model, torch.randn(1, 16, 64, generator=torch.Generator().manual_seed(seed)))

    inputs = [
        (f"seed-{seed}", recipe_hash(tokens="Gaussian", shape=[1, 16, 64], seed=seed), functools.partial(run, seed))
        for seed in range(count)
    ]
    weights = recipe_hash(layers=["TransformerEncoderLayer", 64, 4, 128, 3], seed=MODEL_SEED)
    known: dict[str, Any] = {"width": 64, "block_features": frozenset({"heads"})}
    return captured("torch-encoder", functools.cache(_torch_encoder_model), weights, inputs, range(3), **known)
