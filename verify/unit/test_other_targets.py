"""Attention types other than `Attention`: forward passes against loops written out, and what construction refuses."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lipbounds import InvalidInput
from lipbounds.targets._tensor_target import TensorTarget
from lipbounds.targets.cosine_attention import CosineAttention
from lipbounds.targets.l2_attention import L2Attention
from lipbounds.targets.lipschitz_norm_attention import LipschitzNormAttention
from lipbounds.testing.target_checks import item


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def l2_block(*batch: int) -> L2Attention:
    return L2Attention(
        x=draw(*batch, 4, 3), w_q=draw(2, 3, 2, seed=1), w_v=draw(2, 3, 5, seed=2), w_o=draw(2, 5, 2, seed=3)
    )


def cosine_block(*batch: int) -> CosineAttention:
    weights = {"w_q": draw(3, 2, seed=1), "w_k": draw(3, 2, seed=2), "w_v": draw(3, 5, seed=3)}
    return CosineAttention(x=draw(*batch, 4, 3), **weights, scale=3.0, output_scale=0.5, eps=0.1)


def norm_block(*batch: int) -> LipschitzNormAttention:
    return LipschitzNormAttention(
        queries=draw(*batch, 2, 3), keys=draw(*batch, 4, 3, seed=1), values=draw(*batch, 4, 5, seed=2)
    )


BLOCKS: list[Callable[..., TensorTarget]] = [l2_block, cosine_block, norm_block]
each_class = pytest.mark.parametrize("make", BLOCKS)


def softmax(logits: list[float]) -> list[float]:
    weights = [math.exp(logit - max(logits)) for logit in logits]
    return [weight / sum(weights) for weight in weights]


def attend(logits: list[float], values: list[Tensor]) -> Tensor:
    return torch.stack([p * v for p, v in zip(softmax(logits), values, strict=True)]).sum(0)


def test_l2_attention_is_its_loop() -> None:
    block = l2_block()
    expected = torch.zeros(4, 2, dtype=torch.float64)
    for h in range(2):
        w = block.w_q[h]
        a = w @ w.T / math.sqrt(2)
        for i in range(4):
            logits = [-float((block.x[i] @ w - block.x[j] @ w).square().sum()) / math.sqrt(2) for j in range(4)]
            expected[i] += attend(logits, [block.x[j] @ a @ block.w_v[h] @ block.w_o[h] for j in range(4)])
    assert torch.allclose(block.forward(), expected, rtol=1e-12, atol=1e-12)


def test_cosine_attention_is_its_loop() -> None:
    block = cosine_block()

    def normalised(row: Tensor) -> Tensor:
        return row / math.sqrt(float(row.square().sum()) + 0.1)

    queries, keys, values = (
        [normalised(row) for row in block.x @ weights] for weights in (block.w_q, block.w_k, block.w_v)
    )
    rows = [0.5 * attend([3.0 * float(q @ k) for k in keys], values) for q in queries]
    assert torch.allclose(block.forward(), torch.stack(rows), rtol=1e-12, atol=1e-12)


def test_lipschitz_norm_attention_is_its_loop() -> None:
    block = norm_block()
    u = math.sqrt(float(block.queries.square().sum()))
    v, w = (max(math.sqrt(float(row.square().sum())) for row in rows) for rows in (block.keys, block.values))
    largest = max(u * v, u * w, v * w)
    rows = [attend([float(q @ k) / largest for k in block.keys], list(block.values)) for q in block.queries]
    assert torch.allclose(block.forward(), torch.stack(rows), rtol=1e-12, atol=1e-12)


@each_class
def test_a_batch_is_its_items(make: Callable[..., TensorTarget]) -> None:
    block = make(2, 3)
    assert block.batch_shape == (2, 3)
    for index in ((0, 0), (1, 2)):
        assert torch.allclose(item(block, index).forward(), block.forward()[index], rtol=1e-12, atol=1e-14)


@each_class
def test_at_double_and_to(make: Callable[..., TensorTarget]) -> None:
    block = make()
    moved = block.at(2 * block.moving_input)
    assert torch.equal(moved.moving_input, 2 * block.moving_input)
    assert block.double is block
    short = block.to(torch.bfloat16)
    assert short.dtype == torch.bfloat16
    assert short.double.dtype == torch.float64
    assert torch.equal(short.double.moving_input, block.moving_input.bfloat16().double())


def test_only_heads_are_a_feature() -> None:
    assert l2_block().features == {"heads"}
    single = l2_block().replace(w_q=draw(1, 3, 2), w_v=draw(1, 3, 5), w_o=draw(1, 5, 2))
    assert (single.features, cosine_block().features, norm_block().features) == (frozenset(),) * 3


MISTAKES = {
    "not a tensor": (l2_block, {"w_q": [[1.0]]}, "w_q must be a torch tensor, got list"),
    "not floating": (cosine_block, {"w_k": torch.ones(3, 2, dtype=torch.long)}, "w_k must have one of the dtypes"),
    "too few dimensions": (l2_block, {"w_q": draw(3, 2)}, r"w_q must have at least 3 dimensions.*\(3, 2\)"),
    "empty": (l2_block, {"x": draw(0, 3)}, r"x must have at least 2 dimensions.*not empty"),
    "another dtype": (norm_block, {"keys": draw(4, 3).float()}, "share one dtype"),
    "a shape": (l2_block, {"w_o": draw(2, 4, 2)}, r"w_o must end in the shape \(2, 5, 2\)"),
    "another shape": (cosine_block, {"x": draw(4, 2)}, r"x must end in the shape \(4, 3\)"),
    "a third shape": (norm_block, {"values": draw(3, 5)}, r"values must end in the shape \(4, 5\)"),
    "batches": (norm_block, {"keys": draw(2, 4, 3), "values": draw(3, 4, 5)}, "must broadcast"),
    "not finite": (l2_block, {"x": draw(4, 3) / 0}, "x must be finite, got 12 of 12"),
    "eps": (cosine_block, {"eps": 0.0}, r"eps must be positive and finite, got eps=0.0"),
    "scale": (cosine_block, {"scale": math.inf}, "scale must be positive and finite"),
    "output scale": (cosine_block, {"output_scale": -1.0}, "output_scale must be positive and finite"),
    "two zeros": (
        norm_block,
        {"keys": torch.zeros(4, 3).double(), "values": torch.zeros(4, 5).double()},
        "at most one",
    ),
}


@pytest.mark.parametrize(("make", "changes", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_named(
    make: Callable[..., TensorTarget], changes: dict[str, object], message: str, as_a_user_runs_it: None
) -> None:
    with pytest.raises(InvalidInput, match=message):
        make().replace(**changes)


def test_one_of_the_three_may_be_zero() -> None:
    block = norm_block().replace(queries=torch.zeros(2, 3).double())
    assert torch.allclose(block.forward(), block.values.mean(0).expand(2, 5))
    jacobian = torch.func.jacrev(block.function())(block.moving_input)
    assert jacobian.isfinite().all()
