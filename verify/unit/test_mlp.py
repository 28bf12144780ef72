"""Product bounds of feed-forward networks against automatic differentiation and exact arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from lipbounds import InvalidInput, Unsupported, select
from lipbounds.estimators import seqlip as seqlip_file
from lipbounds.estimators.autolip import autolip, autolip_active, product_upper
from lipbounds.estimators.seqlip import seqlip, seqlip_greedy
from lipbounds.ops.activations import ACTIVATIONS
from lipbounds.targets.mlp import Mlp
from verify.unit.blocks import random_block


SAFE = 1 - 1e-12  # of a reference that is itself rounded to nearest


def network(seed: int, *sizes: int, activation: str = "relu", scale: float = 1.0, items: int = 3) -> Mlp:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return Mlp(
        x=draw(items, sizes[0]),
        weights=tuple(scale * draw(rows, cols) for cols, rows in pairwise(sizes)),
        biases=tuple(draw(rows) for rows in sizes[1:]),
        activation=activation,
    )


def norms(block: Mlp, points: torch.Tensor) -> torch.Tensor:
    """Norms of the Jacobian at the points, by automatic differentiation."""
    jacobians = torch.func.vmap(torch.func.jacrev(block.function()))(points)
    return torch.linalg.matrix_norm(jacobians, 2)


sizes = st.lists(st.integers(1, 6), min_size=2, max_size=5)


@hypothesis.settings(max_examples=12)
@hypothesis.given(
    seed=st.integers(0, 2**16), sizes=sizes, activation=st.sampled_from(sorted(ACTIVATIONS)),
    scale=st.sampled_from((1e-3, 0.3, 1.0, 20.0)),
)  # fmt: skip
def test_bounds_hold_at_many_points(seed: int, sizes: list[int], activation: str, scale: float) -> None:
    block = network(seed, *sizes, activation=activation, scale=scale)
    far = torch.randn(40, sizes[0], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    truth = norms(block, torch.cat([block.x, far, 10 * far, 0.1 * far]))
    product = autolip(block).value
    assert product.shape == block.batch_shape
    assert bool((truth * SAFE <= product[0]).all())
    if activation == "relu":
        refined = seqlip(block).value
        assert bool((truth * SAFE <= refined[0]).all())
        assert bool((refined <= product).all())
        assert float(seqlip_greedy(block).value[0]) <= float(refined[0]) * (1 + 1e-9)
        local = autolip_active(block).value
        assert bool((norms(block, block.x) * SAFE <= local).all())
        assert bool((local * SAFE <= product).all())


@pytest.mark.parametrize("sizes", [(5, 4), (3, 3, 3)])
def test_equal_to_the_truth_where_singular_vectors_line_up(sizes: tuple[int, ...]) -> None:
    block = network(1, *sizes, activation="identity")
    if len(sizes) == 3:  # V_2 = U_1: the product of the norms is the norm of the product
        block = block.replace(weights=(block.weights[0], block.weights[0].mT))
    truth = norms(block, block.x)
    torch.testing.assert_close(autolip(block).value, truth, rtol=1e-12, atol=0)
    assert bool((truth * SAFE <= autolip(block).value).all())


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_each_activation_counts_once_for_each_hidden_layer(activation: str) -> None:
    """One neuron with the weight 1, at the input where the slope is largest: the bound is the truth there."""
    one = torch.ones(1, 1, dtype=torch.float64)
    grid = torch.linspace(0, 3, 30_001, dtype=torch.float64).unsqueeze(-1)
    block = Mlp(x=grid, weights=(one, one), activation=activation)
    truth, bound = norms(block, block.x).max(), autolip(block).value[0]
    assert float(truth) * (1 - 1e-15) <= float(bound) <= float(truth) * (1 + 1e-6)
    deep = autolip(block.replace(weights=(one,) * 4)).value[0]
    assert float(deep) == pytest.approx(ACTIVATIONS[activation].lipschitz ** 3, rel=1e-12)


def test_seqlip_of_one_hidden_layer_is_the_largest_over_all_patterns() -> None:
    block = network(2, 4, 5, 3)
    first, second = block.weights
    patterns = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * 5)
    largest = torch.linalg.matrix_norm(second @ (patterns[:, :, None] * first), 2).max()
    assert float(seqlip(block).value[0]) == pytest.approx(float(largest), rel=1e-11)
    assert float(largest) * SAFE <= float(seqlip(block).value[0]) < 0.99 * float(autolip(block).value[0])


def test_greedy_seqlip_is_between_all_active_and_the_largest() -> None:
    for seed in range(5):
        block = network(seed, 4, 7, 6, 3)
        greedy = float(seqlip_greedy(block).value[0])
        pairs = seqlip_file._stages(seqlip_file._factors(block))
        all_active = float(product_upper([torch.linalg.matrix_norm(right @ left, 2) for right, left in pairs]))
        assert all_active * SAFE <= greedy <= float(seqlip(block).value[0])


def test_seqlip_pays_for_factors_that_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a decomposition off by a percent the bound must still hold: it trusts no library routine."""
    block = network(3, 4, 5, 5, 3)
    exact, decompose = seqlip(block).value, torch.linalg.svd

    def wrong(matrix: torch.Tensor, **options: Any) -> tuple[torch.Tensor, ...]:
        u, s, vh = decompose(matrix, **options)
        return 0.99 * u, s, vh

    monkeypatch.setattr(torch.linalg, "svd", wrong)
    assert bool((exact * SAFE <= seqlip(block).value).all())


def test_active_neurons_alone_count_at_the_input() -> None:
    """Of two parallel branches one is off: its weights, however large, are not seen."""
    block = Mlp(
        x=torch.tensor([1.0, 1.0], dtype=torch.float64),
        weights=(torch.diag(torch.tensor([2.0, -1e6], dtype=torch.float64)), torch.eye(2, dtype=torch.float64)),
    )
    assert float(autolip_active(block).value) == pytest.approx(2, rel=1e-12)
    assert float(autolip(block).value) == pytest.approx(1e6, rel=1e-12)


def test_a_neuron_at_its_kink_counts_as_active() -> None:
    """The exact input of the neuron is 2^-60 above 0, its computed one is below or 0."""
    weight = torch.tensor([[1.0, -1.0, 2.0**-60]], dtype=torch.float64)
    block = Mlp(x=torch.ones(3, dtype=torch.float64), weights=(weight, torch.ones(1, 1, dtype=torch.float64)))
    for order in ([0, 1, 2], [2, 0, 1], [0, 2, 1]):
        moved = block.replace(weights=(weight[:, order], block.weights[1]))
        assert float(autolip_active(moved).value) >= 2**0.5
    third = torch.tensor([[0.1, 0.2, -0.3]], dtype=torch.float64)
    inputs = sum(Fraction(w) for w in third[0].tolist())
    assert inputs != 0
    tiny = block.replace(weights=(third if inputs > 0 else -third, block.weights[1]))
    assert float(autolip_active(tiny).value) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_in_the_dtype_of_the_network_are_rounded_up(dtype: torch.dtype) -> None:
    block = network(4, 4, 5, 3).to(dtype)
    for spec in (autolip, autolip_active, seqlip):
        value = spec(block).value
        assert value.dtype == dtype
        assert bool((value.double() >= spec(block.double).value).all())


def test_autolip_has_the_gradient_of_the_norms() -> None:
    weights = tuple(weight.requires_grad_() for weight in network(5, 3, 4, 2).weights)
    torch.autograd.gradcheck(
        lambda *w: autolip(Mlp(x=torch.zeros(3, dtype=torch.float64), weights=w), grad=True).value, weights, atol=1e-6
    )


def test_a_product_below_the_range_of_floats_is_not_zero() -> None:
    tiny = torch.tensor([[1e-200]], dtype=torch.float64)
    huge, one = torch.tensor([[1e300]], dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    for spec in (autolip, autolip_active, seqlip):
        assert float(spec(Mlp(x=one, weights=(tiny, tiny))).value) > 0
        assert float(spec(Mlp(x=one, weights=(tiny, tiny, huge))).value) >= 1e-100
        assert float(spec(Mlp(x=one, weights=(tiny, 0 * tiny))).value) == 0


def test_specs_are_found_by_their_target() -> None:
    kinds = {spec.name: (spec.claim.kind, spec.claim.scope) for spec in select(target=Mlp)}
    expected = {
        "autolip": ("proved", "global"),
        "autolip_active": ("proved", "point"),
        "seqlip": ("proved", "global"),
        "seqlip_greedy": ("estimate", "global"),
    }
    assert expected.items() <= kinds.items()
    assert not expected.keys() & {spec.name for spec in select()}


GOOD = network(0, 3, 4, 2)
BAD: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "activation": (lambda: GOOD.replace(activation="sine"), InvalidInput, "activation='sine'"),
    "no layer": (lambda: GOOD.replace(weights=(), biases=None), InvalidInput, "at least one matrix"),
    "biases": (lambda: GOOD.replace(biases=GOOD.biases[:1]), InvalidInput, "got 1 for 2 weights"),  # type: ignore[index]
    "transposed": (lambda: GOOD.replace(weights=GOOD.weights[::-1]), InvalidInput, r"weights\[0\] must have the shape"),
    "bias shape": (lambda: GOOD.replace(biases=(None, torch.ones(3).double())), InvalidInput, r"biases\[1\]"),
    "dtype": (lambda: GOOD.replace(x=GOOD.x.float()), InvalidInput, "share dtype"),
    "integer": (lambda: GOOD.replace(x=torch.ones(3, dtype=torch.long)), InvalidInput, "torch.int64"),
    "infinite": (lambda: GOOD.replace(x=GOOD.x / 0), InvalidInput, "x must be finite"),
    "empty": (lambda: GOOD.replace(x=GOOD.x[:0]), InvalidInput, "x must not be empty"),
    "number": (lambda: GOOD.replace(x=torch.tensor(1.0).double()), InvalidInput, "at least one dimension"),
    "list": (lambda: GOOD.replace(x=[1.0]), InvalidInput, "got list"),
    "not relu": (lambda: seqlip(GOOD.replace(activation="tanh")), Unsupported, "got 'tanh'"),
    "greedy not relu": (lambda: seqlip_greedy(GOOD.replace(activation="tanh")), Unsupported, "got 'tanh'"),
    "active not relu": (lambda: autolip_active(GOOD.replace(activation="tanh")), Unsupported, "got 'tanh'"),
    "too wide": (lambda: seqlip(network(0, 3, 15, 2)), Unsupported, "at most 14 neurons in a hidden layer, got 15"),
    "attention": (lambda: autolip(random_block()), InvalidInput, "got Attention"),
}


@pytest.mark.usefixtures("as_a_user_runs_it")
@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name: str) -> None:
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()
