"""Rows of attention maps that are never stored: the same numbers as with the map, and bounds that are above them."""

from __future__ import annotations

import itertools
from typing import Any

import mpmath
import pytest
import torch

import lipbounds
from lipbounds.errors import InvalidInput, UnsupportedAttention
from lipbounds.kernels import streaming
from lipbounds.kernels.streaming import streaming_g1, streaming_map_norm, streaming_theorem_3
from lipbounds.ops.softmax import g_upper_from_logits
from lipbounds.targets.attention import Attention


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


QUERIES, KEYS = draw(2, 7, 3), draw(2, 7, 3, seed=1)
HIDDEN = torch.ones(7, 7).triu(1) > 0
BIAS = draw(7, 7, seed=2).masked_fill(HIDDEN, -torch.inf)
CASES: dict[str, tuple[dict[str, Any], torch.Tensor]] = {
    "plain": ({}, torch.zeros(7, 7).double()),
    "causal": ({"causal": True}, torch.zeros(7, 7).double().masked_fill(HIDDEN, -torch.inf)),
    "bias": ({"logit_bias": BIAS}, BIAS),
}


@pytest.mark.parametrize("scale", [0.5, -3.0, 300.0])
@pytest.mark.parametrize("chunk", [1, 3, 100, None])
@pytest.mark.parametrize("case", CASES)
def test_rows_are_those_of_the_map(case: str, chunk: int | None, scale: float) -> None:
    options, bias = CASES[case]
    rows = streaming_g1(QUERIES, KEYS, scale, chunk=chunk, **options)
    logits = scale * QUERIES @ KEYS.mT + bias
    top = logits.topk(2).values
    close = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(rows.largest, top[..., 0], **close)
    torch.testing.assert_close(rows.second, top[..., 1], **close)
    torch.testing.assert_close(rows.log_total, logits.logsumexp(-1), **close)
    tail = logits.scatter(-1, logits.argmax(-1, keepdim=True), -torch.inf).logsumexp(-1) - logits.logsumexp(-1)
    torch.testing.assert_close(rows.log_tail, tail, **close)
    expected = g_upper_from_logits(logits)
    assert (rows.g_1 >= expected * (1 - 1e-13)).all()
    assert (rows.g_1 <= expected * (1 + 1e-9)).all()


@pytest.mark.parametrize("scale", [0.5, 40.0])
def test_g_1_is_above_that_of_the_exact_logits(scale: float) -> None:
    rows = streaming_g1(QUERIES, KEYS, scale)
    with mpmath.workdps(60):
        for i in range(7):
            logits = [mpmath.mpf(scale) * mpmath.fdot(QUERIES[1, i].tolist(), key) for key in KEYS[1].tolist()]
            largest = max(logits)
            weights = sorted((mpmath.exp(logit - largest) for logit in logits), reverse=True)
            exact = weights[0] * (sum(weights[1:]) + weights[1]) / sum(weights) ** 2
            assert exact <= mpmath.mpf(rows.g_1[1, i].item()) <= exact * (1 + mpmath.mpf(10) ** -9)


@pytest.mark.parametrize("scale", [0.5, 3.0, 300.0])
@pytest.mark.parametrize("case", CASES)
def test_the_norm_of_the_map_is_bounded_at_every_pass_and_approached(case: str, scale: float) -> None:
    options, bias = CASES[case]
    maps = (scale * QUERIES @ KEYS.mT + bias).softmax(-1)
    truth = torch.linalg.matrix_norm(maps, 2)
    values = [streaming_map_norm(QUERIES, KEYS, scale, passes=passes, chunk=3, **options) for passes in (1, 2, 5, 60)]
    torch.testing.assert_close(values[0], maps.sum(-2).amax(-1).sqrt(), rtol=1e-9, atol=0)
    for before, after in itertools.pairwise(values):
        assert (after <= before).all()
    assert (values[-1] >= truth * (1 - 1e-13)).all()
    if scale < 1:
        torch.testing.assert_close(values[-1], truth, rtol=1e-6, atol=0)


def blocks() -> dict[str, Attention]:
    size = (2, 6, 3)
    given = {name: draw(*size, seed=at) for at, name in enumerate(("w_q", "w_k", "w_v"), 3)}
    given |= {name: draw(2, 3, seed=at) for at, name in enumerate(("b_q", "b_k", "b_v"), 6)}
    given["w_o"] = draw(2, 3, 6, seed=9)
    x = draw(9, 6, seed=10)
    memory = {"memory": draw(5, 6, seed=11)}
    return {
        "self": Attention(x=x, **given),
        "causal": Attention(x=x, causal=True, **given),
        "float32": Attention(x=x, **given).to(torch.float32),
        "batch": Attention(x=draw(3, 9, 6, seed=12), **given),
        "query": Attention(x=x, moves="query", **memory, **given),
        "memory": Attention(x=x, moves="memory", **memory, **given),
    }


@pytest.mark.parametrize("name", blocks())
def test_theorem_3_is_that_of_the_stored_map(name: str) -> None:
    block = blocks()[name]
    stored = lipbounds.get("yudin2025.biased")(block, precision="float64").value
    first, later = (streaming_theorem_3(block, passes=passes, chunk=4) for passes in (1, 200))
    assert first.shape == stored.shape
    assert (first >= later).all()
    assert (later >= stored * (1 - 1e-6)).all()
    torch.testing.assert_close(later, stored, rtol=1e-3, atol=0)
    assert (later >= lipbounds.get("exact")(block).value).all()


def test_no_map_is_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "ENTRIES", 64)
    seen: list[int] = []
    plain = streaming.g_upper_from_logits

    def watched(logits: torch.Tensor) -> torch.Tensor:
        seen.append(logits.numel())
        return plain(logits)

    monkeypatch.setattr(streaming, "g_upper_from_logits", watched)
    streaming_g1(draw(40, 3), draw(16, 3), 1.0)
    assert max(seen) == 64


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((QUERIES, KEYS[..., :2], 1.0), {}, "one width"),
        ((QUERIES, KEYS[:, :4], 1.0), {"causal": True}, "as many queries as keys"),
        ((QUERIES, KEYS, 1.0), {"logit_bias": BIAS[:, :1]}, "logit_bias must end in"),
        ((QUERIES, KEYS, 1.0), {"chunk": 0}, "chunk must be at least 1"),
        ((QUERIES, KEYS, 1.0), {"passes": 0}, "passes must be at least 1"),
    ],
)
def test_bad_arguments(arguments: tuple[Any, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        streaming_map_norm(*arguments, **options)


def test_rotary_positions_are_refused() -> None:
    angles = draw(9, 1, seed=13)
    turns = torch.stack([angles.cos(), angles.sin()], -2)
    with pytest.raises(UnsupportedAttention, match="rotary"):
        streaming_theorem_3(blocks()["self"].replace(query_rotation=turns, key_rotation=turns))
