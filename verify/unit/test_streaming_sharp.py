"""`sharp_cheap` without the map: above the truth, near the bound of the stored map, whatever the chunk is."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lipbounds
from lipbounds import Attention
from lipbounds.derivatives.first.covariance import centred_keys
from lipbounds.derivatives.first.head_rows import GramMatrices, through
from lipbounds.derivatives.first.overlap_parts import OverlapParts
from lipbounds.kernels import streaming
from lipbounds.kernels.streaming import streaming_theorem_3
from lipbounds.kernels.streaming_sharp import StreamedCovariances, streaming_sharp_cheap
from lipbounds.testing import build, oracles
from verify.device.blocks import ROTARY, draw
from verify.unit.blocks import random_block, true_norm


MEMORY = random_block(3, n=5).x
BIAS = draw(4, 4).masked_fill(torch.eye(4).roll(1, 0) > 0, -torch.inf)
BLOCKS: dict[str, Attention] = {
    "self": random_block(11),
    "causal": random_block(11, causal=True),
    "causal with bias": random_block(11, causal=True).replace(logit_bias=draw(4, 4)),
    "bias": random_block(11).replace(logit_bias=BIAS),
    "one head": random_block(11, heads=1, biases=False),
    "one token": random_block(11, n=1),
    "query": random_block(11, memory=MEMORY, moves="query"),
    "memory": random_block(11, memory=MEMORY, moves="memory"),
    "batch": random_block(11, x=draw(2, 4, 6)),
    "some queries": random_block(11, queries_at=torch.tensor([0, 2])),
    "rotary and QK-norm": build(ROTARY),
}


@pytest.mark.parametrize("gain", [0.01, 3.0])
@pytest.mark.parametrize("name", BLOCKS)
def test_above_the_truth_and_near_the_bound_of_the_stored_map(name: str, gain: float) -> None:
    block = BLOCKS[name]
    block = block.replace(w_q=gain * block.w_q)
    stored = lipbounds.get("sharp_cheap")(block).value
    value = streaming_sharp_cheap(block, chunk=3)
    assert value.shape == stored.shape
    assert (value >= oracles.jacobian_norm(block) * (1 - 1e-12)).all()
    assert (value <= stored * 1.6).all()
    torch.testing.assert_close(streaming_sharp_cheap(block), value, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", BLOCKS)
def test_covariances_are_those_of_the_stored_map(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "ENTRIES", 40)  # few keys at a time
    block = BLOCKS[name]
    parts = OverlapParts(block)
    centred = centred_keys(block)
    keys = through(centred.rows, centred.error, block.weight_norms.factors("w_q"))
    assert isinstance(parts.grams, GramMatrices)
    found = StreamedCovariances(block, parts.grams.values, 2)
    close: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(found.cross(keys), parts.grams.cross(keys), **close)
    torch.testing.assert_close(found.largest_variance(), parts.grams.largest_variance(), **close)
    vector = torch.nn.functional.normalize(torch.ones_like(block.source_input[..., 0]), dim=-1)
    torch.testing.assert_close(found.image(vector), parts.grams.image(vector), rtol=1e-12, atol=1e-14)
    dense = torch.diag_embed(block.probabilities)
    dense = dense - block.probabilities.unsqueeze(-1) * block.probabilities.unsqueeze(-2)
    cross = found.values.rows.mT.unsqueeze(-3) @ dense @ keys.rows.unsqueeze(-3)
    assert (found.cross(keys) >= torch.linalg.matrix_norm(cross)).all()
    torch.testing.assert_close(found.cross(keys), torch.linalg.matrix_norm(cross), rtol=1e-9, atol=1e-9)
    own = found.values.rows.mT.unsqueeze(-3) @ dense @ found.values.rows.unsqueeze(-3)
    assert (found.largest_variance() >= torch.linalg.matrix_norm(own, 2) * (1 - 1e-13)).all()


def test_close_where_attention_is_spread_out() -> None:
    block = random_block(5, n=40)
    block = block.replace(w_q=0.01 * block.w_q)
    stored = lipbounds.get("sharp_cheap")(block).value
    assert true_norm(block) <= streaming_sharp_cheap(block) <= 1.05 * stored


@pytest.mark.parametrize("name", ["self", "causal", "memory"])
def test_neither_map_nor_mask_is_made(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def made(block: Attention) -> None:
        raise AssertionError("n x m numbers were made")

    expected = [bound(BLOCKS[name]) for bound in (streaming_sharp_cheap, streaming_theorem_3)]
    for array in ("mask", "logits", "probabilities"):
        monkeypatch.setattr(Attention, array, property(made))
    assert [bound(BLOCKS[name].replace()) for bound in (streaming_sharp_cheap, streaming_theorem_3)] == expected


def test_a_long_memory_takes_memory_in_proportion() -> None:
    """At 50 000 keys the Gram matrices of `sharp_cheap` would take 20 GB for each head."""
    block = random_block(2, x=draw(50_000, 6), queries_at=torch.tensor([0, 7, 40_000]))
    value = streaming_sharp_cheap(block)
    assert 0 < value <= streaming_theorem_3(block)
