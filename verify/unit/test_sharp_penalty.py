"""The sharp bound as a penalty: near the bound, with its gradient, and an unbiased draw of layers and inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lipbounds
from lipbounds import InvalidInput, Unsupported
from lipbounds.sharp_penalty import SharpPenalty, sharp_estimate
from verify.unit.blocks import random_block


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Layer(nn.Module):
    def __init__(self, dim: int = 12, heads: int = 3) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.mha(x, x, x, need_weights=False)[0])


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layers = nn.Sequential(*(Layer() for _ in range(3)))

    def forward(self, x: Tensor) -> Tensor:
        layers: Any = self.layers
        for layer in layers:
            x = x + layer(x)
        return x


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"x": draw(2, 7, 6)}, {"x": 6 * draw(7, 6)}])
def test_the_estimate_and_its_gradient_are_near_the_bound(options: dict[str, Any]) -> None:
    block = random_block(**{"x": draw(7, 6), **options})
    x = block.x.clone().requires_grad_()
    block = block.replace(x=x)
    found, bound = sharp_estimate(block), lipbounds.get("sharp_cheap")(block, grad=True).value
    assert bool((found <= bound * (1 + 1e-6)).all())
    assert bool((found >= 0.75 * bound).all())
    ours, theirs = (torch.autograd.grad(value.sum(), x, retain_graph=True)[0].flatten() for value in (found, bound))
    assert torch.cosine_similarity(ours, theirs, dim=0) > 0.9
    assert 0.6 < ours.norm() / theirs.norm() < 1.6


def test_the_gradient_of_the_estimate_is_finite_where_rows_are_one_hot_or_weights_vanish() -> None:
    for tokens in (300 * draw(7, 6), torch.zeros(7, 6).double(), torch.ones(7, 6).double()):
        block = random_block(x=tokens)
        x = block.x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(sharp_estimate(block.replace(x=x)).sum(), x)
        assert bool(gradient.isfinite().all())


def test_all_layers_give_the_mean_and_one_that_of_its_own() -> None:
    model, x = Model().eval(), draw(4, 5, 12).float()
    with SharpPenalty(model.layers, layers=3) as reg:
        model(x)
        everything = reg.penalty()
    estimates = [sharp_estimate(found.attention) for found in lipbounds.capture(model, x)]
    assert torch.allclose(everything, torch.stack(estimates).mean(), rtol=1e-4)
    seen = set()
    generator = torch.Generator().manual_seed(0)
    for _ in range(12):
        with SharpPenalty(model.layers, generator=generator) as reg:
            model(x)
            (index,) = reg.drawn
            assert torch.allclose(reg.penalty(), estimates[index].mean(), rtol=1e-4)
            seen.add(index)
    assert seen == {0, 1, 2}


def test_inputs_are_drawn_evenly() -> None:
    model, x = Model().eval(), draw(4, 5, 12).float()
    each = sharp_estimate(lipbounds.capture(model, x)[0].attention)
    generator, seen = torch.Generator().manual_seed(0), set()
    for _ in range(24):
        with SharpPenalty([model.layers[0]], inputs=1, generator=generator) as reg:
            model(x)
            off = (each - reg.penalty()).abs() / each
        assert off.min() < 1e-4
        seen.add(int(off.argmin()))
    assert seen == {0, 1, 2, 3}


class Masked(nn.Module):
    """Attention with a mask; the tokens may come before the batch."""

    def __init__(self, *, batch_first: bool) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.mha = nn.MultiheadAttention(12, 3, batch_first=batch_first)

    def forward(self, x: Tensor, mask: Tensor | None = None, **nested: Any) -> Tensor:
        mask = nested["options"]["mask"][0] if nested else mask
        return self.mha(x, x, x, attn_mask=mask, need_weights=False)[0]


CAUSAL = torch.full((4, 4), -torch.inf).triu(1)
CALLS: dict[str, tuple[bool, Tensor | None, bool, int]] = {  # batch first; mask; whether it is nested; inputs
    "mask of as many tokens as inputs": (True, CAUSAL, False, 1),
    "nested": (True, CAUSAL, True, 1),
    "mask of heads and inputs": (True, torch.stack([CAUSAL * (k % 2) for k in range(1, 13)]).nan_to_num(0.0), False, 1),
    "tokens first": (False, None, False, 1),
    "tokens first, as many inputs": (False, None, False, 2),
}


@pytest.mark.parametrize("name", CALLS, ids=lambda name: name.replace(" ", "-"))
def test_inputs_are_drawn_wherever_their_axis_is(name: str) -> None:
    """Rows of a mask of 4 x 4 entries are no inputs, although there are 4 of these; nor are tokens that come first."""
    batch_first, mask, nested, count = CALLS[name]
    layer = Masked(batch_first=batch_first).eval()
    x = draw(4, 4, 12).float() if batch_first else draw(5, 3, 12).float()
    given: dict[str, Any] = {"options": {"mask": [mask]}} if nested else {"mask": mask}
    each = sharp_estimate(lipbounds.capture(layer, x, **given)[0].attention)
    assert len(each) == (4 if batch_first else 3)
    generator, seen = torch.Generator().manual_seed(0), set()
    for _ in range(12):
        with SharpPenalty([layer], inputs=count, generator=generator) as reg:
            layer(x, **given)
            found = reg.penalty()
        means = torch.stack([some.mean() for some in torch.combinations(each, count)])
        assert ((means - found).abs() / found).min() < 1e-4
        seen.add(int((means - found).abs().argmin()))
    assert len(seen) > 1


def test_a_step_of_training_reaches_the_weights_before_and_leaves_the_model_in_training() -> None:
    model, x = Model().train(), draw(4, 5, 12).float()
    with SharpPenalty([model.layers[2]]) as reg:
        model(x)
        reg.penalty().backward()
    weights = [value for name, value in model.named_parameters() if name.endswith("in_proj_weight")]
    assert all(weight.grad is not None and weight.grad.norm() > 0 for weight in weights)
    assert all(module.training for module in model.modules())
    assert not model.layers[2]._forward_pre_hooks


def test_the_penalty_is_that_of_the_last_forward_pass() -> None:
    model, one, other = Model().eval(), draw(2, 5, 12).float(), draw(2, 5, 12, seed=1).float()
    with SharpPenalty(model.layers, layers=3) as reg:
        model(one)
        reg.penalty()
        model(other)
        second = reg.penalty()
    estimates = [sharp_estimate(found.attention) for found in lipbounds.capture(model, other)]
    assert torch.allclose(second, torch.stack(estimates).mean(), rtol=1e-4)


def test_what_cannot_be_drawn_or_taken_is_said() -> None:
    model = Model()
    with pytest.raises(InvalidInput, match="layers must be from 1 to"):
        SharpPenalty(model.layers, layers=4)
    with pytest.raises(InvalidInput, match="inputs must be at least 1"):
        SharpPenalty(model.layers, inputs=0)
    with SharpPenalty(model.layers) as reg, pytest.raises(InvalidInput, match="must run inside"):
        reg.penalty()
    with pytest.raises(Unsupported, match="self-attention"):
        sharp_estimate(random_block(memory=draw(3, 6), moves="query"))
    with pytest.raises(Unsupported, match="float32 or float64"):
        sharp_estimate(random_block().to(torch.bfloat16))
