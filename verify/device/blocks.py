"""Small blocks with every feature, and the same question asked here and on the pretend device."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lipbounds.targets.target import Target
from lipbounds.testing import Recipe, build, pretend_device
from verify.unit.blocks import random_block
from verify.unit.test_mlp import network
from verify.unit.test_other_targets import cosine_block, l2_block, norm_block


DEVICE = pretend_device()
ROTARY = Recipe(
    seed=3, n=4, dim=4, heads=2, groups=1, head_dim=6, value_dim=2, out_dim=4, spread=3.0, rotary="random",
    mask="causal", biases=frozenset(("b_q", "b_k", "b_v", "b_o")), norm="gaussian", norm_over="head", norm_eps=1e-3,
)  # fmt: skip


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


BLOCKS: dict[str, Target] = {
    "one head": random_block(biases=False, heads=1),
    "plain": random_block(biases=False),
    "causal": random_block(causal=True, biases=False),
    "biases": random_block(x=draw(2, 4, 6), logit_bias=draw(4, 4)),
    "cross": random_block(memory=draw(3, 6), moves="memory"),
    "rotary and QK-norm": build(ROTARY),
    "mlp": network(0, 3, 4, 2),
    "l2": l2_block(),
    "cosine": cosine_block(),
    "lipschitz norm": norm_block(),
}


def tensors_in(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor in a result, with its place in it."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from tensors_in(item, f"{path}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            yield from tensors_in(item, f"{path}[{number}]")
    elif dc.is_dataclass(value):
        for field in dc.fields(value):
            yield from tensors_in(getattr(value, field.name), f"{path}.{field.name}")


def assert_same(there: Any, here: Any, *, rtol: float = 1e-9) -> None:
    """A result on the device has every tensor there, in the dtype and with the numbers that it has on the CPU.

    Args:
        there: found on the device.
        here: found on the CPU.
        rtol: what rounding explains.
    """
    found, expected = dict(tensors_in(there)), dict(tensors_in(here))
    assert found.keys() == expected.keys()
    assert expected
    for place, tensor in found.items():
        assert tensor.device == DEVICE, f"{place} is on {tensor.device}"
        message = f"{place} is {tensor}, on the CPU {expected[place]}"
        torch.testing.assert_close(tensor.cpu(), expected[place], rtol=rtol, atol=1e-12, msg=message)
