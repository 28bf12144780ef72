"""How hard the blocks of a search are: numbers with known values, nothing cached on the block, part of the report."""

from __future__ import annotations

import math

import pytest
import torch

import lipbounds
from lipbounds.testing import session
from lipbounds.testing.difficulty import Seen, difficulty_of
from lipbounds.testing.known import A, V, known
from verify.unit.blocks import random_block


def test_blocks_with_known_numbers() -> None:
    peak = 1 / (1 + math.exp(-2 * A)) / 4  # of two values, in rows of 8 keys
    expected = {"two values": (peak, 0.0, A), "equal tokens": (1 / 9, 1.0, A), "hidden keys": (1.0, 1 / 9, 0.0)}
    for family, numbers in expected.items():
        tokens = 8 + (family in ("equal tokens", "hidden keys"))
        found = difficulty_of(known(family, tokens).block)
        assert found.tolist() == [pytest.approx(numbers, rel=1e-9)], family
    assert V > 0


def test_every_item_of_a_batch_counts_in_any_size_and_nothing_is_cached() -> None:
    block = random_block(0)
    many = block.replace(x=torch.stack([block.x, 1e100 * block.x, 0 * block.x]))
    before = set(vars(many))
    found = difficulty_of(many)
    assert found.shape == (3, 3)
    assert bool(found.isfinite().all())
    assert set(vars(many)) == before
    torch.testing.assert_close(found[:1], difficulty_of(block))


def test_quantiles_over_what_was_seen() -> None:
    seen = Seen()
    assert seen.summary() is None
    for scale in range(11):
        seen(known("no logits", 4).block.replace(w_q=torch.full((1, 1, 1), float(scale)).double()))
    summary = seen.summary()
    assert summary is not None
    assert (summary.blocks, summary.logit_weights) == (11, pytest.approx((1.0, 5.0, 9.0)))


def test_a_verdict_says_how_hard_its_blocks_were(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "checks_for", lambda spec: ("returns", "value"))
    report = session.verify(lipbounds.get("lanczos"), seconds=0.0)
    difficulty = report.difficulty
    assert difficulty is not None
    assert difficulty.blocks >= 20
    assert 0 < difficulty.largest_weight[0] <= difficulty.largest_weight[2] <= 1
    assert set(report.to_dict()["difficulty"]) == {"blocks", "largest_weight", "key_offset", "logit_weights"}
