"""The models whose attention blocks are bounded, each yielding its blocks one by one."""

from __future__ import annotations

import dataclasses as dc
import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.workloads.architectures import ARCHITECTURES, Architecture
from bench.workloads.case import Case
from lipbounds.capture import capture
from lipbounds.targets.attention import Attention


SENTENCES = Path(__file__).parent / "data" / "sentences.txt"
MODEL_SEED = 0
SPREADS = (0.25, 1.0, 4.0, 16.0)  # from nearly uniform rows to nearly one-hot ones


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
    """

    name: str
    description: str
    layers: int
    inputs: int
    quick_inputs: int
    cases: Callable[[int], Iterator[Case]]
    seconds: float
    chosen: tuple[int, ...] = ()

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
            cases=functools.partial(_minilm, "minilm-without-biases", True),
        ),
        Model(
            name="digits-vit",
            description="Vision transformer trained on digits: 8 x 8 pixels, 64 features, 4 heads, on test images",
            layers=4,
            inputs=12,
            quick_inputs=2,
            seconds=1.2,
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
                layers=len(SPREADS),
                inputs=4,
                quick_inputs=1,
                seconds=0.3,
                cases=functools.partial(_random, heads),
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


def tensors_hash(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Content hash of named tensors: names, shapes, dtypes and bytes.

    Args:
        tensors: such as `model.state_dict().items()`.
    """
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]


def captured(
    name: str,
    model: nn.Module,
    model_hash: str,
    inputs: Iterable[tuple[str, str, Callable[[], Any]]],
    chosen: tuple[int, ...] = (),
) -> Iterator[Case]:
    """The blocks of a model at inputs of batch size 1, in float64.

    Args:
        name: of the model.
        model: in evaluation mode.
        model_hash: of its weights.
        inputs: name and content hash of each input, and a function that runs the capture on it.
        chosen: numbers of the blocks that are wanted; all if empty.
    """
    for identity, input_hash, run in inputs:
        with torch.no_grad():
            blocks = run()
        for found in blocks:
            if chosen and found.index not in chosen:
                continue
            yield Case(
                model=name,
                model_hash=model_hash,
                input=identity,
                input_hash=input_hash,
                layer=found.index,
                module=found.module,
                block=single(found.attention).double,
            )


def single(block: Attention) -> Attention:
    """A block with one batch item, without its batch dimension."""
    fields = {"x": 2, "memory": 2, "logit_bias": 3}
    present = {name: (getattr(block, name), dims) for name, dims in fields.items() if getattr(block, name) is not None}
    return block.replace(**{name: tensor.reshape(tensor.shape[-dims:]) for name, (tensor, dims) in present.items()})


def interleaved(count: int) -> list[int]:
    """0 .. count - 1, bits reversed: the first few of a sorted list are spread over all of it, and so is the time."""
    bits = max(1, (count - 1).bit_length())
    return [index for number in range(2**bits) if (index := int(f"{number:0{bits}b}"[::-1], 2)) < count]


@functools.cache
def _load_minilm() -> tuple[nn.Module, Any, str]:
    from transformers.utils import logging

    from lipbounds.models.minilm import load_minilm

    logging.disable_progress_bar()
    model, tokenizer = load_minilm()
    return model, tokenizer, tensors_hash(model.state_dict().items())


def _minilm(name: str, without_biases: bool, count: int) -> Iterator[Case]:
    model, tokenizer, model_hash = _load_minilm()
    texts = SENTENCES.read_text(encoding="utf-8").splitlines()

    def inputs() -> Iterator[tuple[str, str, Callable[[], Any]]]:
        for index in interleaved(len(texts))[:count]:
            tokens = tokenizer(texts[index], return_tensors="pt")
            run = functools.partial(capture, model, **tokens)
            yield f"sentence-{index + 1:02d}", hashlib.sha256(texts[index].encode()).hexdigest()[:12], run

    for case in captured(name, model, model_hash, inputs()):
        block = case.block.replace(b_q=None, b_k=None, b_v=None) if without_biases else case.block
        yield dc.replace(case, block=block)


def _digits(count: int) -> Iterator[Case]:
    from lipbounds.models.digits_data import load_digits_split
    from lipbounds.models.digits_vit import load_digits_vit

    model, test = load_digits_vit(), load_digits_split().test
    inputs = [
        (
            f"image-{int(test.indices[index])}",
            tensors_hash([("image", image)]),
            functools.partial(capture, model, image),
        )
        for index in range(count)
        for image in [test.images[index : index + 1]]
    ]
    return captured("digits-vit", model, tensors_hash(model.state_dict().items()), inputs)


def _architecture(name: str, found: Architecture, count: int) -> Iterator[Case]:
    model = found.model()
    inputs = [
        (f"seed-{seed}", tensors_hash([("input", given)]), functools.partial(capture, model, given))
        for seed in range(count)
        for given in [found.input(seed)]
    ]
    return captured(name, model, tensors_hash(model.state_dict().items()), inputs, found.chosen)


def _torch_encoder(count: int) -> Iterator[Case]:
    # nn.TransformerEncoder would copy one random layer; these are independent.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(MODEL_SEED)
        layers = [nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True) for _ in range(3)]
    model = nn.Sequential(*layers).eval()
    inputs = [
        (f"seed-{seed}", tensors_hash([("tokens", tokens)]), functools.partial(capture, model, tokens))
        for seed in range(count)
        for tokens in [torch.randn(1, 16, 64, generator=torch.Generator().manual_seed(seed))]
    ]
    return captured("torch-encoder", model, tensors_hash(model.state_dict().items()), inputs)


def _random(heads: int, count: int) -> Iterator[Case]:
    """Gaussian weights of variance 1/width, so that queries, keys and unscaled logits have standard deviation 1."""
    tokens, width = 16, 32
    generator = torch.Generator().manual_seed(MODEL_SEED)
    shapes = {
        **dict.fromkeys(("w_q", "w_k", "w_v"), (heads, width, width // heads)),
        "w_o": (heads, width // heads, width),
    }
    weights = {
        name: torch.randn(*shape, generator=generator, dtype=torch.float64) / width**0.5
        for name, shape in shapes.items()
    }
    name = f"random-{heads}-head{'s' if heads > 1 else ''}"
    for seed in range(count):
        x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        for layer, spread in enumerate(SPREADS):
            block = Attention(x=x, **(weights | {"w_q": weights["w_q"] * spread}))
            hashes = {"model_hash": tensors_hash(weights.items()), "input_hash": tensors_hash([("tokens", x)])}
            place = {"input": f"seed-{seed}", "layer": layer, "module": f"logit spread {spread:g}"}
            yield Case(model=name, **hashes, **place, block=block)
