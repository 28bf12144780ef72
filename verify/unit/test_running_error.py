"""Rounding of the forward pass: its bounds cover the truth in many digits, and certificates keep what they leave."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import mpmath
import pytest
import torch
from torch import Tensor

from lipbounds import InvalidInput
from lipbounds.certify import certify
from lipbounds.compose import containers, joint
from lipbounds.compose.constant import proved_constant
from lipbounds.compose.folding import folding_change
from lipbounds.compose.joint import JointNetwork
from lipbounds.compose.network import network_bound
from lipbounds.compose.rewrite import FoldedAttention, flat, rewritten
from lipbounds.compose.running_error import lost_by
from lipbounds.targets.attention import Attention
from lipbounds.targets.layers import (
    AttentionLayer,
    Flatten,
    Layer,
    Linear,
    Normalization,
    Pointwise,
    Pool,
    Positions,
    Residual,
    Sequence,
)
from verify.unit.networks import Draw, attention, feed_forward, largest_norm, norm, transformer


DIGITS = 60
Rows = list[list[Any]]


# -- the truth in many digits -----------------------------------------------------------------------------------------


def many(values: Tensor) -> Rows:
    return [[mpmath.mpf(entry) for entry in row] for row in values.tolist()]


def linear(x: Rows, weight: Tensor, bias: Tensor | None) -> Rows:
    """x W^T + b."""
    weights, offset = many(weight), [0.0] * len(weight) if bias is None else bias.tolist()
    return [[mpmath.fdot(row, w) + mpmath.mpf(b) for w, b in zip(weights, offset, strict=True)] for row in x]


def normalised(x: Rows, epsilon: float, centred: bool) -> Rows:
    out = []
    for row in x:
        mean = mpmath.fsum(row) / len(row) if centred else mpmath.mpf(0)
        v = [entry - mean for entry in row]
        sigma = mpmath.sqrt(mpmath.fdot(v, v) / len(v) + mpmath.mpf(epsilon))
        out.append([entry / sigma for entry in v])
    return out


ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    "gelu": lambda x: x * mpmath.erfc(-x / mpmath.sqrt(2)) / 2,
    "silu": lambda x: x / (1 + mpmath.exp(-x)),
    "tanh": mpmath.tanh,
    "relu": lambda x: max(x, mpmath.mpf(0)),
    "gelu_tanh": lambda x: x / 2 * (1 + mpmath.tanh(mpmath.sqrt(2 / mpmath.pi) * (x + mpmath.mpf(0.044715) * x**3))),
}


def turned(x: Rows, rotation: Tensor | None) -> Rows:
    if rotation is None:
        return x
    pairs, out = rotation.shape[-1], []
    for row, (cosines, sines) in zip(x, rotation.tolist(), strict=True):
        new = list(row)
        for e in range(pairs):
            c, s = mpmath.mpf(cosines[e]), mpmath.mpf(sines[e])
            new[e] = c * row[e] - s * row[e + pairs]
            new[e + pairs] = c * row[e + pairs] + s * row[e]
        out.append(new)
    return out


def scaled(x: Rows, weight: Tensor) -> Rows:
    return [[a * mpmath.mpf(w) for a, w in zip(row, weight.tolist(), strict=True)] for row in x]


def heads_of(x: Rows, block: Attention, which: str) -> list[Rows]:
    """Projected, normalised and turned."""
    weights, bias = getattr(block, f"w_{which}"), getattr(block, f"b_{which}")
    found = [linear(x, w.mT, None if bias is None else bias[h]) for h, w in enumerate(weights)]
    side = {"q": "query", "k": "key"}.get(which)
    weight = None if side is None else getattr(block, f"{side}_norm_weight")
    if weight is not None and block.norm_over == "head":
        found = [
            scaled(normalised(head, block.norm_eps or 0.0, False), w) for head, w in zip(found, weight, strict=True)
        ]
    elif weight is not None:
        width = weights.shape[-1]
        together = [[entry for head in found for entry in head[i]] for i in range(len(x))]
        together = normalised(together, block.norm_eps or 0.0, False)
        found = [scaled([row[h * width : (h + 1) * width] for row in together], weight[h]) for h in range(len(weights))]
    return found if side is None else [turned(head, getattr(block, f"{side}_rotation")) for head in found]


def attended(x: Rows, block: Attention) -> Rows:
    n, out = len(x), [[mpmath.mpf(0)] * block.w_o.shape[-1] for _ in x]
    for h, (q, k, v) in enumerate(zip(*(heads_of(x, block, which) for which in "qkv"), strict=True)):
        for i in range(n):
            seen = range(i + 1) if block.causal else range(n)
            weights = [mpmath.exp(mpmath.mpf(block.scale_value) * mpmath.fdot(q[i], k[j])) for j in seen]
            total = mpmath.fsum(weights)
            mixed = [mpmath.fdot(weights, [v[j][d] for j in seen]) / total for d in range(len(v[0]))]
            added = linear([mixed], block.w_o[h].mT, None)[0]
            out[i] = [a + b for a, b in zip(out[i], added, strict=True)]
    bias = [0.0] * len(out[0]) if block.b_o is None else block.b_o.tolist()
    return [[a + mpmath.mpf(b) for a, b in zip(row, bias, strict=True)] for row in out]


def precise(layer: Layer, x: Rows) -> Rows:
    """The layer at rows of many digits."""
    if isinstance(layer, Sequence):
        for part in layer.layers:
            x = precise(part, x)
        return x
    if isinstance(layer, Residual):
        skip = x if layer.skip is None else precise(layer.skip, x)
        return [[a + b for a, b in zip(*rows, strict=True)] for rows in zip(skip, precise(layer.body, x), strict=True)]
    if isinstance(layer, Linear):
        return linear(x, layer.weight, layer.bias)
    if isinstance(layer, Pointwise):
        return [[ACTIVATIONS[layer.activation](entry) for entry in row] for row in x]
    if isinstance(layer, Normalization):
        x = normalised(x, layer.epsilon, layer.centred)
        x = x if layer.weight is None else scaled(x, layer.weight)
        bias = [0.0] * len(x[0]) if layer.bias is None else layer.bias.tolist()
        return [[a + mpmath.mpf(b) for a, b in zip(row, bias, strict=True)] for row in x]
    if isinstance(layer, AttentionLayer):
        return attended(x, layer.block)
    if isinstance(layer, Positions):
        assert layer.added is not None
        return [
            [a + mpmath.mpf(b) for a, b in zip(*rows, strict=True)]
            for rows in zip(x, layer.added.tolist(), strict=True)
        ]
    if isinstance(layer, Pool) and layer.how == "mean":
        return [[mpmath.fsum(column) / len(x) for column in zip(*x, strict=True)]]
    assert isinstance(layer, Flatten | Pool)
    return [[entry for row in x for entry in row]] if isinstance(layer, Flatten) else x[:1]


def distance(y: Tensor, rows: Rows) -> float:
    """|y - rows| in the Frobenius norm."""
    return float(
        mpmath.sqrt(
            mpmath.fsum(
                (mpmath.mpf(a) - b) ** 2
                for s, t in zip(y.tolist(), rows, strict=True)
                for a, b in zip(s, t, strict=True)
            )
        )
    )


@pytest.fixture(autouse=True)
def _many_digits() -> Any:
    with mpmath.workdps(DIGITS):
        yield


# -- of one layer -----------------------------------------------------------------------------------------------------


def normed_attention(draw: Draw, over: Any) -> AttentionLayer:
    angles = draw(3, 1)
    rotation = torch.stack([angles.cos(), angles.sin()], -2)
    fields = {"query_rotation": rotation, "key_rotation": rotation, "causal": True}
    fields |= {"query_norm_weight": draw(2, 2), "key_norm_weight": draw(2, 2), "norm_eps": 0.1, "norm_over": over}
    return attention(draw, 3, 4, scale=2.0, **fields)


LAYERS: dict[str, Callable[[Draw], Layer]] = {
    "linear": lambda d: Linear(1e6 * d(5, 4), d(5)),
    **{name: (lambda d, name=name: Pointwise(name)) for name in ACTIVATIONS},
    "layer norm": lambda d: norm(d, 4),
    "rms norm": lambda d: norm(d, 4, centred=False, epsilon=1e-9),
    "attention": lambda d: attention(d, 3, 4, scale=2.0),
    "causal attention": lambda d: Residual(attention(d, 3, 4, causal=True)),
    "norm of heads": lambda d: normed_attention(d, "head"),
    "norm of all heads": lambda d: normed_attention(d, "all_heads"),
    "feed-forward": lambda d: Residual(feed_forward(d, 4, 6, "gelu")),
    "mean": lambda d: Sequence((norm(d, 4), Pool("mean"))),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0])
def test_the_bound_covers_the_truth_and_is_small(name: str, size: float) -> None:
    for seed in range(3):
        draw = Draw(seed)
        layer, x = LAYERS[name](draw), size * draw(3, 4)
        y = layer(x)
        truth, bound = distance(y, precise(layer, many(x))), float(lost_by(layer, x, y, 2))
        assert truth <= bound
        # Logits grow with the square of the input, and so does what their rounding does to the maps.
        assert bound <= 1e-11 * max(1, size**2) * float(y.norm() + x.norm()) + 1e-14


@pytest.mark.parametrize("layer_norm", [True, False])
def test_folded_layers_are_compared_with_what_they_stand_for(layer_norm: bool) -> None:
    draw = Draw(4)
    before, mix = norm(draw, 4, centred=layer_norm), attention(draw, 3, 4)
    x = draw(3, 4)
    (_, plain), (_, folded) = rewritten([("norm", before), ("attention", Residual(mix))])
    assert isinstance(folded, Residual)
    z = plain(x)
    exact_z = normalised(many(x), before.epsilon, before.centred)
    y = folded(z)
    truth = precise(Sequence((before, Residual(mix))), many(x))
    # The computed z is within 1e-15 of the exact one, and the folded layer was told no more than z.
    moved = distance(z, exact_z) * float(network_bound(folded, z, 1e-12).value)
    own = sum(float(lost_by(part, z, part(z), 2)) for part in (folded.body, folded.skip) if part is not None)
    assert distance(y, truth) <= moved + own + 1e-15 * float(y.norm())


def test_items_of_a_batch_have_their_own_masks() -> None:
    draw = Draw(6)
    mask = torch.zeros(2, 1, 3, 3).double()
    mask[1, :, :, 0] = -torch.inf
    layer, x = AttentionLayer(attention(draw, 3, 4).block.replace(logit_bias=mask)), draw(2, 3, 4)
    y = layer(x)
    lost = lost_by(layer, x, y, 2)
    assert lost.shape == (2,)
    assert bool((lost <= 1e-11).all())
    assert float(lost_by(layer, x, y.flip(0), 2).min()) > 1e-3


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("rotary", [True, False])
def test_errors_of_folded_weights_move_the_jacobian_less_than_promised(seed: int, rotary: bool) -> None:
    """With errors large enough to be seen."""
    draw = Draw(seed)
    angles = draw(3, 1)
    rotation = 1.005 * torch.stack([angles.cos(), angles.sin()], -2)
    fields: dict[str, Any] = {"query_rotation": rotation, "key_rotation": rotation} if rotary else {}
    block = attention(draw, 3, 4, scale=0.3, **fields).block
    names = ("w_q", "w_k", "w_v", "b_q", "b_k", "b_v")
    sizes = {name: (0.005 * draw(*getattr(block, name).shape)).abs() for name in names}
    promised = float(folding_change(FoldedAttention(block, sizes), block.x, torch.tensor(0.0).double()))
    largest = 0.0
    for _ in range(20):
        signs = {name: draw(*sizes[name].shape) for name in names}
        exact = block.replace(**{name: getattr(block, name) + sizes[name] * signs[name].sign() for name in names})
        one, other = (torch.func.jacrev(b.function())(block.x).reshape(12, 12) for b in (block, exact))
        largest = max(largest, float(torch.linalg.matrix_norm(one - other, 2)))
    assert largest <= promised
    assert promised <= 1e4 * largest  # norms of everything: crude, and small all the same


# -- of networks and certificates -------------------------------------------------------------------------------------


@pytest.mark.parametrize("pre_norm", [True, False])
def test_the_output_of_networks_is_within_what_they_say(pre_norm: bool) -> None:
    draw = Draw(8)
    network = transformer(draw, 3, 4, pre_norm=pre_norm, centred=True, activation="gelu", how="mean", depth=2)
    x = draw(3, 4)
    truth = precise(network, many(x))
    bound = network_bound(network, x, 1e-9)
    assert bound.lost is not None
    assert distance(bound.output, truth) <= float(bound.lost) <= 1e-6
    assert network_bound(network, x).lost is None
    prepared = JointNetwork(network, x)
    assert distance(prepared.output[None], truth) <= float(prepared.bound(1e-9).lost) <= 1e-9


def cancelling(seed: int) -> tuple[Sequence, Tensor]:
    """Two hidden features of about 1e12 that differ by far less than their rounding: what is left is noise."""
    draw = Draw(seed)
    x, large = draw(1, 1, 6), 1e12 * draw(6)
    small = draw(6)
    small = small - x.flatten() * (small @ x.flatten() + 1e-6) / x.flatten().square().sum()
    hidden = Linear(torch.stack([large + small, large]))
    return Sequence((hidden, Linear(torch.tensor([[1.0, -1.0], [0.0, 0.0]]).double()))), x


def exact_margin(network: Sequence, x: Tensor) -> Fraction:
    """f_0 - f_1 in rational arithmetic."""
    first, second = network.layers
    assert isinstance(first, Linear)
    assert isinstance(second, Linear)
    hidden = [
        sum(Fraction(a) * Fraction(b) for a, b in zip(row, x.flatten().tolist(), strict=True))
        for row in first.weight.tolist()
    ]
    return sum((Fraction(w) * h for w, h in zip(second.weight[0].tolist(), hidden, strict=True)), Fraction(0))


def misjudged() -> tuple[Sequence, Tensor]:
    """A network whose floats choose class 0 where the exact logits choose class 1."""
    for seed in range(200):
        network, x = cancelling(seed)
        logits = network(x).flatten()
        if float(logits[0]) > 0 and exact_margin(network, x) < 0:
            return network, x
    raise AssertionError("no such network among 200")


@pytest.mark.parametrize("method", ["taylor", "joint", "product"])
def test_no_certificate_where_the_floats_choose_another_class(method: Any) -> None:
    network, x = misjudged()
    found = certify(network, x, torch.tensor([0]), method=method)
    assert bool(found.correct)  # as computed
    assert float(found.radius) == 0
    assert found.rounding.startswith("proved")


@pytest.mark.parametrize("method", ["joint", "product"])
def test_the_analysis_is_what_keeps_the_certificate_away(method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    network, x = misjudged()
    for module in (containers, joint, certify_module()):
        monkeypatch.setattr(module, "lost_by", lambda layer, x, y, dimensions: y.new_zeros(y.shape[: y.dim() - 2]))
    assert float(certify(network, x, torch.tensor([0]), method=method).radius) > 0


def certify_module() -> Any:
    import sys

    return sys.modules["lipbounds.certify"]


def test_the_proved_constant_is_the_truth_up_to_rounding() -> None:
    draw = Draw(10)
    network = transformer(draw, 3, 4, pre_norm=True, centred=True, activation="gelu", how="mean", depth=2)
    x = draw(2, 3, 4)
    found = proved_constant(network, x)
    assert found.kind == "proved"
    for value, item in zip(found.value.tolist(), x, strict=True):
        truth = largest_norm(network.function(), item, 0.0)
        assert truth * (1 - 1e-12) <= value <= truth * (1 + 1e-6)
    with pytest.raises(InvalidInput, match="one batch dimension"):
        proved_constant(network, x[0])


def test_a_proved_constant_counts_that_the_inputs_of_layers_are_rounded() -> None:
    """A step of tanh where the exact input is elsewhere: the computed slope is not the slope."""
    one = torch.ones(1, 1).double()
    large = torch.tensor([[1e16, -1e16, 1.0]]).double()
    network = Sequence((Linear(large), Pointwise("tanh"), Linear(one)))
    x = torch.tensor([[[1.0 + 2**-52, 1.0 + 2**-52, 0.0]]]).double()
    assert float(proved_constant(network, x).value) >= 1e16


def test_rounding_costs_nothing_where_the_network_is_well_conditioned() -> None:
    draw = Draw(9)
    network = transformer(draw, 3, 4, pre_norm=True, centred=True, activation="gelu", how="mean")
    prepared = JointNetwork(network, draw(3, 4))
    whole = float(prepared.bound(1e-3).norm)
    prepared._stages = [dc.replace(stage, lost=0 * stage.lost) for stage in prepared._stages]
    assert float(prepared.bound(1e-3).norm) >= whole * (1 - 1e-9)


def test_what_is_not_finite_is_not_bounded() -> None:
    layer, x = Normalization(True, 0.0), torch.ones(1, 4).double()
    assert float(lost_by(layer, x, layer(x), 2)) == torch.inf
    assert flat([("", layer)])
