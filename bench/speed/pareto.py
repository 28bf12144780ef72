"""Which bound for which budget: ratio to the truth against forward passes, of every bound at four blocks."""

from __future__ import annotations

import dataclasses as dc
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from bench.engine.evaluate import TimeLimitReached, limited
from bench.speed.plan import SEED, VIT, Shape
from bench.speed.timing import side_by_side
from bench.workloads.models import zoo
from lipbounds import registry
from lipbounds.targets.attention import Attention
from lipbounds.targets.weight_norms import keep_weight_norms


Answer = dict[str, Any]
STEPS = 40  # of Lanczos for the truth, from below
CERTIFICATES: dict[str, dict[str, Any]] = {  # what is asked of the probable bounds
    "lanczos_certificate": {"steps": 60, "delta": 1e-9},
    "lanczos_posterior": {"delta": 1e-9},
}


def _vit() -> Attention:
    return VIT.block(torch.device("cpu"))


def _gpt2() -> Attention:
    shape = Shape(tokens=512, width=768, heads=12, biases=True)
    return shape.block(torch.device("cpu")).replace(causal=True)


def _minilm() -> Attention:
    model = next(model for model in zoo() if model.name == "minilm")
    return next(case.block for case in model.cases(1) if case.layer == 3).to(torch.float32)


def _smollm2() -> Attention:
    """Nine heads of width 64 with three keys and values between them, rotary positions, causal."""
    tokens, width, heads, groups, inner = 256, 576, 9, 3, 64
    generator = torch.Generator().manual_seed(SEED)
    draw = lambda *size: torch.randn(*size, generator=generator) * width**-0.5  # noqa: E731
    angles = torch.arange(tokens).unsqueeze(-1) * 10_000.0 ** (-torch.arange(inner // 2) / (inner // 2))
    turns = torch.stack([angles.cos(), angles.sin()], -2)
    return Attention(
        x=width**0.5 * draw(tokens, width),
        w_q=draw(heads, width, inner),
        w_k=draw(groups, width, inner),
        w_v=draw(groups, width, inner),
        w_o=draw(heads, inner, width),
        query_rotation=turns,
        key_rotation=turns,
        causal=True,
    )


BLOCKS: dict[str, Callable[[], Attention]] = {
    "ViT-B/16 shape, random (n = 197, D = 768)": _vit,
    "MiniLM layer 3, trained, one sentence (D = 384)": _minilm,
    "GPT-2 shape, random, causal (n = 512, D = 768)": _gpt2,
    "SmolLM2 shape, random, causal, rotary (n = 256, D = 576)": _smollm2,
}


@functools.cache
def _block(name: str) -> Attention:
    return BLOCKS[name]()


def methods() -> list[str]:
    """Names of the proved and probable bounds of attention at a point in l2."""
    specs = [registry.get(name) for name in CERTIFICATES]
    specs += [spec for spec in registry.select(kind="proved", scope="point", norm="l2") if spec.role == "bound"]
    return sorted({spec.name for spec in specs if spec.target is Attention})


@dc.dataclass(frozen=True, kw_only=True)
class Point:
    """A bound at one of the blocks, or its truth where there is no method."""

    block: str
    method: str | None = None

    @property
    def question(self) -> Answer:
        """What is asked."""
        options = CERTIFICATES.get(self.method or "", {} if self.method else {"steps": STEPS})
        return {"what": "pareto", "block": self.block, "method": self.method or "lanczos", "options": options}


def points() -> Iterator[Point]:
    """The truth and all bounds at all blocks."""
    for name in BLOCKS:
        yield Point(block=name)
    for name, method in itertools.product(BLOCKS, methods()):
        yield Point(block=name, method=method)


@torch.no_grad()
def measured(point: Point, *, repeats: int, enough: float, stop: float, device: torch.device) -> Answer:
    """The value at the block, and the cost in forward passes of it.

    Args:
        point: which.
        repeats: how often it is timed at most.
        enough: seconds of the cost of all repeats.
        stop: seconds after which a call is given up.
        device: where.
    """
    asked = point.question
    spec, block = registry.get(asked["method"]), _block(point.block).to(device)
    if spec.missing_features(block):
        return {"error": f"not for a block with {', '.join(spec.missing_features(block))}"}
    function, values = block.function(), []

    def make() -> Callable[[], Any]:
        fresh = block.replace()
        return lambda: values.append(float(spec(fresh, **asked["options"]).value))

    def forward() -> Callable[[], Any]:
        return lambda: function(block.moving_input)

    try:
        with limited(stop if point.method else 10 * stop), keep_weight_norms():
            answer = side_by_side(make, forward, repeats=repeats, enough=enough, device=device)
    except TimeLimitReached:
        return {"error": f"no result within {stop:g} s"}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return answer | {"value": values[-1]}
