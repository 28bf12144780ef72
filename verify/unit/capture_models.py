"""Small models with one attention block each, and helpers, for the tests of capture."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lipbounds.capture import CapturedAttention, capture


DIM, HEADS, WIDTH = 8, 2, 4
TRIANGLE = torch.ones(6, 6, dtype=torch.bool).tril()
Change = Callable[..., Any]


@pytest.fixture(autouse=True)
def float64_and_seed() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(before)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def tokens(*shape: int) -> Tensor:
    return torch.randn(*shape or (3, 6), DIM)


def ramp(*shape: int) -> Tensor:
    return torch.linspace(-1, 1, torch.Size(shape).numel(), dtype=torch.float64).view(shape)


def run(model: nn.Module, *inputs: Any, **kwargs: Any) -> list[CapturedAttention]:
    with torch.no_grad():
        return capture(model.eval(), *inputs, **kwargs)


def check_whole(model: nn.Module, *inputs: Tensor, **kwargs: Any) -> CapturedAttention:
    """Capture a model that is one block; its output and its derivative by the moving input must be the block's."""
    (found,) = run(model, *inputs, **kwargs)
    block = found.attention
    which = 1 if kwargs.pop("cross_moves", "query") == "memory" else 0
    leaf = inputs[which].clone().requires_grad_()
    # What is the same tensor moves as one: self-attention in nn.MultiheadAttention, its keys and values.
    output = model(*(leaf if x is inputs[which] else x for x in inputs), **kwargs)
    output = output[0] if isinstance(output, tuple) else output
    cotangent = torch.randn_like(output)
    (gradient,) = torch.autograd.grad(output, leaf, cotangent)
    close(block.forward(), output.detach())
    close(block.vjp(cotangent), gradient)
    assert found.residual < 1e-14
    return found


class Fused(nn.Module):
    """Timm's block: one layer for queries, keys and values, whose features have the layout (3, heads, width)."""

    def __init__(self, layout: str = "3hd", change: Change | None = None, after: Change | None = None) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.layout, self.change, self.after = layout, change, after

    def forward(self, x: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
        sizes = {"3": 3, "h": HEADS, "d": WIDTH}
        split = self.qkv(x).unflatten(-1, [sizes[letter] for letter in self.layout])
        split = split.movedim([self.layout.index(letter) - 3 for letter in "3hd"], [-3, -2, -1])
        q, k, v = split.transpose(-4, -2).unbind(-3)
        if self.change is not None:
            q, k, v = self.change(q, k, v)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **options).transpose(-3, -2).flatten(-2)
        return self.proj(mixed if self.after is None else self.after(mixed))


class WrittenOut(nn.Module):
    """Bare parameters and an explicit softmax."""

    def __init__(
        self, change: Change = lambda s: s, after: Change = lambda p: p, product: Change = torch.matmul, dim: int = -1
    ) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(DIM, 3 * DIM)), nn.Parameter(torch.randn(3 * DIM))
        self.out, self.temperature = nn.Parameter(torch.randn(DIM, DIM)), nn.Parameter(torch.tensor(1.7))
        self.change, self.after, self.product, self.dim = change, after, product, dim

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (x @ self.weight + self.bias).unflatten(-1, (3, HEADS, WIDTH)).transpose(-4, -2).unbind(-3)
        scores = self.change(q @ k.mT / self.temperature * 0.6)
        mixed = self.product(self.after(scores.softmax(self.dim)), v)
        return mixed.transpose(-3, -2).flatten(-2) @ self.out


class Separate(nn.Module):
    """Three projections of what `inputs` makes of the tokens, grouped-query heads, causal."""

    def __init__(self, inputs: Change = lambda x: (x, x, x), repeat: Change | None = None, groups: int = 2) -> None:
        super().__init__()
        self.query, self.out = nn.Linear(DIM, DIM, bias=False), nn.Linear(DIM, 5)
        self.key, self.value = nn.Linear(DIM, groups * 2), nn.Linear(DIM, groups * 2)
        self.inputs, self.repeat = inputs, repeat

    def forward(self, *given: Tensor) -> Tensor:
        sources = zip((self.query, self.key, self.value), self.inputs(*given), strict=True)
        q, k, v = (layer(x).unflatten(-1, (-1, 2)).transpose(-3, -2) for layer, x in sources)
        grouped = self.repeat is None and q.shape[-3] != k.shape[-3]
        k, v = (k, v) if self.repeat is None else (self.repeat(k), self.repeat(v))
        return self.out(
            F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped).transpose(-3, -2).flatten(-2)
        )


class Convolution(nn.Module):
    """Attention over the places of an image; a window of one place makes a convolution a projection."""

    def __init__(self, window: int = 1) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Conv2d(DIM, 3 * DIM, window, padding="same"), nn.Conv2d(DIM, DIM, 1)

    def forward(self, image: Tensor) -> Tensor:
        # This view is valid for the strides of channels_last only.
        split = self.qkv(image).permute(0, 2, 3, 1).view(-1, 3, HEADS, WIDTH)
        q, k, v = split.unflatten(0, (len(image), -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).mT.reshape(image.shape))


class Changed(Fused):
    """A block that changes a tensor in place while it is still needed."""

    def __init__(self, tensor: str) -> None:
        super().__init__()
        self.tensor = tensor

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x)
        if self.tensor == "view of projection":
            qkv[..., 0].mul_(2)
        q, k, v = qkv.unflatten(-1, (3, HEADS, WIDTH)).transpose(-4, -2).unbind(-3)
        if self.tensor == "tokens":
            x += 1
        if self.tensor == "view of queries":
            q[..., 0].mul_(2)
        mixed = F.scaled_dot_product_attention(q, k, v)
        if self.tensor == "output":
            mixed += 1
        return self.proj(mixed.transpose(-3, -2).flatten(-2))


class Addmm(Fused):
    """The projection of transformers' Conv1D, with a factor that it does not have."""

    def forward(self, x: Tensor) -> Tensor:
        qkv = torch.addmm(self.qkv.bias, x.flatten(0, 1), self.qkv.weight.mT, beta=0.5)
        q, k, v = qkv.view(*x.shape[:2], 3, HEADS, WIDTH).transpose(-4, -2).unbind(-3)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(-3, -2).flatten(-2))


def multi_head(**options: Any) -> nn.Module:
    layer = nn.MultiheadAttention(DIM, HEADS, **{"batch_first": True, **options})
    for parameter in layer.parameters():  # biases start at zero, where a lost one would not be seen
        nn.init.normal_(parameter)
    return layer
