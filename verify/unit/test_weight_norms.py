"""Norms of weights are kept from block to block, are those of new ones, and never those of weights since changed."""

from __future__ import annotations

import pytest
import torch

import lipbounds
from lipbounds.errors import InvalidInput
from lipbounds.ops import nonnegative
from lipbounds.ops.nonnegative import nonnegative_norm_upper
from lipbounds.ops.spectral import Factor, product_norm_upper
from lipbounds.targets import weight_norms
from lipbounds.targets.attention import Attention
from lipbounds.targets.weight_norms import WeightNorms, keep_weight_norms


BOUNDS = ("yudin2025.biased", "centred.products", "centred.weights", "sharp_fast")


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def weights(seed: int = 0, heads: int = 2, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    found = {name: draw(heads, 8, 4, seed=seed + at, dtype=dtype) for at, name in enumerate(("w_q", "w_k", "w_v"))}
    found |= {name: draw(heads, 4, seed=seed + at, dtype=dtype) for at, name in enumerate(("b_q", "b_k", "b_v"), 3)}
    return found | {"w_o": draw(heads, 4, 8, seed=seed + 9, dtype=dtype)}


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[WeightNorms]:
    """The norms that are made."""
    found: list[WeightNorms] = []
    plain = WeightNorms.__init__

    def counted(self: WeightNorms, given: dict[str, torch.Tensor]) -> None:
        found.append(self)
        plain(self, given)

    monkeypatch.setattr(weight_norms.WeightNorms, "__init__", counted)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", BOUNDS)
def test_kept_norms_change_no_bit(name: str, dtype: torch.dtype, made: list[WeightNorms]) -> None:
    spec, given = lipbounds.get(name), weights(dtype=dtype)
    inputs = [draw(5, 8, seed=seed, dtype=dtype) for seed in (20, 21)]
    alone = [spec(Attention(x=x, **given)).value for x in inputs]
    made.clear()
    with keep_weight_norms():
        kept = [spec(Attention(x=x, **{key: value.clone() for key, value in given.items()})).value for x in inputs]
    assert len(made) == 1
    assert all(torch.equal(a, b) for a, b in zip(alone, kept, strict=True))


def test_layers_are_told_apart_and_the_oldest_is_forgotten(made: list[WeightNorms]) -> None:
    spec, x = lipbounds.get("yudin2025.biased"), draw(5, 8, seed=20)
    layers = [weights(seed) for seed in (0, 100, 200)]
    # The same in all entries but one, and in those that are compared first.
    layers.append({**layers[0], "w_o": layers[0]["w_o"].clone()})
    layers[-1]["w_o"][-1, -1, -1] *= 50
    truth = [spec(Attention(x=x, **layer)).value for layer in layers]
    made.clear()
    with keep_weight_norms():
        for _ in range(2):
            assert all(
                torch.equal(spec(Attention(x=x, **layer)).value, value)
                for layer, value in zip(layers, truth, strict=True)
            )
    assert len(made) == len(layers)
    made.clear()
    with keep_weight_norms(blocks=1):
        for _ in range(2):
            for layer in layers:
                spec(Attention(x=x, **layer))
    assert len(made) == 2 * len(layers)


def by_optimiser(weight: torch.Tensor) -> None:
    weight.requires_grad_()
    weight.grad = -torch.ones_like(weight)
    torch.optim.SGD([weight], lr=3.0).step()
    weight.requires_grad_(False)


def through_data(weight: torch.Tensor) -> None:
    weight.data.mul_(7)


def through_numpy(weight: torch.Tensor) -> None:
    weight.numpy()[:] *= 7  # torch counts no change here


@pytest.mark.parametrize("change", [by_optimiser, through_data, through_numpy])
@pytest.mark.parametrize("name", ["w_q", "w_v", "w_o", "b_k"])
def test_weights_changed_in_place_get_new_norms(name: str, change: object) -> None:
    spec, given, x = lipbounds.get("yudin2025.biased"), weights(), draw(5, 8, seed=20)
    with keep_weight_norms():
        before = spec(Attention(x=x, **given)).value
        change(given[name])  # pyright: ignore[reportCallIssue]
        after = spec(Attention(x=x, **given)).value
    assert torch.equal(after, spec(Attention(x=x, **given)).value)
    assert after != before


@pytest.mark.parametrize("name", BOUNDS)
def test_gradients_of_weights_are_those_without(name: str) -> None:
    spec, x = lipbounds.get(name), draw(5, 8, seed=20)

    def gradients() -> list[torch.Tensor]:
        given = {key: value.requires_grad_() for key, value in weights().items()}
        if name == "centred.products":  # a common row of keys and values drops out
            given = {key: value for key, value in given.items() if key not in ("b_k", "b_v")}
        spec(Attention(x=x, **given), grad=True).value.backward()
        return [value.grad for value in given.values() if value.grad is not None]

    plain = gradients()
    with keep_weight_norms():
        with torch.no_grad():
            spec(Attention(x=x, **weights()))
        kept = gradients()
    assert len(plain) == len(kept) >= 4
    assert all(torch.equal(a, b) for a, b in zip(plain, kept, strict=True))


def test_gradients_of_the_input_reach_through_kept_norms() -> None:
    spec = lipbounds.get("yudin2025.biased")
    found = []
    for _ in range(2):
        with keep_weight_norms(), torch.inference_mode():
            spec(Attention(x=draw(5, 8, seed=20), **weights()))
        with keep_weight_norms():
            x = draw(5, 8, seed=20).requires_grad_()
            spec(Attention(x=x, **weights()), grad=True).value.backward()
            found.append(x.grad)
    assert torch.equal(found[0], found[1])
    assert found[0].abs().sum() > 0


def test_at_least_one_block_is_kept() -> None:
    with pytest.raises(InvalidInput, match="blocks must be at least 1"), keep_weight_norms(blocks=0):
        pass


@pytest.mark.parametrize("scale", [1.0, 1e-170])
def test_products_at_hand_give_the_same_norm(scale: float) -> None:
    """With 1e-170 the product underflows, and is made again from scaled factors."""
    x, w, v = (scale * draw(*shape, seed=at, dtype=torch.float64) for at, shape in enumerate(((6, 9), (9, 3), (3, 9))))
    plain = product_norm_upper(x, w, v)
    torch.testing.assert_close(
        product_norm_upper(x, Factor(w), Factor(v), before_last=x @ w), plain, rtol=1e-12, atol=0
    )
    torch.testing.assert_close(product_norm_upper(x, w, whole=x @ w), product_norm_upper(x, w), rtol=1e-12, atol=0)
    assert plain > 0 or scale < 1


MAPS = {
    "random": draw(3, 7, 5, dtype=torch.float64).softmax(-1),
    "one-hot": (800 * draw(2, 6, 6, dtype=torch.float64)).softmax(-1),
    "blocks": torch.block_diag(torch.ones(3, 3).double() / 4, torch.ones(2, 2).double() / 2),
    "no gap": torch.block_diag(torch.ones(3, 3), 1.001 * torch.ones(3, 3)).double() / 3.1,
    "causal": draw(6, 6, dtype=torch.float64).masked_fill(torch.ones(6, 6).triu(1) > 0, -torch.inf).softmax(-1),
    "zero column": torch.tensor([[0.0, 1.0], [0.0, 1.0]]).double(),
    "zero": torch.zeros(2, 3).double(),
}


@pytest.mark.parametrize("name", MAPS)
def test_norm_of_a_non_negative_matrix(name: str) -> None:
    value, truth = nonnegative_norm_upper(MAPS[name]), torch.linalg.matrix_norm(MAPS[name], 2)
    assert (value >= truth * (1 - 1e-14)).all()
    assert (value <= truth * (1 + 3e-11) + 1e-300).all()


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_every_step_of_the_power_method_is_an_upper_bound(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nonnegative, "STEPS", steps)
    for matrix in MAPS.values():
        _, upper, _ = nonnegative._power(matrix)
        assert (upper >= torch.linalg.matrix_norm(matrix, 2) * (1 - 1e-14)).all()


def test_gradient_of_the_norm_of_a_map() -> None:
    mixed = torch.stack(
        [draw(5, 5, seed=1, dtype=torch.float64).softmax(-1), draw(5, 5, dtype=torch.float64).softmax(-1)]
    )
    assert nonnegative._power(mixed)[2].tolist() == [True, True]
    tied = torch.stack([MAPS["no gap"], draw(6, 6, dtype=torch.float64).softmax(-1)])
    assert nonnegative._power(tied)[2].tolist() == [False, True]
    for matrix in (MAPS["random"], tied):
        assert torch.autograd.gradcheck(nonnegative_norm_upper, matrix.clone().requires_grad_(), atol=1e-6)
