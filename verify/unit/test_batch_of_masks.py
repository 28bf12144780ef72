"""A batch that only a bias of the logits has: shapes inside of the bounds, and each item by itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lipbounds
from lipbounds.targets.attention import Attention
from lipbounds.testing.oracles import batch_item
from lipbounds.testing.recipes import Recipe, build


BOUNDS = [spec for spec in lipbounds.registry.select(target=Attention) if "mask" in spec.supports]
KINDS: dict[str, dict[str, Any]] = {"mask": {}, "rotary": {"rotary": "random"}, "qk_norm": {"norm": "near_ones"}}
CASES = [(spec, kind) for spec in BOUNDS for kind in KINDS if kind in spec.supports]


@pytest.mark.parametrize(("spec", "kind"), CASES, ids=lambda case: getattr(case, "name", case))
def test_a_batch_of_masks_alone_gives_the_items(spec: lipbounds.BoundSpec, kind: str) -> None:
    heads = 2 if "heads" in spec.supports else 1
    block = build(Recipe(seed=3, n=3, dim=3, heads=heads, head_dim=2, mask="relative", **KINDS[kind]))
    assert block.logit_bias is not None
    block = block.replace(logit_bias=torch.stack([block.logit_bias, 3 * block.logit_bias]))
    radius = (0.2,) if spec.needs_radius else ()
    found = spec(block, *radius).value
    assert found.shape == (2,)
    for i in range(2):
        alone = spec(batch_item(block, (i,)), *radius).value
        assert float(alone) == pytest.approx(float(found[i]), rel=1e-6 if spec.claim.kind == "proved" else 0.3)
