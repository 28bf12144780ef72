"""Networks in which attention has queries for the tokens that are read, alone: the same function, and its bounds."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lipbounds import Attention, InvalidInput
from lipbounds.certify import certify
from lipbounds.compose import network_bound, reading
from lipbounds.compose.joint import JointNetwork
from lipbounds.compose.reading import ReadResidual, of_queries_at, read_only
from lipbounds.compose.rewrite import flat, rewritten
from lipbounds.targets.layers import AttentionLayer, Flatten, Layer, Linear, Pool, Positions, Residual, Sequence
from verify.unit.blocks import random_block
from verify.unit.networks import Draw, attention, feed_forward, largest_norm, norm, transformer
from verify.unit.test_certify import attacked
from verify.unit.test_taylor_models import check_model


def rows_read(layers: list[tuple[str, Layer]]) -> list[list[int] | None]:
    """Of each attention layer, the tokens that have queries."""
    out: list[list[int] | None] = []
    for _, layer in layers:
        parts = [part for _, part in flat([("", layer.body)])] if isinstance(layer, Residual) else [layer]
        at = [part.block.queries_at for part in parts if isinstance(part, AttentionLayer)]
        out += [None if tokens is None else tokens.tolist() for tokens in at]
    return out


def turned(draw: Draw) -> dict[str, Any]:
    angles = draw(4, 1)
    rotation = torch.stack([angles.cos(), angles.sin()], -2)
    return {"query_rotation": rotation, "key_rotation": rotation}


MASK = torch.tensor([[0.0, 0.3, -1.0, 0.2]]).double()
FIELDS = {"plain": lambda d: {}, "causal": lambda d: {"causal": True}, "bias": lambda d: {"logit_bias": MASK}}
FIELDS |= {"rotary": turned}


@pytest.mark.parametrize("how", ["first", "last"])
@pytest.mark.parametrize("fields", FIELDS)
def test_it_is_the_same_function(fields: str, how: Any) -> None:
    draw = Draw(1)
    x = draw(2, 3, 4)
    parts: tuple[Layer, ...] = (
        Positions(draw(1, 4)),
        attention(draw, 4, 4),
        norm(draw, 4),
        Residual(attention(draw, 4, 4, scale=1.0, **FIELDS[fields](draw)), Linear(draw(4, 4))),
        norm(draw, 4),
        Residual(feed_forward(draw, 4, 5, "gelu")),
        Pool(how),
        Linear(draw(2, 4)),
    )
    network = Sequence(parts)
    layers = read_only(flat([("", network)]), x)
    assert rows_read(layers) == [None, [0 if how == "first" else 3]]
    for found in (layers, rewritten(layers)):
        got = Sequence(tuple(layer for _, layer in found))(x)
        torch.testing.assert_close(got, network(x), rtol=1e-12, atol=1e-13)
    assert any(layer.description.endswith(f"{how} token") for _, layer in layers if isinstance(layer, ReadResidual))


def test_what_is_read_by_all_stays_as_it_is() -> None:
    draw, x = Draw(2), Draw(3)(4, 4)
    mix = Residual(attention(draw, 4, 4))
    for end in ((Pool("mean"),), (Flatten(), Linear(draw(2, 16))), (attention(draw, 4, 4), Pool("mean"))):
        layers = flat([("", Sequence((mix, *end)))])
        assert read_only(layers, x) == layers


def test_tokens_without_a_mask_are_counted_where_attention_gets_them() -> None:
    """The block has an input of its own, of another length."""
    draw = Draw(4)
    network, x = Sequence((Linear(draw(4, 4)), attention(draw, 7, 4), Pool("last"))), draw(3, 4)
    layers = read_only(flat([("", network)]), x)
    assert rows_read(layers) == [[2]]
    torch.testing.assert_close(Sequence(tuple(layer for _, layer in layers))(x), network(x))


@pytest.mark.usefixtures("as_a_user_runs_it")  # a search: the other tests keep the shape checks
@pytest.mark.parametrize("at", [[2], [3, 0]])
def test_bounds_with_queries_of_some_tokens_are_above_ascent(at: list[int]) -> None:
    draw = Draw(5)
    block = of_queries_at(attention(draw, 4, 4, scale=1.0).block, torch.tensor(at))
    parts = (Linear(draw(4, 4)), norm(draw, 4), AttentionLayer(block), norm(draw, 4), Flatten())
    network, x = Sequence((*parts, Linear(draw(3, 4 * len(at))))), draw(4, 4)
    prepared = JointNetwork(network, x)
    for radius in (0.0, 1e-3, 0.05):
        reached = largest_norm(network.function(), x, radius, steps=4)
        assert reached <= float(prepared.bound(radius).norm) * (1 + 1e-9)
        assert reached <= float(network_bound(network, x, radius).value) * (1 + 1e-9)
    for radius in (0.01, 0.3):
        check_model(network, x, radius)


@pytest.mark.usefixtures("as_a_user_runs_it")
@pytest.mark.parametrize("pre_norm", [True, False])
def test_bounds_are_smaller_and_radii_larger(pre_norm: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = Draw(6)
    network = transformer(draw, 4, 4, pre_norm=pre_norm, centred=True, activation="gelu", how="first")
    x = draw(1, 4, 4)
    label = network(x).flatten().argmax()[None]

    def found() -> list[float]:
        bounds = [float(network_bound(network, x[0], radius).value) for radius in (0.0, 1e-3)]
        bounds.append(float(JointNetwork(network, x[0]).bound(1e-2).norm))
        radii = [float(certify(network, x, label, method=m, steps=3).radius) for m in ("joint", "product")]
        return [*bounds, *(-radius for radius in radii)]

    read = found()
    assert attacked(network, x[0], int(label), -read[3]) >= 0
    monkeypatch.setattr(reading, "read_only", lambda layers, x: layers)
    for less, more in zip(read, found(), strict=True):
        assert less < more


@pytest.mark.usefixtures("as_a_user_runs_it")
def test_a_bound_without_a_proof_for_some_queries_bounds_the_whole_block() -> None:
    draw = Draw(7)
    weights: dict[str, Any] = {name: draw(1, 4, 4, scale=0.3) for name in ("w_q", "w_k", "w_v", "w_o")}
    network = Sequence((AttentionLayer(Attention(x=draw(3, 4), **weights)), Pool("first")))
    x = draw(3, 4)
    bound = network_bound(network, x, 0.1, attention="hu2024.ball")
    assert largest_norm(network.function(), x, 0.1) <= float(bound.value)
    assert len(bound.layers) == 2


def test_malformed_networks_are_refused() -> None:
    draw = Draw(8)
    some = AttentionLayer(of_queries_at(attention(draw, 4, 4).block, torch.tensor([1])))
    with pytest.raises(InvalidInput, match="must get the 4 tokens of its block, got 3"):
        some(draw(3, 4))
    for use in (lambda n: n(draw(4, 4)), lambda n: network_bound(n, draw(4, 4)), lambda n: JointNetwork(n, draw(4, 4))):
        with pytest.raises(InvalidInput, match="body of a residual must keep the shape"):
            use(Residual(some))
    with pytest.raises(InvalidInput, match="got one with queries_at"):
        of_queries_at(random_block(1, queries_at=torch.tensor([1])), torch.tensor([0]))
