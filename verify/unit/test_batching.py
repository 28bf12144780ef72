"""Many blocks at once get the numbers they get one by one."""

from __future__ import annotations

import pytest
import torch

import lipbounds
from lipbounds.batching import bound_all
from lipbounds.errors import UnsupportedAttention
from verify.unit.blocks import random_block


BLOCKS = [
    random_block(1),
    random_block(2, n=3),
    random_block(3),
    random_block(4).replace(scale=0.3),
    random_block(5).at(torch.stack([random_block(6).x, random_block(7).x])),
    random_block(8),
    random_block(9, biases=False),
]
ODD = [
    # As many masks as there are heads: a batch must not be taken for heads.
    *(random_block(seed).replace(logit_bias=3 * random_block(seed + 2, dim=4).x) for seed in (10, 11)),
    *(random_block(seed, queries_at=torch.tensor(at)) for seed, at in ((14, [0]), (15, [2]), (16, [2]))),
]


@pytest.mark.parametrize("name", ["yudin2025.biased", "sharp_cheap", "sharp", "yudin2025_ball.biased", "lanczos"])
def test_numbers_are_those_of_the_blocks_alone(name: str) -> None:
    spec = lipbounds.get(name)
    radius = 0.1 if spec.needs_radius else None
    blocks = BLOCKS + ODD
    for block, found in zip(blocks, bound_all(spec, blocks, radius), strict=True):
        alone = spec(block, radius)
        torch.testing.assert_close(found.value, alone.value, rtol=1e-12, atol=0)
        assert (found.claim, found.radius, found.terms.keys()) == (alone.claim, alone.radius, alone.terms.keys())
        for part in ("terms", "details"):
            for key, term in getattr(alone, part).items():
                torch.testing.assert_close(getattr(found, part)[key], term, rtol=1e-6, atol=1e-9, check_stride=False)


def test_blocks_of_one_shape_are_evaluated_together(monkeypatch: pytest.MonkeyPatch) -> None:
    spec, seen = lipbounds.get("sharp_cheap"), []
    original = type(spec).__call__

    def counted(self: object, block: lipbounds.Attention, *args: object, **options: object) -> object:
        seen.append(tuple(block.batch_shape))
        return original(self, block, *args, **options)

    monkeypatch.setattr(type(spec), "__call__", counted)
    bound_all(spec, BLOCKS)
    assert sorted(seen) == [(), (), (), (2,), (3,)]
    seen.clear()
    monkeypatch.setattr("lipbounds.batching.ENTRIES", 2 * 2 * 16)
    bound_all(spec, BLOCKS)
    assert sorted(seen) == [(), (), (), (), (2,), (2,)]
    seen.clear()
    monkeypatch.setattr("lipbounds.batching.SMALL_WEIGHTS", 0)
    bound_all(spec, BLOCKS)
    assert sorted(seen) == [(), (), (), (), (), (), (2,)]


def test_a_block_that_is_not_supported_is_refused() -> None:
    with pytest.raises(UnsupportedAttention, match="biases"):
        bound_all(lipbounds.get("yudin2025.theorem3"), BLOCKS)
