"""The joint bound: curvature of attention against second derivatives, the joint Jacobian against ascent in the ball."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lipbounds import Attention, InvalidInput, Unsupported
from lipbounds.compose import curvature as curvature_module
from lipbounds.compose import joint, network_bound
from lipbounds.compose.curvature import curvature
from lipbounds.compose.joint import JointNetwork
from lipbounds.compose.propagated_set import PropagatedSet, norm_over_tokens
from lipbounds.targets.layers import Layer, Linear, Patches, Pool, Residual, Sequence, layer_norm
from verify.unit.networks import Draw, attention, feed_forward, largest_norm, transformer


def block(seed: int, n: int = 3, dim: int = 4, scale: float = 1.0, **fields: Any) -> Attention:
    return attention(Draw(seed), n, dim, scale=scale, **fields).block


def second_derivative(target: Attention, x: torch.Tensor) -> float:
    """max |D2 Y[U, W]| by alternating over the three sides of the tensor: a lower bound on its norm."""
    size = x.numel()
    tensor = torch.func.jacrev(torch.func.jacrev(target.function()))(x).reshape(-1, size, size)
    best = 0.0
    draw = Draw(1)
    for _ in range(5):
        u, w = draw(size), draw(size)
        for _ in range(25):
            y = tensor @ w @ u
            u = torch.einsum("y,yuw,w->u", y, tensor, w)
            u = u / u.norm()
            y = tensor @ w @ u
            w = torch.einsum("y,yuw,u->w", y, tensor, u)
            w = w / w.norm()
        best = max(best, float((torch.einsum("yuw,u,w->y", tensor, u, w)).norm()))
    return best


@pytest.mark.usefixtures("as_a_user_runs_it")  # a search: the other tests keep the shape checks
@settings(max_examples=30)
@given(
    seed=st.integers(0, 10_000),
    n=st.integers(1, 4),
    dim=st.integers(1, 4),
    scale=st.sampled_from([0.3, 1.0, 2.0]),
    causal=st.booleans(),
    radius=st.sampled_from([0.0, 1e-3, 0.1, 0.5]),
)
def test_curvature_is_above_second_derivatives_in_the_ball(
    seed: int, n: int, dim: int, scale: float, causal: bool, radius: float
) -> None:
    target = block(seed, n, dim, scale, causal=causal)
    bound = float(curvature(target, radius))
    draw = Draw(seed)
    for share in (0.0, 0.5, 1.0):
        move = draw(n, dim)
        point = target.x + share * radius * move / move.norm()
        assert second_derivative(target, point) <= bound * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_the_jacobian_moves_less_than_curvature_allows(seed: int) -> None:
    target, radius = block(seed), 0.2
    centre = torch.func.jacrev(target.function())(target.x).reshape(12, 12)
    bound, draw = float(curvature(target, radius)) * radius, Draw(seed)
    for _ in range(10):
        move = draw(3, 4).requires_grad_()
        for _ in range(5):
            inside = radius * move / move.norm()
            there = torch.func.jacrev(target.function())(target.x + inside).reshape(12, 12)
            moved = torch.linalg.matrix_norm(there - centre, 2)
            assert float(moved.detach()) <= bound
            (slope,) = torch.autograd.grad(moved, move)
            move = (move + slope / slope.norm() * move.norm()).detach().requires_grad_()


def by_hand() -> Attention:
    """Two equal tokens, so that only 2 ||W_V|| nu is left: queries (1, 0), uniform rows, W_V = W_K = 1."""
    eye = torch.eye(2).double()[None]
    bias = torch.tensor([[1.0, 0.0]]).double()
    return Attention(x=torch.zeros(2, 2).double(), w_q=0 * eye, w_k=eye, w_v=eye, w_o=eye, b_q=bias, scale=1.0)


def test_curvature_by_hand() -> None:
    """(sum_i P_ij^2 (2 nu)^2)^1/2 = sqrt 2; the second derivative reaches a third of it."""
    bound = float(curvature(by_hand(), 0.0))
    assert bound == pytest.approx(2**0.5, rel=1e-9)
    assert bound / 3 <= second_derivative(by_hand(), by_hand().x) <= bound


def test_a_curvature_that_is_too_small_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curvature_module, "combine_heads", lambda block, heads: 0.3 * heads.sum(-1))
    assert second_derivative(by_hand(), by_hand().x) > float(curvature(by_hand(), 0.0))


@given(seed=st.integers(0, 10_000), n=st.integers(1, 5))
def test_norm_over_tokens_is_above_every_choice(seed: int, n: int) -> None:
    draw = Draw(seed)
    factors, tokens, whole = draw(n).abs(), draw(n).abs(), draw(1).abs().squeeze()
    bound = float(norm_over_tokens(factors, tokens, whole))
    for _ in range(30):
        t = draw(n).abs().minimum(tokens)
        t = t * min(1.0, float(whole / t.norm()))
        assert float((factors * t).norm()) <= bound * (1 + 1e-12)
    assert bound <= float((factors * tokens).norm()) * (1 + 1e-12)
    assert bound <= float(factors.max() * whole) * (1 + 1e-12)


def rows_in_ball(network: Layer, x: torch.Tensor, rows: torch.Tensor, radius: float) -> list[float]:
    """Largest gradient of each row found in the ball."""
    return [largest_norm(lambda x, row=row: row @ network(x).flatten(), x, radius, steps=4, starts=3) for row in rows]


@pytest.mark.usefixtures("as_a_user_runs_it")  # a search: the other tests keep the shape checks
@settings(max_examples=15)
@given(
    seed=st.integers(0, 10_000),
    n=st.integers(1, 3),
    dim=st.integers(2, 4),
    pre_norm=st.booleans(),
    centred=st.booleans(),
    activation=st.sampled_from(["gelu", "relu", "tanh"]),
    how=st.sampled_from(["mean", "first", "last"]),
    depth=st.integers(1, 2),
    radius=st.sampled_from([0.0, 1e-4, 1e-2, 0.3]),
)
def test_random_transformers_are_bounded(
    seed: int, n: int, dim: int, pre_norm: bool, centred: bool, activation: str, how: Any, depth: int, radius: float
) -> None:
    draw = Draw(seed)
    network = transformer(draw, n, dim, pre_norm=pre_norm, centred=centred, activation=activation, how=how, depth=depth)
    x, rows = draw(n, dim), torch.stack([draw(2), torch.tensor([1.0, -1.0]).double()])
    found = JointNetwork(network, x).bound(radius, rows)
    reached = largest_norm(network.function(), x, radius, steps=3, starts=2)
    assert reached <= float(found.norm) * (1 + 1e-9) + 1e-12
    for bound, truth in zip(found.rows.tolist(), rows_in_ball(network, x, rows, radius), strict=True):
        assert truth <= bound * (1 + 1e-9) + 1e-12


def small(seed: int = 3, pre_norm: bool = True) -> tuple[Sequence, torch.Tensor]:
    draw = Draw(seed)
    return transformer(draw, 3, 4, pre_norm=pre_norm, centred=True, activation="gelu", how="mean"), draw(3, 4)


@pytest.mark.parametrize("pre_norm", [True, False])
def test_at_radius_zero_it_is_the_truth_and_grows_from_there(pre_norm: bool) -> None:
    network, x = small(pre_norm=pre_norm)
    prepared = JointNetwork(network, x)
    truth = largest_norm(network.function(), x, 0.0)
    radii = (0.0, 1e-9, 1e-6, 1e-4, 1e-2, 1.0)
    values = [float(prepared.bound(radius).norm) for radius in radii]
    assert truth <= values[0] <= truth * (1 + 1e-7)
    assert values == sorted(values)
    assert values[1] <= truth * 1.01
    assert values[2] < float(network_bound(network, x, 1e-6).value)


def test_images_and_the_largest_radius() -> None:
    draw = Draw(2)
    network = Sequence((Patches((2, 2), (2, 2)), Linear(draw(4, 4)), Residual(attention(draw, 4, 4)), Pool("first")))
    x = draw(1, 4, 4)
    prepared = JointNetwork(network, x)
    for radius in (0.0, 0.01):
        found = prepared.bound(radius)
        assert largest_norm(network.function(), x, radius) <= float(found.norm) * (1 + 1e-9)
        assert len(found.radii) == 3  # the pool is part of attention
    assert not math.isnan(float(prepared.bound(1e6).norm))


# -- planted faults ---------------------------------------------------------------------------------------------------


def moving_norm(draw: Draw) -> tuple[Layer, torch.Tensor, float]:
    return Sequence((layer_norm(epsilon=1e-4), Linear(draw(2, 3)))), 0.5 * draw(1, 3), 0.3


def turning_attention(draw: Draw) -> tuple[Layer, torch.Tensor, float]:
    return Sequence((Residual(attention(draw, 3, 3, 1, scale=1.5)), Pool("mean"))), 0.3 * draw(3, 3), 0.5


def chain(draw: Draw) -> tuple[Layer, torch.Tensor, float]:
    return Sequence((Linear(8 * torch.eye(2).double()), feed_forward(draw, 2, 4, "tanh"))), 0.5 * draw(1, 2), 0.3


def patch(module: Any, name: str, make: Callable[[Any], Any]) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda monkeypatch: monkeypatch.setattr(module, name, make(getattr(module, name)))


def shrunk(share: float) -> Callable[[Any], Any]:
    return lambda right: lambda *args, **options: share * right(*args, **options)


def small_reach(x: torch.Tensor, radius: torch.Tensor, tokens: torch.Tensor | None) -> PropagatedSet:
    return PropagatedSet(x, 0 * radius + 0.01, None if tokens is None else 0 * tokens + 0.01)


FAULTS: dict[str, tuple[Callable[[Draw], Any], Callable[[pytest.MonkeyPatch], None]]] = {
    "attention does not turn": (turning_attention, patch(joint.JointNetwork, "_turn", shrunk(0.0))),
    "the change of a layer is not added": (
        moving_norm,
        patch(joint.JointNetwork, "_change", lambda f: lambda *args: tuple(0 * part for part in f(*args))),
    ),
    "the reach stays small": (chain, patch(joint, "PropagatedSet", lambda f: small_reach)),
    "the spread is too small": (moving_norm, patch(joint, "norm_over_tokens", shrunk(0.1))),
}


@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, plant = FAULTS[name]
    network, x, radius = make(Draw(4))
    truth = largest_norm(network.function(), x, radius, steps=12, starts=8)
    assert truth <= float(JointNetwork(network, x).bound(radius).norm)
    plant(monkeypatch)
    assert truth > float(JointNetwork(network, x).bound(radius).norm) * (1 + 1e-6)


BAD: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "batch": (lambda: JointNetwork(*_with_batch()), InvalidInput, "without batch"),
    "radius": (lambda: JointNetwork(*small()).bound(-1.0), InvalidInput, "radius=-1"),
    "point bound": (lambda: JointNetwork(*small(), attention="covariance.exact"), InvalidInput, "covariance.exact"),
    "too large": (
        lambda: JointNetwork(Linear(torch.ones(2, 5000).double()), torch.ones(1, 5000).double()),
        Unsupported,
        "4096",
    ),
}


def _with_batch() -> tuple[Sequence, torch.Tensor]:
    network, x = small()
    return network, x[None]


@pytest.mark.usefixtures("as_a_user_runs_it")
@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name: str) -> None:
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()
