"""Capture of a batch costs a few forward passes, whatever the size of the batch: counted, not timed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from lipbounds.capture import capture


transformers = pytest.importorskip("transformers")

ALLOWED = 4  # forward passes
BATCHES = (1, 4)


class EntriesWritten(TorchDispatchMode):
    """Counts the entries of all tensors that operators make, views left out: the traffic beside the products."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            outputs = result if isinstance(result, tuple | list) else [result]
            self.total += sum(one.numel() for one in outputs if isinstance(one, Tensor))
        return result


def flops(run: Callable[[], object]) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def entries(run: Callable[[], object]) -> int:
    with torch.no_grad(), EntriesWritten() as counter:
        run()
    return counter.total


@pytest.fixture(scope="module")
def vit() -> nn.Module:
    """Proportions of ViT-B/16, a quarter as wide: 197 tokens, 3 heads of 64 features."""
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=192, num_attention_heads=3, intermediate_size=768, num_hidden_layers=3, attn_implementation="sdpa"
    )
    return transformers.ViTModel(config, add_pooling_layer=False).eval()


def cost_in_forward_passes(model: nn.Module, batch: int, count: Callable[[Callable[[], object]], int]) -> float:
    images = torch.randn(batch, 3, 224, 224)
    return count(lambda: capture(model, images)) / count(lambda: model(images))


def test_capture_takes_the_flops_of_a_few_forward_passes(vit: nn.Module) -> None:
    for batch in BATCHES:
        assert 1 <= cost_in_forward_passes(vit, batch, flops) <= ALLOWED


@pytest.mark.parametrize("count", [flops, entries])
def test_cost_of_capture_is_linear_in_the_batch(vit: nn.Module, count: Callable[[Callable[[], object]], int]) -> None:
    one, four = (cost_in_forward_passes(vit, batch, count) for batch in BATCHES)
    assert four <= 1.01 * one
