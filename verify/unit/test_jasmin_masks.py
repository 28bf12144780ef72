"""JaSMin where rows see nothing, masks are no plain tensors, torch.func differentiates, or a layer is not known."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

from lipbounds.capture import capture
from lipbounds.errors import Unsupported
from lipbounds.jasmin import JaSMin, Reduction, jasmin
from lipbounds.ops.log_g import scores


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("k", [0, 1, 3, 10])
@pytest.mark.parametrize("over_rows", ["max", "mean"])
def test_rows_that_see_no_key_do_not_count(k: int, over_rows: Reduction) -> None:
    table = draw(2, 3, 5, 5)
    hidden = table.clone()
    hidden[:, :, 1] = -torch.inf
    hidden.requires_grad_()
    found = jasmin(hidden, k=k, over_rows=over_rows)
    seen = table[:, :, [0, 2, 3, 4]]
    torch.testing.assert_close(found, jasmin(seen, k=k, over_rows=over_rows))
    found.backward()
    assert hidden.grad is not None
    assert bool(hidden.grad.isfinite().all())
    assert bool((scores(hidden.detach().clone(), k)[..., 1] == (-torch.inf if k == 0 else 0.0)).all())


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_left_padded_batches_can_be_trained_on(kind: str) -> None:
    torch.manual_seed(0)
    small = {"vocab_size": 60, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = {
        "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=16, n_positions=32, **small)),
        "llama": lambda: transformers.LlamaForCausalLM(
            transformers.LlamaConfig(hidden_size=16, intermediate_size=16, **small)
        ),
    }[kind]()
    ids = torch.randint(5, 50, (2, 8))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    with JaSMin(model.train()) as reg:
        (model(input_ids=ids, attention_mask=mask, labels=ids).loss + 0.01 * reg.penalty()).backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


class Attends(nn.Module):
    """One layer of attention; `how` computes it from queries, keys and values."""

    def __init__(self, how: Callable[[Tensor, Tensor, Tensor], Tensor], queries: int = 6) -> None:
        super().__init__()
        self.how, self.queries = how, queries
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        sides = (part(x).unflatten(-1, (2, 4)).transpose(1, 2) for part in (self.k, self.v))
        query = self.q(x[:, : self.queries]).unflatten(-1, (2, 4)).transpose(1, 2)
        return self.o(self.how(query, *sides).transpose(1, 2).flatten(2))


def fused(mask: object) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # type: ignore[arg-type]


@pytest.mark.parametrize("queries", [6, 4])
@pytest.mark.parametrize("variant", ["upper left", "lower right"])
def test_causal_biases_are_the_masks_that_they_stand_for(variant: str, queries: int) -> None:
    torch.manual_seed(0)
    made, offset = (causal_upper_left, 0) if variant == "upper left" else (causal_lower_right, 6 - queries)
    x = draw(2, 6, 8)
    subclass, plain = made(queries, 6), torch.ones(queries, 6, dtype=torch.bool).tril(offset)
    model = Attends(fused(subclass), queries)
    torch.testing.assert_close(model(x), _with(model, plain)(x))
    found = []
    for mask in (subclass, plain):
        with JaSMin(_with(model, mask)) as reg:
            reg.model(x)
            found.append(reg.penalty())
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
    if queries == 6:
        blocks = [capture(_with(model, mask).eval(), x)[0].attention for mask in (subclass, plain)]
        torch.testing.assert_close(blocks[0].logits, blocks[1].logits, rtol=0, atol=0)


def _with(model: Attends, mask: Tensor) -> Attends:
    model.how = fused(mask)
    return model


class Other(torch.Tensor):
    """A tensor of a kind that nobody knows."""


def test_masks_of_another_kind_are_refused() -> None:
    mask = torch.zeros(6, 6).as_subclass(Other)
    with (
        JaSMin(Attends(fused(mask))) as reg,
        pytest.raises(Unsupported, match=r"mask must be a plain tensor.*got Other"),
    ):
        reg.model(draw(1, 6, 8))


@pytest.mark.parametrize("k", [0, 3])
def test_torch_func_gives_the_gradients_of_backward(k: int) -> None:
    logits = draw(4, 2, 5, 5).double()
    by_hand = logits.clone().requires_grad_()
    jasmin(by_hand, k=k).backward()
    torch.testing.assert_close(torch.func.grad(lambda z: jasmin(z, k=k))(logits), by_hand.grad)
    rows = torch.func.vmap(torch.func.grad(lambda z: jasmin(z, k=k)))(logits[:, None])
    torch.testing.assert_close(rows[:, 0] / len(logits), by_hand.grad)

    torch.manual_seed(0)
    model, x = Attends(fused(None)), draw(2, 6, 8)

    def penalty(parameters: dict[str, Tensor]) -> Tensor:
        with JaSMin(model, k=k) as reg:
            torch.func.functional_call(model, parameters, (x,))
            return reg.penalty()

    found = torch.func.grad(penalty)({name: p.detach() for name, p in model.named_parameters()})
    with JaSMin(model, k=k) as reg:
        model(x)
        reg.penalty().backward()
    for name, parameter in model.named_parameters():
        wanted = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(found[name], wanted)


def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (0.5 * q @ k.mT).exp()
    return weights / weights.sum(-1, keepdim=True) @ v


def softmax_of_one_more(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (0.5 * q @ k.mT).exp()
    return (weights @ v) / (1 + weights.sum(-1, keepdim=True))


def gated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (0.9 * (0.5 * q @ k.mT).softmax(-1)) @ v


def with_sink(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = 0.5 * q @ k.mT
    return torch.cat([scores, torch.ones_like(scores[..., :1])], -1).softmax(-1)[..., :-1] @ v


def by_einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhnm,bhmd->bhnd", (0.5 * q @ k.mT).softmax(-1), v)


@pytest.mark.parametrize("how", [by_hand, softmax_of_one_more, gated, with_sink, by_einsum])
def test_layers_that_are_not_known_are_reported(how: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    x = draw(2, 6, 8)
    with JaSMin(nn.Sequential(Attends(fused(None)), Attends(how))) as reg:
        reg.model(x)
        with pytest.raises(Unsupported, match="got 1 layer that count and 1 product with a map"):
            reg.penalty()
    with JaSMin(nn.Sequential(Attends(fused(None)), Attends(how)), layers=[0]) as reg:
        reg.model(x)
        assert bool(reg.penalty().isfinite())
    with JaSMin(Attends(how)) as reg:
        reg.model(x)
        with pytest.raises(Unsupported, match="got 0 layers that count and 1 product"):
            reg.penalty()


class Experts(nn.Module):
    """A softmax and an exp that are no maps: they weigh experts and scale features."""

    def __init__(self) -> None:
        super().__init__()
        self.attend, self.route, self.weight = Attends(fused(None)), nn.Linear(8, 8), nn.Parameter(draw(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.attend(x)
        x = (self.route(x).softmax(-1) * x) @ self.weight
        return F.linear(x * self.route(x).exp(), self.weight) + (x.exp() * 2) @ self.weight


def test_other_softmaxes_and_exponentials_are_left_alone() -> None:
    torch.manual_seed(0)
    model, x = Experts(), draw(2, 6, 8)
    with JaSMin(model) as reg:
        model(x)
        found = reg.penalty()
    with JaSMin(model.attend) as reg:
        model.attend(x)
        torch.testing.assert_close(found, reg.penalty())
