"""Far from 1: a bound is above the truth, or refuses."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch

import lipbounds
from lipbounds import registry
from lipbounds.errors import InvalidInput
from lipbounds.targets.attention import Attention


SHAPES = {"x": (4, 3), "w_q": (2, 3, 2), "w_k": (2, 3, 2), "w_v": (2, 3, 2), "w_o": (2, 2, 3)}
BOUNDS = [
    spec.name
    for spec in registry.standing()
    if spec.target is Attention and spec.role == "bound" and spec.claim.norm == "l2" and spec.claim.scope != "compact"
]
EXPONENTS = (-199, -150, -100, -10, 0, 10, 100, 150, 197)


def draw(seed: int) -> dict[str, Any]:
    """Tensors with entries of ordinary size."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in SHAPES.items()}


def scaled(tensors: dict[str, Any], **exponents: int) -> Attention:
    """Each tensor, of largest entry between 1/2 and 1, times a power of two."""
    return Attention(**{name: tensor * 2.0 ** exponents.get(name, 0) for name, tensor in tensors.items()})


def unit(tensors: dict[str, Any]) -> dict[str, Any]:
    return {name: tensor * 2.0 ** -math.frexp(float(tensor.abs().max()))[1] for name, tensor in tensors.items()}


def log_truth(tensors: dict[str, Any], exponents: dict[str, int]) -> float:
    """log2 of the norm of the Jacobian, from a block that computes the same function with entries of ordinary size.

    Logits depend on the product of x, w_q, w_k and x alone, the output in addition on that of x, w_v and w_o; and the
    Jacobian is per unit of x. All factors are powers of two, so nothing is rounded.
    """
    logits = 2 * exponents["x"] + exponents["w_q"] + exponents["w_k"]
    block = scaled(tensors, w_q=logits // 2, w_k=logits - logits // 2)
    norm = float(lipbounds.get("exact")(block).value)
    return math.log2(norm) + exponents["w_v"] + exponents["w_o"]


@pytest.mark.usefixtures("as_a_user_runs_it")  # a search: the contract checks the shapes of these bounds
@pytest.mark.parametrize("name", BOUNDS)
def test_a_bound_of_numbers_far_from_one_is_above_the_truth(name: str) -> None:
    spec, random_ = registry.get(name), random.Random(0)
    tried = 0
    for seed in range(30):
        tensors = unit(draw(seed))
        exponents = {field: random_.choice(EXPONENTS) for field in SHAPES}
        # Logits above a few thousand have one key a row: the truth itself is then lost in their rounding.
        exponents["w_k"] -= max(0, 2 * exponents["x"] + exponents["w_q"] + exponents["w_k"] - 6)
        truth = log_truth(tensors, exponents) if exponents["w_k"] >= -199 else -math.inf
        if not -1000 < truth < 1000:
            continue
        block = scaled(tensors, **exponents)
        if spec.missing_features(block):
            continue
        radius = 2.0 ** max(-1000, exponents["x"] - 40)
        value = float(spec(block, **({"radius": radius} if spec.needs_radius else {})).value)
        tried += 1
        # A bound of the change from the centre is none of the derivative there; both tend to it with the radius.
        assert math.log2(value) >= truth - 1e-9, exponents
    assert tried >= 10


@pytest.mark.parametrize("field", SHAPES)
@pytest.mark.parametrize("exponent", [-202, 202])
def test_what_is_farther_is_refused_by_every_bound(field: str, exponent: int) -> None:
    block = scaled(unit(draw(0)), **{field: exponent})
    for name in BOUNDS:
        spec = registry.get(name)
        if not spec.missing_features(block):
            with pytest.raises(
                InvalidInput, match=rf"{field} must be 0 or have a largest entry between .* for {name}, got"
            ):
                spec(block, **({"radius": 0.1} if spec.needs_radius else {}))


def test_one_item_of_a_batch_is_enough_and_zeros_are_no_trouble() -> None:
    tensors = unit(draw(1))
    sharp = lipbounds.get("sharp")
    sizes = torch.tensor([1.0, 0.0, 2.0**-300], dtype=torch.float64).view(3, 1, 1, 1)
    weights = {name: tensors[name].expand(3, *tensors[name].shape) for name in ("w_q", "w_k", "w_o")}
    block = Attention(x=tensors["x"], w_v=tensors["w_v"] * sizes, **weights)
    first = block.replace(**{name: getattr(block, name)[:2] for name in ("w_q", "w_k", "w_v", "w_o")})
    assert float(sharp(first).value[1]) == 0.0
    with pytest.raises(InvalidInput, match="w_v must be 0 or have"):
        sharp(block)


def test_scale_and_biases() -> None:
    tensors = unit(draw(2))
    bias = torch.full((2, 2), 1e-300, dtype=torch.float64)
    assert float(lipbounds.get("sharp")(Attention(**tensors, b_q=bias, b_k=bias, b_v=bias)).value) > 0
    with pytest.raises(InvalidInput, match="b_v must be 0 or have"):
        lipbounds.get("sharp")(Attention(**tensors, b_v=1e300 * bias * 1e300))
    with pytest.raises(InvalidInput, match="scale must be 0 or between"):
        lipbounds.get("sharp")(Attention(**tensors, scale=1e-100))
    ones = torch.ones(2, 2, dtype=torch.float64)
    normed = Attention(**tensors, query_norm_weight=ones, key_norm_weight=ones, norm_eps=1e-6, norm_over="head")
    assert float(lipbounds.get("centred.products")(normed).value) > 0
    with pytest.raises(InvalidInput, match="norm_eps must be 0 or between"):
        lipbounds.get("centred.products")(normed.replace(norm_eps=1e-100))
    with pytest.raises(InvalidInput, match="key_norm_weight must be 0 or have"):
        lipbounds.get("centred.products")(normed.replace(key_norm_weight=1e-100 * ones))


def test_tokens_at_which_sharp_was_below_the_truth() -> None:
    """At 2^-280 the square of the square of a covariance is zero; found by scaling exactly."""
    tensors = unit(draw(3))
    for name in ("sharp", "sharp_fast", "covariance.exact"):
        with pytest.raises(InvalidInput, match="x must be 0 or have a largest entry"):
            lipbounds.get(name)(scaled(tensors, x=-280, w_q=280, w_k=280))
