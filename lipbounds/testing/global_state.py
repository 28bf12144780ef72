"""A number depends on the block alone: not on the default dtype, autocast, inference mode or flushed denormals."""

from __future__ import annotations

import dataclasses as dc
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

from lipbounds.registry import BoundSpec
from lipbounds.targets.attention import Attention
from lipbounds.targets.target import Target
from lipbounds.testing.known import known, radius_for
from lipbounds.testing.recipes import BIASES, Recipe, build
from lipbounds.testing.verdict import Refuted, evaluate


LENGTHS = (17, 65, 257)  # tokens; bfloat16 rounds 257 to 256
SAME = 1e-9  # relative: flushed denormals may be lost, nothing else differs


def around() -> dict[str, AbstractContextManager[object]]:
    """The surroundings to try, by what a reader calls them; each is entered once."""
    return {
        "default dtype bfloat16": _default_dtype(torch.bfloat16),
        "default dtype float16": _default_dtype(torch.float16),
        "default dtype float64": _default_dtype(torch.float64),
        "autocast to bfloat16": torch.autocast("cpu", dtype=torch.bfloat16),
        "inference mode": torch.inference_mode(),
        "flushed denormals": _flushed_denormals(),
    }


def blocks(spec: BoundSpec, seconds: float) -> Iterator[tuple[Attention, float | None]]:
    """An ordinary float32 block, and attention sinks of 17 and, where that is cheap, of 65 and 257 tokens.

    Args:
        spec: the bound.
        seconds: of processor time that a longer sink may take, by that of the one before.
    """
    heads, biases = (2 if "heads" in spec.supports else 1), frozenset(BIASES if "biases" in spec.supports else ())
    recipe = Recipe(seed=3, n=4, dim=4, heads=heads, head_dim=2, value_dim=2, out_dim=4, spread=2.0, biases=biases)
    ordinary = build(recipe).to(torch.float32)
    yield ordinary, radius_for(spec, ordinary)
    family = "hidden keys" if "mask" in spec.supports else "sink"
    spent = 0.0
    for tokens in LENGTHS:
        if 8 * spent > seconds:  # four times as many tokens
            return
        begun = time.process_time()
        block = known(family, tokens).block
        yield block, radius_for(spec, block)
        spent = time.process_time() - begun


def surroundings(spec: BoundSpec, block: Target, radius: float | None = None, seed: int = 0) -> None:
    """Another default dtype, autocast, inference mode and flushed denormals leave the number as it is."""
    expected = evaluate("surroundings", spec, anew(block), radius, seed).detach()
    smallest = torch.finfo(block.dtype).tiny
    for name, surrounding in around().items():
        with surrounding:
            found = evaluate("surroundings", spec, anew(block), radius, seed).detach().clone()
        off = torch.where(found == expected, -1.0, (found - expected).abs() - SAME * expected.abs() - smallest)
        if not bool((off <= 0).all()):
            worst = off.flatten().argmax()
            claimed, reached = found.flatten()[worst].item(), expected.flatten()[worst].item()
            raise Refuted(
                f"the number must be the same under {name}, got {claimed!r} and {reached!r} without",
                check="surroundings", spec=spec, block=block, radius=radius, seed=seed, claimed=claimed,
                reached=reached,
            )  # fmt: skip


def anew(block: Target) -> Target:
    """The block with tensors made where this is called, and nothing cached.

    Args:
        block: of any kind.
    """
    fields = {field.name: getattr(block, field.name) for field in dc.fields(block)}  # pyright: ignore[reportArgumentType]
    return block.replace(**{name: value.clone() for name, value in fields.items() if isinstance(value, Tensor)})


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def _flushed_denormals() -> Iterator[None]:
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
